"""Convolution."""

from __future__ import annotations

from typing import Any, NamedTuple

from nn.array import Array
from nn.buffers import Buffers
from nn.layer import Layer, OnGrad, Shape, StepContext, does_as, whole
from nn.layers.activation import ReLU
from nn.ops.activation import activation_backward, activation_forward
from nn.ops.conv import Geometry, choose_algorithm, conv_backward, conv_forward
from nn.params import Parameters, Spec


class Saved(NamedTuple):
    """What `Conv.forward` keeps for its backward."""

    x_shape: tuple[int, ...]
    algorithm: str
    conv: Any
    active: Any


class Conv(Layer):
    """Convolution of `kernel` × `kernel` pixels, with a bias unless told otherwise (→ ReLU or leaky ReLU).

    Without `padding`, at stride 1, an odd kernel leaves the size of images as it is. A ReLU that follows is
    absorbed; a batch norm that follows takes over what comes out.
    """

    bf16 = True

    def __init__(
        self,
        out: int,
        kernel: int = 3,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        bias: bool = True,
    ) -> None:
        same = dilation * (kernel - 1) // 2 if whole(kernel, dilation) else 0  # `infer` refuses others
        self.out, self.kernel, self.bias = out, kernel, bias
        self.geometry = Geometry(stride, same if padding is None else padding, dilation)
        self.algorithm: str | None = None  # None: the one that `choose_algorithm` picks
        self.slope = 1.0  # of the activation that it absorbed
        self.is_handed_over = False

    def infer(self, shape: Shape) -> Shape:
        if len(shape) != 3:
            raise self._refuse(shape, "not an image", "put it before Flatten() or the global pooling")
        stride, padding, dilation = self.geometry
        numbers = self.out, self.kernel, stride, dilation, padding
        if not whole(*numbers) or min(*numbers[:4], padding + 1) < 1:
            given = f"out={self.out}, kernel={self.kernel}, {stride=}, {padding=}, {dilation=}"
            remedy = "give whole numbers, 1 or more, padding 0 or more, each for both directions"
            raise ValueError(f"{self.name}: Conv({given}): {remedy}")
        reach = dilation * (self.kernel - 1) + 1
        if reach > min(shape[:2]) + 2 * padding:
            why = f"and its kernel reaches over {reach}×{reach} pixels"
            raise self._refuse(shape, why, "give a smaller kernel, padding, or larger images")
        h, w = (self.geometry.out_size(size, self.kernel) for size in shape[:2])
        return h, w, self.out

    @property
    def c_in(self) -> int:
        return self.in_shape[2]

    def absorb(self, layer: Layer) -> bool:
        if self.slope < 1 or self.is_handed_over or not does_as(self, Conv):
            return False
        if not isinstance(layer, ReLU) or not does_as(layer, ReLU):
            return False
        self.slope = layer.slope
        return True

    def hand_over(self) -> bool:
        self.is_handed_over = self.slope == 1 and does_as(self, Conv)
        return self.is_handed_over

    def specs(self) -> list[Spec]:
        fan_in = self.c_in * self.kernel**2
        weight = Spec(f"{self.name}.weight", (self.out, self.c_in, self.kernel, self.kernel), fan_in)
        return [weight, Spec(f"{self.name}.bias", (self.out,), fan_in)] if self.bias else [weight]

    def flops(self, training: bool) -> int:
        h, w, _ = self.out_shape
        return 2 * (2 + self.need_dx if training else 1) * h * w * self.kernel**2 * self.c_in * self.out

    def bind(self, params: Parameters, statistics: dict[str, Array], buffers: Buffers) -> None:
        super().bind(params, statistics, buffers)
        self.w = params[f"{self.name}.weight"]
        self.b = params[f"{self.name}.bias"] if self.bias else None

    def choose(self, x_shape: tuple[int, ...]) -> str:
        """The algorithm for such a batch."""
        backend = self.buffers.backend
        return self.algorithm or choose_algorithm(
            x_shape, self.w.value.shape, self.geometry, backend, self.need_dx
        )

    def forward(self, x: Array, step: StepContext) -> Array:
        buffers, n, algorithm = self.buffers, len(x), self.choose(x.shape)
        if step.training and self.is_handed_over:
            y = buffers.image("z", (n, *self.out_shape))
        else:
            y = self.output(n, step)
        saved = conv_forward(x, self.w.compute, self.geometry, y, buffers, algorithm, keep=step.training)
        buffers.release(x)
        active = None
        if self.b or self.slope < 1:
            b = self.b.value if self.b else None
            active = activation_forward(y, b, y, self.slope, buffers, keep=step.training)
        if step.training:
            self.saved = Saved(x.shape, algorithm, saved, active)
        return y

    def backward(self, dy: Array, step: StepContext, on_grad: OnGrad) -> Array | None:
        buffers, saved = self.buffers, self.saved
        if self.b or self.slope < 1:
            db = self.b.grad if self.b else None
            activation_backward(dy, saved.active, db, self.slope, buffers)
        dx = self.gradient(saved.x_shape[0]) if self.need_dx else None
        conv_backward(
            dy, saved.conv, self.w.compute, self.geometry, self.w.grad, dx, buffers, saved.algorithm
        )
        buffers.release_later(dy)  # a device's side stream may still read it
        for parameter in (self.b, self.w):
            if parameter:
                on_grad(parameter)
        return dx

    def tune(self, n: int, training: bool) -> None:
        """Run the convolution once for a batch of n on whatever memory holds, so that a device chooses plans.

        With `training` the gradient of the weights is overwritten.
        """
        buffers, geometry = self.buffers, self.geometry
        x, y = buffers.activation((n, *self.in_shape)), buffers.activation((n, *self.out_shape))
        dx = buffers.activation(x.shape) if self.need_dx else None
        algorithm = self.choose(x.shape)
        conv_forward(x, self.w.compute, geometry, y, buffers, algorithm, keep=False)
        if training:  # a device's own algorithms keep nothing but x
            conv_backward(y, x, self.w.compute, geometry, self.w.grad, dx, buffers, algorithm)
        buffers.release_all()
