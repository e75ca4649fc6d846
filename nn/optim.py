"""SGD and Adam on the flat vectors, and learning-rate schedules.

The host's passes run block by block, so that the six vectors an Adam step touches are read once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from math import cos, pi
from typing import Any

import numpy as np

from nn.backend import HOST_BLOCK, Array, namespace, replaceable
from nn.params import Parameters, narrow

BETA1, BETA2, EPS_HAT = 0.9, 0.999, 1e-7
SCHEDULES = ("constant", "cosine", "onecycle")


class Optimizer(ABC):
    """State vectors beside the parameters; updates `params.values` from `params.grads`.

    `steps` counts the updates whose rates were asked for with `step`; who calls `update` counts for itself.
    """

    moments: tuple[str, ...] = ()

    def __init__(self, params: Parameters, weight_decay: float = 0.0) -> None:
        self.params, self.weight_decay, self.steps = params, weight_decay, 0
        xp = params.backend.xp
        self.state: dict[str, Array] = {name: xp.zeros_like(params.values) for name in self.moments}
        size = params.values.size
        self.scratch = xp.empty((2, min(size, HOST_BLOCK) if params.backend.on_host else 0), params.dtype)
        self._first = xp.zeros(1, np.int64)

    def rates(self, lrs: Sequence[float], done: int) -> np.ndarray:
        """(len(lrs), 2), float64: each step's learning rate and the step size that it makes, after `done` steps."""
        return np.array([(lr, self.step_size(lr, done + i + 1)) for i, lr in enumerate(lrs)])

    def step_size(self, lr: float, step: int) -> float:
        """What the update of step number `step`, from 1, is multiplied by."""
        return lr

    def step(self, lr: float) -> None:
        """One update with learning rate `lr`."""
        self.update(self.params.backend.asarray(self.rates([lr], self.steps)), self._first)
        self.steps += 1

    @abstractmethod
    def update(self, rates: Array, at: Array) -> None:
        """One update with row at[0] of `rates`, a table on the device."""


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum where it is not 0 (see `sgd`)."""

    def __init__(
        self, params: Parameters, weight_decay: float = 0.0, momentum: float = 0.0, nesterov: bool = False
    ) -> None:
        self.moments = ("momentum",) if momentum else ()
        self.momentum, self.nesterov = momentum, nesterov
        super().__init__(params, weight_decay)

    def update(self, rates: Array, at: Array) -> None:
        p = self.params
        sgd(
            p.values,
            p.grads,
            self.state.get("momentum"),
            rates,
            at,
            p.compute,
            self.scratch,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            nesterov=self.nesterov,
        )


class Adam(Optimizer):
    """Adam (see `adam`)."""

    moments = ("m", "v")

    def step_size(self, lr: float, step: int) -> float:
        return lr * (1 - BETA2**step) ** 0.5 / (1 - BETA1**step)

    def update(self, rates: Array, at: Array) -> None:
        p = self.params
        adam(
            p.values,
            p.grads,
            self.state["m"],
            self.state["v"],
            rates,
            at,
            p.compute,
            self.scratch,
            weight_decay=self.weight_decay,
        )


def _row(rates: Array, at: Array) -> Any:
    """The two numbers of row at[0]: on the host as floats, on a device without waiting for it."""
    row = rates[at[0]]
    return row.tolist() if isinstance(row, np.ndarray) else row


def _blocks(scratch: Array, *vectors: Array) -> Iterator[tuple[Array, ...]]:
    """Two scratch arrays and all vectors, block by block; in one block where there is no scratch yet."""
    size = vectors[0].size
    block = scratch.shape[1] or size
    if not scratch.shape[1]:
        scratch = namespace(scratch).empty((2, size), scratch.dtype)
    for start in range(0, size, block):
        part = slice(start, min(start + block, size))
        length = part.stop - part.start
        yield scratch[0, :length], scratch[1, :length], *(v[part] for v in vectors)


@replaceable
def sgd(
    values: Array,
    grads: Array,
    velocity: Array | None,
    rates: Array,
    at: Array,
    compute: Array | None,
    scratch: Array,
    *,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
) -> None:
    """g += λθ; v = μv + g; θ −= lr·v, or with Nesterov θ −= lr·(g + μv), as `torch.optim.SGD`; without v, θ −= lr·g.

    v starts as the first gradient, which v = μ·0 + g gives. lr is rates[at[0], 0]; `compute`, where given, is
    `values` narrowed; `scratch` (2, B) is for blocks of B elements (0: all at once).
    """
    xp, (lr, _) = namespace(values), _row(rates, at)
    for update, other, θ, g, *state in _blocks(
        scratch, values, grads, *([] if velocity is None else [velocity])
    ):
        xp.multiply(θ, weight_decay, out=update)
        update += g
        for v in state:
            v *= momentum
            v += update
            if nesterov:
                xp.multiply(v, momentum, out=other)
                update += other
            else:
                update[...] = v
        update *= lr
        θ -= update
    if compute is not None:
        narrow(values, compute)


@replaceable
def adam(
    values: Array,
    grads: Array,
    m: Array,
    v: Array,
    rates: Array,
    at: Array,
    compute: Array | None,
    scratch: Array,
    *,
    weight_decay: float,
) -> None:
    """m += (1−β1)(g − m); v += (1−β2)(g² − v); θ −= lr_t·m/(√v + ε̂), lr_t = lr·√(1−β2^t)/(1−β1^t).

    Kingma and Ba (2015), the efficient form at the end of section 2, with ε̂ = 1e-7. Weight decay is
    decoupled: θ −= lr·λ·θ first (Loshchilov and Hutter, 2019). lr and lr_t are rates[at[0]]; `compute` and
    `scratch` as in `sgd`.
    """
    xp, (lr, lr_t) = namespace(values), _row(rates, at)
    for update, other, θ, g, m_part, v_part in _blocks(scratch, values, grads, m, v):
        xp.subtract(g, m_part, out=update)
        update *= 1 - BETA1
        m_part += update
        xp.multiply(g, g, out=update)
        update -= v_part
        update *= 1 - BETA2
        v_part += update
        xp.sqrt(v_part, out=other)
        other += EPS_HAT
        xp.divide(m_part, other, out=update)
        update *= lr_t
        if weight_decay:
            θ *= 1 - lr * weight_decay
        θ -= update
    if compute is not None:
        narrow(values, compute)


@replaceable
def average(mean: Array, values: Array, scratch: Array, *, decay: float) -> None:
    """mean += (1 − decay)·(values − mean): an exponential moving average; `scratch` as in `sgd`.

    Of t values after a start at 0, mean/(1 − decay^t) is without the start's share (Kingma and Ba 2015, section 3).
    """
    xp = namespace(mean)
    for update, _, μ, θ in _blocks(scratch, mean, values):
        xp.subtract(θ, μ, out=update)
        update *= 1 - decay
        μ += update


def learning_rate(schedule: str, peak: float, step: int, steps: int, warmup: int = 0) -> float:
    """Learning rate of `step` (from 0) out of `steps`.

    - constant: `peak`;
    - cosine: `peak`·(1 + cos(π·t))/2 with t from 0 to 1 over the steps after the warm-up;
    - onecycle: peak/25 → peak over the first 30 % of the steps, then down to peak/250,000, cosine both
      ways (Smith, 2018, in the form of `torch.optim.lr_scheduler.OneCycleLR`).

    With `warmup` steps, constant and cosine first rise linearly: step s has (s + 1)/warmup of the peak.
    """
    if schedule == "onecycle":
        top = 0.3 * steps - 1
        if step <= top:
            return _cosine(peak / 25, peak, step / top)
        return _cosine(peak, peak / 250_000, min(1.0, (step - top) / (steps - 1 - top)))
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    return _cosine(peak, 0.0, (step - warmup) / max(1, steps - warmup))


def _cosine(start: float, end: float, t: float) -> float:
    return end + (start - end) * (1 + cos(pi * t)) / 2
