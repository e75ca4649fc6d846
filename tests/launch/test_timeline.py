"""The picture of a traced step: its shares are those of the spans, and no file of a stranger's does harm."""

from __future__ import annotations

import json
import math
import re
from itertools import chain
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from launch.report.plots import render
from launch.report.timeline import MOST_BYTES, SHOWN, Timeline, of_events, timeline, union, whom

pytestmark = pytest.mark.quick


def span(pid: int, kind: str, name: str, begin: float, end: float, **args: object) -> dict[str, Any]:
    own = {"ph": "X", "pid": pid, "tid": 0, "cat": kind, "name": name}
    return {**own, "ts": begin, "dur": end - begin, "args": args}


def a_rank(pid: int, waits: float, name: str = "") -> list[dict[str, Any]]:
    """Two steps of 100 µs, a bucket on the wire in the last 40 of each; of these the last `waits` in vain."""
    found = [{"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name or f"rank {pid} on here"}}]
    for step, begin in ((3, 0.0), (4, 200.0)):
        found += [
            span(pid, "step", f"step {step}", begin, begin + 100, step=step),
            span(pid, "phase", "forward", begin, begin + 50),
            span(pid, "phase", "backward", begin + 50, begin + 95),
            span(pid, "phase", "optimizer", begin + 95, begin + 100),
            span(pid, "wire", "bucket 0", begin + 60, begin + 100),
            span(pid, "wait", "wait: bucket 0", begin + 100 - waits, begin + 100),
        ]
    return found


def a_trace(*ranks: list[dict[str, Any]]) -> dict[str, Any]:
    return {"traceEvents": [*chain(*ranks)], "otherData": {"clock_error_us": {"0": 0, "1": 2.5}}}


def test_what_the_spans_say() -> None:
    found = of_events(a_trace(a_rank(0, 30), a_rank(1, 0), a_rank(2, 20)))
    assert isinstance(found, Timeline)
    assert (found.step, found.traced, found.clock_error) == (3, 2, 2.5)
    shares = [step.shares for _, step in found.ranks]
    assert [each["exposed"] for each in shares] == pytest.approx([30, 0, 20])
    assert [each["hidden"] for each in shares] == pytest.approx([10, 40, 20])
    assert [each["compute"] for each in shares] == pytest.approx([70, 100, 80])
    assert (
        found.waited_for == "The others wait for rank 1 on here: it waits 0 % of the traced steps, they 25 %."
    )


def test_whom() -> None:
    assert whom({"a": 0.0}) == "One rank: there is nobody to wait for."
    assert whom({"a": 20.0, "b": 22.0}).startswith("No rank holds up the others")
    assert union([(5, 6), (0, 2), (1, 3)]) == [(0, 3), (5, 6)]
    assert union([(5, 6), (0, 2), (1, 3)], gap=2) == [(0, 6)]


def shown(found: Timeline) -> ElementTree.Element:
    """The picture, as the page has it."""
    text = render("report.html.j2", **EMPTY, timelines=[("a run", found)])
    part = text[text.index("<h2>One step of all ranks") : text.index("<h2>Curves</h2>")]
    return ElementTree.fromstring(f"<div>{part}</div>")


EMPTY: dict[str, Any] = {"runs": [None, None], "plots": [], "parts": [], "details": [], "config": []}
EMPTY |= {"environment": [], "results": {"rows": [], "heads": [], "first": ""}, "named": True}


def test_the_picture_is_drawn_of_many_ranks() -> None:
    page = shown(of_events(a_trace(*(a_rank(pid, 10 + pid % 3) for pid in range(SHOWN + 4)))))
    bars = [each for each in page.iter("svg") if each.get("role") == "img"]
    assert len(bars) == SHOWN
    for bar in bars:
        for box in bar.iter("rect"):
            x, width = float(box.get("x", 0)), float(box.get("width", 0))
            assert x >= 0
            assert 0 < width <= 1000.1 - x
        assert {box.get("class") for box in bar.iter("rect")} == {
            "forward",
            "backward",
            "optimizer",
            "wait",
            "wire",
        }
    text = " ".join("".join(page.itertext()).split())
    assert f"{SHOWN} of {SHOWN + 4} ranks." in text
    assert "agree within 2.5 µs" in text


def test_names_are_text() -> None:
    evil = "</title><script>alert(1)</script><img src=x onerror=alert(1)>\x1b[2J\n"
    page = shown(of_events(a_trace(a_rank(0, 50, evil), a_rank(1, 0, evil))))
    assert not [each.tag for each in page.iter() if each.tag in ("script", "img")]
    assert "<script>" in "".join(page.itertext())


ODD = [None, True, "x", -1, 1e300, float("nan"), float("inf"), 10**400, [], {}, [[]], {"step": {}}, "\ud800"]


@pytest.mark.parametrize("key", ["ph", "pid", "ts", "dur", "cat", "name", "args"])
def test_odd_values_do_no_harm(key: str) -> None:
    for odd in ODD:
        for at in range(len(a_rank(0, 10))):
            events = a_rank(0, 10)
            events[at][key] = odd
            found = of_events(a_trace(events, a_rank(1, 20)))
            if isinstance(found, Timeline):
                assert [*map(math.isfinite, (found.length, *found.mean.values()))] == [True] * 4
                assert all(isinstance(text, str) for _, _, boxes, _ in found.drawn for text in chain(*boxes))


@pytest.mark.parametrize("trace", [{}, {"traceEvents": 1}, {"traceEvents": [1, None, []]}, {"otherData": []}])
def test_what_is_no_trace(trace: dict[str, Any]) -> None:
    assert of_events(trace) == "the trace holds no step that all ranks did"
    assert isinstance(
        of_events({**a_trace(a_rank(0, 1)), "otherData": {"clock_error_us": {"0": "x"}}}), Timeline
    )


def test_where_it_is(tmp_path: Path) -> None:
    """In the run's folder, wherever that is now, or where the run put it; or why it cannot be read."""
    assert timeline(tmp_path, None) is None
    assert timeline(tmp_path, str(tmp_path / "gone.json")) is None
    assert timeline(tmp_path, "a\0b") in (None, "embedded null byte")
    elsewhere = tmp_path / "other.json"
    elsewhere.write_text(json.dumps(a_trace(a_rank(0, 1))))
    assert isinstance(timeline(tmp_path, str(elsewhere)), Timeline)
    own = tmp_path / "trace.json"
    own.write_text("[" * 100_000)
    assert re.search("cannot be read as JSON", str(timeline(tmp_path, str(elsewhere))))
    own.write_text("[]")
    assert "no JSON object" in str(timeline(tmp_path, None))
    with own.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    assert "larger than" in str(timeline(tmp_path, None))
    own.unlink()
    own.mkdir()
    assert isinstance(timeline(tmp_path, None), str)
