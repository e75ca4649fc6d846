"""Ends a job that cannot continue: a crash of one rank ends all, and every wait is bounded."""

from __future__ import annotations

import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from distrib import LAUNCHERS, parent
from distrib.errors import EXIT_CRASH, RankLost
from distrib.faults.heartbeat import Heartbeats
from distrib.faults.reserve import RESERVE


class RankFailure(RuntimeError):
    """A failure of a known rank, this one or another."""

    def __init__(self, rank: int, cause: str) -> None:
        super().__init__(f"rank {rank}: {cause}")
        self.rank, self.cause = rank, cause


TICK = 0.5
"""Seconds between two checks of a watchdog."""


@dataclass
class Wait:
    """A wait for other ranks or a device."""

    what: str
    limit: float  # seconds
    seconds: float = 0.0
    lenient: bool = True  # before the end of the job, a hanging rank may be ended


class Watchdog:
    """Ends the process, and with it the job, if a wait lasts longer than `timeout` seconds or a check fails.

    A thread looks twice a second, so it works while the main thread is stuck in a collective. `checks` are
    functions that raise on errors that the main thread never sees, such as NCCL's asynchronous ones. A second
    thread does all file access: it publishes this rank's heartbeat and diagnoses failures. So a hanging file
    system cannot stop the clock.

    Only time in which the watchdog itself ran counts. A job that is suspended and continued (Slurm's gang
    scheduling, Ctrl-Z, a laptop's lid) does not time out.
    """

    def __init__(self, rank: int, timeout: float, elastic: bool = False) -> None:
        """Of `rank`, its number at the start. `elastic`: a rank that fails ends alone."""
        self.rank, self.timeout, self.step, self.elastic = rank, timeout, 0, elastic
        self.others_go_on: Callable[[], bool] = lambda: elastic  # without this rank, should it fail
        # kills ranks of this host that hang, given what says whether this one still waits
        self.end_hanging: Callable[[Callable[[], bool]], None] | None = None
        self.heartbeats: Heartbeats | None = None  # once there is a run's folder
        self.collectives: deque[str] = deque(maxlen=64)  # the last ones: number, step, name
        self._begun = 0
        self._wait: Wait | None = None
        self.on_expiry: list[Callable[[], None]] = []
        self.checks: list[Callable[[], None]] = []
        self.tick = TICK
        self.lost = False  # a check has heard of the death of a rank, after which the others may go on
        self._checking = threading.Lock()
        self._calls = queue.SimpleQueue[Callable[[], None]]()  # for the heartbeat thread
        self._stopped = threading.Event()
        RESERVE.take()
        loops = {"watchdog": self._watch_loop, "heartbeat": self._publish_loop}
        self._threads = [
            threading.Thread(target=self._run_forever, args=(loop,), daemon=True, name=name)
            for name, loop in loops.items()
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End both threads: from now on no wait is bounded."""
        self._stopped.set()
        self._calls.put(lambda: None)  # wakes the heartbeat thread
        for thread in self._threads:
            thread.join(6)  # a disk may hang

    @contextmanager
    def waiting(self, what: str, timeouts: float = 1) -> Iterator[None]:
        """Mark a wait that must end within `timeouts` timeouts. A nested wait has a clock of its own.

        RankLost if a check has heard of a death: what was waited for does not count.
        """
        outer = self._wait
        self._begun += 1
        self.collectives.append(f"{self._begun}: {what}, step {self.step}")
        self._wait = Wait(what, timeouts * self.timeout)
        try:
            yield
        finally:
            self._wait = outer
        if self.lost:
            raise RankLost(what)

    def forget_check(self, check: Callable[[], None]) -> None:
        """Remove one of `checks`; it does not run after this returns."""
        with self._checking:
            if check in self.checks:
                self.checks.remove(check)

    def forget_loss(self) -> None:
        """Hear of no death from now on: the ranks are about to agree on what comes next."""
        with self._checking:
            self.checks.clear()
        self.lost = False

    def publish(self, now: bool = False, **changes: str) -> None:
        """Publish this rank's heartbeat, if there is a run's folder."""
        wait = self._wait
        if self.heartbeats:
            doing = f"waiting in {wait.what}" if wait else "computing"
            self.heartbeats.publish(now, step=self.step, doing=doing, collectives=self._begun, **changes)

    def _publish_loop(self) -> None:
        while not self._stopped.is_set():
            with suppress(queue.Empty):
                self._calls.get(timeout=TICK)()
            self.publish()

    def ask_heartbeats(self, call: Callable[[Heartbeats], Any]) -> Any:
        """The result of `call` in the heartbeat thread; None after a few seconds, or without heartbeats."""
        heartbeats, results, done = self.heartbeats, list[Any](), threading.Event()
        if heartbeats is None:
            return None

        def run(heartbeats: Heartbeats = heartbeats) -> None:
            with suppress(Exception):  # whatever is wrong with the disk, the job must end
                results.append(call(heartbeats))
            done.set()

        self._calls.put(run)  # a new thread could not be started when memory has run out
        done.wait(6)
        return results[0] if results else None

    def _watch_loop(self) -> None:
        before = time.monotonic()
        while not self._stopped.wait(self.tick):
            now = time.monotonic()
            if wait := self._wait:
                wait.seconds += min(now - before, 2 * TICK)
                if wait.seconds > wait.limit and self._still_in(wait) and not self._go_on(wait):
                    self._expire(
                        f"waited {wait.limit:.0f} s in {wait.what} at step {self.step}: another rank has"
                        " stopped or is too slow; see its log, or raise --timeout"
                    )
            before = now
            with self._checking:
                self._check()

    def _run_forever(self, loop: Callable[[], None]) -> None:
        """Run a thread's `loop`, and restart it if memory runs out: without it, waits would be unbounded."""
        while True:
            try:
                return loop()
            except MemoryError:
                RESERVE.release()

    def _go_on(self, wait: Wait) -> bool:
        """Whether to wait once more; then hanging ranks of this host were killed, as on other hosts."""
        if self.end_hanging is None or not wait.lenient:
            return False
        wait.lenient, wait.seconds, wait.limit = False, 0.0, HANG_GRACE
        self.end_hanging(lambda: self._wait is wait)
        return True

    def _still_in(self, wait: Wait) -> bool:
        """Whether the main thread, after it had time to run, is still in the same wait."""
        time.sleep(TICK)
        return self._wait is wait

    def _check(self) -> None:
        for check in self.checks:
            try:
                check()
            except Exception as error:
                self._expire(
                    f"found at step {self.step}: {error}: another rank or a link has failed; see the logs"
                    " of all ranks, with NCCL_DEBUG=INFO for NCCL's own"
                )

    def _expire(self, what: str) -> None:
        try:
            self._report(what)
        finally:
            end_process()

    def _report(self, what: str) -> None:
        """Print what happened and which rank is to blame, then run the callbacks."""
        RESERVE.release()
        print_error(f"distrib: rank {self.rank} on {socket.gethostname()} {what}")
        failure = self.ask_heartbeats(
            lambda beats: beats.diagnose(what, list(self.collectives), self.publish)
        )
        if failure:
            print_error(f"distrib: {failure}")
        for callback in self.on_expiry:
            # if no thread can be started, ending the process must be enough
            with suppress(RuntimeError, MemoryError):
                threading.Thread(target=callback, daemon=True).start()
        time.sleep(0.5)  # for the callbacks, and for the launcher to forward the lines
        end_launcher(LAUNCHER_GRACE)


def print_error(text: str) -> None:
    """Print a line to standard error; never fail, even if it is closed or memory has run out."""
    with suppress(OSError, ValueError, MemoryError, RuntimeError):
        print(text, file=sys.stderr, flush=True)


HANG_GRACE = 15.0
"""Seconds until the death of a hanging rank, which its host's other ranks killed, must have been heard of."""

LAUNCHER_GRACE = 8
"""Seconds that mpirun has to end the job after a rank aborted it."""


def end_launcher(seconds: int) -> None:
    """Kill the launcher, the parent of this process, if it still runs after `seconds`.

    mpirun waits forever for a host that it can no longer reach. Slurm's step daemon is never killed.
    """
    pid, name = parent()
    if name in LAUNCHERS:
        with suppress(OSError, MemoryError):
            subprocess.Popen(
                ["/bin/sh", "-c", f"sleep {seconds}; kill -9 {pid} 2>/dev/null"],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )


@contextmanager
def kill_after(seconds: float, what: str) -> Iterator[None]:
    """Kill this process if the block takes longer than `seconds`, for calls during which no thread can run.

    A child process counts the seconds. It reads in /proc when this process is suspended, and does not count
    those.
    """
    pid = os.getpid()
    script = (
        f"left={math.ceil(seconds)}; while [ $left -gt 0 ]; do sleep 1;"
        f" {{ read -r stat </proc/{pid}/stat; }} 2>/dev/null || exit;"
        " case ${stat##*) } in Z*) exit ;; T*) ;; *) left=$((left - 1)) ;; esac; done;"
        f" echo 'distrib: process {pid} on {socket.gethostname()}"
        f" spent {seconds:.0f} s in {what}: another rank or the launcher is gone' >&2; kill -9 {pid}"
    )
    guard = subprocess.Popen(
        ["/bin/sh", "-c", script], start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(guard.pid, signal.SIGKILL)
        guard.wait()


def abort_on_crash(watchdog: Watchdog, abort: Callable[[], None]) -> Callable[[], None]:
    """Make an uncaught exception in this rank print its traceback, report the failure and abort the job.

    Returns a function that undoes it.
    """
    before, undone = sys.excepthook, threading.Event()

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if undone.is_set():  # but somebody kept the hook
            return before(kind, error, trace)
        RESERVE.release()
        with suppress(Exception):  # if memory has run out, only the report counts
            traceback.print_exception(kind, error, trace)
        abort_job(watchdog, error, abort)

    def undo() -> None:
        undone.set()
        if sys.excepthook is hook:
            sys.excepthook = before

    sys.excepthook = hook
    return undo


def without_this_rank(watchdog: Watchdog) -> bool:
    """Whether the others go on. Should they not answer, this process ends."""
    if not watchdog.elastic:
        return False
    try:
        with kill_after(watchdog.timeout, "the agreement with the other ranks"):
            return watchdog.others_go_on()
    except Exception:  # no memory to ask
        return True


AT_JOBS_END: list[Callable[[], object]] = []
"""Called before this process ends with the whole job, and not by itself."""


def end_process() -> None:
    """End this process, as the job ends."""
    for call in AT_JOBS_END:
        call()
    os._exit(EXIT_CRASH)


def die() -> None:
    """End this process in the one way of which its launcher tells the other ranks."""
    os.kill(os.getpid(), signal.SIGKILL)


def abort_job(watchdog: Watchdog, error: BaseException, abort: Callable[[], None]) -> None:
    """Report why this rank cannot continue, on its last line and in failure.json, and end the job.

    If the others go on without it, it ends alone.
    """
    RESERVE.release()
    rank, cause = watchdog.rank, f"{type(error).__name__}: {error}"
    if isinstance(error, RankFailure):
        rank, cause = error.rank, error.cause
    elif isinstance(error, SystemExit):
        cause = f"it called sys.exit({error.code!r})"
    line = f"rank {rank} on {socket.gethostname()} failed at step {watchdog.step}: {cause}"
    if not isinstance(error, RankFailure) and without_this_rank(watchdog):
        watchdog.ask_heartbeats(lambda beats: beats.fail(cause, watchdog.step))
        print_error(f"distrib: {line}: the others go on")
        die()
    line = watchdog.ask_heartbeats(lambda beats: beats.report_failure(cause, rank, watchdog.step)) or line
    print_error(f"distrib: {line}")
    time.sleep(0.2)  # for the launcher to forward the line
    end_launcher(LAUNCHER_GRACE)
    if watchdog.elastic:  # Abort ends what has not been revoked
        end_process()
    # without the bound, MPI_Abort is not tried
    with suppress(OSError, MemoryError), kill_after(5, "MPI_Abort"):
        abort()
    end_process()  # if there is no launcher, or MPI_Abort returned
