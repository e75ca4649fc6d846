"""Which images a rank computes: pure functions of (seed, epoch, step, rank, size)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from distrib.data.sampler import (
    Augmentation,
    batch_indices,
    image_keys,
    permutation,
    shard,
    steps_per_epoch,
    warps,
)

pytestmark = pytest.mark.quick


def test_permutation_depends_on_seed_and_epoch_alone() -> None:
    first = permutation(3, 2, 1000)
    np.random.seed(0)  # the global generator plays no part
    permutation(4, 9, 500)
    np.testing.assert_array_equal(permutation(3, 2, 1000), first)
    orders = [permutation(seed, epoch, 1000).tobytes() for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == 25, "also (1, 2) and (2, 1) differ"


@pytest.mark.parametrize("images", [1, 2, 7, 1000, 60000])
def test_permutation_is_without_replacement(images: int) -> None:
    order = permutation(0, 0, images)
    np.testing.assert_array_equal(np.sort(order), np.arange(images))


@pytest.mark.parametrize(
    ("images", "batch", "steps"), [(60000, 8, 7500), (10, 4, 3), (10, 5, 2), (3, 100, 1), (1, 1, 1)]
)
def test_steps_per_epoch(images: int, batch: int, steps: int) -> None:
    assert steps_per_epoch(images, batch) == steps


@pytest.mark.parametrize("size", range(1, 8))
@pytest.mark.parametrize("count", [0, 1, 3, 6, 7, 8, 97, 128])
def test_shares_are_contiguous_nearly_equal_and_cover_everything(count: int, size: int) -> None:
    parts = [shard(count, rank, size) for rank in range(size)]
    assert parts[0].start == 0
    assert parts[-1].stop == count
    assert all(left.stop == right.start for left, right in pairwise(parts))
    sizes = [part.stop - part.start for part in parts]
    assert min(sizes) >= 0
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True), "the first ranks have one more"


@pytest.mark.parametrize("size", range(1, 8))
@pytest.mark.parametrize("images", [50, 48, 49])  # the last batch: 2 images, 16, 1: fewer than ranks
def test_ranks_together_compute_the_single_process_batch(images: int, size: int) -> None:
    batch, order = 16, permutation(1, 0, images)
    seen = []
    for step in range(steps_per_epoch(images, batch)):
        alone, count = batch_indices(order, step, batch, 0, 1)
        parts = [batch_indices(order, step, batch, rank, size) for rank in range(size)]
        assert {total for _, total in parts} == {count} == {len(alone)}
        np.testing.assert_array_equal(np.concatenate([own for own, _ in parts]), alone)
        seen.append(alone)
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(images))
    np.testing.assert_array_equal(np.concatenate(seen), order)


def test_warps_depend_on_seed_epoch_and_image_alone() -> None:
    few, many, augment = (10, 28, 28), (1000, 28, 28), Augmentation(2, 15, True, 3, 4)
    np.testing.assert_array_equal(warps(3, 2, few, augment), warps(3, 2, many, augment)[:10])
    np.testing.assert_array_equal(image_keys(3, 2, 10), image_keys(3, 2, 1000)[:10])
    for draw in (lambda seed, epoch: warps(seed, epoch, few, augment), lambda *at: image_keys(*at, 10)):
        assert len({draw(seed, epoch).tobytes() for seed in range(3) for epoch in range(3)}) == 9


def test_warps_are_within_their_limits() -> None:
    a, b, c, d, p, q, top, left = warps(0, 0, (60000, 28, 20), Augmentation(2, 15)).astype("float64").T
    np.testing.assert_array_equal((a, b), (d, -c))
    np.testing.assert_allclose(a**2 + c**2, 1, atol=1e-6)
    angle = np.degrees(np.arctan2(c, a))
    for drawn, limit in ((angle, 15), (p, 2), (q, 2)):
        assert abs(drawn.mean()) < 0.03 * limit
        assert 0.999 * limit < np.abs(drawn).max() <= limit * 1.000001
    assert not top.any()
    assert not left.any()


def test_flip_crop_and_cutout_are_uniform() -> None:
    augment = Augmentation(flip=True, crop=2, cutout=5)
    table = warps(0, 0, (60000, 28, 20), augment).astype(int)
    for column, values in (
        (3, [-1, 1]),
        (4, range(-2, 3)),
        (5, range(-2, 3)),
        (6, range(-2, 26)),
        (7, range(-2, 18)),
    ):
        found, counts = np.unique(table[:, column], return_counts=True)
        np.testing.assert_array_equal(found, list(values))
        expected = len(table) / len(found)
        assert np.abs(counts - expected).max() < 5 * expected**0.5
