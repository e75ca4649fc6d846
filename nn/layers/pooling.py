"""Pooling over windows and over whole images."""

from __future__ import annotations

from typing import Any

from nn.array import Array
from nn.layer import Layer, OnGrad, Shape, StepContext, text, whole
from nn.ops.pool import Windows, global_pool_backward, global_pool_forward, pool_backward, pool_forward


class Pool(Layer):
    """One value of each channel for each window of `window` (or h × w) pixels, `stride` apart.

    Without `stride` windows lie side by side; rows and columns left over are unused.
    """

    bf16 = True
    average = False

    def __init__(self, window: int | tuple[int, int], stride: int | None = None, padding: int = 0) -> None:
        size = tuple(window) if isinstance(window, tuple | list) else (window, window)
        beside = size[0] if len(set(size)) == 1 else 0  # `infer` refuses 0
        self.over = Windows(size, beside if stride is None else stride, padding)  # type: ignore[arg-type]

    def infer(self, shape: Shape) -> Shape:
        if len(shape) != 3:
            raise self._refuse(shape, "not an image", "put it before Flatten() or the global pooling")
        size, stride, padding = self.over
        fits = len(size) == 2 and whole(*size, stride, padding) and min(*size, stride, padding + 1) > 0
        if not fits or 2 * padding > min(size):
            given = f"window={size}, {stride=}, {padding=}"
            remedy = "give whole pixels, at most half a window of padding, and a stride if it is not square"
            raise ValueError(f"{self.name}: {type(self).__name__}({given}): {remedy}")
        if any(side + 2 * padding < window for side, window in zip(shape, size, strict=False)):
            why = f"smaller than its window of {text(size)}"
            raise self._refuse(shape, why, "leave it out, or use larger images")
        geometry = self.over.geometry()
        h, w = (geometry.out_size(side, window) for side, window in zip(shape, size, strict=False))
        return h, w, shape[2]

    def forward(self, x: Array, step: StepContext) -> Array:
        y = self.output(len(x), step)
        self.saved = pool_forward(x, y, self.over, self.average, self.buffers, keep=step.training)
        self.buffers.release(x)
        return y

    def backward(self, dy: Array, step: StepContext, on_grad: OnGrad) -> Any:
        dx = None
        if self.need_dx:
            dx = self.gradient(len(dy))
            pool_backward(dy, self.saved, self.over, dx)
        self.buffers.release(dy)
        return dx


class MaxPool(Pool):
    """The largest value of each channel in each window; the first of equal ones gets the gradient."""


class AvgPool(Pool):
    """The mean of each channel in each window, where padding counts as zeros."""

    average = True


class GlobalPool(Layer):
    """(H, W, C) → (C,): one value of each channel."""

    bf16 = True
    average = False

    def infer(self, shape: Shape) -> Shape:
        if len(shape) != 3:
            raise self._refuse(shape, "not an image", "pool once")
        return shape[2:]

    def forward(self, x: Array, step: StepContext) -> Array:
        y = self.buffers.persistent("pooled", (len(x), *self.out_shape), self.dtype)
        global_pool_forward(x, y, self.average)
        if step.training:
            self.saved = self.buffers.save(x), y
        self.buffers.release(x)
        return y

    def backward(self, dy: Array, step: StepContext, on_grad: OnGrad) -> Array | None:
        x, y = self.saved
        if not self.need_dx:
            return None
        dx = self.buffers.activation(x.shape)
        global_pool_backward(dy, x, y, dx, self.buffers, self.average)
        return dx


class GlobalMaxPool(GlobalPool):
    """The largest value of each channel of an image."""


class GlobalAvgPool(GlobalPool):
    """The mean of each channel of an image."""

    average = True
