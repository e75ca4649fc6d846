"""Looks at each layer of a network both in its place and alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from distrib.probe.alone import Alone, examine
from distrib.probe.watch import EQUAL, Batch, Fault, Marks, Watcher, is_unit, label, train_step, watched
from nn.array import Array
from nn.layer import Layer, StepContext
from nn.network import Network


class Examined(Marks):
    """Examines each unit alone, in other replicas, on what it gets in this network."""

    def __init__(self, network: Network, alone: Network, plain: Network) -> None:
        super().__init__(network)
        self.faults: list[Fault] = []
        self.all_examined = True
        self._replicas = alone, plain
        self._twins = {
            id(layer): pair for layer, *pair in zip(*(each.layers.walk() for each in (network, alone, plain)))
        }
        self._given: list[tuple[list[Array], list[bool]]] = []

    def begin(self, layer: Layer, way: str, given: tuple[Array, ...], step: StepContext) -> None:
        super().begin(layer, way, given, step)
        if is_unit(layer) and way.startswith("forward"):
            pooled = [self.network.buffers.is_pooled(x) for x in given]
            self._given.append(([np.array(x) for x in given], pooled))

    def end(self, layer: Layer, way: str, made: tuple[Any, ...], step: StepContext) -> None:
        if not is_unit(layer):
            return
        if way.startswith("forward"):
            given, pooled = self._given.pop()
            twins = zip(self._replicas, self._twins[id(layer)])
            faults, examined = examine(*(Alone(*pair, given, pooled, step) for pair in twins))
            self.faults += faults
            self.all_examined &= examined
        for array in made:
            if array is not None and not np.isfinite(array).all():
                known = [fault for fault in self.faults if fault.layer == label(layer)]
                said = f"{way} reads memory that it, or another layer, has released"
                raise known[-1] if known else Fault("buffers", label(layer), said)
        super().end(layer, way, made, step)


class Kept(Watcher):
    """Keeps copies of what each unit is given and makes in a step."""

    def __init__(self, network: Network) -> None:
        super().__init__(network)
        self.given: dict[int, tuple[list[Array], list[bool], StepContext]] = {}  # forward, by id of the layer
        self.told: dict[int, Array] = {}  # dy
        self.made: list[tuple[Layer, list[Array]]] = []  # backward, in order: gradients

    def begin(self, layer: Layer, way: str, given: tuple[Array, ...], step: StepContext) -> None:
        super().begin(layer, way, given, step)
        if is_unit(layer) and way.startswith("forward"):
            pooled = [self.network.buffers.is_pooled(x) for x in given]
            self.given[id(layer)] = [np.array(x) for x in given], pooled, step
        elif is_unit(layer):
            self.told.setdefault(id(layer), np.array(given[0]))

    def end(self, layer: Layer, way: str, made: tuple[Any, ...], step: StepContext) -> None:
        if is_unit(layer) and way.startswith("backward"):
            own = [np.array(self.network.params[spec.name].grad) for spec in layer.specs()]
            self.made.append((layer, [*(np.array(each) for each in made if each is not None), *own]))


def unlike_alone(network: Network, plain: Network, batch: Batch) -> str:
    """The first layer, in backward order, whose backward makes something else in `network` than alone."""
    kept, twins = Kept(network), dict(zip(map(id, network.layers.walk()), plain.layers.walk()))
    plain.params.values[...] = network.params.values
    with watched(network, kept):
        train_step(network, batch, watcher=kept)
    for layer, made in kept.made:
        if not made:
            continue
        given, pooled, step = kept.given[id(layer)]
        alone = Alone(plain, twins[id(layer)], given, pooled, step)
        alone.given = given  # without noise
        alone.forward(given)
        found, _ = alone.backward(kept.told[id(layer)])
        own = [plain.params[spec.name].grad for spec in layer.specs()]
        pairs = list(zip(made, [*(each for each in found if each is not None), *own]))
        least = EQUAL / 100 * max(np.linalg.norm(theirs) for _, theirs in pairs)
        for mine, theirs in pairs:  # one may be nothing but rounding, as the gradient of a bias
            if not np.linalg.norm(mine - theirs) <= EQUAL * np.linalg.norm(theirs) + least:
                return label(layer)
    return ""
