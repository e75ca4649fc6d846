"""Measures where the time of training steps goes, and images per second, by the host's clock."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distrib.state import Progress

PHASES = ("data", "forward", "backward", "sums", "gradients", "optimizer")
"""Of a step: `sums` is the time inside batch norm's all-reduces, `gradients` the wait after the backward."""


class StepTimer:
    """Host seconds by phase, over all steps so far. On a GPU: the time to queue the work."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._last = 0.0

    def start(self) -> None:
        """Start the clock of a step."""
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Add the time since the last call to `phase`."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now

    def add_sums(self, begin: float) -> None:
        """Add the time since `begin` to "sums" instead of the phase around it."""
        passed = time.perf_counter() - begin
        self.seconds["sums"] += passed
        self._last += passed


class Throughput:
    """Counts images and seconds of training since the last `read`, without pauses for checkpoints."""

    def __init__(self, timer: StepTimer, progress: Progress, on_host: bool) -> None:
        self._timer, self._progress, self._on_host = timer, progress, on_host
        self._images, self._seconds, self._rate = 0, 0.0, 0.0
        self._phases = timer.seconds.copy()
        self.resume()

    def count(self, images: int) -> None:
        """Add the images of a step."""
        self._images += images

    def resume(self) -> None:
        """Start the clock."""
        self._begin = time.perf_counter()

    def pause(self) -> None:
        """Stop the clock, and add its time to the run's training time."""
        now = time.perf_counter()
        self._seconds += now - self._begin
        self._progress.train_seconds += now - self._begin
        self._begin = now

    def rate(self) -> float:
        """Images per second since the last `read`; right after one, the rate that it returned."""
        if not self._images:
            return self._rate
        return self._images / max(self._seconds + time.perf_counter() - self._begin, 1e-9)

    def take(self) -> int:
        """Return the images counted since the last call."""
        images, self._images = self._images, 0
        return images

    def read(self, images: int) -> dict[str, float | None]:
        """The rate and times of these images, for metrics.jsonl. On a GPU, times by phase are unknown."""
        self.pause()
        seconds = self._timer.seconds
        passed = {phase: seconds[phase] - self._phases[phase] for phase in seconds}
        waited = passed["sums"] + passed["gradients"]
        parts = {
            "compute_seconds": self._seconds - waited - passed["data"],
            "communication_seconds": waited,
            "data_seconds": passed["data"],
        }
        self._rate = images / max(self._seconds, 1e-9)
        self._seconds, self._phases = 0.0, seconds.copy()
        return {
            "images_per_second": self._rate,
            **{name: value if self._on_host else None for name, value in parts.items()},
        }
