"""ReLU and leaky ReLU."""

from __future__ import annotations

from typing import Any

from nn.array import Array
from nn.layer import Layer, OnGrad, Shape, StepContext
from nn.ops.activation import activation_backward, activation_forward


class ReLU(Layer):
    """y = max(x, 0). After a convolution or batch norm it is part of that pass."""

    bf16 = True
    slope = 0.0

    def infer(self, shape: Shape) -> Shape:
        return shape

    def forward(self, x: Array, step: StepContext) -> Array:
        y = self.output(len(x), step)
        self.saved = activation_forward(x, None, y, self.slope, self.buffers, keep=step.training)
        self.buffers.release(x)
        return y

    def backward(self, dy: Array, step: StepContext, on_grad: OnGrad) -> Any:
        activation_backward(dy, self.saved, None, self.slope, self.buffers)
        if self.need_dx:
            return dy
        self.buffers.release(dy)
        return None


class LeakyReLU(ReLU):
    """y = x above 0, `slope` · x elsewhere. After a convolution it is part of that pass."""

    def __init__(self, slope: float = 0.01) -> None:
        self.slope = slope

    def infer(self, shape: Shape) -> Shape:
        if not isinstance(self.slope, int | float) or not 0 <= self.slope < 1:
            raise ValueError(f"{self.name}: LeakyReLU({self.slope}): give a slope from 0, below 1")
        return shape
