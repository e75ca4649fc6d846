"""A whole GPU on the CPU: CuPy's arrays, streams and graphs, this project's kernels, cuDNN and NCCL, as
doubles.

With DISTRIB_TEST_GPU=1 in the environment `device` gives the real GPU instead, and the same tests run on it.
What is queued on the compute stream runs at once, what is queued on another when that is waited for; while a
stream captures it goes into the graph and runs when that is launched, and operations on arrays are refused.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
from cuda_double import HostModule
from cudnn_double import Cuda as _Cuda
from cudnn_double import Cudnn, _pygraph, data_type
from nccl_double import DTYPES, Call, Nccl, OrderError, _bound, _Event, _Stream, is_loss, wait_for_abort
from needs import REAL_GPU as REAL
from strict_array import CaptureError, StrictArray, only_views, strict, synchronisation

from nn.array import register
from nn.cuda import cudnn
from nn.cuda.backend import cupy_backend
from nn.cuda.cudnn import Convolutions
from nn.cuda.kernels import Kernels
from nn.cuda.ops import CudaOps
from nn.cuda.stem import Stem
from nn.device import Backend, SideStream

PLANS: dict[str, dict[str, str]] = {}
double_only = pytest.mark.needs("double")
needs_device = pytest.mark.needs(*([] if REAL else ["g++"]))
"""Of a test that calls `device`: the double's kernels are compiled by g++."""


class Graph:
    """What was queued during a capture; `depth` of it can only run one after another."""

    uploaded = False

    def __init__(self, cuda: Cuda, work: list[Callable[[], None]], depth: int) -> None:
        self.cuda, self.work, self.depth = cuda, work, depth
        if cuda.holds_collectives:
            cuda.graphs.add(self)
        cuda.holds_collectives = False

    def launch(self, stream: Any = None) -> None:
        assert self.cuda.captured is None, "a graph is not launched into a capture"
        for call in self.work:
            call()

    def upload(self, stream: Any = None) -> None:
        assert self.cuda.captured is None, "a graph is not uploaded into a capture"
        self.uploaded = True


class _CapturingEvent(_Event):
    """Of which capture it is, and what of each stream's captured work it stands for."""

    cuda: Cuda
    capture: object = None
    covers: ClassVar[dict[int, int]] = {}
    depth = 0

    def record(self, stream: Any = None) -> None:
        stream = stream or self.cuda.current
        super().record(stream)
        self.capture = self.cuda.capture if stream.ptr in self.cuda.covers else None
        self.covers = dict(self.cuda.covers.get(stream.ptr, {}))
        self.depth = self.cuda.depths.get(stream.ptr, 0)

    def synchronize(self) -> None:
        assert self.capture is None, "an event of a capture cannot be waited for: cudaErrorCapturedEvent"
        super().synchronize()


class _CapturingStream(_Stream):
    cuda: Cuda
    _views: Any = None

    def begin_capture(self, mode: int | None = None) -> None:
        assert self is self.cuda.current is not self.null, "the default stream cannot be captured"
        self.cuda.captured, self._views = [], only_views()
        self.cuda.capture, self.cuda.covers, self.cuda.depths = object(), {self.ptr: {}}, {}
        self.cuda.touched = []
        self._views.__enter__()

    def end_capture(self) -> Graph:
        work, self.cuda.captured = self.cuda.captured, None
        covers, self.cuda.capture, self.cuda.covers = self.cuda.covers, None, {}
        self._views.__exit__(None, None, None)
        assert work is not None, "no capture was begun"
        joined = covers[self.ptr]
        unjoined = [ptr for ptr, own in covers.items() if own.get(ptr, 0) > joined.get(ptr, 0)]
        if unjoined:
            raise CaptureError("a fork was not joined: cudaErrorStreamCaptureUnjoined")
        return Graph(self.cuda, work, self.cuda.depths.get(self.ptr, 0))

    def synchronize(self) -> None:
        assert self.cuda.captured is None, "a capture cannot be waited for"
        super().synchronize()

    def wait_event(self, event: Any) -> None:
        outside = self.ptr not in self.cuda.covers and event.capture is None
        if self.cuda.captured is None or outside:
            super().wait_event(event)
            return
        if event.capture is not self.cuda.capture:
            raise CaptureError("an event from outside the capture: cudaErrorStreamCaptureIsolation")
        self.seen = max(self.seen, event.seen)  # in a graph the order of queueing stands for the events
        own = self.cuda.covers.setdefault(self.ptr, {})
        for ptr, count in event.covers.items():
            own[ptr] = max(own.get(ptr, 0), count)
        depths = self.cuda.depths
        depths[self.ptr] = max(depths.get(self.ptr, 0), event.depth)


def _overlap(some: list[range], others: list[range]) -> bool:
    return any(max(a.start, b.start) < min(a.stop, b.stop) for a in some for b in others)


class Nvtx:
    """`cupy.cuda.nvtx`: ranges that were opened, in order, and how many are open."""

    def __init__(self) -> None:
        self.ranges: list[tuple[str, int]] = []
        self.depth = 0

    def RangePush(self, name: str, id_color: int = -1) -> None:
        self.ranges.append((name, self.depth))
        self.depth += 1

    def RangePop(self) -> None:
        assert self.depth, "no range is open"
        self.depth -= 1


class Cuda(_Cuda):
    """`cupy.cuda` with captures. `captured` is what the capture under way holds, None outside one."""

    def __init__(self) -> None:
        super().__init__()
        self.captured: list[Callable[[], None]] | None = None
        self.capture: object = None
        self.covers: dict[int, dict[int, int]] = {}
        """By stream of the capture: how much of each stream's captured work it comes after."""
        self.depths: dict[int, int] = {}
        """By stream of the capture: how much of what it holds can only run one after another."""
        self.touched: list[tuple[int, int, list[range], list[range]]] = []
        """What the capture holds: stream, number on it, memory read and written."""
        self.holds_collectives = False
        self.Event = type("Event", (_CapturingEvent, self.Event), {"cuda": self})
        self.Stream = _bound(_CapturingStream, cuda=self)
        self.compute = self.Stream.null = self.Stream(null=True)
        self.nvtx = Nvtx()
        self.stream = self.Stream(non_blocking=True)
        self.stream.__enter__()  # as `cupy_backend` does
        self.compute = self.stream

    def queue(self, work: Callable[[], None], reads: list[range], writes: list[range]) -> None:
        """Run `work`, let the capture have it, or on another stream than the compute stream leave it until
        awaited. `reads` and `writes` are the memory that it touches.

        So a graph runs a branch as early as can be and an eager step as late: where both give the same bits,
        nothing that the branch reads or writes was touched in between.
        """
        work = partial(self._run_on, self.current, work)
        if self.captured is not None:
            own = self.covers.get(self.current.ptr)
            if own is None:
                raise CaptureError("work on a stream outside the capture: cudaErrorStreamCaptureImplicit")
            own[self.current.ptr] = own.get(self.current.ptr, 0) + 1
            self.depths[self.current.ptr] = self.depths.get(self.current.ptr, 0) + 1
            self._check_order(own, reads, writes)
            self.captured.append(work)
        elif self.current is self.compute:
            work()
        else:
            self.current.work.append(work)

    def _check_order(self, own: dict[int, int], reads: list[range], writes: list[range]) -> None:
        """CaptureError where another stream of the capture may use the same memory at the same time."""
        for ptr, count, other_reads, other_writes in self.touched:
            ordered = own.get(ptr, 0) >= count  # of the current stream: all
            if not ordered and (
                _overlap(writes, other_reads + other_writes) or _overlap(reads, other_writes)
            ):
                raise CaptureError("two streams use the same memory, and no event orders them")
        self.touched.append((self.current.ptr, own[self.current.ptr], reads, writes))

    def _run_on(self, stream: Any, work: Callable[[], None]) -> None:
        """Run `work` with `stream` as the current one, as it was when the work was queued."""
        outer, self.current = self.current, stream
        try:
            work()
        finally:
            self.current = outer

    def alloc(self, size: int) -> Any:
        assert self.captured is None, "an allocation during a capture"
        return super().alloc(size)

    def memsetAsync(self, ptr: int, value: int, size: int, stream: int) -> None:
        self.queue(partial(super().memsetAsync, ptr, value, size, stream), [], [range(ptr, ptr + size)])


class _CapturedPygraph(_pygraph):
    def execute(self, tensor_dict: dict, workspace: Any = None, handle: Any = None) -> None:
        self.cudnn.check(handle)
        spans = [
            range(start, start + 2 * math.prod(t.dim) * (1 if t.data_type is data_type.BFLOAT16 else 2))
            for t in self.tensors
            if (start := tensor_dict.get(t.uid))
        ]
        scratch = [range(workspace, workspace + self.get_workspace_size())] if workspace else []
        work = partial(super().execute, tensor_dict, workspace, handle)
        self.cudnn.cuda.queue(work, spans[:2], spans[2:] + scratch)


class CapturedCudnn(Cudnn):
    """cuDNN's double whose executions go into captures too."""

    def __init__(self, cuda: Cuda, offers: list[Any] | None = None) -> None:
        super().__init__(cuda, offers)
        self.pygraph = type("pygraph", (_CapturedPygraph,), {"cudnn": self})


class CapturedNccl(Nccl):
    """NCCL's double whose collectives go into captures too."""

    cuda: Cuda

    def _enqueue(self) -> None:
        if self.cuda.captured is None:
            streams = {call.stream for _, call in self._group}
            super()._enqueue()
            for stream in streams:  # as early as can be: what it should have waited for is not there yet
                self.cuda.streams[stream].run()
            return
        batch, self._group = self._group, []
        if not batch:
            return
        stream, reads, writes = self.cuda.streams[batch[0][1].stream], [], []
        assert stream is self.cuda.compute or stream.seen >= self.cuda.touches, (
            "a branch of the graph is not joined"
        )
        for _, call in batch:
            assert call.stream == stream.ptr, "a group on several streams"
            if call.name not in ("send", "recv"):
                self._compare(call)
            size = call.elements * np.dtype(DTYPES[call.datatype]).itemsize
            gathered = size * self.mpi.size if call.name == "allGather" else size
            reads += [range(call.sendbuf, call.sendbuf + size)] if call.sendbuf else []
            writes += [range(call.recvbuf, call.recvbuf + gathered)] if call.recvbuf else []
        with stream:
            self.cuda.queue(partial(self._run, batch), reads, writes)
        self.cuda.holds_collectives = True

    def _compare(self, call: Call) -> None:
        """OrderError unless all ranks capture the same call; when one has died, the graph hangs later."""
        try:
            calls = self.mpi.allgather(("captured", call.name, *call[3:5], call.op, call.root))
        except Exception as error:
            if not is_loss(error):
                raise
            self.mpi.Revoke()
        else:
            if len(set(calls)) > 1:
                raise OrderError(f"ranks capture different collectives, or not together: {calls}")


class _Module:
    """The kernels of one source; launches pass through `Cuda.queue`."""

    def __init__(self, cuda: Cuda, module: HostModule, launched: list[str]) -> None:
        self.cuda, self.module, self.launched = cuda, module, launched

    def get_function(self, name: str) -> Callable[..., None]:
        function = self.module.get_function(name)

        def launch(grid: tuple, block: tuple, arguments: tuple) -> None:
            self.launched.append(name)
            reads, writes = function.memory(arguments)
            self.cuda.queue(partial(function, grid, block, arguments), reads, writes)

        return launch


if not REAL:
    cudnn.WARM_UP_SECONDS = 0.0  # the double's clock is always at its highest


@dataclass(frozen=True)
class DoubleBackend(Backend):
    """The one place where the device is waited for is `to_host`."""

    launched: Any = None

    def describe(self) -> dict[str, str]:
        return {"gpu": "double"}

    def to_host(self, x: StrictArray) -> np.ndarray:
        wait_for_abort(self.cuda.hung)
        with synchronisation():
            return self.xp.asnumpy(x)

    def start_copy(self, x: StrictArray) -> Callable[[], np.ndarray]:
        assert self.cuda.captured is None, "no pinned memory is taken during a capture"
        with synchronisation():
            host, hung = x.get(), self.cuda.hung

        def wait() -> np.ndarray:
            wait_for_abort(hung)
            return host

        return wait


@contextlib.contextmanager
def device(precision: str = "float64", races: bool = False, order: str = "forward") -> Iterator[Any]:
    """A backend whose arrays are StrictArrays, with kernels and, where the precision allows, cuDNN; or the
    real GPU. `races` and `order` as in `HostModule`."""
    if REAL:
        backend = cupy_backend(precision)
        if (
            "cudnn" in backend.algorithms
        ):  # one choice of plans for all backends of a process, or their bits may differ
            backend.algorithms["cudnn"].plans = PLANS.setdefault(precision, {})
        yield backend
        return
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(cudnn, "ROUNDS", 1)  # the double's clock does not vary
    monkeypatch.setattr(cudnn, "LAUNCHES", 1)
    cuda, launched = Cuda(), []  # type: ignore[var-annotated]
    kernels = Kernels(lambda code: _Module(cuda, HostModule(code, order, races=races), launched))
    operations = CudaOps(kernels)
    register(StrictArray, strict, operations.by_name())
    side_stream = SideStream(cuda)
    algorithms: dict[str, Any] = {"stem": Stem(kernels)}
    if precision != "float64":
        algorithms["cudnn"] = Convolutions(
            CapturedCudnn(cuda), cuda, precision, operations.from_bf16, side_stream
        )
    try:
        yield DoubleBackend(
            "double", strict, "NHWC", algorithms, (), cuda, cuda.stream, side_stream, launched
        )
    finally:
        monkeypatch.undo()
        register(StrictArray, strict)
