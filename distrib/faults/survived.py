"""The history of ranks that died while the others went on, which failure.json keeps."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from distrib.errors import UserError
from distrib.faults.heartbeat import FAILED, MAX_BYTES, SURVIVED, read_heartbeats
from distrib.files import fits, printable, read_json, replace

ENTRY_TYPES = {
    "rank": "int",
    "host": "str",
    "step": "int",
    "cause": "str",
    "seconds": "float",
    "time": "float",
}
"""Types of the fields of an entry."""

KILLED = "its process is gone without an error: killed, or out of memory"


def entry(folder: Path | None, number: int, host: str, step: int, begin: float) -> dict[str, Any]:
    """What failure.json keeps of a rank: its number at the start, the last whole step, the cause.

    `begin` is when its death was heard of (`time.perf_counter`): "seconds" is the time lost since.
    """
    states = [beat.state for beat in read_heartbeats(folder) if beat.rank == number] if folder else []
    cause = states[0].removeprefix(FAILED) if states and states[0].startswith(FAILED) else KILLED
    seconds = round(time.perf_counter() - begin, 4) if begin else 0.0
    return {
        "rank": number,
        "host": host,
        "step": step,
        "cause": cause,
        "seconds": seconds,
        "time": time.time(),
    }


def line(entry: dict[str, Any]) -> str:
    """An entry as a line to print."""
    host, cause = printable(entry["host"], 100), printable(entry["cause"], 200)
    return f"rank {entry['rank']} on {host} died after step {entry['step']}: {cause}"


def read(folder: Path) -> list[dict[str, Any]]:
    """The entries of failure.json; none if something else is in its place."""
    with contextlib.suppress(UserError):
        entries = read_json(folder / "failure.json", MAX_BYTES).get("survived")
        if isinstance(entries, list):
            return [each for each in entries if _is_entry(each)]
    return []


def _is_entry(found: Any) -> bool:
    return isinstance(found, dict) and all(fits(kind, found.get(name)) for name, kind in ENTRY_TYPES.items())


def keep(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Make failure.json hold these entries and those it has, and nothing of a failure.

    The heartbeats of the dead say so, too. Errors of the disk are ignored, as with all heartbeats.
    """
    whole = {(each["rank"], each["time"]): each for each in (*read(folder), *entries)}
    if not whole:
        return
    dead = {each["rank"]: each["cause"] for each in entries}
    with contextlib.suppress(OSError):
        ordered = sorted(whole.values(), key=lambda each: each["time"])
        replace(folder / "failure.json", json.dumps({"survived": ordered}, indent=2).encode())
        for beat in read_heartbeats(folder):
            if beat.rank in dead and not beat.state.startswith(SURVIVED):
                ended = dataclasses.asdict(dataclasses.replace(beat, state=f"{SURVIVED}{dead[beat.rank]}"))
                replace(folder / "ranks" / f"{beat.rank:05}.json", json.dumps(ended).encode())
