"""A benchmark knows whether its figures may be quoted, and a spoiled one cannot be quoted by mistake."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from distrib.comm.world import connect
from launch.bench import fitness
from launch.bench.fitness import MOST_OTHERS, MOST_SPREAD, Verdict, Work, judge, taken_by_others, watched
from launch.bench.step import Bench, step
from launch.bench.step_text import print_report, with_ratios

pytestmark = pytest.mark.quick


def rows(mine: list[float], theirs: list[float], others: float | None = 0.0) -> dict[str, list[dict]]:
    sides = {"distrib": mine, "torch": theirs}
    return {name: [{"seconds": each, "others": others} for each in side] for name, side in sides.items()}


def test_what_others_took_is_what_we_did_not() -> None:
    """Two ranks, each bound to a core of its own; then both on the same two cores."""
    bound = [Work("a", {0: 2.0}, 1.0, 2.0), Work("a", {1: 1.5}, 1.5, 2.0)]
    assert taken_by_others(bound) == pytest.approx((3.5 - 2.5) / 2 / 2)
    both = [Work("a", {0: 2.0, 1: 1.5}, own, 2.0) for own in (1.0, 1.5)]
    assert taken_by_others(both) == taken_by_others(bound)
    quiet = Work("b", {0: 1.0}, 1.0, 1.0)
    assert taken_by_others([*bound, quiet]) == taken_by_others(bound), "the host that was disturbed counts"
    assert taken_by_others([Work("a", {}, 1.0, 1.0)]) is None


@pytest.mark.parametrize(("child", "others"), [(0.0, 0.75), (0.5, 0.5), (1.5, 0.0)])
def test_a_measurement_says_what_others_took(
    child: float, others: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two cores in one second: we had half a second of them, and a program that we started `child`."""
    clock = SimpleNamespace(perf_counter=iter([5.0, 6.0]).__next__, process_time=iter([1.0, 1.5]).__next__)
    worked = iter([{0: 10.0, 1: 20.0}, {0: 11.0, 1: 21.0}])
    monkeypatch.setattr(fitness, "time", clock)
    monkeypatch.setattr(fitness, "busy_seconds", lambda: next(worked))
    row = watched(connect("none"), lambda: {"seconds": 1.0, "cpu_seconds": child})
    assert row["others"] == pytest.approx(others)


def test_the_cores_tell_how_long_they_worked() -> None:
    before, begin = fitness.busy_seconds(), time.process_time()
    while time.process_time() < begin + 0.1:
        pass
    after = fitness.busy_seconds()
    assert before.keys() == after.keys()
    assert sum(after.values()) - sum(before.values()) >= 0.05


def test_the_verdict() -> None:
    fit = judge(rows([1.0, 1.1, 1.0], [2.0, 2.2, 2.1]))
    assert (fit.unfit, fit.others) == ("", {"distrib": 0.0, "torch": 0.0})
    assert judge(rows([1.0, 2.0, 1.0], [2.0, 4.0, 2.0])).spread == 0, "pairs count"
    assert judge(rows([1.0, 1.4, 1.0], [2.0, 2.0, 2.0])).unfit == "they scatter by 40 %"
    spoiled = judge(rows([1.0] * 3, [2.0] * 3, MOST_OTHERS + 0.33))
    assert spoiled.unfit == "others took 38 % of the cores"
    assert judge(rows([1.0], [2.0], -0.1)).others["torch"] == 0, (
        "the system's ticks are coarser than our clock"
    )
    assert judge(rows([1.0], [2.0], None)).unfit == "", "a system that does not say"
    one = judge({"distrib": rows([1.0, 1.5], [])["distrib"]})
    assert one.spread == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("verdicts", "sets", "chosen"),
    [
        ([("", 0)], 1, 0),
        ([(0.4, 0), ("", 1)], 2, 1),
        ([(0.4, 0), (0.2, 1), (0.3, 2)], 3, 1),
    ],
)
def test_a_spoiled_set_is_measured_again(
    verdicts: list, sets: int, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times at most; then the least spoiled one counts, and is still unfit."""
    judged = iter([Verdict({"distrib": share or 0.0}, 0.0) for share, _ in verdicts])
    measured = iter(range(9))
    bench: Any = SimpleNamespace(
        turn=lambda: None,
        matrix_peak=lambda: None,
        world=connect("none"),
        rows=lambda _: ({"distrib": [{"seconds": 1.0, "others": 0.0, "set": next(measured)}]}, []),
    )
    monkeypatch.setattr("launch.bench.step.judge", lambda _: next(judged))
    found, _, all_verdicts = Bench.fittest(bench, 1)
    assert (len(all_verdicts), found["distrib"][0]["set"]) == (sets, chosen)
    assert bool(all_verdicts[0].unfit) == all(share for share, _ in verdicts)


def test_an_unfit_ratio_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    result = {
        "machine": "a machine",
        "device": {},
        "evaluate": False,
        "graph": False,
        **{"ranks": 1, "threads": 1, "batch_size": 8, "width": 1.0, "variant": "v", "precision": "p"},
        "steps": 3,
        "images_per_second": {"distrib": [123.4], "torch": [100.0]},
        "peak_bytes": {},
        "flops_per_image": 1e9,
        "matrix_peak_gflops": [],
        "workspace_grown_bytes": 0,
        "phases_ms": {},
        "others": {"distrib": 0.38, "torch": None},
        "sets": [{"others": 0.38, "spread": 0.1}] * 3,
    }
    for unfit in ("", "others took 38 % of the cores"):
        print_report(with_ratios({**result, "fit": not unfit, "unfit": unfit}))
        shown = capsys.readouterr().out
        assert ("ratio to torch: 1.234" in shown) == (not unfit)
        assert ("ratio to torch: unfit: others took 38 %" in shown) == bool(unfit)
        assert "took 38 % beside distrib, ? beside torch; spread 10 %; the best of 3 sets" in shown


def test_the_help_states_the_bounds() -> None:
    for bound in (MOST_OTHERS, MOST_SPREAD):
        assert f"more than {100 * bound:.0f} % of" in " ".join((step.__doc__ or "").split())
