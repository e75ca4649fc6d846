"""Every backward against finite differences, in float64.

The derivative along a random direction d is compared with ⟨gradient, d⟩. The fourth-order central
difference is exact, rounding apart, for what is (multi)linear near the point; for smooth functions its
error is of order step⁴ = 1e-12. Layers (150 ReLUs) and the network (16,000, and the maxima of its pooling)
have kinks and get a step so small that hardly ever one lies within it; the rounding of the loss, a few 1e-16,
over the step then leaves an error of up to 1e-8.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from networks import resnet9
from test_conv import activations, both_orders, each_seed, unwritten, workspace

from nn.device import Backend
from nn.layer import StepContext
from nn.layers import ConvBN
from nn.ops import linear
from nn.ops import loss as losses
from nn.ops import norm as F
from nn.ops import pool as pools
from nn.ops.conv import Geometry, conv_backward, conv_forward
from nn.ops.norm import EPS
from nn.params import Parameter, Parameters
from nn.resnet9 import VARIANTS

pytestmark = pytest.mark.quick

BOUND = 5e-8  # five times the largest error of 1,900 checks
LINEAR, SMOOTH, LAYER, NETWORK = 0.1, 1e-3, 1e-5, 1e-7  # steps


def check(
    value: Callable[..., float],
    points: list[np.ndarray],
    gradients: list[np.ndarray],
    step: float,
    rng: np.random.Generator,
) -> None:
    """For each argument of `value`, the others held fixed: derivative along a random direction = ⟨gradient,
    d⟩.

    The error is measured against ⟨gradient, d⟩, or where that is less against its mean over all
    directions: d may lie across the gradient, and then it is 0 but for rounding.
    """
    for k, (point, gradient) in enumerate(zip(points, gradients, strict=True)):
        direction = rng.uniform(-1, 1, point.shape)

        def along(t: float, k: int = k, moved: np.ndarray = point, d: np.ndarray = direction) -> float:
            return float(value(*points[:k], moved + t * d, *points[k + 1 :]))

        near, far = along(step) - along(-step), along(2 * step) - along(-2 * step)
        numeric, exact = (8 * near - far) / (12 * step), float((gradient * direction).sum())
        mean = float(np.linalg.norm(gradient) * np.linalg.norm(direction)) / gradient.size**0.5
        limit = BOUND * max(abs(exact), mean)
        assert abs(numeric - exact) <= limit, f"argument {k}: {numeric} is not {exact}"


def test_the_check_takes_any_direction_and_no_wrong_gradient() -> None:
    x, gradient = np.random.default_rng(1).standard_normal((2, 50))
    direction = np.random.default_rng(2).uniform(-1, 1, 50)  # as `check` draws it
    across = gradient - direction * (gradient @ direction) / (direction @ direction)
    for right in (gradient, across):
        check(lambda x, g=right: 1 + g @ x, [x], [right], LAYER, np.random.default_rng(2))
    with pytest.raises(AssertionError, match="argument 0"):
        check(lambda x: 1 + gradient @ x, [x], [gradient * (1 + 1e-6)], LAYER, np.random.default_rng(2))
    with pytest.raises(AssertionError, match="argument 0"):
        check(lambda x: 1 + across @ x, [x], [across + 1e-6 * direction], LAYER, np.random.default_rng(2))


@each_seed
@both_orders
@pytest.mark.parametrize(
    ("algorithm", "kernel", "geometry"),
    [
        ("loop", 3, Geometry(2, 1, 1)),
        ("loop", 2, Geometry(1, 1, 2)),
        ("patches", 3, Geometry(2, 2, 2)),
        ("patches", 2, Geometry(3, 0, 1)),
        ("winograd", 3, Geometry(1, 1, 1)),
    ],
)
def test_convolution(algorithm: str, kernel: int, geometry: Geometry, order: str, seed: int) -> None:
    if algorithm == "winograd" and order == "NHWC":
        return  # refused, see test_conv.py
    rng, buffers = np.random.default_rng(seed), workspace(order)
    x, w = rng.standard_normal((2, 7, 6, 3)), rng.standard_normal((kernel, kernel, 3, 2))
    shape = geometry.out_shape(x.shape, w.shape)
    r = rng.standard_normal(shape)

    def value(x: np.ndarray, w: np.ndarray) -> float:
        y = unwritten(buffers, shape, "y")
        conv_forward(activations(buffers, x, "moved"), w, geometry, y, buffers, algorithm)
        return (y * r).sum()

    x_image, y = activations(buffers, x, "x"), unwritten(buffers, shape, "y")
    saved = conv_forward(x_image, w, geometry, y, buffers, algorithm)
    x_image[...] = np.nan  # what the backward needs it has kept
    dx, dw = unwritten(buffers, x.shape, "dx"), np.full(w.shape, np.nan)
    conv_backward(activations(buffers, r, "dy"), saved, w, geometry, dw, dx, buffers, algorithm)
    check(value, [x, w], [dx, dw], LINEAR, rng)


@each_seed
@both_orders
def test_batch_norm(order: str, seed: int) -> None:
    rng, buffers = np.random.default_rng(seed), workspace(order)
    x, gamma, beta = rng.normal(1, 2, (3, 5, 4, 3)), rng.standard_normal(3), rng.standard_normal(3)
    r, count = rng.standard_normal(x.shape), 3 * 5 * 4

    def normalise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        z = activations(buffers, x, "z")
        _, variance, _ = F.batch_norm_statistics(z, F.Count(count), np.zeros(3), buffers)
        return z, (variance + EPS) ** -0.5

    def value(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> float:
        z, inverse_std = normalise(x)
        y = unwritten(buffers, x.shape, "y")
        F.activate(z, inverse_std, F.Norm(gamma, beta, None, None), y, F.After(relu=False), buffers)
        return (y * r).sum()

    dx = activations(buffers, r, "dy")
    z, inverse_std = normalise(x)
    saved = F.Saved(z, inverse_std, None, False)
    d_gamma, d_beta = F.batch_norm_backward(dx, saved, gamma, F.Count(count), dx, buffers)
    check(value, [x, gamma, beta], [dx, d_gamma, d_beta], SMOOTH, rng)


@each_seed
@both_orders
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("kind", ["max", "avg"])
def test_pooling(kind: str, size: int, order: str, seed: int) -> None:
    rng, buffers = np.random.default_rng(seed), workspace(order)
    shape, out_shape = (3, 7, 8, 2), (3, 7 // size, 8 // size, 2)
    x = rng.permutation(float(np.prod(shape)) - np.arange(np.prod(shape))).reshape(shape)  # gaps of 1
    r = rng.standard_normal(out_shape)
    forward = pools.max_pool_forward if kind == "max" else pools.avg_pool_forward

    def value(x: np.ndarray) -> float:
        y = unwritten(buffers, out_shape, "y")
        forward(activations(buffers, x, "moved"), (size, size), y)
        return (y * r).sum()

    x_image, y = activations(buffers, x, "x"), unwritten(buffers, out_shape, "y")
    forward(x_image, (size, size), y)
    dy, dx = activations(buffers, r, "dy"), unwritten(buffers, shape, "dx")
    if kind == "max":
        pools.max_pool_backward(dy, x_image, y, (size, size), dx, buffers)
    else:
        pools.avg_pool_backward(dy, (size, size), dx)
    check(value, [x], [dx], LINEAR, rng)


@each_seed
@pytest.mark.parametrize("loss", losses.LOSSES)
def test_linear_and_losses(loss: str, seed: int) -> None:
    rng, function = np.random.default_rng(seed), losses.LOSSES[loss]
    x, w, b, r = (rng.standard_normal(shape) for shape in ((4, 5), (3, 5), (3,), (4, 3)))
    dw, db = np.full(w.shape, np.nan), np.full(b.shape, np.nan)
    dx, y = np.full(x.shape, np.nan), np.full(r.shape, np.nan)
    linear.linear_backward(r, x, w, dw, db, dx)

    def value(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> float:
        linear.linear_forward(x, w, b, y)
        return (y * r).sum()

    check(value, [x, w, b], [dx, dw, db], LINEAR, rng)
    logits, labels = rng.normal(0, 3, (6, 10)), rng.integers(0, 10, 6)
    check(lambda z: function(z, labels, 9)[0], [logits], [function(logits, labels, 9)[1]], SMOOTH, rng)


@each_seed
@both_orders
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(
    ("relu", "pool", "residual"),
    [
        (True, False, False),
        (True, True, False),
        (False, False, True),  # it rectifies the sum
        (False, False, False),
        (False, True, False),
    ],
)
def test_conv_bn(relu: bool, pool: bool, residual: bool, kernel: int, order: str, seed: int) -> None:
    rng, buffers = np.random.default_rng(seed), workspace(order)
    layer = ConvBN(3, kernel=kernel, relu=relu, pool=2 * pool)
    layer.build("layer", (7, 6, 2))
    if kernel == 3 and order == "HWNC":
        layer.conv.algorithm = "winograd"  # by shape, images this small would take patches
    specs = [spec for each in layer.walk() for spec in each.specs()]
    params, step = Parameters(specs, buffers.backend, "float64"), StepContext(True, 3)
    for each in layer.walk():
        each.bind(params, {name: np.zeros(size) for name, size in each.statistics().items()}, buffers)
    x, more, flat = (rng.standard_normal(shape) for shape in ((3, 7, 6, 2), (3, 7, 6, 3), params.values.size))
    r = rng.standard_normal((3, 3, 3, 3) if pool else more.shape)

    def value(x: np.ndarray, flat: np.ndarray, more: np.ndarray = more) -> float:
        params.values[...] = flat
        image = activations(buffers, more, "more") if residual else None
        buffers.release_all()
        x = activations(buffers, x, "x")
        y = layer.forward_added(x, step, image) if residual else layer.forward(x, step)
        return (y * r).sum()

    value(x, flat)
    told: list[str] = []

    def tell(parameter: Parameter) -> None:
        told.append(parameter.name)

    dy = activations(buffers, r, "dy")
    if residual:
        dx, d_residual = layer.backward_added(dy, step, tell)
    else:
        dx, d_residual = layer.backward(dy, step, tell), None
    assert sorted(told) == sorted(parameter.name for parameter in params)
    points, gradients = [x, flat], [dx.copy(), params.grads.copy()]
    assert (d_residual is not None) == residual
    if residual:
        points, gradients = [*points, more], [*gradients, d_residual.copy()]
    check(value, points, gradients, LAYER, rng)


@both_orders
@pytest.mark.parametrize("loss", losses.LOSSES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_network(variant: str, loss: str, order: str) -> None:
    """All parameters at once, along one random direction in the flat vector."""
    rng = np.random.default_rng(1)
    model = resnet9(variant, 1 / 32, seed=3, backend=Backend("numpy", np, order), dtype="float64")
    x, labels, step = rng.random((2, 28, 28, 1)), rng.integers(0, 10, 2), StepContext(True, 2)
    flat = model.params.values + rng.normal(0, 0.1, model.params.values.size)  # γ and β off their start

    def forward(flat: np.ndarray) -> tuple[float, np.ndarray]:
        model.params.values[...] = flat
        return losses.LOSSES[loss](model.forward(activations(model.buffers, x, "x"), step), labels, 2)

    model.backward(forward(flat)[1], step)
    check(lambda flat: forward(flat)[0], [flat], [model.params.grads.copy()], NETWORK, rng)
