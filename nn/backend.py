"""Which array library: the only place that imports CuPy.

Layer code asks `namespace(x)` for the module that `x` belongs to and calls the same functions on
either.  Activations are *indexed* as N×H×W×C everywhere; how they lie in *memory* is the backend's
choice (see `Backend.order`), since each device has a layout that suits it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.metadata
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or cupy.ndarray; NumPy's stubs cannot express "either"

HOST_BLOCK = 1 << 18
"""Elements of one block of an element-wise pass on the host: 1 MiB of float32, well inside the L3 cache.

Blocks that fit the L2 cache lose more to the cost of a NumPy call (about 1.5 µs) than they gain.
"""

_NAMESPACES: dict[type, Any] = {np.ndarray: np}
_DROP_INS: dict[type, Mapping[str, Callable[..., Any]]] = {np.ndarray: {}}


def namespace(x: Array) -> Any:
    """The array module (`numpy`, `cupy`) that `x` belongs to."""
    return _NAMESPACES[type(x)]


def register(array_type: type, module: Any, drop_ins: Mapping[str, Callable[..., Any]] | None = None) -> None:
    """Let arrays of `array_type` pass through `nn`; `module` offers NumPy's functions for them.

    `drop_ins`, by name, replace operations marked `replaceable`.
    """
    _NAMESPACES[array_type] = module
    _DROP_INS[array_type] = drop_ins or {}


REPLACEABLE: dict[str, Callable[..., Any]] = {}
"""The plain version of every replaceable operation, by name."""


def replaceable(plain: Callable[..., Any]) -> Any:
    """Make `plain` an operation that the library of its first argument's arrays may bring a faster version of.

    Here alone it is decided which of them runs. A drop-in has the plain version's arguments and its exact effects,
    on the arguments too, up to rounding. `operation.plain` is the plain version.
    """
    name = plain.__name__
    REPLACEABLE[name] = plain

    @functools.wraps(plain)
    def operation(first: Array, *arguments: Any, **more: Any) -> Any:
        return _DROP_INS[type(first)].get(name, plain)(first, *arguments, **more)

    operation.plain = plain  # type: ignore[attr-defined]
    return operation


def capture(cuda: Any, work: Callable[[], Any], copies: int = 1) -> Any:
    """What `copies` of `work` queue on the current stream and on those that it forks and joins, as a CUDA graph.

    Nothing runs.
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
    return stream.end_capture()


class Branch:
    """A second stream beside the compute stream, for work whose result is not needed at once.

    Forked from the compute stream and joined to it by events, so that a CUDA graph holds both as parallel paths.
    """

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self.stream = cuda.Stream(non_blocking=True)
        self._forked, self._joined = (cuda.Event(disable_timing=True) for _ in range(2))
        self._open = False  # whether something was queued since the last `close`

    def fork(self) -> Any:
        """Context in which work is queued on this branch, after all that the compute stream has queued so far."""
        self._cuda.get_current_stream().record(self._forked)
        self.stream.wait_event(self._forked)
        self._open = True
        return self.stream

    def join(self, stream: Any) -> None:
        """Let `stream` wait for what the branch has queued."""
        if self._open:
            self.stream.record(self._joined)
            stream.wait_event(self._joined)

    def close(self) -> None:
        """Let the compute stream wait; the next fork begins a new branch."""
        self.join(self._cuda.get_current_stream())
        self._open = False


@dataclass(frozen=True)
class Backend:
    """An array library and the device behind it.

    `order` is the memory order of activations. On the host "HWNC": all pixels at one position lie
    together, so that shifted, strided and pooled views are contiguous runs of N·C elements. On a
    GPU "NHWC", which cuDNN's tensor-core kernels expect. `forms` are the device's own forms of
    convolution (see `nn.conv`), tried in this order; `notes` say what a person should know of what is missing. `cuda` is the
    module `cupy.cuda` where a training step can be captured in a CUDA graph, else None; `stream` is
    CuPy's current stream, kept alive here, and `branch`, beside it, is where weight gradients are computed.
    """

    name: str
    xp: Any
    order: str = "NHWC"
    forms: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    cuda: Any = None
    stream: Any = None
    branch: Branch | None = None

    @property
    def on_host(self) -> bool:
        return self.name == "numpy"

    def describe(self) -> dict[str, str]:
        """What besides the host must be the same for two runs to agree to the bit."""
        if self.cuda is None:
            return {}
        runtime = self.cuda.runtime
        gpu = runtime.getDeviceProperties(runtime.getDevice())["name"].decode()
        convolutions = self.forms.get("cudnn")
        return {
            "gpu": gpu,
            "cupy": self.xp.__version__,
            "cuda": str(runtime.runtimeGetVersion()),
            "cudnn": convolutions.version if convolutions else "none",
        }

    def asarray(self, x: np.ndarray) -> Array:
        """Copy of the host array `x` on the device (on the host: `x` itself)."""
        return self.xp.asarray(x)

    def to_host(self, x: Array) -> np.ndarray:
        """`x` as a NumPy array; waits for the device."""
        return x if self.on_host else self.xp.asnumpy(x)

    def start_copy(self, x: Array) -> Callable[[], np.ndarray]:
        """Begin to copy `x`, as it is now, to the host; the function returned waits for the copy and gives it."""
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


def place_cupy_cache() -> None:
    """Let CuPy keep its compiled kernels in a temporary folder where the home folder cannot be written.

    CuPy makes the folder when it is imported. In a place that all users share, only a folder that belongs to this
    user alone is taken: kernels that somebody else planted would be run.
    """
    wanted = os.environ.get("CUPY_CACHE_DIR") or os.path.expanduser("~/.cupy/kernel_cache")
    with contextlib.suppress(OSError):
        os.makedirs(wanted, exist_ok=True)
        if os.access(wanted, os.W_OK | os.X_OK):
            return
    own = os.path.join(tempfile.gettempdir(), f"cupy-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(own, 0o700)
    about = os.lstat(own)  # a link is none of ours
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o077:
        own = tempfile.mkdtemp(prefix="cupy-")
        atexit.register(shutil.rmtree, own, ignore_errors=True)
    os.environ["CUPY_CACHE_DIR"] = own


@functools.cache
def import_cupy() -> ModuleType:
    """The `cupy` module; RuntimeError with what is missing where it or a GPU cannot be had."""
    try:
        if cupy_version():
            place_cupy_cache()
        import cupy
    except ImportError as error:
        raise RuntimeError(f"CuPy is not installed ({error}): pip install 'distrib[cuda12]'") from None
    except OSError as error:
        raise RuntimeError(f"CuPy cannot be imported ({error}): set CUPY_CACHE_DIR to a folder") from None
    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise RuntimeError(f"CuPy {cupy.__version__} sees no GPU ({error})") from None
    if devices == 0:
        raise RuntimeError(f"CuPy {cupy.__version__} sees no GPU")
    return cupy


def cupy_backend(precision: str = "float32", local_rank: int = 0) -> Backend:
    """CuPy on device `local_rank` modulo the visible ones; RuntimeError where it cannot be had.

    From then on all work goes to a stream of its own: the default one cannot be captured. With precision "tf32"
    matrix products too round their inputs to 10 bits of mantissa; that must be decided before CuPy is first
    imported. Where cuDNN is missing, a note says so and convolutions are patches.
    """
    from nn import cudnn  # here, as they need this module
    from nn.kernels import Kernels
    from nn.kernels.dropins import DropIns, Stem

    os.environ["CUPY_TF32"] = "1" if precision == "tf32" else "0"
    cupy = import_cupy()
    cupy.cuda.runtime.setDevice(
        local_rank % cupy.cuda.runtime.getDeviceCount()
    )  # before anything lives on it
    stream = cupy.cuda.Stream(non_blocking=True)
    stream.__enter__()  # not use(): after the next `with` on another stream CuPy would be back on the default one
    kernels = Kernels(lambda code: cupy.RawModule(code=code, options=("--std=c++17",)))
    drop_ins, branch = DropIns(kernels), Branch(cupy.cuda)
    register(cupy.ndarray, cupy, drop_ins.operations())
    forms: dict[str, Any] = {"stem": Stem(kernels)}
    notes: tuple[str, ...] = ()
    if precision != "float64":
        try:
            forms["cudnn"] = cudnn.load(precision, drop_ins.widen, branch)
        except RuntimeError as error:
            notes = (f"convolutions without cuDNN, and no CUDA graph: {error}",)
    return Backend("cupy", cupy, "NHWC", forms, notes, cupy.cuda, stream, branch)


def cupy_version() -> str | None:
    """Version of the installed CuPy without importing it, or None."""
    for name in ("cupy-cuda12x", "cupy-cuda13x", "cupy"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def memory_axes(x: Array) -> tuple[int, ...]:
    """Axes of `x` (N, H, W, C) from slowest to fastest in memory; `x` must be dense."""
    if x.flags.c_contiguous:
        return (0, 1, 2, 3)
    if not x.transpose(1, 2, 0, 3).flags.c_contiguous:
        raise ValueError(f"activations must be dense in N,H,W,C or H,W,N,C order, not strides {x.strides}")
    return (1, 2, 0, 3)


def pixels(x: Array) -> Array:
    """View of activations (N, H, W, C) as a matrix (N·H·W, C) in memory order."""
    return x.transpose(memory_axes(x)).reshape(-1, x.shape[-1])


def blocks(x: Array, step: int = 1) -> tuple[tuple[slice, slice], ...]:
    """Parts of x (A, B, k, C), in memory order, small enough for a chain of passes in cache, as indices into A and B.

    They start at multiples of `step`. On a device, one part: everything.
    """
    if not isinstance(x, np.ndarray):
        return ((slice(0, x.shape[0]), slice(0, x.shape[1])),)
    return _blocks(*x.shape, step, HOST_BLOCK)


@functools.lru_cache(256)
def _blocks(
    outer: int, inner: int, k: int, c: int, step: int, elements: int
) -> tuple[tuple[slice, slice], ...]:
    lines = max(1, elements // max(k * c, 1))
    b_step = inner if lines >= inner * step else max(step, lines // step * step)
    a_step = max(step, lines // max(inner, 1) // step * step) if b_step == inner else step
    return tuple(
        (slice(a, min(a + a_step, outer)), slice(b, min(b + b_step, inner)))
        for a in range(0, outer, a_step)
        for b in range(0, inner, max(b_step, 1))
    )
