"""What steps have found, read from the device late, so that no step waits for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from distrib.comm.world import World
from distrib.errors import UserError
from distrib.state import Position

HISTORY = 256
"""Steps whose results may stay on the device before they are read."""


class StepResults:
    """Loss, correct images and requests to stop of each step, summed over ranks, in a ring on the device.

    A row of `history` is [this rank's part of the loss, then the summed STEP_METRICS] of a step. `unread`
    holds the global image counts of the steps whose rows are on the device only. `last` has the figures of
    the last step that was read; they are added to those of the epoch in `at`.
    """

    def __init__(self, world: World, at: Position, steps_per_epoch: int, dtype: Any) -> None:
        self.history = world.backend.xp.zeros((HISTORY, 4), dtype)
        self.unread: list[int] = []
        self.copies: deque[Any] = deque()  # results on their way to the host
        self.last: dict[str, float] = {"loss": 0.0, "accuracy": 0.0}
        self.stopped = False  # whether a rank was told to stop
        self._world, self._at, self._steps_per_epoch = world, at, steps_per_epoch

    @property
    def all_read(self) -> bool:
        return not self.unread and not self.copies

    def read(self, wait: bool = True, then: Callable[[dict[str, float]], None] | None = None) -> None:
        """Take in the results of all steps so far; `then` is called with the last one's.

        Without `wait`, what is taken in are the steps up to the last call, which a device has long done by
        now; those since are on their way to the host until the next.
        """
        assert len(self.unread) <= HISTORY, "results were overwritten before they were read"
        first = (self._at.step - len(self.unread)) % self._steps_per_epoch
        copy = self._world.backend.start_copy(self.history)
        self.copies.append((copy, first, self._at.step, self.unread, then))
        self.unread = []
        while len(self.copies) > (0 if wait else 1):
            self._take_in(*self.copies.popleft())

    def _take_in(
        self,
        copy: Callable[[], np.ndarray],
        first: int,
        step: int,
        counts: list[int],
        then: Callable[[dict[str, float]], None] | None,
    ) -> None:
        """Results of the `len(counts)` steps up to `step`; the first of them is number `first` of its
        epoch."""
        with self._world.watchdog.waiting("the device's results"):
            rows = copy()
        at = self._at
        for i, count in enumerate(counts):
            own, loss, correct, stop = rows[(first + i) % HISTORY].tolist()
            if not np.isfinite(loss):
                self._refuse(step - len(counts) + i + 1, own, loss)
            at.loss_sum += loss * count
            at.correct += correct
            at.images += count
            self.last = {"loss": loss, "accuracy": 100 * correct / count}
            self.stopped = self.stopped or stop > 0
        if then:
            then(self.last)

    def _refuse(self, step: int, own: float, loss: float) -> None:
        """UserError for a loss that is not finite, on all ranks: what they read is the same sum."""
        finite = self._world.allgather(bool(np.isfinite(own)), "the search for a non-finite loss")
        rank = finite.index(False) if False in finite else 0
        raise UserError(
            f"the loss is {loss} at step {step}, first on rank {rank}: nothing of it was saved;"
            " try a lower --lr, --warmup-epochs, or --precision float64"
        )
