"""The backend on a GPU: the one place that imports CuPy. It registers what it brings with `nn.array`."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import shutil
import stat
import tempfile
from types import ModuleType
from typing import Any

from nn.array import register
from nn.cuda import cudnn
from nn.cuda.kernels import Kernels
from nn.cuda.ops import CudaOps
from nn.cuda.stem import Stem
from nn.device import Backend, SideStream


def place_cupy_cache() -> None:
    """Let CuPy keep its compiled kernels in a temporary folder where the home folder cannot be written.

    CuPy makes the folder when it is imported. In a place that all users share, only a folder that belongs to
    this user alone is taken: kernels that somebody else planted would be run.
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


def has_driver() -> bool:
    """Whether the library of NVIDIA's driver can be loaded: asked first, as CuPy takes a while to import."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@functools.cache
def import_cupy() -> ModuleType:
    """The `cupy` module; RuntimeError with what is missing where it or a GPU cannot be had."""
    if (version := cupy_version()) and not has_driver():
        raise RuntimeError(f"CuPy {version} sees no GPU (there is no NVIDIA driver: libcuda.so.1)")
    try:
        if version:
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

    From then on all work goes to a stream of its own: the default one cannot be captured. With precision
    "tf32" matrix products too round their inputs to 10 bits of mantissa; that must be decided before CuPy is
    first imported. Where cuDNN is missing, a note says so and convolutions are patches.
    """
    os.environ["CUPY_TF32"] = "1" if precision == "tf32" else "0"
    cupy = import_cupy()
    runtime = cupy.cuda.runtime
    runtime.setDevice(local_rank % runtime.getDeviceCount())  # before anything lives on it
    stream = cupy.cuda.Stream(non_blocking=True)
    # not use(): after the next `with` on another stream CuPy would be back on the default one
    stream.__enter__()
    kernels = Kernels(lambda code: cupy.RawModule(code=code, options=("--std=c++17",)))
    operations, side_stream = CudaOps(kernels), SideStream(cupy.cuda)
    register(cupy.ndarray, cupy, operations.by_name())
    algorithms: dict[str, Any] = {"stem": Stem(kernels)}
    notes: tuple[str, ...] = ()
    if precision != "float64":
        try:
            algorithms["cudnn"] = cudnn.load(cupy.cuda, precision, operations.from_bf16, side_stream)
        except RuntimeError as error:
            notes = (f"convolutions without cuDNN, and no CUDA graph: {error}",)
    return Backend("cupy", cupy, "NHWC", algorithms, notes, cupy.cuda, stream, side_stream)


def cupy_version() -> str | None:
    """Version of the installed CuPy without importing it, or None."""
    from importlib import metadata  # not with the module: it takes as long as a fifth of NumPy

    for name in ("cupy-cuda12x", "cupy-cuda13x", "cupy"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None
