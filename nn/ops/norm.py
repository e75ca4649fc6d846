"""Batch norm and all that follows it in one pass: y = pool(relu(γ·x̂ + β + residual)), forward and backward.

Sums over images that training depends on (the statistics here, the gradients in `distrib`) pass through
`channels.add_lines` and an all-reduce, so there is one place each to make them reproducible.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from nn.array import Array, blocks, memory_axes, namespace, op
from nn.buffers import Buffers
from nn.ops.channels import add_lines, add_products, per_channel, totals
from nn.ops.pool import mark_winners, max_pool_forward, pool_views
from nn.ops.residual import add

EPS, MOMENTUM = 1e-5, 0.1
"""Of batch norm."""

AllReduce = Callable[[Array], Any]
"""Sums an array over all ranks, in place."""

POOL = (2, 2)
"""The window that can follow in the same pass."""


class Norm(NamedTuple):
    """Batch norm's parameters and running statistics, each (C,)."""

    gamma: Array
    beta: Array
    running_mean: Array
    running_var: Array


class Count(NamedTuple):
    """What statistics are taken over: `values` a channel, of all ranks together; None: this rank is alone."""

    values: int
    all_reduce: AllReduce | None = None


class After(NamedTuple):
    """What follows the normalisation: addition of `residual`, ReLU, 2×2 max-pool (without residual)."""

    relu: bool = True
    pool: bool = False
    residual: Array | None = None


class BackwardMask(NamedTuple):
    """Where z let the gradient through.

    `mask` (bool, shaped as z) is true at each element that the gradient of y flows back to. With pooling,
    `pooled` is x̂ · sign(γ) at each window's maximum, and `relu_mask` (bool) where y is above 0; shaped as y.
    """

    mask: Array
    pooled: Array = None
    relu_mask: Array = None

    @staticmethod
    def allocate(z: Array, y: Array, after: After, buffers: Buffers) -> BackwardMask | None:
        """Persistent buffers for what follows z and makes y; None where everything passes."""
        if after.pool:
            pooled, relu_mask = buffers.image("pooled", y.shape), buffers.image("relu_mask", y.shape, "bool")
            return BackwardMask(buffers.image("mask", z.shape, "bool"), pooled, relu_mask)
        return BackwardMask(buffers.image("mask", z.shape, "bool")) if after.relu else None

    def in_memory(self, axes: tuple[int, ...]) -> BackwardMask:
        """The same with the arrays' axes in memory order."""
        return BackwardMask(*(None if a is None else a.transpose(axes) for a in self))


class Saved(NamedTuple):
    """What `norm_forward` leaves for `norm_backward`: z less its part's mean, 1/σ (C,), what it let through.

    x̂ = centred · inverse_std + `offset` (C,), which is None where the part is the whole.
    """

    centred: Array
    inverse_std: Array
    mask: BackwardMask | None
    has_residual: bool
    offset: Array | None = None


@op
def norm_forward(z: Array, norm: Norm, y: Array, after: After, count: Count, buffers: Buffers) -> Any:
    """y = pool(relu(γ·x̂ + β + residual)), x̂ normalised over `count` values; running statistics move on.

    Returns what `norm_backward` needs. z belongs to it from then on: its contents are undefined. With a
    residual, y too must keep its contents. The running variance takes in that of `count − 1`.
    """
    mean, var, apart = batch_norm_statistics(z, count, norm.running_mean, buffers)
    values, (_, _, running_mean, running_var) = count.values, norm
    running_mean += MOMENTUM * (mean - running_mean)
    running_var += MOMENTUM * (var * (values / max(values - 1, 1)) - running_var)
    inverse_std = (var + EPS) ** -0.5
    mask, offset = BackwardMask.allocate(z, y, after, buffers), None
    if apart is not None:
        offset = apart * inverse_std
        norm = norm._replace(beta=norm.beta + norm.gamma * offset)
    activate(z, inverse_std, norm, y, after, buffers, mask)
    return Saved(z, inverse_std, mask, after.residual is not None, offset)


@op
def norm_backward(
    dy: Array,
    saved: Any,
    norm: Norm,
    d_gamma: Array,
    d_beta: Array,
    count: Count,
    buffers: Buffers,
    part: Array | None = None,
) -> tuple[Array, Array | None]:
    """Writes this rank's d_gamma and d_beta; returns dz and, where a residual was added, its gradient.

    `saved` comes from `norm_forward`, in the same step. dy is overwritten, and `part`, where given, is added
    to it first. dz lies in the memory of z or of dy, the residual's gradient in that of dy.
    """
    if part is not None:
        add(dy, part)
    keep_dy = saved.has_residual or saved.mask is None or saved.mask.pooled is not None
    dz = saved.centred if keep_dy else dy
    d_gamma[...], d_beta[...] = batch_norm_backward(dy, saved, norm.gamma, count, dz, buffers)
    return dz, dy if saved.has_residual else None


@op
def norm_inference(z: Array, norm: Norm, y: Array, after: After, buffers: Buffers) -> None:
    """As `norm_forward` with the running statistics, which stay as they are. Without pooling, y may be z."""
    inverse_std = (norm.running_var.astype(np.float64) + EPS) ** -0.5
    shift = norm.beta - norm.running_mean * inverse_std * norm.gamma
    activate(z, inverse_std, norm._replace(beta=shift), y, after, buffers)


# statistics


def batch_norm_statistics(
    x: Array, count: Count, about: Array, buffers: Buffers
) -> tuple[Array, Array, Array | None]:
    """Mean and biased variance (C,), float64, over `count` values a channel; x becomes x − m.

    m (C,) is the mean of this part, and m − mean the third result; None where the part is the whole. In two
    passes, Σx then M = Σ(x − m)²: never E[x²] − E[x]², which cancels. The parts' n·d and M + n·d², where
    d = m − `about` (C,), the same for all, go through one sum (Chan, Golub and LeVeque 1979): in float64 the
    variance errs by 1e-16 · (1 + (mean − about)²/variance).
    """
    xp, x = namespace(x), x.transpose(memory_axes(x))
    groups, own = x.shape[2], x.size // x.shape[3]
    (total,) = totals(1, x, buffers)
    for block in blocks(x):
        add_lines(total, x[block], buffers)
    mean = total.reshape(groups, -1).sum(0) / max(own if count.all_reduce else count.values, 1)
    shift = per_channel("shift", mean, x, buffers)
    (total,) = totals(1, x, buffers)
    for block in blocks(x):
        part = x[block]
        part -= shift
        add_products(total, part, part, buffers)
    squares = total.reshape(groups, -1).sum(0)
    if not count.all_reduce:
        return mean, squares / count.values, None
    from_there = mean - about
    sums = xp.stack((own * from_there, squares + own * from_there**2))
    count.all_reduce(sums)
    moved, square = sums / count.values
    return about + moved, xp.maximum(square - moved**2, 0), from_there - moved


# forward


def activate(
    z: Array,
    inverse_std: Array,
    norm: Norm,
    y: Array,
    after: After,
    buffers: Buffers,
    mask: BackwardMask | None = None,
) -> None:
    """y = pool(relu(z · inverse_std · γ + β + residual)): batch norm's second half and all that follows it.

    `mask`, given where there is a ReLU or pooling, is filled in for the backward.
    """
    axes = memory_axes(z)
    z, y, mask = z.transpose(axes), y.transpose(axes), mask.in_memory(axes) if mask else None
    if after.pool:
        _activate_and_pool(z, inverse_std, norm, y, after.relu, buffers, mask, axes.index(1))
        return
    xp = namespace(z)
    residual = None if after.residual is None else after.residual.transpose(axes)
    scale = per_channel("scale", inverse_std * norm.gamma, z, buffers)
    shift = per_channel("shift", norm.beta, z, buffers)
    zero = per_channel("zero", 0.0, y, buffers)  # against a scalar, NumPy's maximum is three times slower
    for block in blocks(z):
        out = y[block]
        xp.multiply(z[block], scale, out=out)
        out += shift
        if residual is not None:
            out += residual[block]
        if after.relu:
            if mask:
                xp.greater(out, zero, out=mask.mask[block])
            xp.maximum(out, zero, out=out)


def _activate_and_pool(
    z: Array,
    inverse_std: Array,
    norm: Norm,
    y: Array,
    relu: bool,
    buffers: Buffers,
    mask: BackwardMask | None,
    first: int,
) -> None:
    """`activate` with pooling, on arrays in memory order; `first` as in `pool_views`.

    |γ| and β do not change which element is largest, so they are applied after the pooling.
    """
    xp, gamma = namespace(z), norm.gamma
    unit = per_channel("scale", xp.copysign(inverse_std, gamma), z, buffers)
    gain = per_channel("gain", xp.abs(gamma), y, buffers)
    shift = per_channel("shift", norm.beta, y, buffers)
    zero = per_channel("zero", 0.0, y, buffers)
    for block in blocks(z, 2):
        small = _pooled(block, first)
        whole, out = buffers.temporary("block", z[block].shape), y[small]
        xp.multiply(z[block], unit, out=whole)
        top = mask.pooled[small] if mask else out
        max_pool_forward(whole, POOL, top, first)
        xp.multiply(top, gain, out=out)
        out += shift
        if mask:
            relu_mask = mask.relu_mask[small]
            xp.greater(out, zero if relu else -np.inf, out=relu_mask)
            free = buffers.temporary("pool.free", out.shape, "bool")
            free[...] = relu_mask
            mark_winners(whole, top, POOL, free, mask.mask[block], first)
        if relu:
            xp.maximum(out, zero, out=out)


def _pooled(block: tuple[slice, slice], first: int) -> tuple[slice, slice]:
    """Where the outputs of a 2×2 pooling of `block` lie; `first` as in `pool_views`."""
    a, b = block
    return (a if first else slice(a.start // 2, a.stop // 2)), slice(b.start // 2, b.stop // 2)


# backward


def batch_norm_backward(
    dy: Array, saved: Saved, gamma: Array, count: Count, dx: Array, buffers: Buffers
) -> tuple[Array, Array]:
    """Writes dL/dx of batch norm and of what `activate` did after it; returns this rank's (dL/dγ, dL/dβ).

    With g = dy where it passed the mask, 0 elsewhere, x̂ = centred · inverse_std and sums over all `count`
    values a channel, dx = γ · inverse_std · (g − Σg/count − x̂ · Σ(g·x̂)/count)  (Ioffe and Szegedy 2015,
    section 3). dy is overwritten: without pooling by g, which is also the residual's gradient. dx may be
    `centred`, or without pooling dy.
    """
    axes, inverse_std = memory_axes(saved.centred), saved.inverse_std
    x, dx, dy = (a.transpose(axes) for a in (saved.centred, dx, dy))
    mask = saved.mask.in_memory(axes) if saved.mask else None
    if mask is None:
        sums = _gradient_sums(dy, None, x, buffers)
    elif mask.pooled is None:
        sums = _gradient_sums(dy, mask.mask, x, buffers)
    else:  # g has one element a window, and there x̂ = pooled · sign(γ)
        sums = _gradient_sums(dy, mask.relu_mask, mask.pooled, buffers)
    pooled = mask is not None and mask.pooled is not None
    sums[1] *= namespace(dy).copysign(1.0, gamma) if pooled else inverse_std
    offset = saved.offset
    if offset is not None:
        sums[1] += offset * sums[0]
    d_gamma, d_beta = sums[1].copy(), sums[0].copy()
    if count.all_reduce:
        count.all_reduce(sums)
    scale = gamma * inverse_std
    flat, slope = sums / count.values
    if offset is not None:
        flat += offset * slope
    factors = scale, -scale * inverse_std * slope, -scale * flat
    if mask is not None and pooled:
        _input_gradient_through_pool(dy, x, factors, dx, buffers, mask.mask, axes.index(1))
    else:
        _input_gradient(dy, x, factors, dx, buffers)
    return d_gamma, d_beta


def _gradient_sums(dy: Array, passed: Array | None, x: Array, buffers: Buffers) -> Array:
    """(2, C), float64: Σg and Σ(g·x) with g = dy where it `passed`, which dy becomes."""
    xp = namespace(dy)
    wide = totals(2, dy, buffers)
    for block in blocks(dy):
        part = dy[block]
        if passed is not None:
            xp.multiply(part, passed[block], out=part)
        add_lines(wide[0], part, buffers)
        add_products(wide[1], part, x[block], buffers)
    return wide.reshape(2, dy.shape[2], -1).sum(1)


def _input_gradient(g: Array, x: Array, factors: tuple[Array, ...], dx: Array, buffers: Buffers) -> None:
    """dx = a·g + b·x + c; dx may be x or g."""
    xp = namespace(x)
    a, b, c = (
        per_channel(name, v, x, buffers) for name, v in zip(("scale", "slope", "shift"), factors, strict=True)
    )
    for block in blocks(x):
        part = dx[block]
        product = buffers.temporary("block", part.shape)
        xp.multiply(x[block], b, out=product)  # first: dx may be x
        xp.multiply(g[block], a, out=part)
        part += product
        part += c


def _input_gradient_through_pool(
    g: Array, x: Array, factors: tuple[Array, ...], dx: Array, buffers: Buffers, mask: Array, first: int
) -> None:
    """dx = a·g + b·x + c with g (of each window) where `mask` is true; dx may be x."""
    xp = namespace(x)
    g *= per_channel("gain", factors[0], g, buffers)
    b, c = (per_channel(name, v, x, buffers) for name, v in zip(("slope", "shift"), factors[1:], strict=True))
    for block in blocks(x, 2):
        part, source = dx[block], g[_pooled(block, first)]
        xp.multiply(x[block], b, out=part)
        part += c
        product = buffers.temporary("block", source.shape)
        for view, wins in zip(
            pool_views(part, POOL, first), pool_views(mask[block], POOL, first), strict=True
        ):
            xp.multiply(source, wins, out=product)
            view += product
