"""Buffers that outlive a step, so that a step allocates nothing large, and that know who still needs them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import numpy as np

from nn.array import Array
from nn.device import NUMPY, Backend

SLAB = 1 << 23
"""Bytes from which small host buffers are cut.

NumPy asks the kernel for huge pages for arrays of 4 MiB and more. On 4 KiB pages, scattered in physical
memory, up to one element-wise pass in ten ran five to ten times slower, whichever buffers it met.
"""


@dataclass
class _Store:
    """What a `Buffers` and its scopes share, or some of it several `Buffers` that take turns."""

    flat: dict[str, Array] = field(default_factory=dict)
    views: dict[tuple[Any, ...], Array] = field(default_factory=dict)  # the same request gets the same object
    plans: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    slab: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    generation: int = 0
    done: set[str] | None = None  # of `once`, in this step; None: it knows of no steps
    holders: dict[int, int] = field(default_factory=dict)  # how many hold a buffer of the pool, by its number
    later: list[Array] = field(default_factory=list)  # held until the side stream is joined
    taken: int = 0  # in this pass
    number_of: dict[int, int] = field(
        default_factory=dict
    )  # id of a pool buffer's view → number of the buffer


class Buffers:
    """Named flat buffers, each as large as the largest request so far, handed out as leading slices.

    There are three lifetimes:

    - `persistent`: belongs to one layer and holds its contents until that layer asks again;
    - `temporary`: shared by all layers, and holds nothing after the operation that took it;
    - `activation`: from a pool. Who takes one holds it until `release`; until then nobody else gets it.

    Networks of which one at a time runs, and none stops in the middle of an operation but to sum over ranks,
    may take turns with the same temporaries (`turns_with`), which so stay in cache. What follows from the
    weights alone (`shared`) they have together, too.

    Everything large that an operation writes comes from here: after the first batch of each size no step
    allocates, and addresses stay what they are, as a captured graph needs. With `poison`, for tests, what is
    released is overwritten with NaN and not used again in the same pass, so that its use shows.
    """

    def __init__(
        self,
        backend: Backend = NUMPY,
        dtype: str = "float32",
        *,
        poison: bool = False,
        turns_with: Buffers | None = None,
    ) -> None:
        self.backend, self.dtype, self.poison = backend, np.dtype(dtype), poison
        self._prefix, self._store = "", _Store()
        self._common: _Store = turns_with._common if turns_with else self._store

    @property
    def generation(self) -> int:
        """Goes up whenever a buffer grows and so moves: what was captured with the old address is void."""
        return self._common.generation

    def scope(self, name: str) -> Buffers:
        """The same buffers, with the names of persistent ones under `name`."""
        child = copy.copy(self)
        child._prefix = f"{self._prefix}{name}."
        return child

    # named buffers

    def persistent(self, name: str, shape: tuple[int, ...], dtype: str | None = None) -> Array:
        """Array of `shape` (C order), this scope's own: its contents last until it asks again."""
        return self._take(self._store, self._prefix + name, shape, dtype)

    def shared(self, name: str, shape: tuple[int, ...]) -> Array:
        """Array of `shape` (C order) for what `once` makes of the weights, in this scope of all that take
        turns."""
        return self._take(self._common, self._prefix + name, shape)

    def temporary(self, name: str, shape: tuple[int, ...], dtype: str | None = None) -> Array:
        """Array of `shape` (C order), contents undefined, valid until the next operation."""
        return self._take(self._common, name, shape, dtype)

    def _take(self, store: _Store, name: str, shape: tuple[int, ...], dtype: str | None = None) -> Array:
        key = name, shape, dtype
        view = store.views.get(key)
        if view is not None:
            return view
        kind, size = np.dtype(dtype or self.dtype), prod(shape)
        flat = store.flat.get(name)
        if flat is None or flat.size < size or flat.dtype != kind:
            flat = self._grow(store, name, max(size, 1), kind)
        view = store.views[key] = flat[:size].reshape(shape)
        return view

    def image(
        self, name: str, shape: tuple[int, ...], dtype: str | None = None, persistent: bool = True
    ) -> Array:
        """Activations of logical shape (N, H, W, C) in the backend's memory order."""
        if persistent:
            return self._image(self._store, self._prefix + name, shape, dtype)
        return self._image(self._common, name, shape, dtype)

    def _image(self, store: _Store, name: str, shape: tuple[int, ...], dtype: str | None = None) -> Array:
        if self.backend.order == "NHWC":
            return self._take(store, name, shape, dtype)
        key = (name, shape, dtype, "image")
        view = store.views.get(key)
        if view is None:
            n, h, w, c = shape
            view = self._take(store, name, (h, w, n, c), dtype).transpose(2, 0, 1, 3)
            store.views[key] = view
        return view

    def zeros(self, name: str, size: int, dtype: str) -> Array:
        """A vector of zeros which those who write to it leave at zero."""
        flat = self._common.flat.get(name)
        if flat is None or flat.size < size:
            self.temporary(name, (size,), dtype).fill(0)
        return self.temporary(name, (size,), dtype)

    def ones(self, length: int) -> Array:
        """A vector of ones: `ones @ x` sums over rows several times faster than `x.sum(0)`."""
        flat = self._common.flat.get("ones")
        if flat is None or flat.size < length:
            flat = self._grow(self._common, "ones", max(length, 1), self.dtype)
            flat.fill(1)
        return flat[:length]

    def constant(self, name: str, values: np.ndarray) -> Array:
        """`values` on the device in the buffers' dtype, copied there once."""
        flat = self._common.flat.get(name)
        if flat is None:
            flat = self._common.flat[name] = self._allocate(values.size, self.dtype)
            flat[...] = self.backend.asarray(values.astype(self.dtype).ravel())
        return flat.reshape(values.shape)

    # the pool of activations

    def activation(self, shape: tuple[int, ...]) -> Array:
        """Activations (N, H, W, C) from the pool, contents undefined; the caller holds them until `release`.

        The free buffer with the lowest number: the same requests in the same order get the same buffers.
        """
        store = self._store
        number = store.taken if self.poison else 0
        while number in store.holders:
            number += 1
        store.holders[number] = 1
        store.taken += 1
        x = self._image(store, f"activation{number}", shape)
        store.number_of[id(x)] = number
        return x

    def retain(self, x: Array) -> None:
        """Hold x once more: it takes one `release` more."""
        number, holders = self._store.number_of.get(id(x)), self._store.holders
        if number is not None:
            assert number in holders, "activations are retained after they were released"
            holders[number] += 1

    def release(self, x: Array) -> None:
        """The caller needs x no longer. Persistent buffers, and arrays from elsewhere, are left alone."""
        number, holders = self._store.number_of.get(id(x)), self._store.holders
        if number is None:
            return
        assert number in holders, "activations are released twice"
        holders[number] -= 1
        if not holders[number]:
            del holders[number]
            if self.poison:
                self._spoil(number)

    def release_later(self, x: Array) -> None:
        """Release x once the side stream, which reads it, is joined; at once where there is none."""
        if self.backend.side_stream:
            self._store.later.append(x)
        else:
            self.release(x)

    def release_late(self) -> None:
        """The side stream is joined."""
        while self._store.later:
            self.release(self._store.later.pop())

    def is_pooled(self, x: Array) -> bool:
        """Whether x is from the pool: whoever keeps it must hold it."""
        return id(x) in self._store.number_of

    def held(self) -> int:
        """Buffers of the pool that somebody holds."""
        return len(self._store.holders)

    def release_all(self) -> None:
        """Nobody holds anything: a pass begins, and an earlier one may have been given up halfway."""
        self._store.holders.clear()
        self._store.later.clear()
        self._store.taken = 0

    def output(self, shape: tuple[int, ...]) -> Array:
        """Activations on their way to the next layer, which may keep them for its backward (see `save`).

        On the host they come from the pool, which stays in cache; on a device they are this scope's own.
        """
        return self.activation(shape) if self.backend.on_host else self.image("y", shape)

    def save(self, x: Array) -> Array:
        """x, an input, for the backward: on the host a copy of this scope's own, as the pool's few buffers
        are large; on a device x itself, which `output` made the own of the layer before.
        """
        if not self.backend.on_host:
            assert not self.is_pooled(x), "activations of the pool may not be kept by reference"
            return x
        saved = self.image("x", x.shape)
        saved[...] = x
        return saved

    # lists of calls on buffers

    def run_cached(
        self, name: str, arrays: tuple[Array, ...], build: Callable[[], tuple[list[Callable[[], Any]], Any]]
    ) -> Any:
        """Run the calls that `build` makes of these arrays; what it returns beside them is returned.

        The list is kept and run again as long as the arrays are the same objects and no buffer has moved:
        making the views of a small layer's products takes as long as the products.
        """
        name, plans = self._prefix + name, self._store.plans
        plan = plans.get(name)
        if (
            plan is None
            or plan[1] != self.generation
            or any(a is not b for a, b in zip(plan[0], arrays, strict=True))
        ):
            plans.pop(name, None)
            calls, result = build()
            plans[name] = plan = arrays, self.generation, calls, result
        for call in plan[2]:
            call()
        return plan[3]

    def once(self, name: str, call: Callable[[], Any]) -> Callable[[], Any]:
        """`call`, which writes what is `shared`: within a step, those that take turns make it once."""
        if self._common.done is None:
            return call
        return partial(self._once, self._prefix + name, call)

    def _once(self, name: str, call: Callable[[], Any]) -> None:
        done = self._common.done
        assert done is not None
        if name not in done:
            call()
            done.add(name)

    def begin_step(self) -> None:
        """From now on the weights stay what they are until the next call, so `once` makes nothing twice."""
        self._common.done = set()

    # memory

    def nbytes(self) -> int:
        """Bytes held, alone or with others."""
        stores = [self._store] if self._common is self._store else [self._store, self._common]
        return sum(int(flat.nbytes) for store in stores for flat in store.flat.values())

    def _grow(self, store: _Store, name: str, size: int, kind: np.dtype) -> Array:
        """A new buffer in the place of `name`; views of the old one are forgotten, and plans are void."""
        flat = store.flat[name] = self._allocate(size, kind)
        for key in [key for key in store.views if key[0] == name]:
            store.number_of.pop(id(store.views.pop(key)), None)
        self._store.plans.clear()
        self._common.generation += 1
        return flat

    def _allocate(self, size: int, kind: np.dtype) -> Array:
        nbytes = -(-size * kind.itemsize // 64) * 64
        if not self.backend.on_host or nbytes >= SLAB // 2:
            return self.backend.xp.empty(size, kind)
        store = self._store
        if store.slab.size < nbytes:
            slab = np.empty(SLAB, np.uint8)
            store.slab = slab[-slab.ctypes.data % 64 :]
        part, store.slab = store.slab[:nbytes], store.slab[nbytes:]
        return part[: size * kind.itemsize].view(kind)

    def _spoil(self, number: int) -> None:
        flat = self._store.flat[f"activation{number}"]
        flat.fill(0xFFFF if flat.dtype == np.uint16 else np.nan)  # the bits of a bfloat16 NaN
