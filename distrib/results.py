"""Reads the results of steps from the device late, so that no step waits for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from distrib.comm.world import World
from distrib.errors import UserError
from distrib.state import Progress

if TYPE_CHECKING:
    from distrib.snapshots import Snapshots

HISTORY = 256
"""Steps whose results fit on the device until they are read."""


class StepResults:
    """Loss, correct images and requests to stop of each step, summed over ranks, in a ring on the device.

    A row of `history` is [this rank's part of the loss, then the summed STEP_METRICS] of a step. `unread`
    holds the global image counts of the steps whose rows are only on the device. Reading a step sets `last`
    and adds to the epoch's sums in `progress`.
    """

    def __init__(self, world: World, progress: Progress, steps_per_epoch: int, lr: float, dtype: Any) -> None:
        self.history = world.backend.xp.zeros((HISTORY, 4), dtype)
        self.unread: list[int] = []
        self.in_flight: deque[Any] = deque()  # copies to the host
        self.last: dict[str, float] = {"loss": 0.0, "accuracy": 0.0}
        self.stopped = False  # whether a signal asked any rank to stop
        self.snapshots: Snapshots | None = None  # taken whenever results are read, if ranks may die
        self._world, self._progress, self._steps_per_epoch, self._lr = world, progress, steps_per_epoch, lr

    @property
    def all_read(self) -> bool:
        return not self.unread and not self.in_flight

    def read(self, wait: bool = True, then: Callable[[dict[str, float]], None] | None = None) -> None:
        """Read the results of all steps so far, then call `then` with those of the last one.

        Without `wait`, this starts a copy of the results since the last call, and reads only those before,
        which have long arrived. `then` is called once the copy is read.
        """
        assert len(self.unread) <= HISTORY, "results were overwritten before they were read"
        self._read_in_flight()
        if self.snapshots:
            self.snapshots.take()
        first = (self._progress.step - len(self.unread)) % self._steps_per_epoch
        copy = self._world.backend.start_copy(self.history)
        self.in_flight.append((copy, first, self._progress.step, self.unread, then))
        self.unread = []
        if wait:
            self._read_in_flight()

    def _read_in_flight(self) -> None:
        while self.in_flight:
            self._add(*self.in_flight.popleft())

    def keep(self) -> None:
        """If ranks may die, go back no further than to here. All results have been read."""
        if self.snapshots:
            self.snapshots.take_now()

    def forget_unread(self) -> None:
        """Give up the results of steps that will be done again."""
        self.unread = []
        self.in_flight.clear()

    def _add(
        self,
        copy: Callable[[], np.ndarray],
        first: int,
        step: int,
        counts: list[int],
        then: Callable[[dict[str, float]], None] | None,
    ) -> None:
        """Add the results of `len(counts)` steps up to `step`. The first is step `first` of its epoch."""
        with self._world.watchdog.waiting("the device's results"):
            rows = copy()
        progress = self._progress
        for i, count in enumerate(counts):
            own, loss, correct, stop = rows[(first + i) % HISTORY].tolist()
            if not np.isfinite(loss):
                self._raise_non_finite(step - len(counts) + i + 1, own, loss)
            progress.loss_sum += loss * count
            progress.correct += correct
            progress.images += count
            self.last = {"loss": loss, "accuracy": 100 * correct / count}
            self.stopped = self.stopped or stop > 0
        if self.snapshots:
            self.snapshots.confirm()
        if then:
            then(self.last)

    def _raise_non_finite(self, step: int, own: float, loss: float) -> None:
        """Raise a UserError for a non-finite loss. All ranks do, as they read the same sum."""
        finite = self._world.allgather(bool(np.isfinite(own)), "the search for a non-finite loss")
        rank = finite.index(False) if False in finite else 0
        raise UserError(
            f"the loss is {loss} at step {step}, first on rank {rank}: nothing of it was saved;"
            f" try a lower --lr than {self._lr}, --warmup-epochs, or --precision float64"
        )
