"""Runs training steps as CUDA graphs: each batch shape is captured once, then replayed by one call.

A step at batch 8 has some fifty kernels of a few microseconds each. Python cannot queue them as fast as a GPU
runs them. A graph queues them all at once, collectives included.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from nn.device import capture


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
        self._graphs: dict[Hashable, tuple[int, Any]] = {}
        self.replays = 0

    def capture(self, key: Hashable, step: Callable[[], None]) -> None:
        """Capture `step` under `key`. It must have run eagerly on every rank just before."""
        self._graphs[key] = self._generation(), capture(self._cuda, step)

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Do what `step` does. All steps of one `key` must queue the same work."""
        generation, graph = self._graphs.get(key, (-1, None))
        if graph is not None and generation == self._generation():
            graph.launch(self._cuda.get_current_stream())
            self.replays += 1
            return
        assert graph is None or self._single_rank, "a buffer moved after the ranks had captured their steps"
        step()
        if self._single_rank and self.capturable():
            self.capture(key, step)
