"""The images and labels of a step's batch, from the device's memory; turned and moved by `warp`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from nn.array import Array, namespace, op

LABELS = "int32"
"""dtype of labels on a device: any number of classes."""

WARPED_AT_ONCE = 16
"""Images that are warped together: their coordinates fit a cache."""


class Source(NamedTuple):
    """What batches are taken from: images (N, H, W, C) uint8, labels (N,) and an epoch's order (N,) int32.

    With `warps` (N, 8) float32 each image is turned, mirrored and moved by its row (see `warp`), and loses a
    square of `cutout` pixels.
    """

    images: Array
    labels: Array
    order: Array
    warps: Array | None = None
    cutout: int = 0


def check_labels(labels: np.ndarray, classes: int) -> None:
    """ValueError naming the first of `labels`, integers, that is outside [0, classes)."""
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels are {labels.dtype}: give integers from 0 to {classes - 1}")
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        at = int(outside.argmax())
        raise ValueError(f"label {labels[at]} at index {at}: labels go from 0 to {classes - 1}")


@op
def gather_batch(x: Array, y: Array, source: Source, at: Array, batch: int, start: int) -> None:
    """x (n, H, W, C) and y (n,): images / 255 and labels number order[at·batch + start + i] for i < n.

    `at` (1,) is this rank's step in the epoch, on the device, so that a captured step needs no argument.
    """
    images, warps = source.images, source.warps
    indices = source.order[at * batch + namespace(x).arange(start, start + len(x))]
    if warps is None:
        x[...] = images[indices]
    else:
        for first in range(0, len(x), WARPED_AT_ONCE):
            part = indices[first : first + WARPED_AT_ONCE]
            warp(images[part], warps[part], x[first : first + WARPED_AT_ONCE], source.cutout)
    x /= 255
    y[...] = source.labels[indices]


@op
def gather_keys(keys: Array, source: Array, order: Array, at: Array, batch: int, start: int) -> None:
    """keys (n,) = source[order[at·batch + start + i]] for i < n: of a number for each image, the batch's."""
    keys[...] = source[order[at * batch + namespace(keys).arange(start, start + len(keys))]]


def warp(images: Array, warps: Array, out: Array, cutout: int = 0) -> None:
    """out (n, H, W, C) at (i, j): images (n, H, W, C) at (a·u + b·v + p, c·u + d·v + q) from their centre,
    for (u, v) = (i, j) from the centre and (a, b, c, d, p, q, top, left) the rows of `warps` (n, 8).

    Bilinear; 0 outside, and in the square of `cutout` pixels whose first is (top, left).
    """
    xp, (n, h, w, channels), dtype = namespace(images), images.shape, out.dtype
    u, v = xp.arange(h, dtype=dtype)[:, None] - (h - 1) / 2, xp.arange(w, dtype=dtype) - (w - 1) / 2
    a, b, c, d, p, q, above, before = warps.astype(dtype).T[:, :, None, None]
    rows = xp.clip(a * u + b * v + (p + (h + 1) / 2), 0, h + 1)
    columns = xp.clip(c * u + d * v + (q + (w + 1) / 2), 0, w + 1)
    top, left = xp.minimum(rows.astype(np.int32), h), xp.minimum(columns.astype(np.int32), w)
    rows -= top
    columns -= left
    at = top * (w + 2) + left + xp.arange(n, dtype=np.int32)[:, None, None] * ((h + 2) * (w + 2))
    framed = xp.zeros((n, h + 2, w + 2), dtype)  # a border of zeros: what is outside is read from it
    flat = framed.reshape(-1)
    for channel in range(channels):
        framed[:, 1:-1, 1:-1] = images[..., channel]
        upper, lower = flat[at], flat[at + (w + 2)]
        upper += columns * (flat[at + 1] - upper)
        lower += columns * (flat[at + (w + 3)] - lower)
        out[..., channel] = upper + rows * (lower - upper)
    if cutout:
        down, across = xp.arange(h, dtype=dtype)[:, None] - above, xp.arange(w, dtype=dtype) - before
        out *= ((down < 0) | (down >= cutout) | (across < 0) | (across >= cutout))[..., None]
