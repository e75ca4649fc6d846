"""What ends a job that cannot go on: a crash takes all ranks along, and no wait is without bound."""

from __future__ import annotations

import math
import mmap
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
from distrib.errors import EXIT_CRASH, UserError
from distrib.faults.heartbeat import Board


class Failure(RuntimeError):
    """Something went wrong on a rank that is known, and need not be this one."""

    def __init__(self, rank: int, cause: str) -> None:
        super().__init__(f"rank {rank}: {cause}")
        self.rank, self.cause = rank, cause


TICK = 0.5
"""Seconds between two looks of a watchdog."""


@dataclass
class Wait:
    """A wait for other ranks or a device: what for, how long it may take, how long it has taken."""

    what: str
    limit: float  # seconds
    seconds: float = 0.0


class Watchdog:
    """Ends the process, and with it the job, when one wait lasts longer than `timeout` seconds or a check
    fails.

    A thread looks twice a second, so it works while the main thread is stuck in a collective. `checks` are
    calls that raise once something went wrong that no call of the main thread reports, as NCCL's asynchronous
    errors. A second thread writes to `board`, once there is one, and asks it which rank keeps the others
    waiting, so that a file system that hangs cannot stop the clock.

    Time in which the watchdog itself did not run is no waiting time: a job that is suspended and continued
    (Slurm's gang scheduling, Ctrl-Z, a laptop's lid) waits no longer than it ran.
    """

    def __init__(self, rank: int, timeout: float) -> None:
        self.rank, self.timeout, self.step = rank, timeout, 0
        self.board: Board | None = None
        self.collectives: deque[str] = deque(maxlen=64)  # the last ones: number, step, name
        self._begun = 0
        self._wait: Wait | None = None
        self.on_expiry: list[Callable[[], None]] = []
        self.checks: list[Callable[[], None]] = []
        self._checking = threading.Lock()
        self._questions = queue.SimpleQueue[Callable[[], None]]()
        RESERVE.take()
        for name, work in (("watchdog", self._run), ("board", self._speak)):
            threading.Thread(target=self._forever, args=(work,), daemon=True, name=name).start()

    @contextmanager
    def waiting(self, what: str, patience: float = 1) -> Iterator[None]:
        """Mark a wait that must end within `patience` timeouts; one inside another counts for itself."""
        outer = self._wait
        self._begun += 1
        self.collectives.append(f"{self._begun}: {what}, step {self.step}")
        self._wait = Wait(what, patience * self.timeout)
        try:
            yield
        finally:
            self._wait = outer

    def forget_checks(self) -> None:
        """From the return on, none of `checks` runs any more."""
        with self._checking:
            self.checks.clear()

    def publish(self, now: bool = False, **news: str) -> None:
        """Write to the board, where there is one, what this rank does."""
        wait = self._wait
        if self.board:
            doing = f"waiting in {wait.what}" if wait else "computing"
            self.board.publish(now, step=self.step, doing=doing, collectives=self._begun, **news)

    def _speak(self) -> None:
        while True:
            with suppress(queue.Empty):
                self._questions.get(timeout=TICK)()
            self.publish()

    def ask(self, question: Callable[[Board], Any]) -> Any:
        """What the board answers, within a few seconds; None where there is none, or its files cannot be
        had."""
        board, answers, done = self.board, list[Any](), threading.Event()
        if board is None:
            return None

        def put(board: Board = board) -> None:
            with suppress(Exception):  # whatever is wrong with the disk, the job must end
                answers.append(question(board))
            done.set()

        self._questions.put(put)  # a thread of its own could not be started where memory has run out
        done.wait(6)
        return answers[0] if answers else None

    def _run(self) -> None:
        before = time.monotonic()
        while True:
            time.sleep(TICK)
            now = time.monotonic()
            if wait := self._wait:
                wait.seconds += min(now - before, 2 * TICK)
                if wait.seconds > wait.limit and self._lasts(wait):
                    self._expire(
                        f"waited {wait.limit:.0f} s in {wait.what} at step {self.step}: another rank has"
                        " stopped or is too slow; see its log, or raise --timeout"
                    )
            before = now
            with self._checking:
                self._check()

    def _forever(self, work: Callable[[], None]) -> None:
        """Run the thread's `work`, again where memory has run out: without it no wait would be bounded."""
        while True:
            try:
                work()
            except MemoryError:
                RESERVE.release()

    def _lasts(self, wait: Wait) -> bool:
        """Look again: whether the main thread, given the time to run, is still in the same wait."""
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
            self._accuse(what)
        finally:
            os._exit(EXIT_CRASH)

    def _accuse(self, what: str) -> None:
        RESERVE.release()
        tell(f"distrib: rank {self.rank} on {socket.gethostname()} {what}")
        if verdict := self.ask(lambda board: board.accuse(what, list(self.collectives), self.publish)):
            tell(f"distrib: {verdict}")
        for callback in self.on_expiry:
            with suppress(
                RuntimeError, MemoryError
            ):  # no thread can be started: the end of the process must do
                threading.Thread(target=callback, daemon=True).start()
        time.sleep(0.5)  # for the callbacks, and for the launcher to pass the line on
        end_launcher(LAUNCHER_GRACE)


class Reserve:
    """Memory and file descriptors that the end of a rank needs, where it ends because they have run out."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._files: list[int] = []

    def take(self) -> None:
        """Hold them, once in a process however many watchdogs it has."""
        if self._memory is None:
            self._memory = mmap.mmap(-1, RESERVED_BYTES)  # address space only: nobody writes there
            files = range(RESERVED_FILES)
            self._files = [os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) for _ in files]

    def release(self) -> None:
        """Give them back, for the traceback, the verdict and the launcher's end."""
        memory, self._memory = self._memory, None
        files, self._files = self._files, []
        if memory is not None:
            memory.close()
        for file in files:
            os.close(file)


RESERVE = Reserve()
RESERVED_BYTES, RESERVED_FILES = 32 << 20, 8
"""A thread's stack is 8 MiB of address space; a verdict has four files open, and a child process three."""


def tell(text: str) -> None:
    """Write a line to standard error, whatever has become of it and of the memory."""
    with suppress(OSError, ValueError, MemoryError, RuntimeError):
        print(text, file=sys.stderr, flush=True)


LAUNCHER_GRACE = 8
"""Seconds that mpirun has to end the job after a rank has given up."""


def end_launcher(seconds: int) -> None:
    """Kill the launcher's process above this one, if it is still there after a while.

    mpirun waits without bound for a host that it cannot reach any more. Slurm's own step daemon is left
    alone.
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
def bounded(seconds: float, what: str) -> Iterator[None]:
    """Kill this process where the block takes longer than `seconds`, for calls that let no thread of Python
    run.

    A child process counts the seconds, as /proc tells it those in which this process was suspended: they are
    free.
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


def abort_on_crash(watchdog: Watchdog, abort: Callable[[], None]) -> None:
    """An uncaught exception in this rank prints its traceback and a verdict, and ends the whole job."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        RESERVE.release()
        with suppress(Exception):  # where memory has run out, the verdict is what counts
            traceback.print_exception(kind, error, trace)
        give_up(watchdog, error, abort)

    sys.excepthook = hook


def give_up(watchdog: Watchdog, error: BaseException, abort: Callable[[], None]) -> None:
    """Say why this rank cannot go on, on its last line and in failure.json, and end the job."""
    RESERVE.release()
    rank, cause = watchdog.rank, f"{type(error).__name__}: {error}"
    if isinstance(error, Failure):
        rank, cause = error.rank, error.cause
    elif isinstance(error, SystemExit):
        cause = f"it called sys.exit({error.code!r})"
    line = f"rank {rank} on {socket.gethostname()} failed at step {watchdog.step}: {cause}"
    line = watchdog.ask(lambda board: board.fail(cause, rank, watchdog.step)) or line
    tell(f"distrib: {line}")
    time.sleep(0.2)  # for the launcher to pass the line on
    end_launcher(LAUNCHER_GRACE)
    with suppress(OSError, MemoryError), bounded(5, "MPI_Abort"):  # without a bound it is not tried
        abort()
    os._exit(EXIT_CRASH)  # where there is nobody to abort, or no way to


class Agreement:
    """Lets a mistake that one rank finds become the same UserError on every rank.

        with agreement():
            ...

    Every rank must come here; none goes on where another failed.
    """

    def __init__(self, rank: int, allgather: Callable[[object], list[object]]) -> None:
        self.rank, self._allgather = rank, allgather

    @contextmanager
    def __call__(self) -> Iterator[None]:
        message: str | None = None
        try:
            yield
        except UserError as error:
            message = str(error)
        found = self._allgather(message)
        for rank, text in enumerate(found):
            if text is not None:
                where = "" if rank == 0 or all(found) else f" (rank {rank})"
                raise UserError(f"{text}{where}")
