"""The CuPy path without a GPU: a whole step on an array type that refuses what CuPy refuses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from conftest import crew
from strict_array import (
    StrictArray,
    names_are_current,
    reset_syncs,
    strict,
    sync_count,
    synchronisation,
)

from distrib.comm.base import SingleCommunicator, SingleControl
from distrib.comm.world import World
from distrib.config import Config
from distrib.data.dataset import make
from distrib.faults.watchdog import Watchdog
from distrib.trainer import Trainer
from nn.array import register
from nn.device import NUMPY, Backend
from nn.params import Parameters
from nn.resnet9 import VARIANTS

pytestmark = pytest.mark.quick

register(StrictArray, strict)


@dataclass(frozen=True)
class StrictBackend(Backend):
    """The one place where the device is waited for is `to_host`."""

    def to_host(self, x):
        with synchronisation():
            return self.xp.asnumpy(x)


STRICT = StrictBackend("strict", strict, "NHWC")


def a_trainer(backend: Backend, **options) -> Trainer:
    rng = np.random.default_rng(1)
    images, labels = rng.integers(0, 256, (20, 28, 28), np.uint8), rng.integers(0, 10, 20, np.uint8)
    data = make("random", *[(images, labels)] * 2, least=10)
    world = World(SingleCommunicator(), SingleControl(), backend, "test", Watchdog(0, 600), crew(1))
    return Trainer(Config(**{"batch_size": 8, "width": 0.0625, **options}), world, data)


def apart(ours: Parameters, theirs: Parameters, what: str) -> float:
    """Largest difference of two flat vectors, whose memory layouts may differ."""
    mine, other = (p.to_checkpoint(getattr(p, what)) for p in (ours, theirs))
    return max(float(np.abs(mine[name] - other[name]).max()) for name in mine)


OPTIMIZERS = [
    {"optimizer": "adam", "weight_decay": 0.01},
    {
        "optimizer": "sgd",
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 0.01,
        "shift": 2.0,
        "rotate": 15.0,
        "average": 0.9,
    },
]


@pytest.mark.parametrize("loss", ["ce", "bce"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("options", OPTIMIZERS, ids=lambda o: o["optimizer"])
def test_whole_step_never_waits_for_the_device(variant: str, loss: str, options: dict) -> None:
    strict_trainer, plain = (
        a_trainer(b, variant=variant, loss=loss, precision="float64", **options) for b in (STRICT, NUMPY)
    )
    reset_syncs()
    for _ in range(3):  # the last batch is smaller
        strict_trainer.step()
        plain.step()
    assert sync_count() == 0, "a step must leave the device running"
    strict_trainer.results.read()
    assert sync_count() == 1, "reading the results of any number of steps waits once"
    plain.results.read()
    # the same source on both memory orders; only the order of sums differs
    assert apart(strict_trainer.params, plain.params, "values") < 1e-9
    assert strict_trainer.results.last["loss"] == pytest.approx(plain.results.last["loss"], rel=1e-9)


@pytest.mark.parametrize("algorithm", ["loop", "patches"])
def test_every_form_of_convolution(algorithm: str) -> None:
    trainers = [a_trainer(b, precision="float64", batch_size=2) for b in (STRICT, NUMPY)]
    for trainer in trainers:
        for conv in trainer.model.convs()[1:3]:
            conv.algorithm = algorithm
        trainer.step()
    assert apart(trainers[0].params, trainers[1].params, "grads") < 1e-9


def test_evaluation_waits_once() -> None:
    trainer = a_trainer(STRICT)
    reset_syncs()
    trainer.test()
    assert sync_count() == 1


def test_checkpoint_round_trip_on_the_device() -> None:
    trainer = a_trainer(STRICT)
    trainer.step()
    state = trainer.model.state_dict()
    other = a_trainer(STRICT, seed=5)
    other.model.load_state_dict(state)
    assert all((value == state[name]).all() for name, value in other.model.state_dict().items())


@pytest.mark.needs("cupy")
def test_the_list_of_cupy_functions_is_current() -> None:
    assert names_are_current() == set()
