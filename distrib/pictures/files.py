"""Reads picture files as small upright sheets of light, in bounded memory."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from distrib.errors import UserError

T = TypeVar("T")

FORMATS = ("PNG", "JPEG", "GIF", "TIFF", "BMP", "DIB", "WEBP", "PPM", "ICO", "AVIF", "JPEG2000", "QOI")
"""Formats that are opened. Others are rare, and EPS would start Ghostscript."""

MOST_BYTES = 180_000_000
"""Memory that a decoded picture may take."""
MOST_PIXELS = 178_000_000
"""Pixels of a picture, so that reading it takes seconds; twice Pillow's limit is 179."""
MOST_PAGES = 1000
WORK_PIXELS = 1_000_000
"""Most pixels of a sheet."""
STRIP_BYTES = 4_000_000

BROKEN = (
    *(OSError, ValueError, SyntaxError, ArithmeticError, LookupError, TypeError, AttributeError),
    *(struct.error, zlib.error),
)
"""What Pillow raises on damaged files."""


@dataclass(frozen=True)
class Sheet:
    """One upright picture: float32 light (H, W, C) in [0, 1], C 1 or 3; opacity (H, W) if it has some."""

    light: np.ndarray
    alpha: np.ndarray | None
    size: tuple[int, int]  # (width, height) in the file


def luminance(light: np.ndarray) -> np.ndarray:
    return light[..., 0] if light.shape[2] == 1 else light @ np.array([0.299, 0.587, 0.114], np.float32)


def pixels_of(sheet: Sheet, channels: int | None = None) -> np.ndarray:
    """uint8 (H, W, C) of a sheet, on black if transparent; C is its own, or `channels`, 1 or 3."""
    light = luminance(sheet.light)[..., None] if channels == 1 else sheet.light
    if sheet.alpha is not None:
        light = light * sheet.alpha[..., None]
    shape = (*light.shape[:2], channels or light.shape[2])
    return np.round(255 * np.broadcast_to(light, shape)).astype(np.uint8)


def deep_pixels(path: Path) -> np.ndarray | None:
    """The upper 8 of a grey picture's 16 bits, (H, W, 1), upright; None for others, bad ones too.

    UserError for more bits, as nobody knows then what is white.
    """
    Image.init()
    mode, known = "", [name for name in FORMATS if name in Image.OPEN]
    with suppress(*BROKEN, Image.DecompressionBombError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path, formats=known) as picture:
            mode = picture.mode
            if mode.startswith("I;16") and picture.size[0] * picture.size[1] <= MOST_PIXELS:
                return (np.asarray(ImageOps.exif_transpose(picture)) >> 8).astype(np.uint8)[..., None]
    if mode in ("I", "F"):
        raise UserError(f"{path}: has more than 16 bits a pixel: save it with 8, black 0 and white 255")
    return None


def read_sheets(path: Path, use: Callable[[Sheet], T]) -> list[T] | None:
    """Call `use` on each page of a picture file; returns the results, or None if it is no picture."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder: give the files in it, {path}/*")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no regular file: save the picture in one")
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    with _user_errors(path):
        file = path.open("rb")
    with file:
        try:
            with _user_errors(path):
                pages = _pages(path, Image.open(file, formats=known), file)
        except UnidentifiedImageError:
            return None
        results: list[T] = []
        while True:
            with _user_errors(path):
                page = next(pages, None)
            if page is None:
                return results
            results.append(use(page))


@contextmanager
def _user_errors(path: Path) -> Iterator[None]:
    """Context in which Pillow's errors on a bad file become UserErrors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures and odd metadata; errors stay errors
            yield
    except (UserError, UnidentifiedImageError):
        raise
    except Image.DecompressionBombError:
        raise UserError(f"{path}: holds more than {MOST_PIXELS // 10**6} megapixels: scale it down") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give PNG or other pictures, or IDX files") from None
    except PermissionError:
        raise UserError(f"{path}: may not be read: change its permissions") from None
    except MemoryError:
        raise UserError(f"{path}: takes more memory than there is: scale it down") from None
    except BROKEN as error:
        raise UserError(
            f"{path}: cannot be read as a picture ({error}): copy it again, or save it as PNG"
        ) from None


def _pages(path: Path, picture: Any, file: BinaryIO) -> Iterator[Sheet]:
    count = getattr(picture, "n_frames", 1)
    if picture.format != "TIFF":
        if count > 1 and picture.format in ("GIF", "PNG", "WEBP", "AVIF"):
            raise UserError(f"{path}: an animation of {count} frames: save one of them as PNG")
        count = 1  # other pictures in a JPEG or an icon are versions of the first
    if count > MOST_PAGES:
        raise UserError(f"{path}: {count} pages, at most {MOST_PAGES} are taken: split the file")
    pixels = 0
    for page in range(count):
        if count > 1:
            picture.seek(page)
            if page and picture.tag_v2.get(254, 0) & 1:  # a smaller version of another page
                continue
        pixels += picture.size[0] * picture.size[1]
        if pixels > MOST_PIXELS:
            raise _too_large(path, picture, MOST_PIXELS)
        yield _sheet(path, picture, file)


def _sheet(path: Path, picture: Any, file: BinaryIO) -> Sheet:
    """Decode a page, reduced while it is decoded."""
    width, height = picture.size
    step = max(1, int(np.sqrt(width * height / WORK_PIXELS)))
    if picture.format == "JPEG" or picture.format == "MPO":
        coefficients = 2 * sum(h * v for _, h, v, _ in picture.layer) if "progressive" in picture.info else 0
        most = max((h * v for _, h, v, _ in picture.layer), default=1)
        _check_memory(path, picture, coefficients / most + 4 / min(step, 8) ** 2)
        picture.draft(None, (max(1, width // step), max(1, height // step)))
        step = max(1, round(step * picture.size[0] / width))
        strips: Iterator[Any] = _cut(picture, step)
    elif picture.format == "PNG" and width * height > 16 * WORK_PIXELS and _plain_png(file):
        strips = _png_strips(file, step)
    else:
        _check_memory(path, picture, _bytes_a_pixel(picture))
        strips = _cut(picture, step)
    light, alpha, exif = _join(strips, step)
    orientation = exif if exif is not None else picture.getexif().get(0x0112, 1)
    return Sheet(
        _turned(light, orientation),
        None if alpha is None else _turned(alpha, orientation),
        (width, height),
    )


def _too_large(path: Path, picture: Any, most: float) -> UserError:
    size = f"{picture.size[0]}×{picture.size[1]}"
    return UserError(
        f"{path}: {size} pixels; of this kind ({picture.format}, {picture.mode}) at most"
        f" {most / 1e6:.0f} megapixels are taken: scale it down"
    )


def _bytes_a_pixel(picture: Any) -> float:
    plain = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}.get(picture.mode, 4)
    return plain * {"WEBP": 2, "AVIF": 2, "JPEG2000": 4, "GIF": 2}.get(picture.format, 1)


def _check_memory(path: Path, picture: Any, bytes_a_pixel: float) -> None:
    if picture.size[0] * picture.size[1] * bytes_a_pixel > MOST_BYTES:
        raise _too_large(path, picture, MOST_BYTES / bytes_a_pixel)


def _cut(picture: Any, step: int) -> Iterator[Any]:
    """Cut a picture into strips of whole steps, so that only one strip at a time is converted."""
    picture.load()
    width, height = picture.size
    rows = max(step, STRIP_BYTES // (4 * width) // step * step)
    for y in range(0, height, rows):
        strip = picture.crop((0, y, width, min(height, y + rows)))
        strip.info = picture.info
        yield strip


def _join(strips: Iterator[Any], step: int) -> tuple[np.ndarray, np.ndarray | None, int | None]:
    """Light and opacity of all strips, averaged over step × step pixels, and the EXIF orientation."""
    parts, exif = [], None
    for strip in strips:
        if isinstance(strip, int):
            exif = strip
        else:
            parts.append(_reduced(strip, step))
    whole = np.concatenate(parts)
    if whole.shape[2] == 1 and whole.dtype == np.float32:
        whole = np.nan_to_num(whole, nan=0.0, posinf=0.0, neginf=0.0)
        low, high = float(whole.min()), float(whole.max())
        return (whole - low) / max(high - low, 1e-30), None, exif
    scaled = whole.astype(np.float32) / 255
    channels = scaled.shape[2]
    alpha = scaled[..., -1] if channels in (2, 4) and scaled[..., -1].min() < 0.98 else None
    return scaled[..., : 1 if channels < 3 else 3], alpha, exif


def _reduced(strip: Any, step: int) -> np.ndarray:
    """Pixels (h, w, C): uint8 for L, RGB or RGBA, float32 for modes with other numbers."""
    if strip.mode.startswith(("I", "F")):
        values = np.asarray(strip).astype(np.float32)
        return _block_means(values, step)[..., None]
    if "transparency" in strip.info or strip.mode in ("PA", "LA", "La", "RGBa", "RGBA"):
        strip = strip.convert("RGBA")
    elif strip.mode in ("1", "L"):
        strip = strip.convert("L")
    else:
        strip = strip.convert("RGB")
    pixels = np.asarray(strip.reduce(step) if step > 1 else strip)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _block_means(values: np.ndarray, step: int) -> np.ndarray:
    for axis in (0, 1):
        starts = np.arange(0, values.shape[axis], step)
        counts = np.diff(np.append(starts, values.shape[axis])).astype(np.float32)
        values = np.add.reduceat(values, starts, axis) / (counts[:, None] if axis == 0 else counts)
    return values


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn pixels upright, by EXIF's orientation 1 to 8."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


# --- large PNG pictures --------------------------------------------------------------------------------


def _plain_png(file: BinaryIO) -> bool:
    """Whether a PNG file has 8 bits a sample and is not interlaced."""
    file.seek(0)
    head = file.read(29)
    return head[24] == 8 and head[28] == 0


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    file.seek(8)
    while len(head := file.read(8)) == 8:
        size, name = int.from_bytes(head[:4], "big"), head[4:]
        while size and name == b"IDAT":
            part = file.read(min(size, 1 << 16))
            if not part:
                raise OSError("image file is truncated")
            size -= len(part)
            yield name, part
        if name != b"IDAT":
            if size > 1 << 24:
                raise OSError(f"a chunk {name!r} of {size} bytes")
            yield name, file.read(size)
        file.read(4)


def _png_strips(file: BinaryIO, step: int) -> Iterator[Any]:
    """Cut a PNG into strips, each a small PNG for Pillow, so that only one strip at a time is in memory.

    PNG stores a row as its difference from the row above, so a strip starts with the last row of the strip
    before it.
    """
    about, orientation, before, waiting = b"", None, b"", b""
    unpack = zlib.decompressobj()
    for name, data in _chunks(file):
        if name == b"IHDR":
            width, height = struct.unpack(">II", data[:8])
            header = data
            row = width * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[data[9]]
            rows = max(step, STRIP_BYTES // row // step * step)
            left = height
        elif name in (b"PLTE", b"tRNS"):
            about += _chunk(name, data)
        elif name == b"eXIf":
            exif = Image.Exif()
            exif.load(data)
            orientation = exif.get(0x0112)
        while name == b"IDAT" and data and left:
            waiting += unpack.decompress(data, 1 << 20)
            data = unpack.unconsumed_tail
            while left and len(waiting) >= (count := min(rows, left)) * (row + 1):
                used = count * (row + 1)
                strip = _small_png(header, about, b"\0" * bool(before) + before + waiting[:used])
                strip = strip.crop((0, bool(before), width, count + bool(before)))
                last = strip.crop((0, count - 1, width, count))
                before, waiting, left = last.tobytes(), waiting[used:], left - count
                yield strip
    if left:
        raise OSError("image file is truncated")
    yield int(orientation or 1)  # Pillow would unpack the whole picture to look for it


def _small_png(header: bytes, about: bytes, rows: bytes) -> Any:
    width = int.from_bytes(header[:4], "big")
    height = len(rows) // (width * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[header[9]] + 1)
    head = header[:4] + struct.pack(">I", height) + header[8:]
    data = (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", head)
        + about
        + _chunk(b"IDAT", zlib.compress(rows, 0))
        + _chunk(b"IEND", b"")
    )
    picture = Image.open(BytesIO(data), formats=("PNG",))
    picture.load()
    strip = picture.copy()
    strip.info = picture.info
    return strip


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
