"""A network of layers with its memory: parameters, running statistics, forward and backward, checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nn.array import Array
from nn.buffers import Buffers
from nn.device import NUMPY, Backend
from nn.layer import Layer, OnGrad, Shape, StepContext, text
from nn.layers.convolution import Conv
from nn.params import Parameters

Model = Callable[..., Layer]
"""What makes the layers of a network: a function of (shape, classes, **options)."""


def parameter_shapes(
    model: Model, shape: Shape, classes: int, options: Mapping[str, Any]
) -> dict[str, Shape]:
    """Shapes of a network's parameters by name, without its memory; ValueError where its layers do not
    fit."""
    layers = model(shape, classes, **options)
    layers.build("", tuple(shape), need_dx=False)
    return {spec.name: spec.shape for layer in layers.walk() for spec in layer.specs()}


class Network:
    """The layers that `model(shape, classes, **options)` makes, with memory; ValueError if they do not fit.

    `shape` is (H, W, C) of the images, and `classes` the number of classes.
    `params` holds the parameters, `statistics` the running statistics in one vector, and `running` views into
    it by name. Weights come from `seed` alone. `activations` is their dtype where it is not the parameters':
    uint16, which holds the bits of bfloat16, for layers that take it (`Layer.bf16`). With `poison`, for
    tests, see `Buffers`. `params` are those of a network of the same layers, to compute with its weights, and
    `turns_with` is one of these that never runs while this one does (see `Buffers`).
    """

    def __init__(
        self,
        model: Model,
        shape: Shape,
        classes: int,
        options: Mapping[str, Any] | None = None,
        *,
        seed: int = 0,
        backend: Backend = NUMPY,
        dtype: str = "float32",
        activations: str | None = None,
        poison: bool = False,
        params: Parameters | None = None,
        turns_with: Network | None = None,
    ) -> None:
        self.layers = layers = model(shape, classes, **(options or {}))
        self.shape, self.classes = tuple(shape), classes
        self.backend, self.dtype = backend, np.dtype(dtype)
        out = layers.build("", self.shape, need_dx=False)
        if out != (classes,):
            last = (layers.children() or [layers])[-1]
            raise ValueError(
                f"{last.name}: the network makes {text(out)} of images of {text(shape)},"
                f" and there are {classes} classes: end it with GlobalMaxPool() and Linear(classes)"
            )
        names = Counter(layer.name for layer in layers.walk())
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"{twice[0]}: two layers have this name: give each a name of its own")
        if not any(layer.specs() for layer in layers.walk()):
            raise ValueError("the network has no parameters: give it a layer that has, as Linear(classes)")
        plain = [layer for layer in layers.walk() if not layer.bf16]
        if activations and plain:
            kind = type(plain[0]).__name__
            raise ValueError(f"{plain[0].name}: {kind} does not compute in bf16: give another precision")
        buffers = turns_with.buffers if turns_with else None
        self.buffers: Buffers = Buffers(backend, activations or dtype, poison=poison, turns_with=buffers)
        specs = [spec for layer in layers.walk() for spec in layer.specs()]
        self.params = params or Parameters(specs, backend, dtype, narrow=activations)
        sizes = {name: size for layer in layers.walk() for name, size in layer.statistics().items()}
        self.statistics = backend.xp.zeros(sum(sizes.values()), self.dtype)
        stops = np.cumsum(list(sizes.values()), dtype=int).tolist()
        self.running: dict[str, Array] = {
            name: self.statistics[stop - size : stop]
            for (name, size), stop in zip(sizes.items(), stops, strict=True)
        }
        self.batches_tracked = 0
        for layer in layers.walk():
            layer.bind(self.params, self.running, self.buffers)
        if params is None:
            self.params.initialise(np.random.default_rng(seed))

    def convs(self) -> list[Conv]:
        """All convolutions, in the order of their parameters."""
        return [layer for layer in self.layers.walk() if isinstance(layer, Conv)]

    def is_random(self) -> bool:
        """Whether a step needs `StepContext.keys`."""
        return any(layer.random for layer in self.layers.walk())

    def forward(self, x: Array, step: StepContext) -> Array:
        """Logits (N, classes) for images x (N, H, W, C) scaled to [0, 1]."""
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"images of {text(x.shape[1:])}: this network takes {text(self.shape)}")
        self.buffers.release_all()
        logits: Array = self.layers.forward(x, step)
        assert not self.buffers.held(), "a layer did not release what it was given"
        if step.training:
            self.batches_tracked += 1
        return logits

    def backward(self, dy: Array, step: StepContext, on_grad: OnGrad = lambda _: None) -> None:
        """Fill the flat gradient for dy = dL/dlogits; `on_grad` hears of each gradient as it is queued.

        On a GPU gradients of weights come from `backend.side_stream`, which is joined at the end.
        """
        self.layers.backward(dy, step, on_grad)
        if self.backend.side_stream:
            self.backend.side_stream.join_all()
        self.buffers.release_late()
        assert not self.buffers.held(), "a layer did not release what it was given"

    def tune_convolutions(self, n: int, training: bool) -> None:
        """Run each convolution once for a batch of n, so that a device chooses its plans.

        Gradients are overwritten with `training`.
        """
        for conv in self.convs():
            conv.tune(n, training)
        if self.backend.side_stream:
            self.backend.side_stream.join_all()

    def capturable(self) -> bool:
        """Whether a CUDA graph can hold the last step: its convolutions were the device's own."""
        return all(conv.saved.algorithm in self.backend.algorithms for conv in self.convs())

    def flops(self, training: bool = True) -> float:
        """Floating-point operations for one image: two a product, convolutions done directly.

        Batch norm, pooling and the like, below 2 % of a ResNet-9 at full width, are not counted.
        """
        return float(sum(layer.flops(training) for layer in self.layers.walk()))

    # checkpoints

    def _counters(self) -> list[str]:
        """Names under which a PyTorch `state_dict` counts the batches that statistics come from."""
        means = [name for name in self.running if name.endswith(".running_mean")]
        return [name.replace(".running_mean", ".num_batches_tracked") for name in means]

    def state_dict(self) -> dict[str, np.ndarray]:
        """Host copies of parameters and running statistics, as a PyTorch `state_dict` of this network."""
        state = self.params.to_checkpoint(self.params.values)
        for name, value in self.running.items():
            state[name] = np.array(self.backend.to_host(value))
        for name in self._counters():
            state[name] = np.array(self.batches_tracked, np.int64)
        return {name: state[name] for name in sorted(state)}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """The reverse of `state_dict`; ValueError names the first tensor missing, extra or misshapen."""
        own = {name: array.shape for name, array in self.state_dict().items()}
        for name in sorted(own.keys() | state.keys()):
            if name not in state:
                raise ValueError(f"tensor {name} is missing")
            if name not in own:
                raise ValueError(f"tensor {name} is not of this network")
            if state[name].shape != own[name]:
                raise ValueError(
                    f"tensor {name} has shape {state[name].shape}, this network's is {own[name]}"
                )
        self.params.from_checkpoint(state, self.params.values)
        for name, value in self.running.items():
            value[...] = self.backend.asarray(state[name].astype(self.dtype))
        self.batches_tracked = max((int(state[name]) for name in self._counters()), default=0)
