"""Pure pairs x_forward / x_backward on activations (N, H, W, C), and the two ends of a step.

Outputs and scratch are arguments or come from the workspace `ws`; nothing is remembered between calls.
Operations marked `replaceable` are the ones that a training step calls: on a GPU each is one or two kernels.
Sums over images that training depends on (batch norm's here, the gradients' in `distrib.reducer`) pass
through `_add_lines` and a sum over ranks, so there is one place each to make them reproducible.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from nn.backend import Array, blocks, memory_axes, namespace, replaceable
from nn.workspace import Workspace

EPS, MOMENTUM = 1e-5, 0.1
"""Of batch norm."""

SumOverRanks = Callable[[Array], Any]
"""Sums an array over all ranks, in place."""


def _add_lines(total: Array, block: Array, ws: Workspace) -> None:
    """Add to `total` (k·C,), float64, the sum of a block (A, B, k, C) over A and B."""
    a, b, k, c = block.shape
    if block.flags.c_contiguous:
        total += namespace(block).matmul(
            ws.ones(a * b), block.reshape(a * b, k * c), out=ws.scratch("line", (k * c,))
        )
    else:
        total += (ws.ones(b) @ block.reshape(a, b, k * c)).sum(0, dtype=np.float64)


def _totals(count: int, x: Array, ws: Workspace) -> Array:
    """Zeros (count, k·C), float64, for the sums of x (A, B, k, C)."""
    wide = ws.scratch("totals", (count, x.shape[2] * x.shape[3]), "float64")
    wide.fill(0)
    return wide


def _per_channel(name: str, v: Array, like: Array, ws: Workspace) -> Array:
    """The vector v (C,) in the dtype of `like` (A, B, k, C), repeated k times: scratch `name`.

    Against a (C,) with few channels NumPy's inner loops are C long, and three to four times slower.
    """
    wide = ws.scratch(name, like.shape[2:], like.dtype)
    wide[...] = v
    return wide


def batch_norm_statistics(
    x: Array, count: int, ws: Workspace, sum_over_ranks: SumOverRanks | None
) -> tuple[Array, Array]:
    """Mean and biased variance (C,), float64, over `count` values a channel; x becomes x − mean.

    Two passes, Σx then Σ(x − mean)², each summed over ranks: never E[x²] − E[x]², which cancels.
    """
    x = x.transpose(memory_axes(x))
    groups = x.shape[2]
    (total,) = _totals(1, x, ws)
    for block in blocks(x):
        _add_lines(total, x[block], ws)
    mean = total.reshape(groups, -1).sum(0)
    if sum_over_ranks:
        sum_over_ranks(mean)
    mean /= count
    shift = _per_channel("shift", mean, x, ws)
    (total,) = _totals(1, x, ws)
    for block in blocks(x):
        part = x[block]
        part -= shift
        square = ws.scratch("block", part.shape)
        namespace(x).multiply(part, part, out=square)
        _add_lines(total, square, ws)
    variance = total.reshape(groups, -1).sum(0)
    if sum_over_ranks:
        sum_over_ranks(variance)
    variance /= count
    return mean, variance


class Gate(NamedTuple):
    """What the backward of `activate` needs: where z let the gradient through.

    `passed` (bool, shaped as z) is true at each element that the gradient of y flows back to. With pooling,
    `top` is x̂ · sign(γ) at each window's maximum, and `open` (bool) where y is above 0; both shaped as y.
    """

    passed: Array
    top: Array = None
    open: Array = None

    def in_memory(self, axes: tuple[int, ...]) -> Gate:
        """The same with the arrays' axes in memory order."""
        return Gate(*(None if a is None else a.transpose(axes) for a in self))


def activate(
    z: Array,
    inverse_std: Array,
    gamma: Array,
    beta: Array,
    y: Array,
    ws: Workspace,
    *,
    residual: Array | None = None,
    relu: bool = True,
    pool: bool = False,
    gate: Gate | None = None,
) -> None:
    """y = pool(relu(z · inverse_std · γ + β + residual)): batch norm's second half and all that follows it.

    `inverse_std`, γ and β are (C,); `pool` is a 2×2 max-pool, y then (N, H//2, W//2, C), without a residual.
    `gate`, given where there is a ReLU or pooling, is filled in for the backward.
    """
    axes = memory_axes(z)
    z, y, gate = z.transpose(axes), y.transpose(axes), gate.in_memory(axes) if gate else None
    if pool:
        _activate_and_pool(z, inverse_std, gamma, beta, y, ws, relu, gate, axes.index(1))
        return
    xp = namespace(z)
    residual = None if residual is None else residual.transpose(axes)
    scale, shift = _per_channel("scale", inverse_std * gamma, z, ws), _per_channel("shift", beta, z, ws)
    zero = _per_channel("zero", 0.0, y, ws)  # against a scalar, NumPy's maximum is three times slower
    for block in blocks(z):
        out = y[block]
        xp.multiply(z[block], scale, out=out)
        out += shift
        if residual is not None:
            out += residual[block]
        if relu:
            if gate:
                xp.greater(out, zero, out=gate.passed[block])
            xp.maximum(out, zero, out=out)


def _activate_and_pool(
    z: Array,
    inverse_std: Array,
    gamma: Array,
    beta: Array,
    y: Array,
    ws: Workspace,
    relu: bool,
    gate: Gate | None,
    first: int,
) -> None:
    """`activate` with pooling, on arrays in memory order; `first` as in `pool_views`.

    The maximum is taken of x̂ · sign(γ); multiplying by |γ| and adding β, which leave the order of values as it
    is, then take a quarter of the work.
    """
    xp = namespace(z)
    unit = _per_channel("scale", xp.copysign(inverse_std, gamma), z, ws)
    gain, shift, zero = (
        _per_channel(name, v, y, ws) for name, v in (("gain", xp.abs(gamma)), ("shift", beta), ("zero", 0.0))
    )
    for block in blocks(z, 2):
        small = _pooled(block, first)
        whole, out = ws.scratch("block", z[block].shape), y[small]
        xp.multiply(z[block], unit, out=whole)
        top = gate.top[small] if gate else out
        max_pool_forward(whole, 2, top, first)
        xp.multiply(top, gain, out=out)
        out += shift
        if gate:
            opened = gate.open[small]
            xp.greater(out, zero if relu else -np.inf, out=opened)
            free = ws.scratch("pool.free", out.shape, "bool")
            free[...] = opened
            _winners(whole, top, 2, free, gate.passed[block], first)
        if relu:
            xp.maximum(out, zero, out=out)


def _pooled(block: tuple[slice, slice], first: int) -> tuple[slice, slice]:
    """Where the outputs of a 2×2 pooling of `block` lie; `first` as in `pool_views`."""
    a, b = block
    return (a if first else slice(a.start // 2, a.stop // 2)), slice(b.start // 2, b.stop // 2)


def batch_norm_backward(
    dy: Array,
    centred: Array,
    inverse_std: Array,
    gamma: Array,
    count: int,
    ws: Workspace,
    sum_over_ranks: SumOverRanks | None,
    dx: Array,
    *,
    gate: Gate | None = None,
) -> tuple[Array, Array]:
    """Writes dL/dx of batch norm and of what `activate` did after it; returns this rank's (dL/dγ, dL/dβ), float64.

    With g = dy where it passed the gate, 0 elsewhere, x̂ = centred · inverse_std and sums over all `count` values
    a channel, dx = γ · inverse_std · (g − Σg/count − x̂ · Σ(g·x̂)/count)  (Ioffe and Szegedy 2015, section 3).
    dy is overwritten: without pooling by g, which is also the residual's gradient. dx may be `centred`, or
    without pooling dy.
    """
    xp, axes = namespace(dy), memory_axes(centred)
    x, dx, dy = centred.transpose(axes), dx.transpose(axes), dy.transpose(axes)
    gate = gate.in_memory(axes) if gate else None
    pool = gate is not None and gate.top is not None
    # with pooling g has one element a window, and there x̂ = top · sign(γ)
    mask, other = (None, x) if gate is None else (gate.open, gate.top) if pool else (gate.passed, x)
    wide = _totals(2, dy, ws)
    for block in blocks(dy):
        part = dy[block]
        if mask is not None:
            xp.multiply(part, mask[block], out=part)
        product = ws.scratch("block", part.shape)
        xp.multiply(part, other[block], out=product)
        _add_lines(wide[0], part, ws)
        _add_lines(wide[1], product, ws)
    sums = wide.reshape(2, dy.shape[2], -1).sum(1)
    sums[1] *= xp.copysign(1.0, gamma) if pool else inverse_std
    d_gamma, d_beta = sums[1].copy(), sums[0].copy()
    if sum_over_ranks:
        sum_over_ranks(sums)
    scale = gamma * inverse_std
    factors = scale, -scale * inverse_std * (sums[1] / count), -scale * (sums[0] / count)
    if gate and pool:
        _input_gradient_through_pool(dy, x, factors, dx, ws, gate.passed, axes.index(1))
        return d_gamma, d_beta
    a, b, c = (
        _per_channel(name, v, x, ws) for name, v in zip(("scale", "slope", "shift"), factors, strict=True)
    )
    for block in blocks(x):
        part = dx[block]
        product = ws.scratch("block", part.shape)
        xp.multiply(x[block], b, out=product)  # first: dx may be x
        xp.multiply(dy[block], a, out=part)
        part += product
        part += c
    return d_gamma, d_beta


def _input_gradient_through_pool(
    g: Array, x: Array, factors: tuple[Array, ...], dx: Array, ws: Workspace, passed: Array, first: int
) -> None:
    """dx = a·g + b·x + c with g (of each window) where it `passed`."""
    xp = namespace(x)
    g *= _per_channel("gain", factors[0], g, ws)
    b, c = (_per_channel(name, v, x, ws) for name, v in zip(("slope", "shift"), factors[1:], strict=True))
    for block in blocks(x, 2):
        part, source = dx[block], g[_pooled(block, first)]
        xp.multiply(x[block], b, out=part)
        part += c
        product = ws.scratch("block", source.shape)
        for view, wins in zip(pool_views(part, 2, first), pool_views(passed[block], 2, first), strict=True):
            xp.multiply(source, wins, out=product)
            view += product


@replaceable
def norm_forward(
    z: Array,
    gamma: Array,
    beta: Array,
    running_mean: Array,
    running_var: Array,
    y: Array,
    ws: Workspace,
    *,
    count: int,
    sum_over_ranks: SumOverRanks | None,
    residual: Array | None = None,
    relu: bool = True,
    pool: bool = False,
) -> Any:
    """y = pool(relu(γ·x̂ + β + residual)), x̂ normalised over `count` values a channel; running statistics move on.

    Returns what `norm_backward` needs. z belongs to it from then on: its contents are undefined. With a residual,
    y too must keep its contents. The running variance takes in that of `count − 1` (see `activate` for the rest).
    """
    n, h, w, c = z.shape
    mean, var = batch_norm_statistics(z, count, ws, sum_over_ranks)
    running_mean += MOMENTUM * (mean - running_mean)
    running_var += MOMENTUM * (var * (count / max(count - 1, 1)) - running_var)
    inverse_std = (var + EPS) ** -0.5
    gate = None
    if pool:
        out = (n, h // 2, w // 2, c)
        gate = Gate(ws.image("passed", z.shape, "bool"), ws.image("top", out), ws.image("open", out, "bool"))
    elif relu:
        gate = Gate(ws.image("passed", z.shape, "bool"))
    activate(z, inverse_std, gamma, beta, y, ws, residual=residual, relu=relu, pool=pool, gate=gate)
    return z, inverse_std, gate, residual is not None


@replaceable
def norm_backward(
    dy: Array,
    saved: Any,
    gamma: Array,
    beta: Array,  # noqa: ARG001
    d_gamma: Array,
    d_beta: Array,
    ws: Workspace,
    *,
    count: int,
    sum_over_ranks: SumOverRanks | None,
) -> Array:
    """Writes this rank's d_gamma and d_beta; returns dz, in memory that lasts at least until the next operation.

    `saved` comes from `norm_forward`, in the same step. dy is overwritten: with a residual, by the gradient of
    the residual; else its contents are undefined.
    """
    z, inverse_std, gate, with_residual = saved
    dz = z if with_residual or gate is None or gate.top is not None else dy
    d_gamma[...], d_beta[...] = batch_norm_backward(
        dy, z, inverse_std, gamma, count, ws, sum_over_ranks, dz, gate=gate
    )
    return dz


@replaceable
def norm_inference(
    z: Array,
    gamma: Array,
    beta: Array,
    running_mean: Array,
    running_var: Array,
    y: Array,
    ws: Workspace,
    *,
    residual: Array | None = None,
    relu: bool = True,
    pool: bool = False,
) -> None:
    """As `norm_forward` with the running statistics, which stay as they are. Without pooling, y may be z."""
    inverse_std = (running_var.astype(np.float64) + EPS) ** -0.5
    shift = beta - running_mean * inverse_std * gamma
    activate(z, inverse_std, gamma, shift, y, ws, residual=residual, relu=relu, pool=pool)


def pool_views(x: Array, size: int, first: int = 1) -> list[Array]:
    """The size² strided views of x, in row-major order, that make up its windows.

    The image's rows and columns are axes `first` and `first + 1` of x: 1 and 2 of (N, H, W, C).
    """
    h, w = (x.shape[first + i] // size * size for i in (0, 1))
    lead = (slice(None),) * first
    return [x[(*lead, slice(i, h, size), slice(j, w, size))] for i in range(size) for j in range(size)]


def max_pool_forward(x: Array, size: int, y: Array, first: int = 1) -> None:
    """y (N, H//size, W//size, C): maximum of each size×size window; rows and columns left over are unused."""
    one, *others = pool_views(x, size, first)
    if not others:
        y[...] = one
        return
    namespace(x).maximum(one, others[0], out=y)
    for view in others[1:]:
        namespace(x).maximum(y, view, out=y)


def _winners(x: Array, y: Array, size: int, free: Array, won: Array, first: int = 1) -> None:
    """`won`: true at the first maximum of each window that is `free` (in row-major order, as PyTorch does)."""
    xp = namespace(x)
    if x.shape[first] % size or x.shape[first + 1] % size:
        won[...] = False
    for view, wins in zip(pool_views(x, size, first), pool_views(won, size, first), strict=True):
        xp.equal(view, y, out=wins)
        wins &= free
        free ^= wins


def max_pool_backward(dy: Array, x: Array, y: Array, size: int, dx: Array, ws: Workspace) -> None:
    """dx: dy at the first maximum of each window, 0 elsewhere."""
    free = ws.image("pool.free", y.shape, "bool", keep=False)
    won = ws.image("pool.won", x.shape, "bool", keep=False)
    free[...] = True
    _winners(x, y, size, free, won)
    if x.shape[1] % size or x.shape[2] % size:
        dx[...] = 0
    for wins, view in zip(pool_views(won, size), pool_views(dx, size), strict=True):
        namespace(dy).multiply(dy, wins, out=view)


def avg_pool_forward(x: Array, size: int, y: Array) -> None:
    """y (N, H//size, W//size, C): mean of each size×size window."""
    first, *others = pool_views(x, size)
    y[...] = first
    for view in others:
        y += view
    y *= 1.0 / size**2


def avg_pool_backward(dy: Array, size: int, dx: Array) -> None:
    """dx: dy / size² at every pixel of each window, 0 at those left over."""
    if dx.shape[1] % size or dx.shape[2] % size:
        dx[...] = 0
    for view in pool_views(dx, size):
        namespace(dy).multiply(dy, 1.0 / size**2, out=view)


@replaceable
def head_forward(x: Array, w: Array, b: Array, pooled: Array, logits: Array, average: bool) -> None:
    """`pooled` (N, 1, 1, C): the largest value, or the mean, of each image x (N, H, H, C); logits (N, K) = pooled wᵀ + b."""
    (avg_pool_forward if average else max_pool_forward)(x, x.shape[1], pooled)
    logits[...] = linear_forward(pooled.reshape(len(x), x.shape[-1]), w, b)


@replaceable
def head_backward(
    dlogits: Array,
    x: Array,
    pooled: Array,
    w: Array,
    dw: Array,
    db: Array,
    dx: Array,
    ws: Workspace,
    average: bool,
) -> None:
    """Writes dw (K, C), db (K,) and dx (N, H, H, C) for dlogits (N, K) and what `head_forward` took and wrote."""
    grid = ws.image("dpooled", pooled.shape)
    grid[...] = linear_backward(dlogits, pooled.reshape(len(x), x.shape[-1]), w, dw, db).reshape(pooled.shape)
    if average:
        avg_pool_backward(grid, x.shape[1], dx)
    else:
        max_pool_backward(grid, x, pooled, x.shape[1], dx, ws)


@replaceable
def add(x: Array, y: Array) -> None:
    """x += y, both dense and of one shape and memory order."""
    x += y


def linear_forward(x: Array, w: Array, b: Array) -> Array:
    """x (N, C) → x wᵀ + b (N, K), with w (K, C) as PyTorch keeps it."""
    return x @ w.T + b


def linear_backward(dy: Array, x: Array, w: Array, dw: Array, db: Array) -> Array:
    """Writes dw = dyᵀ x and db = Σdy; returns dx = dy w."""
    namespace(x).matmul(dy.T, x, out=dw)
    db[...] = dy.sum(0)
    return dy @ w


@replaceable
def end_step(history: Array, own: Array, tail: Array, at: Array) -> None:
    """Row at mod H of `history` (H, 4) becomes own, tail; then at += 1."""
    row = at % len(history)
    history[row, 0] = own[0]
    history[row, 1:] = tail
    at += 1
