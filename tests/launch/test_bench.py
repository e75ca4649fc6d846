"""The benchmarks measure what they say, in a short form; and a step allocates nothing large."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import crew, run
from networks import resnet9
from test_torch_parity import import_torch

import distrib.announce
from distrib.comm.base import SingleControl
from distrib.comm.world import World, connect
from distrib.config import Config
from distrib.data.dataset import make
from distrib.faults.watchdog import Watchdog
from distrib.timing import PHASES
from distrib.trainer import Trainer
from launch import cli
from launch.bench.step import ours
from launch.torch_peer.worker import Worker
from nn.device import NUMPY

SMALL = ("--width", "0.0625", "--repeats", "2", "--json")


def bench(*arguments: str, ranks: int = 1) -> dict:
    return json.loads(run("-m", "launch.cli", "bench", *arguments, *SMALL, ranks=ranks).stdout)


def require_rates(result: dict, ranks: int) -> None:
    """Of a step against PyTorch."""
    rates = result["images_per_second"]
    assert set(rates) == {"distrib", "torch channels-last", "torch contiguous"}
    assert all(len(found) == 2 and min(found) > 0 for found in rates.values())
    assert set(result["others"]) == set(rates), "what others took beside each"
    assert result["fit"] == (not result["unfit"])
    better = rates[result["against"]]
    assert np.median(better) == max(np.median(rates[name]) for name in rates if name != "distrib")
    assert result["ratio"] == pytest.approx([a / b for a, b in zip(rates["distrib"], better, strict=True)])
    assert (result["ranks"], result["threads"], result["workspace_grown_bytes"]) == (ranks, ranks, 0)
    assert len(result["peak_bytes"]["distrib"]) == ranks
    assert min(result["peak_bytes"]["torch contiguous"]) > 100 * 2**20, "the libraries are included"
    assert set(result["phases_ms"]) == set(PHASES)
    assert (result["all_reduce_alone_ms"] is not None) == (ranks == 2)


def test_step_against_torch() -> None:
    """On two ranks; `test_a_step_of_a_network_of_ones_own` is on one."""
    import_torch()
    result = bench("step", "--batch-size", "6", "--steps", "2", "--against", "torch", ranks=2)
    require_rates(result, 2)
    slowest = 1e3 * 6 / min(result["images_per_second"]["distrib"])
    # a rank's clock may run a little longer than that of rank 0, where the machine is busy
    assert 0 < sum(result["phases_ms"].values()) <= 1.5 * slowest, "the phases are parts of the step"


def test_evaluation() -> None:
    result = bench("step", "--batch-size", "5", "--steps", "1", "--evaluate")
    assert result["phases_ms"] == {}
    assert min(result["images_per_second"]["distrib"]) > 0


@pytest.mark.parametrize("evaluate", [False, True])
def test_every_step_has_a_whole_batch(evaluate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten images hold two batches of four: step after step, neither the last two alone nor none at all."""
    monkeypatch.setattr("distrib.trainer.blas_threads", lambda: 1)
    rng = np.random.default_rng(1)
    images, labels = rng.integers(0, 256, (10, 28, 28), np.uint8), rng.integers(0, 10, 10, np.uint8)
    data = make("random", *[(images, labels)] * 2, least=10)
    trainer, seen = Trainer(Config(batch_size=4, width=1 / 16), connect("none"), data), []
    forward = trainer.model.forward

    def counted(x: Any, this: Any) -> Any:
        seen.append(len(x))
        return forward(x, this)

    trainer.model.forward = counted  # type: ignore[method-assign]
    ours(trainer, 7, evaluate)()
    assert seen == [4] * 7


def test_a_worker_that_ends_is_named() -> None:
    import_torch()
    with pytest.raises(RuntimeError, match="PyTorch process ended with code 1"):
        Worker(Config(data="/no/such/folder"), "contiguous", threads=1, steps=1, evaluate=False)


def test_peak_memory_is_the_child_s_own() -> None:
    """A child of a process that held much reports what it held itself."""
    held = np.ones(1 << 27, np.uint8)
    done = run("-c", "from launch.bench.measure import peak_bytes; print(peak_bytes())")
    assert 2**22 < int(done.stdout) < held.nbytes


@pytest.mark.parametrize("ranks", [1, 2])
def test_against_the_plain_loop(ranks: int) -> None:
    result = bench("step", "--batch-size", "2", "--steps", "1", "--against", "loop", ranks=ranks)
    assert set(result["images_per_second"]) == {"distrib", "plain loop"}
    assert len(result["ratio"]) == 2


def test_ops() -> None:
    import_torch()
    result = bench("ops", "--batch-size", "3", "--against", "torch")
    assert [(layer["side"], *layer["channels"], layer["residual"]) for layer in result["layers"]] == [
        (28, 1, 4, False),
        (28, 4, 8, False),
        (14, 8, 8, False),
        (14, 8, 8, True),
        (14, 8, 16, False),
        (7, 16, 16, False),
        (3, 16, 16, False),
        (3, 16, 16, True),
    ]
    convolutions = [layer["convolution"] for layer in result["layers"] if "convolution" in layer]
    assert len(convolutions) == 6, "equal shapes once"
    for found in convolutions:
        assert set(found["ms"]) == {
            f"{algorithm} {way}"
            for algorithm in ("patches", "winograd", "torch")
            for way in ("forward", "backward")
        }
        assert {len(ms) for ms in found["ms"].values()} == {2}, "every repeat, for the spread"
        assert 1e-8 < found["error"] < 1e-5
    assert set(result["adam_ms"]) == set(result["head_ms"]) == {"distrib", "torch"}


def test_run_against_torch() -> None:
    import_torch()
    short = "--recipe demo --shift 0 --lr 0.05 --limit-train 1280 --limit-test 200 --batch-size 16 --ranks 2"
    result = json.loads(
        run(
            "-m",
            "launch.cli",
            "bench",
            "run",
            *short.split(),
            "--repeats",
            "1",
            "--against",
            "torch",
            "--json",
        ).stdout
    )
    for name, rows in result["runs"].items():
        (row,) = rows
        assert row.get("test_images") == (None if name == "distrib" else 200)
        assert row["process_seconds"] > row["wall_seconds"] > 0
        assert row["test_accuracy"] > 50, "both learn"
    best = result["runs"][result["against"]][0]["wall_seconds"]
    assert result["ratio"] == pytest.approx([best / result["runs"]["distrib"][0]["wall_seconds"]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("step", "--against", "jax"), "--against jax: choose torch or loop"),
        (("step", "--batch-size", "0"), "--batch-size 0: give 1 to 60000"),
        (("step", "--batch-size", "70000"), "--batch-size 70000: give 1 to 60000"),
        (("step", "--evaluate", "--against", "loop"), "leave out --evaluate"),
        (("ops", "--repeats", "0"), "--repeats 0: give 1 or more"),
        (("step", "--steps", "0"), "--steps 0: give 1 or more"),
        (("run", "--ranks", "0"), "--ranks 0: give 1 or more"),
        (("run", "--against", "loop"), "--against loop: choose torch"),
        (("step", "--model", "alexnet"), "--model alexnet: give resnet9, mlp, lenet, resnet20 or FILE.py:"),
        (
            ("kernels", "--model", "alexnet"),
            "--model alexnet: give resnet9, mlp, lenet, resnet20 or FILE.py:",
        ),
        (("kernels", "--precision", "float64"), "--precision float64: choose float32, tf32 or bf16"),
        (("run", "--recipe", "demo", "--lr", "x"), "--lr x: give a number"),
        (("run", "--frobnicate", "1"), "No such option"),
        (("run", "--seed", "1"), "--seed: is chosen by the benchmark"),
        (("run", "--batch-size", "1"), "below the number of ranks"),
        (("ops", "--width", "nan"), "--width nan: give a finite number"),
        (("ops", "--batch-size", "0"), "--batch-size 0: give 1 to 60000"),
        (("run", "--loss", "bce", "--against", "torch"), "--loss bce: the PyTorch side has ce only"),
        (("run", "--shift", "2", "--against", "torch"), "--shift 2.0: the PyTorch side has 0.0 only"),
        (("run", "--precision", "float64", "--against", "torch"), "--precision float64"),
    ],
)
def test_wrong_use(arguments: tuple[str, ...], message: str, command_line) -> None:
    code, out, err = command_line(cli.app, "bench", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1


OWN = """
from nn.layers import *

class Twice(ReLU):
    pass

def net(shape, classes, width):
    return Sequential(Conv(4, 3, 2), ReLU(), GlobalAvgPool(), Linear(classes))

def twice(shape, classes):
    return Sequential(Conv(4, 3, 2), Twice(), GlobalAvgPool(), Linear(classes))
"""


@pytest.mark.parametrize("against", [(), ("--against", "torch")])
def test_a_step_of_a_network_of_ones_own(against: tuple[str, ...], tmp_path: Path) -> None:
    if against:
        import_torch()
    (tmp_path / "net.py").write_text(OWN)
    data = ("--data", "synthetic:40x8x12x3:5")
    more = ("--batch-size", "4", "--steps", "1", *data, *against)
    result = bench("step", "--model", f"{tmp_path / 'net.py'}:net", *more)
    assert result["variant"] == "net"
    assert result["flops_per_image"] == 2 * 2 * 4 * 6 * 9 * 3 * 4 + 2 * 3 * 4 * 5
    if against:
        require_rates(result, 1)
    else:
        assert len(result["images_per_second"]) == 1


@pytest.mark.parametrize("command", ["step", "run"])
def test_layers_that_pytorch_lacks(command: str, tmp_path: Path, command_line) -> None:
    import_torch()
    (tmp_path / "net.py").write_text(OWN)
    name = f"{tmp_path / 'net.py'}:twice"
    more = ("--batch-size", "4", "--data", "synthetic:40x8x12x3:5", "--against", "torch")
    code, out, err = command_line(cli.app, "bench", command, "--model", name, *more)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"--against torch: {name} has a layer of its own, Twice, which PyTorch lacks" in err


@pytest.mark.parametrize("command", ["ops", "run"])
def test_one_process_only(command: str) -> None:
    done = run("-m", "launch.cli", "bench", command, ranks=2, check=False)
    assert f"distrib bench {command} is one process" in done.stderr
    assert done.returncode == 2


def test_flops() -> None:
    """2·3·Σ H·W·9·C·O over the layers, the first without its input gradient: the published 1.28 GFLOP."""
    layers = [
        (28, 64, 128),
        (14, 128, 128),
        (14, 128, 128),
        (14, 128, 256),
        (7, 256, 256),
        (3, 256, 256),
        (3, 256, 256),
    ]
    exact = 6 * sum(9 * side**2 * a * b for side, a, b in layers) + 4 * 9 * 28**2 * 64 + 6 * 256 * 10
    assert resnet9().flops() == exact
    assert exact == pytest.approx(1.28e9, rel=0.01)
    assert (
        3 * resnet9().flops(training=False) == exact + 2 * 9 * 28**2 * 64
    )  # as if the first layer had an input gradient


@pytest.mark.parametrize(("batch", "width"), [(8, 1.0), (64, 0.25)])
def test_a_step_allocates_nothing_large(batch: int, width: float) -> None:
    """After the first steps: no buffer grows, and what NumPy allocates for a moment stays below 160 KiB."""
    rng = np.random.default_rng(1)
    images, labels = rng.integers(0, 256, (batch, 28, 28), np.uint8), rng.integers(0, 10, batch, np.uint8)
    data = make("random", *[(images, labels)] * 2, least=10)
    trainer = Trainer(Config(batch_size=batch, width=width), connect("none"), data)

    def step() -> None:
        trainer.step()
        trainer.results.read()

    for _ in range(3):
        step()
    held = trainer.model.buffers.nbytes()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        step()
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert trainer.model.buffers.nbytes() == held
    assert held > 50 * 2**20
    assert peak < 160 * 2**10, f"{peak} bytes"


@pytest.mark.parametrize(
    ("cores", "ranks", "threads", "batch", "words"),
    [
        (64, 1, 64, 512, "mpirun -n 64"),
        (64, 1, 64, 8, "mpirun -n 2"),
        (64, 4, 1, 512, "mpirun -n 64"),
        (4, 4, 1, 128, None),
        (1, 1, 1, 8, None),
        (64, 4, 16, 512, None),
        (8, 1, 8, 4, None),
        (8, 1, 8, 512, None),
        (8, 1, 1, 512, "mpirun -n 8"),
    ],
)
def test_how_many_ranks_to_start(
    cores: int, ranks: int, threads: int, batch: int, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    comm: Any = SimpleNamespace(rank=0, size=ranks)
    world = World(comm, SingleControl(), NUMPY, "test", Watchdog(0, 600), crew(ranks))
    line = distrib.announce.suggest_ranks(world, Config(batch_size=batch), threads)
    assert (line is None) == (words is None)
    assert words is None or f"{words} python -m distrib.train" in str(line)
