"""A training step as a CUDA graph: captured once for each shape of batch, then replayed by one call.

A step at batch 8 is some fifty kernels of a few microseconds each, which Python cannot queue as fast as a GPU
runs them. A graph queues them at once, collectives included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from typing import Any


class Graphs:
    """Runs steps: the first of a kind eagerly, the second captured, all from then on replayed.

    The eager step compiles kernels, chooses convolution plans and lets buffers grow, none of which a capture
    allows. `generation()` tells when a buffer moved since; graphs older than that are void and made again.
    `capturable()` is asked after the eager step; where it says no, every step is eager.
    """

    def __init__(self, cuda: Any, generation: Callable[[], int], capturable: Callable[[], bool]) -> None:
        self._cuda, self._generation, self._capturable = cuda, generation, capturable
        self._graphs: dict[Hashable, tuple[int, Any]] = {}
        self.replays = 0

    def run(self, kind: Hashable, step: Callable[[], None]) -> None:
        """Do what `step` does; two steps of one `kind` must queue the same work."""
        made, graph = self._graphs.get(kind, (-1, None))
        if made != self._generation():
            step()
            self._graphs[kind] = self._generation(), None
            return
        if graph is None:
            if not self._capturable():
                step()
                return
            graph = self._capture(step)
            self._graphs[kind] = made, graph
        graph.launch(self._cuda.get_current_stream())
        self.replays += 1

    def _capture(self, step: Callable[[], None]) -> Any:
        stream = self._cuda.get_current_stream()
        stream.begin_capture()
        try:
            step()
        except BaseException:
            with contextlib.suppress(Exception):  # the capture is broken; the first error is the one to show
                stream.end_capture()
            raise
        return stream.end_capture()
