"""The communicator on host arrays, over MPI. Only this module and `distrib.comm.world` use mpi4py."""

from __future__ import annotations

from typing import Any

import numpy as np

from distrib.comm.base import DONE, Handle
from distrib.faults.watchdog import Watchdog
from nn.array import Array
from nn.device import Backend


class _Request:
    """A non-blocking all-reduce. Keeps the buffer alive until it is complete."""

    def __init__(self, comm: MpiCommunicator, request: Any, buffer: np.ndarray) -> None:
        self._comm, self._request, self._buffer = comm, request, buffer

    def wait(self) -> None:
        self._comm.call("all_reduce of a gradient bucket", self._request.Wait)


class MpiCommunicator:
    """All-reduce over MPI on NumPy arrays.

    Overlapped sums (gradient buckets) and blocking ones (batch norm) use two duplicates of the communicator,
    so that MPI matches them independently.
    """

    name, version, graph_safe, sums_bf16, staged = "mpi", "", False, False, False

    def __init__(self, world: Any, watchdog: Watchdog) -> None:
        self._world, self._watchdog = world, watchdog
        self._blocking, self._overlapped = world.Dup(), world.Dup()
        self.rank, self.size = int(world.Get_rank()), int(world.Get_size())

    def call(self, what: str, function: Any, *args: Any) -> Any:
        """Call a blocking function under the watchdog."""
        with self._watchdog.waiting(what):
            return function(*args)

    def all_reduce(self, x: Array, overlap: bool = False) -> Handle:
        from mpi4py import MPI

        if overlap:
            return _Request(self, self._overlapped.Iallreduce(MPI.IN_PLACE, x), x)
        self.call("all_reduce of batch-norm sums", self._blocking.Allreduce, MPI.IN_PLACE, x)
        return DONE

    def broadcast(self, x: Array, root: int = 0) -> None:
        self.call("broadcast", self._blocking.Bcast, x, root)

    def barrier(self) -> None:
        self.call("barrier", self._blocking.Barrier)

    def abort(self) -> None:
        self._world.Abort(1)

    def close(self) -> None:
        self._blocking.Free()
        self._overlapped.Free()


class StagedCommunicator(MpiCommunicator):
    """MPI on device arrays, copied through the host: to check NCCL, and for more ranks than GPUs."""

    staged = True

    def __init__(self, world: Any, watchdog: Watchdog, backend: Backend) -> None:
        super().__init__(world, watchdog)
        self._backend = backend

    def all_reduce(self, x: Array, overlap: bool = False) -> Handle:
        if self._backend.side_stream:  # which computes the gradients of weights
            self._backend.side_stream.join(self._backend.stream)
        host = np.array(self._backend.to_host(x))
        super().all_reduce(host)
        x[...] = self._backend.asarray(host)
        return DONE

    def broadcast(self, x: Array, root: int = 0) -> None:
        host = np.array(self._backend.to_host(x))
        super().broadcast(host, root)
        x[...] = self._backend.asarray(host)
