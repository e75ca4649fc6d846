"""What a rank goes back to after the death of another: the state after a step that is whole.

A host writes what lasts only when all sums of a step are in place, but for the running statistics: it keeps
those twice. A device's work is queued ahead. When a rank dies, the sums of the others hang, and once NCCL is
aborted all that was queued behind them runs on what they left. So of a device all that lasts is kept twice,
and nothing counts but what the host saw complete before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nn.array import Array

if TYPE_CHECKING:
    from distrib.trainer import Trainer

SUMS = "loss_sum", "correct", "images"
"""Fields of a run's progress that are known only once a step's results are read."""

SECONDS = "wall_seconds", "train_seconds"
"""Those that pass, whatever is done again."""


def lasting(trainer: Trainer) -> list[Array]:
    """All arrays that make the state after a step."""
    averages = [mean for mean, _ in trainer.averages]
    state = trainer.optimizer.state.values()
    return [trainer.params.values, trainer.model.statistics, *state, *averages]


@dataclass
class Standing:
    """What the host knows of the state after a step."""

    progress: dict[str, Any]
    optimizer_steps: int
    batches_tracked: int
    last: dict[str, float]
    stopped: bool
    epoch_line: dict[str, Any] | None

    @classmethod
    def of(cls, trainer: Trainer) -> Standing:
        progress = {name: value for name, value in vars(trainer.progress).items() if name not in SECONDS}
        progress["images_per_rank"] = list(trainer.progress.images_per_rank)
        results, model = trainer.results, trainer.model
        counts = trainer.optimizer.steps, model.batches_tracked
        return cls(progress, *counts, results.last, results.stopped, trainer.epoch_line)

    def take_in_results(self, trainer: Trainer) -> None:
        """The step's results have been read meanwhile, and those of no later step."""
        self.progress |= {name: getattr(trainer.progress, name) for name in SUMS}
        self.last, self.stopped = trainer.results.last, trainer.results.stopped

    def apply(self, trainer: Trainer) -> None:
        """Make it `trainer`'s."""
        images = list(self.progress["images_per_rank"])
        vars(trainer.progress).update(self.progress, images_per_rank=images)
        trainer.optimizer.steps, trainer.model.batches_tracked = self.optimizer_steps, self.batches_tracked
        trainer.results.last, trainer.results.stopped = self.last, self.stopped
        trainer.epoch_line = self.epoch_line


class Snapshots:
    """Two copies of a trainer's state in turn: the last one that is whole, and one that is being made.

    A copy is queued whenever results are about to be read; when they are there, it is whole.
    """

    def __init__(self, trainer: Trainer) -> None:
        """Take the first one, and wait for it."""
        self._trainer, on_host = trainer, trainer.world.backend.on_host
        self._arrays = [trainer.model.statistics] if on_host else lasting(trainer)
        self._whole, self._next = (
            ([array.copy() for array in self._arrays], Standing.of(trainer)) for _ in range(2)
        )
        self.take_now()

    def take(self) -> None:
        """Queue a copy of the state after the last step."""
        copies, _ = self._next
        for kept, array in zip(copies, self._arrays, strict=True):
            kept[...] = array
        self._next = copies, Standing.of(self._trainer)

    def confirm(self) -> None:
        """The copy is whole: the results of its step have come after it, and have been added up."""
        self._next[1].take_in_results(self._trainer)
        self._whole, self._next = self._next, self._whole

    def take_now(self) -> None:
        """Take one, and wait for it. The results of all steps have been read."""
        self.take()
        self._wait()
        self.confirm()

    def restore(self) -> None:
        """Go back to the last whole one. What was queued must be able to end: abandon the transport first."""
        self._wait()
        copies, standing = self._whole
        for kept, array in zip(copies, self._arrays, strict=True):
            array[...] = kept
        standing.apply(self._trainer)
        self._trainer.results.forget_unread()

    def _wait(self) -> None:
        """Wait for all that is queued on the device."""
        backend = self._trainer.world.backend
        if not backend.on_host:
            with self._trainer.waiting("the copy of the state"):
                backend.cuda.runtime.deviceSynchronize()
