"""Reads picture and IDX files as the network takes them: 28×28, white on black."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from distrib.data import idx
from distrib.errors import UserError
from distrib.pictures.digit import SIDE, stroke_width
from distrib.pictures.files import Sheet, deep_pixels, luminance, pixels_of, read_sheets
from distrib.pictures.kinds import kind_of
from distrib.pictures.paper import find_digit

MOST_IMAGES = 1_000_000
"""Most images of an IDX file."""


@dataclass(frozen=True)
class Pictures:
    """The images of one file as the network takes them: uint8 (N, H, W), in colour (N, H, W, 3)."""

    path: Path
    pixels: np.ndarray
    inverted: np.ndarray  # bool (N,): the image has dark ink on a bright ground
    drawn: np.ndarray  # bool (N,): there is something on it

    def name(self, i: int) -> str:
        return f"{self.path}[{i}]" if len(self.pixels) > 1 else str(self.path)


def read_pictures(path: Path, as_is: bool = False) -> Pictures:
    """Read a picture or IDX file, with its images prepared like MNIST's; with `as_is`, only scaled."""
    found = read_sheets(path, (lambda sheet: scaled(sheet, (SIDE, SIDE, 1))) if as_is else prepare)
    if found is None:
        return read_idx(path, as_is)
    pixels = np.stack([pixels for pixels, _ in found])
    return Pictures(path, pixels, np.array([dark for _, dark in found]), pixels.max((1, 2)) > 0)


def read_scaled(path: Path, shape: tuple[int, int, int]) -> Pictures:
    """Read a picture or IDX file, with its images scaled to `shape` (H, W, C)."""
    deep = deep_pixels(path) if path.is_file() else None
    if deep is not None:
        found = fitted(np.broadcast_to(deep, (*deep.shape[:2], shape[2])), shape[:2])
        return Pictures(path, found[None], np.zeros(1, bool), np.ones(1, bool))
    sheets = read_sheets(path, lambda sheet: scaled(sheet, shape))
    if sheets is None:
        check_idx(path, shape)
    pixels = np.stack([pixels for pixels, _ in sheets]) if sheets else images_of(path)
    if pixels.shape[1:] not in (shape, shape[:2]) or pixels[0].size != shape[0] * shape[1] * shape[2]:
        size = "×".join(map(str, pixels.shape[1:]))
        raise UserError(
            f"{path}: images of {size}, the network takes {'×'.join(map(str, shape))}: scale them"
        )
    return Pictures(path, pixels, np.zeros(len(pixels), bool), np.ones(len(pixels), bool))


def scaled(sheet: Sheet, shape: tuple[int, int, int]) -> tuple[np.ndarray, bool]:
    """(uint8 (H, W) or (H, W, 3), False): a picture fitted to `shape`, on black if transparent."""
    found = fitted(pixels_of(sheet, shape[2]), shape[:2])
    return found[..., 0] if shape[2] == 1 else found, False


def fitted(pixels: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """uint8 (h, w, C), C 1 or 3: pixels scaled to cover `size` (h, w), and cut to it in the middle."""
    height, width = size
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    found = np.asarray(ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS))
    return found[..., None] if found.ndim == 2 else found


def prepare(sheet: Sheet) -> tuple[np.ndarray, bool]:
    """(uint8 (28, 28), whether the ink is dark) of a picture; all black if nothing is drawn."""
    if sheet.alpha is None and sheet.size == (SIDE, SIDE):
        own = mnist_like(sheet.light)
        if own is not None:
            return own
    found, dark = None, None
    if sheet.alpha is None or is_paper(sheet.alpha):
        found = find_digit(on_its_ground(sheet))
    if found is None and sheet.alpha is not None:
        found = find_digit(sheet.alpha[..., None])
        dark = (
            bool(np.median(luminance(sheet.light)[sheet.alpha > 0.5]) < 0.5)
            if (sheet.alpha > 0.5).any()
            else None
        )
    if found is None:
        return np.zeros((SIDE, SIDE), np.uint8), False
    return found.pixels, found.dark if dark is None else dark


def mnist_like(light: np.ndarray) -> tuple[np.ndarray, bool] | None:
    """The pixels of a 28×28 picture that already looks like MNIST, unchanged; else None."""
    pixels = np.round(255 * luminance(light)).astype(np.uint8)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    dark = bool(np.median(border) > 127)
    drawn = 255 - pixels if dark else pixels
    edge = 255 - border if dark else border
    if np.percentile(edge, 75) > 32 or drawn.max() < 160:
        return None
    rows, cols = (np.flatnonzero((drawn > 32).any(axis)) for axis in (1, 0))
    mass = [float(drawn.sum(axis) @ np.arange(SIDE)) / float(drawn.sum()) for axis in (1, 0)]
    size = max(np.ptp(rows), np.ptp(cols)) + 1
    return (drawn, dark) if abs(size - 20) <= 1 and all(abs(m - 14) < 0.75 for m in mass) else None


def is_paper(alpha: np.ndarray) -> bool:
    """Whether the opaque part is a sheet, not strokes: wide, compared with its length."""
    opaque = alpha > 0.5
    if not opaque.any():
        return False
    rows, cols = (np.flatnonzero(opaque.any(axis)) for axis in (1, 0))
    box = (np.ptp(rows) + 1) * (np.ptp(cols) + 1)
    return stroke_width(np.pad(opaque, 1)) > 0.42 * np.sqrt(box)


def on_its_ground(sheet: Sheet) -> np.ndarray:
    """The light of a sheet, with its median colour where it is transparent."""
    if sheet.alpha is None:
        return sheet.light
    opaque = sheet.alpha > 0.98
    if not opaque.any():
        return sheet.light
    return np.where(opaque[..., None], sheet.light, np.median(sheet.light[opaque], 0))


def read_idx(path: Path, as_is: bool) -> Pictures:
    """Read the images of an IDX file; invert all if most of their border is bright, unless `as_is`."""
    check_idx(path, (SIDE, SIDE, 1))
    images = images_of(path)
    if images.shape[1:] != (SIDE, SIDE):
        size = "×".join(map(str, images.shape[1:]))
        raise UserError(f"{path}: images of {size}, the network takes {SIDE}×{SIDE}: scale them")
    border = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]])
    dark = not as_is and bool(border.size) and bool(np.median(border) > 127)
    pixels = 255 - images if dark else images
    return Pictures(path, pixels, np.full(len(images), dark), pixels.max((1, 2)) > 0)


def images_of(path: Path) -> np.ndarray:
    """The images of an IDX file, at least one."""
    images = idx.read_images(path)
    if not len(images):
        raise UserError(f"{path}: holds no images: give another file")
    return images


def check_idx(path: Path, shape: tuple[int, int, int]) -> None:
    """UserError if a file is of another kind, or unpacks to more images of this shape than are taken."""
    most = 4 + 4 * 4 + prod(shape) * MOST_IMAGES
    with path.open("rb") as file:
        head = file.read(2048)
        if head[:2] == b"\x1f\x8b":
            file.seek(0)
            try:
                with gzip.open(file) as packed:
                    head = packed.read(2048)
                    size = len(head) + skip(packed, most)
            except (OSError, EOFError, zlib.error):
                return  # read_idx reports what is wrong
            if not is_idx(head):
                raise UserError(f"{path}: is packed by gzip and holds {kind_of(head)}")
        else:
            size = path.stat().st_size
    if not is_idx(head):
        raise UserError(f"{path}: is {kind_of(head)}")
    if size > most:
        of = "×".join(map(str, shape[:2]))
        raise UserError(f"{path}: unpacks to more than {MOST_IMAGES:,} images of {of}: split the file")


def is_idx(head: bytes) -> bool:
    """Whether a file starts like IDX: two zeros, a type code, a number of dimensions."""
    return len(head) > 3 and head[:2] == b"\0\0" and 8 <= head[2] <= 14 and 1 <= head[3] <= 4


def skip(file: gzip.GzipFile, most: int) -> int:
    """Number of bytes left in a file, counted until just past `most`."""
    count = 0
    while count <= most and (part := file.read(1 << 20)):
        count += len(part)
    return count
