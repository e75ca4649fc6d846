"""Pooling of activations (N, H, W, C): over windows, side by side or not, and over whole images."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from nn.array import Array, namespace, op
from nn.buffers import Buffers
from nn.ops.conv import Geometry, windows

Window = tuple[int, int]


class Windows(NamedTuple):
    """What is pooled: windows of `size` (h, w) pixels, `stride` apart, in images framed by `padding`.

    The frame never is a maximum, and counts as zeros in a mean.
    """

    size: Window
    stride: int
    padding: int = 0

    def side_by_side(self) -> bool:
        """Whether each pixel is of one window at most, and all windows are within the image."""
        return self.size == (self.stride, self.stride) and not self.padding

    def geometry(self) -> Geometry:
        return Geometry(self.stride, self.padding)

    def taps(self, x_shape: tuple[int, ...]) -> list[tuple[int, Any, Any]]:
        """For each pixel of a window: its number, and the (output, input) slices that meet there."""
        return windows(tuple(x_shape), (*self.size, x_shape[3], x_shape[3]), self.geometry())


@op
def pool_forward(
    x: Array, y: Array, over: Windows, average: bool, buffers: Buffers, keep: bool = True
) -> Array | None:
    """y (N, P, Q, C): the largest value, or the mean, of each window of x (N, H, W, C).

    Returns, where `keep` and for the maximum, what the backward needs: the number of the first largest pixel
    of each window, int32 as y, or for windows side by side whether a pixel is that one, bool as x.
    """
    xp = namespace(x)
    if over.side_by_side():
        return _pool_side_by_side(x, y, over.size, average, buffers, keep)
    if average:
        y[...] = 0
        for _, out, inside in over.taps(x.shape):
            y[out] += x[inside]
        y *= 1 / (over.size[0] * over.size[1])
        return None
    winners = buffers.image("winners", y.shape, "int32") if keep else None
    y[...] = -np.inf
    if winners is not None:
        winners[...] = 0
    for number, out, inside in over.taps(x.shape):
        top, value = y[out], x[inside]
        if winners is not None and number:
            xp.maximum(winners[out], xp.greater(value, top) * np.int32(number), out=winners[out])
        xp.maximum(top, value, out=top)
    return winners


@op
def pool_backward(dy: Array, winners: Array | None, over: Windows, dx: Array) -> None:
    """dx (N, H, W, C) for dy (N, P, Q, C): all to the pixel that `winners` names, shared where it is None."""
    if over.side_by_side():
        if winners is None:
            avg_pool_backward(dy, over.size, dx)
        else:
            _to_winners(dy, winners, over.size, dx)
        return
    share = 1 / (over.size[0] * over.size[1])
    dx[...] = 0
    for number, out, inside in over.taps(dx.shape):
        dx[inside] += dy[out] * (share if winners is None else winners[out] == number)


@op
def global_pool_forward(x: Array, y: Array, average: bool) -> None:
    """y (N, C): the largest value, or the mean, of each image x (N, H, W, C)."""
    (avg_pool_forward if average else max_pool_forward)(x, x.shape[1:3], y[:, None, None, :])


@op
def global_pool_backward(dy: Array, x: Array, y: Array, dx: Array, buffers: Buffers, average: bool) -> None:
    """dx (N, H, W, C) for dy (N, C) and the forward's x and y: all to the first maximum, or shared."""
    dy, y, window = dy[:, None, None, :], y[:, None, None, :], x.shape[1:3]
    if average:
        avg_pool_backward(dy, window, dx)
    else:
        max_pool_backward(dy, x, y, window, dx, buffers)


def _pool_side_by_side(
    x: Array, y: Array, window: Window, average: bool, buffers: Buffers, keep: bool
) -> Array | None:
    if average:
        avg_pool_forward(x, window, y)
        return None
    max_pool_forward(x, window, y)
    if not keep:
        return None
    won = buffers.image("won", x.shape, "bool")
    free = buffers.image("pool.free", y.shape, "bool", persistent=False)
    free[...] = True
    mark_winners(x, y, window, free, won)
    return won


def pool_views(x: Array, window: Window, first: int = 1) -> list[Array]:
    """The h·w strided views of x, in row-major order, that make up its windows.

    The image's rows and columns are axes `first` and `first + 1` of x: 1 and 2 of (N, H, W, C).
    """
    height, width = window
    h, w = x.shape[first] // height * height, x.shape[first + 1] // width * width
    lead = (slice(None),) * first
    return [x[(*lead, slice(i, h, height), slice(j, w, width))] for i in range(height) for j in range(width)]


def _leaves_a_rest(x: Array, window: Window, first: int = 1) -> bool:
    return bool(x.shape[first] % window[0] or x.shape[first + 1] % window[1])


def max_pool_forward(x: Array, window: Window, y: Array, first: int = 1) -> None:
    """y (N, H//h, W//w, C): maximum of each window; rows and columns left over are unused."""
    one, *others = pool_views(x, window, first)
    if not others:
        y[...] = one
        return
    namespace(x).maximum(one, others[0], out=y)
    for view in others[1:]:
        namespace(x).maximum(y, view, out=y)


def mark_winners(x: Array, y: Array, window: Window, free: Array, won: Array, first: int = 1) -> None:
    """`won`: true at the first maximum of each window that is `free` (row-major, as PyTorch does)."""
    xp = namespace(x)
    if _leaves_a_rest(x, window, first):
        won[...] = False
    for view, wins in zip(pool_views(x, window, first), pool_views(won, window, first), strict=True):
        xp.equal(view, y, out=wins)
        wins &= free
        free ^= wins


def max_pool_backward(dy: Array, x: Array, y: Array, window: Window, dx: Array, buffers: Buffers) -> None:
    """dx: dy at the first maximum of each window, 0 elsewhere."""
    free = buffers.image("pool.free", y.shape, "bool", persistent=False)
    won = buffers.image("pool.won", x.shape, "bool", persistent=False)
    free[...] = True
    mark_winners(x, y, window, free, won)
    _to_winners(dy, won, window, dx)


def _to_winners(dy: Array, won: Array, window: Window, dx: Array) -> None:
    """dx: dy where a pixel has `won`, 0 elsewhere."""
    if _leaves_a_rest(dx, window):
        dx[...] = 0
    for wins, view in zip(pool_views(won, window), pool_views(dx, window), strict=True):
        namespace(dy).multiply(dy, wins, out=view)


def avg_pool_forward(x: Array, window: Window, y: Array) -> None:
    """y (N, H//h, W//w, C): mean of each window."""
    first, *others = pool_views(x, window)
    y[...] = first
    for view in others:
        y += view
    y *= 1.0 / (window[0] * window[1])


def avg_pool_backward(dy: Array, window: Window, dx: Array) -> None:
    """dx: dy / (h·w) at every pixel of each window, 0 at those left over."""
    if _leaves_a_rest(dx, window):
        dx[...] = 0
    for view in pool_views(dx, window):
        namespace(dy).multiply(dy, 1.0 / (window[0] * window[1]), out=view)
