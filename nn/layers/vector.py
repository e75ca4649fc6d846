"""What makes vectors, and what leaves the shape of its input alone: flatten, linear, dropout."""

from __future__ import annotations

import zlib
from math import prod
from typing import Any

from nn.array import Array
from nn.buffers import Buffers
from nn.layer import Layer, OnGrad, Shape, StepContext, whole
from nn.ops.dropout import dropout
from nn.ops.flatten import flatten, unflatten
from nn.ops.linear import linear_backward, linear_forward
from nn.params import Parameters, Spec


class Flatten(Layer):
    """(H, W, C) → (C·H·W,), channel by channel as PyTorch does."""

    bf16 = True

    def infer(self, shape: Shape) -> Shape:
        if len(shape) != 3:
            raise self._refuse(shape, "not an image", "flatten once")
        return (prod(shape),)

    def forward(self, x: Array, step: StepContext) -> Array:
        y = self.output(len(x), step)
        flatten(x, y)
        self.buffers.release(x)
        return y

    def backward(self, dy: Array, step: StepContext, on_grad: OnGrad) -> Any:
        if not self.need_dx:
            return None
        dx = self.gradient(len(dy))
        unflatten(dy, dx)
        return dx


class Dropout(Layer):
    """Each value is 0 with probability `rate`, and else divided by 1 − rate; nothing happens in evaluation.

    What is dropped depends on the seed, the epoch, the image and the layer's name: not on the ranks.
    """

    bf16 = True
    random = True

    def __init__(self, rate: float = 0.5) -> None:
        self.rate = rate

    def infer(self, shape: Shape) -> Shape:
        if not isinstance(self.rate, int | float) or not 0 <= self.rate < 1:
            raise ValueError(f"{self.name}: Dropout({self.rate}): give a rate from 0, below 1")
        self.salt = zlib.crc32(self.name.encode())
        return shape

    def forward(self, x: Array, step: StepContext) -> Array:
        if not step.training:
            return x
        assert step.keys is not None, "a step without keys for its images"
        self.keys, y = step.keys, self.output(len(x), step)
        dropout(x, y, self.keys, self.salt, self.rate, self.buffers)
        self.buffers.release(x)
        return y

    def backward(self, dy: Array, step: StepContext, on_grad: OnGrad) -> Any:
        if not self.need_dx:
            self.buffers.release(dy)
            return None
        dropout(dy, dy, self.keys, self.salt, self.rate, self.buffers)
        return dy


class Linear(Layer):
    """y = x wᵀ + b."""

    bf16 = True

    def __init__(self, out: int) -> None:
        self.out = out

    def infer(self, shape: Shape) -> Shape:
        if len(shape) != 1:
            remedy = "put GlobalMaxPool(), GlobalAvgPool() or Flatten() before it"
            raise self._refuse(shape, "not a vector", remedy)
        if not whole(self.out) or self.out < 1:
            raise ValueError(f"{self.name}: Linear({self.out}): give a whole number, 1 or more")
        return (self.out,)

    def specs(self) -> list[Spec]:
        (c_in,) = self.in_shape
        return [
            Spec(f"{self.name}.weight", (self.out, c_in), fan_in=c_in),
            Spec(f"{self.name}.bias", (self.out,), fan_in=c_in),
        ]

    def flops(self, training: bool) -> int:
        return 2 * (2 + self.need_dx if training else 1) * self.in_shape[0] * self.out

    def bind(self, params: Parameters, statistics: dict[str, Array], buffers: Buffers) -> None:
        super().bind(params, statistics, buffers)
        self.w, self.b = (params[spec.name] for spec in self.specs())

    def forward(self, x: Array, step: StepContext) -> Array:
        y = self.output(len(x), step)
        linear_forward(x, self.w.value, self.b.value, y)
        self.saved = x
        return y

    def backward(self, dy: Array, step: StepContext, on_grad: OnGrad) -> Array:
        x = self.saved
        dx = self.gradient(len(x))
        linear_backward(dy, x, self.w.value, self.w.grad, self.b.grad, dx)
        for parameter in (self.b, self.w):
            on_grad(parameter)
        return dx
