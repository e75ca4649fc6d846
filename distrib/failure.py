"""What ends a job that cannot go on: a crash takes all ranks along, and no wait is without bound."""

from __future__ import annotations

import faulthandler
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

from distrib import parent
from distrib.board import Board
from distrib.errors import EXIT_CRASH, UserError


class Failure(RuntimeError):
    """Something went wrong on a rank that is known, and need not be this one."""

    def __init__(self, rank: int, cause: str) -> None:
        super().__init__(f"rank {rank}: {cause}")
        self.rank, self.cause = rank, cause


class Watchdog:
    """Ends the process, and with it the job, when one wait lasts longer than `timeout` seconds or a check fails.

    A thread looks twice a second, so it works while the main thread is stuck in a collective. `checks` are calls
    that raise once something went wrong that no call of the main thread reports, as NCCL's asynchronous errors.
    On `board`, once there is one, it publishes what this rank does, and finds out which rank keeps the others waiting.
    """

    def __init__(self, rank: int, timeout: float) -> None:
        self.rank, self.timeout, self.step = rank, timeout, 0
        self.board: Board | None = None
        self.collectives: deque[str] = deque(maxlen=64)  # the last ones: number, step, name
        self._begun = 0
        self._wait: tuple[str, float, float] | None = None
        self.on_expiry: list[Callable[[], None]] = []
        self.checks: list[Callable[[], None]] = []
        self._checking = threading.Lock()
        for name, work in (
            ("watchdog", self._run),
            ("board", self._speak),
        ):  # a file system that hangs must not stop the clock
            threading.Thread(target=work, daemon=True, name=name).start()

    @contextmanager
    def waiting(self, what: str, patience: float = 1) -> Iterator[None]:
        """Mark a wait that must end within `patience` timeouts; one inside another counts for itself."""
        outer = self._wait
        self._begun += 1
        self.collectives.append(f"{self._begun}: {what}, step {self.step}")
        self._wait = (what, time.monotonic(), patience * self.timeout)
        try:
            yield
        finally:
            self._wait = outer

    def forget_checks(self) -> None:
        """From the return on, none of `checks` runs any more."""
        with self._checking:
            self.checks.clear()

    def publish(self, now: bool = False, **news: str) -> None:
        """Say on the board, where there is one, what this rank does."""
        wait = self._wait
        if self.board:
            doing = f"waiting in {wait[0]}" if wait else "computing"
            self.board.publish(now, step=self.step, doing=doing, collectives=self._begun, **news)

    def _speak(self) -> None:
        while True:
            time.sleep(0.5)
            self.publish()

    def ask(self, question: Callable[[Board], Any]) -> Any:
        """What the board answers, within a few seconds; None where there is none, or its files cannot be had."""
        board, answers = self.board, list[Any]()
        if board is None:
            return None

        def put(board: Board = board) -> None:
            with suppress(Exception):  # whatever is wrong with the disk, the job must end
                answers.append(question(board))

        thread = threading.Thread(target=put, daemon=True)
        thread.start()
        thread.join(6)
        return answers[0] if answers else None

    def _run(self) -> None:
        while True:
            time.sleep(0.5)
            wait = self._wait
            if wait and time.monotonic() - wait[1] > wait[2]:
                self._expire(
                    f"waited {wait[2]:.0f} s in {wait[0]} at step {self.step}: another rank has stopped or is"
                    " too slow; see its log, or raise --timeout"
                )
            with self._checking:
                self._check()

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
        print(f"distrib: rank {self.rank} on {socket.gethostname()} {what}", file=sys.stderr, flush=True)
        if verdict := self.ask(lambda board: board.accuse(what, list(self.collectives))):
            print(f"distrib: {verdict}", file=sys.stderr, flush=True)
        for callback in self.on_expiry:
            threading.Thread(target=callback, daemon=True).start()
        time.sleep(0.5)  # for the callbacks, and for the launcher to pass the line on
        end_launcher(LAUNCHER_GRACE)
        os._exit(EXIT_CRASH)


LAUNCHER_GRACE = 8
"""Seconds that mpirun has to end the job after a rank has given up."""

LAUNCHERS = ("prterun", "prted", "mpirun", "mpiexec", "orterun", "orted", "hydra_pmi_proxy")


def end_launcher(seconds: int) -> None:
    """Kill the launcher's process above this one, if it is still there after a while.

    mpirun waits without bound for a host that it cannot reach any more. Slurm's own step daemon is left alone.
    """
    pid, name = parent()
    if name in LAUNCHERS:
        with suppress(OSError):
            subprocess.Popen(
                ["/bin/sh", "-c", f"sleep {seconds}; kill -9 {pid} 2>/dev/null"],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )


def abort_on_crash(watchdog: Watchdog, abort: Callable[[], None]) -> None:
    """An uncaught exception in this rank prints its traceback and a verdict, and ends the whole job."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        traceback.print_exception(kind, error, trace)
        give_up(watchdog, error, abort)

    sys.excepthook = hook


def give_up(watchdog: Watchdog, error: BaseException, abort: Callable[[], None]) -> None:
    """Say why this rank cannot go on, on its last line and in failure.json, and end the job."""
    rank, cause = watchdog.rank, f"{type(error).__name__}: {error}"
    if isinstance(error, Failure):
        rank, cause = error.rank, error.cause
    elif isinstance(error, SystemExit):
        cause = f"it called sys.exit({error.code!r})"
    line = f"rank {rank} on {socket.gethostname()} failed at step {watchdog.step}: {cause}"
    line = watchdog.ask(lambda board: board.fail(cause, rank, watchdog.step)) or line
    print(f"distrib: {line}", file=sys.stderr, flush=True)
    time.sleep(0.2)  # for the launcher to pass the line on
    end_launcher(LAUNCHER_GRACE)
    faulthandler.dump_traceback_later(
        5, exit=True, file=2
    )  # where abort cannot reach the launcher: it lets no thread run
    abort()
    os._exit(EXIT_CRASH)  # where there is nobody to abort


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
