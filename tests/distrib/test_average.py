"""The moving average of the weights is what is evaluated and saved; training goes on from the weights
themselves."""

from __future__ import annotations

import numpy as np
import pytest
from test_graph import a_trainer

from nn.device import NUMPY

pytestmark = pytest.mark.quick

DECAY = 0.7


def test_it_is_the_weighted_mean_of_the_weights_after_each_step() -> None:
    """Σ decay^(t−i)·θ_i / Σ decay^(t−i), of parameters and running statistics, in float64."""
    trainer = a_trainer(NUMPY, precision="float64", average=DECAY)
    before = trainer.state_dict()
    assert all((before[name] == array).all() for name, array in trainer.model.state_dict().items()), (
        "before the first step"
    )
    seen = []
    for _ in range(5):
        trainer.step()
        trainer.results.read()
        seen.append(trainer.model.state_dict())
    weights = DECAY ** np.arange(4, -1, -1.0)
    found = trainer.state_dict()
    for name in found:
        if not name.endswith("num_batches_tracked"):
            expected = (
                sum(weight * each[name] for weight, each in zip(weights, seen, strict=True)) / weights.sum()
            )
            np.testing.assert_allclose(found[name], expected, rtol=1e-12, atol=1e-15, err_msg=name)
    assert found["stem.1.num_batches_tracked"] == 5


def test_training_is_as_without_it() -> None:
    """To the bit, whatever is evaluated and saved in between."""
    plain, averaged = (a_trainer(NUMPY, precision="float64", average=average) for average in (0.0, DECAY))
    for trainer in (plain, averaged):
        for _ in range(4):
            trainer.step()
            trainer.results.read()
            trainer.test()
            trainer.state_dict()
    assert (plain.params.values == averaged.params.values).all()
    assert (plain.model.statistics == averaged.model.statistics).all()
    assert plain.test()["test_loss"] != averaged.test()["test_loss"]


def test_what_is_tested_is_what_is_saved() -> None:
    trainer, other = a_trainer(NUMPY, average=DECAY), a_trainer(NUMPY, seed=5)
    for _ in range(4):
        trainer.step()
        trainer.results.read()
    other.model.load_state_dict(trainer.state_dict())
    assert other.test() == pytest.approx(trainer.test(), rel=1e-6)
