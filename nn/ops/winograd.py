"""Minimal filtering F(m×m, 3×3) after Winograd: (m + 2)² products for m² outputs of a 3×3 kernel, not 9m².

With Bᵀ (a×a), G (a×3) and Aᵀ (m×a), a = m + 2, a tile d of a×a inputs and a kernel g, the m×m tile of the
output is Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
2015, eq. 8). Summed over channels, each of the a² positions is a matrix product over all tiles:
M_k = V_k U_k with V_k (tiles, C), U_k (C, O).

Tiles are never gathered. Along one axis, the transform of all tiles at once is a product with one constant
banded matrix, `Piece.b`, in which overlap and zero padding are a matter of where the numbers stand; its
transpose adds overlapping tiles back. In memory order H,W,N,C both axes are then batched matrix products on
views of the image, and the result is sorted by position:

    x (H, W, NC)  → along W →  (H, positions · tiles, NC)  → along H →  V (a, a, tiles, C)

An axis that 4 does not divide ends in a smaller tile: 14 = 4+4+4+2, 7 = 4+3. It takes the first of the
points at which the larger ones evaluate, so that all tiles share one U (`Group`).

The backward stays in the transform domain. With dM the transformed dY, computed once for both gradients,

    dU_k = V_kᵀ dM_k        dw = Gᵀ dU G        dV_k = dM_k U_kᵀ        dx = B dV Bᵀ

V is kept by the forward, so the input is transformed once. Error relative to a float64 reference in
float32: 2e-6 to 8e-6 of the largest value (tests/nn/test_conv.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from nn.array import Array, namespace
from nn.buffers import Buffers

Call = Callable[[], Any]

CHUNK = 512
"""Tiles of one chunk: its planes stay near the cache and its matrix products stay efficient."""

MANY, WIDE = 16, 4
"""Images, and channels to an image, that make a batch large (see `piece`)."""

FEW = 1 << 10
"""Products of channels up to which the backward copies the kernel's planes, transposed: a product of many
tiles and few channels runs up to twice as fast.
"""

POINTS = (0.0, 1.0, -1.0, np.inf, 2.0, -2.0)
"""Where polynomials are evaluated; a tile of m outputs takes the first m + 2."""

G = np.array([[0, 0, 1] if p == np.inf else [1, p, p * p] for p in POINTS])
"""The kernel's transform, (6, 3), the same for every tile size: the normalisation stands in Bᵀ."""


@functools.cache
def tile_matrices(m: int) -> tuple[np.ndarray, np.ndarray]:
    """(Bᵀ (m + 2, m + 2), Aᵀ (m, m + 2)) of F(m, 3), m ≥ 2, by Toom and Cook's construction."""
    finite = [p for p in POINTS[: m + 2] if p != np.inf]
    b_t, a_t = np.zeros((m + 2, m + 2)), np.zeros((m, m + 2))
    for k, p in enumerate(POINTS[: m + 2]):
        others = [q for q in finite if q != p]
        b_t[k, : len(others) + 1] = np.poly(others)[::-1]
        if p == np.inf:
            a_t[-1, k] = 1
        else:
            b_t[k] /= np.prod(p - np.array(others))
            a_t[:, k] = p ** np.arange(m)
    return b_t, a_t


class Group(NamedTuple):
    """Consecutive points at which the same number of tiles is evaluated; their rows in a piece's matrices."""

    points: slice
    rows: slice
    tiles: int


class Piece(NamedTuple):
    """Some tiles of an axis: the inputs they see, the outputs they make, and the two banded matrices."""

    name: str
    inputs: slice
    outputs: slice
    groups: list[Group]
    b: np.ndarray  # (rows, inputs): rows by point, then by tile
    a: np.ndarray  # (rows, outputs)

    def along(self, which: str, buffers: Buffers) -> Array:
        """Matrix `b` or `a` on the device."""
        return buffers.constant(f"winograd.{which}.{self.name}", getattr(self, which))


def piece(images: int, c: int, c_out: int) -> int:
    """Tiles of an axis that share one banded matrix: 2 in a large batch, else 4.

    Shorter ones multiply fewer zeros. But they make more chunks, each with a gradient of the whole kernel to
    add; that pays only where a chunk has many tiles for the kernel's size (docs/benchmarks.md).
    """
    return 2 if images >= max(MANY, (c * c_out) ** 0.5 / WIDE) else 4


@functools.cache
def axis(size: int, tiles: int = 4) -> list[Piece]:
    """The pieces of an axis of `size` pixels, `tiles` each: tiles of 4 pixels, at its end one of 2 or 3 where
    it suffices.
    """
    starts = list(range(0, size, 4))
    sizes = [min(4, max(2, size - start)) for start in starts]
    pieces = []
    for first in range(0, len(starts), tiles):
        part = slice(first, first + tiles)
        outputs = slice(starts[first], min(starts[part][-1] + sizes[part][-1], size))
        inputs = slice(max(outputs.start - 1, 0), min(outputs.stop + 1, size))
        groups: list[Group] = []
        b: list[np.ndarray] = []
        a: list[np.ndarray] = []
        for point in range(sizes[first] + 2):
            here = [(s, m) for s, m in zip(starts[part], sizes[part], strict=True) if point < m + 2]
            if groups and groups[-1].tiles == len(here):
                last = groups.pop()
                groups.append(
                    Group(
                        slice(last.points.start, point + 1),
                        slice(last.rows.start, len(b) + len(here)),
                        len(here),
                    )
                )
            else:
                groups.append(Group(slice(point, point + 1), slice(len(b), len(b) + len(here)), len(here)))
            for start, m in here:
                b_t, a_t = tile_matrices(m)
                row_b, row_a = np.zeros(size + 6), np.zeros(size + 6)
                row_b[start : start + m + 2] = b_t[point]  # pixel i stands at i + 1
                row_a[start : start + m] = a_t[:, point]
                b.append(row_b[inputs.start + 1 : inputs.stop + 1])
                a.append(row_a[outputs])
        pieces.append(Piece(f"{size}.{tiles}.{first}", inputs, outputs, groups, np.array(b), np.array(a)))
    return pieces


def extent(size: int) -> tuple[int, int]:
    """Positions of all tiles along an axis of `size` pixels, and the points of its largest tile."""
    pieces = axis(size)
    return sum(len(piece.b) for piece in pieces), pieces[0].groups[-1].points.stop


class Chunk(NamedTuple):
    """A rectangle of tiles of some images, and the part of V that is theirs, in elements per channel."""

    rows: Piece
    cols: Piece
    images: slice
    part: slice

    def planes(self, flat: Array, channels: int) -> Iterator[tuple[Group, Array]]:
        """For each group along W: the group, and its part of `flat` as (points, rows along H, ·)."""
        unit = len(self.rows.b) * (self.images.stop - self.images.start) * channels
        for group in self.cols.groups:
            block = flat[group.rows.start * unit : group.rows.stop * unit]
            yield group, block.reshape(group.points.stop - group.points.start, len(self.rows.b), -1)

    def matrices(self, flat: Array, channels: int) -> Iterator[tuple[tuple[slice, slice], Array]]:
        """(points along W and H, their matrices (points, points, tiles, C)) of the transform `flat`."""
        for along_w, block in self.planes(flat, channels):
            for along_h in self.rows.groups:
                shape = len(block), along_h.points.stop - along_h.points.start, -1, channels
                yield (along_w.points, along_h.points), block[:, along_h.rows].reshape(shape)


@functools.lru_cache(1024)
def chunks(n: int, height: int, width: int, tiles: int, size: int) -> list[Chunk]:
    """Chunks of about `size` tiles, of pieces of `tiles` along either axis."""
    found: list[Chunk] = []
    stop = 0
    for rows in axis(height, tiles):
        for cols in axis(width, tiles):
            step = max(1, size // (rows.groups[0].tiles * cols.groups[0].tiles))
            for first in range(0, n, step):
                images = slice(first, min(first + step, n))
                start, stop = stop, stop + len(rows.b) * len(cols.b) * (images.stop - first)
                found.append(Chunk(rows, cols, images, slice(start, stop)))
    return found


class Winograd:
    """The algorithm `winograd` of `nn.ops.conv`: 3×3, stride 1, padding 1, dilation 1, memory order H,W,N,C.

    Each way is a list of matrix products (and additions where chunks meet) on views of fixed buffers: it is
    made once and replayed.
    """

    @staticmethod
    def forward(
        x: Array, w: Array, geometry: Any, y: Array, buffers: Buffers, keep: bool
    ) -> tuple[Array, Array, tuple[int, ...]] | None:
        """Returns V, U and the shape of x: the transformed input (flat, chunk by chunk) and kernel (a_w, a_h,
        C, O).
        """
        require_order(x, y)
        saved: tuple[Array, Array, tuple[int, ...]] = buffers.run_cached(
            f"winograd.forward.{keep}", (x, w, y), lambda: Winograd._forward(x, w, y, buffers, keep)
        )
        return saved if keep else None

    @staticmethod
    def _forward(x: Array, w: Array, y: Array, buffers: Buffers, keep: bool) -> tuple[list[Call], Any]:
        matmul = namespace(x).matmul
        (n, height, width, c), c_out = x.shape, w.shape[3]
        parts = chunks(n, height, width, piece(n, c, c_out), CHUNK)
        kernel = _kernel(height, width, buffers)
        take = buffers.persistent if keep else buffers.temporary
        u = (buffers.shared if keep else buffers.temporary)("winograd.u", (*kernel.shape[:2], c, c_out))
        sizes = [(chunk.part.stop - chunk.part.start) * c for chunk in parts]
        v = take("winograd.v", (sum(sizes) if keep else max(sizes, default=0),))
        make_u = partial(matmul, kernel.reshape(-1, 9), w.reshape(9, -1), out=u.reshape(-1, c * c_out))
        calls: list[Call] = [buffers.once("winograd.u", make_u) if keep else make_u]
        for chunk, size in zip(parts, sizes, strict=True):
            v_part = v[chunk.part.start * c : chunk.part.stop * c] if keep else v[:size]
            calls += transform(
                x[chunk.images, chunk.rows.inputs, chunk.cols.inputs], chunk, "b", v_part, buffers
            )
            m = buffers.temporary("winograd.m", ((chunk.part.stop - chunk.part.start) * c_out,))
            for (points, v_k), (_, m_k) in zip(
                chunk.matrices(v_part, c), chunk.matrices(m, c_out), strict=True
            ):
                calls.append(partial(matmul, v_k, u[points], out=m_k))
            calls += inverse(m, chunk, "a", y[chunk.images, chunk.rows.outputs, chunk.cols.outputs], buffers)
        return calls, (v, u, x.shape)

    @staticmethod
    def backward(
        dy: Array,
        saved: tuple[Array, Array, tuple[int, ...]],
        w: Array,
        geometry: Any,
        dw: Array,
        dx: Array | None,
        buffers: Buffers,
    ) -> None:
        require_order(dy, dy if dx is None else dx)
        buffers.run_cached(
            "winograd.backward",
            (dy, saved[0], dw, dx),
            lambda: Winograd._backward(dy, saved, dw, dx, buffers),
        )

    @staticmethod
    def _backward(
        dy: Array, saved: tuple[Array, Array, tuple[int, ...]], dw: Array, dx: Array | None, buffers: Buffers
    ) -> tuple[list[Call], Any]:
        xp = namespace(dy)
        v, u, (n, height, width, c) = saved
        c_out = dw.shape[3]
        parts = chunks(n, height, width, piece(n, c, c_out), CHUNK)
        du = buffers.temporary("winograd.du", u.shape)
        du_part = buffers.temporary("winograd.du_part", u.shape) if len(parts) > 1 else du
        calls: list[Call] = []
        if not parts:
            calls.append(partial(du.fill, 0))
        u_t = u.swapaxes(2, 3)
        if dx is not None and c * c_out <= FEW:
            u_t = buffers.temporary("winograd.u_t", u_t.shape)
            calls.append(partial(xp.copyto, u_t, u.swapaxes(2, 3)))
        for chunk in parts:
            v_part = v[chunk.part.start * c : chunk.part.stop * c]
            dm = buffers.temporary("winograd.m", ((chunk.part.stop - chunk.part.start) * c_out,))
            dv = buffers.temporary("winograd.dv", v_part.shape)
            calls += transform(
                dy[chunk.images, chunk.rows.outputs, chunk.cols.outputs], chunk, "a", dm, buffers
            )
            target = du if chunk is parts[0] else du_part
            for (points, v_k), (_, dm_k), (_, dv_k) in zip(
                chunk.matrices(v_part, c), chunk.matrices(dm, c_out), chunk.matrices(dv, c), strict=True
            ):
                calls.append(partial(xp.matmul, v_k.swapaxes(2, 3), dm_k, out=target[points]))
                if target is not du:
                    calls.append(partial(xp.add, du[points], du_part[points], out=du[points]))
                if dx is not None:
                    calls.append(partial(xp.matmul, dm_k, u_t[points], out=dv_k))
            if dx is None:
                continue
            place = dx[chunk.images, chunk.rows.inputs, chunk.cols.inputs]
            shared = [
                (part, buffers.image(f"winograd.shared{i}", part.shape, persistent=False))
                for i, part in enumerate(_shared(place, chunk))
            ]
            calls += [partial(xp.copyto, kept, part) for part, kept in shared]
            calls += inverse(dv, chunk, "b", place, buffers)
            calls += [partial(xp.add, part, kept, out=part) for part, kept in shared]
        kernel = _kernel(height, width, buffers).reshape(-1, 9)
        calls.append(partial(xp.matmul, kernel.T, du.reshape(-1, c * c_out), out=dw.reshape(9, -1)))
        return calls, None


def _shared(place: Array, chunk: Chunk) -> list[Array]:
    """The parts of `place`, an input gradient's, that the chunks before write to as well: its first two rows
    and columns, unless they are the image's.
    """
    above = 2 if chunk.rows.inputs.start else 0
    beside = 2 if chunk.cols.inputs.start else 0
    return [part for part in (place[:, :above], place[:, above:, :beside]) if part.size]


def require_order(*arrays: Array) -> None:
    """ValueError unless the activations lie in memory as H,W,N,C."""
    for x in arrays:
        if not x.transpose(1, 2, 0, 3).flags.c_contiguous:
            raise ValueError(
                f"Winograd's algorithm needs activations in H,W,N,C order, not strides {x.strides}"
            )


def _kernel(height: int, width: int, buffers: Buffers) -> Array:
    """(a_w, a_h, 9): from the kernel (9, C·O) to U, points along W first as in V."""
    a_h, a_w = extent(height)[1], extent(width)[1]
    values = np.einsum("jb,ia->jiab", G[:a_w], G[:a_h]).reshape(a_w, a_h, 9)
    return buffers.constant(f"winograd.g.{a_w}.{a_h}", values)


def transform(x: Array, chunk: Chunk, which: str, out: Array, buffers: Buffers) -> Iterator[Call]:
    """Calls for: out (flat) = both axes' matrices applied to the part x (n, H, W, C) of an image."""
    matmul = namespace(x).matmul
    along_h, along_w = chunk.rows.along(which, buffers), chunk.cols.along(which, buffers)
    n, h, _, c = x.shape
    half = buffers.temporary("winograd.half", (h, len(along_w), n * c))
    yield partial(matmul, along_w, _lines(x), out=half)
    for group, block in chunk.planes(out, c):
        by_point = half[:, group.rows].reshape(h, len(block), -1).swapaxes(0, 1)
        yield partial(matmul, along_h, by_point, out=block)


def inverse(planes: Array, chunk: Chunk, which: str, out: Array, buffers: Buffers) -> Iterator[Call]:
    """Calls for: out (n, H, W, C) = the transposes of both axes' matrices applied to `planes` (flat)."""
    matmul = namespace(planes).matmul
    along_h, along_w = chunk.rows.along(which, buffers), chunk.cols.along(which, buffers)
    n, h, _, c = out.shape
    half = buffers.temporary("winograd.half", (h, len(along_w), n * c))
    for group, block in chunk.planes(planes, c):
        by_point = half[:, group.rows].reshape(h, len(block), -1).swapaxes(0, 1)
        yield partial(matmul, along_h.T, block, out=by_point)
    yield partial(matmul, along_w.T, half, out=_lines(out))


def _lines(x: Array) -> Array:
    """View of a part (n, H, W, C) of an image as (H, W, n·C)."""
    n, h, w, c = x.shape
    return x.transpose(1, 2, 0, 3).reshape(h, w, n * c)
