"""Finds the digit on a sheet, without frames, tables, lines of the paper or specks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distrib.pictures.digit import as_mnist
from distrib.pictures.ink import Contrast, contrast, smooth_ground
from distrib.pictures.raster import components, grow, outside, pool, run_lengths, shrink

SPECK = 0.025
"""Ink smaller than this share of the sheet is a speck."""
SHARP = 0.33
"""Most of its strength that ink may still have 3 of 128 pixels beyond its edge."""


@dataclass(frozen=True)
class Digit:
    """A digit found on a sheet: uint8 (28, 28), white on black; `dark` ink is darker than the ground."""

    pixels: np.ndarray
    dark: bool


def find_digit(sheet: np.ndarray) -> Digit | None:
    """Find the digit on a sheet (H, W, C); None if nothing is drawn."""
    for _ in range(3):
        inner = inside(sheet)
        if inner is None:
            break
        sheet = sheet[inner]
    found = contrast(sheet, smooth_ground(sheet))
    if found is None:
        return None
    mask = main_strokes(without_lines(without_lines(found.mask).T).T)
    if not is_drawn(mask, found):
        return None
    drawn = np.where(grow(mask, 2), found.strength / found.level, 0).clip(0, 1)
    return Digit(as_mnist(drawn, mask), found.dark)


def is_drawn(mask: np.ndarray, found: Contrast) -> bool:
    """Whether ink is more than a speck and, unlike a shadow, ends sharply."""
    rows, cols = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not rows.size or max(np.ptp(rows), np.ptp(cols)) + 1 < max(5, SPECK * max(mask.shape)):
        return False
    return ends_sharply(pool(mask, 128), shrink(found.strength, 128))


def ends_sharply(part: np.ndarray, strength: np.ndarray) -> bool:
    """Whether a component's strength drops within 2 or 3 pixels of its edge."""
    beyond = grow(part, 3) & ~grow(part, 1)
    return not beyond.any() or bool(np.median(strength[beyond]) < SHARP * np.median(strength[part]))


def inside(sheet: np.ndarray) -> tuple[slice, slice] | None:
    """Rows and columns of the paper, if the picture also shows a frame or a table."""
    small = shrink(sheet, 128)
    middle = np.median(small, (0, 1))
    found = contrast(small, np.broadcast_to(middle, small.shape))
    if found is None:
        return None
    apart = np.abs(small - middle).max(2)  # uneven light included
    labels, count = components(found.mask)
    for label in range(1, count + 1):
        part = labels == label
        if part.sum() > 0.02 * part.size and (is_frame(part, apart) or is_paper(part, apart)):
            return free_of(part if is_frame(part, apart) else outside(~part), sheet.shape)
    return None


def is_frame(part: np.ndarray, strength: np.ndarray) -> bool:
    """Whether a component runs along a side, keeps to the border and, unlike a shadow, ends sharply."""
    sides = (part[0], part[-1], part[:, 0], part[:, -1])
    border = np.ones(part.shape, bool)
    dy, dx = (max(1, n // 4) for n in part.shape)
    border[dy:-dy, dx:-dx] = False
    if max(side.mean() for side in sides) < 0.85 or part[border].sum() < 0.9 * part.sum():
        return False
    return not part.all() and ends_sharply(part, strength)


def is_paper(part: np.ndarray, strength: np.ndarray) -> bool:
    """Whether a component is a filled rectangle with something on it."""
    rows, cols = (np.flatnonzero(part.any(axis)) for axis in (1, 0))
    cut = part[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    filled = ~outside(~cut)
    return bool(
        cut.size > 0.1 * part.size
        and filled.mean() > 0.82
        and 0.7 * filled.sum() < cut.sum() < 0.995 * filled.sum()
        and ends_sharply(part, strength)
    )


def free_of(unwanted: np.ndarray, shape: tuple[int, ...]) -> tuple[slice, slice]:
    """Rows and columns that remain after cutting off sides until none has unwanted pixels."""
    sides = [0, unwanted.shape[0], 0, unwanted.shape[1]]
    while sides[1] - sides[0] > 4 and sides[3] - sides[2] > 4:
        cut = unwanted[sides[0] : sides[1], sides[2] : sides[3]]
        shares = [cut[0].mean(), cut[-1].mean(), cut[:, 0].mean(), cut[:, -1].mean()]
        worst = int(np.argmax(shares))
        if shares[worst] < 0.02:
            break
        sides[worst] += 1 if worst in (0, 2) else -1
    for i, most in enumerate((unwanted.shape[0], unwanted.shape[0], unwanted.shape[1], unwanted.shape[1])):
        if sides[i] not in (0, most):  # the blurred edge
            sides[i] += 1 if i in (0, 2) else -1
    steps = [-(-shape[axis] // unwanted.shape[axis]) for axis in (0, 1)]
    rows, cols = (slice(max(0, sides[2 * i]) * steps[i], sides[2 * i + 1] * steps[i]) for i in (0, 1))
    return rows, cols


def without_lines(mask: np.ndarray) -> np.ndarray:
    """Remove thin lines from the mask that cross the sheet from left to right, beyond all other ink.

    Keeps strokes that cross a line, because their vertical runs are longer than the line is wide.
    """
    height, width = mask.shape
    if width < 64:
        return mask
    strips = np.array_split(np.arange(width), 16)
    profile = np.stack([mask[:, strip].mean(1) for strip in strips])  # (16, H)
    profile = np.maximum(profile, np.maximum(np.roll(profile, 1, 1), np.roll(profile, -1, 1)))
    run = run_lengths(mask)
    thin = max(3, round(0.03 * max(height, width)))
    erased = np.zeros_like(mask)
    for drop in line_slopes(width):
        shift = np.round(np.linspace(-drop / 2, drop / 2, 16)).astype(int)
        rows = (np.arange(height)[None] + shift[:, None]).clip(0, height - 1)
        for y in np.flatnonzero((np.take_along_axis(profile, rows, 1) > 0.6).mean(0) >= 0.9):
            for strip, dy in zip(strips, shift, strict=True):
                low, high = max(0, y + dy - 1), y + dy + 2
                band = (slice(low, high), slice(strip[0], strip[-1] + 1))
                erased[band] |= mask[band] & (run[band] <= thin)
    if not erased.any():
        return mask
    wide = int(np.percentile(run[erased], 75)) + 1
    erased &= run <= 1.5 * wide + 1
    rest = main_strokes(mask & ~erased)
    if not rest.any():  # paper with lines is empty; a single one may be a digit that fills the picture
        middle = erased[:, strips[8]].any(1)
        return rest if np.count_nonzero(np.diff(middle.astype(np.int8)) == 1) > 1 else mask
    cols = np.flatnonzero(rest.any(0))
    beyond = cols[0] > 0.03 * width and cols[-1] < 0.97 * width
    return mask & ~erased if beyond else mask


def line_slopes(width: int) -> np.ndarray:
    """Rows that a line may fall from left to right, up to 3 degrees either way."""
    most = int(0.05 * width)
    return np.arange(-most, most + 1, max(1, most // 24))


def main_strokes(mask: np.ndarray) -> np.ndarray:
    """The largest component of the mask and the parts of the same digit near it."""
    small = pool(mask, 192)
    labels, count = components(small)
    if count <= 1:
        return mask
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    sizes[0] = 0
    main = labels == sizes.argmax()
    rows, cols = (np.flatnonzero(main.any(axis)) for axis in (1, 0))
    reach = 0.25 * max(np.ptp(rows), np.ptp(cols)) + 1
    kept = main.copy()
    for label in np.flatnonzero(sizes >= 0.03 * sizes.max()):
        y, x = np.nonzero(labels == label)
        apart_y = max(rows[0] - y.max(), y.min() - rows[-1], 0)
        apart_x = max(cols[0] - x.max(), x.min() - cols[-1], 0)
        if max(apart_y, apart_x) <= reach:
            kept |= labels == label
    factor = -(-mask.shape[0] // small.shape[0]), -(-mask.shape[1] // small.shape[1])
    large = np.kron(kept, np.ones(factor, bool))[: mask.shape[0], : mask.shape[1]]
    return mask & large
