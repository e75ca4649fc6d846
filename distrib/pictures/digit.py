"""Redraws ink like MNIST: at most 20×20, centred by mass in 28×28, with strokes of MNIST's width."""

from __future__ import annotations

import numpy as np
from PIL import Image

SIDE, BOX = 28, 20
FINE = 8
"""Pixels of the fine drawing per pixel of the result."""
THINNEST, THICKEST = 2.0, 4.5
"""Stroke widths in MNIST, in pixels: nine of ten digits lie between."""


def as_mnist(drawn: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Redraw ink (H, W) in [0, 1] as uint8 (28, 28), with strokes as wide as MNIST's."""
    fine = np.pad(fit(drawn, mask, BOX * FINE), 4 * FINE)
    width = stroke_width(fine > 0.5) / FINE
    wanted = min(max(width, THINNEST), THICKEST)
    fine = widened(fine, (wanted - width) / 2 * FINE)
    small = fit(fine, fine > 0.5, BOX + 0.3)
    return centred(small)


def fit(drawn: np.ndarray, mask: np.ndarray, side: float) -> np.ndarray:
    """Crop to the mask and scale so that the longer side is `side`, with half a pixel of margin."""
    rows, cols = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    height, width = rows[-1] + 1 - rows[0], cols[-1] + 1 - cols[0]
    scale = side / max(height, width)
    margin = 0.5 / scale * (1 if side < 2 * BOX else FINE)
    out = [max(1, round((n + 2 * margin) * scale)) for n in (width, height)]
    padded = np.pad(drawn, int(margin) + 2)
    at = int(margin) + 2
    half = [n / scale / 2 for n in out]
    middle = [cols[0] + width / 2 + at, rows[0] + height / 2 + at]
    box = [middle[0] - half[0], middle[1] - half[1], middle[0] + half[0], middle[1] + half[1]]
    limit = [padded.shape[1], padded.shape[0]] * 2
    box = [min(max(value, 0), most) for value, most in zip(box, limit, strict=True)]
    method = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
    picture = Image.fromarray(padded.astype(np.float32))
    return np.asarray(picture.resize(tuple(out), method, box=tuple(box))).clip(0, 1)


def stroke_width(mask: np.ndarray) -> float:
    """Twice the area over the perimeter: π/4 of the edges between pixels, on average."""
    edges = sum(int(np.count_nonzero(np.diff(mask, axis=axis))) for axis in (0, 1))
    return 2 * int(mask.sum()) / max(1.0, edges * np.pi / 4)


def widened(drawn: np.ndarray, radius: float) -> np.ndarray:
    """Widen strokes by `radius` on each side, or thin them if negative: maximum or minimum over a disc."""
    if abs(radius) < 0.5:
        return drawn
    sign = 1 if radius > 0 else -1
    source = sign * drawn
    result, reach = source.copy(), int(abs(radius))
    for dy in range(-reach, reach + 1):
        across = int(np.sqrt(radius * radius - dy * dy))
        for dx in range(-across, across + 1):
            result = np.maximum(result, np.roll(source, (dy, dx), (0, 1)))
    return sign * result


def centred(small: np.ndarray) -> np.ndarray:
    """Place a drawing of at most 22×22 in 28×28, with its centre of mass in the middle."""
    out = np.zeros((SIDE, SIDE), np.uint8)
    pixels = np.round(255 * small).astype(np.uint8)
    total = max(1.0, float(pixels.sum()))
    place = []
    for axis, size in ((1, small.shape[0]), (0, small.shape[1])):
        mass = float(pixels.sum(axis) @ np.arange(size)) / total
        place.append(int(np.clip(round(SIDE / 2 - 0.5 - mass + 0.5), 0, SIDE - size)))
    out[place[0] : place[0] + small.shape[0], place[1] : place[1] + small.shape[1]] = pixels
    return out
