"""Whether the figures of a benchmark may be quoted: what other processes took, and how far they scatter."""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from distrib.comm.world import World

MOST_OTHERS = 0.05
"""Share of the cores that other processes may take while figures are measured."""

MOST_SPREAD = 0.30
"""Largest ratio of a set of pairs less the smallest, over their median."""

MOST_SETS = 3
"""Sets that are measured until one is fit."""


class Work(NamedTuple):
    """What the cores of one rank did in an interval."""

    host: str
    busy: dict[int, float]  # seconds that each core worked, for whomever; empty where nobody says
    own: float  # seconds of a core that we used
    seconds: float  # of the interval


def busy_seconds() -> dict[int, float]:
    """Seconds that each core of this process has worked, for whomever, so far; on Linux."""
    try:
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    except OSError:
        return {}
    tick, cores, found = os.sysconf("SC_CLK_TCK"), os.sched_getaffinity(0), {}
    for name, *fields in lines:
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
            user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
            found[int(name[3:])] = (user + nice + system + irq + softirq + steal) / tick
    return found


def watched(world: World, measure: Callable[[], Any]) -> Any:
    """What `measure` returns, with "others": the share of the cores that other processes took meanwhile.

    A program that it started says by "cpu_seconds" how much it used itself.
    """
    before, own, begin = busy_seconds(), time.process_time(), time.perf_counter()
    row = measure()
    seconds, own = time.perf_counter() - begin, time.process_time() - own
    busy = {core: total - before.get(core, total) for core, total in busy_seconds().items()}
    own += row.get("cpu_seconds", 0.0) if row else 0.0
    work = Work(socket.gethostname(), busy, own, seconds)
    everyone = world.allgather(work, "what other processes took")
    if row:
        row["others"] = taken_by_others(everyone)
    return row


def taken_by_others(everyone: list[Work]) -> float | None:
    """The share of the cores that other processes took, on the host where it was most; None if unknown.

    As the system counts in ticks of 10 ms, a short interval's may be below 0.
    """
    hosts = defaultdict[str, list[Work]](list)
    for work in everyone:
        hosts[work.host].append(work)
    shares = []
    for ranks in hosts.values():
        cores = {core: busy for work in ranks for core, busy in work.busy.items()}
        others = sum(cores.values()) - sum(work.own for work in ranks)
        if not cores:
            return None
        shares.append(others / len(cores) / max(work.seconds for work in ranks))
    return max(shares)


class Verdict(NamedTuple):
    """On a set of measurements: the mean share that others took beside each side, and the spread."""

    others: dict[str, float | None]
    spread: float

    @property
    def most(self) -> float:
        """The share that others took beside the side that they disturbed most."""
        return max((share for share in self.others.values() if share is not None), default=0.0)

    @property
    def unfit(self) -> str:
        """Why the figures must not be quoted; empty where they may be."""
        if self.most > MOST_OTHERS:
            return f"others took {100 * self.most:.0f} % of the cores"
        return f"they scatter by {100 * self.spread:.0f} %" if self.spread > MOST_SPREAD else ""


def judge(rows: dict[str, list[dict[str, Any]]]) -> Verdict:
    """The verdict on a set: by our own seconds or, where there are other sides, by ratios to the fastest."""
    shares = {
        name: [row["others"] for row in each if row["others"] is not None] for name, each in rows.items()
    }
    others = {name: max(0.0, statistics.mean(each)) if each else None for name, each in shares.items()}
    seconds = {name: [row["seconds"] for row in each] for name, each in rows.items()}
    mine = seconds.pop("distrib")
    if seconds:
        best = min(seconds.values(), key=statistics.median)
        mine = [a / b for a, b in zip(mine, best, strict=True)]
    return Verdict(others, (max(mine) - min(mine)) / statistics.median(mine))
