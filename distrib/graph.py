"""A training step as a CUDA graph: captured once for each kind of batch, then replayed by one call.

A step at batch 8 is some fifty kernels of a few microseconds each, which Python cannot queue as fast as a GPU
runs them. A graph queues them at once, collectives included.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from nn.device import capture


class Graphs:
    """Runs steps, as graphs where they are held.

    A step runs eagerly before it is captured: that compiles kernels, chooses convolution plans and lets
    buffers grow, none of which a capture allows. `generation()` tells when a buffer moved since; a graph
    older than that is void. `alone` says that there is one rank: then `run` captures by itself. Several must
    do so together, as NCCL wants (see `distrib.warmup`), and a buffer must not move afterwards.
    """

    def __init__(
        self, cuda: Any, generation: Callable[[], int], capturable: Callable[[], bool], alone: bool
    ) -> None:
        self._cuda, self._generation, self.capturable, self._alone = cuda, generation, capturable, alone
        self._graphs: dict[Hashable, tuple[int, Any]] = {}
        self.replays = 0

    def hold(self, kind: Hashable, step: Callable[[], None]) -> None:
        """Capture `step`, which has just run eagerly on every rank."""
        self._graphs[kind] = self._generation(), capture(self._cuda, step)

    def run(self, kind: Hashable, step: Callable[[], None]) -> None:
        """Do what `step` does; two steps of one `kind` must queue the same work."""
        made, graph = self._graphs.get(kind, (-1, None))
        if graph is not None and made == self._generation():
            graph.launch(self._cuda.get_current_stream())
            self.replays += 1
            return
        assert graph is None or self._alone, "a buffer moved after the ranks had captured their steps"
        step()
        if self._alone and self.capturable():
            self.hold(kind, step)
