"""Watches the passes of a network's layers: who made what, and what each is told and returns."""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

import nn.buffers
from nn.array import Array
from nn.layer import Layer, StepContext, text
from nn.layers import Residual, Sequential
from nn.network import Network
from nn.ops.loss import softmax_cross_entropy
from nn.params import Parameter

WAYS = ("forward", "backward", "forward_added", "backward_added")
"""Methods that do a pass."""

EQUAL = 1e-9
"""Relative difference of float64 results that rounding alone does not reach."""


class Fault(Exception):
    """What a layer does wrong, found while it runs. `check` is the one that it fails (see CHECKS)."""

    def __init__(self, check: str, layer: str, said: str) -> None:
        super().__init__(f"{layer}: {said}")
        self.check, self.layer, self.said = check, layer, said


def label(layer: Layer) -> str:
    """Name and kind of a layer, for a message."""
    kind = type(layer).__name__
    return f"{layer.name} ({kind})" if layer.name else kind


def is_unit(layer: Layer) -> bool:
    """Whether a layer is looked at by itself: it computes, or runs the layers inside in a way of its own."""
    plain = (
        all(getattr(type(layer), way) is getattr(kind, way) for way in WAYS)
        for kind in (Sequential, Residual)
    )
    return not layer.children() or not any(plain)


def same(some: np.ndarray, others: np.ndarray) -> bool:
    """Whether arrays differ by rounding at most."""
    return bool((np.abs(some - others) <= EQUAL * np.sqrt(np.mean(some**2))).all())


def guarded(layer: Layer, way: str, call: Callable[[], Any]) -> Any:
    """What `call`, a pass of `layer`, returns; what it raises becomes a Fault with the line of its file."""
    try:
        with np.errstate(all="ignore"):
            return call()
    except Fault:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, AssertionError) and frames[-1].filename == nn.buffers.__file__:
            said = f"{error}, in {way}: release once what a pass is given, and retain what you need longer"
            raise Fault("buffers", label(layer), said) from error
        file = inspect.getsourcefile(type(layer))
        lines = [frame.lineno for frame in frames if frame.filename == file]
        line = f" in line {lines[-1]}" if lines else ""
        said = f"{way} raises {type(error).__name__}{line}" + (f": {error}" if str(error) else "")
        raise Fault("runs", label(layer), said) from error


class Watcher:
    """Sees each pass of each layer, and holds it to the protocol's shapes and dtype."""

    def __init__(self, network: Network) -> None:
        self.network, self.images = network, 0
        self.stack: list[Layer] = []
        self._made: dict[int, tuple[Layer, Array]] = {}  # by id, which the array keeps its own
        self._shapes: dict[int, tuple[int, ...]] = {}  # of x, by id of the layer

    def start(self, images: int) -> None:
        """A pass of so many images begins."""
        self.images = images
        self.stack.clear()
        self._made.clear()

    def begin(self, layer: Layer, way: str, given: tuple[Array, ...], step: StepContext) -> None:
        """Before a pass of `layer`."""
        if way.startswith("forward"):
            self.require_shape(given[0], layer.in_shape, label(layer))

    def end(self, layer: Layer, way: str, made: tuple[Any, ...], step: StepContext) -> None:
        """After a pass of `layer`."""

    def require_shape(self, x: Array, shape: tuple[int, ...], taker: str) -> None:
        """Fault of who made x unless it is so many images of `shape`."""
        if x.shape == (self.images, *shape):
            return
        maker = self._made[id(x)][0] if id(x) in self._made else (self.stack or [self.network.layers])[-1]
        wanted, has = text((self.images, *shape)), text(x.shape)
        said = f"makes {has} of {self.images} images where {taker} takes {wanted}: infer must return"
        raise Fault("runs", label(maker), f"{said} the shape of one image that forward makes")

    def run(self, layer: Layer, way: str, pass_: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """A pass of `layer`, watched."""
        every = (*given, *named.values())
        (step,) = (each for each in every if isinstance(each, StepContext))
        arrays = tuple(each for each in every if isinstance(each, np.ndarray))
        self.begin(layer, way, arrays, step)
        x_shape = arrays[0].shape
        self.stack.append(layer)
        result = guarded(layer, way, lambda: pass_(*given, **named))
        self.stack.pop()
        made = result if way == "backward_added" else (result,)
        require_made(layer, way, made, self.network.dtype)
        if way.startswith("forward"):
            self._made[id(result)] = layer, result
            self._shapes[id(layer)] = x_shape
        else:
            require_gradient(layer, made[0], self._shapes[id(layer)])
        self.end(layer, way, made, step)
        return result


def require_made(layer: Layer, way: str, made: Any, dtype: Any) -> None:
    """Fault unless what a pass of `layer` returns are arrays of the network's dtype."""
    if not isinstance(made, tuple):
        raise Fault("runs", label(layer), f"{way} returns a {type(made).__name__}: return two arrays")
    for array in made:
        if array is None and way.startswith("backward"):
            if layer.need_dx and array is made[0]:
                raise Fault("runs", label(layer), f"{way} returns no gradient of its input: return dL/dx")
            continue
        if not isinstance(array, np.ndarray):
            raise Fault("runs", label(layer), f"{way} returns a {type(array).__name__}: return an array")
        if array.dtype != dtype:
            said = f"{way} returns {array.dtype} inside {dtype}: make arrays in self.dtype, best by"
            raise Fault("precision", label(layer), f"{said} self.output and self.gradient")


def require_gradient(layer: Layer, dx: Any, shape: tuple[int, ...]) -> None:
    """Fault unless dx, where there is one, has the shape of x."""
    if dx is not None and dx.shape != shape:
        said = f"backward returns a gradient of {text(dx.shape)}, and its input is {text(shape)}"
        raise Fault("runs", label(layer), f"{said}: return dL/dx, shaped as x")


@contextmanager
def watched(network: Network, watcher: Watcher) -> Iterator[None]:
    """Context in which `watcher` sees the passes of the network's layers, as they were built."""
    layers = list(network.layers.walk())
    for layer in layers:
        for way in WAYS:
            setattr(layer, way, functools.partial(watcher.run, layer, way, getattr(layer, way)))
    try:
        yield
    finally:
        for layer in layers:
            for way in WAYS:
                delattr(layer, way)


# fingerprints


class Mark(NamedTuple):
    """What a pass returned: for each image its product with a fixed vector, and its length."""

    layer: str
    way: str
    values: np.ndarray  # (2, N)


@functools.lru_cache(maxsize=64)
def _vector(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape)


def fingerprint(x: np.ndarray) -> np.ndarray:
    """(2, N) of N images or vectors: any difference of two arrays shows, at the price of two numbers."""
    axes = "abcdefg"[: x.ndim - 1]
    product = np.einsum(f"n{axes},{axes}->n", x, _vector(x.shape[1:]))
    return np.stack([product, np.sqrt(np.einsum(f"n{axes},n{axes}->n", x, x))])


class Marks(Watcher):
    """Keeps a mark of each pass of each unit, in the order in which they end."""

    def __init__(self, network: Network) -> None:
        super().__init__(network)
        self.marks: list[Mark] = []

    def start(self, images: int) -> None:
        super().start(images)
        self.marks = []

    def end(self, layer: Layer, way: str, made: tuple[Any, ...], step: StepContext) -> None:
        if is_unit(layer):
            for array in made:
                if array is not None:
                    self.marks.append(Mark(label(layer), way.split("_")[0], fingerprint(array)))


def joined(parts: list[list[Mark]]) -> list[Mark]:
    """The marks of the whole batch from those of its parts."""
    return [
        marks[0]._replace(values=np.concatenate([mark.values for mark in marks], 1)) for marks in zip(*parts)
    ]


def first_difference(some: list[Mark], others: list[Mark]) -> Mark | None:
    """The first of `some` that differs from its counterpart by more than rounding."""
    for mark, other in zip(some, others):
        if mark[:2] != other[:2] or mark.values.shape != other.values.shape:
            return mark
        scale = np.sqrt(np.mean(mark.values[1] ** 2)) + np.sqrt(np.mean(other.values[1] ** 2))
        if not (np.abs(mark.values - other.values) <= EQUAL * scale).all():
            return mark
    return some[len(others)] if len(some) > len(others) else None


# passes of a whole network


class Batch(NamedTuple):
    """Images in [0, 1] with labels, and a random number each for layers that are random."""

    x: np.ndarray
    labels: np.ndarray
    keys: np.ndarray

    def part(self, images: slice) -> Batch:
        return Batch(*(each[images] for each in self))


def draw(network: Network, images: int, seed: int) -> Batch:
    """A batch of random images, which no two values of make equal."""
    rng = np.random.default_rng(seed)
    x = rng.random((images, *network.shape))
    labels = rng.integers(0, network.classes, images)
    return Batch(x, labels, rng.integers(0, 1 << 32, images, np.uint32))


def context(network: Network, batch: Batch, count: int = 0, all_reduce: Any = None) -> StepContext:
    """What a training step on `batch`, a part of `count` images, is told."""
    return StepContext(True, count or len(batch.x), all_reduce, batch.keys if network.is_random() else None)


def forward(network: Network, batch: Batch, step: StepContext, watcher: Watcher | None = None) -> Array:
    """Logits, as `Network.forward` makes them; what was not released is left to be found."""
    x = network.buffers.image("input", batch.x.shape)
    x[...] = batch.x
    network.buffers.release_all()
    if watcher:
        watcher.start(len(x))
    logits = network.layers.forward(x, step)
    if watcher:
        watcher.require_shape(logits, (network.classes,), "the loss")
    return logits


def train_step(
    network: Network,
    batch: Batch,
    step: StepContext | None = None,
    watcher: Watcher | None = None,
    on_grad: Callable[[Parameter], Any] = lambda _: None,
) -> float:
    """Loss of a step's part; the gradient lies in the parameters."""
    step = step or context(network, batch)
    loss, dlogits = softmax_cross_entropy(
        forward(network, batch, step, watcher), batch.labels, step.global_batch
    )
    network.layers.backward(dlogits, step, on_grad)
    network.buffers.release_late()
    return float(loss)
