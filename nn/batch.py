"""The images and labels of a step's batch, taken from the device's memory; turned and moved where training augments them."""

from __future__ import annotations

import numpy as np

from nn.backend import Array, namespace, replaceable

WARPED_AT_ONCE = 16
"""Images that are warped together: their coordinates fit a cache."""


@replaceable
def take_batch(
    images: Array,
    labels: Array,
    order: Array,
    at: Array,
    batch: int,
    start: int,
    x: Array,
    y: Array,
    warps: Array | None = None,
) -> None:
    """x (n, H, W, 1) and y (n,): images / 255 and labels number order[at·batch + start + i] for i < n.

    `at` (1,) is this rank's step in the epoch, in memory of the device, so that a captured step needs no new argument.
    With `warps` (images, 4) each image is turned and moved by its row (see `warp`).
    """
    indices = order[at * batch + namespace(order).arange(start, start + len(x))]
    if warps is None:
        x[..., 0] = images[indices]
    else:
        for first in range(0, len(x), WARPED_AT_ONCE):
            part = indices[first : first + WARPED_AT_ONCE]
            warp(images[part], warps[part], x[first : first + WARPED_AT_ONCE, ..., 0])
    x /= 255
    y[...] = labels[indices]


def warp(images: Array, warps: Array, out: Array) -> None:
    """out (n, H, W) at (i, j): images (n, H, W) at (a·u − b·v + p, b·u + a·v + q) from their centre, for (u, v) = (i, j)
    from the centre and (a, b, p, q) the rows of `warps` (n, 4): turned and moved. Bilinear; 0 outside.
    """
    xp, (n, h, w), dtype = namespace(images), images.shape, out.dtype
    framed = xp.zeros((n, h + 2, w + 2), dtype)  # a border of zeros: what is outside is read from it
    framed[:, 1:-1, 1:-1] = images
    u, v = xp.arange(h, dtype=dtype)[:, None] - (h - 1) / 2, xp.arange(w, dtype=dtype) - (w - 1) / 2
    a, b, p, q = warps.astype(dtype).T[:, :, None, None]
    rows = xp.clip(a * u - b * v + (p + (h + 1) / 2), 0, h + 1)
    columns = xp.clip(b * u + a * v + (q + (w + 1) / 2), 0, w + 1)
    top, left = xp.minimum(rows.astype(np.int32), h), xp.minimum(columns.astype(np.int32), w)
    rows -= top
    columns -= left
    flat, at = (
        framed.reshape(-1),
        top * (w + 2) + left + xp.arange(n, dtype=np.int32)[:, None, None] * ((h + 2) * (w + 2)),
    )
    upper, lower = flat[at], flat[at + (w + 2)]
    upper += columns * (flat[at + 1] - upper)
    lower += columns * (flat[at + (w + 3)] - lower)
    out[...] = upper + rows * (lower - upper)
