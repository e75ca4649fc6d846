"""Batch norm, pooling and the losses against NumPy in higher precision, PyTorch, and themselves in parts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from networks import resnet9
from test_conv import activations, both_orders, each_seed, unwritten, workspace
from test_torch_parity import import_torch

from nn import array
from nn.layer import StepContext
from nn.ops import loss as losses
from nn.ops import norm as F
from nn.ops import pool
from nn.resnet9 import VARIANTS

pytestmark = pytest.mark.quick

each_block = pytest.mark.parametrize("block", [64, array.HOST_BLOCK])
each_size = pytest.mark.parametrize("size", [2, 3])


def to_torch(x: np.ndarray) -> Any:
    """Activations as PyTorch has them, N×C×H×W, to be differentiated."""
    return import_torch().from_numpy(np.array(x.transpose(0, 3, 1, 2), order="C")).requires_grad_()


def to_numpy(x: Any) -> np.ndarray:
    return x.detach().numpy().transpose(0, 2, 3, 1)


def on_ranks(count: int, work: Callable[[int, F.AllReduce], Any]) -> list[Any]:
    """`work(rank, sum_over_ranks)` on `count` threads, which meet in every sum."""
    barrier, parts = threading.Barrier(count, timeout=60), [np.empty(0)] * count

    def one(rank: int) -> Any:
        def sum_over_ranks(array: np.ndarray) -> None:
            parts[rank] = array.copy()
            barrier.wait()
            array[...] = np.sum(parts, 0)
            barrier.wait()

        return work(rank, sum_over_ranks)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


@each_seed
@both_orders
@each_block
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1e4, 1e-2), (-3.0, 1e3)])
def test_batch_norm_statistics(
    mean: float, std: float, block: int, order: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two passes in longer precision; E[x²] − E[x]² would lose all of mean² / std² · 1e-16 = 1e-4."""
    monkeypatch.setattr(array, "HOST_BLOCK", block)
    rng, buffers = np.random.default_rng(seed), workspace(order)
    x = rng.normal(mean, std, (7, 9, 8, 3))
    wide = x.astype(np.longdouble)
    exact_mean = wide.mean((0, 1, 2))
    exact_variance = ((wide - exact_mean) ** 2).mean((0, 1, 2))
    z = activations(buffers, x, "z")
    got_mean, got_variance, apart = F.batch_norm_statistics(z, F.Count(7 * 9 * 8), np.zeros(3), buffers)
    assert apart is None
    assert got_mean.dtype == got_variance.dtype == np.float64
    scale = np.abs(x).max()
    assert np.abs(got_mean - exact_mean).max() <= 1e-15 * scale
    assert (np.abs(got_variance - exact_variance) / exact_variance).max() <= 1e-13
    assert np.abs(z - (wide - exact_mean)).max() <= 1e-15 * scale


@each_seed
@both_orders
@each_block
@pytest.mark.parametrize(("mean", "std", "about"), [(2, 3, 0), (1e4, 1e-2, 1e4), (50, 0.5, 0)])
def test_batch_norm_in_parts(
    mean: float,
    std: float,
    about: float,
    block: int,
    order: str,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Parts of 4, 0 and 2 images with sums over ranks: the same statistics, dx, dγ and dβ as the whole.

    A mean is exact to 1e-16 of itself, and the variance as `batch_norm_statistics` says.
    """
    lost = 1 + abs(mean) / std + ((mean - about) / std) ** 2
    monkeypatch.setattr(array, "HOST_BLOCK", block)
    rng, shape, count = np.random.default_rng(seed), (6, 5, 4, 3), 6 * 5 * 4
    x, r, gamma = rng.normal(mean, std, shape), rng.standard_normal(shape), rng.standard_normal(3)

    def work(images: slice, sums: F.AllReduce | None) -> tuple[np.ndarray, ...]:
        buffers = workspace(order)
        z, dx = activations(buffers, x[images], "z"), activations(buffers, r[images], "dy")
        over = F.Count(count, sums)
        middle, variance, apart = F.batch_norm_statistics(z, over, np.full(3, about), buffers)
        inverse_std = (variance + 1e-5) ** -0.5
        saved = F.Saved(z, inverse_std, None, False, None if apart is None else apart * inverse_std)
        grads = F.batch_norm_backward(dx, saved, gamma, over, dx, buffers)
        return dx, middle, variance, *grads

    whole = work(slice(0, 6), None)
    images = (slice(0, 4), slice(4, 4), slice(4, 6))
    parts = on_ranks(3, lambda rank, sums: work(images[rank], sums))
    dx = np.concatenate([part[0] for part in parts])
    assert np.abs(dx - whole[0]).max() <= 1e-14 * lost * np.abs(whole[0]).max()
    for k in (1, 2):
        assert all(np.array_equal(part[k], parts[0][k]) for part in parts)
        assert parts[0][k] == pytest.approx(whole[k], rel=1e-14 * lost)
    for k in (3, 4):
        assert sum(part[k] for part in parts) == pytest.approx(whole[k], rel=1e-13 * lost)


@pytest.mark.parametrize("loss", losses.LOSSES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sizes", [(4, 0, 2), (1, 5)])
def test_network_in_parts(sizes: tuple[int, ...], variant: str, loss: str) -> None:
    """Gradients and losses of the parts of a batch add up to those of the whole; statistics are the
    whole's."""
    rng = np.random.default_rng(sizes[0])
    x, labels, stops = rng.random((6, 28, 28, 1)), rng.integers(0, 10, 6), np.cumsum((0, *sizes))

    def work(images: slice, sums: F.AllReduce | None) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
        model, this = resnet9(variant, 1 / 32, seed=2, dtype="float64"), StepContext(True, 6, sums)
        logits = model.forward(activations(model.buffers, x[images], "x"), this)
        value, dlogits = losses.LOSSES[loss](logits, labels[images], 6)
        model.backward(dlogits, this)
        return model.params.grads, value, model.running

    grads, value, buffers = work(slice(0, 6), None)
    parts = on_ranks(len(sizes), lambda rank, sums: work(slice(stops[rank], stops[rank + 1]), sums))
    assert np.abs(sum(part[0] for part in parts) - grads).max() <= 1e-11 * np.abs(grads).max()
    assert sum(part[1] for part in parts) == pytest.approx(value, rel=1e-13)
    for name, buffer in buffers.items():
        for part in parts:
            assert part[2][name] == pytest.approx(buffer, rel=1e-12, abs=1e-14), name


@each_seed
@both_orders
@each_size
def test_max_pool_ties(size: int, order: str, seed: int) -> None:
    """Three values only, so most windows have ties; 7×8 leaves a row, or a row and two columns, over."""
    torch, rng, buffers = import_torch(), np.random.default_rng(seed), workspace(order)
    shape, out = (4, 7, 8, 3), (4, 7 // size, 8 // size, 3)
    x, r = rng.integers(0, 3, shape).astype(float), rng.standard_normal(out)
    image, y, dx = activations(buffers, x, "x"), unwritten(buffers, out, "y"), unwritten(buffers, shape, "dx")
    pool.max_pool_forward(image, (size, size), y)
    pool.max_pool_backward(activations(buffers, r, "dy"), image, y, (size, size), dx, buffers)
    x_t = to_torch(x)
    y_t = torch.nn.functional.max_pool2d(x_t, size)
    y_t.backward(to_torch(r).detach())
    assert np.array_equal(y, to_numpy(y_t))
    assert np.array_equal(dx, to_numpy(x_t.grad))


@each_seed
@both_orders
@each_block
@pytest.mark.parametrize(
    ("relu", "pool", "residual"),
    [
        (True, False, False),
        (True, False, True),
        (False, False, False),
        (False, False, True),
        (True, True, False),
        (False, True, False),
    ],
)
@pytest.mark.parametrize("size", [(7, 8), (9, 5), (2, 2)])
def test_activate(
    size: tuple[int, int],
    relu: bool,
    pool: bool,
    residual: bool,
    block: int,
    order: str,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Few values, so that maxima tie, at zero and below it too: y and the way of the gradient, to the bit."""
    monkeypatch.setattr(array, "HOST_BLOCK", block)
    torch, rng, buffers = import_torch(), np.random.default_rng(seed), workspace(order)
    shape = (4, *size, 4)
    z, more = (rng.integers(-2, 2, shape).astype(float) for _ in range(2))
    gamma, beta, inverse_std = (
        np.array([1.0, -2.0, 0.5, 0.0]),
        np.array([0.0, 1.0, -0.5, 1.0]),
        np.array([2, 1, 0.5, 1]),
    )
    whole = to_torch(z * inverse_std * gamma + beta + more * residual)
    y_t = torch.relu(whole) if relu else whole
    y_t = torch.nn.functional.max_pool2d(y_t, 2) if pool else y_t
    r = rng.standard_normal(to_numpy(y_t).shape)
    y_t.backward(to_torch(r).detach())
    y, image = unwritten(buffers, r.shape, "y"), activations(buffers, z, "z")
    after = F.After(relu, pool, activations(buffers, more, "more") if residual else None)
    mask = F.BackwardMask.allocate(image, y, after, buffers)
    if mask:
        mask.mask[...] = rng.random(shape) < 0.5
    F.activate(image, inverse_std, F.Norm(gamma, beta, None, None), y, after, buffers, mask)
    assert np.array_equal(y, to_numpy(y_t))
    if mask:
        back = r.repeat(2, 1).repeat(2, 2) if pool else r
        wide = np.zeros(shape)
        wide[:, : back.shape[1], : back.shape[2]] = back
        live = np.arange(4) < (3 if pool else 4)  # at γ = 0 every window ties, and here the largest x̂ wins
        assert np.array_equal((wide * mask.mask)[..., live], to_numpy(whole.grad)[..., live])
        assert mask.mask[:, : back.shape[1], : back.shape[2]].sum() == (to_numpy(whole.grad) != 0).sum()


@each_seed
@both_orders
@each_size
def test_avg_pool(size: int, order: str, seed: int) -> None:
    torch, rng, buffers = import_torch(), np.random.default_rng(seed), workspace(order)
    shape, out = (4, 7, 8, 3), (4, 7 // size, 8 // size, 3)
    x, r = rng.standard_normal(shape), rng.standard_normal(out)
    y, dx = unwritten(buffers, out, "y"), unwritten(buffers, shape, "dx")
    pool.avg_pool_forward(activations(buffers, x, "x"), (size, size), y)
    pool.avg_pool_backward(activations(buffers, r, "dy"), (size, size), dx)
    x_t = to_torch(x)
    y_t = torch.nn.functional.avg_pool2d(x_t, size)
    y_t.backward(to_torch(r).detach())
    assert np.abs(y - to_numpy(y_t)).max() <= 1e-15 * np.abs(x).max()
    assert np.abs(dx - to_numpy(x_t.grad)).max() <= 1e-15 * np.abs(r).max()


@each_seed
@pytest.mark.parametrize("count", [8, 20])
@pytest.mark.parametrize("images", [8, 0])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
@pytest.mark.parametrize(("loss", "smoothing"), [("ce", 0.0), ("ce", 0.1), ("bce", 0.0)])
def test_losses(loss: str, smoothing: float, scale: float, images: int, count: int, seed: int) -> None:
    """A part of a batch of `count` images, up to logits of ±1e4 on the right and the wrong side: no
    warning."""
    torch, rng = import_torch(), np.random.default_rng(seed)
    logits, labels = scale * rng.choice([-1.0, 1.0, 0.3, 0.0], (images, 10)), rng.integers(0, 10, images)
    with np.errstate(all="raise", under="ignore"):
        more = {"smoothing": smoothing} if smoothing else {}
        value, gradient = losses.LOSSES[loss](logits, labels, count, **more)
    z, target = torch.from_numpy(logits).requires_grad_(), torch.from_numpy(labels)
    functional = torch.nn.functional
    if loss == "ce":
        theirs = functional.cross_entropy(z, target, reduction="sum", label_smoothing=smoothing) / count
    else:
        onehot = functional.one_hot(target, 10).double()
        theirs = functional.binary_cross_entropy_with_logits(z, onehot, reduction="sum") / (count * 10)
    theirs.backward()
    assert np.isfinite(value)
    assert value == pytest.approx(theirs.item(), rel=1e-14, abs=0)
    assert gradient.shape == logits.shape
    assert np.abs(gradient - z.grad.numpy()).max(initial=0) <= 1e-15
    if smoothing:
        return
    others = labels[:, None] != np.arange(10)  # there probabilities down to 1e-300, without cancellation
    assert gradient[others] == pytest.approx(z.grad.numpy()[others], rel=1e-12, abs=0)
