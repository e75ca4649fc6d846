"""Which images a rank computes, as pure functions: (seed, epoch, step, rank, size) → indices."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


def permutation(seed: int, epoch: int, images: int) -> np.ndarray:
    """The order of the training set in `epoch` (from 0). It depends only on (seed, epoch)."""
    return np.random.default_rng((seed, epoch)).permutation(images)


class Augmentation(NamedTuple):
    """How each training image is changed at random, anew in each epoch; see the options of these names."""

    shift: float = 0.0
    rotate: float = 0.0
    flip: bool = False
    crop: int = 0
    cutout: int = 0


def warps(seed: int, epoch: int, shape: tuple[int, int, int], augment: Augmentation) -> np.ndarray:
    """(images, 8) float32 for `nn.ops.batch.warp`; `shape` is (images, H, W).

    Uniform: up to `shift` pixels each way and `rotate` degrees; mirrored or not; whole pixels up to `crop`
    each way; the middle of the square that is cut out anywhere (DeVries and Taylor 2017). The row of an image
    depends only on (seed, epoch, its index).
    """
    images, h, w = shape
    drawn = np.random.default_rng((seed, epoch, 1)).uniform(-1, 1, (images, 3))
    angle = np.radians(augment.rotate) * drawn[:, 0]
    across, sine, cosine = np.ones(images), np.sin(angle), np.cos(angle)
    moved = augment.shift * drawn[:, 1:]
    corner = np.zeros((images, 2))
    if augment.flip or augment.crop or augment.cutout:
        more = np.random.default_rng((seed, epoch, 3)).random((images, 5))
        across[more[:, 0] < augment.flip / 2] = -1
        moved = moved + np.floor((2 * augment.crop + 1) * more[:, 1:3]) - augment.crop
        corner = np.floor(more[:, 3:] * (h, w)) - augment.cutout // 2
    table = [cosine, -sine * across, sine, cosine * across, *moved.T, *corner.T]
    return np.stack(table, 1).astype(np.float32)


def image_keys(seed: int, epoch: int, images: int) -> np.ndarray:
    """(images,) uint32: a random number of each image in `epoch`, by which dropout draws."""
    return np.random.default_rng((seed, epoch, 2)).integers(0, 1 << 32, images, np.uint32)


def steps_per_epoch(images: int, batch: int) -> int:
    """Steps of an epoch; the last may have fewer than `batch` images."""
    return -(-images // batch)


def shard(count: int, rank: int, size: int) -> slice:
    """This rank's contiguous shard of `count` items: the first count % size ranks have one more."""
    base, more = divmod(count, size)
    start = rank * base + min(rank, more)
    return slice(start, start + base + (rank < more))


def batch_indices(order: np.ndarray, step: int, batch: int, rank: int, size: int) -> tuple[np.ndarray, int]:
    """This rank's indices in step `step` (from 0) of an epoch in `order`, and the global batch's count."""
    whole = order[step * batch : (step + 1) * batch]
    return whole[shard(len(whole), rank, size)], len(whole)
