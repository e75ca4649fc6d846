"""The communicator on host arrays, over MPI: the only place, with `distrib.comm.world`, that knows mpi4py."""

from __future__ import annotations

from typing import Any

import numpy as np

from distrib.comm.base import DONE, Handle
from distrib.faults.watchdog import Watchdog
from nn.array import Array
from nn.device import Backend


class _Request:
    """A non-blocking all-reduce; keeps the buffer alive until it is complete."""

    def __init__(self, comm: MpiCommunicator, request: Any, buffer: np.ndarray) -> None:
        self._comm, self._request, self._buffer = comm, request, buffer

    def wait(self) -> None:
        self._comm.guarded("all_reduce of a gradient bucket", self._request.Wait)


class MpiCommunicator:
    """All-reduce over MPI on NumPy arrays.

    Overlapped reductions (gradient buckets) and immediate ones (batch norm's sums) use two duplicated
    communicators, so that neither waits for the other's matching.
    """

    name, captures = "mpi", False

    def __init__(self, world: Any, watchdog: Watchdog) -> None:
        self._world, self._watchdog = world, watchdog
        self._now, self._beside = world.Dup(), world.Dup()
        self.rank, self.size = int(world.Get_rank()), int(world.Get_size())

    def guarded(self, what: str, call: Any, *args: Any) -> Any:
        """Run a blocking call under the watchdog."""
        with self._watchdog.waiting(what):
            return call(*args)

    def all_reduce(self, x: Array, overlap: bool = False) -> Handle:
        from mpi4py import MPI

        if overlap:
            return _Request(self, self._beside.Iallreduce(MPI.IN_PLACE, x), x)
        self.guarded("all_reduce of batch-norm sums", self._now.Allreduce, MPI.IN_PLACE, x)
        return DONE

    def broadcast(self, x: Array, root: int = 0) -> None:
        self.guarded("broadcast", self._now.Bcast, x, root)

    def barrier(self) -> None:
        self.guarded("barrier", self._now.Barrier)

    def abort(self) -> None:
        self._world.Abort(1)

    def close(self) -> None:
        self._now.Free()
        self._beside.Free()


class StagedCommunicator(MpiCommunicator):
    """MPI under device arrays, copied through the host: the check of NCCL, and more ranks than GPUs."""

    def __init__(self, world: Any, watchdog: Watchdog, backend: Backend) -> None:
        super().__init__(world, watchdog)
        self._backend = backend

    def all_reduce(self, x: Array, overlap: bool = False) -> Handle:
        if self._backend.side_stream:  # gradients of weights come from there
            self._backend.side_stream.join(self._backend.stream)
        host = np.array(self._backend.to_host(x))
        super().all_reduce(host)
        x[...] = self._backend.asarray(host)
        return DONE

    def broadcast(self, x: Array, root: int = 0) -> None:
        host = np.array(self._backend.to_host(x))
        super().broadcast(host, root)
        x[...] = self._backend.asarray(host)
