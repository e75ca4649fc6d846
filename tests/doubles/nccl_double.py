"""Doubles of `cupy.cuda` and `cupy.cuda.nccl` for tests without a GPU: NumPy arrays stand for device
memory, MPI stands for NCCL, and the order that streams and events impose can be checked by data.

* The compute stream (at first the null stream; later whichever stream was current at the last `Cuda.touch`
  or made current with `Stream.use`) runs at once: its kernels are the test's own NumPy statements.
* An NCCL call on another stream waits in that stream's queue. The queue runs, up to a point, when the stream
  or an event recorded there is synchronised or polled with `.done`, or when the compute, current or null
  stream waits for that event; any other stream's wait is queued too. Who forgets to wait reads stale data.
* Such a call raises `OrderError` unless its stream has waited, directly or through other streams, for an
  event recorded on the compute stream after the last `touch()`. Only events count: neither synchronising
  the host nor the null stream's implicit ordering does.

* Where a member of a collective has died, each member's device hangs there until `abort`: whatever waits for
  what was queued from then on waits for the abort. The collective leaves garbage, on which what was queued
  behind it runs; nobody can tell that this happens before the abort. `abort` comes back once no CUDA graph
  holds the communicator's calls.

Queued calls run as blocking MPI calls, so all ranks must wait, poll and synchronise in the same order, and
from one thread; a rank that does not makes the others hang, as it may with NCCL.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import operator
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from mpi4py import MPI

DTYPES = [
    "int8",
    "uint8",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float16",
    "float32",
    "float64",
    "uint16",
]  # by code
REDUCERS = [np.add, np.multiply, np.maximum, np.minimum, np.add]  # by code: sum, prod, max, min, avg
RESULTS = (
    "success",
    "unhandled CUDA error",
    "system error",
    "internal error",
    "invalid argument",
    "invalid usage",
    "remote error",
)
INVALID_ARGUMENT, INVALID_USAGE = 4, 5
SUPPORT = "OMPI_MCA_mpi_ft_enable"
"""Set by mpirun --with-ft ulfm."""


class OrderError(AssertionError):
    """The program relies on an order that it has not established."""


class NcclError(RuntimeError):
    """As CuPy's: `status` is the ncclResult_t. The double adds what was wrong."""

    def __init__(self, status: int, why: str = "raised by the test") -> None:
        self.status = status
        name = RESULTS[status].upper().replace(" ", "_")
        super().__init__(f"NCCL_ERROR_{name}: {RESULTS[status]} ({why})")


def _bound(base: type, **attributes: object) -> Any:
    """The class `_X` as the class `X` of one `Cuda` or `Nccl`."""
    return type(base.__name__[1:], (base,), attributes)


def wait_for_abort(hung: threading.Event | None) -> None:
    """Wait as the host does for a device that hangs."""
    if hung is not None:
        assert hung.wait(600), "nobody has aborted NCCL"


def is_loss(error: Exception) -> bool:
    """Whether MPI says that a rank has died."""
    from mpi4py import MPI

    lost = MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED, MPI.ERR_OTHER
    return isinstance(error, MPI.Exception) and error.Get_error_class() in lost


class _Event:
    """`cupy.cuda.Event`; one that was never recorded is done, as in CUDA."""

    cuda: Cuda

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        if interprocess and not disable_timing:
            raise ValueError("Timing must be disabled for interprocess events")
        self.ptr = next(self.cuda.handles)
        self.stream, self.position, self.seen = self.cuda.Stream.null, 0, 0
        self.behind: threading.Event | None = None

    def record(self, stream: _Stream | None = None) -> None:
        self.stream = stream = stream or self.cuda.current
        self.position, self.behind = len(stream.work), self.cuda.hung
        self.seen = self.cuda.touches if stream is self.cuda.compute else stream.seen
        self.cuda.log.append(("record", stream.ptr, self.ptr))

    def synchronize(self) -> None:
        self.cuda.log.append(("synchronize", self.ptr))
        before = self.cuda.hung
        self.stream.run(self.position)
        wait_for_abort(self.behind if self.cuda.hung is before else self.cuda.hung)

    @property
    def done(self) -> bool:
        self.synchronize()
        return True


class _Stream:
    """`cupy.cuda.Stream`. `ran` items of `work` are done; `seen` is the last touch it is ordered after."""

    cuda: Cuda
    null: _Stream | None = None
    ptr: int
    work: list[Callable[[], None]]
    ran = seen = 0

    def __new__(cls, null: bool = False, non_blocking: bool = False) -> _Stream:
        if null and cls.null:
            return cls.null
        self = super().__new__(cls)
        self.ptr = 0 if null else next(cls.cuda.handles)
        self.work = []
        cls.cuda.streams[self.ptr] = self
        return self

    def run(self, upto: int | None = None) -> None:
        """Run the queue up to a position, or all of it."""
        while self.ran < (len(self.work) if upto is None else upto):
            self.ran += 1
            self.work[self.ran - 1]()

    def record(self, event: _Event | None = None) -> _Event:
        event = event or self.cuda.Event()
        event.record(self)
        return event

    def wait_event(self, event: _Event) -> None:
        self.cuda.log.append(("wait_event", self.ptr, event.ptr))
        self.seen = max(self.seen, event.seen)
        stream, position = event.stream, event.position  # a later record() does not move this wait
        if self in (self.null, self.cuda.current, self.cuda.compute):
            stream.run(position)
        else:
            self.work.append(lambda: stream.run(position))

    def synchronize(self) -> None:
        self.cuda.log.append(("synchronize", self.ptr))
        self.run()
        wait_for_abort(self.cuda.hung)

    @property
    def done(self) -> bool:
        self.synchronize()
        return True

    def use(self) -> _Stream:
        self.run()
        self.cuda.current = self.cuda.compute = self
        return self

    def __enter__(self) -> _Stream:
        self.cuda.entered.append(self)
        self.cuda.current = self
        return self

    def __exit__(self, *exc: object) -> None:
        """What was entered before is current again; CuPy forgets what `use` made current in between."""
        self.cuda.entered.pop()
        self.cuda.current = self.cuda.entered[-1] if self.cuda.entered else self.null


class _Device:
    """`cupy.cuda.Device`; `Device()` is the current one."""

    cuda: Cuda

    def __init__(self, device: int | None = None) -> None:
        self.id: int = (self.cuda.device or 0) if device is None else device

    def use(self) -> None:
        self.cuda.setDevice(self.id)

    def __enter__(self) -> _Device:
        self.cuda.outer.append(self.cuda.device)
        self.use()
        return self

    def __exit__(self, *exc: object) -> None:
        self.cuda.device = self.cuda.outer.pop()


class Cuda:
    """Stands for the module `cupy.cuda`, and for its `runtime`. `device` is None until one was chosen."""

    def __init__(self, log: list, devices: int = 1) -> None:
        self.log, self.devices, self.runtime = log, devices, self
        self.device: int | None = None
        self.touches = 0
        self.handles = itertools.count(0x1000, 0x10)
        self.streams: dict[int, _Stream] = {}
        self.outer: list[Any] = []  # devices that leaving the open `with` blocks makes current again
        self._thread = threading.local()
        self.graphs: Any = weakref.WeakSet()  # those alive whose captures hold NCCL calls
        self.hung: threading.Event | None = None  # set by the abort that ends it
        self.Event = _bound(_Event, cuda=self)
        self.Stream = _bound(_Stream, cuda=self)
        self.Device = _bound(_Device, cuda=self)
        self.compute = self.Stream.null = self.Stream(null=True)

    @property
    def current(self) -> _Stream:
        """Of the calling thread: the null stream until it makes another one current."""
        return getattr(self._thread, "current", self.Stream.null)

    @current.setter
    def current(self, stream: _Stream) -> None:
        self._thread.current = stream

    @property
    def entered(self) -> list[Any]:
        """Streams in this thread's open `with` blocks."""
        return self._thread.__dict__.setdefault("entered", [])

    def touch(self) -> None:
        """The test says: the current stream, henceforth the compute stream, has just written gradients."""
        self.touches += 1
        self.compute = self.current

    def get_current_stream(self, device_id: int = -1) -> _Stream:
        return self.current

    def deviceSynchronize(self) -> None:
        for stream in list(self.streams.values()):
            stream.run()
        wait_for_abort(self.hung)

    def getDeviceCount(self) -> int:
        return self.devices

    def getDevice(self) -> int:
        return self.device or 0

    def deviceGetPCIBusId(self, device: int) -> str:
        return f"0000:{device:02x}:00.0"

    def getDeviceProperties(self, device: int) -> dict[str, bytes]:
        return {"name": b"Double", "uuid": bytes([device])}

    def setDevice(self, device: int) -> None:
        self.log.append(("setDevice", device))
        if not 0 <= device < self.devices:
            raise RuntimeError(f"cudaErrorInvalidDevice: invalid device ordinal ({device})")
        self.device = device


def _from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


class Call(NamedTuple):
    """One NCCL call, as logged: a tuple, name first. `root` is also the peer of a send or recv."""

    name: str
    sendbuf: int
    recvbuf: int
    elements: int  # the argument `count`
    datatype: int
    stream: int
    op: int = 0
    root: int = 0


def host_view(pointer: int, count: int, datatype: int) -> np.ndarray:
    """`count` elements of host memory at `pointer` as a writable array."""
    dtype: np.dtype = np.dtype(DTYPES[datatype])
    if count == 0:
        return np.empty(0, dtype)
    if pointer == 0:
        raise NcclError(INVALID_ARGUMENT, "null pointer")
    memory = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(pointer)
    return np.ctypeslib.as_array(memory).view(dtype)


class _NcclCommunicator:
    """`cupy.cuda.nccl.NcclCommunicator` of CuPy 14, whose id is `bytes`."""

    nccl: Nccl

    def __init__(self, ndev: int, commId: bytes, rank: int, config: object = None) -> None:
        mpi, device = self.nccl.mpi, self.nccl.cuda.device
        self.nccl.log.append(("NcclCommunicator", ndev, commId, rank))
        if not isinstance(commId, bytes):
            raise TypeError(f"Argument 'commId' has incorrect type (expected bytes, got {type(commId)})")
        if len(commId) != 128:
            raise ValueError(f"commId length {len(commId)} != 128.")
        self._mpi = mpi if ndev == mpi.size else self._meet(ndev, commId, rank)
        mpi = self._mpi
        gpu = self.nccl.gpu or (mpi.rank, device)
        ranks = mpi.allgather((commId, (ndev, rank) == (mpi.size, mpi.rank), device is not None))
        shared = len(set(mpi.allgather(gpu))) < mpi.size
        if not all(chosen for _, _, chosen in ranks):
            raise OrderError("a communicator was made before a device was chosen")
        if not all(fits for _, fits, _ in ranks):
            raise NcclError(INVALID_ARGUMENT, f"rank {rank} of {ndev}; in MPI {mpi.rank} of {mpi.size}")
        if len({unique_id for unique_id, _, _ in ranks}) > 1:
            raise NcclError(INVALID_USAGE, "the unique id differs between ranks")
        if shared and (self.nccl.version < 23000 or os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1"):
            raise NcclError(INVALID_USAGE, "Duplicate GPU detected")
        self._rank, self._size, self._device, self._live = rank, ndev, device, True
        self._ending = threading.Lock()

    def _meet(self, ndev: int, unique_id: bytes, rank: int) -> MPI.Intracomm:
        """The MPI communicator of the `ndev` ranks that have the id, whose first byte is its maker's rank."""
        mpi, maker, tag = self.nccl.mpi, unique_id[0], unique_id[1]
        sent = [mpi.isend((rank, mpi.rank), maker, tag)]
        if mpi.rank == maker:
            members = [where for _, where in sorted(mpi.recv(tag=tag) for _ in range(ndev))]
            sent += [mpi.isend(members, member, tag + 256) for member in members]
        members = mpi.recv(source=maker, tag=tag + 256)
        for request in sent:
            request.wait()
        return mpi.Create_group(mpi.group.Incl(members), tag)

    def allReduce(self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, stream: int) -> None:
        self._submit(Call("allReduce", sendbuf, recvbuf, count, datatype, stream, op))

    def reduce(
        self, sendbuf: int, recvbuf: int, count: int, datatype: int, op: int, root: int, stream: int
    ) -> None:
        self._submit(Call("reduce", sendbuf, recvbuf, count, datatype, stream, op, root))

    def broadcast(
        self, sendbuff: int, recvbuff: int, count: int, datatype: int, root: int, stream: int
    ) -> None:
        self._submit(Call("broadcast", sendbuff, recvbuff, count, datatype, stream, root=root))

    def bcast(self, buff: int, count: int, datatype: int, root: int, stream: int) -> None:
        self._submit(Call("bcast", buff, buff, count, datatype, stream, root=root))

    def reduceScatter(
        self, sendbuf: int, recvbuf: int, recvcount: int, datatype: int, op: int, stream: int
    ) -> None:
        self._submit(Call("reduceScatter", sendbuf, recvbuf, recvcount, datatype, stream, op))

    def allGather(self, sendbuf: int, recvbuf: int, count: int, datatype: int, stream: int) -> None:
        self._submit(Call("allGather", sendbuf, recvbuf, count, datatype, stream))

    def send(self, sendbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._submit(Call("send", sendbuf, 0, count, datatype, stream, root=peer))

    def recv(self, recvbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._submit(Call("recv", 0, recvbuf, count, datatype, stream, root=peer))

    def rank_id(self) -> int:
        return self._live_value(self._rank)

    def size(self) -> int:
        return self._live_value(self._size)

    def device_id(self) -> int:
        return self._live_value(self._device)

    def check_async_error(self) -> None:
        self.nccl.log.append(("check_async_error",))
        if self._live_value(self.nccl.async_status):
            raise NcclError(self.nccl.async_status)

    def abort(self) -> None:
        """Give up what is queued; then its buffers stay as they are."""
        self.nccl.log.append(("abort",))
        with self._ending:
            self._live, hung = False, self.nccl.cuda.hung
            self.nccl.cuda.hung = None
        if SUPPORT in os.environ:
            self._mpi.Revoke()  # so that a collective under way ends
        if hung:
            hung.set()
        graphs = [weakref.ref(graph) for graph in list(self.nccl.cuda.graphs)]
        while any(graph() for graph in graphs):
            time.sleep(0.01)

    def tear(self, call: Call) -> None:
        """A member has died: the device hangs in this call, which leaves garbage."""
        with self._ending:
            if self._live and self.nccl.cuda.hung is None:
                self.nccl.cuda.hung = threading.Event()
        self._mpi.Revoke()  # the others hang, too
        if call.recvbuf:
            elements = call.elements * (self._size if call.name == "allGather" else 1)
            host_view(call.recvbuf, elements, call.datatype).view(np.uint8)[...] = 0x4B

    def destroy(self) -> None:
        """Run all that is queued, then refuse further calls. The real one waits for ever while a graph holds
        its calls."""
        self.nccl.log.append(("destroy",))
        gc.collect()
        if list(self.nccl.cuda.graphs):
            raise OrderError("a communicator is destroyed while a CUDA graph holds its calls")
        for stream in list(self.nccl.cuda.streams.values()) if self._live else ():
            stream.run()
        self._live = False

    def _live_value(self, value: Any) -> Any:
        if not self._live:
            raise NcclError(INVALID_ARGUMENT, "the communicator was aborted or destroyed")
        return value

    def _submit(self, call: Call) -> None:
        """Check a call as far as one rank can, then hand it on."""
        call = Call(call.name, *map(operator.index, call[1:]))
        self.nccl.log.append(call)
        if call.elements < 0:
            raise OverflowError("can't convert negative value to size_t")
        valid = (
            call.datatype in range(len(DTYPES))
            and call.op in range(len(REDUCERS))
            and call.root in range(self._size)
            and call.stream in self.nccl.cuda.streams
        )
        if not self._live_value(valid):
            raise NcclError(INVALID_ARGUMENT, f"unknown datatype, op, root, peer or stream: {call}")
        self.nccl.submit(self, call)

    def run(self, call: Call) -> list[MPI.Request]:
        """Carry out a call that was queued; return what to wait for at the end of its group."""
        if not self._live:
            return []
        mpi = self._mpi
        self.nccl.log.append(("run", call.name, call.elements, call.stream))
        if call.name in ("send", "recv"):
            data = host_view(call.sendbuf or call.recvbuf, call.elements, call.datatype).view(np.uint8)
            return [(mpi.Isend if call.name == "send" else mpi.Irecv)(data, call.root)]
        calls = mpi.allgather((call.name, *call[3:5], call.op, call.root))
        if len(set(calls)) > 1:
            raise OrderError(f"ranks run different collectives (name, count, datatype, op, root): {calls}")
        result = self._result(call) if call.elements else np.empty(0)
        if call.name != "reduce" or call.root == mpi.rank:
            host_view(call.recvbuf, result.size, call.datatype)[:] = result
        return []

    def _result(self, call: Call) -> np.ndarray:
        """What the collective leaves in a receive buffer; reductions go in rank order and keep the dtype."""
        mpi = self._mpi
        if call.name in ("broadcast", "bcast"):
            source = call.sendbuf if call.root == mpi.rank else call.recvbuf
            data = host_view(source, call.elements, call.datatype).copy()
            mpi.Bcast(data.view(np.uint8), call.root)
            return data
        elements = call.elements * (mpi.size if call.name == "reduceScatter" else 1)
        rows = np.empty((mpi.size, elements), DTYPES[call.datatype])
        mpi.Allgather(host_view(call.sendbuf, elements, call.datatype).view(np.uint8), rows.view(np.uint8))
        if call.name == "allGather":
            return rows.ravel()
        if (
            call.datatype == Nccl.NCCL_BFLOAT16 and call.op == Nccl.NCCL_SUM
        ):  # one rounding after another, in rank order
            total = rows[0]
            for row in rows[1:]:
                total = _to_bfloat16(_from_bfloat16(total) + _from_bfloat16(row))
            return total
        total = REDUCERS[call.op].reduce(rows, axis=0, dtype=rows.dtype)
        if call.op == Nccl.NCCL_AVG:
            total = total / mpi.size if rows.dtype.kind == "f" else total // mpi.size
        return total.reshape(mpi.size, -1)[mpi.rank] if call.name == "reduceScatter" else total


class Nccl:
    """Stands for the module `cupy.cuda.nccl`; set `async_status` to have `check_async_error` raise it."""

    (
        NCCL_INT8,
        NCCL_UINT8,
        NCCL_INT32,
        NCCL_UINT32,
        NCCL_INT64,
        NCCL_UINT64,
        NCCL_FLOAT16,
        NCCL_FLOAT32,
        NCCL_FLOAT64,
        NCCL_BFLOAT16,
    ) = range(10)
    NCCL_CHAR, NCCL_INT, NCCL_HALF, NCCL_FLOAT, NCCL_DOUBLE = 0, 2, 6, 7, 8
    NCCL_SUM, NCCL_PROD, NCCL_MAX, NCCL_MIN, NCCL_AVG = range(5)
    NcclError = NcclError
    available = True

    def __init__(self, mpi_comm: MPI.Intracomm, cuda: Cuda, log: list) -> None:
        self.mpi, self.cuda, self.log = mpi_comm.Dup(), cuda, log
        self.async_status, self.depth, self.version = 0, 0, 22501
        self.gpu: str | None = None  # which one a rank has; None: one of its own
        self._group: list[tuple[_NcclCommunicator, Call]] = []
        self.NcclCommunicator = _bound(_NcclCommunicator, nccl=self)

    def get_version(self) -> int:
        return self.version

    def get_unique_id(self) -> bytes:
        self.log.append(("get_unique_id",))
        return bytes([self.mpi.rank]) + os.urandom(127)

    def groupStart(self) -> None:
        self.log.append(("groupStart",))
        self.depth += 1

    def groupEnd(self) -> None:
        """Queue the calls since the outermost `groupStart` as one batch; they must share a stream."""
        self.log.append(("groupEnd",))
        if self.depth == 0:
            raise NcclError(INVALID_USAGE, "groupEnd without groupStart")
        self.depth -= 1
        if self.depth == 0:
            self._enqueue()

    def submit(self, comm: _NcclCommunicator, call: Call) -> None:
        """Queue one call, or keep it for the end of the group."""
        self._group.append((comm, call))
        if self.depth == 0:
            self._enqueue()

    def _enqueue(self) -> None:
        batch, self._group = self._group, []
        if len({call.stream for _, call in batch}) > 1:
            raise NotImplementedError(f"a group on several streams: {batch}")
        if not batch:
            return
        name, stream = batch[0][1].name, self.cuda.streams[batch[0][1].stream]
        if stream is not self.cuda.compute and stream.seen < self.cuda.touches:
            raise OrderError(
                f"{name} on stream {stream.ptr:#x} would read memory the compute stream may still be writing"
            )
        stream.work.append(lambda: self._run(batch))
        if stream is self.cuda.compute:
            stream.run()

    def _run(self, batch: list[tuple[_NcclCommunicator, Call]]) -> None:
        requests: list[MPI.Request] = []
        try:
            for comm, call in batch:
                requests += comm.run(call)
            for request in requests:
                request.Wait()
        except Exception as error:
            if not is_loss(error):
                raise
            for comm, call in batch:
                comm.tear(call)
            for request in requests:  # until MPI leaves the buffers alone
                with contextlib.suppress(Exception):
                    request.Wait()
