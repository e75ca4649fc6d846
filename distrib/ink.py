"""Finds the digit on a sheet and draws it as MNIST's makers did: white on black, 20×20 at most, centred by mass.

A sheet is a float32 array (H, W, C) in [0, 1]. Ink is what differs from the ground, in any colour, either way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

SIDE, BOX = 28, 20
FINE = 8
"""Pixels of the fine drawing for one pixel of the result."""
THINNEST, THICKEST = 2.0, 4.5
"""Pixels that a stroke is wide in MNIST: nine of ten digits lie between."""
FAINTEST = 0.04
"""Contrast, of the whole range from black to white, below which nothing is taken for ink."""
SIGNAL = 5.0
"""Ink differs from the ground by so many standard deviations of the ground's noise."""


@dataclass(frozen=True)
class Digit:
    """What was found on a sheet: uint8 (28, 28), white on black, and whether the ink is darker than the ground."""

    pixels: np.ndarray
    dark: bool


@dataclass(frozen=True)
class Contrast:
    """How far each pixel lies from the ground towards the ink, (H, W); `level` is a stroke's, `cut` parts the two."""

    strength: np.ndarray
    level: float
    cut: float
    dark: bool

    @property
    def mask(self) -> np.ndarray:
        return self.strength > self.cut


def find_digit(sheet: np.ndarray) -> Digit | None:
    """The digit on a sheet (H, W, C), or None where nothing is drawn."""
    for _ in range(3):
        inner = inside(sheet)
        if inner is None:
            break
        sheet = sheet[inner]
    found = contrast(sheet, smooth_ground(sheet))
    if found is None:
        return None
    mask = without_lines(without_lines(found.mask).T).T
    mask = main_strokes(mask)
    if not mask.any():
        return None
    drawn = np.where(grow(mask, 2), found.strength / found.level, 0).clip(0, 1)
    return Digit(as_mnist(drawn, mask), found.dark)


# --- ink and ground ---------------------------------------------------------------------------------------------


def contrast(sheet: np.ndarray, ground: np.ndarray) -> Contrast | None:
    """Tell ink from ground by colour; None where no pixel stands out from the ground's noise.

    Where there is less light, ink differs less from the ground: differences are taken relative to the ground's light.
    """
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
    """Standard deviation of the noise: from differences of pixels a little apart, few of which cross an edge of ink."""
    reach = [lag for lag in (1, 2, 4, 8) if 4 * lag < min(strength.shape)] or [1]
    return max(1.05 * float(np.median(np.abs(strength[:, lag:] - strength[:, :-lag]))) for lag in reach)


def smooth_ground(sheet: np.ndarray) -> np.ndarray:
    """The light on the sheet as a quadratic in x and y, fitted by least absolute deviations: ink does not move it."""
    small = shrink(sheet, 48)
    basis = quadratic(*small.shape[:2]).astype(np.float64)
    values = small.reshape(len(basis), -1)
    weight = np.ones_like(values, np.float64)
    for _ in range(20):
        squares = np.einsum("ni,nc,nj->cij", basis, weight, basis, optimize=True)
        fit = np.linalg.solve(squares + 1e-9 * np.eye(6), ((weight * values).T @ basis)[..., None])[..., 0].T
        weight = 1 / np.maximum(np.abs(values - basis @ fit), 1e-3)
    return (quadratic(*sheet.shape[:2]) @ fit.astype(np.float32)).reshape(sheet.shape)


def quadratic(height: int, width: int) -> np.ndarray:
    """(H·W, 6): 1, x, y, x², xy, y² with x and y from −1 to 1."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in (height, width)), indexing="ij")
    return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], -1).reshape(-1, 6)


def along_ink(rest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Project differences in colour on the axis from the ground's to the ink's; (strength, axis)."""
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
    """What the ground near each pixel has left of uneven light: its mean over a window, ink left out."""
    free = (~grow(ink, 2)).astype(np.float32)
    both = shrink(np.stack([strength * free, free], -1), 64)
    radius = max(2, min(both.shape[:2]) // 8)
    total = box_sum(both, radius)
    near = total[..., 0] / (total[..., 1] + 0.1 * (2 * radius + 1) ** 2)
    picture = Image.fromarray(near.astype(np.float32))
    return np.asarray(picture.resize(strength.shape[::-1], Image.Resampling.BILINEAR))


def otsu(values: np.ndarray) -> float:
    """The threshold that parts values into the two classes whose means differ most, weighted by their sizes."""
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


# --- what is not the digit --------------------------------------------------------------------------------------


def inside(sheet: np.ndarray) -> tuple[slice, slice] | None:
    """The rows and columns of the paper inside a frame or on a table, where the picture shows more than the paper."""
    small = shrink(sheet, 128)
    found = contrast(small, np.broadcast_to(np.median(small, (0, 1)), small.shape))
    if found is None:
        return None
    labels, count = components(found.mask)
    for label in range(1, count + 1):
        part = labels == label
        if part.sum() > 0.02 * part.size and (is_frame(part, found.strength) or is_paper(part)):
            return free_of(part if is_frame(part, found.strength) else outside(~part), sheet.shape)
    return None


def is_frame(part: np.ndarray, strength: np.ndarray) -> bool:
    """Whether a component runs along a side of the picture, keeps to its border and ends sharply, unlike a shadow."""
    sides = (part[0], part[-1], part[:, 0], part[:, -1])
    border = np.ones(part.shape, bool)
    dy, dx = (max(1, n // 4) for n in part.shape)
    border[dy:-dy, dx:-dx] = False
    if max(side.mean() for side in sides) < 0.85 or part[border].sum() < 0.9 * part.sum():
        return False
    beyond = grow(part, 3) & ~grow(part, 1)
    return bool(np.median(strength[beyond]) < 0.4 * np.median(strength[part])) if beyond.any() else False


def is_paper(part: np.ndarray) -> bool:
    """Whether a component is a filled rectangle with something on it."""
    rows, cols = (np.flatnonzero(part.any(axis)) for axis in (1, 0))
    cut = part[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    filled = ~outside(~cut)
    return bool(
        cut.size > 0.1 * part.size
        and filled.mean() > 0.82
        and 0.7 * filled.sum() < cut.sum() < 0.995 * filled.sum()
    )


def outside(free: np.ndarray) -> np.ndarray:
    """The free pixels from which a way leads to the border."""
    labels, _ = components(free)
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    return np.isin(labels, edge[edge > 0])


def free_of(unwanted: np.ndarray, shape: tuple[int, ...]) -> tuple[slice, slice]:
    """The rows and columns of the picture that are left when its sides are cut off until none has unwanted pixels."""
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
    """The mask without thin lines that cross the sheet from left to right and reach beyond all other ink.

    Where a stroke crosses a line, its vertical run is longer than the line is wide, and stays.
    """
    height, width = mask.shape
    strips = np.array_split(np.arange(width), 16)
    if width < 64:
        return mask
    profile = np.stack([mask[:, strip].mean(1) for strip in strips])  # (16, H)
    profile = np.maximum(profile, np.maximum(np.roll(profile, 1, 1), np.roll(profile, -1, 1)))
    run = run_lengths(mask)
    thin = max(3, round(0.03 * max(height, width)))
    erased = np.zeros_like(mask)
    for drop in line_slopes(height, width):
        shift = np.round(np.linspace(-drop / 2, drop / 2, 16)).astype(int)
        rows = (np.arange(height)[None] + shift[:, None]).clip(0, height - 1)
        for y in np.flatnonzero((np.take_along_axis(profile, rows, 1) > 0.6).mean(0) >= 0.9):
            for strip, dy in zip(strips, shift, strict=True):
                low, high = max(0, y + dy - 1), y + dy + 2
                band = (slice(low, high), slice(strip[0], strip[-1] + 1))
                erased[band] |= run[band] <= thin
    if not erased.any():
        return mask
    wide = int(np.percentile(run[erased & mask], 75)) + 1
    erased &= run <= 1.5 * wide + 1
    rest = main_strokes(mask & ~erased)
    if not rest.any():
        return mask
    cols = np.flatnonzero(rest.any(0))
    beyond = cols[0] > 0.03 * width and cols[-1] < 0.97 * width
    return mask & ~erased if beyond else mask


def line_slopes(height: int, width: int) -> np.ndarray:
    """Rows that a line may fall from left to right, up to 3 degrees either way."""
    most = int(0.05 * width)
    return np.arange(-most, most + 1, max(1, most // 24))


def run_lengths(mask: np.ndarray) -> np.ndarray:
    """For each pixel of the mask, the length of the vertical run that it lies in; 0 elsewhere."""
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


# --- MNIST's form ---------------------------------------------------------------------------------------------


def as_mnist(drawn: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Ink (H, W) in [0, 1] as uint8 (28, 28): cut to the ink, strokes as wide as MNIST's, scaled, centred by mass."""
    fine = with_margin(fit(drawn, mask, BOX * FINE), 4 * FINE)
    width = stroke_width(fine > 0.5) / FINE
    wanted = min(max(width, THINNEST), THICKEST)
    fine = widened(fine, (wanted - width) / 2 * FINE)
    small = fit(fine, fine > 0.5, BOX + 0.3)
    return centred(small)


def fit(drawn: np.ndarray, mask: np.ndarray, side: float) -> np.ndarray:
    """Cut to the mask and scale so that the longer side is `side`, with half a result's pixel around."""
    rows, cols = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    height, width = rows[-1] + 1 - rows[0], cols[-1] + 1 - cols[0]
    scale = side / max(height, width)
    margin = 0.5 / scale * (1 if side < 2 * BOX else FINE)
    out = [max(1, round((n + 2 * margin) * scale)) for n in (width, height)]
    padded = with_margin(drawn, int(margin) + 2)
    at = int(margin) + 2
    half = [n / scale / 2 for n in out]
    middle = [cols[0] + width / 2 + at, rows[0] + height / 2 + at]
    box = [middle[0] - half[0], middle[1] - half[1], middle[0] + half[0], middle[1] + half[1]]
    limit = [padded.shape[1], padded.shape[0]] * 2
    box = [min(max(value, 0), most) for value, most in zip(box, limit, strict=True)]
    method = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
    picture = Image.fromarray(padded.astype(np.float32))
    return np.asarray(picture.resize(tuple(out), method, box=tuple(box))).clip(0, 1)


def with_margin(drawn: np.ndarray, margin: int) -> np.ndarray:
    return np.pad(drawn, margin)


def stroke_width(mask: np.ndarray) -> float:
    """Twice the area over the perimeter; π/4 of the edges between pixels is the perimeter of slanting strokes."""
    edges = sum(int(np.count_nonzero(np.diff(mask, axis=axis))) for axis in (0, 1))
    return 2 * int(mask.sum()) / max(1.0, edges * np.pi / 4)


def widened(drawn: np.ndarray, radius: float) -> np.ndarray:
    """Strokes wider by `radius` on each side, or thinner where it is negative: the most, or least, over a disc."""
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
    """A drawing of at most 22×22 in 28×28 with its centre of mass in the middle."""
    out = np.zeros((SIDE, SIDE), np.uint8)
    pixels = np.round(255 * small).astype(np.uint8)
    total = max(1.0, float(pixels.sum()))
    place = []
    for axis, size in ((1, small.shape[0]), (0, small.shape[1])):
        mass = float(pixels.sum(axis) @ np.arange(size)) / total
        place.append(int(np.clip(round(SIDE / 2 - 0.5 - mass + 0.5), 0, SIDE - size)))
    out[place[0] : place[0] + small.shape[0], place[1] : place[1] + small.shape[1]] = pixels
    return out


# --- tools ----------------------------------------------------------------------------------------------------


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
    """Whether each block of a mask has a pixel, in blocks so large that no side is longer than `most`."""
    for axis in (0, 1):
        size = -(-mask.shape[axis] // most)
        mask = np.logical_or.reduceat(mask, np.arange(0, mask.shape[axis], size), axis)
    return mask


def grow(mask: np.ndarray, radius: int) -> np.ndarray:
    """The mask and all within `radius` rows and columns of it."""
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
    """Sums over (2·radius + 1)² pixels around each, of an array (H, W, C)."""
    for axis in (0, 1):
        size = array.shape[axis]
        total = np.insert(np.cumsum(array, axis, dtype=np.float64), 0, 0, axis)
        high = np.minimum(np.arange(size) + radius + 1, size)
        low = np.maximum(np.arange(size) - radius, 0)
        array = np.take(total, high, axis) - np.take(total, low, axis)
    return array


def components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Labels from 1 of the 8-connected components of a mask, 0 elsewhere, and how many there are."""
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
