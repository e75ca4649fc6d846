"""The batch of a step, and images turned and moved."""

from __future__ import annotations

import numpy as np
import pytest
from test_torch_parity import import_torch

from distrib.data.sampler import Augmentation, warps
from nn.ops.batch import LABELS, WARPED_AT_ONCE, Source, check_labels, gather_batch, warp

pytestmark = pytest.mark.quick


ALL = Augmentation(shift=4, rotate=60, flip=True, crop=2)


def rows(*each: tuple[float, float, float]) -> np.ndarray:
    """Rows for `warp` of (degrees, down, right)."""
    turns = [(np.cos(np.radians(turn)), np.sin(np.radians(turn)), p, q) for turn, p, q in each]
    return np.array([(cosine, -sine, sine, cosine, p, q, 0, 0) for cosine, sine, p, q in turns])


def warped(images: np.ndarray, table: np.ndarray) -> np.ndarray:
    out = np.full((*images.shape, 1), np.nan)
    warp(images[..., None], table, out)
    return out[..., 0]


def test_nothing_whole_pixels_and_right_angles_are_exact() -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 28, 28), np.uint8)
    still, up, beyond, turned = warped(
        image.repeat(4, 0), rows((0, 0, 0), (0, 3, -2), (0, 40, 0), (90, 0, 0))
    )
    np.testing.assert_array_equal(still, image[0])
    np.testing.assert_array_equal(up[:-3, 2:], image[0, 3:, :-2])
    assert not up[-3:].any()
    assert not up[:, :2].any()
    assert not beyond.any()
    np.testing.assert_allclose(turned, np.rot90(image[0], -1), atol=1e-10)


@pytest.mark.parametrize("shape", [(5, 28, 28), (3, 6, 9)])
def test_against_pytorch(shape: tuple[int, int, int]) -> None:
    """`grid_sample`, which takes positions as (x, y) from -1 to 1 between the middles of the outermost
    pixels.
    """
    torch = import_torch()
    _, h, w = shape
    rng = np.random.default_rng(1)
    images, table = rng.integers(0, 256, shape, np.uint8), warps(0, 0, shape, ALL).astype("float64")
    u, v = np.meshgrid(np.arange(h) - (h - 1) / 2, np.arange(w) - (w - 1) / 2, indexing="ij")
    for image, row, found in zip(images, table, warped(images, table), strict=True):
        a, b, c, d, p, q = row[:6]
        rows_, columns = (a * u + b * v + p) / ((h - 1) / 2), (c * u + d * v + q) / ((w - 1) / 2)
        grid, source = (
            torch.tensor(np.stack([columns, rows_], -1)[None]),
            torch.tensor(image.astype("float64"))[None, None],
        )
        expected = torch.nn.functional.grid_sample(source, grid, align_corners=True)[0, 0]
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-9)


@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_of_a_batch_has_its_own_row(channels: int) -> None:
    """More images than are warped at once, in another order, into both memory layouts; labels above a
    byte."""
    rng, n = np.random.default_rng(2), 2 * WARPED_AT_ONCE + 3
    images, labels = rng.integers(0, 256, (n, 20, 28, channels), np.uint8), rng.integers(0, 1000, n, LABELS)
    order, table = rng.permutation(n).astype(np.int32), warps(0, 0, (n, 20, 28), ALL)
    planes = [warped(images[..., channel], table.astype("float64")) for channel in range(channels)]
    expected = np.stack(planes, -1)[order] / 255
    for x in (np.empty(images.shape), np.empty((20, 28, n, channels)).transpose(2, 0, 1, 3)):
        y = np.empty(n, LABELS)
        gather_batch(x, y, Source(images, labels, order, table), np.zeros(1, np.int64), n, 0)
        np.testing.assert_allclose(x, expected, atol=1e-12)
        np.testing.assert_array_equal(y, labels[order])
        assert y.max() > 255


def test_flip_crop_and_cutout_are_exact() -> None:
    """Whole pixels: as indexing makes them."""
    rng, side = np.random.default_rng(3), 5
    images = rng.integers(1, 256, (40, 12, 9, 3), np.uint8)
    table = warps(5, 2, images.shape[:3], Augmentation(flip=True, crop=3, cutout=side))
    out = np.full(images.shape, np.nan)
    warp(images, table, out, side)
    padded = np.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)))
    for image, row, found in zip(padded, table.astype(int), out, strict=True):
        across, (down, right, top, left) = row[3], row[4:]
        # the mirror comes first: where a pixel is taken from moves the other way
        expected = image[3 + down :][:12, 3 + right :][:, :9]
        expected = (expected[:, ::-1] if across < 0 else expected).copy()
        expected[max(0, top) : top + side, max(0, left) : left + side] = 0
        np.testing.assert_array_equal(found, expected)
    assert set(table[:, 3]) == {-1, 1}
    assert set(table[:, 4]) == set(range(-3, 4))


def test_labels_outside_the_classes_are_refused() -> None:
    check_labels(np.array([0, 999, 3]), 1000)
    check_labels(np.array([], np.uint8), 10)
    with pytest.raises(ValueError, match="label 10 at index 2: labels go from 0 to 9"):
        check_labels(np.array([0, 9, 10, 11], np.uint8), 10)
    with pytest.raises(ValueError, match="label -1 at index 0"):
        check_labels(np.array([-1]), 10)
    with pytest.raises(ValueError, match="labels are float64"):
        check_labels(np.array([1.0]), 10)
