"""Checks a network for what training relies on, and names the layer at fault.

Your own layers may compute anything. Training on several ranks, resuming and the memory's reuse rely on what
they do beside: `check` runs a network on a few random images, in float64, and looks at each layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from distrib.files import printable
from distrib.probe import ranks
from distrib.probe.alone import derivative_is, scale_of
from distrib.probe.together import Examined, unlike_alone
from distrib.probe.watch import (
    Batch,
    Fault,
    Marks,
    context,
    draw,
    first_difference,
    forward,
    joined,
    train_step,
    watched,
)
from nn.array import Array
from nn.layer import Shape, StepContext
from nn.network import Model, Network
from nn.ops.loss import softmax_cross_entropy

CHECKS = {
    "builds": "its layers fit together, images of this shape, and the number of classes",
    "runs": "every layer makes the shape that it declares, of finite numbers",
    "precision": "float64 goes in and float64 comes out, no layer computes in float32",
    "buffers": "each layer releases what it is given once, writes to no input, reads nothing released",
    "announcements": "each gradient is written to its memory, complete, and announced once",
    "gradients": "each layer's gradients, alone, are those of what its forward computes",
    "network": "the gradient of the whole network is that of the loss",
    "repeats": "the same images give the same step and the same logits again",
    "ranks": "a step on two ranks is that of one: outputs, statistics and summed gradients",
    "evaluation": "an image's logits do not depend on the other images evaluated with it",
}
"""What holds where a check passes, in the order of the checks."""


@dataclass(frozen=True)
class Finding:
    """One check's outcome. `status` is "ok", "failed" or "not checked"; `layer` is the one at fault."""

    check: str
    status: str
    text: str
    layer: str = ""


@dataclass(frozen=True)
class Row:
    """A layer in the table: shapes for one image, its parameters, operations to train on one image."""

    name: str
    kind: str
    in_shape: Shape
    out_shape: Shape
    parameters: int
    flops: int


def describe(
    function: Model, shape: Shape, classes: int, options: Mapping[str, Any] | None = None
) -> list[Row]:
    """The layers that compute, in order; ValueError where they do not fit."""
    layers = function(shape, classes, **(options or {}))
    layers.build("", tuple(shape), need_dx=False)
    return [
        Row(
            layer.name,
            type(layer).__name__,
            layer.in_shape,
            layer.out_shape,
            sum(prod(spec.shape) for spec in layer.specs()),
            layer.flops(training=True),
        )
        for layer in layers.walk()
        if not layer.children() or layer.specs()
    ]


def check(
    function: Model,
    shape: Shape,
    classes: int,
    options: Mapping[str, Any] | None = None,
    *,
    images: int = 8,
) -> list[Finding]:
    """A finding for each of CHECKS, of the network that `function(shape, classes, **options)` makes.

    It trains on `images` random images, 2 or more, and the layer that it names is the first at fault.
    """
    assert images >= 2, "two ranks need an image each"
    examination = Examination(function, shape, classes, options or {}, images)
    examination.run()
    return examination.findings()


class Examination:
    """The checks of a network, one after another; one that fails may leave others without sense."""

    def __init__(
        self, function: Model, shape: Shape, classes: int, options: Mapping[str, Any], images: int
    ) -> None:
        self._arguments = function, tuple(shape), classes, options
        self.images, self.faults, self.passed = images, dict[str, Fault](), set[str]()
        self.parts = [slice(0, images * 5 // 8), slice(images * 5 // 8, images)]

    def network(self, poison: bool = False) -> Network:
        """Another replica, with γ and β off their start, where an error in their gradients would not show."""
        made, rng = Network(*self._arguments, dtype="float64", poison=poison), np.random.default_rng(2)
        for layer in made.layers.walk():
            for spec in layer.specs():
                if not spec.fan_in:
                    value = made.params[spec.name].value
                    value += rng.uniform(-0.2, 0.2, value.shape)
        return made

    def run(self) -> None:
        """All checks."""
        if not self.builds():
            return
        self.passed.add("builds")
        self.batch, self.other = (draw(self.first, self.images, seed) for seed in (3, 4))
        with np.errstate(all="ignore"):
            self.each_layer()
            if self.faults.keys() & {"runs", "precision", "buffers"}:
                return
            looks = {
                "repeats": self.repeats,
                "network": self.whole_gradient,
                "ranks": self.ranks,
                "evaluation": self.evaluation,
            }
            for name, look in looks.items():
                if self.faults.keys() & (CHECKS if name == "network" else {"repeats", "network"}):
                    continue  # it would show the same fault again, without its layer or its cause
                try:
                    look()
                    self.passed.add(name)
                except Fault as fault:
                    self.fail(fault if fault.check in looks else Fault(name, fault.layer, fault.said))

    def builds(self) -> bool:
        """Whether replicas can be built, and described."""
        said = ""
        try:
            describe(*self._arguments)
            said = "makes the same layers when called again: make them inside the function: "
            self.first, self.alone, self.plain = (self.network(poison) for poison in (True, True, False))
        except MemoryError as error:
            self.fail(Fault("builds", "", f"needs too much memory ({error}): make the network smaller"))
        except Exception as error:
            same = "stands in two places" in str(error)
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            self.fail(Fault("builds", "", f"{said if same else ''}{kind}{error}"))
        return not self.faults

    def fail(self, fault: Fault) -> None:
        """Note what is wrong, unless its check has failed before."""
        self.faults.setdefault(fault.check, fault)

    def findings(self) -> list[Finding]:
        """What came out."""
        return [self._finding(name, said) for name, said in CHECKS.items()]

    def _finding(self, name: str, said: str) -> Finding:
        if fault := self.faults.get(name):
            layer = printable(fault.layer, 200)
            return Finding(name, "failed", printable((f"{layer}: " if layer else "") + fault.said), layer)
        if name in self.passed:
            return Finding(name, "ok", said)
        return Finding(name, "not checked", f"mend first what failed: {', '.join(self.faults)}")

    # checks

    def each_layer(self) -> None:
        """A step with poisoned buffers, in which each layer is examined alone on what it gets."""
        watcher = Examined(self.first, self.alone, self.plain)
        try:
            with watched(self.first, watcher):
                loss = train_step(self.first, self.batch, watcher=watcher)
        except Fault as error:
            watcher.faults.append(error)
        else:
            self.step = ranks.Outcome([self.first], watcher.marks, loss)
            self.passed |= {"runs", "precision", "buffers", "announcements"}
            self.passed |= {"gradients"} if watcher.all_examined else set()
        for fault in watcher.faults:
            self.fail(fault)

    def repeats(self) -> None:
        """The first step again, on a replica that has trained on other images."""
        self.second = self.network()
        statistics = self.second.statistics.copy()
        ranks.step_of_one(self.second, self.other)
        self.second.statistics[...] = statistics
        again = ranks.step_of_one(self.second, self.batch)
        if found := ranks.departure(self.first, self.step, again):
            layer, what = found
            said = f"the {what} of a step depends on the step before: keep no state from step to step"
            raise Fault("repeats", layer, f"{said} but in statistics(), and none that training reads")

    def ranks(self) -> None:
        """The first step on two ranks that share the batch unequally."""
        outcome = ranks.step_of_ranks([self.network(), self.network()], self.batch, self.parts)
        if found := ranks.departure(self.first, self.step, outcome):
            layer, what = found
            said = f"two ranks get another {what} than one: compute each image by itself, divide by"
            remedy = "step.global_batch, sum over images with step.all_reduce, draw by step.keys"
            raise Fault("ranks", layer, f"{said} {remedy}")

    def evaluation(self) -> None:
        """Logits of all images at once, and of parts of them one after another."""
        self.second.statistics[...] = self.first.statistics
        whole = self._evaluate(self.first, self.batch)
        *parts, again = (self._evaluate(self.second, self.batch.part(self.parts[i])) for i in (0, 1, 0))
        if mark := first_difference(parts[0], again):
            said = "what it makes in evaluation depends on what was evaluated before: keep no state there"
            raise Fault("repeats", mark.layer, said)
        if mark := first_difference(whole, joined(parts)):
            said = "what it makes of an image in evaluation depends on the other images: use statistics()"
            raise Fault("evaluation", mark.layer, f"{said} of training, or compute each image by itself")

    @staticmethod
    def _evaluate(network: Network, batch: Batch) -> list[Any]:
        watcher = Marks(network)
        with watched(network, watcher):
            forward(network, batch, StepContext(False), watcher)
        return watcher.marks

    def whole_gradient(self) -> None:
        """The loss along random directions of all parameters."""
        network, rng = self.second, np.random.default_rng(5)
        loss = train_step(network, self.batch)
        was, grads = network.params.values.copy(), network.params.grads.copy()
        step = context(network, self.batch)

        def at(flat: Array) -> float:
            network.params.values[...] = flat
            logits = forward(network, self.batch, step)
            return float(softmax_cross_entropy(logits, self.batch.labels, self.images)[0])

        d = np.zeros_like(was)
        for parameter in network.params:
            view = parameter.view(d)
            view[...] = rng.normal(0, scale_of(parameter.value), view.shape)
        exact, size = float(grads @ d), float(np.linalg.norm(grads * d))
        right, found = derivative_is(exact, size, loss, lambda h: at(was + h * d) - at(was - h * d))
        network.params.values[...] = was
        if not right:
            layer = unlike_alone(network, self.plain, self.batch)
            said = f"the whole network's gradient is {exact:.6g} along a random direction, {found:.6g} by"
            remedy = "and this layer's is another than alone: others overwrite what it keeps for backward, so"
            more = f"{remedy} keep it in self.buffers.persistent, image or save" if layer else "mend backward"
            raise Fault("network", layer, f"{said} difference quotients, {more}")
