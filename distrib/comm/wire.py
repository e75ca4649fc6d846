"""How arrays of any shape, layout and type travel: as contiguous vectors of a few types.

A transport takes bytes, 32 and 64-bit integers, float32 and float64. To be moved, elements are taken as
integers of their size. To be reduced, bool is taken as bytes and a complex number as two real ones; integers
of 8 and 16 bits and float16 travel as the type of 32 bits, and are cut or rounded once, at the end.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from distrib.comm.base import BF16
from distrib.errors import UserError
from nn.array import Array, namespace

INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
TYPES = ("bool", *INTEGERS, "float16", "float32", "float64", "complex64", "complex128")
# Open MPI's sums of short integers saturate on AVX, and NCCL has no integers of 16 bits
SHORT = {"int8": "int32", "int16": "int32", "uint8": "uint32", "uint16": "uint32"}
WIDER = {**SHORT, "float16": "float32"}
PARTS = {"bool": "uint8", "complex64": "float32", "complex128": "float64"}
OPERATIONS = ("sum", "max", "min", "mean", BF16)


def check_type(x: Array) -> None:
    """UserError if the elements of `x` cannot travel."""
    if x.dtype.name not in TYPES:
        raise UserError(
            f"{x.dtype} cannot be sent: convert to one of {', '.join(TYPES)};"
            " Python objects go by world.allgather and world.broadcast"
        )


def check_reduction(x: Array, op: str) -> None:
    """UserError if `op` makes no sense on the elements of `x`."""
    kind = x.dtype.kind
    if op not in OPERATIONS:
        raise UserError(f"op {op!r}: give sum, max, min or mean")
    if op == BF16 and (x.dtype != "uint16" or not x.flags.c_contiguous):
        raise UserError(f"{op} takes a contiguous array of uint16, which hold its bits")
    if kind == "b" and op in ("sum", "mean"):
        raise UserError(f"{op} of bool: count with x.astype('int64'), or take max for any and min for all")
    if kind in "iu" and op == "mean":
        raise UserError("mean of integers: convert with x.astype('float64')")
    if kind == "c" and op in ("max", "min"):
        raise UserError(f"{op} of complex numbers, which have no order: reduce abs(x), x.real or x.imag")


def flat(x: Array, dtype: Any = None) -> Array:
    """The elements of `x` in C order as a contiguous vector: those of `x` itself where they lie so."""
    xp = np if isinstance(x, np.ndarray) else namespace(x)
    return xp.ascontiguousarray(x, dtype or x.dtype.newbyteorder("=")).reshape(-1)


def to_move(x: Array) -> Array:
    """`flat(x)` as integers of 8, 4 or 1 bytes."""
    size = x.dtype.itemsize
    return flat(x).view("uint64" if size % 8 == 0 else "uint32" if size == 4 else "uint8")


def to_reduce(x: Array) -> Array:
    """`flat(x)` in a type that every transport can add up and compare."""
    name = x.dtype.name
    return flat(x).view(PARTS[name]) if name in PARTS else flat(x, WIDER.get(name))


def back(wire: Array, dtype: np.dtype, shape: tuple[int, ...]) -> Array:
    """What travelled by `to_reduce`, as an array of `dtype` and `shape`."""
    native = dtype.newbyteorder("=")
    values = wire.view(native) if native.name in PARTS else wire.astype(native, copy=False)
    return values.reshape(shape)


def address(x: Array) -> int:
    """Where the first element of `x` lies."""
    return int(x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr)


def put(wire: Array, x: Array) -> Array:
    """`x` with the elements of `wire`, which `to_move` made of it: copied there if it was copied."""
    if address(wire) != address(x):
        x[...] = wire.view(x.dtype.newbyteorder("=")).reshape(x.shape)
    return x


def put_reduced(wire: Array, x: Array) -> Array:
    """`put` for what `to_reduce` made of `x`."""
    if address(wire) != address(x):
        x[...] = back(wire, x.dtype, x.shape)
    return x
