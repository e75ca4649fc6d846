"""Heartbeat files: what each rank last did, and which rank ended a failed job, without using MPI.

`ranks/` in a run's folder holds one file per rank, which the rank's watchdog rewrites at most once a second.
When a job fails, the rank that notices reads the other ranks' heartbeats and blames, in order: a rank that
recorded an error, one whose heartbeat stopped, the one furthest behind. It records the result in
failure.json, where the first record wins. `distrib verdict RUN` prints it afterwards.
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

STALE_SECONDS = 2.5
"""A running rank rewrites its heartbeat every second; after this long without a new one it counts as dead."""

# values of `state` in a heartbeat file, besides "running" and "finished"
TOLD_TO_STOP, USER_ERROR, FAILED = "told to stop", "ended with a message", "failed: "
SURVIVED = "died, and the others went on: "


@dataclass
class Heartbeat:
    """One rank's heartbeat, as its file holds it."""

    rank: int
    host: str
    pid: int
    step: int = 0
    doing: str = "starting"  # "computing", or the collective that the rank waits in
    collectives: int = 0  # begun so far
    state: str = "running"  # or "finished", TOLD_TO_STOP, USER_ERROR, FAILED followed by the cause
    time: float = 0.0

    @property
    def running(self) -> bool:
        return self.state == "running"


HEARTBEAT_TYPES = {field.name: str(field.type) for field in fields(Heartbeat)}
"""Types of the fields of a heartbeat file."""

FAILURE_TYPES = {"rank": "int", "host": "str", "step": "int", "cause": "str"}
"""Types of the fields of failure.json that are read."""

MAX_BYTES = 1 << 16
"""Largest heartbeat file or failure.json that is read. Ours have a few hundred bytes, plus the cause."""

MAX_CAUSE = 2000
"""Longer causes are cut at this many characters."""


class Heartbeats:
    """Publishes one rank's heartbeat in a run's folder, and finds culprits among those of all ranks."""

    def __init__(self, folder: Path, rank: int, size: int, step: int = 0) -> None:
        self.folder, self.size = folder, size
        self.own = Heartbeat(rank, socket.gethostname(), os.getpid(), step)
        self.ranks = folder / "ranks"
        self._published, self._publishing = 0.0, threading.Lock()
        with contextlib.suppress(OSError):
            self.ranks.mkdir(parents=True, exist_ok=True)
        self.publish(now=True)

    def publish(self, now: bool = False, **changes: Any) -> None:
        """Change fields of this rank's heartbeat and write it, at most once a second unless `now`.

        Errors of the disk are ignored: training does not depend on heartbeats.
        """
        with self._publishing:
            for name, value in changes.items():
                setattr(self.own, name, value)
            if now or time.monotonic() - self._published >= 1:
                self._published, self.own.time = time.monotonic(), time.time()
                self._write(f"{self.own.rank:05}.json", asdict(self.own))

    def _write(self, name: str, value: Any) -> None:
        with contextlib.suppress(OSError):
            replace(self.ranks / name, json.dumps(value).encode())

    def report_failure(self, cause: str, rank: int, step: int) -> str:
        """Record that `rank`, this one or another, failed; returns the recorded failure as a line."""
        cause = shortened(cause)
        if rank == self.own.rank:
            self.fail(cause, step)
        else:
            self.publish(now=True, step=step)
        found = [
            dataclasses.replace(beat, step=self.own.step)
            for beat in read_heartbeats(self.folder)
            if beat.rank == rank
        ]
        return record_failure(self.folder, found[0] if found else self.own, cause)

    def fail(self, cause: str, step: int) -> None:
        """Leave word of what ends this rank."""
        self.publish(now=True, step=step, state=f"{FAILED}{shortened(cause)}")

    def fail_for(self, rank: int, cause: str) -> None:
        """Leave word of what ended another rank of this host."""
        for beat in read_heartbeats(self.folder):
            if beat.rank == rank:
                self._write(f"{rank:05}.json", asdict(dataclasses.replace(beat, state=f"{FAILED}{cause}")))

    def diagnose(self, fallback: str, collectives: list[str], publish: Callable[[], None]) -> str:
        """Record the rank that keeps the others waiting; `fallback` is the cause if none can be blamed.

        Writes down `collectives`, this rank's last ones, so that you can compare those of all ranks. Calls
        `publish` while it waits for heartbeats, so that this rank does not look dead to the others.
        """
        self._write(f"{self.own.rank:05}-collectives.json", collectives)
        return record_failure(self.folder, *self._culprit(fallback, publish))

    def find_hanging(self, publish: Callable[[], None]) -> int | None:
        """The rank that keeps the others waiting; None if it is this one, or none can be blamed."""
        beat, _ = self._culprit("", publish)
        return None if beat.rank == self.own.rank else beat.rank

    def _culprit(self, fallback: str, publish: Callable[[], None]) -> tuple[Heartbeat, str]:
        """(heartbeat, cause) of the rank to blame, after a look at whose heartbeats stand still."""
        self.publish(now=True)
        # clocks differ between hosts, so a heartbeat is stale if its time did not change
        before = {beat.rank: beat.time for beat in read_heartbeats(self.folder)}
        for _ in range(10):  # count looks, not seconds: all ranks may be suspended meanwhile
            time.sleep(STALE_SECONDS / 10)
            publish()
        beats = read_heartbeats(self.folder)
        stale = {beat.rank for beat in beats if before.get(beat.rank) == beat.time}
        return find_culprit(beats, stale, self.size, self.own, fallback)

    def find_dead_local_rank(self) -> str | None:
        """Record a running rank of this host whose process has died, as a line; None if there is none."""
        for beat in read_heartbeats(self.folder):
            if beat.host == self.own.host and beat.running and is_dead(beat.pid):
                return record_failure(
                    self.folder, beat, "its process is gone without an error: killed, or out of memory"
                )
        return None


def shortened(cause: str) -> str:
    """A cause that is not too long for a file."""
    return cause if len(cause) <= MAX_CAUSE else f"{cause[:MAX_CAUSE]}…"


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """The last heartbeat of every rank, by rank. Skips files that hold no heartbeat."""
    beats = []
    with contextlib.suppress(OSError):
        for path in sorted((folder / "ranks").glob("[0-9]*[0-9].json")):
            with contextlib.suppress(UserError):
                found = read_json(path, MAX_BYTES)
                if found.keys() == HEARTBEAT_TYPES.keys() and all(
                    fits(kind, found[name]) for name, kind in HEARTBEAT_TYPES.items()
                ):
                    beats.append(Heartbeat(**found))
    return beats


def find_culprit(
    beats: list[Heartbeat], stale: set[int], size: int, witness: Heartbeat, fallback: str
) -> tuple[Heartbeat, str]:
    """(heartbeat, cause) of the rank to blame, from all heartbeats and the ranks whose are `stale`.

    `witness` is the rank that asks: it is blamed, with `fallback` as the cause, if no other rank can be.
    """
    for beat in beats:
        if beat.state.startswith(FAILED):
            return beat, beat.state.removeprefix(FAILED)
    running = [beat for beat in beats if beat.running or beat.state == TOLD_TO_STOP]
    if stopped := [beat for beat in running if beat.rank in stale]:
        beat = min(stopped, key=lambda beat: beat.time)
        return beat, f"no heartbeat for {time.time() - beat.time:.0f} s: stopped, killed, or its host is gone"
    missing = sorted(set(range(size)) - {beat.rank for beat in beats})
    if missing and len({beat.host for beat in beats}) > 1:  # else the hosts do not share the folder
        unknown = Heartbeat(missing[0], "an unknown host", 0, witness.step)
        return unknown, "never wrote a heartbeat: it did not start, or cannot write to the run's folder"
    behind = min(running, key=lambda beat: (beat.step, beat.collectives, beat.rank), default=witness)
    if (behind.step, behind.collectives) < (witness.step, witness.collectives) or behind.doing == "computing":
        return behind, f"behind the others, {behind.doing} at step {behind.step}"
    return witness, fallback


def record_failure(folder: Path, beat: Heartbeat, cause: str) -> str:
    """Write failure.json unless it exists; returns the failure that it then holds, as a line."""
    failure = {
        "rank": beat.rank,
        "host": beat.host,
        "pid": beat.pid,
        "step": beat.step,
        "cause": cause,
        "time": time.time(),
    }
    path, text = folder / "failure.json", json.dumps(failure, indent=2).encode()
    beside = path.with_name(f".failure-{beat.host}-{os.getpid()}.tmp")
    try:
        create(beside, text)
        os.link(beside, path)  # fails if another rank was first
    except FileExistsError:
        failure = read_failure(folder) or _add_failure(path, failure)
    except OSError:  # no hard links here, or a full or lost disk: the line is still printed
        try:
            create(path, text)
        except OSError:
            failure = read_failure(folder) or failure
    with contextlib.suppress(OSError):
        beside.unlink(missing_ok=True)
    return format_failure(failure)


def _add_failure(path: Path, failure: dict[str, Any]) -> dict[str, Any]:
    """Add a failure to a file that has only ranks that were survived."""
    with contextlib.suppress(OSError, UserError):
        replace(path, json.dumps({**failure, **read_json(path, MAX_BYTES)}, indent=2).encode())
    return failure


def read_failure(folder: Path) -> dict[str, Any] | None:
    """The contents of failure.json; None if there is none, or something else is in its place."""
    with contextlib.suppress(UserError):
        found = read_json(folder / "failure.json", MAX_BYTES)
        if all(fits(kind, found.get(name)) for name, kind in FAILURE_TYPES.items()):
            return found
    return None


def format_failure(failure: dict[str, Any]) -> str:
    """A failure as one line to print."""
    host, cause = printable(failure["host"], 100), printable(failure["cause"], MAX_CAUSE)
    return f"rank {failure['rank']} on {host} failed at step {failure['step']}: {cause}"


def is_dead(pid: int) -> bool:
    """Whether this host has no such process, or only a zombie."""
    try:
        os.kill(pid, 0)
        if not Path("/proc/self/stat").exists():
            return False
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return True
    except OSError:  # another user's process, or no file descriptor is left here
        return False
    return state in "ZX"


def explain(folder: Path, ended: bool = False) -> str:
    """Explain why a run failed, from failure.json or from the ranks' last heartbeats.

    A stale heartbeat alone proves nothing unless the job has `ended`: it may be suspended.
    """
    if failure := read_failure(folder):
        return format_failure(failure)
    beats = read_heartbeats(folder)
    failed = [beat for beat in beats if beat.state.startswith(FAILED)]
    alive = [beat for beat in beats if beat.running]  # ranks that were told to stop, or finished, are not
    if alive and not failed:
        time.sleep(STALE_SECONDS)
        later = read_heartbeats(folder)
        if any(beat.time != before.time for beat, before in zip(later, beats, strict=False)):
            return f"{folder}: the run is still running"
        if not (ended or all(beat.host == socket.gethostname() and is_dead(beat.pid) for beat in alive)):
            return (
                f"{folder}: no heartbeat, but the run may be suspended or on another host; give --ended if"
                " its job is over"
            )
    if not failed and not alive:
        return f"{folder}: no rank failed"
    beat = min(failed or alive, key=lambda beat: beat.time)
    died = "its process ended without an error: killed, or out of memory"
    return record_failure(folder, beat, beat.state.removeprefix(FAILED) if failed else died)
