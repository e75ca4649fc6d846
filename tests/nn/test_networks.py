"""Any network on any pictures: gradients, PyTorch, the device, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from cudnn_double import to_bf16
from device_double import device, needs_device
from networks import NETWORKS, every_layer, vectors
from test_conv import both_orders
from test_gradients import check
from test_torch_parity import difference, import_torch

from nn.device import Backend, capture
from nn.layer import Layer, StepContext, named
from nn.layers import (
    BatchNorm,
    Conv,
    ConvBN,
    Dropout,
    Flatten,
    GlobalAvgPool,
    GlobalMaxPool,
    LeakyReLU,
    Linear,
    MaxPool,
    ReLU,
    Residual,
    Sequential,
)
from nn.models import MODELS
from nn.network import Network
from nn.ops.loss import softmax_cross_entropy
from nn.resnet9 import ResNet9

Model = Callable[..., Layer]

PICTURES = {"digits": ((28, 28, 1), 10), "colours": ((32, 32, 3), 100), "oblong": ((17, 22, 2), 300)}

STEP = 1e-7  # of finite differences: so small that hardly ever one of the ReLUs has its kink within

SMALL: dict[str, Model] = {
    **NETWORKS,
    "resnet9": lambda shape, classes: ResNet9(shape, classes, "three-blocks", 1 / 32),
}

each_model = pytest.mark.parametrize("model", SMALL.values(), ids=SMALL)
each_pictures = pytest.mark.parametrize("pictures", PICTURES.values(), ids=PICTURES)


class Case:
    """A network whose γ, β and running statistics are off their start, with a batch for it."""

    def __init__(
        self, model: Model, pictures: tuple[tuple[int, ...], int], n: int = 3, draw: int = 5, **more: Any
    ) -> None:
        (self.shape, self.classes), self.n = pictures, n
        self.rng = np.random.default_rng(draw)
        self.network = Network(model, self.shape, self.classes, seed=1, **more)
        state = self.network.state_dict()
        for name, value in state.items():
            if value.ndim == 1:
                state[name] = (value + self.rng.uniform(-0.2, 0.2, value.shape)).astype(value.dtype)
        self.network.load_state_dict(state)
        self.state = state
        self.x, self.labels = self.rng.random((n, *self.shape)), self.rng.integers(0, self.classes, n)
        self.step = StepContext(True, n)

    def image(self) -> Any:
        network = self.network
        x = network.buffers.image("input", self.x.shape)
        x[...] = network.backend.asarray(self.x.astype(network.dtype))
        return x

    def loss(self) -> tuple[Any, Any]:
        """Loss and its gradient of a training step's forward pass."""
        network = self.network
        labels = network.backend.asarray(self.labels)
        return softmax_cross_entropy(network.forward(self.image(), self.step), labels, self.n)

    def evaluate(self) -> np.ndarray:
        """Logits with the running statistics that the network began with."""
        self.network.load_state_dict(self.state)
        logits = self.network.forward(self.image(), StepContext(False))
        return np.array(self.network.backend.to_host(logits))

    def backward(self) -> tuple[float, np.ndarray]:
        """Loss and flat gradient of a training step."""
        loss, dlogits = self.loss()
        self.network.backward(dlogits, self.step)
        return loss, self.network.params.grads.copy()


@each_model
@each_pictures
@both_orders
def test_gradient(model: Model, pictures: tuple, order: str) -> None:
    """Along a random direction, with NaN over everything that was released."""
    case = Case(model, pictures, 2, dtype="float64", backend=Backend("numpy", np, order), poison=True)
    params, flat = case.network.params, case.network.params.values.copy()

    def value(flat: np.ndarray) -> float:
        params.values[...] = flat
        return float(case.loss()[0])

    check(value, [flat], [case.backward()[1]], STEP, case.rng)


@each_model
@each_pictures
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-10), ("float32", 1e-4)])
def test_pytorch(model: Model, pictures: tuple, dtype: str, bound: float) -> None:
    """Training and evaluation, from the same weights under the same names.

    In float32 from one of three draws: rounding decides which of two nearly equal elements is a window's
    largest, and whether a ReLU passes one near 0, and so moves gradients. An error would show in each.
    """
    for draw in (5, 6) if dtype == "float32" else ():
        with suppress(AssertionError):
            return _follow_pytorch(model, pictures, dtype, bound, draw)
    return _follow_pytorch(model, pictures, dtype, bound, 7)


def _follow_pytorch(model: Model, pictures: tuple, dtype: str, bound: float, draw: int) -> None:
    torch = import_torch()
    from launch.torch_peer.network import TorchNetwork

    case = Case(model, pictures, draw=draw, dtype=dtype, poison=True)
    network, theirs = case.network, TorchNetwork(model, case.shape, case.classes).to(getattr(torch, dtype))
    state = {name: torch.from_numpy(np.array(value)) for name, value in network.state_dict().items()}
    theirs.load_state_dict(state, strict=True)
    x = torch.from_numpy(np.array(case.x.transpose(0, 3, 1, 2), dtype, order="C"))
    for _ in range(2):  # the second on buffers that have been used
        theirs.zero_grad()
        loss = torch.nn.functional.cross_entropy(theirs(x), torch.from_numpy(case.labels))
        loss.backward()
        ours, _ = case.backward()
        assert ours == pytest.approx(loss.item(), rel=bound)
        expected = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
        assert difference(network.params.to_checkpoint(network.params.grads), expected) <= (bound,)
    after = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    assert difference(network.state_dict(), {**after, **_counted(network)}) <= (bound,)
    theirs.eval()
    logits = network.forward(case.image(), StepContext(False))
    assert difference({"logits": logits}, {"logits": theirs(x).detach().numpy()}) <= (bound,)


def _counted(network: Network) -> dict[str, np.ndarray]:
    """Ours counts the batches of the network, from what it was given."""
    return {name: value for name, value in network.state_dict().items() if "num_batches" in name}


@needs_device
@each_model
@pytest.mark.parametrize("pictures", [PICTURES["colours"], PICTURES["oblong"]], ids=["colours", "oblong"])
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_device(model: Model, pictures: tuple, precision: str) -> None:
    """A step and an evaluation as on the host; a captured step, and one on a smaller batch before it, to the
    bit.
    """
    expected = Case(model, pictures, dtype="float64")
    loss, grads = expected.backward()
    logits = expected.evaluate()
    bound = 1e-10 if precision == "float64" else 1e-4
    named_grads = expected.network.params.to_checkpoint(grads)
    with device(precision) as backend:
        eager_only = precision == "float64"  # patches: cuDNN does no float64
        case = Case(model, pictures, dtype=precision, backend=backend, poison=eager_only)
        params = case.network.params
        half = Case(model, pictures, 1, dtype=precision, backend=backend)
        half.network = case.network

        def found() -> dict[str, np.ndarray]:
            return params.to_checkpoint(params.grads)

        case.backward()  # grows buffers, chooses plans
        half.backward()
        held = case.network.buffers.nbytes()
        assert float(backend.to_host(case.backward()[0])) == pytest.approx(loss, rel=bound)
        eager = found()
        assert difference(eager, named_grads) <= (bound,)
        assert case.network.buffers.nbytes() == held
        assert difference({"logits": case.evaluate()}, {"logits": logits}) <= (bound,)
        if eager_only:
            return
        _captured(case, backend)
        assert all((value == eager[name]).all() for name, value in found().items())
        _captured_evaluation(case, backend)


def _captured(case: Case, backend: Any) -> None:
    """The passes of a step as a graph, run once on a gradient full of NaN."""
    network = case.network
    x, dlogits = case.image(), case.loss()[1]
    network.backward(dlogits, case.step)
    generation = network.buffers.generation

    def step() -> None:
        network.forward(x, case.step)
        network.backward(dlogits, case.step)

    assert network.capturable()
    graph = capture(backend.cuda, step)
    assert network.buffers.generation == generation, "a buffer moved during a capture"
    network.params.grads.fill(np.nan)
    graph.launch(backend.stream)


def _captured_evaluation(case: Case, backend: Any) -> None:
    """The same logits to the bit as those of an eager pass."""
    network, eager = case.network, case.evaluate()
    x, logits = case.image(), []
    graph = capture(backend.cuda, lambda: logits.append(network.forward(x, StepContext(False))))
    logits[0].fill(np.nan)
    graph.launch(backend.stream)
    assert (backend.to_host(logits[0]) == eager).all()


# layers on vectors, and layers that draw


def drawing(**more: Any) -> Case:
    """A case of seven images, as batch norm on few vectors leaves no gradient."""
    case = Case(vectors, ((9, 11, 3), 5), 7, **more)
    keys = np.random.default_rng(3).integers(0, 1 << 32, 7, np.uint32)
    case.step = StepContext(True, 7, keys=case.network.backend.asarray(keys))
    return case


@both_orders
def test_gradient_of_vectors_and_dropout(order: str) -> None:
    case = drawing(dtype="float64", backend=Backend("numpy", np, order), poison=True)
    params, flat = case.network.params, case.network.params.values.copy()

    def value(flat: np.ndarray) -> float:
        params.values[...] = flat
        return float(case.loss()[0])

    check(value, [flat], [case.backward()[1]], STEP, case.rng)


@needs_device
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_the_device_drops_what_the_host_drops(precision: str) -> None:
    expected = drawing(dtype="float64")
    loss, grads = expected.backward()
    bound = 1e-10 if precision == "float64" else 1e-4
    with device(precision) as backend:
        case = drawing(dtype=precision, backend=backend)
        assert float(backend.to_host(case.backward()[0])) == pytest.approx(loss, rel=bound)
        found = case.network.params.to_checkpoint(case.network.params.grads)
        named_grads = expected.network.params.to_checkpoint(grads)
        # biases before a batch norm have no gradient but rounding
        for name in [name for name in found if name in ("0.bias", "5.bias")]:
            assert np.abs(found.pop(name)).max() <= bound
            named_grads.pop(name)
        assert difference(found, named_grads) <= (bound,)
        if precision == "float32":
            eager = case.network.params.to_checkpoint(case.network.params.grads)
            _captured(case, backend)
            again = case.network.params.to_checkpoint(case.network.params.grads)
            assert all((again[name] == eager[name]).all() for name in eager)


@needs_device
@pytest.mark.parametrize("model", [every_layer, vectors], ids=["every_layer", "vectors"])
def test_bf16(model: Model) -> None:
    """Activations of 8 bits' precision: the loss as far as it goes, and a captured step to the bit."""
    pictures, n = ((17, 22, 2), 5), 7
    keys = np.random.default_rng(3).integers(0, 1 << 32, n, np.uint32)
    expected = Case(model, pictures, n, dtype="float64")
    expected.step = StepContext(True, n, keys=keys)
    loss, _ = expected.backward()
    with device("bf16") as backend:
        case = Case(model, pictures, n, dtype="float32", activations="uint16", backend=backend)
        case.step = StepContext(True, n, keys=backend.asarray(keys))
        x = case.network.buffers.image("input", case.x.shape)
        x[...] = backend.asarray(to_bf16(case.x.astype("float32")))
        case.image = lambda: x  # type: ignore[method-assign]
        assert float(backend.to_host(case.backward()[0])) == pytest.approx(loss, rel=0.03)
        params = case.network.params
        eager = params.to_checkpoint(params.grads)
        assert all(np.isfinite(value).all() for value in eager.values())
        _captured(case, backend)
        again = params.to_checkpoint(params.grads)
        assert all((again[name] == eager[name]).all() for name in eager)


class Doubled:
    """What somebody makes of a layer: twice its output."""

    def forward(self, x: Any, step: StepContext) -> Any:
        y = super().forward(x, step)  # type: ignore[misc]
        y *= 2
        return y

    def backward(self, dy: Any, step: StepContext, on_grad: Any) -> Any:
        dy *= 2
        return super().backward(dy, step, on_grad)  # type: ignore[misc]


class Doubling(Doubled, ReLU):
    pass


class DoubledConv(Doubled, Conv):
    pass


class DoubledBN(Doubled, BatchNorm):
    pass


class DoubledSequence(Doubled, Sequential):
    pass


DERIVED: dict[str, Callable[[], tuple[Layer, ...]]] = {
    "absorbed": lambda: (Conv(3), Doubling(), Conv(3, bias=False), BatchNorm(), Doubling()),
    "absorbing": lambda: (
        DoubledConv(3),
        ReLU(),
        DoubledConv(3),
        BatchNorm(),
        DoubledBN(),
        ReLU(),
        MaxPool(2),
    ),
    "a sequence": lambda: (DoubledSequence(Conv(3)), ReLU(), DoubledSequence(Conv(3), BatchNorm()), ReLU()),
    "adding": lambda: (
        Conv(3),
        Residual(Conv(3), DoubledBN()),
        Residual(DoubledSequence(Conv(3), BatchNorm())),
    ),
    "before a residual": lambda: (
        DoubledConv(3),
        DoubledBN(),
        Residual(Conv(3), BatchNorm()),
        DoubledSequence(Conv(3), BatchNorm()),
        Residual(Conv(3), BatchNorm()),
        Residual(Conv(3), BatchNorm(), shortcut=Conv(3)),
    ),
}


@pytest.mark.parametrize("kind", DERIVED)
def test_a_layer_that_somebody_derives_does_what_it_says(kind: str) -> None:
    """As with a dropout of nothing behind each layer, which keeps them apart."""

    def model(shape: tuple[int, ...], classes: int) -> Sequential:
        return Sequential(*DERIVED[kind](), GlobalAvgPool(), Linear(classes))

    def apart(shape: tuple[int, ...], classes: int) -> Sequential:
        layers = [part for layer in DERIVED[kind]() for part in (layer, Dropout(0.0))]
        return Sequential(*layers, GlobalAvgPool(), Linear(classes))

    case, other = (Case(each, PICTURES["digits"], 2, dtype="float64", poison=True) for each in (model, apart))
    other.network.params.values[...] = case.network.params.values
    other.step = StepContext(True, 2, keys=np.zeros(2, np.uint32))
    assert case.loss()[0] == pytest.approx(other.loss()[0], rel=1e-12)
    params, flat = case.network.params, case.network.params.values.copy()

    def value(flat: np.ndarray) -> float:
        params.values[...] = flat
        return float(case.loss()[0])

    check(value, [flat], [case.backward()[1]], STEP, case.rng)


def test_dropout_keeps_the_mean_and_differs_by_image_epoch_and_layer() -> None:
    from nn.ops.dropout import dropout

    x, buffers = np.ones((400, 500)), Case(vectors, ((9, 11, 3), 5)).network.buffers
    keys = np.random.default_rng(0).integers(0, 1 << 32, 400, np.uint32)
    masks = []
    for given, salt in ((keys, 1), (keys, 2), (keys + np.uint32(1), 1)):
        y = np.empty_like(x)
        dropout(x, y, given, salt, 0.25, buffers)
        # 200,000 draws: four standard deviations
        assert (y == 0).mean() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / x.size) ** 0.5)
        assert set(np.unique(y)) == {0, 1 / 0.75}
        masks.append(y == 0)
    pairs = [
        (masks[0], masks[1]),
        (masks[0], masks[2]),
        (masks[0][:-1], masks[0][1:]),
        (masks[0][:, :-1], masks[0][:, 1:]),
    ]
    for one, other in pairs:
        apart = np.corrcoef(one.ravel(), other.ravel())[0, 1]
        assert abs(apart) < 5 / one.size**0.5


def test_what_stands_together_is_one_pass() -> None:
    """Written out, a ConvBN is the same layers, passes and bits."""

    def written(shape: tuple[int, ...], classes: int) -> Sequential:
        block = Sequential(Conv(6, bias=False), BatchNorm(), ReLU(), MaxPool(2))
        return Sequential(stem=block, head=GlobalMaxPool(), fc=Linear(classes))

    def short(shape: tuple[int, ...], classes: int) -> Sequential:
        return Sequential(stem=ConvBN(6, pool=2), head=GlobalMaxPool(), fc=Linear(classes))

    one, other = (Case(model, PICTURES["digits"]) for model in (written, short))
    assert (one.backward()[1] == other.backward()[1]).all()
    (stem,) = [layer for layer in one.network.layers.walk() if layer.name == "stem"]
    assert [type(layer).__name__ for layer in stem.passes] == ["Conv", "BatchNorm"]
    names = {name: value.shape for name, value in one.network.state_dict().items()}
    assert names == {name: value.shape for name, value in other.network.state_dict().items()}

    def loose(shape: tuple[int, ...], classes: int) -> Sequential:
        """The ReLU and the pooling stand outside, and still belong to batch norm's pass."""
        block = Sequential(Conv(6, bias=False), BatchNorm())
        return Sequential(stem=block, relu=ReLU(), pool=MaxPool(2), head=GlobalMaxPool(), fc=Linear(classes))

    third = Case(loose, PICTURES["digits"])
    assert len(third.network.layers.passes) == 3
    assert (third.backward()[1] == one.backward()[1]).all()


# what is checked about buffers


class EarlyRelease(Residual):
    """Lets go of x too early."""

    def forward(self, x: Any, step: StepContext) -> Any:
        self.buffers.retain(x)
        y = x
        for layer in self.body[:-1]:
            y = layer.forward(y, step)
        self.buffers.release(x)
        assert self.adder
        return self.adder.forward_added(y, step, x)


class Forgetful(Residual):
    """Never lets go of x."""

    def forward(self, x: Any, step: StepContext) -> Any:
        self.buffers.retain(x)
        return super().forward(x, step)


class Twice(Residual):
    """Lets go of what it no longer holds."""

    def forward(self, x: Any, step: StepContext) -> Any:
        y = super().forward(x, step)
        self.buffers.release(x)
        return y


def around(kind: type[Residual]) -> Model:
    def model(shape: tuple[int, ...], classes: int) -> Sequential:
        body = ConvBN(4), ConvBN(4), ConvBN(4, relu=False)
        return Sequential(stem=ConvBN(4), res=kind(*body), head=GlobalMaxPool(), fc=Linear(classes))

    return model


def test_a_use_after_the_release_is_seen() -> None:
    """With poison, its NaN is in the loss and in the gradient; without, the numbers are those of another
    layer.
    """
    right = Case(around(Residual), PICTURES["digits"], dtype="float64").backward()
    wrong = Case(around(EarlyRelease), PICTURES["digits"], dtype="float64").backward()
    assert np.isfinite(wrong[1]).all()
    assert abs(wrong[0] - right[0]) > 1e-3
    case = Case(around(EarlyRelease), PICTURES["digits"], dtype="float64", poison=True)
    with np.errstate(invalid="ignore"):
        loss, grads = case.backward()
    assert np.isnan(loss)
    assert np.isnan(grads).any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kind", "message"), [(Forgetful, "did not release"), (Twice, "released twice")])
def test_holders_are_counted(kind: type[Residual], message: str, training: bool) -> None:
    case = Case(around(kind), PICTURES["digits"])
    with pytest.raises(AssertionError, match=message):
        case.network.forward(case.image(), StepContext(training, case.n))


@pytest.mark.parametrize("model", [*SMALL.values()], ids=SMALL)
def test_buffers_stay_what_they_are(model: Model) -> None:
    """After a step of the full batch neither another one nor a smaller batch moves a buffer, nor changes a
    bit.
    """
    case, small = Case(model, PICTURES["digits"], 4), Case(model, PICTURES["digits"], 2)
    small.network = case.network
    _, first = case.backward()
    small.backward()
    generation, held = case.network.buffers.generation, case.network.buffers.nbytes()
    small.backward()
    _, again = case.backward()
    assert (again == first).all()
    assert (case.network.buffers.generation, case.network.buffers.nbytes()) == (generation, held)


# names and refusals


def test_names_are_paths() -> None:
    def model(shape: tuple[int, ...], classes: int) -> Sequential:
        inner = Residual(ConvBN(4), ConvBN(4, relu=False), shortcut=ConvBN(4, kernel=1, relu=False))
        own = named("side", ConvBN(4, kernel=1, relu=False))
        return Sequential(
            ConvBN(4),
            res=Residual(inner, ConvBN(4, relu=False), shortcut=own),
            end=GlobalAvgPool(),
            fc=Linear(classes),
        )

    names = [parameter.name for parameter in Network(model, (8, 8, 1), 2).params]
    assert [name for name in names if name.endswith(".0.weight")] == [
        "0.0.weight",
        "side.0.weight",
        "res.0.shortcut.0.weight",
        "res.0.0.0.weight",
        "res.0.1.0.weight",
        "res.1.0.weight",
    ]
    assert names[-2:] == ["fc.weight", "fc.bias"]


END = {"head": GlobalMaxPool, "fc": lambda: Linear(10)}
SHARED = ConvBN(4)

REFUSED: dict[str, tuple[Callable[[], Layer], str]] = {
    "pooled away": (
        lambda: Sequential(
            a=ConvBN(4, pool=2), b=ConvBN(5, pool=2), c=ConvBN(6, pool=2), head=GlobalMaxPool(), fc=Linear(10)
        ),
        "c.3: MaxPool gets 1×2×6, smaller than its window of 2×2: leave it out, or use larger images",
    ),
    "shortcut": (
        lambda: Sequential(
            res1=Residual(ConvBN(8, pool=2), ConvBN(8, relu=False)), head=GlobalMaxPool(), fc=Linear(10)
        ),
        "res1: Residual's body makes 3×4×8 of 7×8×1, its shortcut 7×8×1: give shortcut=ConvBN(…)",
    ),
    "no pooling": (
        lambda: Sequential(stem=ConvBN(4), fc=Linear(10)),
        "fc: Linear gets 7×8×4, not a vector: put GlobalMaxPool(), GlobalAvgPool() or Flatten() before it",
    ),
    "classes": (
        lambda: Sequential(stem=ConvBN(4), head=GlobalMaxPool(), fc=Linear(7)),
        "fc: the network makes 7 of images of 7×8×1, and there are 10 classes",
    ),
    "no end": (lambda: Sequential(stem=ConvBN(4)), "stem: the network makes 7×8×4 of images of 7×8×1"),
    "pooled twice": (
        lambda: Sequential(stem=ConvBN(4), a=GlobalMaxPool(), b=GlobalAvgPool(), fc=Linear(10)),
        "b: GlobalAvgPool gets 4, not an image: pool once",
    ),
    "too late": (
        lambda: Sequential(a=GlobalMaxPool(), b=ConvBN(4), fc=Linear(10)),
        "b.0: Conv gets 1, not an image: put it before Flatten() or the global pooling",
    ),
    "no stride": (
        lambda: Sequential(stem=Conv(4, stride=0), head=GlobalMaxPool(), fc=Linear(10)),
        "stem: Conv(out=4, kernel=3, stride=0, padding=1, dilation=1): give whole numbers, 1 or more",
    ),
    "large kernel": (
        lambda: Sequential(stem=Conv(4, kernel=3, padding=1, dilation=5), fc=Linear(10)),
        "stem: Conv gets 7×8×1, and its kernel reaches over 11×11 pixels: give a smaller kernel, padding, or",
    ),
    "large frame": (
        lambda: Sequential(pool=MaxPool(3, padding=2), fc=Linear(10)),
        "pool: MaxPool(window=(3, 3), stride=3, padding=2): give whole pixels, at most half a window",
    ),
    "flat twice": (
        lambda: Sequential(a=Flatten(), b=Flatten(), fc=Linear(10)),
        "b: Flatten gets 56, not an image: flatten once",
    ),
    "flat residual": (
        lambda: Sequential(a=Residual(Flatten()), fc=Linear(10)),
        "a: Residual's body makes 56 of 7×8×1, its shortcut 7×8×1",
    ),
    "residual of vectors": (
        lambda: Sequential(a=Flatten(), b=Residual(Linear(56)), fc=Linear(10)),
        "b: Residual gets 56, and its body makes no image: put it before Flatten() or the pooling",
    ),
    "rate": (
        lambda: Sequential(a=Flatten(), b=Dropout(1.0), fc=Linear(10)),
        "b: Dropout(1.0): give a rate from 0, below 1",
    ),
    "slope": (
        lambda: Sequential(a=Flatten(), b=LeakyReLU(-0.1), fc=Linear(10)),
        "b: LeakyReLU(-0.1): give a slope from 0, below 1",
    ),
    "nothing out": (
        lambda: Sequential(a=Flatten(), b=Linear(0), fc=Linear(10)),
        "b: Linear(0): give a whole number, 1 or more",
    ),
    "empty": (
        lambda: Sequential(res=Residual(), head=GlobalMaxPool(), fc=Linear(10)),
        "res: Residual() has no layers",
    ),
    "float": (
        lambda: Sequential(a=Conv(8.0), head=GlobalMaxPool(), fc=Linear(10)),  # type: ignore[arg-type]
        "a: Conv(out=8.0, kernel=3, stride=1, padding=1, dilation=1): give whole numbers",
    ),
    "float units": (
        lambda: Sequential(a=Flatten(), fc=Linear(10.0)),  # type: ignore[arg-type]
        "fc: Linear(10.0): give a whole number, 1 or more",
    ),
    "a list": (
        lambda: Sequential([Flatten(), Linear(10)]),  # type: ignore[arg-type]
        "Sequential holds a list, no layer: give layers, one by one",
    ),
    "a class": (
        lambda: Sequential(a=Flatten(), b=ReLU, fc=Linear(10)),  # type: ignore[arg-type]
        "Sequential holds the class ReLU: write ReLU()",
    ),
    "text": (
        lambda: Sequential(a=Flatten(), b=Dropout("a"), fc=Linear(10)),  # type: ignore[arg-type]
        "b: Dropout(a): give a rate from 0, below 1",
    ),
    "nothing inside": (
        lambda: Sequential(a=Sequential(), b=Flatten(), fc=Linear(10)),
        "a: Sequential() has no layers: give it at least one",
    ),
    "oblong": (
        lambda: Sequential(a=MaxPool((2, 3)), b=Flatten(), fc=Linear(10)),
        "a: MaxPool(window=(2, 3), stride=0, padding=0): give whole pixels, at most half a window of padding",
    ),
    "half a window": (
        lambda: Sequential(a=MaxPool(2.5), b=Flatten(), fc=Linear(10)),  # type: ignore[arg-type]
        "a: MaxPool(window=(2.5, 2.5), stride=2.5, padding=0): give whole pixels",
    ),
    "an oblong kernel": (
        lambda: Sequential(a=ConvBN(4, (3, 5)), b=Flatten(), fc=Linear(10)),  # type: ignore[arg-type]
        "a.0: Conv(out=4, kernel=(3, 5), stride=1, padding=0, dilation=1): give whole numbers",
    ),
    "an oblong dilation": (
        lambda: Sequential(a=Conv(4, dilation=(1, 2)), b=Flatten(), fc=Linear(10)),  # type: ignore[arg-type]
        "a: Conv(out=4, kernel=3, stride=1, padding=0, dilation=(1, 2)): give whole numbers",
    ),
    "one name": (
        lambda: Sequential(a=Flatten(), b=named("r", ReLU()), c=named("r", ReLU()), fc=Linear(10)),
        "r: two layers have this name: give each a name of its own",
    ),
    "twice": (
        lambda: Sequential(a=(same := ConvBN(4)), b=same, head=GlobalMaxPool(), fc=Linear(10)),
        "a: one layer stands in two places (b too): make one for each",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        Network(lambda *_: make(), (7, 8, 1), 10)


def test_a_network_needs_parameters() -> None:
    with pytest.raises(ValueError, match="the network has no parameters: give it a layer that has"):
        Network(lambda *_: Sequential(GlobalMaxPool()), (7, 8, 10), 10)


def test_resnet9_on_small_images() -> None:
    with pytest.raises(ValueError, match="images of 7×9: ResNet9 halves them three times: give 8×8 or more"):
        Network(MODELS["resnet9"], (7, 9, 1), 10)
    with pytest.raises(ValueError, match="variant 'best': choose one of baseline, avgpool"):
        Network(MODELS["resnet9"], (28, 28, 1), 10, {"variant": "best"})


class Plain(Linear):
    """A layer that somebody wrote, with arithmetic in NumPy."""

    bf16 = False


def test_a_layer_that_does_not_compute_in_bf16_is_refused_there() -> None:
    def model(*_: Any) -> Layer:
        return Sequential(head=GlobalMaxPool(), fc=Plain(10))

    Network(model, (7, 8, 1), 10)
    with pytest.raises(ValueError, match="fc: Plain does not compute in bf16: give another precision"):
        Network(model, (7, 8, 1), 10, activations="uint16")
