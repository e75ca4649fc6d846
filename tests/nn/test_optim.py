"""Optimizers against their formulas, schedules against closed forms and PyTorch's."""

from __future__ import annotations

from math import cos, pi

import numpy as np
import pytest
from test_torch_parity import import_torch

from nn import optim
from nn.array import HOST_BLOCK
from nn.device import NUMPY
from nn.optim import SGD, Adam, Optimizer, learning_rate
from nn.params import Parameters, Spec

pytestmark = pytest.mark.quick

BOUND = 1e-14  # float64, relative to the largest value: a handful of roundings of 1e-16, ten times
SPECS = [Spec("a", (5,)), Spec("b", (3, 2, 3, 3)), Spec("c", (HOST_BLOCK + 9,)), Spec("d", (4, 8))]
LRS = (0.1, 0.2, 0.05, 0.3, 0.1, 0.01, 0.2, 0.1, 0.4, 0.1)

each_seed = pytest.mark.parametrize("seed", [21, 22])
each_block = pytest.mark.parametrize("block", [1000, HOST_BLOCK, 10 * HOST_BLOCK])
each_decay = pytest.mark.parametrize("decay", [0.0, 0.1])


@pytest.fixture
def params(seed: int) -> Parameters:
    """More than one block of parameters with random values; padding between them."""
    made, rng = Parameters(SPECS, NUMPY, "float64"), np.random.default_rng(seed)
    for parameter in made:
        parameter.value[...] = rng.standard_normal(parameter.value.shape)
    return made


def padding(params: Parameters) -> np.ndarray:
    """Which elements of the flat vectors belong to no parameter."""
    free = np.ones(params.values.size, bool)
    for parameter in params:
        free[parameter.start : parameter.stop] = False
    return free


def steps(optimizer: Optimizer, params: Parameters, seed: int):
    """Take len(LRS) steps; yields the learning rate and a copy of the random gradient, then the step is
    taken."""
    rng = np.random.default_rng(seed + 100)
    for lr in LRS:
        for parameter in params:
            parameter.grad[...] = rng.standard_normal(parameter.grad.shape) * 10.0 ** rng.integers(-9, 1)
        yield lr, params.grads.copy()
        optimizer.step(lr)


def assert_values(params: Parameters, expected: np.ndarray) -> None:
    assert np.abs(params.values - expected).max() <= BOUND * np.abs(expected).max()
    free = padding(params)
    assert free.sum() == params.values.size - params.count > 0
    assert not params.values[free].any()


@each_seed
@each_block
@each_decay
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd(
    momentum: float,
    nesterov: bool,
    decay: float,
    block: int,
    seed: int,
    params: Parameters,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """v = μ·v + g with v = g at first; θ −= lr·v, with Nesterov θ −= lr·(g + μ·v); g includes λθ."""
    monkeypatch.setattr(optim, "HOST_BLOCK", block)
    optimizer, values, v = SGD(params, decay, momentum, nesterov), params.values.copy(), None
    for lr, g in steps(optimizer, params, seed):
        g = g + decay * values
        v = g if v is None else momentum * v + g
        values = values - lr * (g + momentum * v if nesterov else v)
    assert_values(params, values)
    assert optimizer.steps == len(LRS)
    for name, state in optimizer.state.items():
        assert name == "momentum"
        assert np.abs(state - v).max() <= BOUND * np.abs(v).max()
    assert len(optimizer.state) == (momentum > 0)


@each_seed
@each_block
@each_decay
def test_adam(
    decay: float, block: int, seed: int, params: Parameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kingma and Ba's efficient form, ε̂ = 1e-7, decay decoupled: θ ← θ·(1 − lr·λ) − lr_t·m/(√v + ε̂)."""
    monkeypatch.setattr(optim, "HOST_BLOCK", block)
    optimizer, values = Adam(params, decay), params.values.copy()
    m = v = np.zeros_like(values)
    for t, (lr, g) in enumerate(steps(optimizer, params, seed), 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        rate = lr * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
        values = values * (1 - lr * decay) - rate * m / (np.sqrt(v) + 1e-7)
    assert_values(params, values)
    assert optimizer.steps == len(LRS)
    assert optimizer.state.keys() == {"m", "v"}
    for name, expected in (("m", m), ("v", v)):
        assert np.abs(optimizer.state[name] - expected).max() <= BOUND * np.abs(expected).max()
        assert not optimizer.state[name][padding(params)].any()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 10, 20, 99, 1000])
def test_onecycle_is_torchs(steps: int) -> None:
    torch = import_torch()
    optimizer = torch.optim.SGD([torch.zeros(1, dtype=torch.float64, requires_grad=True)], 1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.37, total_steps=steps, cycle_momentum=False)
    for step in range(steps):
        theirs = schedule.get_last_lr()[0]
        assert learning_rate("onecycle", 0.37, step, steps) == pytest.approx(theirs, rel=1e-12, abs=0)
        optimizer.step()
        if step < steps - 1:
            schedule.step()


@pytest.mark.parametrize("steps", [5, 8, 100])
def test_onecycle_ends(steps: int) -> None:
    rates = [learning_rate("onecycle", 0.5, step, steps) for step in range(steps)]
    assert rates[0] == pytest.approx(0.5 / 25, rel=1e-12)
    assert rates[-1] == pytest.approx(0.5 / 250_000, rel=1e-12)
    top = int(np.argmax(rates))
    assert abs(top - (0.3 * steps - 1)) <= 1
    assert rates[top] <= 0.5


@pytest.mark.parametrize("steps", [1, 2, 10, 333])
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_cosine_and_constant(steps: int, warmup: int) -> None:
    for step in range(steps):
        cosine, constant = (learning_rate(name, 0.3, step, steps, warmup) for name in ("cosine", "constant"))
        if step < warmup:
            assert cosine == constant == pytest.approx(0.3 * (step + 1) / warmup, rel=1e-15)
        else:
            assert constant == 0.3
            part = (step - warmup) / (steps - warmup)
            assert cosine == pytest.approx(0.15 * (1 + cos(pi * part)), rel=1e-12)


def test_cosine_is_torchs() -> None:
    torch = import_torch()
    optimizer = torch.optim.SGD([torch.zeros(1, dtype=torch.float64, requires_grad=True)], 0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    for step in range(50):
        theirs = schedule.get_last_lr()[0]  # a product of fifty factors
        assert learning_rate("cosine", 0.3, step, 50) == pytest.approx(theirs, rel=1e-12, abs=0)
        optimizer.step()
        schedule.step()
