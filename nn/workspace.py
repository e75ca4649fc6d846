"""Buffers that outlive a step, so that a step allocates nothing large."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from nn.backend import NUMPY, Array, Backend

SLAB = 1 << 23
"""Bytes from which small host buffers are cut.

NumPy asks the kernel for huge pages for arrays of 4 MiB and more. On 4 KiB pages, scattered in physical
memory, up to one element-wise pass in ten ran five to ten times slower, whichever buffers it happened to meet.
"""

RING = 3
"""Buffers of the ring: in a residual block three gradients of activations are alive at once."""


class Workspace:
    """Named flat buffers, each as large as the largest request so far, handed out as leading slices.

    A buffer made by `keep` belongs to one layer and holds its contents until that layer asks again;
    `scratch` buffers are shared by all layers and hold nothing after the operation that took them.
    Everything large that an operation writes comes from here: after the first batch of each size no step
    allocates, and addresses stay what they are, as a captured graph needs.
    """

    def __init__(self, backend: Backend = NUMPY, dtype: str = "float32") -> None:
        self.backend, self.dtype = backend, np.dtype(dtype)
        self._flat: dict[str, Array] = {}
        self._views: dict[tuple[Any, ...], Array] = {}  # the same request gets the same object
        self._plans: dict[str, tuple[Any, ...]] = {}
        self._prefix, self._turn, self._slab, self._moves = "", [0], [np.empty(0, np.uint8)], [0]

    @property
    def generation(self) -> int:
        """Goes up whenever a buffer grows and so moves: what was captured with the old address is void."""
        return self._moves[0]

    def scope(self, prefix: str) -> Workspace:
        """The same buffers, with `keep` names under `prefix`."""
        child = object.__new__(Workspace)
        child.__dict__.update(self.__dict__)
        child._prefix = f"{self._prefix}{prefix}."
        return child

    def scratch(self, name: str, shape: tuple[int, ...], dtype: str | None = None) -> Array:
        """Array of `shape` (C order), contents undefined, valid until the next operation."""
        key = (name, shape, dtype)
        view = self._views.get(key)
        if view is not None:
            return view
        kind, size = np.dtype(dtype or self.dtype), prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.size < size or flat.dtype != kind:
            flat = self._flat[name] = self._allocate(max(size, 1), kind)
            for old in [old for old in self._views if old[0] == name]:
                del self._views[old]
            self._plans.clear()  # they may hold the old buffer
            self._moves[0] += 1
        view = self._views[key] = flat[:size].reshape(shape)
        return view

    def replay(
        self, name: str, arrays: tuple[Array, ...], build: Callable[[], tuple[list[Callable[[], Any]], Any]]
    ) -> Any:
        """Run the calls that `build` makes of these arrays; what it returns beside them is returned.

        The list is kept and run again as long as the arrays are the same objects and no buffer has moved:
        making the views of a small layer's products takes as long as the products.
        """
        name = self._prefix + name
        plan = self._plans.get(name)
        if plan is None or any(a is not b for a, b in zip(plan[0], arrays, strict=True)):
            self._plans.pop(name, None)
            plan = (arrays, *build())
            self._plans[name] = plan
        for call in plan[1]:
            call()
        return plan[2]

    def _allocate(self, size: int, kind: np.dtype) -> Array:
        nbytes = -(-size * kind.itemsize // 64) * 64
        if not self.backend.on_host or nbytes >= SLAB // 2:
            return self.backend.xp.empty(size, kind)
        if self._slab[0].size < nbytes:
            slab = np.empty(SLAB, np.uint8)
            self._slab[0] = slab[-slab.ctypes.data % 64 :]
        part, self._slab[0] = self._slab[0][:nbytes], self._slab[0][nbytes:]
        return part[: size * kind.itemsize].view(kind)

    def keep(self, name: str, shape: tuple[int, ...], dtype: str | None = None) -> Array:
        """As `scratch`, but the buffer is this scope's own."""
        return self.scratch(self._prefix + name, shape, dtype)

    def image(self, name: str, shape: tuple[int, ...], dtype: str | None = None, keep: bool = True) -> Array:
        """Activations of logical shape (N, H, W, C) in the backend's memory order."""
        take = self.keep if keep else self.scratch
        if self.backend.order == "NHWC":
            return take(name, shape, dtype)
        key = (self._prefix + name if keep else name, shape, dtype, "image")
        view = self._views.get(key)
        if view is None:
            n, h, w, c = shape
            view = take(name, (h, w, n, c), dtype).transpose(2, 0, 1, 3)
            self._views[key] = view
        return view

    def ring(self, shape: tuple[int, ...]) -> Array:
        """The next of a few shared activation buffers: valid for the next two calls of `ring`."""
        self._turn[0] = (self._turn[0] + 1) % RING
        return self.image(f"ring{self._turn[0]}", shape, keep=False)

    def rewind(self) -> None:
        """Begin a pass with the same buffer of the ring as the last one did."""
        self._turn[0] = 0

    def passing(self, shape: tuple[int, ...]) -> Array:
        """Activations on their way to the next layer: on the host in the ring, which stays in cache."""
        return self.ring(shape) if self.backend.on_host else self.image("y", shape)

    def hold(self, x: Array) -> Array:
        """Passing activations that a layer needs in its backward: on the host a copy of its own."""
        if not self.backend.on_host:
            return x
        held = self.image("x", x.shape)
        held[...] = x
        return held

    def zeros(self, name: str, size: int, dtype: str) -> Array:
        """A vector of zeros which those who write to it leave at zero."""
        flat = self._flat.get(name)
        if flat is None or flat.size < size:
            self.scratch(name, (size,), dtype).fill(0)
        return self.scratch(name, (size,), dtype)

    def ones(self, length: int) -> Array:
        """A vector of ones: `ones @ x` sums over rows several times faster than `x.sum(0)`."""
        flat = self._flat.get("ones")
        if flat is None or flat.size < length:
            flat = self._flat["ones"] = self._allocate(max(length, 1), self.dtype)
            flat.fill(1)
            self._moves[0] += 1
        return flat[:length]

    def constant(self, name: str, values: np.ndarray) -> Array:
        """`values` on the device in this workspace's dtype, copied there once."""
        flat = self._flat.get(name)
        if flat is None:
            flat = self._flat[name] = self._allocate(values.size, self.dtype)
            flat[...] = self.backend.asarray(values.astype(self.dtype).ravel())
        return flat.reshape(values.shape)

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(int(flat.nbytes) for flat in self._flat.values())
