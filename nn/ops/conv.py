"""Convolution, by four algorithms with one interface.

    y[n,p,q,o] = Σ_{i,j,c} x[n, p·stride + i·dilation − padding, q·stride + j·dilation − padding, c]
                          · w[i,j,c,o]

- `loop`: the textbook loop over patches, kept as the oracle of the tests and as the time table's slow row;
- `patches`: patches copied into a matrix, one matrix product, a bounded number of images at a time;
- `strips`: patches of several outputs in a row at a time (`nn/ops/strips.py`), for other kernels and strides;
- `winograd`: minimal filtering for 3×3 kernels at stride 1 (`nn/ops/winograd.py`), up to 4 times less work.

An algorithm is a pair: `forward(x, w, geometry, y, buffers, keep)` returns, where `keep`, what its `backward`
needs besides w, in buffers that outlive x; `backward(dy, saved, w, geometry, dw, dx, buffers)` writes dw and,
unless it is None, dx. A device's own also has `supports(x_shape, w_shape, geometry, need_dx)`. Shapes: x (N,
H, W, C), w (kh, kw, C, O), y (N, P, Q, O).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from nn.array import Array, memory_axes, namespace, pixels
from nn.buffers import Buffers
from nn.device import Backend
from nn.ops import strips, winograd

PATCH_ELEMENTS = 1 << 20
"""Patches copied at a time: 4 MiB of float32, however large the batch."""


class NoAlgorithm(ValueError):
    """No algorithm does a convolution in the precision that is wanted."""


class Geometry(NamedTuple):
    """Stride, padding and dilation of a convolution, each the same in both directions."""

    stride: int = 1
    padding: int = 0
    dilation: int = 1

    def out_size(self, size: int, kernel: int) -> int:
        """Output positions along an axis of `size`; ValueError where the kernel does not fit."""
        out = (size + 2 * self.padding - self.dilation * (kernel - 1) - 1) // self.stride + 1
        if out < 1:
            raise ValueError(f"a kernel of {kernel} with {self} does not fit an input of {size}")
        return out

    def out_shape(self, x_shape: tuple[int, ...], w_shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """(N, P, Q, O) for an input (N, H, W, C) and weights (kh, kw, C, O)."""
        n, h, w, c = x_shape
        kh, kw, c_in, c_out = w_shape
        if c != c_in:
            raise ValueError(f"input has {c} channels, the weights expect {c_in}")
        return n, self.out_size(h, kh), self.out_size(w, kw), c_out


def span(offset: int, stride: int, size: int, count: int) -> tuple[slice, slice]:
    """Where o·stride + offset, for o in [0, count), falls inside [0, size): (slice of o, slice inside)."""
    first = max(0, -(offset // stride)) if offset < 0 else 0
    last = min(count, (size - 1 - offset) // stride + 1)
    if last <= first:
        return slice(0, 0), slice(0, 0)
    start = first * stride + offset
    return slice(first, last), slice(start, start + (last - first - 1) * stride + 1, stride)


@functools.lru_cache(256)
def windows(x_shape: tuple[int, ...], w_shape: tuple[int, ...], g: Geometry) -> list[tuple[int, Any, Any]]:
    """For each kernel position (i, j): its index, and the (output, input) slices that meet there."""
    found = []
    _, p, q, _ = g.out_shape(x_shape, w_shape)
    for i in range(w_shape[0]):
        for j in range(w_shape[1]):
            rows_out, rows_in = span(i * g.dilation - g.padding, g.stride, x_shape[1], p)
            cols_out, cols_in = span(j * g.dilation - g.padding, g.stride, x_shape[2], q)
            found.append(
                (i * w_shape[1] + j, (slice(None), rows_out, cols_out), (slice(None), rows_in, cols_in))
            )
    return found


class Loop:
    """One output position after another: element-wise product of patch and kernel, then the sum."""

    @staticmethod
    def _patches(x: Array, w: Array, g: Geometry):
        """Yields ((p, q), padded patch (N, kh, kw, C), the slice of the padded input it came from)."""
        xp = namespace(x)
        n, h, w_in, c = x.shape
        _, p_out, q_out, _ = g.out_shape(x.shape, w.shape)
        padded = xp.zeros((n, h + 2 * g.padding, w_in + 2 * g.padding, c), x.dtype)
        padded[:, g.padding : g.padding + h, g.padding : g.padding + w_in] = x
        for p in range(p_out):
            rows = slice(p * g.stride, p * g.stride + g.dilation * (w.shape[0] - 1) + 1, g.dilation)
            for q in range(q_out):
                cols = slice(q * g.stride, q * g.stride + g.dilation * (w.shape[1] - 1) + 1, g.dilation)
                yield (p, q), padded[:, rows, cols], (slice(None), rows, cols)

    @staticmethod
    def forward(x: Array, w: Array, g: Geometry, y: Array, buffers: Buffers, keep: bool) -> Array | None:
        for (p, q), patch, _ in Loop._patches(x, w, g):
            for n in range(len(patch)):
                y[n, p, q] = (patch[n][..., None] * w).sum((0, 1, 2))
        return buffers.save(x) if keep else None

    @staticmethod
    def backward(
        dy: Array, x: Array, w: Array, g: Geometry, dw: Array, dx: Array | None, buffers: Buffers
    ) -> None:
        dw[...] = 0
        n, h, w_in, c = x.shape
        pad = g.padding
        padded = namespace(x).zeros((n, h + 2 * pad, w_in + 2 * pad, c), x.dtype)
        for (p, q), patch, place in Loop._patches(x, w, g):
            for i in range(n):
                dw += patch[i][..., None] * dy[i, p, q]
                padded[place][i] += (w * dy[i, p, q]).sum(-1)
        if dx is not None:
            dx[...] = padded[:, pad : pad + h, pad : pad + w_in]


class Patches:
    """Patches as the rows of a matrix (images·P·Q, kh·kw·C), one product with the weights as a matrix."""

    @staticmethod
    def _chunks(x: Array, w: Array, g: Geometry):
        """Slices of images whose patches number about PATCH_ELEMENTS."""
        _, p, q, _ = g.out_shape(x.shape, w.shape)
        step = max(1, PATCH_ELEMENTS // (p * q * w.size // w.shape[3]))
        for start in range(0, x.shape[0], step):
            yield slice(start, min(start + step, x.shape[0]))

    @staticmethod
    def _buffer(
        like: Array, shape: tuple[int, int, int], channels: int, name: str, buffers: Buffers
    ) -> Array:
        """Scratch (*shape, channels), shape (images, P, Q), in the memory order of `like`."""
        n, p, q = shape
        if memory_axes(like) == (0, 1, 2, 3):
            return buffers.temporary(name, (n, p, q, channels))
        return buffers.temporary(name, (p, q, n, channels)).transpose(2, 0, 1, 3)

    @staticmethod
    def _columns(like: Array, shape: tuple[int, int, int], w: Array, buffers: Buffers) -> tuple[Array, Array]:
        """Scratch for patches: as (images, P, Q, kh·kw·C), and as a matrix in `like`'s memory order.

        With one input channel each of the kernel's positions is a plane of its own: copies are long runs.
        """
        taps = w.size // w.shape[3]
        n, p, q = shape
        if w.shape[2] == 1 and memory_axes(like) != (0, 1, 2, 3):
            planes = buffers.temporary("conv.cols", (taps, p, q, n))
            return planes.transpose(3, 1, 2, 0), planes.reshape(taps, -1).T
        cols = Patches._buffer(like, shape, taps, "conv.cols", buffers)
        return cols, pixels(cols)

    @staticmethod
    def _gather(x: Array, like: Array, w: Array, g: Geometry, buffers: Buffers) -> tuple[Array, Array]:
        """`_columns` filled with the patches of the images `x`."""
        c = w.shape[2]
        cols, matrix = Patches._columns(like, g.out_shape(x.shape, w.shape)[:3], w, buffers)
        if g.padding:
            cols[...] = 0
        for k, out, inside in windows(x.shape, w.shape, g):
            cols[(*out, slice(k * c, k * c + c))] = x[inside]
        return cols, matrix

    @staticmethod
    def forward(x: Array, w: Array, g: Geometry, y: Array, buffers: Buffers, keep: bool) -> Array | None:
        xp = namespace(x)
        matrix = _as_matrix(w)
        for images in Patches._chunks(x, w, g):
            cols, rows = Patches._gather(x[images], y, w, g, buffers)
            if len(cols) == len(x):
                xp.matmul(rows, matrix, out=pixels(y))
            else:
                part = Patches._buffer(y, cols.shape[:3], w.shape[3], "conv.part", buffers)
                xp.matmul(rows, matrix, out=pixels(part))
                y[images] = part
        return buffers.save(x) if keep else None

    @staticmethod
    def backward(
        dy: Array, x: Array, w: Array, g: Geometry, dw: Array, dx: Array | None, buffers: Buffers
    ) -> None:
        xp = namespace(x)
        c = w.shape[2]
        matrix, dmatrix = _as_matrix(w), _as_matrix(dw)
        chunks = list(Patches._chunks(x, w, g))
        partial = dmatrix if len(chunks) == 1 else buffers.temporary("conv.dw", dmatrix.shape)
        if partial is not dmatrix:
            dmatrix[...] = 0
        if dx is not None:
            dx[...] = 0
        for images in chunks:
            cols, rows = Patches._gather(x[images], dy, w, g, buffers)
            part = dy
            if len(cols) != len(x):
                part = Patches._buffer(dy, cols.shape[:3], w.shape[3], "conv.part", buffers)
                part[...] = dy[images]
            xp.matmul(rows.T, pixels(part), out=partial)
            if partial is not dmatrix:
                dmatrix += partial
            if dx is None:
                continue
            xp.matmul(pixels(part), matrix.T, out=rows)
            dx_part = dx[images]
            for k, out, inside in windows(x.shape, w.shape, g):
                dx_part[inside] += cols[(*out, slice(k * c, k * c + c))]


def _as_matrix(w: Array) -> Array:
    """View of weights (kh, kw, C, O) as a matrix (kh·kw·C, O), however they lie (see `Parameter`)."""
    if w.flags.c_contiguous:
        return w.reshape(-1, w.shape[3])
    return w.transpose(3, 0, 1, 2).reshape(w.shape[3], -1).T


ALGORITHMS: dict[str, Any] = {
    "loop": Loop,
    "patches": Patches,
    "strips": strips.Strips,
    "winograd": winograd.Winograd,
}


def choose_algorithm(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    geometry: Geometry,
    backend: Backend,
    need_dx: bool = True,
) -> str:
    """The fastest algorithm: a pure function of shape and backend. On a device, the first of its own.

    On the host strips, but for kernels of 1×1 (patches), and of 3×3 at stride 1 in a frame of one pixel.
    There, counted in products a channel pair, patches take 9 a pixel. Winograd takes one at each position of
    its planes, and for its kernel, which is transformed and read from beyond the caches, as much as √(C·O)/6
    more images' worth of tiles: where measured, both were within 20 % of each other (docs/benchmarks.md).
    """
    for name, algorithm in backend.algorithms.items():
        if algorithm.supports(x_shape, w_shape, geometry, need_dx):
            return name
    return _choose_on_host(x_shape, w_shape, geometry) if backend.order == "HWNC" else "patches"


@functools.lru_cache(256)
def _choose_on_host(x_shape: tuple[int, ...], w_shape: tuple[int, ...], geometry: Geometry) -> str:
    n, h, w, c = x_shape
    if w_shape[:2] != (3, 3) or geometry != Geometry(1, 1, 1):
        return "patches" if w_shape[:2] == (1, 1) else "strips"
    if c == 1:
        return "patches"
    (rows, a_h), (cols, a_w) = winograd.extent(h), winograd.extent(w)
    overhead = a_h * a_w * (c * w_shape[3]) ** 0.5 / 6
    return "winograd" if n * rows * cols + overhead < 9 * n * h * w else "patches"


def _algorithm(name: str, buffers: Buffers) -> Any:
    if name in ALGORITHMS and buffers.dtype == "uint16":
        raise NoAlgorithm(
            "bfloat16 convolutions need cuDNN, which has none for these channels:"
            " use another width or precision"
        )
    return ALGORITHMS.get(name) or buffers.backend.algorithms[name]


def conv_forward(
    x: Array, w: Array, geometry: Geometry, y: Array, buffers: Buffers, algorithm: str, keep: bool = True
) -> Any:
    """Write the convolution of x (N, H, W, C) with w (kh, kw, C, O) into y (N, P, Q, O).

    Returns what `conv_backward` needs, None unless `keep`. `algorithm` is of ALGORITHMS or a backend's.
    """
    return _algorithm(algorithm, buffers).forward(x, w, geometry, y, buffers, keep)


def conv_backward(
    dy: Array,
    saved: Any,
    w: Array,
    geometry: Geometry,
    dw: Array,
    dx: Array | None,
    buffers: Buffers,
    algorithm: str,
) -> None:
    """Write dL/dw into dw and dL/dx into dx (skipped where dx is None) for dy = dL/dy (N, P, Q, O)."""
    _algorithm(algorithm, buffers).backward(dy, saved, w, geometry, dw, dx, buffers)
