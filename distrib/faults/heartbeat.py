"""ranks/ and failure.json in a run's folder: what each rank last did, and which one ended the job, said
without MPI.

Every rank's watchdog publishes a line about its rank, at most once a second. When a job ends otherwise than
it should, whoever notices reads what the others said last, and names a rank: one that said why it failed, one
that fell silent, or the one furthest behind. The first verdict stands. `distrib verdict RUN` prints it after
the fact.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from distrib.errors import UserError
from distrib.files import create, fits, printable, read_json, replace

SILENT = 2.5
"""Seconds without a new word, of a rank that speaks every second, after which it counts as stopped or
gone."""

TOLD_TO_STOP, REFUSED, FAILED = "told to stop", "ended with a message", "failed: "


@dataclass
class Word:
    """What a rank says of itself."""

    rank: int
    host: str
    pid: int
    step: int = 0
    doing: str = "starting"  # a collective that it waits in, or "computing"
    collectives: int = 0  # begun so far
    state: str = "running"  # or "finished", TOLD_TO_STOP, REFUSED, FAILED…
    time: float = 0.0

    @property
    def running(self) -> bool:
        return self.state == "running"


KINDS = {field.name: str(field.type) for field in fields(Word)}
"""Types of what a rank's file must hold."""

VERDICT = {"rank": "int", "host": "str", "step": "int", "cause": "str"}
"""Types of what failure.json must hold."""

MOST_BYTES = 1 << 16
"""Of a rank's file or a verdict; they have a few hundred, and a cause that is cut at MOST_CAUSE."""

MOST_CAUSE = 2000


class Board:
    """One rank's place on the board of a run's folder."""

    def __init__(self, folder: Path, rank: int, size: int, step: int = 0) -> None:
        self.folder, self.size = folder, size
        self.word = Word(rank, socket.gethostname(), os.getpid(), step)
        self.ranks = folder / "ranks"
        self._published, self._speaking = 0.0, threading.Lock()
        with contextlib.suppress(OSError):
            self.ranks.mkdir(parents=True, exist_ok=True)
        self.publish(now=True)

    def publish(self, now: bool = False, **news: Any) -> None:
        """Take in `news` (fields of Word) and write them, at most once a second unless `now`. A full disk is
        no failure."""
        with self._speaking:
            for name, value in news.items():
                setattr(self.word, name, value)
            if now or time.monotonic() - self._published >= 1:
                self._published, self.word.time = time.monotonic(), time.time()
                self._write(f"{self.word.rank:05}.json", asdict(self.word))

    def _write(self, name: str, value: Any) -> None:
        with contextlib.suppress(OSError):
            replace(self.ranks / name, json.dumps(value).encode())

    def fail(self, cause: str, rank: int, step: int) -> str:
        """Say that `rank`, this one or another, failed; returns the verdict as a line."""
        cause = cause if len(cause) <= MOST_CAUSE else f"{cause[:MOST_CAUSE]}…"
        state = f"{FAILED}{cause}" if rank == self.word.rank else self.word.state
        self.publish(now=True, step=step, state=state)
        found = [
            dataclasses.replace(word, step=self.word.step) for word in read(self.folder) if word.rank == rank
        ]
        return conclude(self.folder, found[0] if found else self.word, cause)

    def accuse(self, otherwise: str, last: list[str], publish: Callable[[], None]) -> str:
        """Name the rank that keeps the others waiting; `otherwise` is the cause where none can be made out.

        `last` are this rank's last collectives: written down, for who wants to compare those of all ranks.
        Meanwhile `publish` is called: a rank that listens is not silent itself.
        """
        self.publish(now=True)
        self._write(f"{self.word.rank:05}-collectives.json", last)
        # the clocks of hosts differ: silent is who says nothing new
        before = {word.rank: word.time for word in read(self.folder)}
        for _ in range(10):  # looks, not seconds: all ranks may be suspended meanwhile
            time.sleep(SILENT / 10)
            publish()
        words = read(self.folder)
        silent = {word.rank for word in words if before.get(word.rank) == word.time}
        return conclude(self.folder, *suspect(words, silent, self.size, self.word, otherwise))

    def dead_neighbour(self) -> str | None:
        """The verdict on a rank of this host whose process is gone without a word, if there is one."""
        for word in read(self.folder):
            if word.host == self.word.host and word.running and gone(word.pid):
                return conclude(
                    self.folder, word, "its process is gone without a word: killed, or out of memory"
                )
        return None


def read(folder: Path) -> list[Word]:
    """What all ranks said last, by rank. A file that is no rank's word, whoever wrote it, is passed over."""
    words = []
    with contextlib.suppress(OSError):
        for path in sorted((folder / "ranks").glob("[0-9]*[0-9].json")):
            with contextlib.suppress(UserError):
                said = read_json(path, MOST_BYTES)
                if said.keys() == KINDS.keys() and all(
                    fits(kind, said[name]) for name, kind in KINDS.items()
                ):
                    words.append(Word(**said))
    return words


def suspect(
    words: list[Word], silent: set[int], size: int, witness: Word, otherwise: str
) -> tuple[Word, str]:
    """(rank, cause) by what the ranks said last, and which of them say nothing new."""
    heard = {word.rank for word in words}
    for word in words:
        if word.state.startswith(FAILED):
            return word, word.state.removeprefix(FAILED)
    running = [word for word in words if word.running or word.state == TOLD_TO_STOP]
    if quiet := [word for word in running if word.rank in silent]:
        word = min(quiet, key=lambda word: word.time)
        return word, f"not a word for {time.time() - word.time:.0f} s: stopped, killed, or its host is gone"
    missing = sorted(set(range(size)) - heard)
    if missing and len({word.host for word in words}) > 1:  # else the folder is not shared between hosts
        unknown = Word(missing[0], "an unknown host", 0, witness.step)
        return unknown, "never said a word: it did not start, or cannot write to the run's folder"
    behind = min(running, key=lambda word: (word.step, word.collectives, word.rank), default=witness)
    if (behind.step, behind.collectives) < (witness.step, witness.collectives) or behind.doing == "computing":
        return behind, f"behind the others, {behind.doing} at step {behind.step}"
    return witness, otherwise


def conclude(folder: Path, word: Word, cause: str) -> str:
    """Write failure.json unless there is one; returns the verdict that stands, as a line."""
    verdict = {
        "rank": word.rank,
        "host": word.host,
        "pid": word.pid,
        "step": word.step,
        "cause": cause,
        "time": time.time(),
    }
    path, text = folder / "failure.json", json.dumps(verdict, indent=2).encode()
    beside = path.with_name(f".failure-{word.host}-{os.getpid()}.tmp")
    try:
        create(beside, text)
        os.link(beside, path)  # fails where another rank was first
    except FileExistsError:
        verdict = read_verdict(folder) or verdict
    except OSError:  # no hard links here, or a full or lost disk: the line is still said
        try:
            create(path, text)
        except OSError:
            verdict = read_verdict(folder) or verdict
    with contextlib.suppress(OSError):
        beside.unlink(missing_ok=True)
    return line(verdict)


def read_verdict(folder: Path) -> dict[str, Any] | None:
    """failure.json; None where there is none, or something else is in its place."""
    with contextlib.suppress(UserError):
        found = read_json(folder / "failure.json", MOST_BYTES)
        if all(fits(kind, found.get(name)) for name, kind in VERDICT.items()):
            return found
    return None


def line(verdict: dict[str, Any]) -> str:
    """A verdict for people."""
    host, cause = printable(verdict["host"], 100), printable(verdict["cause"], MOST_CAUSE)
    return f"rank {verdict['rank']} on {host} failed at step {verdict['step']}: {cause}"


def gone(pid: int) -> bool:
    """Whether there is no such process on this host, or only what is left of a dead one."""
    try:
        os.kill(pid, 0)
        if not Path("/proc/self/stat").exists():
            return False
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return True
    except OSError:  # it belongs to somebody else, or this process has no descriptor left
        return False
    return state in "ZX"


def explain(folder: Path, ended: bool = False) -> str:
    """The verdict on a run that did not end well, from failure.json or from what the ranks wrote last.

    Silence alone is no verdict, unless the job has `ended`: a job may be suspended.
    """
    if verdict := read_verdict(folder):
        return line(verdict)
    words = read(folder)
    failed = [word for word in words if word.state.startswith(FAILED)]
    alive = [word for word in words if word.running]  # those that were told to stop, or finished, said so
    if alive and not failed:
        time.sleep(SILENT)
        if any(word.time != before.time for word, before in zip(read(folder), words, strict=False)):
            return f"{folder}: the run goes on"
        if not (ended or all(word.host == socket.gethostname() and gone(word.pid) for word in alive)):
            return f"{folder}: silent, but it may be suspended or on another host; --ended if its job is over"
    if not failed and not alive:
        return f"{folder} tells of no rank that failed"
    word = min(failed or alive, key=lambda word: word.time)
    cause = word.state.removeprefix(FAILED) if failed else "it ended without a word: killed, or out of memory"
    return conclude(folder, word, cause)
