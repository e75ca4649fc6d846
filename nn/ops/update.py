"""Updates of the flat vectors: SGD, Adam, which may end a step, and a moving average.

The host's passes run block by block, so that the six vectors an Adam step touches are read once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from nn.array import Array, namespace, op
from nn.ops.bf16 import to_bf16

BETA1, BETA2, EPS_HAT = 0.9, 0.999, 1e-7


class StepRecord(NamedTuple):
    """Where a step's last update leaves its results, a row of `history` (H, 4): local_loss, step_metrics.

    `arrived` (1,), uint32, is zero; a kernel counts its blocks there.
    """

    history: Array
    local_loss: Array
    step_metrics: Array
    arrived: Array

    def end_step(self, at: Array) -> None:
        """Write row at mod H of the history; then at += 1."""
        row = at % len(self.history)
        self.history[row, 0] = self.local_loss[0]
        self.history[row, 1:] = self.step_metrics
        at += 1


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


@op
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
    record: StepRecord | None = None,
) -> None:
    """g += λθ; v = μv + g; θ −= lr·v, or with Nesterov θ −= lr·(g + μv), as `torch.optim.SGD`.

    v starts as the first gradient, which v = μ·0 + g gives. lr is rates[at[0], 0]; `compute`, where given, is
    `values` in bfloat16; `scratch` (2, B) is for blocks of B elements (0: all at once). With `record`, the
    step ends.
    """
    xp, (lr, _) = namespace(values), _row(rates, at)
    vectors = (values, grads) if velocity is None else (values, grads, velocity)
    for update, other, value, g, *state in _blocks(scratch, *vectors):
        xp.multiply(value, weight_decay, out=update)
        update += g
        if state:
            (v,) = state
            v *= momentum
            v += update
            if nesterov:
                xp.multiply(v, momentum, out=other)
                update += other
            else:
                update[...] = v
        update *= lr
        value -= update
    if compute is not None:
        to_bf16(values, compute)
    if record:
        record.end_step(at)


@op
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
    record: StepRecord | None = None,
) -> None:
    """m += (1−β1)(g − m); v += (1−β2)(g² − v); θ −= lr_t·m/(√v + ε̂), lr_t = lr·√(1−β2^t)/(1−β1^t).

    Kingma and Ba (2015), the efficient form at the end of section 2, with ε̂ = 1e-7. Weight decay is
    decoupled: θ −= lr·λ·θ first (Loshchilov and Hutter, 2019). lr and lr_t are rates[at[0]]; `compute`,
    `scratch` and `record` as in `sgd`.
    """
    xp, (lr, lr_t) = namespace(values), _row(rates, at)
    for update, other, value, g, m_part, v_part in _blocks(scratch, values, grads, m, v):
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
            value *= 1 - lr * weight_decay
        value -= update
    if compute is not None:
        to_bf16(values, compute)
    if record:
        record.end_step(at)


@op
def average(mean: Array, values: Array, scratch: Array, *, decay: float) -> None:
    """mean += (1 − decay)·(values − mean): an exponential moving average; `scratch` as in `sgd`.

    Of t values after a start at 0, mean/(1 − decay^t) is without the start's share (Kingma and Ba 2015,
    section 3).
    """
    xp = namespace(mean)
    for update, _, mean_part, value in _blocks(scratch, mean, values):
        xp.subtract(value, mean_part, out=update)
        update *= 1 - decay
        mean_part += update
