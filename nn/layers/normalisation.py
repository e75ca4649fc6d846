"""Batch norm."""

from __future__ import annotations

from typing import Any, NamedTuple

from nn.array import Array
from nn.buffers import Buffers
from nn.layer import Layer, OnGrad, Shape, StepContext, does_as
from nn.layers.activation import ReLU
from nn.layers.pooling import MaxPool
from nn.ops.activation import copy
from nn.ops.norm import POOL, After, Count, Norm, norm_backward, norm_forward, norm_inference
from nn.ops.pool import Windows
from nn.params import Parameters, Spec


class Saved(NamedTuple):
    """What `BatchNorm.forward` keeps for its backward."""

    norm: Any
    over: Count


class BatchNorm(Layer):
    """y = γ · (x − mean) / √(variance + 1e-5) + β for each channel (→ + residual) (→ ReLU) (→ 2×2 max-pool).

    Mean and variance are those of the global batch, in evaluation the running ones (Ioffe and Szegedy 2015).
    It does what follows it in the same pass, and takes over what a convolution before it makes.
    """

    bf16 = True

    def __init__(self) -> None:
        self.relu, self.pool = False, False  # what it absorbed
        self.owns_input = False
        self.part: Array | None = None  # of dL/dy

    def infer(self, shape: Shape) -> Shape:
        if len(shape) not in (1, 3):
            raise self._refuse(shape, "neither an image nor a vector", "put it after one")
        self.y_shape = shape
        return shape

    def absorb(self, layer: Layer) -> bool:
        if self.pool or len(self.in_shape) == 1 or not does_as(self, BatchNorm):
            return False
        if isinstance(layer, ReLU) and does_as(layer, ReLU) and layer.slope == 0 and not self.relu:
            self.relu = True
            return True
        is_plain = isinstance(layer, MaxPool) and does_as(layer, MaxPool)
        if is_plain and layer.over == Windows(POOL, 2):  # type: ignore[attr-defined]
            self.pool, self.y_shape = True, layer.out_shape
            return True
        return False

    def take_part(self, dy: Array) -> bool:
        if len(self.in_shape) == 1 or not does_as(self, BatchNorm):
            return False
        self.part = dy
        return True

    def can_add(self) -> bool:
        plain = not self.relu and not self.pool and len(self.in_shape) == 3
        return plain and does_as(self, BatchNorm)

    def specs(self) -> list[Spec]:
        c = self.in_shape[-1]
        return [Spec(f"{self.name}.weight", (c,), fill=1.0), Spec(f"{self.name}.bias", (c,))]

    def statistics(self) -> dict[str, int]:
        c = self.in_shape[-1]
        return {f"{self.name}.running_mean": c, f"{self.name}.running_var": c}

    def bind(self, params: Parameters, statistics: dict[str, Array], buffers: Buffers) -> None:
        super().bind(params, statistics, buffers)
        self.gamma, self.beta = (params[spec.name] for spec in self.specs())
        self.running_mean, self.running_var = (statistics[name] for name in self.statistics())
        self.running_mean.fill(0)
        self.running_var.fill(1)
        self.norm = Norm(self.gamma.value, self.beta.value, self.running_mean, self.running_var)

    def forward(self, x: Array, step: StepContext) -> Array:
        return self._forward(x, step, After(self.relu, self.pool))

    def forward_added(self, x: Array, step: StepContext, residual: Array) -> Array:
        return self._forward(x, step, After(True, False, residual))

    def _forward(self, x: Array, step: StepContext, after: After) -> Array:
        return (self._train if step.training else self._infer)(x, step, after)

    def _infer(self, x: Array, step: StepContext, after: After) -> Array:
        buffers = self.buffers
        y = x if self.owns_input and not self.pool else self._made(len(x), step)
        norm_inference(image(x), self.norm, image(y), after, buffers)
        if y is not x:
            buffers.release(x)
        return y

    def _train(self, x: Array, step: StepContext, after: After) -> Array:
        buffers, z = self.buffers, x
        if not self.owns_input:
            z = buffers.image("z", x.shape) if x.ndim == 4 else buffers.persistent("z", x.shape, self.dtype)
            copy(x, z)
            buffers.release(x)
        y = self._made(len(x), step)
        pixels = 1 if x.ndim == 2 else x.shape[1] * x.shape[2]
        over = Count(step.global_batch * pixels, step.all_reduce)
        self.saved = Saved(norm_forward(image(z), self.norm, image(y), after, over, buffers), over)
        return y

    def _made(self, n: int, step: StepContext) -> Array:
        if len(self.y_shape) == 1:
            return self.output(n, step)
        make = self.buffers.output if step.training else self.buffers.activation
        return make((n, *self.y_shape))

    def backward(self, dy: Array, step: StepContext, on_grad: OnGrad) -> Any:
        dx, _ = self.backward_added(dy, step, on_grad)
        return dx

    def backward_added(self, dy: Array, step: StepContext, on_grad: OnGrad) -> tuple[Any, Any]:
        buffers, (saved, over), part = self.buffers, self.saved, self.part
        grads = self.gamma.grad, self.beta.grad
        dz, d_residual = norm_backward(image(dy), saved, self.norm, *grads, over, buffers, part)
        if part is not None:
            buffers.release(part)
            self.part = None
        for parameter in (self.beta, self.gamma):
            on_grad(parameter)
        if dy.ndim == 2:
            return dz.reshape(dy.shape), None
        if dz is not dy and d_residual is None:
            buffers.release(dy)
        if not self.need_dx:
            buffers.release(dz)
            return None, d_residual
        return dz, d_residual


def image(x: Array) -> Array:
    """x itself, or a vector (N, C) as images of one pixel."""
    return x if x.ndim == 4 else x[:, None, None, :]
