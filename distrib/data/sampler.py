"""Which images a rank computes, as pure functions: (seed, epoch, step, rank, size) → indices."""

from __future__ import annotations

import numpy as np


def permutation(seed: int, epoch: int, images: int) -> np.ndarray:
    """The order of the training set in `epoch` (from 0). It depends only on (seed, epoch)."""
    return np.random.default_rng((seed, epoch)).permutation(images)


def warps(seed: int, epoch: int, images: int, shift: float, rotate: float) -> np.ndarray:
    """(images, 4) float32 for `nn.ops.batch.warp`: a random shift and rotation of each image in `epoch`.

    Uniform, up to `shift` pixels each way and `rotate` degrees. The row of an image depends only on (seed,
    epoch, its index).
    """
    drawn = np.random.default_rng((seed, epoch, 1)).uniform(-1, 1, (images, 3))
    angle = np.radians(rotate) * drawn[:, 0]
    return np.stack([np.cos(angle), np.sin(angle), *(shift * drawn[:, 1:].T)], 1).astype(np.float32)


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
