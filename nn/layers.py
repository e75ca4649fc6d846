"""The layers: each holds its parameters and remembers what its backward needs, nothing else.

A layer says only what comes out; what goes in is inferred when a network of layers is built:

    Sequential(
        stem=ConvBN(32),
        res1=Residual(ConvBN(32), ConvBN(32, relu=False)),
        head=GlobalMaxPool(),
        fc=Linear(10),
    )
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from nn.array import Array
from nn.buffers import Buffers
from nn.layer import Layer, OnGrad, Shape, StepContext, text
from nn.ops.conv import Geometry, choose_algorithm, conv_backward, conv_forward
from nn.ops.linear import linear_backward, linear_forward
from nn.ops.norm import After, Count, Norm, norm_backward, norm_forward, norm_inference
from nn.ops.pool import global_pool_backward, global_pool_forward
from nn.ops.residual import add, add_relu_backward, add_relu_forward
from nn.params import Parameters, Spec


class Saved(NamedTuple):
    """What `ConvBN.forward` keeps for its backward."""

    x_shape: tuple[int, ...]
    algorithm: str
    conv: Any
    norm: Any
    over: Count


class ConvBN(Layer):
    """Convolution without bias, padded by half a kernel → batch norm (→ + residual) (→ ReLU) (→ max-pool)."""

    bf16 = True

    def __init__(self, out: int, kernel: int = 3, stride: int = 1, relu: bool = True, pool: int = 0) -> None:
        self.out, self.kernel, self.stride, self.relu, self.pool = out, kernel, stride, relu, pool
        self.geometry = Geometry(stride, kernel // 2)
        self.algorithm: str | None = None  # of the convolution; None: the one that `choose_algorithm` picks

    def infer(self, shape: Shape) -> Shape:
        if len(shape) != 3:
            raise self._refuse(shape, "not an image", "put it before the global pooling")
        least = min(self.out, self.kernel, self.stride)
        if least < 1 or self.kernel % 2 == 0 or self.pool not in (0, 2):
            options = f"out={self.out}, kernel={self.kernel}, stride={self.stride}, pool={self.pool}"
            remedy = "give at least one channel, an odd kernel, a stride from 1 and pool 0 or 2"
            raise ValueError(f"{self.name}: ConvBN({options}): {remedy}")
        h, w = (self.geometry.out_size(size, self.kernel) for size in shape[:2])
        self.conv_shape = (h, w, self.out)
        if self.pool and min(h, w) < 2:
            raise self._refuse(
                shape,
                f"and pooling its {text(self.conv_shape)} leaves no pixel",
                "leave out pool, or use larger images",
            )
        return (h // 2, w // 2, self.out) if self.pool else self.conv_shape

    @property
    def c_in(self) -> int:
        return self.in_shape[2]

    def can_add(self) -> bool:
        """Whether its pass can add a residual, and rectify then."""
        return not self.relu and not self.pool

    def specs(self) -> list[Spec]:
        shape = (self.out, self.c_in, self.kernel, self.kernel)
        return [
            Spec(f"{self.name}.0.weight", shape, fan_in=self.c_in * self.kernel**2),
            Spec(f"{self.name}.1.weight", (self.out,), fill=1.0),
            Spec(f"{self.name}.1.bias", (self.out,)),
        ]

    def statistics(self) -> dict[str, int]:
        return {f"{self.name}.1.running_mean": self.out, f"{self.name}.1.running_var": self.out}

    def flops(self, training: bool) -> int:
        h, w, _ = self.conv_shape
        return 2 * (2 + self.need_dx if training else 1) * h * w * self.kernel**2 * self.c_in * self.out

    def bind(self, params: Parameters, statistics: dict[str, Array], buffers: Buffers) -> None:
        super().bind(params, statistics, buffers)
        self.w, self.gamma, self.beta = (params[spec.name] for spec in self.specs())
        self.running_mean, self.running_var = (statistics[name] for name in self.statistics())
        self.running_mean.fill(0)
        self.running_var.fill(1)
        self.norm = Norm(self.gamma.value, self.beta.value, self.running_mean, self.running_var)

    def choose(self, x_shape: tuple[int, ...]) -> str:
        """The algorithm of the convolution of such a batch."""
        backend = self.buffers.backend
        return self.algorithm or choose_algorithm(
            x_shape, self.w.value.shape, self.geometry, backend, self.need_dx
        )

    def forward(self, x: Array, step: StepContext, residual: Array | None = None) -> Array:
        after = After(self.relu or residual is not None, self.pool > 0, residual)
        return (self._train if step.training else self._infer)(x, step, after)

    def _infer(self, x: Array, step: StepContext, after: After) -> Array:
        buffers, n = self.buffers, len(x)
        z = buffers.activation((n, *self.conv_shape))
        conv_forward(x, self.w.compute, self.geometry, z, buffers, self.choose(x.shape), keep=False)
        buffers.release(x)
        y = buffers.activation((n, *self.out_shape)) if self.pool else z
        norm_inference(z, self.norm, y, after, buffers)
        if self.pool:
            buffers.release(z)
        return y

    def _train(self, x: Array, step: StepContext, after: After) -> Array:
        buffers, n, algorithm = self.buffers, len(x), self.choose(x.shape)
        h, w, _ = self.conv_shape
        z = buffers.image("z", (n, h, w, self.out))
        saved = conv_forward(x, self.w.compute, self.geometry, z, buffers, algorithm)
        buffers.release(x)
        y = buffers.output((n, *self.out_shape))
        count = Count(step.global_batch * h * w, step.all_reduce)
        norm = norm_forward(z, self.norm, y, after, count, buffers)
        self.saved = Saved(x.shape, algorithm, saved, norm, count)
        return y

    def backward(self, dy: Array, step: StepContext, on_grad: OnGrad) -> Array | None:
        return self.backward_added(dy, step, on_grad)[0]

    def backward_added(
        self, dy: Array, step: StepContext, on_grad: OnGrad
    ) -> tuple[Array | None, Array | None]:
        """dL/dx, and the gradient of the residual where one was added, else None."""
        buffers, saved = self.buffers, self.saved
        grads = self.gamma.grad, self.beta.grad
        dz, d_residual = norm_backward(dy, saved.norm, self.norm, *grads, saved.over, buffers)
        if dz is not dy and d_residual is None:
            buffers.release(dy)
        # what the side stream reads must not be handed out again before it is joined
        assert not (buffers.backend.side_stream and buffers.is_pooled(dz))
        dx = buffers.activation(saved.x_shape) if self.need_dx else None
        conv_backward(
            dz, saved.conv, self.w.compute, self.geometry, self.w.grad, dx, buffers, saved.algorithm
        )
        if dz is dy:
            buffers.release(dy)
        for parameter in (self.beta, self.gamma, self.w):
            on_grad(parameter)
        return dx, d_residual

    def tune(self, n: int, training: bool) -> None:
        """Run the convolution once for a batch of n on whatever memory holds, so that a device chooses plans.

        With `training` the gradient of the weights is overwritten.
        """
        buffers, geometry = self.buffers, self.geometry
        x, y = buffers.activation((n, *self.in_shape)), buffers.activation((n, *self.conv_shape))
        dx = buffers.activation(x.shape) if self.need_dx else None
        algorithm = self.choose(x.shape)
        conv_forward(x, self.w.compute, geometry, y, buffers, algorithm, keep=False)
        if training:  # a device's own algorithms keep nothing but x
            conv_backward(y, x, self.w.compute, geometry, self.w.grad, dx, buffers, algorithm)
        buffers.release_all()


class Sequential(Layer):
    """One layer after another, by their numbers or names."""

    bf16 = True

    def __init__(self, *layers: Layer, **more: Layer) -> None:
        self.layers = {**{str(i): layer for i, layer in enumerate(layers)}, **more}

    def infer(self, shape: Shape) -> Shape:
        prefix = f"{self.name}." if self.name else ""
        for i, (key, layer) in enumerate(self.layers.items()):
            shape = layer.build(prefix + key, shape, self.need_dx or i > 0)
        return shape

    def children(self) -> Sequence[Layer]:
        return tuple(self.layers.values())

    def forward(self, x: Array, step: StepContext) -> Array:
        for layer in self.layers.values():
            x = layer.forward(x, step)
        return x

    def backward(self, dy: Array, step: StepContext, on_grad: OnGrad) -> Array | None:
        for layer in reversed(self.layers.values()):
            dy = layer.backward(dy, step, on_grad)
        return dy


class Residual(Layer):
    """y = relu(body(x) + shortcut(x)); without a shortcut, x itself is added.

    Where the body ends with a ConvBN(…, relu=False), batch norm's pass adds and rectifies.
    """

    bf16 = True

    def __init__(self, *body: Layer, shortcut: Layer | None = None) -> None:
        self.body, self.shortcut = body, shortcut

    def infer(self, shape: Shape) -> Shape:
        if not self.body:
            raise ValueError(f"{self.name}: Residual() has no layers: give it at least one")
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
        last = self.body[-1]
        self.adder = last if isinstance(last, ConvBN) and last.can_add() else None
        return out

    def children(self) -> Sequence[Layer]:
        return (self.shortcut, *self.body) if self.shortcut else self.body

    def forward(self, x: Array, step: StepContext) -> Array:
        buffers, (*body, last) = self.buffers, self.body
        buffers.retain(x)
        residual = self.shortcut.forward(x, step) if self.shortcut else x
        for layer in body:
            x = layer.forward(x, step)
        if self.adder:
            y = self.adder.forward(x, step, residual)
        else:
            x = last.forward(x, step)
            y = buffers.output(x.shape) if step.training else buffers.activation(x.shape)
            self.saved = add_relu_forward(x, residual, y, buffers)
            buffers.release(x)
        buffers.release(residual)
        return y

    def backward(self, dy: Array, step: StepContext, on_grad: OnGrad) -> Array | None:
        buffers, (*body, last) = self.buffers, self.body
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
            add(dx, d_residual)
        buffers.release(d_residual)
        return dx


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


class Linear(Layer):
    """y = x wᵀ + b."""

    bf16 = True

    def __init__(self, out: int) -> None:
        self.out = out

    def infer(self, shape: Shape) -> Shape:
        if len(shape) != 1:
            raise self._refuse(shape, "not a vector", "put GlobalMaxPool() or GlobalAvgPool() before it")
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
        y = self.buffers.persistent("y", (len(x), self.out), self.dtype)
        linear_forward(x, self.w.value, self.b.value, y)
        self.saved = x
        return y

    def backward(self, dy: Array, step: StepContext, on_grad: OnGrad) -> Array:
        x, buffers = self.saved, self.buffers
        dx = buffers.persistent("dx", x.shape, self.dtype)
        linear_backward(dy, x, self.w.value, self.w.grad, self.b.grad, dx)
        for parameter in (self.b, self.w):
            on_grad(parameter)
        return dx
