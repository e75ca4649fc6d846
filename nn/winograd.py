"""Minimal filtering F(4×4, 3×3) after Winograd: a 3×3 convolution with 36 products per 16 outputs, not 144.

With the constant matrices B (6×6), G (6×3) and A (6×4) below, a 6×6 tile d of the input and a kernel g,
the 4×4 tile of the output is Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A (Lavin and Gray, "Fast Algorithms for
Convolutional Neural Networks", 2015, eq. 8). Summed over channels, each of the 36 positions is a matrix
product over all tiles: M_k = V_k U_k with V_k (tiles, C), U_k (C, O).

A two-dimensional transform is one product with a Kronecker matrix: vec(Bᵀ d B) = (B ⊗ B)ᵀ vec(d). The
backward stays in the transform domain: with dM = (A ⊗ A) dY, transformed once for both gradients,

    dU_k = V_kᵀ dM_k        dw = (G ⊗ G)ᵀ dU        dV_k = dM_k U_kᵀ        dD = (B ⊗ B) dV

and dx gathers the overlapping 6×6 tiles dD. V is kept by the forward, so the input is transformed once.
Error relative to a float64 reference in float32: 2e-6 to 8e-6 of the largest value (tests/test_conv.py).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from nn.backend import Array, memory_axes, namespace

if TYPE_CHECKING:
    from nn.workspace import Workspace

TILES = 512
"""Tiles of one chunk: its 36 planes stay near the cache and its matrix products stay efficient."""

B_T = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
G = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
A_T = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])

TRANSFORMS = {
    "winograd.input": np.kron(B_T, B_T),  # 36×36: tile → V
    "winograd.kernel": np.kron(G, G),  # 36×9: kernel → U
    "winograd.output": np.kron(A_T, A_T),  # 16×36: M → tile of y
}


def _tiles(size: int) -> int:
    return -(-size // 4)


def _chunks(n: int, rows: int, cols: int) -> list[tuple[slice, slice, slice]]:
    """Chunks of about TILES tiles: (images, tile rows, range of tiles)."""
    images = min(n, max(1, TILES // cols))
    height = max(1, TILES // max(images * cols, 1))
    chunks, start = [], 0
    for t in range(0, rows, height):
        for i in range(0, n, max(images, 1)):
            t_slice, i_slice = slice(t, min(t + height, rows)), slice(i, min(i + images, n))
            stop = start + (t_slice.stop - t) * (i_slice.stop - i) * cols
            chunks.append((i_slice, t_slice, slice(start, stop)))
            start = stop
    return chunks


def _planes(flat: Array, side: int, n: int, rows: int, cols: int, host_order: bool) -> Array:
    """View (side², tiles, C) as (side, side, N, tile rows, tile columns, C)."""
    shape = (side, side, rows, cols, n, -1) if host_order else (side, side, n, rows, cols, -1)
    planes = flat.reshape(shape)
    return planes.transpose(0, 1, 4, 2, 3, 5) if host_order else planes


@functools.cache
def _meet(i: int, start: int, stop: int, size: int) -> tuple[slice, slice]:
    """Of tiles [start, stop), those whose row i lies inside [0, size), counted from start; those rows."""
    first = min(max(start, -(i // 4)), stop)
    last = min(stop, (size - 1 - i) // 4 + 1)
    if last <= first:
        return slice(0, 0), slice(0, 0)
    return slice(first - start, last - start), slice(4 * first + i, 4 * (last - 1) + i + 1, 4)


def _gather(planes: Array, x: Array, offset: int, images: slice, rows: slice, cols: int) -> None:
    """planes[i, j] = pixel (i + offset, j + offset) of every tile, zero outside the image."""
    side, (_, height, width, _) = planes.shape[0], x.shape
    whole = rows.start + offset >= 0 and offset >= 0 and 4 * rows.stop <= height and 4 * cols <= width
    if not whole:
        planes[...] = 0
    for i in range(side):
        t_rows, x_rows = _meet(i + offset, rows.start, rows.stop, height)
        for j in range(side):
            t_cols, x_cols = _meet(j + offset, 0, cols, width)
            planes[i, j][:, t_rows, t_cols] = x[images, x_rows, x_cols]


def _scatter(x: Array, planes: Array, offset: int, images: slice, rows: slice, cols: int, add: bool) -> None:
    """The transpose of `_gather`: write (or add) every tile's pixels back to their places in the image."""
    side, (_, height, width, _) = planes.shape[0], x.shape
    for i in range(side):
        t_rows, x_rows = _meet(i + offset, rows.start, rows.stop, height)
        for j in range(side):
            t_cols, x_cols = _meet(j + offset, 0, cols, width)
            source = planes[i, j][:, t_rows, t_cols]
            if add:
                x[images, x_rows, x_cols] += source
            else:
                x[images, x_rows, x_cols] = source


class Winograd:
    """The form `winograd` of `nn.conv`: 3×3, stride 1, padding 1, dilation 1."""

    @staticmethod
    def forward(x: Array, w: Array, geometry: Any, y: Array, ws: Workspace) -> tuple[Array, Array]:
        """Returns (V, U): the transformed input (36, tiles, C) and kernel (36, C, O)."""
        xp = namespace(x)
        n, height, width, c = x.shape
        c_out = w.shape[3]
        rows, cols = _tiles(height), _tiles(width)
        host = memory_axes(x) != (0, 1, 2, 3)
        u = ws.keep("winograd.u", (36, c, c_out))
        v = ws.keep("winograd.v", (36, n * rows * cols, c))
        kernel, inp, out = (ws.constant(name, value) for name, value in _named("kernel", "input", "output"))
        xp.matmul(kernel, w.reshape(9, c * c_out), out=u.reshape(36, c * c_out))
        for images, t_rows, tiles in _chunks(n, rows, cols):
            count = tiles.stop - tiles.start
            sub = (images.stop - images.start, t_rows.stop - t_rows.start, cols, host)
            d = ws.scratch("winograd.d", (36, count * c))
            _gather(_planes(d, 6, *sub), x, -1, images, t_rows, cols)
            v_part = v[:, tiles]
            xp.matmul(inp, d, out=v.reshape(36, -1)[:, tiles.start * c : tiles.stop * c])
            m = ws.scratch("winograd.m", (36, count, c_out))
            xp.matmul(v_part, u, out=m)
            tile = ws.scratch("winograd.y", (16, count * c_out))
            xp.matmul(out, m.reshape(36, -1), out=tile)
            _scatter(y, _planes(tile, 4, *sub), 0, images, t_rows, cols, add=False)
        return v, u

    @staticmethod
    def backward(dy: Array, x: Array, w: Array, geometry: Any, saved: tuple[Array, Array], dw: Array,
                 dx: Array | None, ws: Workspace) -> None:  # fmt: skip
        xp = namespace(dy)
        v, u = saved
        n, height, width, c_out = dy.shape
        c = w.shape[2]
        rows, cols = _tiles(height), _tiles(width)
        host = memory_axes(x) != (0, 1, 2, 3)  # the order of tiles in v
        kernel, inp, out = (ws.constant(name, value) for name, value in _named("kernel", "input", "output"))
        du, du_part = ws.scratch("winograd.du", u.shape), ws.scratch("winograd.du_part", u.shape)
        du[...] = 0
        if dx is not None:
            dx[...] = 0
        for images, t_rows, tiles in _chunks(n, rows, cols):
            count = tiles.stop - tiles.start
            sub = (images.stop - images.start, t_rows.stop - t_rows.start, cols, host)
            tile = ws.scratch("winograd.y", (16, count * c_out))
            _gather(_planes(tile, 4, *sub), dy, 0, images, t_rows, cols)
            dm = ws.scratch("winograd.m", (36, count, c_out))
            xp.matmul(out.T, tile, out=dm.reshape(36, -1))
            xp.matmul(v[:, tiles].transpose(0, 2, 1), dm, out=du_part)
            du += du_part
            if dx is None:
                continue
            dv = ws.scratch("winograd.dv", (36, count, c))
            xp.matmul(dm, u.transpose(0, 2, 1), out=dv)
            d = ws.scratch("winograd.d", (36, count * c))
            xp.matmul(inp.T, dv.reshape(36, -1), out=d)
            _scatter(dx, _planes(d, 6, *sub), -1, images, t_rows, cols, add=True)
        xp.matmul(kernel.T, du.reshape(36, -1), out=dw.reshape(9, -1))


def _named(*names: str) -> list[tuple[str, np.ndarray]]:
    return [(f"winograd.{name}", TRANSFORMS[f"winograd.{name}"]) for name in names]
