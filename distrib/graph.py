"""Runs training steps as CUDA graphs: each batch shape is captured once, then replayed by one call.

A step at batch 8 has some fifty kernels of a few microseconds each. Python cannot queue them as fast as a GPU
runs them. A graph queues them all at once, collectives included. Between two graphs a GPU stands still for a
few microseconds. So a second graph holds STEPS steps: all that changes is read from the device's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from distrib.config import CHECKPOINT_STEPS
from nn.device import capture

if TYPE_CHECKING:
    from distrib.trainer import Trainer

STEPS = 8
"""Of the larger of a batch shape's two graphs: four of them lie between two reads of results."""

READ_EVERY = 32
"""Steps after which a device's results are read, if none was logged meanwhile."""


def steps_ahead(trainer: Trainer) -> int:
    """How many steps to queue at once: up to the next one that the host looks at.

    One on the host itself, and with --elastic, which has one commit point a step.
    """
    config, progress = trainer.config, trainer.progress
    if trainer.world.backend.on_host or config.elastic:
        return 1
    done = progress.step % trainer.steps_per_epoch
    of_one_size = len(trainer.images) // config.batch_size - done or 1
    cadences = config.log_every, config.check_every, config.checkpoint_every or CHECKPOINT_STEPS
    looks = (every - progress.step % every for every in cadences if every)
    read = READ_EVERY - len(trainer.results.unread)
    return min(of_one_size, trainer.last_step - progress.step, read, *looks)


class Graphs:
    """Runs steps, as graphs once they are captured.

    A step runs eagerly before it is captured: that compiles kernels, chooses convolution plans and lets
    buffers grow, none of which a capture allows. `generation()` changes when a buffer moves, and makes older
    graphs void. A `single_rank` captures within `run`. Several ranks must capture together, because NCCL
    requires it (see `distrib.warmup`), and no buffer may move afterwards.
    """

    def __init__(
        self, cuda: Any, generation: Callable[[], int], capturable: Callable[[], bool], single_rank: bool
    ) -> None:
        self._cuda, self._generation = cuda, generation
        self.capturable, self._single_rank = capturable, single_rank
        self._graphs: dict[Hashable, tuple[int, dict[int, Any]]] = {}  # by key: generation, graphs by steps
        self.replays = 0  # of steps

    def capture(self, key: Hashable, step: Callable[[], None], times: int = 1) -> None:
        """Capture `step` under `key`, to be run up to `times` times at once.

        It must have run eagerly on every rank just before.
        """
        held = [steps for steps in (STEPS, 1) if steps <= times]
        self._graphs[key] = self._generation(), {steps: capture(self._cuda, step, steps) for steps in held}

    def run(self, key: Hashable, step: Callable[[], None], times: int = 1) -> None:
        """Do what `step` does, `times` times. All steps of one `key` must queue the same work."""
        while times:
            times -= self._run(key, step, times)

    def _run(self, key: Hashable, step: Callable[[], None], times: int) -> int:
        """Do it once, or as often as the largest graph that fits holds it; returns how often."""
        generation, graphs = self._graphs.get(key, (-1, {}))
        if graphs and generation == self._generation():
            steps = max(steps for steps in graphs if steps <= times)
            graphs[steps].launch(self._cuda.get_current_stream())
            self.replays += steps
            return steps
        assert not graphs or self._single_rank, "a buffer moved after the ranks had captured their steps"
        step()
        if self._single_rank and self.capturable():
            self.capture(key, step, times)
        return 1
