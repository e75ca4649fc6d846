"""A device: its array library, its streams, and copies to and from the host."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nn.array import Array


def capture(cuda: Any, work: Callable[[], Any], copies: int = 1) -> Any:
    """What `copies` of `work` queue on the current stream and on those it forks and joins, as a CUDA graph.

    Nothing runs. The graph is on the device afterwards, so that its first launch is as fast as the next.
    """
    stream = cuda.get_current_stream()
    stream.begin_capture()
    try:
        for _ in range(copies):
            work()
    except BaseException:
        with contextlib.suppress(Exception):  # the capture is broken; the first error is the one to show
            stream.end_capture()
        raise
    graph = stream.end_capture()
    graph.upload(stream)
    return graph


class SideStream:
    """A second stream beside the compute stream, for work whose result is not needed at once.

    It is forked from the compute stream and joined to it by events, so that a CUDA graph holds both as
    parallel paths.
    """

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self.stream = cuda.Stream(non_blocking=True)
        self._forked, self._joined = (cuda.Event(disable_timing=True) for _ in range(2))
        self._open = False  # whether something was queued since the last `join_all`

    def fork(self) -> Any:
        """Context in which work is queued on this stream, after all that the compute stream queued so far."""
        self._cuda.get_current_stream().record(self._forked)
        self.stream.wait_event(self._forked)
        self._open = True
        return self.stream

    def join(self, stream: Any) -> None:
        """Let `stream` wait for what this one has queued."""
        if self._open:
            self.stream.record(self._joined)
            stream.wait_event(self._joined)

    def join_all(self) -> None:
        """Let the compute stream wait for all that was queued here."""
        self.join(self._cuda.get_current_stream())
        self._open = False


@dataclass(frozen=True)
class Backend:
    """An array library and the device behind it.

    `order` is the memory order of activations. On the host "HWNC": all pixels at one position lie together,
    so that shifted, strided and pooled views are contiguous runs of N·C elements. On a GPU "NHWC", which
    cuDNN's tensor-core kernels expect. `algorithms` are the device's own for convolution (see `nn.ops.conv`),
    tried in this order; `notes` are warnings to print at the start. `cuda` is the module `cupy.cuda` where a
    training step can be captured in a CUDA graph, else None; `stream` is CuPy's current stream, kept alive
    here, and `side_stream`, beside it, is where weight gradients are computed.
    """

    name: str
    xp: Any
    order: str = "NHWC"
    algorithms: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    cuda: Any = None
    stream: Any = None
    side_stream: SideStream | None = None

    @property
    def on_host(self) -> bool:
        return self.name == "numpy"

    def describe(self) -> dict[str, str]:
        """What besides the host must be the same for two runs to agree to the bit."""
        if self.cuda is None:
            return {}
        runtime = self.cuda.runtime
        gpu = runtime.getDeviceProperties(runtime.getDevice())["name"].decode()
        convolutions = self.algorithms.get("cudnn")
        return {
            "gpu": gpu,
            "cupy": self.xp.__version__,
            "cuda": str(runtime.runtimeGetVersion()),
            "cudnn": convolutions.version if convolutions else "none",
        }

    def place(self) -> Callable[[], Any]:
        """What gives another thread the context in which it works on this device and its compute stream."""
        if self.cuda is None:
            return contextlib.nullcontext
        cuda, stream, device = self.cuda, self.stream, self.cuda.runtime.getDevice()

        @contextlib.contextmanager
        def inside() -> Iterator[None]:
            with cuda.Device(device), stream:
                yield

        return inside

    def asarray(self, x: np.ndarray) -> Array:
        """Copy of the host array `x` on the device (on the host: `x` itself)."""
        return self.xp.asarray(x)

    def to_host(self, x: Array) -> np.ndarray:
        """`x` as a NumPy array; waits for the device."""
        return x if self.on_host else self.xp.asnumpy(x)

    def start_copy(self, x: Array) -> Callable[[], np.ndarray]:
        """Begin to copy `x`, as it is now, to the host; the function returned waits for the copy."""
        if self.cuda is None:
            host = self.to_host(x)
            return lambda: host
        pinned = self.cuda.alloc_pinned_memory(x.nbytes)
        host = np.frombuffer(pinned, x.dtype, x.size).reshape(x.shape)
        stream = self.cuda.get_current_stream()
        x.get(stream, out=host, blocking=False)
        copied = stream.record()

        def wait() -> np.ndarray:
            copied.synchronize()
            return host

        return wait


NUMPY = Backend("numpy", np, "HWNC")
