"""All parameters in one flat vector, all gradients in another; named views into both."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import numpy as np

from nn.array import Array
from nn.device import Backend
from nn.ops.bf16 import to_bf16

ALIGN = 16
"""Parameters start at multiples of this many elements (64 bytes of float32)."""

STEP_METRICS = ("loss", "correct", "stop")
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
    """A named slice [start, stop) of the flat vectors.

    A convolution's is indexed as (kh, kw, C, O). In memory it lies so on the host, and as (O, kh, kw, C) on a
    GPU, as cuDNN's tensor-core kernels expect; other shapes are what they are. `compute` is what convolutions
    read: `value` itself, or its copy in another type.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    order: str
    value: Array = field(init=False, repr=False)
    grad: Array = field(init=False, repr=False)
    compute: Array = field(init=False, repr=False)

    def view(self, flat: Array) -> Array:
        """This parameter's part of a flat vector."""
        part = flat[self.start : self.stop]
        if len(self.shape) != 4:
            return part.reshape(self.shape)
        o, c, kh, kw = self.shape
        if self.order == "NHWC":
            return part.reshape(o, kh, kw, c).transpose(1, 2, 3, 0)
        return part.reshape(kh, kw, c, o)

    def to_checkpoint(self, flat: np.ndarray) -> np.ndarray:
        """This parameter's part of a flat host vector, in PyTorch's layout: a copy."""
        part = self.view(flat)
        return np.array(part.transpose(3, 2, 0, 1) if part.ndim == 4 else part, order="C")

    def from_checkpoint(self, tensor: np.ndarray, flat: np.ndarray) -> None:
        """The reverse: write `tensor` (PyTorch's layout) into this parameter's part of `flat`."""
        part = self.view(flat)
        part[...] = tensor.transpose(2, 3, 1, 0) if part.ndim == 4 else tensor


class Parameters:
    """The flat vectors `values` and `grads` and their named views.

    `grads` is followed in memory by one element for each name in STEP_METRICS; `comm_buffer` is both
    together, the vector that travels between ranks. Padding between parameters is and stays zero. With
    `narrow`, a dtype other than `dtype`, `compute` is a copy of the values in it, which the optimizer keeps
    up to date; else None.
    """

    def __init__(self, specs: list[Spec], backend: Backend, dtype: str, narrow: str | None = None) -> None:
        self.backend, self.dtype = backend, np.dtype(dtype)
        starts, size = [], 0
        for spec in specs:
            starts.append(size)
            size += -(-prod(spec.shape) // ALIGN) * ALIGN
        self.values = backend.xp.zeros(size, self.dtype)
        self.comm_buffer = backend.xp.zeros(size + len(STEP_METRICS), self.dtype)
        self.grads, self.step_metrics = self.comm_buffer[:size], self.comm_buffer[size:]
        self.compute: Array | None = backend.xp.zeros(size, narrow) if narrow and narrow != dtype else None
        self._specs = specs
        self._named = {spec.name: self._view(spec, start) for spec, start in zip(specs, starts, strict=True)}

    def _view(self, spec: Spec, start: int) -> Parameter:
        made = Parameter(spec.name, spec.shape, start, start + prod(spec.shape), self.backend.order)
        made.value, made.grad = made.view(self.values), made.view(self.grads)
        made.compute = made.value if self.compute is None else made.view(self.compute)
        return made

    def twin(self) -> Parameters:
        """The same values, with gradients and step metrics of their own."""
        twin = copy.copy(self)
        twin.comm_buffer = self.backend.xp.zeros_like(self.comm_buffer)
        size = self.grads.size
        twin.grads, twin.step_metrics = twin.comm_buffer[:size], twin.comm_buffer[size:]
        twin._named = {spec.name: twin._view(spec, self[spec.name].start) for spec in self._specs}
        return twin

    def initialise(self, rng: np.random.Generator) -> None:
        """PyTorch's defaults, U(−1/√fan_in, 1/√fan_in), drawn in float64 in a fixed order and layout."""
        flat = np.zeros(self.values.size, self.dtype)
        for spec, parameter in zip(self._specs, self, strict=True):
            bound = spec.fan_in**-0.5 if spec.fan_in else 0.0
            drawn = rng.uniform(-bound, bound, spec.shape) if spec.fan_in else np.full(spec.shape, spec.fill)
            parameter.from_checkpoint(drawn, flat)
        self.values[...] = self.backend.asarray(flat)
        self.refresh()

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
        if flat is self.values:
            self.refresh()

    def refresh(self) -> None:
        """Copy the values to `compute`, where there is one."""
        if self.compute is not None:
            to_bf16(self.values, self.compute)
