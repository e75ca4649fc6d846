"""Layers that hold layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from nn.array import Array
from nn.layer import Layer, OnGrad, Shape, StepContext, does_as, text
from nn.layers.activation import ReLU
from nn.layers.convolution import Conv
from nn.layers.normalisation import BatchNorm
from nn.layers.pooling import MaxPool
from nn.ops.residual import add, add_relu_backward, add_relu_forward


def fuse(layers: Sequence[Layer]) -> list[Layer]:
    """Those of `layers`, built and one after another, that do a pass, for what they absorbed too."""
    passes: list[Layer] = []
    for layer in layers:
        if not (passes and passes[-1].absorb(layer)):
            passes.append(layer)
    for before, after in pairwise(passes):
        if isinstance(after, BatchNorm) and does_as(after, BatchNorm):
            after.owns_input = before.hand_over()
        if isinstance(after, Residual) and does_as(after, Residual):
            after.before = before
    return passes


def require_layers(owner: Layer, layers: Sequence[object]) -> None:
    """ValueError if `owner` has none, or something else among them."""
    kind = type(owner).__name__
    where = f"{owner.name}: {kind}" if owner.name else kind
    if not layers:
        raise ValueError(f"{where}() has no layers: give it at least one")
    for layer in layers:
        if isinstance(layer, type):
            raise ValueError(f"{where} holds the class {layer.__name__}: write {layer.__name__}()")
        if not isinstance(layer, Layer):
            raise ValueError(f"{where} holds a {type(layer).__name__}, no layer: give layers, one by one")


class Sequential(Layer):
    """One layer after another, by their numbers or names; one pass does the work of several where it can."""

    bf16 = True

    def __init__(self, *layers: Layer, **more: Layer) -> None:
        self.layers = {**{str(i): layer for i, layer in enumerate(layers)}, **more}

    def infer(self, shape: Shape) -> Shape:
        prefix = f"{self.name}." if self.name else ""
        require_layers(self, self.children())
        for i, (key, layer) in enumerate(self.layers.items()):
            shape = layer.build(prefix + key, shape, self.need_dx or i > 0)
        self.passes = fuse(self.children())
        return shape

    def children(self) -> Sequence[Layer]:
        return tuple(self.layers.values())

    def absorb(self, layer: Layer) -> bool:
        return does_as(self, Sequential) and self.passes[-1].absorb(layer)

    def hand_over(self) -> bool:
        return does_as(self, Sequential) and self.passes[-1].hand_over()

    def take_part(self, dy: Array) -> bool:
        return does_as(self, Sequential) and self.passes[-1].take_part(dy)

    def can_add(self) -> bool:
        return does_as(self, Sequential) and self.passes[-1].can_add()

    def forward(self, x: Array, step: StepContext) -> Array:
        for layer in self.passes:
            x = layer.forward(x, step)
        return x

    def backward(self, dy: Array, step: StepContext, on_grad: OnGrad) -> Array | None:
        for layer in reversed(self.passes):
            dy = layer.backward(dy, step, on_grad)
        return dy

    def forward_added(self, x: Array, step: StepContext, residual: Array) -> Array:
        *first, last = self.passes
        for layer in first:
            x = layer.forward(x, step)
        return last.forward_added(x, step, residual)

    def backward_added(self, dy: Array, step: StepContext, on_grad: OnGrad) -> tuple[Any, Array]:
        *first, last = self.passes
        dx, d_residual = last.backward_added(dy, step, on_grad)
        for layer in reversed(first):
            dx = layer.backward(dx, step, on_grad)
        return dx, d_residual


class ConvBN(Sequential):
    """Convolution without bias, padded by half a kernel → batch norm (→ ReLU) (→ max-pool).

    At the end of a residual's body, without ReLU and pooling, its pass adds the residual and rectifies.
    """

    def __init__(self, out: int, kernel: int = 3, stride: int = 1, relu: bool = True, pool: int = 0) -> None:
        self.conv, self.norm = Conv(out, kernel, stride, bias=False), BatchNorm()
        after = [*([ReLU()] if relu else []), *([MaxPool(pool)] if pool else [])]
        super().__init__(self.conv, self.norm, *after)


class Residual(Layer):
    """y = relu(body(x) + shortcut(x)); without a shortcut, x itself is added.

    Where the body ends with a batch norm, as ConvBN(…, relu=False) does, its pass adds and rectifies.
    """

    bf16 = True

    def __init__(self, *body: Layer, shortcut: Layer | None = None) -> None:
        self.body, self.shortcut = body, shortcut
        self.before: Layer | None = None  # whose pass may add the gradients of body and shortcut

    def infer(self, shape: Shape) -> Shape:
        require_layers(self, self.body)
        require_layers(self, [self.shortcut] if self.shortcut else self.body)
        out = shape
        for i, layer in enumerate(self.body):
            out = layer.build(f"{self.name}.{i}", out, self.need_dx or i > 0)
        added = shape
        if self.shortcut:
            added = self.shortcut.build(f"{self.name}.shortcut", shape, self.need_dx)
        if added != out:
            made = f"Residual's body makes {text(out)} of {text(shape)}, its shortcut {text(added)}"
            remedy = "give shortcut=ConvBN(…) with the body's channels, stride and pool"
            raise ValueError(f"{self.name}: {made}: {remedy}")
        if len(out) != 3:
            raise self._refuse(shape, "and its body makes no image", "put it before Flatten() or the pooling")
        self.passes = fuse(self.body)
        last = self.passes[-1]
        self.adder = last if last.can_add() else None
        return out

    def children(self) -> Sequence[Layer]:
        return (self.shortcut, *self.body) if self.shortcut else self.body

    def take_part(self, dy: Array) -> bool:
        return self.adder is not None and does_as(self, Residual) and self.adder.take_part(dy)

    def forward(self, x: Array, step: StepContext) -> Array:
        buffers, (*body, last) = self.buffers, self.passes
        buffers.retain(x)
        residual = self.shortcut.forward(x, step) if self.shortcut else x
        for layer in body:
            x = layer.forward(x, step)
        if self.adder:
            y = self.adder.forward_added(x, step, residual)
        else:
            x = last.forward(x, step)
            y = buffers.output(x.shape) if step.training else buffers.activation(x.shape)
            self.saved = add_relu_forward(x, residual, y, buffers)
            buffers.release(x)
        buffers.release(residual)
        return y

    def backward(self, dy: Array, step: StepContext, on_grad: OnGrad) -> Array | None:
        buffers, (*body, last) = self.buffers, self.passes
        dx: Array | None
        d_residual: Array | None
        if self.adder:
            dx, d_residual = self.adder.backward_added(dy, step, on_grad)
        else:
            d_residual = buffers.activation(dy.shape)
            add_relu_backward(dy, self.saved, d_residual)
            dx = last.backward(dy, step, on_grad)
        for layer in reversed(body):
            dx = layer.backward(dx, step, on_grad)
        if self.shortcut:
            d_residual = self.shortcut.backward(d_residual, step, on_grad)
        if self.need_dx:
            if self.before and self.before.take_part(d_residual):
                return dx
            add(dx, d_residual)
        buffers.release(d_residual)
        return dx
