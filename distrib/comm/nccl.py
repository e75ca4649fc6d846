"""The communicator on device arrays, over NCCL, bootstrapped by MPI.

`cuda` and `nccl` are the modules `cupy.cuda` and `cupy.cuda.nccl`, passed in so that the order of calls,
counts, dtype codes, pointers and stream order can be tested on a machine without a GPU.
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
    """Waiting makes the compute stream wait for the communication stream; the host goes on at once."""

    def __init__(self, cuda: Any, event: Any) -> None:
        self._cuda, self._event = cuda, event

    def wait(self) -> None:
        self._cuda.get_current_stream().wait_event(self._event)


class NcclCommunicator:
    """Sums, broadcasts and barriers on device memory, in stream order.

    Overlapped reductions run on their own stream, joined to the compute stream by events; immediate ones
    (batch norm's sums) are queued on the compute stream itself. One communicator serves both, so the order
    in which ranks issue collectives is the same everywhere.
    """

    name, captures = "nccl", True

    def __init__(
        self,
        control: Any,
        cuda: Any,
        nccl: Any,
        device: int,
        watchdog: Watchdog,
        new_zero: Callable[[], Array],
        branch: SideStream | None = None,
    ) -> None:
        """Join `control`'s ranks (mpi4py) into one NCCL communicator.

        In this order: the watchdog is armed, the device is chosen (NCCL binds to the current one), rank 0
        makes the unique id, it is broadcast, a barrier, the init, and one warm-up all-reduce of the array
        that `new_zero` makes, in which NCCL connects its channels. What `branch` computes is waited for too
        before it is summed.
        """
        self.rank, self.size = int(control.Get_rank()), int(control.Get_size())
        self._control, self._cuda, self._nccl, self._branch = control, cuda, nccl, branch
        self._comm: Any = None
        self.version: int = nccl.get_version()
        self._watchdog = watchdog
        watchdog.on_expiry.append(self._abort_nccl)
        with watchdog.waiting("the set-up of NCCL"):
            cuda.Device(device).use()
            unique_id = control.bcast(nccl.get_unique_id() if self.rank == 0 else None, root=0)
            control.Barrier()
            self._comm = nccl.NcclCommunicator(self.size, unique_id, self.rank)
            self._beside = cuda.Stream(non_blocking=True)
            self._ready = cuda.Event(disable_timing=True)
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
        compute.record(self._ready)
        self._beside.wait_event(self._ready)
        if self._branch:
            self._branch.join(self._beside)
        self._sum(x, self._beside)
        done = self._cuda.Event(disable_timing=True)
        self._beside.record(done)
        return _Event(self._cuda, done)

    def broadcast(self, x: Array, root: int = 0) -> None:
        assert x.flags.c_contiguous
        stream = self._cuda.get_current_stream()
        self._comm.broadcast(x.data.ptr, x.data.ptr, x.size, self._code(x), root, stream.ptr)

    def barrier(self) -> None:
        self._cuda.get_current_stream().synchronize()
        self._control.Barrier()

    def _abort_nccl(self) -> None:
        if self._comm is not None:
            self._comm.abort()

    def abort(self) -> None:
        self._control.Abort(1)  # not NCCL's first: that waits for the CUDA graphs that hold its calls

    def close(self) -> None:
        """Release the communicator; CUDA graphs that hold its calls must be gone, as NCCL waits for their
        end."""
        self._watchdog.forget_checks()
        with self._watchdog.waiting("the end of NCCL"):
            self._comm.destroy()
