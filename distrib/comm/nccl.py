"""The communicator on device arrays, over NCCL, bootstrapped by MPI.

`cuda` and `nccl` are the modules `cupy.cuda` and `cupy.cuda.nccl`. They are passed in so that tests without a
GPU can check the order of calls and of streams, counts, dtype codes and pointers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distrib.comm.base import BF16, DONE, Handle, raised_by_all
from distrib.errors import UserError
from distrib.faults.watchdog import Watchdog
from nn.array import Array
from nn.device import SideStream

DTYPE_CODES = {
    "int8": "NCCL_INT8",
    "uint8": "NCCL_UINT8",
    "uint32": "NCCL_UINT32",
    "uint64": "NCCL_UINT64",
    "int32": "NCCL_INT32",
    "int64": "NCCL_INT64",
    "float16": "NCCL_FLOAT16",
    "float32": "NCCL_FLOAT32",
    "float64": "NCCL_FLOAT64",
}
OPERATIONS = {"sum": "NCCL_SUM", "max": "NCCL_MAX", "min": "NCCL_MIN", BF16: "NCCL_SUM"}


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
    _comm: Any = None

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

        An error of one rank is raised by all, as a UserError. Where others already wait for it inside NCCL,
        the watchdogs end the job, and that of the rank prints the error.
        """
        self.rank, self.size = int(control_comm.Get_rank()), int(control_comm.Get_size())
        self._control_comm, self._cuda, self._nccl, self._device = control_comm, cuda, nccl, device
        self._side_stream, self._watchdog, self._new_zero = side_stream, watchdog, new_zero
        with raised_by_all(control_comm, watchdog.waiting, "the choice of a GPU for NCCL"):
            self.version = str(nccl.get_version())
            cuda.Device(device).use()
            unique_id = nccl.get_unique_id() if self.rank == 0 else None
        watchdog.on_expiry.append(self._abort_nccl)
        try:
            with raised_by_all(control_comm, watchdog.waiting, "the set-up of NCCL"):
                self._connect(control_comm.bcast(unique_id, root=0))
        except UserError:
            watchdog.on_expiry.remove(self._abort_nccl)
            self._abort_nccl()
            raise
        self._check = self._comm.check_async_error
        watchdog.checks.append(self._check)

    def _connect(self, unique_id: Any) -> None:
        self._control_comm.Barrier()
        self._comm = self._nccl.NcclCommunicator(self.size, unique_id, self.rank)
        self._comm_stream = self._cuda.Stream(non_blocking=True)
        self._computed = self._cuda.Event(disable_timing=True)
        self._warm_up()

    def _warm_up(self) -> None:
        self.all_reduce(self._new_zero())
        self._cuda.get_current_stream().synchronize()

    def _code(self, x: Array, op: str = "sum") -> int:
        if op == BF16:
            assert x.dtype == "uint16"
            return int(self._nccl.NCCL_BFLOAT16)
        try:
            return int(getattr(self._nccl, DTYPE_CODES[str(x.dtype)]))
        except KeyError:
            raise ValueError(f"NCCL cannot sum arrays of dtype {x.dtype}") from None

    def _operation(self, op: str) -> int:
        return int(getattr(self._nccl, OPERATIONS[op]))

    def _reduce(self, x: Array, op: str, stream: Any) -> None:
        assert x.flags.c_contiguous
        pointer, code = x.data.ptr, self._code(x, op)
        self._comm.allReduce(pointer, pointer, x.size, code, self._operation(op), stream.ptr)

    def all_reduce(self, x: Array, overlap: bool = False, op: str = "sum") -> Handle:
        return self.start_reduce(x, op, overlap)

    def start_reduce(self, x: Array, op: str, overlap: bool = False) -> Handle:
        compute = self._cuda.get_current_stream()
        if not overlap:
            self._reduce(x, op, compute)
            return DONE
        compute.record(self._computed)
        self._comm_stream.wait_event(self._computed)
        if self._side_stream:
            self._side_stream.join(self._comm_stream)
        self._reduce(x, op, self._comm_stream)
        done = self._cuda.Event(disable_timing=True)
        self._comm_stream.record(done)
        return _Event(self._cuda, done)

    def broadcast(self, x: Array, root: int = 0) -> None:
        assert x.flags.c_contiguous
        stream, pointer = self._cuda.get_current_stream(), x.data.ptr  # bytes, whatever the type
        self._comm.broadcast(pointer, pointer, x.nbytes, self._nccl.NCCL_UINT8, root, stream.ptr)

    def start_broadcast(self, x: Array, root: int) -> Handle:
        self.broadcast(x, root)
        return DONE

    def start_gather(self, x: Array, into: Array) -> Handle:
        stream = self._cuda.get_current_stream()
        self._comm.allGather(x.data.ptr, into.data.ptr, x.size, self._code(x), stream.ptr)
        return DONE

    def start_scatter(self, x: Array, into: Array, op: str) -> Handle:
        stream, operation = self._cuda.get_current_stream(), self._operation(op)
        self._comm.reduceScatter(x.data.ptr, into.data.ptr, into.size, self._code(x), operation, stream.ptr)
        return DONE

    def start_exchange(
        self, send: Array | None, to: int | None, receive: Array | None, source: int | None
    ) -> Handle:
        stream = self._cuda.get_current_stream()
        self._nccl.groupStart()  # so that no rank has to send before it receives
        if send is not None:
            self._comm.send(send.data.ptr, send.size, self._code(send), to, stream.ptr)
        if receive is not None:
            self._comm.recv(receive.data.ptr, receive.size, self._code(receive), source, stream.ptr)
        self._nccl.groupEnd()
        return DONE

    def synchronize(self) -> None:
        self._cuda.get_current_stream().synchronize()

    def over(self, control_comm: Any) -> NcclCommunicator:
        return NcclCommunicator(
            control_comm,
            self._cuda,
            self._nccl,
            self._device,
            self._watchdog,
            self._new_zero,
            self._side_stream,
        )

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
        if self._comm is None:
            return
        self._watchdog.forget_check(self._check)
        self._watchdog.on_expiry.remove(self._abort_nccl)
        with self._watchdog.waiting("the end of NCCL"):
            self._comm.destroy()
        self._comm = None
