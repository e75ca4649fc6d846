"""The protocol of layers.

Activations pass from hand to hand: `forward` takes over x and `backward` takes over dy, and each releases it
or returns it. `backward` may overwrite dy; `forward` must not write to x, which the layer before may need.
What either returns the caller holds. `Buffers.activation` gives the memory; in training,
`Buffers.output` for what forward returns and `Buffers.save` for what backward needs. Who needs an array twice
retains it. Vectors (N, C) are persistent, their maker's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nn.array import Array
from nn.buffers import Buffers
from nn.ops.norm import AllReduce
from nn.params import Parameter, Parameters, Spec

Shape = tuple[int, ...]
"""Of what goes through a network, for one image: (H, W, C), after global pooling (C,)."""

OnGrad = Callable[[Parameter], Any]
"""Called with a parameter as soon as its gradient is complete."""


@dataclass(frozen=True)
class StepContext:
    """What one pass through the network is told.

    `global_batch` is the number of images in the global batch, of which this rank computes a part;
    `all_reduce` sums batch norm's statistics over ranks (None: use this rank's part alone, and then
    `global_batch` is its images). `keys` (N,) uint32 has a random number for each image of the part, new in
    each epoch, for layers that are `random`.
    """

    training: bool
    global_batch: int = 0
    all_reduce: AllReduce | None = None
    keys: Array | None = None


def text(shape: Shape) -> str:
    """(H, W, C) as "H×W×C"."""
    return "×".join(map(str, shape))


class Layer(ABC):
    """The protocol. `build` and `bind` come once, in this order, before any pass."""

    name = ""  # the path of names, once built; a layer that is given one before keeps it
    in_shape: Shape = ()
    out_shape: Shape = ()
    need_dx = True  # whether the gradient of its input is wanted
    bf16 = False  # whether it takes activations that hold the bits of bfloat16, which CUDA kernels alone do
    random = False  # whether it wants `StepContext.keys`

    def build(self, name: str, shape: Shape, need_dx: bool = True) -> Shape:
        """Take a place in a network; returns what comes out of `shape`. ValueError where it does not fit."""
        if self.in_shape:
            raise ValueError(f"{self.name}: one layer stands in two places ({name} too): make one for each")
        self.name, self.in_shape, self.need_dx = self.name or name, shape, need_dx
        self.out_shape = self.infer(shape)
        return self.out_shape

    @abstractmethod
    def infer(self, shape: Shape) -> Shape:
        """The shape of what comes out of `shape`; builds the children."""

    def children(self) -> Sequence[Layer]:
        """The layers inside, in the order of their parameters."""
        return ()

    def walk(self) -> Iterator[Layer]:
        """This layer and all inside, in the order of their parameters."""
        yield self
        for child in self.children():
            yield from child.walk()

    def specs(self) -> list[Spec]:
        """Its own parameters, without the children's."""
        return []

    def statistics(self) -> dict[str, int]:
        """Its own running statistics, which a checkpoint holds beside the parameters: name → size."""
        return {}

    def flops(self, training: bool) -> int:
        """Its own floating-point operations for one image: two a product, convolutions done directly.

        To train: forward, weight gradient and, where it is wanted, input gradient. Products alone count.
        """
        return 0

    def bind(self, params: Parameters, statistics: dict[str, Array], buffers: Buffers) -> None:
        """Take memory: its views of parameters and statistics, by name, and its scope of `buffers`."""
        self.buffers, self.dtype = buffers.scope(self.name), str(params.dtype)

    @abstractmethod
    def forward(self, x: Array, step: StepContext) -> Array:
        """What comes out of x (N, *in_shape)."""

    @abstractmethod
    def backward(self, dy: Array, step: StepContext, on_grad: OnGrad) -> Any:
        """dL/dx for dy = dL/dy, None unless `need_dx`; `on_grad` hears of each gradient as it is queued."""

    # fusion: how one pass does the work of several layers

    def absorb(self, layer: Layer) -> bool:
        """Whether its own pass now does the work of `layer`, too, which follows it in a `Sequential`."""
        return False

    def hand_over(self) -> bool:
        """Whether what it returns in training now belongs to the next layer, until that one's backward."""
        return False

    def take_part(self, dy: Array) -> bool:
        """Take over a part of dL/dy, which its next `backward` adds to the other; False if it does not."""
        return False

    def can_add(self) -> bool:
        """Whether `forward_added` and `backward_added` do a residual's addition in its pass."""
        return False

    def forward_added(self, x: Array, step: StepContext, residual: Array) -> Array:
        """relu(forward(x) + residual)."""
        raise NotImplementedError

    def backward_added(self, dy: Array, step: StepContext, on_grad: OnGrad) -> tuple[Any, Array]:
        """`backward` of `forward_added`: dL/dx, and the gradient of the residual."""
        raise NotImplementedError

    # memory

    def output(self, n: int, step: StepContext) -> Array:
        """Memory for what comes out of n images."""
        shape = (n, *self.out_shape)
        if len(shape) == 2:
            return self.buffers.persistent("y", shape, self.dtype)
        return self.buffers.output(shape) if step.training else self.buffers.activation(shape)

    def gradient(self, n: int) -> Array:
        """Memory for dL/dx of n images."""
        shape = (n, *self.in_shape)
        if len(shape) == 2:
            return self.buffers.persistent("dx", shape, self.dtype)
        return self.buffers.activation(shape)

    def _refuse(self, shape: Shape, why: str, remedy: str) -> ValueError:
        return ValueError(f"{self.name}: {type(self).__name__} gets {text(shape)}, {why}: {remedy}")


def does_as(layer: Layer, kind: type[Layer]) -> bool:
    """Whether a layer's passes are those of `kind`: what somebody derives may do otherwise."""
    return type(layer).forward is kind.forward and type(layer).backward is kind.backward


def whole(*values: object) -> bool:
    """Whether these are whole numbers."""
    return all(isinstance(value, int | np.integer) and not isinstance(value, bool) for value in values)


def named(name: str, layer: Layer) -> Layer:
    """`layer`, with a name of its own in checkpoints instead of the path of names."""
    layer.name = name
    return layer
