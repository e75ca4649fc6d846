"""Layers: each holds its parameters and remembers what its backward needs, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nn import functional as F
from nn.backend import Array
from nn.conv import Geometry, choose_form, conv_backward, conv_forward
from nn.params import Parameter, Parameters, Spec
from nn.workspace import Workspace

OnGrad = Callable[[Parameter], Any]
"""Called with a parameter as soon as its gradient is complete."""


@dataclass(frozen=True)
class Pass:
    """What one pass through the network is told.

    `images` is the number of images in the global batch, of which this rank computes a part;
    `sum_over_ranks` sums batch norm's statistics (None: use this rank's part alone, and then `images`
    is the number of images of that part).
    """

    train: bool
    images: int = 0
    sum_over_ranks: F.SumOverRanks | None = None


class ConvBN:
    """Convolution without bias → batch norm (→ + residual) (→ ReLU) (→ 2×2 max-pool, without a residual)."""

    def __init__(
        self, name: str, c_in: int, c_out: int, *, kernel: int = 3, relu: bool = True, pool: bool = False
    ) -> None:
        self.name, self.c_in, self.c_out, self.kernel = name, c_in, c_out, kernel
        self.relu, self.pool = relu, pool
        self.geometry = Geometry(padding=kernel // 2)
        self.form: str | None = None  # None: the one that `choose_form` picks

    def specs(self) -> list[Spec]:
        shape = (self.c_out, self.c_in, self.kernel, self.kernel)
        return [
            Spec(f"{self.name}.0.weight", shape, fan_in=self.c_in * self.kernel**2),
            Spec(f"{self.name}.1.weight", (self.c_out,), fill=1.0),
            Spec(f"{self.name}.1.bias", (self.c_out,)),
        ]

    def bind(self, params: Parameters, ws: Workspace, statistics: Array) -> None:
        """Take memory: views of the flat vectors, a scope of the workspace, `statistics` (2, C) for running mean and variance."""
        self.w, self.gamma, self.beta = (params[spec.name] for spec in self.specs())
        self.ws = ws.scope(self.name)
        self.running_mean, self.running_var = statistics
        self.running_mean.fill(0)
        self.running_var.fill(1)

    def forward(self, x: Array, step: Pass, residual: Array | None = None) -> Array:
        ws, shape = self.ws, self.geometry.out_shape(x.shape, self.w.value.shape)
        n, h, w, c = shape
        out = (n, h // 2, w // 2, c) if self.pool else shape
        form = self.form or choose_form(x.shape, self.w.value.shape, self.geometry, ws.backend)
        norm = self.gamma.value, self.beta.value, self.running_mean, self.running_var
        if not step.train:
            z = ws.ring(shape)
            conv_forward(x, self.w.compute, self.geometry, z, ws, form, keep=False)
            y = ws.ring(out) if self.pool else z
            F.norm_inference(z, *norm, y, ws, residual=residual, relu=self.relu, pool=self.pool)
            return y
        z = ws.image("z", shape)
        saved = conv_forward(x, self.w.compute, self.geometry, z, ws, form)
        y = ws.passing(out)
        after = F.norm_forward(
            z,
            *norm,
            y,
            ws,
            count=step.images * h * w,
            sum_over_ranks=step.sum_over_ranks,
            residual=residual,
            relu=self.relu,
            pool=self.pool,
        )
        self.saved = x.shape, form, saved, after, step.images * h * w
        return y

    def backward(self, dy: Array, step: Pass, on_grad: OnGrad, need_dx: bool = True) -> Array | None:
        """dL/dx; dy is overwritten: with a residual, by the residual's gradient."""
        ws = self.ws
        x_shape, form, saved, after, count = self.saved
        dz = F.norm_backward(
            dy,
            after,
            self.gamma.value,
            self.beta.value,
            self.gamma.grad,
            self.beta.grad,
            ws,
            count=count,
            sum_over_ranks=step.sum_over_ranks,
        )
        dx = ws.ring(x_shape) if need_dx else None
        conv_backward(dz, saved, self.w.compute, self.geometry, self.w.grad, dx, ws, form)
        for parameter in (self.beta, self.gamma, self.w):
            on_grad(parameter)
        return dx


class Residual:
    """y = relu(conv-bn(conv-bn-relu(x)) + shortcut(x)); the shortcut is x itself or a 1×1 conv-bn of it."""

    def __init__(self, name: str, channels: int, shortcut: str | None = None) -> None:
        self.first = ConvBN(f"{name}.0", channels, channels)
        self.second = ConvBN(f"{name}.1", channels, channels)
        self.shortcut = ConvBN(shortcut, channels, channels, kernel=1, relu=False) if shortcut else None

    def convs(self) -> list[ConvBN]:
        return [*([self.shortcut] if self.shortcut else []), self.first, self.second]

    def forward(self, x: Array, step: Pass) -> Array:
        residual = self.shortcut.forward(x, step) if self.shortcut else x
        return self.second.forward(self.first.forward(x, step), step, residual)

    def backward(self, dy: Array, step: Pass, on_grad: OnGrad) -> Array:
        dx: Array = self.first.backward(self.second.backward(dy, step, on_grad), step, on_grad)
        F.add(dx, self.shortcut.backward(dy, step, on_grad) if self.shortcut else dy)
        return dx


class Head:
    """Global max or average pooling, then a linear layer: (N, H, H, C) → logits (N, classes)."""

    def __init__(self, channels: int, classes: int, average: bool) -> None:
        self.channels, self.classes, self.average = channels, classes, average

    def specs(self) -> list[Spec]:
        return [
            Spec("fc.weight", (self.classes, self.channels), fan_in=self.channels),
            Spec("fc.bias", (self.classes,), fan_in=self.channels),
        ]

    def bind(self, params: Parameters, ws: Workspace) -> None:
        self.w, self.b = params["fc.weight"], params["fc.bias"]
        self.ws, self.dtype = ws.scope("fc"), str(params.dtype)

    def forward(self, x: Array, step: Pass) -> Array:
        n, _, _, c = x.shape
        pooled = self.ws.image("pooled", (n, 1, 1, c), self.dtype)
        logits = self.ws.keep("logits", (n, len(self.b.value)), self.dtype)
        F.head_forward(x, self.w.value, self.b.value, pooled, logits, self.average)
        if step.train:
            self.saved = self.ws.hold(x), pooled
        return logits

    def backward(self, dy: Array, on_grad: OnGrad) -> Array:
        x, pooled = self.saved
        dx = self.ws.ring(x.shape)
        F.head_backward(dy, x, pooled, self.w.value, self.w.grad, self.b.grad, dx, self.ws, self.average)
        for parameter in (self.b, self.w):
            on_grad(parameter)
        return dx
