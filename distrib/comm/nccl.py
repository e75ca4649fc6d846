"""The communicator on device arrays, over NCCL, bootstrapped by MPI.

`cuda` and `nccl` are the modules `cupy.cuda` and `cupy.cuda.nccl`. They are passed in so that tests without a
GPU can check the order of calls and of streams, counts, dtype codes and pointers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distrib.comm.base import DONE, Handle
from distrib.faults.watchdog import Watchdog
from nn.array import Array
from nn.device import SideStream

DTYPE_CODES = {
    "int32": "NCCL_INT32",
    "int64": "NCCL_INT64",
    "float16": "NCCL_FLOAT16",
    "float32": "NCCL_FLOAT32",
    "float64": "NCCL_FLOAT64",
    "uint16": "NCCL_BFLOAT16",  # NumPy has no bfloat16: its bits travel as uint16
}


class _Event:
    """Makes the compute stream wait for the communication stream. The host does not wait."""

    def __init__(self, cuda: Any, event: Any) -> None:
        self._cuda, self._event = cuda, event

    def wait(self) -> None:
        self._cuda.get_current_stream().wait_event(self._event)


class NcclCommunicator:
    """Sums, broadcasts and barriers on device memory, in stream order.

    Overlapped sums run on a communication stream, which events join to the compute stream. The others (of
    batch norm) are queued on the compute stream. One communicator serves both, so all ranks issue collectives
    in the same order.
    """

    name, graph_safe, sums_bf16, staged = "nccl", True, True, False

    def __init__(
        self,
        control_comm: Any,
        cuda: Any,
        nccl: Any,
        device: int,
        watchdog: Watchdog,
        new_zero: Callable[[], Array],
        side_stream: SideStream | None = None,
    ) -> None:
        """Join the ranks of `control_comm` (mpi4py) into one NCCL communicator.

        The order matters: arm the watchdog, choose the device (NCCL binds to the current one), make the
        unique id on rank 0, broadcast it, barrier, init. Then one warm-up all-reduce of the array that
        `new_zero` makes lets NCCL connect its channels. Overlapped sums also wait for `side_stream`.
        """
        self.rank, self.size = int(control_comm.Get_rank()), int(control_comm.Get_size())
        self._control_comm, self._cuda, self._nccl = control_comm, cuda, nccl
        self._side_stream, self._watchdog = side_stream, watchdog
        self._comm: Any = None
        self.version = str(nccl.get_version())
        watchdog.on_expiry.append(self._abort_nccl)
        with watchdog.waiting("the set-up of NCCL"):
            cuda.Device(device).use()
            unique_id = control_comm.bcast(nccl.get_unique_id() if self.rank == 0 else None, root=0)
            control_comm.Barrier()
            self._comm = nccl.NcclCommunicator(self.size, unique_id, self.rank)
            self._comm_stream = cuda.Stream(non_blocking=True)
            self._computed = cuda.Event(disable_timing=True)
            self.all_reduce(new_zero())
            cuda.get_current_stream().synchronize()
        watchdog.checks.append(self._comm.check_async_error)

    def _code(self, x: Array) -> int:
        try:
            return int(getattr(self._nccl, DTYPE_CODES[str(x.dtype)]))
        except KeyError:
            raise ValueError(f"NCCL cannot sum arrays of dtype {x.dtype}") from None

    def _sum(self, x: Array, stream: Any) -> None:
        assert x.flags.c_contiguous
        pointer = x.data.ptr
        self._comm.allReduce(pointer, pointer, x.size, self._code(x), self._nccl.NCCL_SUM, stream.ptr)

    def all_reduce(self, x: Array, overlap: bool = False) -> Handle:
        compute = self._cuda.get_current_stream()
        if not overlap:
            self._sum(x, compute)
            return DONE
        compute.record(self._computed)
        self._comm_stream.wait_event(self._computed)
        if self._side_stream:
            self._side_stream.join(self._comm_stream)
        self._sum(x, self._comm_stream)
        done = self._cuda.Event(disable_timing=True)
        self._comm_stream.record(done)
        return _Event(self._cuda, done)

    def broadcast(self, x: Array, root: int = 0) -> None:
        assert x.flags.c_contiguous
        stream = self._cuda.get_current_stream()
        self._comm.broadcast(x.data.ptr, x.data.ptr, x.size, self._code(x), root, stream.ptr)

    def barrier(self) -> None:
        self._cuda.get_current_stream().synchronize()
        self._control_comm.Barrier()

    def _abort_nccl(self) -> None:
        if self._comm is not None:
            self._comm.abort()

    def abort(self) -> None:
        self._control_comm.Abort(1)  # not NCCL's abort, which waits for the CUDA graphs that hold its calls

    def close(self) -> None:
        """Release the communicator. Drop CUDA graphs that hold its calls first, or NCCL waits for them."""
        self._watchdog.forget_checks()
        with self._watchdog.waiting("the end of NCCL"):
            self._comm.destroy()
