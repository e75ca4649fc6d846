"""Stops a run at a signal, even while the main thread is in a collective, where no Python handler runs."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from distrib.errors import EXIT_CRASH
from distrib.faults.heartbeat import TOLD_TO_STOP
from distrib.faults.watchdog import print_error
from distrib.trainer import Trainer

NEVER_IGNORED = (signal.SIGUSR1, signal.SIGTERM)
STOP_SIGNALS = (*NEVER_IGNORED, signal.SIGINT, signal.SIGHUP)
"""Signals that ask a run to stop. NEVER_IGNORED do so even if they were ignored before."""

_ignored_at_end = set[signal.Signals]()


@contextmanager
def stop_on_signals(trainer: Trainer, exiting: bool = False) -> Iterator[None]:
    """Stop the run at SIGUSR1, SIGTERM, SIGHUP or Ctrl-C: with a checkpoint, all ranks after the same step.

    Python's C handler writes each signal's number into a pipe, which a thread reads. With several ranks,
    SIGTERM may also come from the launcher because a rank died: if one of this host has, that is reported
    and this process ends at once. With `exiting` a second Ctrl-C also ends it at once. SIGHUP and SIGINT stay
    ignored if they were, as nohup and a shell's background jobs want it.

    Afterwards the former handlers are back. With `exiting`, because the process is about to end, all these
    signals are ignored instead, until a run starts again: a late one must not change the exit code. Outside
    the main thread, which alone may set handlers, signals stay as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    handled = [
        number
        for number, handler in before.items()
        if handler is not None  # set in C
        and (number in (*NEVER_IGNORED, *_ignored_at_end) or handler != signal.SIG_IGN)
    ]
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    for number in handled:
        signal.signal(number, lambda *_: None)
    wakeup = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    listener = threading.Thread(
        target=_listen, args=(read_end, trainer, exiting), daemon=True, name="signals"
    )
    listener.start()
    try:
        yield
    finally:
        _ignored_at_end.update(handled if exiting else ())
        for number in handled:  # before the wakeup pipe goes, so that no signal finds Python's default
            signal.signal(number, signal.SIG_IGN if exiting else before[number])
        signal.set_wakeup_fd(wakeup)
        os.close(write_end)  # ends the thread
        if not exiting:
            listener.join()


def _listen(read_end: int, trainer: Trainer, exiting: bool) -> None:
    with os.fdopen(read_end, "rb", buffering=0) as pipe:
        interrupts = 0
        while numbers := pipe.read(1):
            number = numbers[0]
            if number in STOP_SIGNALS:
                trainer.stop_requested = trainer.stop_requested or number
            interrupts += number == signal.SIGINT
            if interrupts > 1 and exiting:
                os._exit(EXIT_CRASH)
            if number == signal.SIGTERM and trainer.world.size > 1 and not trainer.config.elastic:
                _exit_if_a_rank_died(trainer)


def _exit_if_a_rank_died(trainer: Trainer) -> None:
    """Report a dead rank of this host and end this process, within the half second that mpirun leaves."""
    watchdog = trainer.world.watchdog
    watchdog.publish(now=True, state=TOLD_TO_STOP)
    if failure := watchdog.ask_heartbeats(lambda beats: beats.find_dead_local_rank()):
        print_error(f"distrib: {failure}")
        time.sleep(0.1)
        os._exit(EXIT_CRASH)
