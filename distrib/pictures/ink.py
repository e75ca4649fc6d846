"""Separates ink from its ground: in any colours, dark or bright, in uneven light.

A sheet is a float32 array (H, W, C) in [0, 1]. Ink is what differs from the ground.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from distrib.pictures.raster import box_sum, grow, shrink

FAINTEST = 0.04
"""Least contrast of ink, as a share of the range from black to white."""
AGREED = 0.03
"""Distance within which a pixel agrees with a model of the light."""
CLEARLY = 1.3
"""Factor by which a model of the light with more terms must have more pixels that agree."""
SIGNAL = 5.0
"""Standard deviations of the ground's noise by which ink differs from the ground."""


@dataclass(frozen=True)
class Contrast:
    """`strength` (H, W) of each pixel from ground to ink: strokes have `level`, and `cut` is a threshold."""

    strength: np.ndarray
    level: float
    cut: float
    dark: bool

    @property
    def mask(self) -> np.ndarray:
        return self.strength > self.cut


def contrast(sheet: np.ndarray, ground: np.ndarray) -> Contrast | None:
    """Separate ink from ground by colour; None if no pixel stands out from the ground's noise.

    Ink differs less from the ground in less light, so differences are relative to the ground's light.
    """
    if min(sheet.shape[:2]) < 4:
        return None
    light = ground.mean(2, keepdims=True).clip(0, None) + 0.1
    strength, axis = along_ink((sheet - ground) * (np.median(light) / light))
    for _ in range(2):
        noise = noise_of(strength)
        floor = max(SIGNAL * noise, FAINTEST)
        strong = strength[strength > floor]
        if strong.size < 8:
            return None
        cut = max(otsu(strong), floor)
        strength = strength - nearby_ground(strength, strength > floor)
    level = float(np.percentile(strength[strength > cut], 75)) if (strength > cut).any() else 0.0
    if level < FAINTEST:
        return None
    return Contrast(strength, level, cut, bool(axis.sum() < 0))


def noise_of(strength: np.ndarray) -> float:
    """Standard deviation of the noise, from pairs of nearby pixels, few of which cross an edge of ink."""
    reach = [lag for lag in (1, 2, 4, 8) if 4 * lag < min(strength.shape)] or [1]
    return max(1.05 * float(np.median(np.abs(strength[:, lag:] - strength[:, :-lag]))) for lag in reach)


def smooth_ground(sheet: np.ndarray) -> np.ndarray:
    """The light on the sheet: a constant, a plane or a quadratic, whichever more pixels agree with.

    The constant is the border's, since ink may cover most of a picture that is cut to it. The
    others are fitted by least absolute deviations, which ink on less than a quarter does not move.
    """
    small = shrink(sheet, 48)
    basis = quadratic(*small.shape[:2]).astype(np.float64)
    values = small.reshape(len(basis), -1).astype(np.float64)
    edge = (np.abs(basis[:, 1:3]) == 1).any(1)
    best, agreed = np.zeros((6, values.shape[1])), 0.0
    for terms in (1, 3, 6):
        fit = least_deviations(basis[:, :terms], values) if terms > 1 else np.median(values[edge], 0)[None]
        light = basis[:, :terms] @ fit
        agree = float((np.abs(values - light).max(1) < AGREED).mean())
        if terms == 1 or (agree > CLEARLY * agreed and light.min() > -0.1 and light.max() < 1.2):
            best, agreed = np.zeros_like(best), agree
            best[:terms] = fit
    return (quadratic(*sheet.shape[:2]) @ best.astype(np.float32)).reshape(sheet.shape)


def least_deviations(basis: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Coefficients (terms, C) with the least Σ|values − basis·coefficients|, by reweighted squares."""
    weight, terms = np.ones_like(values), basis.shape[1]
    pairs = (basis[:, :, None] * basis[:, None]).reshape(len(basis), -1)
    for _ in range(20):
        squares = (weight.T @ pairs).reshape(-1, terms, terms)
        right = ((weight * values).T @ basis)[..., None]
        fit = np.linalg.solve(squares + 1e-9 * np.eye(terms), right)[..., 0].T
        weight = 1 / np.maximum(np.abs(values - basis @ fit), 1e-3)
    return fit


def quadratic(height: int, width: int) -> np.ndarray:
    """(H·W, 6): 1, x, y, x², xy, y² with x and y from −1 to 1."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in (height, width)), indexing="ij")
    return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], -1).reshape(-1, 6)


def along_ink(rest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Project colour differences on the axis from ground to ink; returns (strength, axis)."""
    flat = rest.reshape(-1, rest.shape[2])
    size = np.abs(flat).max(1)
    strong = flat[size >= max(np.percentile(size, 50) * SIGNAL, FAINTEST)]
    if not len(strong):
        strong = flat
    axis = np.linalg.eigh(strong.T.astype(np.float64) @ strong)[1][:, -1].astype(np.float32)
    if ((strong @ axis) ** 3).sum() < 0:
        axis = -axis
    return (flat @ axis).reshape(rest.shape[:2]), axis


def nearby_ground(strength: np.ndarray, ink: np.ndarray) -> np.ndarray:
    """The remaining uneven light near each pixel: the ground's mean over a window."""
    free = (~grow(ink, 2)).astype(np.float32)
    both = shrink(np.stack([strength * free, free], -1), 64)
    radius = max(2, min(both.shape[:2]) // 8)
    total = box_sum(both, radius)
    near = total[..., 0] / (total[..., 1] + 0.1 * (2 * radius + 1) ** 2)
    picture = Image.fromarray(near.astype(np.float32))
    return np.asarray(picture.resize(strength.shape[::-1], Image.Resampling.BILINEAR))


def otsu(values: np.ndarray) -> float:
    """Otsu's threshold: the two classes' means differ most, weighted by their sizes."""
    low, high = float(values.min()), float(values.max())
    if high - low < 1e-3:
        return (low + high) / 2 - 1e-3
    counts, edges = np.histogram(values, 256, (low, high))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1]
    above = counts.sum() - below
    sums = np.cumsum(counts * centres)
    gap = sums[:-1] / np.maximum(below, 1) - (sums[-1] - sums[:-1]) / np.maximum(above, 1)
    return float(edges[1:-1][np.argmax(below * above * gap**2)])
