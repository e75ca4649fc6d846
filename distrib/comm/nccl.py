"""The communicator on device arrays, over NCCL, bootstrapped by MPI.

`cuda` and `nccl` are the modules `cupy.cuda` and `cupy.cuda.nccl`. They are passed in so that tests without a
GPU can check the order of calls and of streams, counts, dtype codes and pointers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from distrib.comm.base import BF16, DONE, Handle, raised_by_all
from distrib.comm.mpi import hears_of_death
from distrib.errors import RankLost
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

HEARING_TICK = 0.05
"""Seconds between two looks for a death, where the others may go on."""

PATIENCE = 15.0
"""Seconds after an error of NCCL's within which MPI tells of the death behind it."""


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
    _ended, _begun_to_fail = False, 0.0

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
        except Exception:
            self.abandon()
            raise

    def _connect(self, unique_id: Any) -> None:
        self._control_comm.Barrier()
        self._comm = self._nccl.NcclCommunicator(self.size, unique_id, self.rank)
        self._watchdog.checks.append(self._check)
        if self._watchdog.elastic:
            self._watchdog.tick = HEARING_TICK
        self.comm_stream = self._cuda.Stream(non_blocking=True)
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
        self._call(self._comm.allReduce, pointer, pointer, x.size, code, self._operation(op), stream.ptr)

    def all_reduce(self, x: Array, overlap: bool = False, op: str = "sum") -> Handle:
        return self.start_reduce(x, op, overlap)

    def start_reduce(self, x: Array, op: str, overlap: bool = False) -> Handle:
        compute = self._cuda.get_current_stream()
        if not overlap:
            self._reduce(x, op, compute)
            return DONE
        compute.record(self._computed)
        self.comm_stream.wait_event(self._computed)
        if self._side_stream:
            self._side_stream.join(self.comm_stream)
        self._reduce(x, op, self.comm_stream)
        done = self._cuda.Event(disable_timing=True)
        self.comm_stream.record(done)
        return _Event(self._cuda, done)

    def broadcast(self, x: Array, root: int = 0) -> None:
        assert x.flags.c_contiguous
        stream, pointer = self._cuda.get_current_stream(), x.data.ptr  # bytes, whatever the type
        self._call(self._comm.broadcast, pointer, pointer, x.nbytes, self._nccl.NCCL_UINT8, root, stream.ptr)

    def start_broadcast(self, x: Array, root: int) -> Handle:
        self.broadcast(x, root)
        return DONE

    def start_gather(self, x: Array, into: Array) -> Handle:
        stream = self._cuda.get_current_stream()
        self._call(self._comm.allGather, x.data.ptr, into.data.ptr, x.size, self._code(x), stream.ptr)
        return DONE

    def start_scatter(self, x: Array, into: Array, op: str) -> Handle:
        stream, operation = self._cuda.get_current_stream(), self._operation(op)
        ends = x.data.ptr, into.data.ptr
        self._call(self._comm.reduceScatter, *ends, into.size, self._code(x), operation, stream.ptr)
        return DONE

    def start_exchange(
        self, send: Array | None, to: int | None, receive: Array | None, source: int | None
    ) -> Handle:
        stream = self._cuda.get_current_stream()
        self._nccl.groupStart()  # so that no rank has to send before it receives
        try:
            if send is not None:
                self._call(self._comm.send, send.data.ptr, send.size, self._code(send), to, stream.ptr)
            if receive is not None:
                code = self._code(receive)
                self._call(self._comm.recv, receive.data.ptr, receive.size, code, source, stream.ptr)
        finally:
            self._call(self._nccl.groupEnd)
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

    def abandon(self) -> None:
        """After the death of a rank, end what is under way: on the device, all that waits for a sum goes on
        with whatever is there.

        Drop CUDA graphs that hold its calls, and wait for the device, before what they use is made anew.
        """
        self._leave_watchdog()
        if self._comm is not None:
            self._end()
            self._comm = None

    def _end(self) -> None:
        """Abort, in a thread: NCCL comes back from it once no CUDA graph holds its calls."""
        if not self._ended:
            self._ended = True
            threading.Thread(target=self._comm.abort, daemon=True).start()

    def _leave_watchdog(self) -> None:
        self._watchdog.forget_check(self._check)
        if self._abort_nccl in self._watchdog.on_expiry:
            self._watchdog.on_expiry.remove(self._abort_nccl)

    def _check(self) -> None:
        """Called again and again by the watchdog: raises NCCL's error, unless the death of a rank is behind
        it. Of that MPI tells, and then what hangs on the device is ended."""
        if self._ended:
            return
        if self._watchdog.elastic and hears_of_death(self._control_comm):
            self._watchdog.lost = True  # first, so that nobody trusts what the device goes on with
            self._end()
            return
        try:
            self._comm.check_async_error()
        except Exception:
            self._begun_to_fail = self._begun_to_fail or time.monotonic()
            if not self._watchdog.elastic or time.monotonic() > self._begun_to_fail + PATIENCE:
                raise

    def _call(self, function: Callable[..., None], *given: Any) -> None:
        """Call one of NCCL's functions, which may fail because another rank has died."""
        if self._ended and given:  # but a group that was started must end
            raise RankLost(function.__name__)
        try:
            function(*given)
        except Exception as error:
            end = time.monotonic() + PATIENCE
            while self._watchdog.elastic and not self._ended and time.monotonic() < end:
                time.sleep(HEARING_TICK)  # for the watchdog to hear of it
            if not self._ended:
                raise
            raise RankLost(function.__name__) from error

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
        self._leave_watchdog()
        with self._watchdog.waiting("the end of NCCL"):
            if not self._ended:
                self._comm.destroy()
        self._comm = None
