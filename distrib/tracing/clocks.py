"""Clocks of a trace: the host's or a device's, and how far a rank's is from rank 0's."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from distrib.comm.world import World

ROUNDS = 32
"""Exchanges between rank 0 and another rank, of which the shortest counts."""


class Offset(NamedTuple):
    """What to add to this rank's clock for rank 0's, and by how much that may be wrong, in seconds."""

    seconds: float = 0.0
    error: float = 0.0


def offset(world: World) -> Offset:
    """Ask rank 0 for its time (Cristian 1989). Every rank calls it.

    Rank 0 read its clock between this rank's question and the answer. So the middle of the two is wrong by
    half of the time between them at most.
    """
    found, best = Offset(), float("inf")
    host, question, answer = world.host or world.transport, np.zeros(1), np.zeros(1)
    with world.watchdog.waiting("the clocks of all ranks"):
        for other in range(1, world.size):
            for _ in range(ROUNDS if world.rank in (0, other) else 0):
                if world.rank == 0:
                    host.start_exchange(None, None, question, other).wait()
                    answer[0] = time.perf_counter()
                    host.start_exchange(answer, other, None, None).wait()
                    continue
                asked = time.perf_counter()
                host.start_exchange(question, 0, None, None).wait()
                host.start_exchange(None, None, answer, 0).wait()
                took = time.perf_counter() - asked
                if took < best:
                    found, best = Offset(float(answer[0]) - asked - took / 2, took / 2), took
    return found


def between(before: Offset, after: Offset) -> Offset:
    """The offset at any time between two exchanges, if the clocks drifted one way."""
    drift = abs(before.seconds - after.seconds) / 2
    return Offset((before.seconds + after.seconds) / 2, drift + max(before.error, after.error))


class HostClock:
    """Marks are seconds of the host's clock."""

    error, wire = 0.0, None
    mark = staticmethod(time.perf_counter)

    def seconds(self, mark: float) -> float:
        return mark

    def push(self, name: str) -> None:
        pass

    def pop(self) -> None:
        pass


class DeviceClock:
    """Marks are events on the current stream: when the device came there. Ranges are shown by NVTX, too.

    `wire` is the stream of the sums that run beside the computation, if there is one.
    """

    def __init__(self, cuda: Any, wire: Any = None) -> None:
        self._cuda, self.wire = cuda, wire
        cuda.get_current_stream().synchronize()
        begin = time.perf_counter()
        self._zero = self.mark()
        self._zero.synchronize()
        self.error = (time.perf_counter() - begin) / 2
        self._begin = begin + self.error
        nothing = HostClock()  # where CuPy has no NVTX
        self.push = getattr(cuda.nvtx, "RangePush", nothing.push)
        self.pop = getattr(cuda.nvtx, "RangePop", nothing.pop)

    def mark(self, stream: Any = None) -> Any:
        event = self._cuda.Event()
        event.record(stream)
        return event

    def seconds(self, mark: Any) -> float:
        """On the host's clock; waits for the device to come there."""
        if isinstance(mark, float):  # of a thread that has nothing to do with the device
            return mark
        mark.synchronize()
        return self._begin + float(self._cuda.get_elapsed_time(self._zero, mark)) / 1e3
