"""Dropout (Srivastava et al. 2014) whose choice depends on the image alone, not on who computes it.

Element i of an image with the key k is dropped where hash(hash(k ⊕ salt) + i · 0x9e3779b9) < rate · 2³², all
in 32 bits. The hash is Wellons' "lowbias32" (2018). Nothing is kept for the backward, which draws again.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from nn.array import Array, namespace, op
from nn.buffers import Buffers

GOLDEN = 0x9E3779B9
"""2³² over the golden ratio: far apart for neighbouring elements."""


def scramble(x: Any) -> None:
    """x (uint32) becomes its hash."""
    xp = namespace(x)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= xp.right_shift(x, shift)
        x *= np.uint32(factor)
    x ^= xp.right_shift(x, 16)


def threshold(rate: float) -> int:
    """The smallest hash of an element that is kept."""
    return min(round(rate * 2**32), 2**32 - 1)


@op
def dropout(x: Array, y: Array, keys: Array, salt: int, rate: float, buffers: Buffers) -> None:
    """y = x / (1 − rate) where an element is kept, 0 elsewhere; `keys` (N,) uint32. y may be x.

    The backward is the same, with dy in the place of x.
    """
    xp, n, inner = namespace(x), len(x), x.shape[1:]
    seeds = keys ^ np.uint32(salt)
    scramble(seeds)
    number = xp.arange(prod(inner), dtype=np.uint32) * np.uint32(GOLDEN)
    drawn = buffers.temporary("dropout", x.shape, "uint32")
    xp.add(seeds.reshape(n, *(1 for _ in inner)), number.reshape(inner), out=drawn)
    scramble(drawn)
    xp.multiply(x, drawn >= np.uint32(threshold(rate)), out=y)
    y *= 1 / (1 - rate)
