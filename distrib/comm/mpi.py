"""The communicator on host arrays, over MPI. Only this module and `distrib.comm.start` import mpi4py."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from distrib.comm.base import DONE, Handle
from distrib.errors import RankLost
from distrib.faults.watchdog import Watchdog
from nn.array import Array
from nn.device import Backend


class _Requests:
    """Non-blocking calls. Keeps their buffers alive until they are complete.

    Without `what`, the caller bounds the wait.
    """

    def __init__(self, comm: MpiCommunicator, *requests: Any, buffers: tuple = (), what: str = "") -> None:
        self._comm, self._requests, self._buffers, self._what = comm, requests, buffers, what
        comm.under_way.append(self)

    def wait(self) -> None:
        if self._what:
            self._comm.call(self._what, self._wait)
        else:
            self._wait()
        if self in self._comm.under_way:
            self._comm.under_way.remove(self)

    def _wait(self) -> None:
        for request in self._requests:
            request.Wait()

    def give_up(self) -> None:
        """Return once MPI does not touch the buffers any more; the communicator has been revoked."""
        for request in self._requests:
            try:
                request.Wait()
            except Exception as error:
                if not is_loss(error):
                    raise


class MpiCommunicator:
    """Collectives over MPI on NumPy arrays.

    Non-blocking calls (gradient buckets, say) and blocking ones (batch norm) use two duplicates of the
    communicator, so that MPI matches them independently; or, if ranks may die, the communicator itself (see
    `Meeting`), on which all ranks make the same calls in the same order.
    """

    name, version, graph_safe, sums_bf16, staged = "mpi", "", False, False, False

    def __init__(self, world: Any, watchdog: Watchdog, duplicate: bool = True) -> None:
        """Over the ranks of `world` (mpi4py)."""
        self._world, self._watchdog = world, watchdog
        self._own = [world.Dup(), world.Dup()] if duplicate else []
        self._blocking, self._overlapped = self._own or (world, world)
        self.under_way: list[_Requests] = []
        self.rank, self.size = int(world.Get_rank()), int(world.Get_size())

    def call(self, what: str, function: Any, *args: Any) -> Any:
        """Call a blocking function under the watchdog."""
        with self._watchdog.waiting(what):
            return function(*args)

    def all_reduce(self, x: Array, overlap: bool = False, op: str = "sum") -> Handle:
        from mpi4py import MPI

        assert op == "sum"
        if overlap:
            request = self._overlapped.Iallreduce(MPI.IN_PLACE, x)
            return _Requests(self, request, buffers=(x,), what="all_reduce of a gradient bucket")
        self.call("all_reduce of batch-norm sums", self._blocking.Allreduce, MPI.IN_PLACE, x)
        return DONE

    def broadcast(self, x: Array, root: int = 0) -> None:
        self.call("broadcast", self._blocking.Bcast, x, root)

    def barrier(self) -> None:
        self.call("barrier", self._blocking.Barrier)

    def abort(self) -> None:
        self._world.Abort(1)

    def close(self) -> None:
        while self._own:
            free(self._own.pop())

    def start_reduce(self, x: Array, op: str, overlap: bool = False) -> Handle:
        from mpi4py import MPI

        return _Requests(self, self._overlapped.Iallreduce(MPI.IN_PLACE, x, _operation(op)), buffers=(x,))

    def start_broadcast(self, x: Array, root: int) -> Handle:
        return _Requests(self, self._overlapped.Ibcast(x, root), buffers=(x,))

    def start_gather(self, x: Array, into: Array) -> Handle:
        return _Requests(self, self._overlapped.Iallgather(x, into), buffers=(x, into))

    def start_scatter(self, x: Array, into: Array, op: str) -> Handle:
        request = self._overlapped.Ireduce_scatter_block(x, into, _operation(op))
        return _Requests(self, request, buffers=(x, into))

    def start_exchange(
        self, send: Array | None, to: int | None, receive: Array | None, source: int | None
    ) -> Handle:
        requests = []
        if receive is not None:
            requests.append(self._overlapped.Irecv(receive, source))
        if send is not None:
            requests.append(self._overlapped.Isend(send, to))
        return _Requests(self, *requests, buffers=(send, receive))

    def synchronize(self) -> None:
        pass

    def abandon(self) -> None:
        """After the death of a rank, end what is under way on all of them; nothing else can follow.

        It must have been made without duplicates.
        """
        self._world.Revoke()
        with self._watchdog.waiting("the end of the calls under way"):
            while self.under_way:
                self.under_way[0].give_up()
                del self.under_way[0]

    def over(self, control_comm: Any) -> MpiCommunicator:
        return type(self)(control_comm, self._watchdog)


def _operation(name: str) -> Any:
    from mpi4py import MPI

    return {"sum": MPI.SUM, "max": MPI.MAX, "min": MPI.MIN}[name]


def is_loss(error: BaseException) -> bool:
    """Whether `error` says that a rank has died, or that another rank has heard of it.

    Now and then, Open MPI 5.0.11 says so by ERR_OTHER, "known error not in list".
    """
    if isinstance(error, RankLost):
        return True
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not isinstance(error, mpi.Exception):
        return False
    losses = mpi.ERR_PROC_FAILED, mpi.ERR_PROC_FAILED_PENDING, mpi.ERR_REVOKED, mpi.ERR_OTHER
    return error.Get_error_class() in losses


def hears_of_death(comm: Any) -> bool:
    """Whether a rank of `comm` has died; asked beside the main thread's calls, it does not disturb them."""
    try:
        comm.Iprobe()
    except Exception as error:
        if not is_loss(error):
            raise
        return True
    return False


def gathering(comm: Any) -> Any:
    """`comm` with an `allgather` that fails where a rank has died.

    mpi4py takes Open MPI's allgatherv, which then returns what lay in memory before, without an error.
    """
    from mpi4py import MPI

    class Gathering(MPI.Intracomm):
        def allgather(self, value: Any) -> list[Any]:
            return list(self.bcast(self.gather(value)))

    return Gathering(comm)


def free(comm: Any) -> None:
    """Free an mpi4py communicator, unless MPI has ended before."""
    from mpi4py import MPI

    if not MPI.Is_finalized():
        comm.Free()


def split(control_comm: Any, color: int | None, key: int) -> Any:
    """The communicator of the ranks with the same `color`, ordered by `key`; None for color None."""
    from mpi4py import MPI

    group = control_comm.Split(MPI.UNDEFINED if color is None else color, key)
    return None if group == MPI.COMM_NULL else group


class _Upload:
    """Copies results from the host into device arrays, in stream order, once they are there."""

    def __init__(self, comm: StagedCommunicator, handle: Handle, host: np.ndarray, x: Array) -> None:
        self._comm, self._handle, self._host, self._x = comm, handle, host, x

    def wait(self) -> None:
        self._handle.wait()
        self._x[...] = self._comm.backend.asarray(self._host)


class StagedCommunicator(MpiCommunicator):
    """MPI on device arrays, copied through the host: to check NCCL, and for more ranks than GPUs."""

    staged = True

    def __init__(self, world: Any, watchdog: Watchdog, backend: Backend, duplicate: bool = True) -> None:
        super().__init__(world, watchdog, duplicate)
        self.backend = backend

    def _on_host(self, x: Array) -> np.ndarray:
        """A copy of `x`, once all that was queued before has run."""
        if self.backend.side_stream:  # which computes the gradients of weights
            self.backend.side_stream.join(self.backend.stream)
        return np.array(self.backend.to_host(x))

    def all_reduce(self, x: Array, overlap: bool = False, op: str = "sum") -> Handle:
        host = self._on_host(x)
        super().all_reduce(host, op=op)
        x[...] = self.backend.asarray(host)
        return DONE

    def broadcast(self, x: Array, root: int = 0) -> None:
        host = self._on_host(x)
        super().broadcast(host, root)
        x[...] = self.backend.asarray(host)

    def start_reduce(self, x: Array, op: str, overlap: bool = False) -> Handle:
        host = self._on_host(x)
        return _Upload(self, super().start_reduce(host, op), host, x)

    def start_broadcast(self, x: Array, root: int) -> Handle:
        host = self._on_host(x)
        return _Upload(self, super().start_broadcast(host, root), host, x)

    def start_gather(self, x: Array, into: Array) -> Handle:
        parts = np.empty(into.size, into.dtype)
        return _Upload(self, super().start_gather(self._on_host(x), parts), parts, into)

    def start_scatter(self, x: Array, into: Array, op: str) -> Handle:
        part = np.empty(into.size, into.dtype)
        return _Upload(self, super().start_scatter(self._on_host(x), part, op), part, into)

    def start_exchange(
        self, send: Array | None, to: int | None, receive: Array | None, source: int | None
    ) -> Handle:
        sent = None if send is None else self._on_host(send)
        if receive is None:
            return super().start_exchange(sent, to, None, None)
        host = np.empty(receive.size, receive.dtype)
        return _Upload(self, super().start_exchange(sent, to, host, source), host, receive)

    def synchronize(self) -> None:
        if self.backend.stream is not None:
            self.backend.cuda.get_current_stream().synchronize()

    def over(self, control_comm: Any) -> StagedCommunicator:
        return StagedCommunicator(control_comm, self._watchdog, self.backend)
