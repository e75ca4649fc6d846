"""Which array library: the only place that imports CuPy.

Layer code asks `namespace(x)` for the module that `x` belongs to and calls the same functions on
either.  Activations are *indexed* as N×H×W×C everywhere; how they lie in *memory* is the backend's
choice (see `Backend.order`), since each device has a layout that suits it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or cupy.ndarray; NumPy's stubs cannot express "either"

HOST_BLOCK = 1 << 18
"""Elements of one block of an element-wise pass on the host: 1 MiB of float32, well inside the L3 cache.

Blocks that fit the L2 cache lose more to the cost of a NumPy call (about 1.5 µs) than they gain.
"""

_NAMESPACES: dict[type, Any] = {np.ndarray: np}


def namespace(x: Array) -> Any:
    """The array module (`numpy`, `cupy`) that `x` belongs to."""
    return _NAMESPACES[type(x)]


def register(array_type: type, module: Any) -> None:
    """Let arrays of `array_type` pass through `nn`; `module` offers NumPy's functions for them."""
    _NAMESPACES[array_type] = module


@dataclass(frozen=True)
class Backend:
    """An array library and the device behind it.

    `order` is the memory order of activations. On the host "HWNC": all pixels at one position lie
    together, so that shifted, strided and pooled views are contiguous runs of N·C elements. On a
    GPU "NHWC", which cuDNN's tensor-core kernels expect.
    """

    name: str
    xp: Any
    order: str = "NHWC"

    @property
    def on_host(self) -> bool:
        return self.name == "numpy"

    def asarray(self, x: np.ndarray) -> Array:
        """Copy of the host array `x` on the device (on the host: `x` itself)."""
        return self.xp.asarray(x)

    def to_host(self, x: Array) -> np.ndarray:
        """`x` as a NumPy array; waits for the device."""
        return x if self.on_host else self.xp.asnumpy(x)


NUMPY = Backend("numpy", np, "HWNC")


@functools.cache
def import_cupy() -> ModuleType:
    """The `cupy` module; RuntimeError with what is missing where it or a GPU cannot be had."""
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(f"CuPy is not installed ({error}): pip install 'distrib[cuda12]'") from None
    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise RuntimeError(f"CuPy {cupy.__version__} sees no GPU ({error})") from None
    if devices == 0:
        raise RuntimeError(f"CuPy {cupy.__version__} sees no GPU")
    register(cupy.ndarray, cupy)
    return cupy


def cupy_backend(tf32: bool = False) -> Backend:
    """CuPy on the current device; RuntimeError where it cannot be had.

    `tf32` lets matrix products round their inputs to 10 bits of mantissa; it must be decided before
    CuPy is first imported.
    """
    os.environ["CUPY_TF32"] = "1" if tf32 else "0"
    return Backend("cupy", import_cupy(), "NHWC")


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
def _blocks(outer: int, inner: int, k: int, c: int, step: int, elements: int) -> tuple[tuple[slice, slice], ...]:
    lines = max(1, elements // max(k * c, 1))
    b_step = inner if lines >= inner * step else max(step, lines // step * step)
    a_step = max(step, lines // max(inner, 1) // step * step) if b_step == inner else step
    return tuple(
        (slice(a, min(a + a_step, outer)), slice(b, min(b + b_step, inner)))
        for a in range(0, outer, a_step)
        for b in range(0, inner, max(b_step, 1))
    )
