"""One traced step of all ranks, for a page: where each computes, sends and waits, and for whom.

The file may come from anybody: it is read within bounds, and what does not fit is left out.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from distrib.errors import UserError
from distrib.files import printable, read_json
from launch.report.records import is_figure, shown

MOST_BYTES = 64 << 20
"""Largest trace that is read."""

SHOWN, MOST_NAME = 16, 60
"""Ranks that a page draws, and letters of a name."""

PHASES = {
    "forward and backward": "backward",
    **{name: name for name in ("data", "forward", "backward", "optimizer")},
}
"""Of a step's phases those that are drawn, with their looks; the rest is waiting."""

WIDTH, LEAST = 1000.0, 0.4
"""Of the picture, in its own units, and of what is drawn in it."""

NOTABLE = 5.0
"""Percent of a step by which the others must wait longer than one rank, to say that they wait for it."""

Piece = tuple[float, float]
"""From when to when, in microseconds."""


@dataclass
class Step:
    """What a rank did in one step."""

    begin: float
    end: float
    phases: list[tuple[str, Piece]] = field(default_factory=list)
    waits: list[Piece] = field(default_factory=list)
    wire: list[Piece] = field(default_factory=list)

    @property
    def shares(self) -> dict[str, float]:
        """Percent of its time: computing, of that with something on the wire, and waiting."""
        whole, waited = max(self.end - self.begin, 1e-3), length(union(self.waits))
        hidden = length(union([*self.wire, *self.waits])) - waited
        exposed = 100 * waited / whole
        return {"compute": 100 - exposed, "hidden": 100 * hidden / whole, "exposed": exposed}


@dataclass
class Timeline:
    """The traced step of median length."""

    step: int
    traced: int  # steps in all
    ranks: list[tuple[str, Step]]
    clock_error: float | None  # in microseconds, at most
    waited_for: str

    @property
    def begin(self) -> float:
        return min(each.begin for _, each in self.ranks)

    @property
    def length(self) -> float:
        """In microseconds, from the first rank's begin to the last one's end."""
        return max(each.end for _, each in self.ranks) - self.begin

    @property
    def ticks(self) -> list[str]:
        """Milliseconds at each quarter of the picture."""
        digits = 0 if self.length > 1e5 else 1 if self.length > 1e4 else 3
        return [f"{quarter * self.length / 4e3:,.{digits}f}" for quarter in range(5)]

    @property
    def mean(self) -> dict[str, float]:
        """The shares of all ranks together."""
        found = [each.shares for _, each in self.ranks]
        return {name: sum(shares[name] for shares in found) / len(found) for name in found[0]}

    def boxes(self, pieces: Iterable[tuple[str, Piece]]) -> list[tuple[str, str, str]]:
        """(class, x, width) in the picture."""
        scale = WIDTH / max(self.length, 1e-3)
        found = [(kind, scale * (begin - self.begin), scale * (end - begin)) for kind, (begin, end) in pieces]
        return [(kind, f"{x:.1f}", f"{width:.1f}") for kind, x, width in found if width >= LEAST]

    @property
    def drawn(self) -> list[tuple[str, dict[str, float], Any, Any]]:
        """(name, shares, boxes of the computation, boxes of the wire) of the ranks that are shown."""
        near, found = self.length / WIDTH, []
        for name, each in self.ranks[:SHOWN]:
            waits = [("wait", piece) for piece in union(each.waits, near)]
            wire = self.boxes(("wire", piece) for piece in union(each.wire, near))
            found.append((name, each.shares, self.boxes([*each.phases, *waits]), wire))
        return found


def union(pieces: Iterable[Piece], gap: float = 0.0) -> list[Piece]:
    """The pieces without overlaps, in order; those closer than `gap` become one."""
    found: list[Piece] = []
    for begin, end in sorted(pieces):
        if found and begin <= found[-1][1] + gap:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def length(pieces: Iterable[Piece]) -> float:
    return sum(end - begin for begin, end in pieces)


def timeline(run: Path, trace: Any) -> Timeline | str | None:
    """The trace in a run's folder, or at the place that its configuration names; None if there is none, or
    why it cannot be shown."""
    places = [run / "trace.json", *([Path(trace)] if isinstance(trace, str) else [])]
    for path in places:
        try:
            if not path.exists():
                continue
            return of_events(read_json(path, MOST_BYTES, "trace again"))
        except (UserError, OSError, ValueError) as error:
            return shown(str(error))
    return None


def of_events(found: dict[str, Any]) -> Timeline | str:
    """The timeline in a trace, or why there is none."""
    events, ranks = found.get("traceEvents"), dict[int, dict[int, Step]]()
    events = [each for each in events if isinstance(each, dict)] if isinstance(events, list) else []
    names, spans = names_of(events), dict[int, list[tuple[str, str, Piece]]]()
    for event in events:
        pid, begin, took = (event.get(name) for name in ("pid", "ts", "dur"))
        if event.get("ph") != "X" or not whole(pid) or not is_figure(begin) or not is_figure(took):
            continue
        kind, more, piece = event.get("cat"), event.get("args"), (begin, begin + max(took, 0))
        step = more.get("step") if isinstance(more, dict) else None
        if kind == "step" and whole(step):
            ranks.setdefault(pid, {})[step] = Step(*piece)
        elif kind in ("phase", "wait", "wire"):
            spans.setdefault(pid, []).append((kind, str(event.get("name")), piece))
    for pid, steps in ranks.items():
        deal(list(steps.values()), spans.get(pid, []))
    common = set.intersection(*(set(steps) for steps in ranks.values())) if ranks else set()
    if not common:
        return "the trace holds no step that all ranks did"
    order = sorted(
        common, key=lambda step: max(steps[step].end - steps[step].begin for steps in ranks.values())
    )
    median = order[(len(order) - 1) // 2]
    numbers = sorted(ranks)
    lanes = [(names.get(pid, f"rank {pid}"), ranks[pid][median]) for pid in numbers]
    waited = {names.get(pid, f"rank {pid}"): waiting(ranks[pid][step] for step in common) for pid in numbers}
    return Timeline(median, len(common), lanes, clock_error(found), whom(waited))


def whole(value: Any) -> TypeGuard[int]:
    """Whether `value` is a whole number of bounded size."""
    return type(value) is int and is_figure(value)


def names_of(events: list[dict[str, Any]]) -> dict[int, str]:
    """The name of each process."""
    found = {}
    for event in events:
        pid, more = event.get("pid"), event.get("args")
        if event.get("name") == "process_name" and whole(pid) and isinstance(more, dict):
            found[pid] = printable(str(more.get("name")), MOST_NAME)
    return found


def deal(steps: list[Step], spans: list[tuple[str, str, Piece]]) -> None:
    """Give each step of a rank what lies in it."""
    steps.sort(key=lambda step: step.begin)
    begins = [step.begin for step in steps]
    for kind, name, (begin, end) in spans:
        step = steps[max(0, bisect(begins, (begin + end) / 2) - 1)]
        piece = max(begin, step.begin), min(end, step.end)
        if piece[0] >= piece[1]:
            continue
        if kind == "phase" and name in PHASES:
            step.phases.append((PHASES[name], piece))
        elif kind == "wait":
            step.waits.append(piece)
        elif kind == "wire":
            step.wire.append(piece)


def waiting(steps: Iterable[Step]) -> float:
    """Percent of these steps in which a rank waited."""
    each = list(steps)
    return 100 * sum(length(union(s.waits)) for s in each) / max(sum(s.end - s.begin for s in each), 1e-3)


def whom(waited: dict[str, float]) -> str:
    """A line that names the rank that the others wait for: the one that waits least, if clearly so."""
    if len(waited) == 1:
        return "One rank: there is nobody to wait for."
    least, *others = sorted(waited, key=waited.__getitem__)
    mean = sum(waited[name] for name in others) / len(others)
    if mean - waited[least] < NOTABLE:
        return f"No rank holds up the others: each waits some {mean:.0f} % of the traced steps."
    return (
        f"The others wait for {least}: it waits {waited[least]:.0f} % of the traced steps, they {mean:.0f} %."
    )


def clock_error(found: dict[str, Any]) -> float | None:
    """By how much the clocks of ranks may differ, in microseconds."""
    other = found.get("otherData")
    errors = other.get("clock_error_us") if isinstance(other, dict) else None
    known = [each for each in errors.values() if is_figure(each)] if isinstance(errors, dict) else []
    return max(known) if known else None
