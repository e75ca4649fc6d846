"""Convolution in its four algorithms against PyTorch and against each other."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from test_torch_parity import import_torch

from nn.buffers import Buffers
from nn.device import NUMPY, Backend
from nn.ops import conv, strips, winograd
from nn.ops.conv import Geometry, conv_backward, conv_forward

pytestmark = pytest.mark.quick

BOUND = 1e-14  # float64, relative to the largest value: sums of some hundred terms, each rounded to 1e-16
WINOGRAD_BOUND = 1e-13  # the transforms' factors of up to 8 squared, to and fro

Result = tuple[np.ndarray, np.ndarray, np.ndarray]

both_orders = pytest.mark.parametrize("order", ["NHWC", "HWNC"])
each_seed = pytest.mark.parametrize("seed", [1, 2])


def workspace(order: str, dtype: str = "float64") -> Buffers:
    """A workspace whose activations lie in memory as `order` says."""
    return Buffers(Backend("numpy", np, order), dtype)


def activations(buffers: Buffers, values: np.ndarray, name: str) -> np.ndarray:
    """A copy of `values` in the memory order of `buffers`."""
    image = buffers.image(f"test.{name}", values.shape)
    image[...] = values
    return image


def unwritten(buffers: Buffers, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Activations that an operation must overwrite everywhere, lest NaN remain."""
    return activations(buffers, np.full(shape, np.nan, buffers.dtype), name)


def run(
    buffers: Buffers, algorithm: str, x: np.ndarray, w: np.ndarray, dy: np.ndarray, g: Geometry
) -> Result:
    """y, dx and dw of our convolution."""
    image, y = activations(buffers, x, "x"), unwritten(buffers, g.out_shape(x.shape, w.shape), "y")
    saved = conv_forward(image, w, g, y, buffers, algorithm)
    other = workspace(buffers.backend.order, str(buffers.dtype))
    assert conv_forward(image, w, g, unwritten(other, y.shape, "y"), other, algorithm, keep=False) is None
    assert np.array_equal(y, other.image("test.y", y.shape)), "what is kept changes nothing"
    image[...] = np.nan  # the backward has kept what it needs
    dx, dw = unwritten(buffers, x.shape, "dx"), np.full(w.shape, np.nan, w.dtype)
    conv_backward(activations(buffers, dy, "dy"), saved, w, g, dw, dx, buffers, algorithm)
    return y, dx, dw


def reference(x: np.ndarray, w: np.ndarray, dy: np.ndarray, g: Geometry) -> Result:
    """The same three from PyTorch."""
    torch: Any = import_torch()
    x_t, w_t = (
        torch.from_numpy(a.transpose(axes).copy()).requires_grad_()
        for a, axes in ((x, (0, 3, 1, 2)), (w, (3, 2, 0, 1)))
    )
    y = torch.nn.functional.conv2d(x_t, w_t, stride=g.stride, padding=g.padding, dilation=g.dilation)
    y.backward(torch.from_numpy(dy.transpose(0, 3, 1, 2).copy()))
    images = (a.numpy().transpose(0, 2, 3, 1) for a in (y.detach(), x_t.grad))
    return (*images, w_t.grad.numpy().transpose(2, 3, 1, 0))


def assert_close(
    ours: Result, theirs: Result, bound: float, what: object = "", scale: Result | None = None
) -> None:
    """Errors relative to the largest value of `scale`, by default of the result itself."""
    for name, a, b, like in zip(("y", "dx", "dw"), ours, theirs, scale or theirs, strict=True):
        assert a.shape == b.shape, (name, what)
        error = np.abs(a - b).max(initial=0) / np.abs(like).max(initial=1e-300)
        assert error <= bound, f"{name}: relative error {error:.1e}, {what}"


def draw(rng: np.random.Generator, x_shape: tuple[int, ...], w_shape: tuple[int, ...], g: Geometry) -> Result:
    """Random x, w and dy."""
    x, w = rng.standard_normal(x_shape), rng.standard_normal(w_shape)
    return x, w, rng.standard_normal(g.out_shape(x_shape, w_shape))


@pytest.mark.parametrize(
    ("algorithm", "order"), [*product(("loop", "patches"), ("NHWC", "HWNC")), ("strips", "HWNC")]
)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
def test_any_geometry(kernel: int, stride: int, algorithm: str, order: str) -> None:
    """Every padding and dilation; sizes, channels, batch and the kernel's width are drawn."""
    for padding, dilation in product((0, 1, 2), (1, 2)):
        rng = np.random.default_rng([kernel, stride, padding, dilation])
        g, kw = Geometry(stride, padding, dilation), int(rng.choice([1, 2, 3, 5]))
        n, c, c_out = map(int, rng.integers(1, 4, 3))
        h, w = (max(1, dilation * (k - 1) + 1 - 2 * padding) + int(rng.integers(0, 5)) for k in (kernel, kw))
        x, weights, dy = draw(rng, (n, h, w, c), (kernel, kw, c, c_out), g)
        ours = run(workspace(order), algorithm, x, weights, dy, g)
        assert_close(ours, reference(x, weights, dy, g), BOUND, (g, x.shape, weights.shape))


@each_seed
@pytest.mark.parametrize("piece", [2, 4])
@pytest.mark.parametrize("tiles", [1, 5, 512])
def test_winograd(tiles: int, piece: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Axes of one to 23 pixels (every end: 1, 2, 3, 4; one piece or some), one image or none, one chunk or
    many."""
    monkeypatch.setattr(winograd, "CHUNK", tiles)
    monkeypatch.setattr(winograd, "piece", lambda *_: piece)
    rng, g = np.random.default_rng(seed), Geometry(1, 1, 1)
    for n, size, c, c_out in product(
        (0, 1, 3), ((1, 1), (3, 2), (5, 9), (14, 7), (22, 23), (4, 17)), (1, 3), (1, 4)
    ):
        x, w, dy = draw(rng, (n, *size, c), (3, 3, c, c_out), g)
        ours = run(workspace("HWNC"), "winograd", x, w, dy, g)
        scale = reference(
            *map(np.abs, (x, w, dy)), g
        )  # sums without cancellation: what rounding is relative to
        assert_close(ours, reference(x, w, dy, g), WINOGRAD_BOUND, (x.shape, w.shape), scale)


@each_seed
@both_orders
@pytest.mark.parametrize("elements", [1, 500, 1 << 20])
def test_patches_in_chunks(elements: int, order: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "PATCH_ELEMENTS", elements)
    rng = np.random.default_rng(seed)
    for n, g in product((0, 1, 5), (Geometry(1, 1, 1), Geometry(2, 0, 1))):
        x, w, dy = draw(rng, (n, 5, 7, 2), (3, 3, 2, 3), g)  # from 54 to 630 elements of patches an image
        assert_close(run(workspace(order), "patches", x, w, dy, g), reference(x, w, dy, g), BOUND, (n, g))


@each_seed
@pytest.mark.parametrize("elements", [1, 500, 1 << 20])
@pytest.mark.parametrize("columns", [1, 6, 12, 64])
def test_strips(columns: int, elements: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of one output, of some, the last one with outputs beyond the image, and of whole rows."""
    monkeypatch.setattr(strips, "CHUNK", elements)
    monkeypatch.setattr(strips, "COLUMNS", columns)
    strips.cut.cache_clear()
    rng, wide = np.random.default_rng(seed), set()
    for n, g in product(
        (0, 1, 5), (Geometry(1, 2, 1), Geometry(2, 1, 1), Geometry(1, 0, 2), Geometry(4, 0, 1))
    ):
        x, w, dy = draw(rng, (n, 6, 9, 2), (3, 3, 2, 3), g)
        assert_close(run(workspace("HWNC"), "strips", x, w, dy, g), reference(x, w, dy, g), BOUND, (n, g))
        wide.add(strips.cut(dy.shape[1:3], w.shape, g)[:2])
    strips.cut.cache_clear()
    found = {1: {(1, 11), (1, 5), (1, 2)}, 6: {(3, 4), (3, 2), (2, 1)}, 12: {(6, 2), (5, 1), (2, 1)}}
    assert wide == found.get(columns, {(11, 1), (5, 1), (2, 1)})


@pytest.mark.parametrize("algorithm", ["strips", "winograd"])
def test_another_memory_order_is_refused(algorithm: str) -> None:
    buffers = workspace("NHWC")
    x = activations(buffers, np.ones((2, 4, 4, 3)), "x")
    with pytest.raises(ValueError, match="H,W,N,C order"):
        conv_forward(x, np.ones((3, 3, 3, 3)), Geometry(1, 1, 1), x, buffers, algorithm)
    assert conv.choose_algorithm(x.shape, (3, 3, 3, 3), Geometry(1, 1, 1), Backend("test", np)) == "patches"


@pytest.mark.parametrize("algorithm", ["loop", "patches"])
@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("orders", [("NHWC", "HWNC"), ("HWNC", "NHWC")])
def test_input_in_another_memory_order(orders: tuple[str, str], size: int, algorithm: str) -> None:
    """x and dx lie in memory in one order, y and dy in the other: the values are the same."""
    rng, g = np.random.default_rng(5), Geometry(1, 1, 1)
    x, w, dy = draw(rng, (3, size, size + 1, 2), (3, 3, 2, 4), g)
    expected = run(workspace("NHWC"), "loop", x, w, dy, g)
    buffers, other = workspace(orders[0]), workspace(orders[1])
    image, y = activations(buffers, x, "x"), unwritten(other, dy.shape, "y")
    saved = conv_forward(image, w, g, y, buffers, algorithm)
    dx, dw = unwritten(buffers, x.shape, "dx"), np.full(w.shape, np.nan)
    conv_backward(activations(other, dy, "dy"), saved, w, g, dw, dx, buffers, algorithm)
    assert_close((y, dx, dw), expected, BOUND)


@both_orders
@pytest.mark.parametrize("algorithm", ["loop", "patches"])
def test_one_pixel_in_several_out(algorithm: str, order: str) -> None:
    """An image of one pixel lies the same in either memory order, the larger output does not."""
    rng, g = np.random.default_rng(6), Geometry(1, 2, 1)
    x, w, dy = draw(rng, (3, 1, 1, 2), (3, 3, 2, 4), g)
    assert_close(run(workspace(order), algorithm, x, w, dy, g), reference(x, w, dy, g), BOUND)


def test_pieces_of_large_batches() -> None:
    """From 16 images on two tiles, of many channels later."""
    assert [winograd.piece(n, 16, 16) for n in (15, 16)] == [4, 2]
    assert [winograd.piece(n, 128, 128) for n in (31, 32)] == [4, 2]
    assert [len(winograd.axis(32, tiles)) for tiles in (2, 4)] == [4, 2]


@pytest.mark.parametrize("size_channels", [(28, 64, 128), (14, 128, 128), (14, 128, 256), (7, 256, 256)])
def test_winograd_error_in_float32(size_channels: tuple[int, int, int]) -> None:
    """At the full network's channel counts. Measured: 2.2e-6 to 6.8e-6."""
    size, c, c_out = size_channels
    rng, g = np.random.default_rng(c), Geometry(1, 1, 1)
    x, w, dy = (a.astype(np.float32) for a in draw(rng, (1, size, size, c), (3, 3, c, c_out), g))
    x, w = np.maximum(x, 0), w / np.float32(3 * c**0.5)  # as after a ReLU, and as initialised
    ours = run(workspace("HWNC", "float32"), "winograd", x, w, dy, g)
    exact = run(workspace("HWNC"), "patches", *(a.astype(np.float64) for a in (x, w, dy)), g)
    assert_close(ours, exact, 1e-5)
    assert all(a.dtype == np.float32 for a in ours)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("algorithm", "order"),
    [("patches", "HWNC"), ("patches", "NHWC"), ("strips", "HWNC"), ("winograd", "HWNC")],
)
def test_scratch_does_not_grow_with_the_batch(
    algorithm: str, order: str, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight times the images need the same scratch: only what is kept for the backward is as large as the
    batch."""
    monkeypatch.setattr(conv, "PATCH_ELEMENTS", 1 << 14)
    monkeypatch.setattr(strips, "CHUNK", 1 << 14)
    monkeypatch.setattr(winograd, "CHUNK", 64)
    g, w, held = Geometry(1, 1, 1), np.ones((3, 3, 4, 5)), []
    for n in (16, 128):
        buffers = workspace(order)
        like = workspace(
            order
        )  # holds the activations, so that `buffers` holds only what the operation takes
        x, y = activations(like, np.ones((n, 14, 14, 4)), "x"), unwritten(like, (n, 14, 14, 5), "y")
        saved = conv_forward(x, w, g, y, buffers, algorithm, keep)
        kept = saved if isinstance(saved, tuple) else (saved,)
        if keep:
            conv_backward(y, saved, w, g, np.empty_like(w), np.empty_like(x), buffers, algorithm)
        held.append(buffers.nbytes() - sum(array.nbytes for array in kept if isinstance(array, np.ndarray)))
    assert held[1] == held[0]
    assert held[0] < 2**20


def test_shapes_that_do_not_fit() -> None:
    buffers, y = workspace("HWNC"), np.empty((1, 1, 1, 1))
    with pytest.raises(ValueError, match="does not fit an input of 4"):
        conv_forward(
            np.ones((1, 9, 4, 1)), np.ones((3, 3, 1, 1)), Geometry(dilation=2), y, buffers, "patches"
        )
    with pytest.raises(ValueError, match="3 channels, the weights expect 2"):
        conv_forward(np.ones((1, 5, 5, 3)), np.ones((3, 3, 2, 1)), Geometry(), y, buffers, "patches")
    assert Geometry(dilation=2).out_size(5, 3) == 1


def test_chosen_form() -> None:
    for kernel, c, g, algorithm in (
        (3, 2, Geometry(1, 1, 1), "winograd"),
        (3, 1, Geometry(1, 1, 1), "patches"),
        (1, 2, Geometry(), "patches"),
        (1, 2, Geometry(2), "patches"),
        (3, 2, Geometry(2, 1, 1), "strips"),
        (3, 2, Geometry(1, 0, 1), "strips"),
        (5, 1, Geometry(1, 2, 1), "strips"),
    ):
        assert conv.choose_algorithm((64, 7, 7, c), (kernel, kernel, c, 3), g, NUMPY) == algorithm
    deep = (3, 3, 256, 256)  # where reading the kernel counts
    assert [conv.choose_algorithm((n, 3, 3, 256), deep, Geometry(1, 1, 1), NUMPY) for n in (19, 20)] == [
        "patches",
        "winograd",
    ]
