"""Convolution of few channels or with a stride: a strip of outputs in a row is one output of a wider kernel.

With few output channels a matrix product of patches is slow: its columns are too few. `Cut.wide` outputs that
lie side by side see the same few rows of the input, kh by `Cut.reach` pixels. Those are gathered as one long
row of a matrix, and multiplied with a banded one, in which the kernel stands once for each output of the
strip, moved by the stride:

    strips (·, kh · reach · C) @ bands (kh · reach · C, wide · O) = outputs (·, wide · O)

Zeros make it multiply reach / kw times as much, and it gathers reach / (wide · kw) times as much. The images
are padded first, in order N,H,W,C, so that a strip's pixels are kh contiguous runs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from nn.array import Array
from nn.buffers import Buffers
from nn.ops.winograd import require_order

CHUNK = 1 << 18
"""Elements of the strips of some images: they stay in the cache for the product that follows."""

COLUMNS = 48
"""Of `bands`, about: from there on the product is efficient."""


class Cut(NamedTuple):
    """How outputs (P, Q) are cut into strips, and the padded input that they see."""

    wide: int  # outputs of a strip
    strips: int  # in a row of outputs
    reach: int  # columns of the input that a strip sees
    height: int  # of the padded input
    width: int


@functools.lru_cache(256)
def cut(out: tuple[int, int], w_shape: tuple[int, ...], g: Any) -> Cut:
    """The strips of an output of (P, Q) pixels."""
    p, q = out
    kh, kw, _, c_out = w_shape
    strips = max(1, q // max(1, COLUMNS // c_out))
    wide = -(-q // strips)
    strips = -(-q // wide)
    reach = (wide - 1) * g.stride + g.dilation * (kw - 1) + 1
    height = (p - 1) * g.stride + g.dilation * (kh - 1) + 1
    return Cut(wide, strips, reach, height, (strips - 1) * wide * g.stride + reach)


class Strips:
    """The algorithm `strips` of `nn.ops.conv`, in memory order H,W,N,C: some images at a time."""

    @staticmethod
    def forward(x: Array, w: Array, g: Any, y: Array, buffers: Buffers, keep: bool) -> Array | None:
        """Returns the padded input (N, height, width, C)."""
        require_order(x, y)
        to = cut(y.shape[1:3], w.shape, g)
        bands = _bands(w, to, g, buffers)
        frame = to.height, to.width, x.shape[3]
        saved = buffers.persistent("padded", (len(x), *frame)) if keep else None
        for images in _chunks(y.shape, to, len(bands)):
            part = x[images]
            padded = buffers.temporary("conv.padded", (len(part), *frame)) if saved is None else saved[images]
            _pad(part, g.padding, padded)
            strips = _gather(padded, y.shape, to, w, g, buffers)
            out = buffers.temporary("conv.part", (len(strips), bands.shape[1]))
            np.matmul(strips, bands, out=out)
            y[images] = _as_outputs(out, y.shape, to)
        return saved

    @staticmethod
    def backward(
        dy: Array, saved: Array, w: Array, g: Any, dw: Array, dx: Array | None, buffers: Buffers
    ) -> None:
        require_order(dy, dy if dx is None else dx)
        to = cut(dy.shape[1:3], w.shape, g)
        bands = _bands(w, to, g, buffers)
        transposed = buffers.temporary("conv.bands_t", bands.shape[::-1])
        transposed[...] = bands.T
        d_bands, d_part = (buffers.temporary(f"conv.d_bands{i}", bands.shape) for i in range(2))
        d_bands[...] = 0
        for images in _chunks(dy.shape, to, len(bands)):
            padded = saved[images]
            strips = _gather(padded, dy.shape, to, w, g, buffers)
            part = buffers.temporary("conv.part", (len(strips), bands.shape[1]))
            if to.strips * to.wide > dy.shape[2]:
                part[...] = 0
            _as_outputs(part, dy.shape, to)[...] = dy[images]
            np.matmul(strips.T, part, out=d_part)
            d_bands += d_part
            if dx is not None:
                np.matmul(part, transposed, out=strips)
                d_padded = buffers.temporary("conv.padded", padded.shape)
                _scatter(strips, dy.shape, to, w, g, d_padded)
                _cut_out(d_padded, g.padding, dx[images])
        _fold(d_bands, to, g, dw)


def _inside(padding: int, length: int, size: int) -> tuple[slice, slice]:
    """Along an axis of `length` padded and `size` own pixels: where outputs see those, in both."""
    stop = min(length, padding + size)
    return slice(min(padding, stop), stop), slice(0, max(0, stop - padding))


def _pad(x: Array, padding: int, padded: Array) -> None:
    """Copy x (N, H, W, C) into `padded`, zeros around it."""
    (rows, from_rows), (cols, from_cols) = (
        _inside(padding, length, size) for length, size in zip(padded.shape[1:3], x.shape[1:3], strict=True)
    )
    for border in (slice(0, rows.start), slice(rows.stop, None)):
        padded[:, border] = 0
    for border in (slice(0, cols.start), slice(cols.stop, None)):
        padded[:, rows, border] = 0
    padded[:, rows, cols] = x[:, from_rows, from_cols]


def _cut_out(padded: Array, padding: int, x: Array) -> None:
    """The reverse of `_pad`; what no output sees becomes 0."""
    (rows, to_rows), (cols, to_cols) = (
        _inside(padding, length, size) for length, size in zip(padded.shape[1:3], x.shape[1:3], strict=True)
    )
    if (to_rows.stop, to_cols.stop) != x.shape[1:3]:
        x[...] = 0
    x[:, to_rows, to_cols] = padded[:, rows, cols]


def _copies(w: Array, to: Cut, g: Any) -> Iterator[tuple[int, slice]]:
    """(output of the strip, the columns where its kernel stands)."""
    for k in range(to.wide):
        yield k, slice(k * g.stride, k * g.stride + g.dilation * (w.shape[1] - 1) + 1, g.dilation)


def _bands(w: Array, to: Cut, g: Any, buffers: Buffers) -> Array:
    """The banded matrix (kh · reach · C, wide · O)."""
    kh, _, c, c_out = w.shape
    bands = buffers.temporary("conv.bands", (kh, to.reach, c, to.wide, c_out))
    bands[...] = 0
    for k, cols in _copies(w, to, g):
        bands[:, cols, :, k] = w
    return bands.reshape(-1, to.wide * c_out)


def _fold(d_bands: Array, to: Cut, g: Any, dw: Array) -> None:
    """dw: the sum over the places where the kernel stands in the banded matrix."""
    kh, _, c, c_out = dw.shape
    whole = d_bands.reshape(kh, to.reach, c, to.wide, c_out)
    dw[...] = 0
    for k, cols in _copies(dw, to, g):
        dw += whole[:, cols, :, k]


def _chunks(y_shape: tuple[int, ...], to: Cut, taps: int) -> Iterator[slice]:
    """Slices of images whose strips have about CHUNK elements."""
    n, p, *_ = y_shape
    step = max(1, CHUNK // (p * to.strips * taps))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _seen(padded: Array, y_shape: tuple[int, ...], to: Cut, w: Array, g: Any) -> Array:
    """View (images, P, strips, kh, reach · C) of what each strip sees of some images; strips overlap."""
    shape = len(padded), y_shape[1], to.strips, w.shape[0], to.reach * w.shape[2]
    image, line, pixel, item = padded.strides
    strides = image, line * g.stride, pixel * to.wide * g.stride, line * g.dilation, item
    return as_strided(padded, shape, strides)


def _gather(padded: Array, y_shape: tuple[int, ...], to: Cut, w: Array, g: Any, buffers: Buffers) -> Array:
    """The strips of some images as a matrix (images · P · strips, kh · reach · C)."""
    seen = _seen(padded, y_shape, to, w, g)
    strips = buffers.temporary("conv.cols", seen.shape)
    strips[...] = seen
    return strips.reshape(prod(seen.shape[:3]), prod(seen.shape[3:]))


def _scatter(strips: Array, y_shape: tuple[int, ...], to: Cut, w: Array, g: Any, d_padded: Array) -> None:
    """`d_padded`: the sum of the strips at each pixel; the transpose of `_gather`."""
    d_padded[...] = 0
    seen = _seen(d_padded, y_shape, to, w, g)
    values = strips.reshape(seen.shape)
    apart = -(-to.reach // (to.wide * g.stride))  # that many strips further on, one shares no pixel
    for i in range(w.shape[0]):
        for first in range(min(apart, to.strips)):
            place = seen[:, :, first::apart, i]
            place += values[:, :, first::apart, i]


def _as_outputs(part: Array, y_shape: tuple[int, ...], to: Cut) -> Array:
    """View of a product (images · P · strips, wide · O) as outputs (images, P, Q, O)."""
    _, p, q, c_out = y_shape
    images = len(part) // (p * to.strips)
    return part.reshape(images, p, to.strips * to.wide, c_out)[:, :, :q]
