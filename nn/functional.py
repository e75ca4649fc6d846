"""Pure pairs x_forward / x_backward on activations (N, H, W, C), and the two losses.

Outputs and scratch are arguments or come from the workspace `ws`; nothing is remembered between calls.
Sums over images that training depends on (batch norm's here, the gradients' in `distrib.reducer`) pass
through `column_sums` and a sum over ranks, so there is one place each to make them reproducible.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nn.backend import Array, blocks, lanes, namespace
from nn.workspace import Workspace

SumOverRanks = Callable[[Array], Any]
"""Sums an array over all ranks, in place."""


def column_sums(rows: Array, ws: Workspace, groups: int) -> Array:
    """Sum of the matrix `rows` (M, groups·C) over its rows and groups: (C,), accumulated in float64."""
    total = namespace(rows).zeros(rows.shape[1], np.float64)
    for block in blocks(rows):
        part = rows[block]
        total += ws.ones(len(part)) @ part
    return total.reshape(groups, -1).sum(0)


def _tile(v: Array, groups: int, dtype: np.dtype) -> Array:
    return namespace(v).tile(v.astype(dtype), groups)


def batch_norm_statistics(
    x: Array, count: int, ws: Workspace, sum_over_ranks: SumOverRanks | None
) -> tuple[Array, Array]:
    """Mean and biased variance (C,), float64, over `count` values a channel; x becomes x − mean.

    Two passes, Σx then Σ(x − mean)², each summed over ranks: never E[x²] − E[x]², which cancels.
    """
    rows, groups = lanes(x)
    mean = column_sums(rows, ws, groups)
    if sum_over_ranks:
        sum_over_ranks(mean)
    mean /= count
    shift = _tile(mean, groups, x.dtype)
    squares = namespace(x).zeros(rows.shape[1], np.float64)
    for block in blocks(rows):
        part = rows[block]
        part -= shift
        square = ws.scratch("block", part.shape)
        namespace(x).multiply(part, part, out=square)
        squares += ws.ones(len(part)) @ square
    variance = squares.reshape(groups, -1).sum(0)
    if sum_over_ranks:
        sum_over_ranks(variance)
    variance /= count
    return mean, variance


def scale_shift_relu(
    x: Array, scale: Array, shift: Array, y: Array, residual: Array | None = None, relu: bool = True
) -> None:
    """y = relu(x · scale + shift + residual) with scale and shift (C,): batch norm's second half."""
    xp = namespace(x)
    x_rows, groups = lanes(x)
    y_rows = lanes(y)[0]
    more = None if residual is None else lanes(residual)[0]
    scale, shift = _tile(scale, groups, x.dtype), _tile(shift, groups, x.dtype)
    zero = xp.zeros_like(shift)  # a row of zeros: against a scalar, NumPy's maximum is three times slower
    for block in blocks(x_rows):
        out = y_rows[block]
        xp.multiply(x_rows[block], scale, out=out)
        out += shift
        if more is not None:
            out += more[block]
        if relu:
            xp.maximum(out, zero, out=out)


def relu_backward(dy: Array, y: Array, dx: Array, ws: Workspace) -> None:
    """dx = dy where y = relu(x) is positive, else 0; dx may be dy."""
    dy_rows, y_rows, dx_rows = (lanes(a)[0] for a in (dy, y, dx))
    xp = namespace(y)
    for block in blocks(y_rows):
        part = y_rows[block]
        mask = ws.scratch("mask", part.shape, "bool")
        xp.greater(part, 0, out=mask)
        xp.multiply(dy_rows[block], mask, out=dx_rows[block])


def batch_norm_backward(
    dy: Array, centred: Array, inverse_std: Array, gamma: Array, count: int, ws: Workspace,
    sum_over_ranks: SumOverRanks | None,
) -> tuple[Array, Array]:  # fmt: skip
    """Replace dy by dL/dx; returns this rank's parts of (dL/dγ, dL/dβ), float64.

    With x̂ = centred · inverse_std and sums over all `count` values a channel,
    dx = γ · inverse_std · (dy − Σdy/count − x̂ · Σ(dy·x̂)/count)  (Ioffe and Szegedy 2015, section 3).
    """
    xp = namespace(dy)
    dy_rows, groups = lanes(dy)
    x_rows = lanes(centred)[0]
    wide = xp.zeros((2, dy_rows.shape[1]), np.float64)
    for block in blocks(dy_rows):
        part = dy_rows[block]
        product = ws.scratch("block", part.shape)
        xp.multiply(part, x_rows[block], out=product)
        ones = ws.ones(len(part))
        wide[0] += ones @ part
        wide[1] += ones @ product
    sums = wide.reshape(2, groups, -1).sum(1)
    d_gamma, d_beta = sums[1] * inverse_std, sums[0].copy()
    if sum_over_ranks:
        sum_over_ranks(sums)
    scale = gamma * inverse_std
    a, b, c = scale, -scale * inverse_std**2 * (sums[1] / count), -scale * (sums[0] / count)
    a, b, c = (_tile(v, groups, dy.dtype) for v in (a, b, c))
    for block in blocks(dy_rows):
        part = dy_rows[block]
        product = ws.scratch("block", part.shape)
        part *= a
        xp.multiply(x_rows[block], b, out=product)
        part += product
        part += c
    return d_gamma, d_beta


def pool_views(x: Array, size: int) -> list[Array]:
    """The size² strided views of x (N, H, W, C), in row-major order, that make up its windows."""
    h, w = x.shape[1] // size * size, x.shape[2] // size * size
    return [x[:, i:h:size, j:w:size] for i in range(size) for j in range(size)]


def max_pool_forward(x: Array, size: int, y: Array) -> None:
    """y (N, H//size, W//size, C): maximum of each size×size window; rows and columns left over are unused."""
    first, *others = pool_views(x, size)
    if not others:
        y[...] = first
        return
    namespace(x).maximum(first, others[0], out=y)
    for view in others[1:]:
        namespace(x).maximum(y, view, out=y)


def max_pool_backward(dy: Array, x: Array, y: Array, size: int, dx: Array, ws: Workspace) -> None:
    """dx: dy at the first maximum of each window (in row-major order, as PyTorch does), 0 elsewhere."""
    xp = namespace(x)
    if x.shape[1] % size or x.shape[2] % size:
        dx[...] = 0
    free = ws.image("pool.free", y.shape, "bool", keep=False)
    wins = ws.image("pool.wins", y.shape, "bool", keep=False)
    free[...] = True
    for view, dview in zip(pool_views(x, size), pool_views(dx, size), strict=True):
        xp.equal(view, y, out=wins)
        wins &= free
        free ^= wins
        xp.multiply(dy, wins, out=dview)


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


def linear_forward(x: Array, w: Array, b: Array) -> Array:
    """x (N, C) → x wᵀ + b (N, K), with w (K, C) as PyTorch keeps it."""
    return x @ w.T + b


def linear_backward(dy: Array, x: Array, w: Array, dw: Array, db: Array) -> Array:
    """Writes dw = dyᵀ x and db = Σdy; returns dx = dy w."""
    namespace(x).matmul(dy.T, x, out=dw)
    db[...] = dy.sum(0)
    return dy @ w


def softmax_cross_entropy(logits: Array, labels: Array, count: int) -> tuple[Array, Array]:
    """−Σ log softmax(logits)[label] / count over these images, and its gradient (softmax − onehot) / count.

    `count` is the number of images of the global batch, of which these may be a part. Logits (N, K),
    labels (N,) integers. Each row is shifted by its own maximum, so nothing overflows.
    """
    xp = namespace(logits)
    shifted = logits - logits.max(1, keepdims=True)
    exp = xp.exp(shifted)
    total = exp.sum(1, keepdims=True)
    onehot = labels[:, None] == xp.arange(logits.shape[1])
    loss = ((xp.log(total) - shifted) * onehot).sum() / count
    return loss, (exp / total - onehot) / count


def binary_cross_entropy(logits: Array, labels: Array, count: int) -> tuple[Array, Array]:
    """Sigmoid with binary cross-entropy from logits z against one-hot t, the mean over images and classes.

    Σ [max(z, 0) − z·t + log(1 + exp(−|z|))] / (count · K), which neither overflows nor takes log 0, and its
    gradient (sigmoid(z) − t) / (count · K).
    """
    xp = namespace(logits)
    t = (labels[:, None] == xp.arange(logits.shape[1])).astype(logits.dtype)
    decay = xp.exp(-xp.abs(logits))
    terms = xp.maximum(logits, 0) - logits * t + xp.log1p(decay)
    sigmoid = xp.where(logits >= 0, 1 / (1 + decay), decay / (1 + decay))
    scale = count * logits.shape[1]
    return terms.sum() / scale, (sigmoid - t) / scale


LOSSES = {"ce": softmax_cross_entropy, "bce": binary_cross_entropy}
