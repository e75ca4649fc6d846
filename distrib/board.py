"""ranks/ and failure.json in a run's folder: what each rank last did, and which one ended the job, said without MPI.

Every rank's watchdog publishes a line about its rank, at most once a second. When a job ends otherwise than it should,
whoever notices reads what the others said last, and names a rank: one that said why it failed, one that fell silent,
or the one furthest behind. The first verdict stands. `python -m distrib.board RUN` prints it after the fact.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

SILENT = 3.0
"""Seconds without a word, of a rank that speaks every second, after which it counts as stopped or gone."""


@dataclass
class Word:
    """What a rank says of itself."""

    rank: int
    host: str
    pid: int
    step: int = 0
    doing: str = "starting"  # a collective that it waits in, or "computing"
    collectives: int = 0  # begun so far
    state: str = "running"  # or "finished", "told to stop", "failed: …"
    time: float = 0.0

    @property
    def running(self) -> bool:
        return self.state == "running"


class Board:
    """One rank's place on the board of a run's folder."""

    def __init__(self, folder: Path, rank: int, size: int) -> None:
        self.folder, self.size = folder, size
        self.word = Word(rank, socket.gethostname(), os.getpid())
        self.ranks = folder / "ranks"
        self._published = 0.0
        with contextlib.suppress(OSError):
            self.ranks.mkdir(parents=True, exist_ok=True)
            (self.ranks / f"{rank:05}-collectives.json").unlink(missing_ok=True)
            if rank == 0:
                (folder / "failure.json").unlink(missing_ok=True)
                for path in self.ranks.glob("[0-9]*.json"):  # of a start with more ranks
                    if int(path.name[:5]) >= size:
                        path.unlink(missing_ok=True)
        self.publish(now=True)

    def publish(self, now: bool = False, **news: Any) -> None:
        """Take in `news` (fields of Word) and write them, at most once a second unless `now`. A full disk is no failure."""
        for name, value in news.items():
            setattr(self.word, name, value)
        if now or time.monotonic() - self._published >= 1:
            self._published, self.word.time = time.monotonic(), time.time()
            with contextlib.suppress(OSError):
                _write(self.ranks / f"{self.word.rank:05}.json", asdict(self.word))

    def keep_trace(self, last: list[str]) -> None:
        """Write this rank's last collectives, for who wants to compare those of all ranks."""
        with contextlib.suppress(OSError):
            _write(self.ranks / f"{self.word.rank:05}-collectives.json", last)

    def fail(self, cause: str, rank: int | None = None) -> str:
        """Say that this rank (or another one that is known) failed; returns the verdict as a line."""
        self.publish(now=True, state=f"failed: {cause}" if rank in (None, self.word.rank) else self.word.state)
        found = [replace(word, step=self.word.step) for word in read(self.folder) if word.rank == rank]
        return conclude(self.folder, found[0] if found else self.word, cause)

    def accuse(self, otherwise: str) -> str:
        """Name the rank that keeps the others waiting; `otherwise` is the cause where none can be made out."""
        word, cause = suspect([*read(self.folder)], self.size, self.word, otherwise)
        return conclude(self.folder, word, cause)

    def dead_neighbour(self) -> str | None:
        """The verdict on a rank of this host whose process is gone without a word, if there is one."""
        for word in read(self.folder):
            if word.host == self.word.host and word.running and _gone(word.pid):
                return conclude(self.folder, word, "its process is gone without a word: killed, or out of memory")
        return None


def read(folder: Path) -> list[Word]:
    """What all ranks said last, by rank."""
    words = []
    for path in sorted((folder / "ranks").glob("[0-9]*[0-9].json")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            words.append(Word(**json.loads(path.read_text())))
    return words


def suspect(words: list[Word], size: int, witness: Word, otherwise: str) -> tuple[Word, str]:
    """(rank, cause) by what the ranks said last."""
    heard = {word.rank for word in words}
    for word in words:
        if word.state.startswith("failed: "):
            return word, word.state.removeprefix("failed: ")
    now, running = time.time(), [word for word in words if word.running]
    silent = [word for word in running if now - word.time > SILENT]
    if silent:
        word = min(silent, key=lambda word: word.time)
        return word, f"not a word for {now - word.time:.0f} s: stopped, killed, or its host is gone"
    missing = sorted(set(range(size)) - heard)
    if missing:
        return Word(missing[0], "an unknown host", 0), "never said a word: it did not start, or cannot write to the run's folder"
    behind = min(running, key=lambda word: (word.step, word.collectives, word.rank), default=witness)
    if (behind.step, behind.collectives) < (witness.step, witness.collectives) or behind.doing == "computing":
        return behind, f"behind the others, {behind.doing} at step {behind.step}"
    return witness, otherwise


def conclude(folder: Path, word: Word, cause: str) -> str:
    """Write failure.json unless there is one; returns the verdict that stands, as a line."""
    verdict = {"rank": word.rank, "host": word.host, "pid": word.pid, "step": word.step, "cause": cause, "time": time.time()}
    path = folder / "failure.json"
    temporary = path.with_name(f".failure-{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(verdict, indent=2))
        os.link(temporary, path)  # fails where another rank was first
    except FileExistsError:
        with contextlib.suppress(OSError, ValueError):
            verdict = json.loads(path.read_text())
    except OSError:
        pass  # a full or lost disk: the line is still said
    finally:
        temporary.unlink(missing_ok=True)
    return line(verdict)


def line(verdict: dict[str, Any]) -> str:
    """A verdict for people."""
    return "rank {rank} on {host} failed at step {step}: {cause}".format(**verdict)


def _write(path: Path, value: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


def _gone(pid: int) -> bool:
    """Whether there is no such process on this host, or only what is left of a dead one."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except PermissionError:
        return False
    except (ProcessLookupError, OSError):
        return True
    return state in "ZX"


def main() -> int:
    """Print the verdict on a run that did not end well, from failure.json or from what the ranks said last."""
    if len(sys.argv) != 2:
        print("usage: python -m distrib.board RUN", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    path = folder / "failure.json"
    if path.exists():
        print(f"distrib: {line(json.loads(path.read_text()))}")
        return 0
    words = read(folder)
    alive = [word for word in words if word.running]
    if not alive:
        print(f"distrib: {folder} tells of no rank that failed")
        return 0
    word = min(alive, key=lambda word: word.time)  # those that were told to stop, or finished, said so
    print(f"distrib: {conclude(folder, word, 'it ended without a word: killed, or out of memory')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
