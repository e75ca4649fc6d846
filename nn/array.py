"""Which library an array belongs to, the registry of faster operations, and memory order.

Layer code asks `namespace(x)` for the module that `x` belongs to and calls the same functions on either.
Activations are *indexed* as N×H×W×C everywhere; how they lie in *memory* is the backend's choice (see
`nn.device.Backend.order`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or cupy.ndarray; NumPy's stubs cannot express "either"


HOST_BLOCK = 1 << 18
"""Elements of one block of an element-wise pass on the host: 1 MiB of float32, well inside the L3 cache.

Blocks that fit the L2 cache lose more to the cost of a NumPy call (about 1.5 µs) than they gain.
"""


_NAMESPACES: dict[type, Any] = {np.ndarray: np}


_FASTER: dict[type, Mapping[str, Callable[..., Any]]] = {np.ndarray: {}}


def namespace(x: Array) -> Any:
    """The array module (`numpy`, `cupy`) that `x` belongs to."""
    return _NAMESPACES[type(x)]


def register(array_type: type, module: Any, faster: Mapping[str, Callable[..., Any]] | None = None) -> None:
    """Let arrays of `array_type` pass through `nn`; `module` offers NumPy's functions for them.

    `faster` holds versions of operations marked with `op`, by name.
    """
    _NAMESPACES[array_type] = module
    _FASTER[array_type] = faster or {}


OPS: dict[str, Callable[..., Any]] = {}
"""The plain version of every operation marked with `op`, by name."""


def op(plain: Callable[..., Any]) -> Any:
    """Make `plain` an operation that the library of its first argument may bring a faster version of.

    Here alone it is decided which of them runs. A faster version has the plain one's arguments and its exact
    effects, on the arguments too, up to rounding. `operation.plain` is the plain version.
    """
    name = plain.__name__
    OPS[name] = plain

    @functools.wraps(plain)
    def operation(first: Array, *arguments: Any, **more: Any) -> Any:
        return _FASTER[type(first)].get(name, plain)(first, *arguments, **more)

    operation.plain = plain  # type: ignore[attr-defined]
    return operation


def memory_axes(x: Array) -> tuple[int, ...]:
    """Axes of `x` (N, H, W, C) from slowest to fastest in memory; `x` must be dense."""
    if x.flags.c_contiguous:
        return (0, 1, 2, 3)
    if not x.transpose(1, 2, 0, 3).flags.c_contiguous:
        raise ValueError(f"activations must be dense in N,H,W,C or H,W,N,C order, not strides {x.strides}")
    return (1, 2, 0, 3)


def in_memory(x: Array, like: Array) -> Array:
    """View of activations (N, H, W, C), or (N, C), as (A, B, k, C) in the memory order of `like`."""
    return x[:, None, None, :] if x.ndim == 2 else x.transpose(memory_axes(like))


def pixels(x: Array) -> Array:
    """View of activations (N, H, W, C) as a matrix (N·H·W, C) in memory order."""
    return x.transpose(memory_axes(x)).reshape(-1, x.shape[-1])


def blocks(x: Array, step: int = 1) -> tuple[tuple[slice, slice], ...]:
    """Parts of x (A, B, k, C), in memory order, small enough for a chain of passes in cache, as indices.

    They start at multiples of `step` along A and B. On a device, one part: everything.
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
