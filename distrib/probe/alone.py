"""Runs one layer of a network by itself, on what it gets there: its memory, its gradients, its precision."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np

from distrib.probe.watch import Fault, guarded, label, require_gradient, require_made, same
from nn.array import Array
from nn.layer import Layer, StepContext
from nn.network import Network
from nn.params import Parameter

STEPS = (1e-5, 1e-6, 1e-7, 1e-8)
"""Of finite differences, relative to the values moved: the smaller, the fewer kinks lie within, and the more
is lost to rounding."""

EXACT, ROUNDING = 1e-8, 100 * np.finfo(float).eps
"""What a derivative may be off, relative to the gradient, and to the values over the step."""

POOL = 8
"""Buffers that a layer hardly takes at once."""

TELLING = 1e-4
"""Share of a derivative up to which rounding may hide an error at the smaller steps."""

DIRECTIONS = 2
"""Random directions along which a derivative may prove right: a kink hardly lies within the steps of all."""


def derivative_is(
    exact: float, size: float, values: float, difference: Callable[[float], float]
) -> tuple[bool, float]:
    """Whether `difference(h)`, a central difference, comes to `exact` at some step; and what it last was.

    `size` is the typical size of such a derivative, `values` that of what the difference is taken of. Where
    the function has a kink within the step, only a smaller step shows the derivative.
    """
    first = found = difference(STEPS[0]) / (2 * STEPS[0])
    for h in STEPS:
        rounding = ROUNDING * values / h
        if h < STEPS[0]:
            if rounding > TELLING * max(size, abs(first)):
                break  # it could not tell right from wrong
            found = difference(h) / (2 * h)
        if abs(found - exact) <= EXACT * size + rounding:
            return True, found
    return False, found


def scale_of(x: Array) -> float:
    """Of the values of x, to move them by a share of it."""
    return float(np.std(x)) or float(np.abs(x).max()) or 1.0


class Alone:
    """A layer of `network`, on copies of what it was `given` in a pass (x, and a residual to add).

    `pooled` says which of these came from the pool of activations. The network's buffers should be poisoned.
    """

    def __init__(
        self, network: Network, layer: Layer, given: list[Array], pooled: list[bool], step: StepContext
    ) -> None:
        self.network, self.layer, self.step, self.pooled = network, layer, step, pooled
        self.buffers, self.name, self.rng = network.buffers, label(layer), np.random.default_rng(1)
        self.given = [self._off_kinks(x) for x in given]
        self.added = "_added" if len(given) > 1 else ""
        names = [spec.name for each in layer.walk() for spec in each.specs()]
        self.parameters = [network.params[name] for name in names]

    def _off_kinks(self, x: Array) -> Array:
        """x with noise: a ReLU before leaves zeros, where a maximum has no derivative. Its sign stays."""
        noise = self.rng.normal(0, 0.1 * scale_of(x), x.shape)
        return np.array(x + (np.abs(noise) if x.min() >= 0 else noise))

    def _fault(self, check: str, said: str) -> Fault:
        return Fault(check, self.name, said)

    # passes

    def forward(self, given: list[Array], training: bool = True) -> np.ndarray:
        """A copy of what comes out of copies of `given`; Fault where memory is not treated as agreed."""
        self.buffers.release_all()
        step = self.step if training else StepContext(False)
        lent = [self._lend(str(i), x, self.pooled[i] or not training) for i, x in enumerate(given)]
        for x in lent:
            self.buffers.retain(x)  # so that it can be looked at afterwards
        way = f"forward{self.added}"
        y = guarded(self.layer, way, lambda: getattr(self.layer, way)(lent[0], step, *lent[1:]))
        require_made(self.layer, way, (y,), self.network.dtype)
        made = np.array(y)
        self._settle_forward(y, lent, given)
        return made

    def _lend(self, name: str, x: Array, pooled: bool) -> Array:
        if x.ndim != 4:
            copy = self.buffers.temporary(f"lent {name}", x.shape)
        else:
            copy = self.buffers.activation(x.shape) if pooled else self.buffers.image(f"lent {name}", x.shape)
        copy[...] = x
        return copy

    def _settle_forward(self, y: Array, lent: list[Array], given: list[Array]) -> None:
        """Fault unless y alone is still held, and what was lent is as it was."""
        buffers, x = self.buffers, lent[0]
        for array, was in zip(lent, given):
            if not getattr(self.layer, "owns_input", False) and not (array == was).all():
                said = "forward writes to what it was given, which the layer before may need: take"
                raise self._fault("buffers", f"{said} self.output(len(x), step) for y")
        view = y is not x and buffers.is_pooled(x) and np.may_share_memory(y, x)
        if view and not buffers.is_pooled(y):
            said = "forward returns a view of its input's memory, which others get next: copy it to"
            raise self._fault("buffers", f"{said} self.output(len(x), step)")
        self._release(y, "forward returns memory that it has released")
        for array in lent[1:]:
            self._release(array, "forward releases the residual, which its caller still needs")
        for array in lent:
            self._release(array, "forward releases its input twice")
        if buffers.held():
            said = "forward does not release its input, or an activation that it took: call"
            raise self._fault("buffers", f"{said} self.buffers.release(x) when done with it")

    def _release(self, x: Array, said: str) -> None:
        try:
            self.buffers.release(x)
        except AssertionError:
            remedy = "release once what a pass is given, and retain what you need longer"
            raise self._fault("buffers", f"{said}: {remedy}") from None

    def backward(self, r: Array) -> tuple[list[np.ndarray | None], dict[str, int]]:
        """Copies of the gradients of what was given, for dL/dy = r; how often each parameter was told of.

        NaN lies where no gradient was written.
        """
        self.network.params.grads.fill(np.nan)
        dy, told, grads = self._lend("dy", r, True), dict[str, int](), dict[str, np.ndarray]()

        def on_grad(parameter: Parameter) -> None:
            told[parameter.name] = told.get(parameter.name, 0) + 1
            grads[parameter.name] = self._gradient(parameter).copy()

        way = f"backward{self.added}"
        result = guarded(self.layer, way, lambda: getattr(self.layer, way)(dy, self.step, on_grad))
        self.buffers.release_late()
        made = result if self.added else (result,)
        require_made(self.layer, way, made, self.network.dtype)
        require_gradient(self.layer, made[0], self.given[0].shape)
        copies = [None if each is None else np.array(each) for each in made]
        for array, needed in zip(made, (self.layer.need_dx, True)):
            if array is not None and needed:
                self._release(array, f"{way} returns memory that it has released")
        if not self.layer.need_dx and self.buffers.is_pooled(made[0]):
            said = f"{way} returns a gradient although self.need_dx is False, and nobody releases it: release"
            raise self._fault("buffers", f"{said} dy and return None then, as the first layer of a network")
        if self.buffers.held():
            said = f"{way} does not release dy, or an activation that it took: call"
            raise self._fault("buffers", f"{said} self.buffers.release(dy) unless you return it")
        for name, early in grads.items():
            if not np.array_equal(early, self._gradient(self.network.params[name]), equal_nan=True):
                said = f"{name}: its gradient changes after on_grad, when it may have been sent: call"
                raise self._fault("announcements", f"{said} on_grad once it is complete")
        return copies, told

    def _gradient(self, parameter: Parameter) -> Array:
        return self.network.params.grads[parameter.start : parameter.stop]

    def numbers(self, made: list[np.ndarray | None]) -> np.ndarray:
        """All of `made` and of the parameters' gradients in one vector."""
        arrays = [*made, *(self._gradient(parameter) for parameter in self.parameters)]
        return np.concatenate([np.zeros(0), *(np.ravel(each) for each in arrays if each is not None)])

    def clean_pool(self) -> None:
        """Zeros in the memory that the layer gets from the pool."""
        self.buffers.release_all()
        x = self.given[0]
        shape = max(x.shape, (len(x), *self.layer.out_shape), key=prod)
        for _ in range(POOL if len(shape) == 4 else 0):
            self.buffers.activation(shape).fill(0)

    def backward_values(self, r: np.ndarray) -> np.ndarray:
        """All numbers that forward and backward leave, in one vector."""
        y = self.forward(self.given)
        made, _ = self.backward(r)
        return self.numbers([y, *made])

    # checks

    def announcements(self, told: dict[str, int]) -> None:
        """Fault unless each gradient was written to its memory, and told of once."""
        for parameter in self.parameters:
            name, count = parameter.name, told.pop(parameter.name, 0)
            if not np.may_share_memory(parameter.grad, self.network.params.grads):
                said = f"{name}: backward replaces .grad, a view of the memory that is summed over ranks"
                raise self._fault("announcements", f"{said}: write to it, as in w.grad[...] = dw")
            if np.isnan(self._gradient(parameter)).any():
                said = f"{name}: its gradient is not written, or added to what was there: write"
                raise self._fault("announcements", f"{said} all of it, as in w.grad[...] = dw")
            if count != 1:
                said = "never announced, so it would not be summed over ranks" if not count else "told twice"
                raise self._fault("announcements", f"{name}: its gradient is {said}: call on_grad(w) once")
        if told:
            said = f"backward announces {next(iter(told))}, which is another layer's"
            raise self._fault("announcements", f"{said}: announce its own parameters alone")

    def repeats(self, y: np.ndarray) -> None:
        """Fault unless the same input gives y again."""
        if same(y, self.forward(self.given)):
            return
        kept = np.random.get_state()
        np.random.seed(0)
        first = self.forward(self.given)
        np.random.seed(0)
        second = self.forward(self.given)
        np.random.set_state(kept)
        if same(first, second):
            said = "draws from np.random, so that ranks and resumed runs differ: set random = True and draw"
            raise self._fault("repeats", f"{said} by step.keys, as Dropout does")
        said = "the same input gives another output the second time: keep no state from step to step"
        raise self._fault("repeats", f"{said} but in statistics(), and draw random numbers by step.keys")

    def gradient(self, y: np.ndarray, r: np.ndarray, made: list[np.ndarray | None]) -> None:
        """Fault unless the gradients `made` for dL/dy = r are those of the function that forward computes."""
        for i, (name, gradient) in enumerate(zip(("its input", "the residual"), made)):
            if gradient is not None and (i or self.layer.need_dx):
                self._compare(name, [(gradient, self.given[i])], y, r)
        own = {spec.name for spec in self.layer.specs()}
        inner = [(p.grad.copy(), p.value) for p in self.parameters if p.name not in own]
        for parameter in self.parameters:
            if parameter.name in own:
                self._compare(parameter.name, [(parameter.grad.copy(), parameter.value)], y, r)
        if inner:
            self._compare("the layers inside", inner, y, r)

    def _compare(self, name: str, pairs: list[tuple[Array, Array]], y: np.ndarray, r: np.ndarray) -> None:
        """Fault unless the first of each of `pairs` is dL/d(the second), L = Σ r·y."""
        was = [np.array(point) for _, point in pairs]

        def at(h: float) -> np.ndarray:
            for (_, point), old, d in zip(pairs, was, directions):
                point[...] = old + h * d
            try:
                return self.forward(self.given)
            finally:
                for (_, point), old in zip(pairs, was):
                    point[...] = old

        def difference(h: float) -> float:
            return float(((at(h) - at(-h)) * r).sum())

        values, expected, found = float(np.linalg.norm(y * r)), 0.0, 0.0
        for _ in range(DIRECTIONS):
            directions = [self.rng.normal(0, scale_of(old), old.shape) for old in was]
            products = np.concatenate([np.ravel(exact * d) for (exact, _), d in zip(pairs, directions)])
            expected, size = float(products.sum()), float(np.linalg.norm(products))
            right, found = derivative_is(expected, size, values, difference)
            if right:
                break
        else:
            self._wrong(name, expected, found, pairs[0][0], y)
        if is_float32(pairs[0][0]):
            raise self._fault("precision", f"the gradient of {name} {NARROW}")

    def _wrong(self, name: str, expected: float, found: float, exact: Array, y: np.ndarray) -> None:
        if is_float32(exact) or self._is_coarse(y):
            raise self._fault("precision", f"what it makes {NARROW}")
        said = f"the gradient of {name} is wrong: along a random direction backward has {expected:.6g}"
        remedy = f"the difference quotient of forward {found:.6g}: derive backward from forward again"
        raise self._fault("gradients", f"{said}, {remedy}")

    def _is_coarse(self, y: np.ndarray) -> bool:
        """Whether most of what moves with the input stays where it is when it should move by 1e-11 of y."""
        direction = self.rng.uniform(1, 2, self.given[0].shape)

        def moved(h: float) -> np.ndarray:
            return self.forward([self.given[0] * (1 + h * direction), *self.given[1:]]) - y

        far = moved(1e-3)
        if not far.any():
            return False
        near = moved(1e-3 * 1e-11 * float(np.linalg.norm(y) / np.linalg.norm(far)))
        return bool((near[far != 0] == 0).mean() > 0.5)


NARROW = "has the precision of float32 inside float64: compute in self.dtype, without np.float32"


def is_float32(x: np.ndarray) -> bool:
    """Whether all values are of float32, as chance would not have it."""
    values = x[x != 0]
    return bool(values.size and (values.astype(np.float32) == values).all())


def examine(alone: Alone, plain: Alone) -> tuple[list[Fault], bool]:
    """What is wrong with a layer, and whether its gradients were looked at.

    `plain` is the same layer where buffers are not poisoned.
    """
    faults: list[Fault] = []
    try:
        alone.forward(alone.given, training=False)
        y = alone.forward(alone.given)
        _require_finite(y, "forward", alone, plain, lambda: plain.forward(plain.given))
        r = alone.rng.standard_normal(y.shape)
        made, told = alone.backward(r)
        _require_finite(alone.numbers(made), "backward", alone, plain, lambda: plain.backward_values(r))
    except Fault as fault:
        return [fault], False
    for check in (lambda: alone.announcements(told), lambda: alone.repeats(y)):
        try:
            check()
        except Fault as fault:
            faults.append(fault)
    if faults:
        return faults, False
    try:
        alone.gradient(y, r, made)
    except Fault as fault:
        faults.append(fault)
    return faults, True


def _require_finite(
    values: np.ndarray, way: str, alone: Alone, plain: Alone, again: Callable[[], np.ndarray]
) -> None:
    """Fault for a NaN that is in `values` because of the poison: `again` gives them without it."""
    if np.isfinite(values).all():
        return
    plain.clean_pool()
    if np.isfinite(again()).all():
        said = f"{way} reads memory that was released, or never written: retain what is needed longer"
        raise Fault("buffers", alone.name, f"{said}, and keep a copy for backward (self.buffers.save)")
    if way == "forward":
        raise Fault("runs", alone.name, "forward makes NaN or infinity of finite numbers: keep it in bounds")
