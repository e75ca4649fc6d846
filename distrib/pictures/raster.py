"""Pixel operations that NumPy and Pillow lack: means and maxima over blocks, growing, components."""

from __future__ import annotations

import numpy as np


def shrink(array: np.ndarray, most: int) -> np.ndarray:
    """Means over blocks (H, W, C), so that no side is longer than `most`."""
    step = [-(-n // most) for n in array.shape[:2]]
    for axis, size in enumerate(step):
        starts = np.arange(0, array.shape[axis], size)
        counts = np.diff(np.append(starts, array.shape[axis])).astype(np.float32)
        shape = [-1 if i == axis else 1 for i in range(array.ndim)]
        array = np.add.reduceat(array, starts, axis) / counts.reshape(shape)
    return array


def pool(mask: np.ndarray, most: int) -> np.ndarray:
    """Maxima of a mask over blocks, so that no side is longer than `most`."""
    for axis in (0, 1):
        size = -(-mask.shape[axis] // most)
        mask = np.logical_or.reduceat(mask, np.arange(0, mask.shape[axis], size), axis)
    return mask


def grow(mask: np.ndarray, radius: int) -> np.ndarray:
    """Grow a mask by `radius` rows and columns each way."""
    for axis in (0, 1):
        grown = mask.copy()
        for shift in range(1, radius + 1):
            ahead = [slice(None), slice(None)]
            behind = [slice(None), slice(None)]
            ahead[axis], behind[axis] = slice(shift, None), slice(None, -shift)
            grown[tuple(ahead)] |= mask[tuple(behind)]
            grown[tuple(behind)] |= mask[tuple(ahead)]
        mask = grown
    return mask


def box_sum(array: np.ndarray, radius: int) -> np.ndarray:
    """Sums over (2·radius + 1)² pixels around each pixel of an array (H, W, C)."""
    for axis in (0, 1):
        size = array.shape[axis]
        total = np.insert(np.cumsum(array, axis, dtype=np.float64), 0, 0, axis)
        high = np.minimum(np.arange(size) + radius + 1, size)
        low = np.maximum(np.arange(size) - radius, 0)
        array = np.take(total, high, axis) - np.take(total, low, axis)
    return array


def components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Label the 8-connected components of a mask from 1, the rest 0; returns (labels, number)."""
    runs: list[tuple[int, int, int]] = []
    parent: list[int] = []

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    above: list[int] = []
    for y, row in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.concatenate([[False], row, [False]]).astype(np.int8))).tolist()
        here: list[int] = []
        for begin, end in zip(edges[::2], edges[1::2], strict=True):
            own = len(runs)
            runs.append((y, begin, end))
            parent.append(own)
            for other in above:
                if runs[other][1] <= end and runs[other][2] >= begin:
                    parent[root(own)] = root(other)
            here.append(own)
        above = here
    labels = np.zeros(mask.shape, np.int32)
    names: dict[int, int] = {}
    for i, (y, begin, end) in enumerate(runs):
        labels[y, begin:end] = names.setdefault(root(i), len(names) + 1)
    return labels, len(names)


def outside(free: np.ndarray) -> np.ndarray:
    """The free pixels that are connected to the border."""
    labels, _ = components(free)
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    return np.isin(labels, edge[edge > 0])


def run_lengths(mask: np.ndarray) -> np.ndarray:
    """The length of the vertical run through each pixel of the mask; 0 elsewhere."""
    height, width = mask.shape
    padded = np.zeros((height + 2, width), np.int8)
    padded[1:-1] = mask
    change = np.diff(padded.T, axis=1)
    begin, end = np.argwhere(change == 1), np.argwhere(change == -1)
    out = np.zeros((width, height + 1), np.int32)
    length = end[:, 1] - begin[:, 1]
    np.add.at(out, (begin[:, 0], begin[:, 1]), length)
    np.add.at(out, (end[:, 0], end[:, 1]), -length)
    return np.cumsum(out, 1)[:, :-1].T
