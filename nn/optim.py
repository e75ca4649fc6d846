"""SGD and Adam on the flat vectors, and learning-rate schedules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from math import cos, pi
from typing import Any, ClassVar

import numpy as np

from nn.array import HOST_BLOCK, Array
from nn.ops.update import BETA1, BETA2, StepRecord, adam, sgd
from nn.params import Parameters

WHOLE = slice(None)


class Optimizer(ABC):
    """State vectors beside the parameters; updates `params.values` from `params.grads`.

    `options` names the arguments of the class besides `params`. `steps` counts the updates whose rates were
    asked for with `step`; who calls `update` counts for itself.
    """

    options: ClassVar[tuple[str, ...]] = ("weight_decay",)
    moments: tuple[str, ...] = ()

    def __init__(self, params: Parameters, weight_decay: float = 0.0) -> None:
        self.params, self.weight_decay, self.steps = params, weight_decay, 0
        xp = params.backend.xp
        self.state: dict[str, Array] = {name: xp.zeros_like(params.values) for name in self.moments}
        self._scratch: dict[int, Array] = {}
        self._first = xp.zeros(1, np.int64)

    def scratch(self, lane: int = 0) -> Array:
        """For blocks of an update, (2, B): one for each lane, for those who update parts side by side."""
        if lane not in self._scratch:
            p = self.params
            size = min(p.values.size, HOST_BLOCK) if p.backend.on_host else 0
            self._scratch[lane] = p.backend.xp.empty((2, size), p.dtype)
        return self._scratch[lane]

    def rates(self, lrs: Sequence[float], done: int) -> np.ndarray:
        """(len(lrs), 2), float64: each step's learning rate and step size, after `done` steps."""
        return np.array([(lr, self.step_size(lr, done + i + 1)) for i, lr in enumerate(lrs)])

    def step_size(self, lr: float, step: int) -> float:
        """What the update of step number `step`, from 1, is multiplied by."""
        return lr

    def step(self, lr: float) -> None:
        """One update with learning rate `lr`."""
        self.update(self.params.backend.asarray(self.rates([lr], self.steps)), self._first)
        self.steps += 1

    def update(
        self,
        rates: Array,
        at: Array,
        part: slice = WHOLE,
        record: StepRecord | None = None,
        lane: int = 0,
    ) -> None:
        """One update, of a part of the vectors, with row at[0] of `rates`, a table on the device.

        The last one of a step is given `record`: it leaves the results there and moves `at` on. Threads that
        update parts side by side each give a `lane` of their own.
        """
        compute = self.params.compute
        narrow = None if compute is None else compute[part]
        self._update(part, (rates, at, narrow, self.scratch(lane)), record)

    @abstractmethod
    def _update(self, part: slice, given: tuple[Any, ...], record: StepRecord | None) -> None:
        """`update` by an operation, which takes a part of the vectors, then what is `given`."""


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum where it is not 0 (see `nn.ops.update.sgd`)."""

    options = ("weight_decay", "momentum", "nesterov")

    def __init__(
        self, params: Parameters, weight_decay: float = 0.0, momentum: float = 0.0, nesterov: bool = False
    ) -> None:
        self.moments = ("momentum",) if momentum else ()
        self.momentum, self.nesterov = momentum, nesterov
        super().__init__(params, weight_decay)

    def _update(self, part: slice, given: tuple[Any, ...], record: StepRecord | None) -> None:
        p, momentum = self.params, self.state.get("momentum")
        sgd(
            p.values[part],
            p.grads[part],
            None if momentum is None else momentum[part],
            *given,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            nesterov=self.nesterov,
            record=record,
        )


class Adam(Optimizer):
    """Adam (see `nn.ops.update.adam`)."""

    moments = ("m", "v")

    def step_size(self, lr: float, step: int) -> float:
        return lr * (1 - BETA2**step) ** 0.5 / (1 - BETA1**step)

    def _update(self, part: slice, given: tuple[Any, ...], record: StepRecord | None) -> None:
        p, m, v = self.params, self.state["m"][part], self.state["v"][part]
        adam(p.values[part], p.grads[part], m, v, *given, weight_decay=self.weight_decay, record=record)


OPTIMIZERS: dict[str, type[Optimizer]] = {"adam": Adam, "sgd": SGD}


def constant(peak: float, step: int, _steps: int, warmup: int = 0) -> float:
    """`peak`, after a linear warm-up: its step s has (s + 1)/warmup of the peak."""
    return peak * (step + 1) / warmup if step < warmup else peak


def cosine(peak: float, step: int, steps: int, warmup: int = 0) -> float:
    """`peak`·(1 + cos(π·t))/2 with t from 0 to 1 over the steps after a linear warm-up as in `constant`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return _cosine(peak, 0.0, (step - warmup) / max(1, steps - warmup))


def onecycle(peak: float, step: int, steps: int, _warmup: int = 0) -> float:
    """peak/25 → peak over the first 30 % of the steps, then down to peak/250,000, cosine both ways.

    Smith (2018), in the form of `torch.optim.lr_scheduler.OneCycleLR`; it has a warm-up of its own.
    """
    top = 0.3 * steps - 1
    if step <= top:
        return _cosine(peak / 25, peak, step / top)
    return _cosine(peak, peak / 250_000, min(1.0, (step - top) / (steps - 1 - top)))


def _cosine(start: float, end: float, t: float) -> float:
    return end + (start - end) * (1 + cos(pi * t)) / 2


SCHEDULES: dict[str, Callable[[float, int, int, int], float]] = {
    "constant": constant,
    "cosine": cosine,
    "onecycle": onecycle,
}


def learning_rate(schedule: str, peak: float, step: int, steps: int, warmup: int = 0) -> float:
    """Learning rate of `step` (from 0) out of `steps`, by one of SCHEDULES."""
    return SCHEDULES[schedule](peak, step, steps, warmup)
