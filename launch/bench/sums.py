"""Vectors whose sum over the ranks is known, so that every element of an all-reduce can be checked."""

from __future__ import annotations

import numpy as np

from distrib.comm.world import World
from nn.array import Array

PERIOD = 251
"""Elements after which the values repeat: a prime, so that a shift by any power of two shows."""
PART = PERIOD << 12
"""Elements that are filled or compared at once: the memory this takes beside the vector."""


class Values:
    """What the ranks sum: element i of rank r is i mod 251 + r + 1, whole and never zero.

    The sum, n·(i mod 251) + n(n + 1)/2, is exact in float32 for up to 5000 ranks, in any order of adding.
    """

    def __init__(self, world: World, dtype: str) -> None:
        self.world = world
        steps = np.arange(PART) % PERIOD
        self.own = world.backend.asarray((steps + world.rank + 1).astype(dtype))
        self.sums = world.backend.asarray(
            (world.size * steps + world.size * (world.size + 1) // 2).astype(dtype)
        )

    def fill(self, x: Array) -> None:
        for begin in range(0, x.size, PART):
            part = x[begin : begin + PART]
            part[...] = self.own[: part.size]

    def compare(self, x: Array, calls: int) -> tuple[int, dict[str, float] | None]:
        """(wrong elements, the first of them) of `x`, filled and then all-reduced `calls` times.

        Each call after the first multiplies by n. One call must be exact; more may round.
        """
        n, to_host, xp = self.world.size, self.world.backend.to_host, self.world.backend.xp
        tolerance = calls * n * float(np.finfo(str(x.dtype)).eps) if calls > 1 else 0.0
        wrong, first = 0, None
        for begin in range(0, x.size, PART):
            part = x[begin : begin + PART]
            right = self.sums[: part.size] * float(n) ** (calls - 1)
            off = ~(xp.abs(part - right) <= right * tolerance)  # a NaN is off too
            count = int(to_host(off.sum()))
            if count and first is None:
                at = int(to_host(off.argmax()))
                value, expected = (float(to_host(y[at : at + 1])[0]) for y in (part, right))
                first = {"index": begin + at, "value": value, "expected": expected}
            wrong += count
        return wrong, first
