"""`distrib accept`: what passes, what fails and is named, references, and what is told in one line."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import crew, run
from device_double import device, needs_device

from distrib.comm.base import SingleCommunicator, SingleControl
from distrib.comm.world import World
from distrib.errors import UserError
from distrib.faults.watchdog import Watchdog
from launch.accept import measure
from launch.accept.command import accept
from launch.accept.measure import Rank, Training
from launch.accept.verdict import FIGURES, TOLERANCES, judge, parse_tolerances, read_reference, worse_by

QUICK = ("--seconds", "0.1", "--width", "0.0625", "--backend", "numpy")

FAULTS = """
import sys, time
from distrib import launched_rank, trainer
from launch.accept import measure
from launch.cli import main

measure.HOST["images"], measure.DISK_BYTES = 128, 1 << 16  # two steps a round
plain = trainer.Trainer.step

def step(self, *times):
    begin = time.perf_counter()
    plain(self, *times)
    took = time.perf_counter() - begin
    {fault}

trainer.Trainer.step = step
main()
"""
"""A program that is `distrib` with a fault, one statement in which `self` is the Trainer, after each step."""

ALTERED = "launched_rank() == 2 and self.progress.step == 2 and flip(self)"
FLIP = """
def flip(self):
    self.params.values[:1].view("uint32")[...] ^= 1
"""
"""The lowest bit of one parameter."""


def a_rank(number: int, rate: float = 100.0, digest: str = "a", host: str = "", **environment: str) -> Rank:
    same = {"blas": "one", "numpy": "2"} | environment
    return Rank(number, host or f"node{number // 2}", 1, same, rates=[rate] * 3, digests={digest: 3})


PLACE = {"ranks": 4, "hosts": 2, "ranks_per_host": 2, "threads": 1, "backend": "numpy", "communicator": "mpi"}


def found(
    ranks: list[Rank],
    reference: dict[str, Any] | None = None,
    sums: dict[str, Any] | None = None,
    **place: Any,
) -> dict[str, tuple[bool | None, str]]:
    """(passed, text) by name."""
    findings = judge(ranks, sums or {}, {**PLACE, **place}, reference, TOLERANCES)
    return {each.name: (each.passed, each.found) for each in findings}


def a_reference(**more: Any) -> dict[str, Any]:
    figures = {"images-per-second": 100.0, "latency": 10.0, "bandwidth": 2.0}
    environment = {"blas": "one", "numpy": "2"}
    held = {"place": PLACE, "training": {}, "environment": environment, "digest": "a"}
    return {**held, "figures": figures, "tolerances": {}, **more}


@pytest.mark.quick
def test_all_alike_pass() -> None:
    verdict = found([a_rank(number, 100 + number) for number in range(4)])
    assert verdict["bits"][0]
    assert verdict["balance"] == (
        True,
        "rank 0 on node0: 100 images/s, 2 % below the others' 102 (at most 30 %)",
    )
    assert verdict["images-per-second"][0] is None, "there is no reference"


@pytest.mark.quick
def test_other_bits_name_rank_host_and_cause() -> None:
    three = [a_rank(number) for number in range(3)]
    passed, said = found([*three, a_rank(3, digest="b")])["bits"]
    assert passed is False
    assert (
        said
        == "rank 3 on node1: other bits than a in 3 of 3 rounds: its memory, processor or GPU is at fault"
    )
    verdict = found([*three, a_rank(3, digest="b", blas="two")])
    assert "rank 3 on node1: other bits" in verdict["bits"][1]
    assert "other libraries: blas two (there one)" in verdict["bits"][1]
    assert verdict["libraries"] == (None, "rank 3 on node1: blas two (there one)")
    only_now_and_then = a_rank(1)
    only_now_and_then.digests = {"a": 2, "b": 1}
    passed, said = found([a_rank(0), only_now_and_then])["bits"]
    assert passed is False
    assert said.startswith("rank 1 on node0: other bits than a in 1 of 3 rounds")
    assert "majority" not in said


@pytest.mark.quick
def test_a_reference_decides_where_there_is_no_majority() -> None:
    two = [a_rank(0, digest="b"), a_rank(1)]
    assert "no majority" in found(two)["bits"][1]
    passed, said = found(two, a_reference())["bits"]
    assert passed is False
    assert said.startswith("rank 0 on node0")
    assert "majority" not in said
    assert found([a_rank(0, digest="b")], a_reference())["bits"][0] is False, "alone, too"
    newer = [a_rank(0, digest="b", numpy="3")]
    passed, said = found(newer, a_reference())["bits"]
    assert passed is True, "other libraries round otherwise"
    assert said.endswith("not compared with the reference: numpy 3 (there 2)")


@pytest.mark.quick
def test_figures_against_a_reference() -> None:
    four = [a_rank(number) for number in range(4)]
    sums = {"latency": 20.0, "bandwidth": 0.4}
    verdict = found(four, a_reference(), sums)
    assert (verdict["images-per-second"][0], verdict["latency"][0], verdict["bandwidth"][0]) == (
        True,
        True,
        False,
    )
    assert "all ranks: 0.4, 80 % worse (at most 75 %)" in verdict["bandwidth"][1]
    verdict = found([*four[:3], a_rank(3, 50)], a_reference(), sums, hosts=4)
    assert "rank 3 on node1: 50, 50 % worse" in verdict["images-per-second"][1]
    assert verdict["latency"][0] is None
    assert "the reference has hosts 2" in verdict["latency"][1]
    assert worse_by(50, 100) == worse_by(20, 10, -1) == 0.5


@pytest.mark.quick
def test_wrong_sums_and_disks_fail() -> None:
    ranks = [a_rank(0), a_rank(2)]
    ranks[0].disk, ranks[1].disk = {"write": 100.0, "read": 200.0}, {"error": "it is full"}
    verdict = found(ranks, sums={"error": "wrong sum"})
    assert verdict["all-reduce"] == (False, "wrong sum")
    assert verdict["disk"] == (False, "rank 2 on node1: it is full")
    assert verdict["disk-write"] == (None, "100 MB/s, 32 MiB with fsync")


@pytest.mark.quick
@pytest.mark.parametrize(
    "text", ["latency", "latency=", "latency=much", "speed=0.1", "latency=1", "latency=-1"]
)
def test_a_wrong_tolerance(text: str) -> None:
    with pytest.raises(UserError, match=r"^--tolerance (latency|speed)"):
        parse_tolerances([text])


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"distrib_accept": 0}, "is no reference of distrib accept"),
        ({"figures": {"latency": "low"}}, "has figures"),
        ({"figures": {"latency": -1.0}}, "figures latency -1.0: give"),
        ({"figures": {"speed": 1.0}}, "figures speed 1.0: give"),
        ({"tolerances": {"latency": 1.5}}, "tolerances latency 1.5: give"),
        ({"digest": 3}, "has digest 3"),
        ({"more": 3}, "more is odd"),
    ],
)
def test_an_edited_reference(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "good.json"
    path.write_text(json.dumps({"distrib_accept": 1, **a_reference()}))
    assert read_reference(path)["digest"] == "a"
    path.write_text(json.dumps({"distrib_accept": 1, **a_reference(), **change}))
    with pytest.raises(UserError, match=words):
        read_reference(path)


def test_alone_with_a_reference(
    command_line: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written, passed, failed by another digest; and what is wrong use."""
    monkeypatch.setattr(measure, "DISK_BYTES", 1 << 16)
    monkeypatch.setitem(measure.HOST, "images", 128)
    path, options = tmp_path / "good.json", [*QUICK, "--run-dir", tmp_path]
    options += [text for name in FIGURES for text in ("--tolerance", f"{name}=0.99")]  # not the noise
    code, page, _ = command_line(accept, *options, "--write-reference", path)
    assert code == 0, page
    assert page.startswith("distrib accept: pass\n")
    assert [each.name for each in tmp_path.iterdir()] == ["good.json"], "something is left behind"
    code, page, _ = command_line(accept, *options, "--reference", path)
    assert code == 0, page
    assert "the reference's" in page
    held = json.loads(path.read_text())
    assert held["tolerances"]["latency"] == 0.99
    path.write_text(json.dumps({**held, "digest": "0" * 64}))
    code, out, page = command_line(accept, *options, "--reference", path, "--json")
    assert code == 1
    assert page.startswith("distrib accept: FAIL: bits\n")
    assert json.loads(out)["passed"] is False
    (tmp_path / "other.json").write_text("{}")
    for words, *given in (
        ("cannot be read", "--reference", tmp_path / "none.json"),
        ("is no reference", "--reference", tmp_path / "other.json"),
        ("is of width 0.0625, this run of 0.125", "--reference", path, "--width", "0.125"),
        ("--run-dir /proc/self: cannot be written", "--run-dir", "/proc/self"),
        ("there is no folder", "--write-reference", tmp_path / "no" / "good.json"),
        ("--tolerance speed=1", "--tolerance", "speed=1"),
        ("--seconds 0", "--seconds", "0"),
    ):
        code, out, err = command_line(accept, *options, *given)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert words in err


def require_both_named(done: subprocess.CompletedProcess[str], host: str) -> None:
    """AssertionError unless ranks 1, which is slow, and 2, which is altered, were named."""
    assert done.returncode == 1, done.stderr
    result, _ = json.JSONDecoder().raw_decode(done.stdout[done.stdout.index("{") :])
    verdict = {each["name"]: each for each in result["findings"]}
    assert f"rank 2 on {host}: other bits" in verdict["bits"]["found"]
    assert "rank 1 on" in verdict["balance"]["found"]
    assert not verdict["bits"]["passed"]
    assert not verdict["balance"]["passed"]
    assert all(f"rank {rank} on" not in verdict["bits"]["found"] for rank in range(2))
    assert "distrib accept: FAIL: bits, balance" in done.stderr


BOTH = FLIP + FAULTS.format(fault=f"{ALTERED}; launched_rank() == 1 and time.sleep(5 * took)")
"""One rank is slow, by more than noise is, and the result of one has one wrong bit."""


def test_ranks_with_faults_are_named(tmp_path: Path) -> None:
    done = run("-c", BOTH, "accept", *QUICK, "--run-dir", tmp_path, "--json", ranks=3, check=False)
    require_both_named(done, os.uname().nodename)
    assert not list(tmp_path.iterdir()), "something is left behind"


def test_a_rank_that_hangs_is_named(tmp_path: Path) -> None:
    program = FAULTS.format(fault="launched_rank() == 1 and os.kill(os.getpid(), 19)")
    done = run(
        "-c",
        f"import os\n{program}",
        "accept",
        *QUICK,
        "--run-dir",
        tmp_path,
        "--timeout",
        1,
        ranks=2,
        check=False,
    )
    assert done.returncode != 0
    assert f"rank 1 on {os.uname().nodename} failed" in done.stderr
    assert "no heartbeat" in done.stderr


@needs_device
def test_rounds_on_a_device_end_alike() -> None:
    with device("float32") as backend:
        world = World(SingleCommunicator(), SingleControl(), backend, "", Watchdog(0, 600), crew(1))
        training = Training(world, {"width": 0.0625, "batch_size": 4, "shards": 1, "images": 12})
        first = training.round()[1]
        assert first == training.round()[1] == training.round()[1]
        training.trainer.params.values[:1] += 1
        assert training.round()[1] == first, "a round starts anew"
        training.trainer.close()
