"""Where the time of training steps goes, by the host's clock."""

from __future__ import annotations

import time

PHASES = ("data", "forward", "backward", "sums", "gradients", "optimizer")
"""Of a step: `sums` is the time inside batch norm's sums over ranks, `gradients` the wait after the
backward."""


class Laps:
    """Host seconds by phase, over all steps so far. On a GPU: the time to queue the work."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._last = 0.0

    def start(self) -> None:
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """What passed since the last call belongs to `phase`."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now

    def sums(self, begin: float) -> None:
        """What passed since `begin` belongs to the sums over ranks, not to the phase around them."""
        passed = time.perf_counter() - begin
        self.seconds["sums"] += passed
        self._last += passed
