"""What only a GPU can show. `make test-gpu` runs this; elsewhere these tests are not collected.

docs/gpu.md says what no GPU has seen.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import losses, run, summary, train
from cudnn_double import from_bf16, to_bf16
from device_double import device
from test_graph import a_trainer, steps

from nn.buffers import Buffers
from nn.device import NUMPY
from nn.ops.conv import Geometry, conv_backward, conv_forward

LAYERS = [
    (28, 64, 128),
    (14, 128, 128),
    (14, 128, 256),
    (7, 256, 256),
    (3, 256, 256),
    (28, 8, 16),
    (3, 32, 32),
]
BOUND = {"float32": 8e-6, "tf32": 2e-3, "bf16": 1e-2}
"""Of the largest value. A float32 sum of 25,872 products (33 images of 28×28) in one accumulator is off by
5.8e-6, in four by 1.9e-6. TF32 rounds inputs to 2^-11, bfloat16 to 2^-9; sums of many products average that
out."""


@pytest.mark.parametrize("precision", list(BOUND))
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("n", [1, 8, 33])
def test_cudnn_against_patches(n: int, layer: tuple[int, int, int], precision: str) -> None:
    """All three operations against float64 on the host; twice, to the same bits."""
    side, c, o = layer
    rng, g = np.random.default_rng(0), Geometry(1, 1, 1)
    shapes = {"x": (n, side, side, c), "w": (o, 3, 3, c), "dy": (n, side, side, o)}
    host = {name: rng.standard_normal(shape).astype("float32") for name, shape in shapes.items()}
    found: list[dict[str, np.ndarray]] = []
    with device(precision) as backend:
        algorithm, xp, bf16 = backend.algorithms["cudnn"], backend.xp, precision == "bf16"
        if bf16:
            host = {name: from_bf16(to_bf16(values)) for name, values in host.items()}
        on = {name: xp.asarray(to_bf16(values) if bf16 else values) for name, values in host.items()}
        buffers = Buffers(backend, "uint16" if bf16 else "float32")
        kind = "uint16" if bf16 else "float32"
        for _ in range(2):
            y, dx = xp.zeros((n, side, side, o), kind), xp.zeros((n, side, side, c), kind)
            dw = xp.zeros((o, 3, 3, c), "float32")
            w = on["w"].transpose(1, 2, 3, 0)
            saved = algorithm.forward(on["x"], w, g, y, buffers, True)
            algorithm.backward(on["dy"], saved, w, g, dw.transpose(1, 2, 3, 0), dx, buffers)
            backend.side_stream.join_all()
            got = {"y": y, "dx": dx, "dw": dw}
            found.append({name: backend.to_host(a) for name, a in got.items()})
    for name, first in found[0].items():
        assert (first == found[1][name]).all(), f"{name} differs from run to run"
    wide = {name: values.astype("float64") for name, values in host.items()}
    buffers, weights = Buffers(NUMPY, "float64"), wide["w"].transpose(1, 2, 3, 0)
    expected = {"y": np.empty(shapes["dy"]), "dx": np.empty(shapes["x"]), "dw": np.empty((3, 3, c, o))}
    saved = conv_forward(wide["x"], weights, g, expected["y"], buffers, "patches")
    conv_backward(wide["dy"], saved, weights, g, expected["dw"], expected["dx"], buffers, "patches")
    expected["dw"] = expected["dw"].transpose(3, 0, 1, 2)
    apart = {}
    for name, values in expected.items():
        ours = found[0][name]
        ours = from_bf16(ours) if ours.dtype == np.uint16 else ours
        apart[name] = float(np.abs(ours - values).max() / np.abs(values).max())
    assert max(apart.values()) <= BOUND[precision], apart
    if precision == "tf32" and c >= 64:
        assert max(apart.values()) > 2e-5, f"no tensor core was used: {apart}"


def test_a_graph_replays_what_it_captured() -> None:
    """At full width and batch 8: graph and eager steps give the same bits."""
    found = []
    for graph in (True, False):
        with device("tf32") as backend:
            trainer = a_trainer(backend, images=64, width=1.0, precision="tf32", cuda_graph=graph, lr=1e-3)
            found.append((steps(trainer, 8), backend.to_host(trainer.params.values)))
            assert bool(trainer.graphs and trainer.graphs.replays == 7) == graph
    assert found[0][0] == found[1][0]
    assert (found[0][1] == found[1][1]).all()


def test_float32_training_follows_the_host() -> None:
    """Ten steps at full width in strict float32 against float64 on the host."""
    options: dict[str, Any] = {"images": 80, "width": 1.0, "lr": 1e-3}
    with device("float32") as backend:
        ours = steps(a_trainer(backend, precision="float32", **options), 10)
    theirs = steps(a_trainer(NUMPY, precision="float64", **options), 10)
    # NumPy's float32 is 1.6e-4 apart at step 4, 1.8e-2 at step 10; another order of sums may be thrice that
    np.testing.assert_allclose(ours[:3], theirs[:3], rtol=3e-4)
    np.testing.assert_allclose(ours, theirs, rtol=6e-2)


OPTIONS = (
    "--epochs",
    2,
    "--limit-train",
    600,
    "--limit-test",
    200,
    "--batch-size",
    26,
    "--width",
    0.125,
    "--log-every",
    1,
    "--optimizer",
    "sgd",
    "--lr",
    0.01,
    "--backend",
    "cupy",
)
SHARED = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_MAX_CTAS": "8", "NCCL_NVLS_ENABLE": "0"}


needs_shared_gpu = pytest.mark.needs("shared GPU")


def on_ranks(folder: Path, ranks: int, comm: str, *more: object, like: Path | None = None) -> None:
    """A run, with the convolution plans of the run `like`: others may round otherwise."""
    if like:
        folder.mkdir()
        shutil.copy(like / "plans.json", folder)
    train(folder, *OPTIONS, "--comm", comm, *more, ranks=ranks, env=SHARED)


@pytest.mark.parametrize("comm", [pytest.param("nccl", marks=needs_shared_gpu), "mpi"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_equal_one(ranks: int, comm: str, tmp_path: Path) -> None:
    """Several ranks on one GPU, NCCL inside the graph (or MPI through the host): the same losses as one
    rank's."""
    for name, count, kind in (("one", 1, "none"), ("many", ranks, comm)):
        on_ranks(tmp_path / name, count, kind, "--precision", "float64" if comm == "mpi" else "float32")
    one, many = losses(tmp_path / "one"), losses(tmp_path / "many")
    bound = 1e-9 if comm == "mpi" else 1e-3
    np.testing.assert_allclose(many, one, rtol=bound)
    found = summary(tmp_path / "many")
    assert found["communicator"] == comm
    assert len(set(found["rank_digests"])) == 1
    assert len(found["images_per_rank"]) == ranks


@needs_shared_gpu
def test_nccl_in_a_graph_equals_nccl_eagerly(tmp_path: Path) -> None:
    on_ranks(tmp_path / "graph", 2, "nccl")
    on_ranks(tmp_path / "eager", 2, "nccl", "--no-cuda-graph", like=tmp_path / "graph")
    assert losses(tmp_path / "graph") == losses(tmp_path / "eager")
    assert summary(tmp_path / "graph")["parameter_digest"] == summary(tmp_path / "eager")["parameter_digest"]


@needs_shared_gpu
def test_bf16_gradients_travel(tmp_path: Path) -> None:
    on_ranks(tmp_path / "wide", 2, "nccl")
    on_ranks(tmp_path / "narrow", 2, "nccl", "--gradients", "bf16")
    np.testing.assert_allclose(losses(tmp_path / "narrow")[:5], losses(tmp_path / "wide")[:5], rtol=2e-2)


@pytest.mark.parametrize("precision", ["tf32", "bf16", "float32"])
def test_resume_to_the_bit(precision: str, tmp_path: Path) -> None:
    """Stopped in the middle of an epoch and taken up again: the digest of the run that would have been."""
    more = ("--precision", precision)
    on_ranks(tmp_path / "whole", 1, "none", *more)
    on_ranks(tmp_path / "parts", 1, "none", *more, "--max-steps", 30, like=tmp_path / "whole")
    on_ranks(tmp_path / "parts", 1, "none", *more)
    assert summary(tmp_path / "parts")["parameter_digest"] == summary(tmp_path / "whole")["parameter_digest"]


@needs_shared_gpu
def test_a_rank_that_stops_ends_the_job(tmp_path: Path) -> None:
    """Stopped, not dead, while the other sits in a captured collective: the other's watchdog speaks, and no
    one hangs."""
    script = f"""
import os, signal, sys, threading, time
from mpi4py import MPI
if MPI.COMM_WORLD.Get_rank() == 1:
    stop = lambda: (time.sleep(20), os.kill(os.getpid(), signal.SIGSTOP))
    threading.Thread(target=stop, daemon=True).start()
sys.argv = ["distrib.train", "--run-dir", {str(tmp_path / "run")!r}, "--backend", "cupy",
            "--comm", "nccl", "--epochs", "50",
            "--timeout", "10", "--batch-size", "64", "--width", "0.125"]
from distrib.train import main
sys.exit(main())
"""
    done = run("-c", script, ranks=2, check=False, env=SHARED)
    assert done.returncode not in (0, 2, 85)
    assert "distrib: rank 0 on" in done.stderr
    assert "waited 10 s in" in done.stderr
