"""From the same weights, in the same order, our float32 training follows PyTorch's as far as rounding
allows."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import crew

from distrib.comm.base import SingleCommunicator, SingleControl
from distrib.comm.world import World
from distrib.config import Config
from distrib.data import formats, sampler
from distrib.data.dataset import Dataset
from distrib.faults.watchdog import Watchdog
from distrib.trainer import Trainer
from nn.device import NUMPY

pytestmark = pytest.mark.needs("torch")

STEPS, WIDTH = 200, 0.125


def ours(dtype: str, data: Dataset, order: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Losses of the first steps with the default options, and the weights they began with."""
    world = World(SingleCommunicator(), SingleControl(), NUMPY, "test", Watchdog(0, 600), crew(1))
    trainer = Trainer(Config(width=WIDTH, precision=dtype), world, data)
    initial = trainer.model.state_dict()
    found = []
    trainer.begin_epoch(0, order)
    for _ in range(STEPS):
        trainer.step()
        trainer.results.read()
        found.append(trainer.results.last["loss"])
    return np.array(found), initial


def theirs(name: str, initial: dict, data: Dataset, order: np.ndarray) -> np.ndarray:
    import torch

    from launch.torch_peer.network import TorchResNet9

    dtype = getattr(torch, name)
    torch.set_num_threads(1)
    model = TorchResNet9(width=WIDTH).to(dtype)
    model.load_state_dict({name: torch.tensor(value) for name, value in initial.items()})
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    found = []
    for step in range(STEPS):
        optimizer.param_groups[0]["eps"] = 1e-7 / (1 - 0.999 ** (step + 1)) ** 0.5
        indices, _ = sampler.batch_indices(order, step, 8, 0, 1)
        x = torch.tensor(data.train_images[indices].transpose(0, 3, 1, 2)).to(dtype) / 255
        loss = torch.nn.functional.cross_entropy(model(x), torch.tensor(data.train_labels[indices]).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return np.array(found)


def test_two_hundred_steps_of_the_default_run() -> None:
    data = formats.load(limit_train=STEPS * 8, limit_test=1)
    order = sampler.permutation(0, 0, STEPS * 8)
    exact, initial = ours("float64", data, order)
    np.testing.assert_allclose(exact, theirs("float64", initial, data, order), rtol=1e-7)
    found, initial32 = ours("float32", data, order)
    reference = theirs("float32", initial32, data, order)
    # Rounding is amplified from step to step, in PyTorch as in ours: against the float64 run, our error must
    # be of the size of PyTorch's own, and both begin at the rounding of a single step.
    own, other = np.abs(found - exact), np.abs(reference - exact)
    print(
        f"largest over the first 20 and all steps: ours {own[:20].max():.1e} {own.max():.1e},"
        f" PyTorch {other[:20].max():.1e} {other.max():.1e}"
    )
    assert own[:3].max() < 1e-5
    assert own.max() < 10 * other.max()
    assert np.median(own) < 10 * np.median(other)
