"""float32 to and from bfloat16, whose bits travel as uint16: NumPy has no such type."""

from __future__ import annotations

import numpy as np

from nn.array import Array, namespace, op


@op
def to_bf16(x: Array, y: Array) -> None:
    """y, uint16 holding the bits of bfloat16, = x (float32), to nearest, ties to even; NaN stays NaN."""
    xp = namespace(x)
    bits = x.view(np.uint32)
    rounded = xp.where(xp.isnan(x), bits | 0x400000, bits + (0x7FFF + ((bits >> 16) & 1)))
    y[...] = (rounded >> 16).astype(np.uint16)


@op
def from_bf16(x: Array, y: Array) -> None:
    """The reverse: y (float32) = x (uint16 holding the bits of bfloat16)."""
    y.view(np.uint32)[...] = x
    y.view(np.uint32)[...] <<= 16
