"""Networks that are broken in one way each: the check that finds it, and the layer that it names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import NETWORKS, vectors

from distrib.check_model import CHECKS, Finding, check, describe
from launch import check_model as command
from nn.layer import Layer, StepContext
from nn.layers import (
    BatchNorm,
    Conv,
    ConvBN,
    GlobalAvgPool,
    Linear,
    ReLU,
    Residual,
    Sequential,
)
from nn.models import MODELS
from nn.network import Network
from nn.params import Spec
from nn.resnet9 import VARIANTS, ResNet9

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


class Swish(Layer):
    """y = x · sigmoid(x), which keeps its input as a layer should."""

    def infer(self, shape: Any) -> Any:
        return shape

    def forward(self, x: Any, step: StepContext) -> Any:
        y = self.output(len(x), step)
        np.multiply(x, 1 / (1 + np.exp(-x)), out=y)
        if step.training:
            self.x = self.buffers.save(x)
        self.buffers.release(x)
        return y

    def backward(self, dy: Any, step: StepContext, on_grad: Any) -> Any:
        s = 1 / (1 + np.exp(-self.x))
        dy *= s * (1 + self.x * (1 - s))
        return dy


class Excite(Layer):
    """y = x · w(mean of x) for each channel, w of the layers inside (Hu et al. 2018)."""

    factor = 1.0

    def __init__(self, *layers: Layer) -> None:
        self.inner = Sequential(GlobalAvgPool(), *layers)

    def infer(self, shape: Any) -> Any:
        self.inner.build(f"{self.name}.inner", shape)
        return shape

    def children(self) -> list[Layer]:
        return [self.inner]

    def forward(self, x: Any, step: StepContext) -> Any:
        self.buffers.retain(x)
        w = self.inner.forward(x, step)
        y = self.output(len(x), step)
        np.multiply(x, w[:, None, None, :], out=y)
        self.kept = self.buffers.save(x) if step.training else None, w
        self.buffers.release(x)
        return y

    def backward(self, dy: Any, step: StepContext, on_grad: Any) -> Any:
        x, w = self.kept
        dw = self.buffers.persistent("dw", w.shape)
        np.einsum("nhwc,nhwc->nc", x, dy, out=dw)
        dw *= self.factor
        dy *= w[:, None, None, :]
        inner = self.inner.backward(dw, step, on_grad)
        dy += inner
        self.buffers.release(inner)
        return dy


class WrongExcite(Excite):
    """The layers inside get half of their gradient."""

    factor = 0.5


class WrongInput(Own):
    """Forgets a factor on the way back."""

    def compute(self, x: Any, y: Any, step: StepContext) -> None:
        np.add(1.01 * x, self.b.value, out=y)


class WrongFarOff(Own):
    """Forgets a factor, of values so large that small steps are lost to rounding."""

    def compute(self, x: Any, y: Any, step: StepContext) -> None:
        np.add(1.1 * x + 1e6, self.b.value, out=y)


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
    """Right on one rank; of several, each adds the penalty b²/2 that the whole batch should add once."""

    def compute(self, x: Any, y: Any, step: StepContext) -> None:
        super().compute(x, y, step)
        self.part = len(x) < step.global_batch

    def write(self, dy: Any) -> None:
        super().write(dy)
        if self.part:
            self.b.grad[...] += self.b.value


class LonelySum(Own):
    """Asks for a sum over ranks where only some do."""

    def compute(self, x: Any, y: Any, step: StepContext) -> None:
        super().compute(x, y, step)
        if step.all_reduce and len(x) == 5:
            step.all_reduce(np.ones(3))


class LastSum(Own):
    """Asks for a sum that the other rank never asks for, nor any other."""

    def backward(self, dy: Any, step: StepContext, on_grad: Any) -> Any:
        if step.all_reduce and len(dy) == 5:
            step.all_reduce(np.ones(4))
        return super().backward(dy, step, on_grad)


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
    (WrongFarOff, "gradients", "the gradient of its input is wrong"),
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
    (Centred, "ranks", "two ranks get another output than one"),
    (
        CentredInEvaluation,
        "evaluation",
        "what it makes of an image in evaluation depends on the other images",
    ),
    (ByImages, "ranks", "two ranks get another output than one"),
    (LonelySum, "ranks", "ranks ask for different sums"),
    (LocalStatistics, "ranks", "two ranks get another running statistic than one"),
    (Raising, "runs", "backward raises ValueError in line"),
    (Infinite, "runs", "forward makes NaN or infinity of finite numbers"),
    (Temporary, "network", "the whole network's gradient is "),
]


@pytest.mark.parametrize(("kind", "name", "words"), BROKEN, ids=[case[0].__name__ for case in BROKEN])
def test_broken_layers(kind: type[Own], name: str, words: str) -> None:
    """The check that is about it fails, by the layer's name; no check before it does."""
    found = failed(check(around(kind), SHAPE, CLASSES))
    assert next(iter(found)) == name, found
    assert {finding.layer for finding in found.values()} == {f"own ({kind.__name__})"}
    assert found[name].text.startswith(f"own ({kind.__name__}): {words}"), found[name].text
    assert "\n" not in found[name].text


@pytest.mark.parametrize("layer", [Own, Swish, lambda: Excite(Linear(3), ReLU(), Linear(4))])
def test_own_layers_done_right_pass(layer: Callable[[], Layer]) -> None:
    assert not failed(check(around(layer), SHAPE, CLASSES))


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        (Lossy, "announcements", "own.0.0.weight: its gradient is never announced"),
        (HalfResidual, "gradients", "the gradient of its input is wrong"),
        (WrongExcite, "gradients", "the gradient of its input is wrong"),
    ],
)
def test_broken_containers(kind: Any, name: str, words: str) -> None:
    def broken() -> Layer:
        return kind(Linear(4)) if kind is WrongExcite else kind(ConvBN(4), ConvBN(4, relu=False))

    found = failed(check(around(broken), SHAPE, CLASSES))
    assert next(iter(found)) == name
    assert found[name].text.startswith(f"own ({kind.__name__}): {words}")


def test_a_first_layer_whose_gradient_nobody_takes() -> None:
    def model(shape: Any, classes: int) -> Layer:
        return Sequential(Own(), Conv(4), GlobalAvgPool(), Linear(classes))

    found = failed(check(model, SHAPE, CLASSES))
    assert [*found] == ["buffers"]
    assert "0 (Own): backward returns a gradient although self.need_dx is False" in found["buffers"].text


def test_a_container_that_calls_by_name() -> None:
    class ByName(Sequential):
        def forward(self, x: Any, step: StepContext) -> Any:
            for layer in self.passes:
                x = layer.forward(x=x, step=step)
            return x

    assert not failed(check(around(lambda: ByName(ConvBN(4), Conv(4))), SHAPE, CLASSES))


def test_a_sum_that_only_one_rank_asks_for_at_the_end() -> None:
    def model(shape: Any, classes: int) -> Layer:
        return Sequential(Conv(4), LastSum(), BatchNorm(), GlobalAvgPool(), Linear(classes))

    found = failed(check(model, SHAPE, CLASSES))
    assert [*found] == ["ranks"]
    assert found["ranks"].text.startswith("1 (LastSum): ranks ask for different sums")


def test_gradients_that_depend_on_the_rank() -> None:
    """The same logits, and another gradient of one parameter."""
    found = failed(check(around(GradientByRank), SHAPE, CLASSES))
    assert [*found] == ["ranks"]
    assert found["ranks"].text.startswith("own (GradientByRank): two ranks get another gradient of own.bias")


def test_the_layer_inside_is_named_not_the_one_around() -> None:
    """A layer in a residual's body that releases twice makes the residual fail."""

    def inside(kind: type[Own]) -> Layer:
        return Residual(kind(), ConvBN(4, relu=False))

    for kind, name in ((Twice, "buffers"), (WrongInput, "gradients"), (Centred, "ranks")):
        found = failed(check(around(lambda kind=kind: inside(kind)), SHAPE, CLASSES))
        assert found[name].layer == f"own.0 ({kind.__name__})"


# networks that are right


RIGHT: dict[str, Callable[..., Layer]] = {
    **NETWORKS,
    **{name: lambda shape, classes, of=of: of(shape, classes, width=0.1) for name, of in MODELS.items()},
    **{
        f"resnet9 {name}": lambda shape, classes, variant=name: ResNet9(shape, classes, variant, 0.1)
        for name in VARIANTS
    },
    "vectors": vectors,
}


@pytest.mark.parametrize("name", RIGHT)
def test_networks_that_are_right_pass(name: str) -> None:
    """Those that ship, and every kind of layer in every fusion."""
    assert [finding.status for finding in check(RIGHT[name], (17, 16, 2), 5)] == ["ok"] * len(CHECKS)


def test_the_table_counts_as_the_network_does() -> None:
    rows, network = describe(vectors, SHAPE, CLASSES), Network(vectors, SHAPE, CLASSES)
    assert sum(row.parameters for row in rows) == network.params.count
    assert sum(row.flops for row in rows) == network.flops()
    assert [row.name for row in rows] == [str(i) for i in range(9)]
    assert (rows[0].in_shape, rows[0].out_shape, rows[5].out_shape) == (SHAPE, (3, 3, 4), (7,))


# the command

OWN = """
from nn.layers import *

class Half(ReLU):
    def backward(self, dy, step, on_grad):
        dy = super().backward(dy, step, on_grad)
        dy *= 0.5
        return dy

class Shouting(ReLU):
    def forward(self, x, step):
        raise RuntimeError("\\x1b[31m two\\nlines")

def net(shape, classes, width=1.0):
    return Sequential(Conv(round(4 * width)), ReLU(), GlobalMaxPool(), Linear(classes))

def broken(shape, classes):
    return Sequential(Conv(4), Half(), GlobalMaxPool(), Linear(classes))

def strange(shape, classes):
    return Sequential(**{"a\\x1b[31m": Conv(4), "half\\n": Half()}, head=GlobalMaxPool(), fc=Linear(classes))

def shouts(shape, classes):
    return Sequential(Conv(4), Shouting(), GlobalMaxPool(), Linear(classes))

def tall(shape, classes):
    return Sequential(*(ConvBN(4, pool=2) for _ in range(5)), GlobalAvgPool(), Linear(classes))

def many(shape, classes):
    return Sequential(Flatten(), Linear(classes + 1))

def fails(shape, classes):
    return Sequential(Linear(undefined))

def number(shape, classes):
    return 3

kept = [Flatten(), Linear(5)]

def global_layers(shape, classes):
    return Sequential(*kept)
"""
DATA = ("--data", "synthetic:30x9x8x2:5")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of networks, by a short name."""
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(OWN)
    return "nets.py"


def test_the_command(own: str, command_line: Any) -> None:
    code, out, err = command_line(command.check_model, f"{own}:net", *DATA, "--width", 0.5)
    assert (code, err) == (0, "")
    first, _, *lines = out.splitlines()
    assert first == f"{own}:net on synthetic:30x9x8x2:5: 9×8×2, 5 classes"
    table, checks = lines[: lines.index("")], lines[lines.index("") + 1 :]
    assert [line.split()[:2] for line in table[1:-1]] == [
        *(["0", "Conv"], ["1", "ReLU"], ["2", "GlobalMaxPool"], ["3", "Linear"])
    ]
    assert table[1].split()[2:] == ["9×8×2", "→", "9×8×2", "38", "0.01"]
    assert table[-1].split() == ["total", "53", "0.01"]
    assert [line.split()[:2] for line in checks] == [[name, "ok"] for name in CHECKS]


def test_a_broken_network(own: str, command_line: Any) -> None:
    code, out, err = command_line(command.check_model, f"{own}:broken", *DATA)
    assert (code, err) == (2, "")
    (line,) = [line for line in out.splitlines() if " failed " in line]
    assert line.startswith("gradients     failed  1 (Half): the gradient of its input is wrong: ")
    assert out.splitlines()[-1].split(":")[0].split() == ["not", "checked", "network"]


def test_json(own: str, command_line: Any) -> None:
    for name, code, layer in (("net", 0, ""), ("broken", 2, "1 (Half)")):
        ended, out, _ = command_line(command.check_model, f"{own}:{name}", *DATA, "--json")
        assert ended == code
        found = json.loads(out)
        assert (found["shape"], found["classes"], found["parameters"]) == ([9, 8, 2], 5, 101)
        assert [each["name"] for each in found["layers"]] == ["0", "1", "2", "3"]
        assert {each["check"]: each["layer"] for each in found["checks"]}["gradients"] == layer


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tall", "3.3: MaxPool gets 1×1×4, smaller than its window of 2×2: "),
        ("many", "1: the network makes 6 of images of 9×8×2, and there are 5 classes: "),
        ("fails", "line 33: NameError: name 'undefined' is not defined: mend the file"),
        ("number", "returns int, no layer: return Sequential(…)"),
        ("global_layers", "makes the same layers when called again: make them inside the function: "),
    ],
)
def test_what_does_not_build(own: str, name: str, words: str, command_line: Any) -> None:
    """One line, and no table."""
    code, out, err = command_line(command.check_model, f"{own}:{name}", *DATA)
    assert (code, err) == (2, "")
    _, _, line, rest = out.splitlines()
    assert line.startswith(f"builds        failed  {words}")
    assert rest.split(": ")[0].split()[2:] == [f"{each}," for each in [*CHECKS][1:-1]] + ["evaluation"]


@pytest.mark.parametrize("name", ["strange", "shouts"])
def test_no_control_character_reaches_the_terminal(own: str, name: str, command_line: Any) -> None:
    code, out, _ = command_line(command.check_model, f"{own}:{name}", *DATA)
    assert code == 2
    assert all(line.isprintable() for line in out.splitlines())
    words = {
        "strange": "half? (Half): the gradient",
        "shouts": "1 (Shouting): forward raises RuntimeError in",
    }
    assert len([line for line in out.splitlines() if words[name] in line]) == 1


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("OWN:absent", (), "nets.py:absent: nets.py has no function absent: define it"),
        ("absent.py:net", (), "absent.py:net: there is no file"),
        ("absent\x1b.py:net", (), "absent?.py:net: there is no file"),
        ("alexnet", (), "alexnet: give resnet9, mlp, lenet, resnet20 or FILE.py:FUNCTION"),
        ("OWN:net", ("--data", "/no/such\x1b"), "--data /no/such?: no such folder or file"),
        ("OWN:net", ("--data", "synthetic:3"), "--data synthetic:3: give synthetic:NxHxWxC:K"),
        ("OWN:net", (*DATA, "--grey"), "--grey: is for "),
        ("OWN:net", (*DATA, "--size", "8x8"), "--size 8x8: is for "),
        ("OWN:net", (*DATA, "--split", "letters"), "--split letters: is for "),
        ("OWN:net", (*DATA, "--width", 0), "--width 0: give 0.001 to 64"),
        ("OWN:net", (*DATA, "--width", "nan"), "--width nan: give 0.001 to 64"),
        ("OWN:net", (*DATA, "--variant", "avgpool"), "--variant avgpool: "),
        ("resnet9", ("--variant", "nosuch"), "--variant nosuch: choose "),
        ("mlp", (*DATA, "--variant", "avgpool"), "--variant avgpool: mlp has no variant: leave it out"),
    ],
)
def test_mistakes(own: str, model: str, options: tuple, words: str, command_line: Any) -> None:
    code, out, err = command_line(command.check_model, model.replace("OWN", own), *options)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert words in err
    assert err.startswith("distrib: error: ")
    assert err[:-1].isprintable()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def net(:\n", "net.py:net: line 1: invalid syntax: mend the file"),
        ("import nothing_like_it\n", "line 1: ModuleNotFoundError: No module named 'nothing_like_it'"),
    ],
)
def test_files_that_do_not_run(tmp_path: Path, text: str, words: str, command_line: Any) -> None:
    (tmp_path / "net.py").write_text(text)
    code, out, err = command_line(command.check_model, f"{tmp_path}/net.py:net", *DATA)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_help_teaches_what_each_failure_means(command_line: Any) -> None:
    code, out, _ = command_line(command.check_model, "--help")
    assert code == 0
    for name in CHECKS:
        assert f"{name}" in out
