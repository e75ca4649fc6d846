"""All parameters in one flat vector, all gradients in another; named views into both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import numpy as np

from nn.backend import Array, Backend

ALIGN = 16
"""Parameters start at multiples of this many elements (64 bytes of float32)."""

TAIL = ("loss", "correct", "stop")
"""Scalars behind the gradient that are summed over ranks with it, so that they cost no message."""


@dataclass(frozen=True)
class Spec:
    """A parameter before it has memory: `shape` as a checkpoint (PyTorch) has it, its fan-in, its init."""

    name: str
    shape: tuple[int, ...]
    fan_in: int = 0
    fill: float = 0.0


@dataclass
class Parameter:
    """A named slice [start, stop) of the flat vectors; convolutions lie as (kh, kw, C, O) in memory."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    value: Array = field(repr=False)
    grad: Array = field(repr=False)

    def to_checkpoint(self, flat: np.ndarray) -> np.ndarray:
        """This parameter's part of a flat host vector, in PyTorch's layout: a copy."""
        part = flat[self.start : self.stop].reshape(self.value.shape)
        return np.array(part.transpose(3, 2, 0, 1) if part.ndim == 4 else part, order="C")

    def from_checkpoint(self, tensor: np.ndarray, flat: np.ndarray) -> None:
        """The reverse: write `tensor` (PyTorch's layout) into this parameter's part of `flat`."""
        part = flat[self.start : self.stop].reshape(self.value.shape)
        part[...] = tensor.transpose(2, 3, 1, 0) if part.ndim == 4 else tensor


class Parameters:
    """The flat vectors `values` and `grads` and their named views.

    `grads` is followed in memory by one element for each name in TAIL; `wire` is both together, the
    vector that travels between ranks. Padding between parameters is and stays zero.
    """

    def __init__(self, specs: list[Spec], backend: Backend, dtype: str) -> None:
        self.backend, self.dtype = backend, np.dtype(dtype)
        starts, size = [], 0
        for spec in specs:
            starts.append(size)
            size += -(-prod(spec.shape) // ALIGN) * ALIGN
        self.values = backend.xp.zeros(size, self.dtype)
        self.wire = backend.xp.zeros(size + len(TAIL), self.dtype)
        self.grads, self.tail = self.wire[:size], self.wire[size:]
        self._specs = specs
        self._named = {
            spec.name: self._view(spec, start) for spec, start in zip(specs, starts, strict=True)
        }

    def _view(self, spec: Spec, start: int) -> Parameter:
        stop = start + prod(spec.shape)
        shape = tuple(spec.shape[i] for i in (2, 3, 1, 0)) if len(spec.shape) == 4 else spec.shape
        value, grad = (flat[start:stop].reshape(shape) for flat in (self.values, self.grads))
        return Parameter(spec.name, spec.shape, start, stop, value, grad)

    def initialise(self, rng: np.random.Generator) -> None:
        """PyTorch's defaults, U(−1/√fan_in, 1/√fan_in), drawn in float64 in a fixed order and layout."""
        flat = np.zeros(self.values.size, self.dtype)
        for spec, parameter in zip(self._specs, self, strict=True):
            bound = spec.fan_in**-0.5 if spec.fan_in else 0.0
            drawn = rng.uniform(-bound, bound, spec.shape) if spec.fan_in else np.full(spec.shape, spec.fill)
            parameter.from_checkpoint(drawn, flat)
        self.values[...] = self.backend.asarray(flat)

    def __getitem__(self, name: str) -> Parameter:
        return self._named[name]

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self._named.values())

    @property
    def count(self) -> int:
        """Trainable scalars, padding apart."""
        return sum(parameter.stop - parameter.start for parameter in self)

    def to_checkpoint(self, flat: Array) -> dict[str, np.ndarray]:
        """A flat vector (values, or an optimizer's moment) as named host arrays in PyTorch's layout."""
        host = self.backend.to_host(flat)
        return {parameter.name: parameter.to_checkpoint(host) for parameter in self}

    def from_checkpoint(self, tensors: dict[str, np.ndarray], flat: Array) -> None:
        """Write named host arrays into the flat vector `flat`."""
        host = np.zeros(flat.size, self.dtype)
        for parameter in self:
            parameter.from_checkpoint(tensors[parameter.name], host)
        flat[...] = self.backend.asarray(host)
