"""What `world.comm` must do, on one rank and on several, whatever moves the arrays; `test_comm` runs it.

Rank r sends v·(r + 1), so that every result has a closed form.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import crew  # noqa: F401  # for the scripts that import all

from distrib.comm.base import SingleCommunicator
from distrib.comm.library import Comm
from distrib.comm.wire import INTEGERS
from distrib.comm.world import World
from distrib.data.sampler import shard
from distrib.errors import UserError

REALS, COMPLEX = ("float16", "float32", "float64"), ("complex64", "complex128")
LAYOUTS = ("C", "F", "strided", "reversed", "column")
SHAPES = ((6, 4), (5,), (3, 1, 2), (), (0, 3), (1, 7))


class Arrays:
    """Makes arrays of one library, NumPy or the world's device, and reads them."""

    def __init__(self, world: World, on_device: bool) -> None:
        self.world, self.xp = world, world.backend.xp if on_device else np
        self.layouts = LAYOUTS if on_device else (*LAYOUTS, "swapped", "memmap")

    def host(self, x: Any) -> np.ndarray:
        return np.array(x) if self.xp is np else self.world.backend.to_host(x)

    def lay(self, values: np.ndarray, layout: str) -> tuple[Any, Any]:
        """(what holds it, an array of `values`) in a layout."""
        values = np.asarray(values)
        if layout == "swapped":
            swapped = values.astype(values.dtype.newbyteorder())
            return swapped, swapped
        if layout == "memmap":
            return values, values.copy().view(np.memmap)
        if layout == "C" or (values.ndim == 0 and layout != "column"):
            x = self.xp.array(values)
            return x, x
        if layout == "F":
            base = self.xp.array(np.ascontiguousarray(values.T))
            return base, base.T
        base, index = (*values.shape, 3), (..., 1)
        if layout == "strided":
            base, index = (2 * len(values), *values.shape[1:]), slice(None, None, 2)
        elif layout == "reversed":
            base, index = values.shape, slice(None, None, -1)
        whole = self.xp.array(np.full(base, 1, values.dtype))
        whole[index] = self.xp.array(values)
        return whole, whole[index]

    def check(self, x: Any, expected: np.ndarray, what: str) -> None:
        found = self.host(x)
        assert found.dtype.newbyteorder("=") == expected.dtype, (what, found.dtype, expected.dtype)
        assert found.shape == expected.shape, (what, found.shape, expected.shape)
        assert (found == expected).all(), (what, found, expected)


def counted(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """1, 2, …; of 16 bits and more in steps that tell integers from the bits of bfloat16."""
    step = 1000 if dtype in INTEGERS and dtype[-1] != "8" else 1
    values = step * (np.arange(np.prod(shape, dtype=int)) + 1)
    return values.reshape(shape) * (1 + 2j if dtype in COMPLEX else 1)


def cases(size: int, shape: tuple[int, ...], dtype: str) -> Iterator[tuple[str, Any, np.ndarray]]:
    """(operation, values of a rank, result) of all that there are for a type."""
    v = counted(shape, dtype)
    if dtype == "bool":
        own = v % (size + 1)
        yield "max", lambda rank: own == rank, own != size
        yield "min", lambda rank: own != rank, own == size
        return
    results = {"sum": v * (size * (size + 1) // 2)}
    if dtype not in INTEGERS:
        results["mean"] = v * ((size + 1) / 2)
    if dtype not in COMPLEX:
        wrapped = [(v * (rank + 1)).astype(dtype) for rank in range(size)]
        results |= {"max": np.max(wrapped, 0), "min": np.min(wrapped, 0)}
    for op, result in results.items():
        yield op, lambda rank: (v * (rank + 1)).astype(dtype), result.astype(dtype)


def reductions(comm: Comm, arrays: Arrays) -> None:
    for dtype in ("bool", *INTEGERS, *REALS, *COMPLEX):
        for shape in SHAPES if dtype in ("float32", "bool", "complex128", "int16") else SHAPES[:1]:
            for op, values, result in cases(comm.size, shape, dtype):
                for layout in arrays.layouts if dtype in ("float32", "float16", "complex64") else ("C", "F"):
                    what = f"{op} {dtype}{shape} {layout}"
                    whole, x = arrays.lay(values(comm.rank), layout)
                    handle = comm.all_reduce(x, op, overlap=layout != "C")
                    assert handle.wait() is x is handle.wait(), what
                    arrays.check(x, result, what)
                    if layout in ("strided", "column") and x.ndim:
                        others = whole[1::2] if layout == "strided" else whole[..., ::2]
                        assert (arrays.host(others) == 1).all(), f"{what}: wrote beside the array"
                    if not shape:
                        continue
                    whole, x = arrays.lay(values(comm.rank), layout)
                    part = comm.reduce_scatter(x, op).wait()
                    arrays.check(part, result[shard(shape[0], comm.rank, comm.size)], f"scattered {what}")
                    arrays.check(x, values(comm.rank), f"{what}: reduce_scatter changed its argument")


def movements(comm: Comm, arrays: Arrays) -> None:
    rank, size = comm.rank, comm.size
    after, before = (rank + 1) % size, (rank - 1) % size
    for dtype in ("bool", *INTEGERS, *REALS, *COMPLEX):
        for shape in SHAPES:
            for layout in arrays.layouts if dtype in ("float64", "int16") else ("C", "column"):
                what = f"{dtype}{shape} {layout}"

                def of(rank: int, dtype: str = dtype, shape: tuple = shape) -> np.ndarray:
                    return (
                        (counted(shape, dtype) * (rank + 1) % 3).astype(dtype)
                        if dtype == "bool"
                        else (counted(shape, dtype) * (rank + 1)).astype(dtype)
                    )

                x = arrays.lay(of(rank), layout)[1]
                arrays.check(comm.all_gather(x).wait(), np.stack([of(r) for r in range(size)]), what)
                y = arrays.lay(np.zeros_like(of(rank)), layout)[1]
                assert comm.exchange(x, after, y, before).wait() is y
                arrays.check(y, of(before), f"exchanged {what}")
                assert comm.broadcast(x, size - 1).wait() is x
                arrays.check(x, of(size - 1), f"broadcast {what}")
    line = arrays.xp.array(np.full(2, rank, "float32"))  # with ends: nothing comes from beyond them
    got = arrays.xp.array(np.full(2, -1, "float32"))
    to, source = (rank + 1 if rank + 1 < size else None), (rank - 1 if rank else None)
    comm.exchange(line if to is not None else None, to, got if rank else None, source).wait()
    arrays.check(got, np.full(2, rank - 1, "float32"), "a line")


def handles(comm: Comm, arrays: Arrays) -> None:
    """Several at once, waited for in any order, or not at all."""
    total = comm.size * (comm.size + 1) // 2
    x, y, z = (arrays.xp.array(np.full(n, comm.rank + 1.0)) for n in (3, 4, 5))
    first, second = comm.all_reduce(x, overlap=True), comm.all_reduce(y, overlap=True)
    comm.all_reduce(z, overlap=True)
    second.wait()
    first.wait()
    comm.all_reduce(arrays.xp.array(np.zeros(1000)))  # which nobody else keeps
    comm.barrier()
    assert not comm._pending
    for array, n in ((x, 3), (y, 4), (z, 5)):
        arrays.check(array, np.full(n, float(total)), "a handle")
    comm.checked = False
    arrays.check(comm.all_reduce(x, "mean").wait(), np.full(3, float(total)), "unchecked")
    comm.barrier()
    comm.checked = True


def groups(comm: Comm, arrays: Arrays) -> None:
    """Even and odd ranks, within them pairs, in reverse."""
    rank, size = comm.rank, comm.size
    group = comm.split(rank % 2, key=-rank)
    mine = [r for r in reversed(range(size)) if r % 2 == rank % 2]
    assert (group.rank, group.size) == (mine.index(rank), len(mine))
    inner = group.split(group.rank // 2)
    pair = mine[group.rank // 2 * 2 :][:2]
    x, y, z = (arrays.xp.array(np.array([rank + 1.0])) for _ in range(3))
    pending = [group.all_reduce(x), inner.all_reduce(y), comm.all_reduce(z)]
    for handle in pending:
        handle.wait()
    for array, members in ((x, mine), (y, pair), (z, range(size))):
        arrays.check(array, np.array([sum(members) + len(members) * 1.0]), f"a group of {list(members)}")
    assert (comm.split(0 if rank else None) is None) == (rank == 0)
    group.close()
    with pytest.raises(UserError, match=r"all_reduce\(float64\[1\], sum\): the communicator is closed"):
        inner.all_reduce(np.zeros(1))
    comm.barrier()


def refusals(comm: Comm, arrays: Arrays) -> None:
    """Mistakes of the last rank alone are the same error on all; the communicator stays usable."""
    xp, last = arrays.xp, comm.rank == comm.size - 1
    fine = xp.array(np.ones(3))
    frozen = np.ones(3)
    frozen.flags.writeable = False
    bad: list[tuple[Any, str]] = [
        (lambda: comm.all_reduce([1.0, 2.0]), "builtins.list: give a NumPy or CuPy array"),
        (lambda: comm.all_reduce(np.float64(1)), "numpy.float64: give a NumPy or CuPy array"),
        (lambda: comm.all_reduce(np.ma.ones(3)), "MaskedArray: give"),
        (lambda: comm.all_gather(np.array(["a"], object)), "object cannot be sent: convert to one of bool"),
        (lambda: comm.all_reduce(np.ones(3, np.longdouble)), "cannot be sent: convert"),
        (lambda: comm.all_reduce(frozen), "the array is read-only: give a copy"),
        (lambda: comm.all_reduce(fine, "product"), "op 'product': give sum, max, min or mean"),
        (lambda: comm.all_reduce(xp.array(np.ones(3, bool))), "sum of bool: count with x.astype('int64')"),
        (lambda: comm.all_reduce(xp.array(np.ones(3, int)), "mean"), "mean of integers: convert with"),
        (lambda: comm.all_reduce(xp.array(np.ones(3, complex)), "max"), "max of complex numbers"),
        (lambda: comm.reduce_scatter(xp.array(np.ones(()))), "has no axis to be cut along: use all_reduce"),
        (lambda: comm.broadcast(fine, comm.size), f"root {comm.size}: give a rank from 0 to {comm.size - 1}"),
        (lambda: comm.broadcast(fine, -1), "root -1: give a rank"),
        (lambda: comm.exchange(fine, None, None, None), "to None: give an array and a rank, or None for"),
        (lambda: comm.exchange(fine, comm.size, fine, 0), f"to {comm.size}: give a rank"),
        (lambda: comm.split(-1), "color -1: give an integer from 0, or None"),
        (lambda: comm.split(1.5), "color 1.5"),
    ]
    for call, words in bad:
        with pytest.raises(UserError) as caught:
            call() if last else comm.all_reduce(fine)
        text = str(caught.value)
        assert words in text, text
        assert (f"(rank {comm.size - 1})" in text) == (comm.size > 1), text
        everyone = comm._control.allgather(text)
        assert set(everyone) == {text}
    x = xp.array(np.ones(3))
    arrays.check(comm.all_reduce(x).wait(), np.full(3, float(comm.size)), "after the errors")


def differences(comm: Comm, arrays: Arrays) -> None:
    """Calls that do not fit are the same error on all ranks, which names the ranks and both calls."""
    rank, size, xp = comm.rank, comm.size, arrays.xp
    if size == 1:
        for ends in ((np.ones(1), 0, None, None), (None, None, np.ones(1), 0)):
            with pytest.raises(UserError, match="the ends of an exchange do not fit: rank 0 is to send"):
                comm.exchange(*ends)
        return
    shown = "" if xp is np else "GPU's "
    x, y, z = (xp.array(np.ones(n, dtype)) for n, dtype in ((3, "float32"), (3, "float64"), (4, "float32")))
    usual = f"called all_reduce({shown}float32[3], sum)"
    odd: dict[str, Any] = {
        f"all_reduce({shown}float64[3], sum)": lambda: comm.all_reduce(y),
        f"all_reduce({shown}float32[4], sum)": lambda: comm.all_reduce(z),
        f"all_reduce({shown}float32[3], max)": lambda: comm.all_reduce(x, "max"),
        f"reduce_scatter({shown}float32[3], sum)": lambda: comm.reduce_scatter(x),
        f"broadcast({shown}float32[3], root 1)": lambda: comm.broadcast(x, 1),
        f"all_gather({shown}float32[3])": lambda: comm.all_gather(x),
        "exchange": lambda: comm.exchange(x, 0, x, 0),
        "split": lambda: comm.split(0),
        "barrier()": comm.barrier,
    }
    others = "rank 0" if size == 2 else f"ranks {', '.join(map(str, range(size - 1)))}"
    for call, odd_one in odd.items():
        with pytest.raises(UserError) as caught:
            odd_one() if rank == size - 1 else comm.all_reduce(x)
        text = str(caught.value)
        assert f"{others} {usual}; rank {size - 1} called {call}: make the same calls" in text, text
        assert set(comm._control.allgather(text)) == {text}
    after, before = (rank + 1) % size, (rank - 1) % size
    unfit: list[tuple[Any, str]] = [
        (lambda: comm.exchange(x, after, y, before), f"receive {shown}float64[3] from"),
        (lambda: comm.exchange(x, after, z, before), f"receive {shown}float32[4] from"),
        (lambda: comm.exchange(x, after, None, None), "receive nothing"),
        (lambda: comm.exchange(None, None, x, before), "send nothing"),
        (lambda: comm.exchange(x, 0, x, 0), f"is to send {shown}float32[3] to 0"),
    ]
    for call, words in unfit:
        with pytest.raises(UserError) as caught:
            call()
        text = str(caught.value)
        assert "the ends of an exchange do not fit: rank 0" in text, text
        assert words in text, text
        assert set(comm._control.allgather(text)) == {text}


def whole_suite(world: World) -> None:
    """Every part on the world's arrays; beside a device, some on NumPy's too."""
    parts = (reductions, movements, handles, groups, refusals, differences)
    device = not world.backend.on_host
    for part in parts:
        part(world.comm, Arrays(world, device))
    for part in parts[2:] if device else ():
        part(world.comm, Arrays(world, False))
    if device:
        x, y = np.ones(3), world.backend.xp.ones(3)
        with pytest.raises(UserError, match="give two NumPy arrays, or two CuPy arrays"):
            world.comm.exchange(x, 0, y, 0)
    assert isinstance(world.transport, SingleCommunicator) == (
        world.size == 1 and world.transport.name == "none"
    )
    world.close()
    world.close()
