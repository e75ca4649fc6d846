"""Networks that are broken in one way each: the check that finds it, and the layer that it names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from distrib.check_model import CHECKS, Finding, check
from nn.layer import Layer, StepContext
from nn.layers import (
    BatchNorm,
    Conv,
    ConvBN,
    GlobalAvgPool,
    Linear,
    Residual,
    Sequential,
)
from nn.params import Spec

pytestmark = pytest.mark.quick

SHAPE, CLASSES = (9, 8, 2), 3


class Own(Layer):
    """y = x + b, done right."""

    def infer(self, shape: Any) -> Any:
        return shape

    def specs(self) -> list[Spec]:
        return [Spec(f"{self.name}.bias", self.in_shape[-1:])]

    def bind(self, params: Any, statistics: Any, buffers: Any) -> None:
        super().bind(params, statistics, buffers)
        self.b = params[f"{self.name}.bias"]

    def compute(self, x: Any, y: Any, step: StepContext) -> None:
        np.add(x, self.b.value, out=y)

    def forward(self, x: Any, step: StepContext) -> Any:
        y = self.output(len(x), step)
        self.compute(x, y, step)
        self.buffers.release(x)
        return y

    def write(self, dy: Any) -> None:
        self.b.grad[...] = dy.reshape(-1, dy.shape[-1]).sum(0)

    def backward(self, dy: Any, step: StepContext, on_grad: Any) -> Any:
        self.write(dy)
        on_grad(self.b)
        return dy


class WrongInput(Own):
    """Forgets a factor on the way back."""

    def compute(self, x: Any, y: Any, step: StepContext) -> None:
        np.add(1.01 * x, self.b.value, out=y)


class WrongAtAnEdge(Own):
    """Is right but for one pixel of one image."""

    def compute(self, x: Any, y: Any, step: StepContext) -> None:
        super().compute(x, y, step)
        y[-1, 0, 0, 0] += x[-1, 0, 0, 1]


class WrongParameter(Own):
    """Averages the gradient that it should sum."""

    def write(self, dy: Any) -> None:
        self.b.grad[...] = dy.reshape(-1, dy.shape[-1]).mean(0)


class ForeignGradient(Own):
    """Puts a gradient in the place of the memory that is summed over ranks."""

    def write(self, dy: Any) -> None:
        self.b.grad = dy.reshape(-1, dy.shape[-1]).sum(0)


class Adding(Own):
    """Adds to what the step before left."""

    def write(self, dy: Any) -> None:
        self.b.grad += dy.reshape(-1, dy.shape[-1]).sum(0)


class Misshapen(Own):
    """Writes a gradient of another shape."""

    def write(self, dy: Any) -> None:
        self.b.grad[...] = dy.sum((0, 1))


class Silent(Own):
    def backward(self, dy: Any, step: StepContext, on_grad: Any) -> Any:
        self.write(dy)
        return dy


class Repeating(Own):
    def backward(self, dy: Any, step: StepContext, on_grad: Any) -> Any:
        on_grad(self.b)
        return super().backward(dy, step, on_grad)


class TooEarly(Own):
    def backward(self, dy: Any, step: StepContext, on_grad: Any) -> Any:
        on_grad(self.b)
        self.write(dy)
        return dy


class OtherGradient(Own):
    """Returns the gradient of one image."""

    def backward(self, dy: Any, step: StepContext, on_grad: Any) -> Any:
        return super().backward(dy, step, on_grad)[:1]


class NoGradient(Own):
    def backward(self, dy: Any, step: StepContext, on_grad: Any) -> Any:
        self.buffers.release(super().backward(dy, step, on_grad))


class Declares(Own):
    """Makes another shape than it says."""

    def infer(self, shape: Any) -> Any:
        return (*shape[:2], 5)

    def output(self, n: int, step: StepContext) -> Any:
        return self.buffers.output((n, *self.in_shape))


class Narrow(Own):
    """Returns float32."""

    def forward(self, x: Any, step: StepContext) -> Any:
        return super().forward(x, step).astype(np.float32)


class NarrowInside(Own):
    """Computes in float32."""

    def compute(self, x: Any, y: Any, step: StepContext) -> None:
        y[...] = x.astype(np.float32) + self.b.value


class NarrowBackward(Own):
    def backward(self, dy: Any, step: StepContext, on_grad: Any) -> Any:
        dy[...] = super().backward(dy, step, on_grad).astype(np.float32)
        return dy


class Overwriting(Own):
    def compute(self, x: Any, y: Any, step: StepContext) -> None:
        super().compute(x, y, step)
        x *= 2


class Forgetful(Own):
    def forward(self, x: Any, step: StepContext) -> Any:
        self.buffers.retain(x)
        return super().forward(x, step)


class Twice(Own):
    def forward(self, x: Any, step: StepContext) -> Any:
        y = super().forward(x, step)
        self.buffers.release(x)
        return y


class ForgetfulInEvaluation(Own):
    def forward(self, x: Any, step: StepContext) -> Any:
        if not step.training:
            self.buffers.retain(x)
        return super().forward(x, step)


class ForgetfulBackward(Own):
    def backward(self, dy: Any, step: StepContext, on_grad: Any) -> Any:
        self.buffers.retain(dy)
        return super().backward(dy, step, on_grad)


class View(Own):
    """Returns a part of what it has released."""

    def forward(self, x: Any, step: StepContext) -> Any:
        self.buffers.release(x)
        return x[:]


class Keeping(Own):
    """Reads what it has released: y = x²/2."""

    def compute(self, x: Any, y: Any, step: StepContext) -> None:
        np.multiply(x, x / 2, out=y)
        self.x = x

    def backward(self, dy: Any, step: StepContext, on_grad: Any) -> Any:
        self.b.grad.fill(0)
        on_grad(self.b)
        dy *= self.x
        return dy


class Unwritten(Own):
    """Adds to memory whose contents are undefined."""

    def compute(self, x: Any, y: Any, step: StepContext) -> None:
        y += x


class Counting(Own):
    """Keeps a state over steps."""

    passes = 0

    def compute(self, x: Any, y: Any, step: StepContext) -> None:
        self.passes += 1
        np.multiply(x, 1 / self.passes, out=y)


class First(Own):
    """Remembers the mean of the first batch that it saw."""

    mean: Any = None

    def compute(self, x: Any, y: Any, step: StepContext) -> None:
        if self.mean is None:
            self.mean = float(x.mean())
        np.add(x, self.b.value - self.mean, out=y)


class StateInEvaluation(Own):
    seen = 0.0

    def compute(self, x: Any, y: Any, step: StepContext) -> None:
        super().compute(x, y, step)
        if not step.training:
            y += self.seen
            self.seen = float(x.mean())


class Drawing(Own):
    """Draws without keys."""

    def compute(self, x: Any, y: Any, step: StepContext) -> None:
        noise = np.random.normal(size=x.shape) if step.training else 0.0
        np.add(x, self.b.value + noise, out=y)


class Centred(Own):
    """Subtracts the mean of the images that this rank has, in training; in evaluation nothing."""

    def compute(self, x: Any, y: Any, step: StepContext) -> None:
        super().compute(x, y, step)
        if step.training:
            y -= x.mean((0, 1, 2))

    def write(self, dy: Any) -> None:
        super().write(dy)
        dy -= dy.mean((0, 1, 2))


class CentredInEvaluation(Own):
    def compute(self, x: Any, y: Any, step: StepContext) -> None:
        super().compute(x, y, step)
        if not step.training:
            y -= x.mean((0, 1, 2))


class ByImages(Own):
    """Divides by the number of images that it is given."""

    def compute(self, x: Any, y: Any, step: StepContext) -> None:
        np.add(x / len(x), self.b.value, out=y)

    def write(self, dy: Any) -> None:
        super().write(dy)
        dy /= len(dy)


class GradientByRank(Own):
    """Has a gradient of a penalty that every rank adds: y = x + b - b²/2 · (images of this rank > 5)."""

    def compute(self, x: Any, y: Any, step: StepContext) -> None:
        self.share = float(len(x) > 5)
        np.add(x, self.b.value - self.share * self.b.value**2 / 2, out=y)

    def write(self, dy: Any) -> None:
        super().write(dy)
        self.b.grad[...] *= 1 - self.share * self.b.value


class LonelySum(Own):
    """Asks for a sum over ranks where only some do."""

    def compute(self, x: Any, y: Any, step: StepContext) -> None:
        super().compute(x, y, step)
        if step.all_reduce and len(x) == 5:
            step.all_reduce(np.ones(3))


class LocalStatistics(Own):
    """Keeps a running mean of this rank's images."""

    def statistics(self) -> dict[str, int]:
        return {f"{self.name}.running_mean": 1}

    def bind(self, params: Any, statistics: Any, buffers: Any) -> None:
        super().bind(params, statistics, buffers)
        self.mean = statistics[f"{self.name}.running_mean"]

    def compute(self, x: Any, y: Any, step: StepContext) -> None:
        super().compute(x, y, step)
        if step.training:
            self.mean[...] = x.mean()


class Temporary(Own):
    """Keeps what backward needs where the next operation writes: y = x²/2."""

    def compute(self, x: Any, y: Any, step: StepContext) -> None:
        np.multiply(x, x / 2, out=y)
        self.x = self.buffers.temporary("block", x.shape)
        self.x[...] = x

    def backward(self, dy: Any, step: StepContext, on_grad: Any) -> Any:
        self.b.grad.fill(0)
        on_grad(self.b)
        dy *= self.x
        return dy


class Raising(Own):
    def backward(self, dy: Any, step: StepContext, on_grad: Any) -> Any:
        return dy @ np.ones(77)


class Infinite(Own):
    def compute(self, x: Any, y: Any, step: StepContext) -> None:
        np.add(np.log(x - 1e3), self.b.value, out=y)


class Lossy(Residual):
    """Does not pass on what tells of gradients."""

    def backward(self, dy: Any, step: StepContext, on_grad: Any) -> Any:
        return super().backward(dy, step, lambda _: None)


class HalfResidual(Residual):
    """A container of its own kind, with a wrong backward."""

    def backward(self, dy: Any, step: StepContext, on_grad: Any) -> Any:
        dx = super().backward(dy, step, on_grad)
        dx *= 0.5
        return dx


def around(layer: Callable[[], Layer]) -> Callable[..., Layer]:
    """A network with `layer` in its midst, under the name `own`."""

    def model(shape: Any, classes: int) -> Layer:
        return Sequential(
            stem=ConvBN(4),
            own=layer(),
            last=Conv(4),
            norm=BatchNorm(),
            head=GlobalAvgPool(),
            fc=Linear(classes),
        )

    return model


def failed(findings: list[Finding]) -> dict[str, Finding]:
    assert [finding.check for finding in findings] == [*CHECKS]
    return {finding.check: finding for finding in findings if finding.status == "failed"}


BROKEN = [
    (WrongInput, "gradients", "the gradient of its input is wrong"),
    (WrongAtAnEdge, "gradients", "the gradient of its input is wrong"),
    (WrongParameter, "gradients", "the gradient of own.bias is wrong"),
    (ForeignGradient, "announcements", "own.bias: backward replaces .grad"),
    (Adding, "announcements", "own.bias: its gradient is not written, or added to what was there"),
    (Misshapen, "runs", "backward raises ValueError in line"),
    (Silent, "announcements", "own.bias: its gradient is never announced"),
    (Repeating, "announcements", "own.bias: its gradient is told twice"),
    (TooEarly, "announcements", "own.bias: its gradient changes after on_grad"),
    (OtherGradient, "runs", "backward returns a gradient of 1×9×8×4, and its input is 8×9×8×4"),
    (NoGradient, "runs", "backward returns no gradient of its input"),
    (Declares, "runs", "makes 8×9×8×4 of 8 images where last (Conv) takes 8×9×8×5"),
    (Narrow, "precision", "forward returns float32 inside float64"),
    (NarrowInside, "precision", "what it makes has the precision of float32"),
    (NarrowBackward, "precision", "the gradient of its input has the precision of float32"),
    (Overwriting, "buffers", "forward writes to what it was given"),
    (Forgetful, "buffers", "forward does not release its input"),
    (Twice, "buffers", "activations are released twice, in forward"),
    (ForgetfulInEvaluation, "buffers", "forward does not release its input"),
    (ForgetfulBackward, "buffers", "backward does not release dy"),
    (View, "buffers", "forward returns a view of its input's memory"),
    (Keeping, "buffers", "backward reads memory that was released"),
    (Unwritten, "buffers", "forward reads memory that was released, or never written"),
    (Counting, "repeats", "the same input gives another output the second time"),
    (First, "repeats", "the output of a step depends on the step before"),
    (StateInEvaluation, "repeats", "what it makes in evaluation depends on what was evaluated before"),
    (Drawing, "repeats", "draws from np.random"),
    (Centred, "ranks", "the output is another on two ranks than on one"),
    (
        CentredInEvaluation,
        "evaluation",
        "what it makes of an image in evaluation depends on the other images",
    ),
    (ByImages, "ranks", "the output is another on two ranks"),
    (LonelySum, "ranks", "forward raises Unmatched"),
    (LocalStatistics, "ranks", "the running statistics is another on two ranks"),
    (Raising, "runs", "backward raises ValueError in line"),
    (Infinite, "runs", "forward makes NaN or infinity of finite numbers"),
    (Temporary, "network", "the whole network's gradient is "),
]


@pytest.mark.parametrize(("kind", "name", "words"), BROKEN, ids=[case[0].__name__ for case in BROKEN])
def test_broken_layers(kind: type[Own], name: str, words: str) -> None:
    """The check that is about it fails, by the layer's name; no check before it does."""
    found = failed(check(around(kind), SHAPE, CLASSES))
    assert next(iter(found)) == name, found
    assert found[name].layer == f"own ({kind.__name__})"
    assert found[name].text.startswith(f"own ({kind.__name__}): {words}"), found[name].text
    assert "\n" not in found[name].text


def test_the_layer_done_right_passes() -> None:
    assert not failed(check(around(Own), SHAPE, CLASSES))


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        (Lossy, "announcements", "own.0.0.weight: its gradient is never announced"),
        (HalfResidual, "gradients", "the gradient of its input is wrong"),
    ],
)
def test_broken_containers(kind: type[Residual], name: str, words: str) -> None:
    found = failed(check(around(lambda: kind(ConvBN(4), ConvBN(4, relu=False))), SHAPE, CLASSES))
    assert next(iter(found)) == name
    assert found[name].text.startswith(f"own ({kind.__name__}): {words}")


def test_the_layer_inside_is_named_not_the_one_around() -> None:
    """A layer in a residual's body that releases twice makes the residual fail."""

    def inside(kind: type[Own]) -> Layer:
        return Residual(kind(), ConvBN(4, relu=False))

    for kind, name in ((Twice, "buffers"), (WrongInput, "gradients"), (Centred, "ranks")):
        found = failed(check(around(lambda kind=kind: inside(kind)), SHAPE, CLASSES))
        assert found[name].layer == f"own.0 ({kind.__name__})"
