"""Requests to stop, heard at once: also while the main thread sits in a collective, where Python's handlers
do not run."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from distrib.errors import EXIT_CRASH
from distrib.faults.heartbeat import TOLD_TO_STOP
from distrib.faults.watchdog import tell
from distrib.trainer import Trainer

ALWAYS = (signal.SIGUSR1, signal.SIGTERM)
HEARD = (*ALWAYS, signal.SIGINT, signal.SIGHUP)
"""Signals that ask to stop; ALWAYS also where they were ignored."""


@contextmanager
def listening(trainer: Trainer, last: bool = False) -> Iterator[None]:
    """SIGUSR1, SIGTERM, SIGHUP and Ctrl-C ask the run to end, with a checkpoint, on all ranks at the same
    step.

    The C handler of Python writes each signal's number into a pipe, and a thread reads it. With several ranks
    SIGTERM may also be the launcher's, after a rank has died: if one of this host has, that is said, and
    nothing is waited for. A second Ctrl-C ends the process at once. SIGHUP and SIGINT stay ignored where they
    were, as nohup and a shell's background jobs want it.

    Afterwards they are handled as before; with `last` they are ignored, for the process ends, and a late one
    must not change its exit code. A late SIGUSR1, which kills by default, always is.
    """
    before = {number: signal.getsignal(number) for number in HEARD}
    heard = [number for number in HEARD if number in ALWAYS or before[number] != signal.SIG_IGN]
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    for number in heard:
        signal.signal(number, lambda *_: None)
    wakeup = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=_hear, args=(read_end, trainer), daemon=True, name="signals").start()
    try:
        yield
    finally:
        for number in heard:  # first: none may find Python's default
            signal.signal(number, signal.SIG_IGN if last or number == signal.SIGUSR1 else before[number])
        signal.set_wakeup_fd(wakeup)
        os.close(write_end)  # ends the thread


def _hear(read_end: int, trainer: Trainer) -> None:
    with os.fdopen(read_end, "rb", buffering=0) as pipe:
        interrupts = 0
        while numbers := pipe.read(1):
            number = numbers[0]
            trainer.stop_requested = trainer.stop_requested or number in HEARD
            interrupts += number == signal.SIGINT
            if interrupts > 1:
                os._exit(EXIT_CRASH)
            if number == signal.SIGTERM and trainer.world.size > 1:
                _look_for_the_dead(trainer)


def _look_for_the_dead(trainer: Trainer) -> None:
    """End this process too where a rank of this host is gone; a launcher's SIGTERM leaves half a second for
    it."""
    watchdog = trainer.world.watchdog
    watchdog.publish(now=True, state=TOLD_TO_STOP)
    if verdict := watchdog.ask(lambda board: board.dead_neighbour()):
        tell(f"distrib: {verdict}")
        time.sleep(0.1)
        os._exit(EXIT_CRASH)
