"""Checks exercise 1: the gradient against differences of losses, and that steps lower the loss."""

import exercise1
import numpy as np
import pytest

SHAPES = {"w1": (6, 8), "b1": (6,), "w2": (4, 6), "b2": (4,)}


def problem():
    rng = np.random.default_rng(1)
    w = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    return w, rng.normal(size=(5, 8)), rng.integers(0, 4, 5)


@pytest.mark.parametrize("name", SHAPES)
def test_the_gradient_is_the_slope_of_the_loss(name):
    w, x, labels = problem()
    gradient = exercise1.backward(w, x, labels, exercise1.forward(w, x, labels)[1])[name]
    assert gradient.shape == SHAPES[name], f"d{name} has not the shape of {name}"
    direction, h = np.random.default_rng(2).normal(size=SHAPES[name]), 1e-6
    losses = [exercise1.forward({**w, name: w[name] + s * h * direction}, x, labels)[0] for s in (1, -1)]
    slope = (losses[0] - losses[1]) / (2 * h)
    assert (gradient * direction).sum() == pytest.approx(slope, rel=1e-6), f"d{name}: not the slope"


def test_steps_lower_the_loss():
    w, x, labels = problem()
    before = exercise1.forward(w, x, labels)[0]
    held = dict(w)
    for _ in range(50):
        exercise1.step(w, exercise1.backward(w, x, labels, exercise1.forward(w, x, labels)[1]), lr=0.1)
    assert exercise1.forward(w, x, labels)[0] < before / 4
    assert all(w[name] is held[name] for name in w), "change the arrays in place"
