"""SGD and Adam on the flat vectors, and learning-rate schedules.

The host's passes run block by block, so that the six vectors an Adam step touches are read once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from math import cos, pi

from nn.backend import HOST_BLOCK, Array
from nn.params import Parameters

BETA1, BETA2, EPS_HAT = 0.9, 0.999, 1e-7
SCHEDULES = ("constant", "cosine", "onecycle")


class Optimizer(ABC):
    """State vectors beside the parameters; `step(lr)` updates `params.values` from `params.grads`."""

    moments: tuple[str, ...] = ()

    def __init__(self, params: Parameters, weight_decay: float = 0.0) -> None:
        self.params, self.weight_decay, self.steps = params, weight_decay, 0
        self.xp = params.backend.xp
        self.state: dict[str, Array] = {name: self.xp.zeros_like(params.values) for name in self.moments}
        size = params.values.size
        self._block = min(size, HOST_BLOCK) if params.backend.on_host else size
        self._scratch = self.xp.empty((2, self._block), params.dtype)

    def _blocks(self) -> Iterator[tuple[Array, ...]]:
        """(values, grads, two scratch arrays, *state) block by block."""
        size = self.params.values.size
        vectors = (self.params.values, self.params.grads)
        for start in range(0, size, self._block):
            block = slice(start, min(start + self._block, size))
            length = block.stop - block.start
            yield (*(v[block] for v in vectors), self._scratch[0, :length], self._scratch[1, :length],
                   *(v[block] for v in self.state.values()))  # fmt: skip

    @abstractmethod
    def step(self, lr: float) -> None:
        """One update with learning rate `lr`."""


class SGD(Optimizer):
    """g += λθ; v = μv + g; θ −= lr·v, or with Nesterov θ −= lr·(g + μv), as `torch.optim.SGD`.

    v starts as the first gradient, which v = μ·0 + g gives.
    """

    def __init__(self, params: Parameters, weight_decay: float = 0.0, momentum: float = 0.0,
                 nesterov: bool = False) -> None:  # fmt: skip
        self.moments = ("momentum",) if momentum else ()
        self.momentum, self.nesterov = momentum, nesterov
        super().__init__(params, weight_decay)

    def step(self, lr: float) -> None:
        self.steps += 1
        xp = self.xp
        for values, grads, update, scratch, *state in self._blocks():
            xp.multiply(values, self.weight_decay, out=update)
            update += grads
            if state:
                v = state[0]
                v *= self.momentum
                v += update
                if self.nesterov:
                    xp.multiply(v, self.momentum, out=scratch)
                    update += scratch
                else:
                    update[...] = v
            update *= lr
            values -= update


class Adam(Optimizer):
    """m += (1−β1)(g − m); v += (1−β2)(g² − v); θ −= lr_t·m/(√v + ε̂), lr_t = lr·√(1−β2^t)/(1−β1^t).

    Kingma and Ba (2015), the efficient form at the end of section 2, with ε̂ = 1e-7. Weight decay is
    decoupled: θ −= lr·λ·θ first (Loshchilov and Hutter, 2019).
    """

    moments = ("m", "v")

    def step(self, lr: float) -> None:
        self.steps += 1
        xp = self.xp
        lr_t = lr * (1 - BETA2**self.steps) ** 0.5 / (1 - BETA1**self.steps)
        for values, grads, update, scratch, m, v in self._blocks():
            xp.subtract(grads, m, out=update)
            update *= 1 - BETA1
            m += update
            xp.multiply(grads, grads, out=update)
            update -= v
            update *= 1 - BETA2
            v += update
            xp.sqrt(v, out=scratch)
            scratch += EPS_HAT
            xp.divide(m, scratch, out=update)
            update *= lr_t
            if self.weight_decay:
                values *= 1 - lr * self.weight_decay
            values -= update


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
