"""Virtual shards on the double of a GPU: the same bits on any number of ranks; eager, captured, staged."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from conftest import HELPERS, run
from device_double import double_only, needs_device

from distrib.data.dataset import Dataset, make
from nn.device import Backend
from nn.layer import Layer, Shape
from nn.layers import ConvBN, Dropout, GlobalMaxPool, Linear, Residual, Sequential

pytestmark = needs_device

CASES: dict[str, dict[str, Any]] = {
    "adam": {"average": 0.5, "shift": 1.0},
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "loss": "bce", "shards": 5},
    "shard": {"batch_norm": "shard", "precision": "tf32", "shards": 4},
    "at once": {"batch_norm": "shard", "precision": "tf32", "shards": 4, "shards_at_once": 1},
    "bf16": {"precision": "bf16", "shards": 5},
    "float64": {"precision": "float64", "shards": 4},
}
"""Options; the batch of 9 in 8 shards unless they say otherwise, and a last one of 3 in 3."""

IMAGES, STEPS = 21, 4


def net(shape: Shape, classes: int) -> Layer:
    body = Residual(ConvBN(4), ConvBN(4, relu=False))
    return Sequential(ConvBN(4, pool=2), body, GlobalMaxPool(), Dropout(0.3), Linear(classes))


def random_data() -> Dataset:
    rng = np.random.default_rng(1)
    part = rng.integers(0, 256, (IMAGES, 8, 8), np.uint8), rng.integers(0, 10, IMAGES, np.uint8)
    return make("random", part, part, least=10)


def digest(backend: Backend, trainer: Any) -> str:
    """Of the weights, the moments, the averages and the running statistics."""
    arrays = [trainer.params.values, *trainer.optimizer.state.values(), trainer.model.statistics]
    arrays += [mean for mean, _ in trainer.averages]
    return hashlib.sha256(b"".join(backend.to_host(array).tobytes() for array in arrays)).hexdigest()


RANKS = """
import json, sys
from mpi4py import MPI
from device_double import CapturedNccl, device
from distrib.comm.mpi import StagedCommunicator
from distrib.comm.nccl import NcclCommunicator
from test_graph import *
from test_shards_device import STEPS, digest, net, random_data
world, watchdog = MPI.COMM_WORLD, Watchdog(MPI.COMM_WORLD.Get_rank(), 600)
distrib.graph.STEPS = 2

def bits(kind, graph, given):
    given = {"batch_size": 9, "epochs": 3, "lr": 1e-2, "reproducible": True, **given}
    with device(given.get("precision", "float32")) as backend:
        if kind == "staged":
            comm = StagedCommunicator(world, watchdog, backend)
        else:
            nccl = CapturedNccl(world, backend.cuda, [])
            zero = lambda: backend.xp.zeros(1, "float32")
            comm = NcclCommunicator(world, backend.cuda, nccl, 0, watchdog, zero, backend.side_stream)
        data = random_data()
        config = Config(**given, cuda_graph=graph).resolve(comm.size, data)
        trainer = Trainer(config, World(comm, world, backend, "", watchdog, crew(comm.size)), data, net)
        warm_up(trainer, None)
        reset_syncs()
        trainer.step(2)
        assert sync_count() == 0 or kind == "staged", "a step waits for the device"
        trainer.results.read()
        found = [trainer.results.last["loss"], *steps(trainer, STEPS - 2), trainer.test()["test_loss"]]
        captured = trainer.graphs is not None
        assert captured == (graph and kind == "nccl" and config.precision != "float64")
        assert not captured or trainer.graphs.replays == STEPS, trainer.graphs.replays
        mine = digest(backend, trainer)
        assert len(set(world.allgather(mine))) == 1, "ranks differ"
        trainer.close(), comm.close()
        return [mine, found]

found = {f"{name}, {way}": bits(way.split()[0], way.endswith("graph"), given) for name, given, way in GIVEN}
if world.rank == 0:
    print(json.dumps(found))
"""

EAGER, GRAPH, STAGED = "nccl", "nccl graph", "staged"


@cache
def bits(ranks: int, *wanted: tuple[str, str], **more: Any) -> dict[str, Any]:
    """[digest, losses] by case and way."""
    given = [(name, {**CASES[name], **more}, way) for name, way in wanted]
    done = run("-c", f"GIVEN = {given!r}\n" + RANKS, ranks=ranks, env=HELPERS)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def alone() -> dict[str, Any]:
    """By case: the same whether a step is a graph or not."""
    eager = ("sgd", "at once", "bf16")  # and "adam", on three ranks
    found = bits(1, *((name, GRAPH) for name in CASES), *((name, EAGER) for name in eager))
    for name in eager:
        assert found[f"{name}, {EAGER}"] == found[f"{name}, {GRAPH}"], name
    return {name: found[f"{name}, {GRAPH}"] for name in CASES}


@double_only
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_same_bits_on_any_number_of_ranks(ranks: int) -> None:
    names = CASES if ranks == 3 else ("adam", "at once")
    found = bits(ranks, *((name, GRAPH) for name in names), *([("adam", EAGER)] if ranks == 3 else []))
    for key, bits_and_losses in found.items():
        assert bits_and_losses == alone()[key.split(",")[0]], key


@double_only
def test_one_shard_at_a_time_changes_no_bit() -> None:
    assert alone()["shard"] == alone()["at once"]
    assert len({each[0] for each in alone().values()}) == len(CASES) - 1


@double_only
def test_through_the_host() -> None:
    """MPI under the device's arrays."""
    found = bits(2, ("adam", STAGED), ("shard", STAGED))
    assert [found[f"{name}, {STAGED}"] for name in ("adam", "shard")] == [alone()["adam"], alone()["shard"]]


@double_only
def test_without_the_mode_the_bits_differ() -> None:
    """Else the tests here could not fail."""
    (one, losses), (three, others) = (
        bits(ranks, ("adam", GRAPH), reproducible=False)[f"adam, {GRAPH}"] for ranks in (1, 3)
    )
    assert one != three
    np.testing.assert_allclose(losses[:3], others[:3], rtol=1e-3)
