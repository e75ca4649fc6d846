"""What passes over activations share on the host: vectors of channels, tiled, and sums over images."""

from __future__ import annotations

from typing import Any

import numpy as np

from nn.array import Array, namespace
from nn.buffers import Buffers


def per_channel(name: str, v: Any, like: Array, buffers: Buffers) -> Array:
    """The vector v (C,) in the dtype of `like` (A, B, k, C), repeated k times: the temporary `name`.

    Against a (C,) with few channels NumPy's inner loops are C long, and three to four times slower.
    """
    wide = buffers.temporary(name, like.shape[2:], like.dtype)
    wide[...] = v
    return wide


def totals(count: int, x: Array, buffers: Buffers) -> Array:
    """Zeros (count, k·C), float64, for the sums of x (A, B, k, C)."""
    wide = buffers.temporary("totals", (count, x.shape[2] * x.shape[3]), "float64")
    wide.fill(0)
    return wide


def add_lines(total: Array, block: Array, buffers: Buffers) -> None:
    """Add to `total` (k·C,), float64, the sum of a block (A, B, k, C) over A and B."""
    a, b, k, c = block.shape
    if block.flags.c_contiguous:
        line = buffers.temporary("line", (k * c,))
        total += namespace(block).matmul(buffers.ones(a * b), block.reshape(a * b, k * c), out=line)
    else:
        total += (buffers.ones(b) @ block.reshape(a, b, k * c)).sum(0, dtype=np.float64)


def add_products(total: Array, a: Array, b: Array, buffers: Buffers) -> None:
    """Add to `total` (k·C,), float64, the sum of a·b, both (A, B, k, C), over A and B: one pass over them."""
    shape = (*a.shape[:2], total.size)
    out = {"out": buffers.temporary("line", total.shape)} if buffers.backend.on_host else {}
    total += namespace(a).einsum("abj,abj->j", a.reshape(shape), b.reshape(shape), **out)
