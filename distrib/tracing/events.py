"""The file of a trace: the Chrome trace event format, which Perfetto and chrome://tracing open.

Of the format (docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU) it has complete events
(X), names (M) and flows (s, f). Times are microseconds of rank 0's clock since the first event.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import distrib
from distrib.comm.world import Member
from distrib.tracing.clocks import Offset
from distrib.tracing.record import COMPUTE, SIDE, WIRE, Recorder


class Row(NamedTuple):
    """A span in nanoseconds of rank 0's clock."""

    track: str
    kind: str
    name: str
    begin: int
    end: int
    more: dict[str, Any]
    ready: list[tuple[str, int]]


class Told(NamedTuple):
    """What a rank tells rank 0."""

    rows: list[Row]
    clock_error: float  # in seconds
    dropped: int


def told(recorder: Recorder, offset: Offset) -> Told:
    """The spans of this rank; waits for the device to come to their ends."""
    rows, clock, sent = list[Row](), recorder.clock, 0

    def time_of(mark: Any) -> int:
        return round(1e9 * (clock.seconds(mark) + offset.seconds))

    for span in recorder.spans:
        if span.end is None:
            continue
        begin, end, track = time_of(span.begin), time_of(span.end), span.track
        if span.kind == "wire" and clock.wire is not None:  # a stream does one after another
            begin, sent = max(begin, sent), end
        ready = [(name, min(time_of(mark), begin)) for name, mark in span.ready]
        rows.append(Row(track, span.kind, span.name, begin, max(begin, end), span.more, ready))
    return Told(in_lanes(rows), offset.error + clock.error, recorder.dropped)


def in_lanes(rows: Sequence[Row]) -> list[Row]:
    """The rows, by time; what travels at the same time on tracks of its own: "wire", "wire 2", …"""
    found, ends = list[Row](), list[int]()
    for row in sorted(rows, key=lambda row: (row.begin, -row.end)):
        if row.track == WIRE:
            lane = next((i for i, end in enumerate(ends) if end <= row.begin), len(ends))
            ends[lane : lane + 1] = [row.end]
            row = row._replace(track=WIRE if lane == 0 else f"{WIRE} {lane + 1}")
        found.append(row)
    return found


def of_rank(number: int, host: str, rows: Sequence[Row], first: int) -> Iterator[dict[str, Any]]:
    """The events of one rank, a process of that number; `first` is when the trace begins."""
    order = {COMPUTE: 0, SIDE: 1, WIRE: 2}
    tracks = sorted({row.track for row in rows}, key=lambda name: (order.get(name.split(" ")[0], 3), name))
    yield about("process_name", number, 0, name=f"rank {number} on {host}")
    yield about("process_sort_index", number, 0, sort_index=number)
    for place, track in enumerate(tracks):
        yield about("thread_name", number, place, name=track)
        yield about("thread_sort_index", number, place, sort_index=place)
    flow = 0
    for row in rows:
        own = {"pid": number, "tid": tracks.index(row.track)}
        times = {"ts": (row.begin - first) / 1e3, "dur": (row.end - row.begin) / 1e3}
        yield {"ph": "X", "name": row.name, "cat": row.kind, **own, **times, "args": row.more}
        for name, at in row.ready:
            flow += 1
            arrow = {"name": "gradient", "cat": "ready", "id": f"{number}.{flow}"}
            begin = {"pid": number, "tid": tracks.index(COMPUTE), "ts": (at - first) / 1e3}
            yield {"ph": "s", **arrow, **begin, "args": {"gradient": name}}
            yield {"ph": "f", "bp": "e", **arrow, **own, "ts": times["ts"]}


def about(what: str, pid: int, tid: int, **more: Any) -> dict[str, Any]:
    """The event that says something of a process or thread."""
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": more}


def file_of(members: Sequence[Member], everyone: Sequence[Told], more: dict[str, Any]) -> bytes:
    """The whole file, of all ranks, with `more` of the run."""
    first = min((row.begin for each in everyone for row in each.rows), default=0)
    events = [
        event
        for member, each in zip(members, everyone, strict=True)
        for event in of_rank(member.number, member.host, each.rows, first)
    ]
    errors = {str(m.number): round(1e6 * each.clock_error, 3) for m, each in zip(members, everyone)}
    other = {
        "program": f"distrib {distrib.__version__}",
        **more,
        "clocks": "moved to rank 0's by the shortest of its answers; wrong by clock_error_us at most",
        "clock_error_us": errors,
        "dropped_spans": sum(each.dropped for each in everyone),
    }
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": other}).encode()
