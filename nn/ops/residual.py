"""The addition of a residual: with a ReLU, where it is no part of batch norm's pass, and of gradients."""

from __future__ import annotations

from typing import Any

from nn.array import Array, namespace, op
from nn.buffers import Buffers


@op
def add_relu_forward(x: Array, residual: Array, y: Array, buffers: Buffers) -> Any:
    """y = relu(x + residual); returns what `add_relu_backward` needs. y must keep its contents."""
    xp, mask = namespace(x), buffers.image("added", y.shape, "bool")
    xp.add(x, residual, out=y)
    xp.greater(y, 0, out=mask)
    xp.maximum(y, 0, out=y)
    return mask


@op
def add_relu_backward(dy: Array, saved: Any, d_residual: Array) -> None:
    """dy becomes x's gradient, and d_residual the same: dy where x + residual was above 0, 0 elsewhere."""
    namespace(dy).multiply(dy, saved, out=dy)
    d_residual[...] = dy


@op
def add(x: Array, y: Array) -> None:
    """x += y, both dense and of one shape and memory order."""
    x += y
