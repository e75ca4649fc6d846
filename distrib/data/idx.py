"""Reads images and labels from IDX files, gzipped or not: the package's MNIST, EMNIST and others."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import numpy as np

from distrib.data.dataset import Dataset, Reading, make
from distrib.data.sniff import GZIP, SNIFF, Gzip, Plain, memory, what_is
from distrib.errors import UserError
from distrib.files import printable, read_bytes, reason

SHIPPED = Path(__file__).parent / "mnist"
LEAST_CLASSES = 10
"""Number of classes of a set that has images of fewer, as a small part of MNIST may."""

IMAGES, COLOURED, LABELS = (
    0x00000803,
    0x00000804,
    0x00000801,
)  # magic: two zero bytes, unsigned byte, number of dimensions

SHA256 = {
    "t10k-images-idx3-ubyte.gz": "1a1a05eab793c14bb050b398624a11b0ffd1a2953baed553b1b9bd079e2a20be",
    "t10k-labels-idx1-ubyte.gz": "b91679a0acfe4ba0e50a2437a903084cba1f5f92592b016a25a7dfd00455798b",
    "train-images-idx3-ubyte.gz": "0b367032e93c5d0cea0925647cfdb18614af8ee15f83e6f2fc2ad904a6835971",
    "train-labels-idx1-ubyte.gz": "1787548bbe0bff1ec2ecdc0ef292b02df999e2d1a6002d27500982c652b17203",
}

READING = ("split",)

MERGED = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"
CLASSES = {
    "letters": "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "byclass": "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz",
    "bymerge": MERGED,
    "balanced": MERGED,
}
"""Of EMNIST's splits that are no digits, by label (Cohen et al. 2017, table 2); letters count from 1."""

NAMES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
"""Names of the four files, without .gz; images of several channels are idx4."""


def read_idx(path: Path, magic: int, limit: int | None = None) -> np.ndarray:
    """Read an IDX file: uint8 (N, H, W) for IMAGES, (N, H, W, C) for COLOURED, (N,) for LABELS.

    Reads and inflates no more than the header says; of the package's files, which a checksum vouches for, no
    more than `limit` items. UserError if the file is unreadable, differs from its checksum, is not IDX,
    exceeds the machine's memory, or is truncated or over-long.
    """
    kind = "labels" if magic == LABELS else "images"
    with _user_errors(path, kind):
        raw, is_shipped = read_bytes(path, memory()), path.parent == SHIPPED
        if is_shipped and hashlib.sha256(raw).hexdigest() != SHA256.get(path.name):
            raise UserError(f"{path}: SHA-256 differs from the official file's: install the package again")
        source = Gzip(raw) if raw[:2] == GZIP else Plain(raw)
        head = source.take(4 + 4 * (magic & 0xFF))
        shape = _shape(path, magic, head, source)
        if is_shipped and limit is not None and limit < shape[0]:
            shape = limit, *shape[1:]
            return np.frombuffer(source.take(prod(shape)), np.uint8).reshape(shape)
        expected = prod(shape)
        _require_fit(path, kind, expected, source.most)
        data = source.take(expected)
        over = source.take(1)  # also checks gzip's checksum
    if len(data) < expected or over:
        has = f"over-long: more than {expected}" if over else f"truncated: {len(data)}"
        raise UserError(f"{path}: {has} bytes of {kind}, the header says {expected}: copy it again")
    return np.frombuffer(data, np.uint8).reshape(shape)


def read_images(path: Path, limit: int | None = None) -> np.ndarray:
    """The images of an IDX file, upright: EMNIST's, which their name tells, lie transposed."""
    images = read_idx(path, COLOURED if "idx4" in path.name.lower() else IMAGES, limit)
    is_emnist = path.name.lower().startswith("emnist")
    return np.ascontiguousarray(images.swapaxes(1, 2)) if is_emnist else images


@contextmanager
def _user_errors(path: Path, kind: str) -> Iterator[None]:
    """Context in which errors of reading `path` become UserErrors."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {kind} are expected here, with or without .gz") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read {reason(error, path)}") from None
    except EOFError:
        raise UserError(
            f"{path}: is a truncated gzip file (a download that broke off?): copy the file again"
        ) from None
    except zlib.error as error:
        raise UserError(f"{path}: cannot be read as gzip ({error}): copy the file again") from None
    except MemoryError:
        raise UserError(f"{path}: needs more memory than there is: give a smaller set") from None
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error}): give an IDX file of {kind}") from None


def _shape(path: Path, magic: int, head: bytes, source: Plain | Gzip) -> tuple[int, ...]:
    """The shape in the header of an IDX file; UserError if it is not of the right kind."""
    kind = "labels" if magic == LABELS else "images"
    if int.from_bytes(head[:4], "big") != magic or len(head) < 4 + 4 * (magic & 0xFF):
        start = head + source.take(SNIFF)
        found = what_is(start) or f"starts with {start[:4].hex()}, IDX {kind} start with {magic:08x}"
        remedy, held = f"give an IDX file of {kind}", int.from_bytes(head[:4], "big")
        if held == magic:
            found, remedy = "is cut within its header", f"copy it again, or {remedy}"
        elif {held, magic} == {IMAGES, COLOURED}:
            remedy = "name it idx4 if its images have channels, else idx3"
        raise UserError(f"{path}: {found}: {remedy}")
    return tuple(int.from_bytes(head[i : i + 4], "big") for i in range(4, len(head), 4))


def _require_fit(path: Path, kind: str, expected: int, most: int) -> None:
    """UserError if the header asks for more than the file, or this machine's memory, can hold."""
    if expected > most:
        raise UserError(
            f"{path}: truncated: the header says {expected} bytes of {kind}, and the file cannot hold more"
            f" than {most}: copy it again"
        )
    if expected > memory():
        raise UserError(
            f"{path}: {expected / 1e9:.0f} GB of {kind}, and this machine has {memory() / 1e9:.0f} GB"
            " of memory: give a smaller set"
        )


def _variants(folder: Path, name: str) -> list[Path]:
    """Files in `folder` with this name, in any case, with dots or dashes, with or without .gz; best first."""
    wanted = _plain(name)
    found = []
    for entry in sorted(os.listdir(folder)):
        if _plain(entry) == wanted:
            path = folder / entry
            try:
                empty = not path.stat().st_size
            except OSError:
                empty = False  # reported when it is read
            found.append((empty, entry not in (f"{name}.gz", name), not entry.lower().endswith(".gz"), path))
    return [path for *_, path in sorted(found)]


def _plain(entry: str) -> str:
    return entry.lower().removesuffix(".gz").replace("-", ".")


def _prefixes(folder: Path) -> list[str]:
    """What precedes train-images-idx3-ubyte in file names: "" for MNIST, "emnist-letters-", …"""
    endings = _plain("train-images-idx3-ubyte"), _plain("train-images-idx4-ubyte")
    names = [entry for entry in os.listdir(folder) if _plain(entry).endswith(endings) and entry[0] != "."]
    return sorted({entry[: len(_plain(entry)) - len(endings[0])] for entry in names})


def _find(folder: Path, *names: str) -> Path:
    """The file in a folder with one of these names, in any spelling; UserError lists what is there."""
    if found := [path for name in names for path in _variants(folder, name)]:
        return found[0]
    entries = sorted(os.listdir(folder))
    shown = ", ".join(printable(entry, 40) for entry in entries[:5]) or "nothing"
    more = f" and {len(entries) - 5} more" if len(entries) > 5 else ""
    raise UserError(
        f"{folder / names[0]}: no such file, with or without .gz, is there: found {shown}{more};"
        f" expected {', '.join(NAMES)}"
    )


def _folder(path: Path) -> Path:
    """The folder with the files: `path`, or torchvision's raw/ below it."""
    os.listdir(path)
    if _prefixes(path):
        return path
    below = [place for place in (path / "raw", *sorted(path.glob("*/raw"))) if os.path.isdir(place)]
    held = [place for place in below if _prefixes(place)]
    if len(held) > 1:
        raise UserError(f"--data {path}: holds several data sets: give one of {', '.join(map(str, held))}")
    return held[0] if held else path


def _part(folder: Path, limit: int | None, *names: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels from the files whose names start with one of `names`; `limit` as in `read_idx`."""
    image_path = _find(folder, *(f"{name}-images-idx{axes}-ubyte" for axes in (3, 4) for name in names))
    label_path = _find(folder, *(f"{name}-labels-idx1-ubyte" for name in names))
    images, labels = read_images(image_path, limit), read_idx(label_path, LABELS, limit)
    if len(images) != len(labels):
        raise UserError(
            f"{image_path} has {len(images)} images, {label_path.name} {len(labels)} labels:"
            " they belong to different sets"
        )
    if not len(images):
        raise UserError(f"{image_path}: holds no images: give another set")
    return images, labels


def recognises(path: Path) -> bool:
    """Whether a folder, or raw/ below it, holds IDX files, at least some of them."""
    return path.is_dir() and any("ubyte" in entry.lower() for entry in os.listdir(_folder(path)))


def read(
    path: Path,
    reading: Reading = Reading(),  # noqa: B008  # it cannot change
    train: int | None = None,
    test: int | None = None,
) -> Dataset:
    """Read the data set in a folder, with MNIST's four file names or EMNIST's with one prefix.

    `train` and `test` are as many images as are wanted: of the package's own, the others are not inflated.
    """
    held = _folder(path)
    prefix = _prefix(held, reading.split)
    parts = _part(held, train, f"{prefix}train"), _part(held, test, f"{prefix}t10k", f"{prefix}test")
    name = "MNIST (in the package)" if held == SHIPPED else str(held)
    if not prefix.lower().startswith("emnist"):
        return make(name, *parts, least=LEAST_CLASSES)
    split = prefix.strip("-.").lower().partition("emnist-")[2]
    return _emnist(f"{name} ({split})", split, parts)


def _prefix(held: Path, split: str | None) -> str:
    """What precedes the file names of the data set that is meant; UserError where several may be."""
    prefixes = _prefixes(held)
    if split is None and "" in prefixes:
        return ""  # MNIST's own names win
    if split is not None:
        prefixes = [each for each in prefixes if each.strip("-.").lower().rpartition("-")[2] == split.lower()]
    shown = ", ".join(printable(each.strip("-."), 40) or "MNIST's names" for each in _prefixes(held))
    if split is not None and len(prefixes) != 1:
        raise UserError(f"--split {printable(split, 40)}: {held} holds {shown or 'no IDX files'}: give one")
    if len(prefixes) > 1:
        raise UserError(f"--data {held}: holds several data sets ({shown}): give one with --split")
    return prefixes[0] if prefixes else ""


def _emnist(name: str, split: str, parts: tuple[tuple[np.ndarray, np.ndarray], ...]) -> Dataset:
    """EMNIST by the names of its classes: its letters are numbered from 1."""
    names = CLASSES.get(split, "0123456789")
    first = int(split == "letters")
    counted = []
    for images, labels in parts:
        if first and not labels.all():
            raise UserError(f"{name}: has a label 0, and EMNIST's letters start at 1: copy the files again")
        counted.append((images, labels - np.uint8(first)))
    return make(name, counted[0], counted[1], tuple(names))
