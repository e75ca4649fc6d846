"""Images and labels in IDX files, gzipped or not: MNIST, which ships with the package, or any set like it."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from distrib.data.formats import GZIP, SNIFF, Gzip, Plain, memory, what_is
from distrib.errors import UserError
from distrib.files import expanded, printable, read_bytes, reason

SHIPPED = Path(__file__).parent / "mnist"
SIDE, CLASSES = 28, 10
SHAPE = (SIDE, SIDE, 1)
TRAINING_IMAGES = 60_000  # of the set in the package
IMAGES, LABELS = 0x00000803, 0x00000801  # magic: two zero bytes, unsigned byte, number of dimensions

SHA256 = {
    "t10k-images-idx3-ubyte.gz": "1a1a05eab793c14bb050b398624a11b0ffd1a2953baed553b1b9bd079e2a20be",
    "t10k-labels-idx1-ubyte.gz": "b91679a0acfe4ba0e50a2437a903084cba1f5f92592b016a25a7dfd00455798b",
    "train-images-idx3-ubyte.gz": "0b367032e93c5d0cea0925647cfdb18614af8ee15f83e6f2fc2ad904a6835971",
    "train-labels-idx1-ubyte.gz": "1787548bbe0bff1ec2ecdc0ef292b02df999e2d1a6002d27500982c652b17203",
}

NAMES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
"""Of the four files, gzipped or not."""


@dataclass(frozen=True)
class Dataset:
    """Images uint8 (N, 28, 28) and labels uint8 (N,) of the training and the test set."""

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    def digest(self) -> str:
        """SHA-256 over all arrays."""
        sha = hashlib.sha256()
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            sha.update(f"{array.shape}".encode())
            sha.update(array.tobytes())
        return sha.hexdigest()


def read_idx(path: Path, magic: int) -> np.ndarray:
    """The array in the IDX file `path`: (N, 28, 28) for IMAGES, (N,) for LABELS, uint8.

    No more is read or inflated than the header says. UserError names the file and what is wrong with it:
    unreadable, checksum (files of the package), something else than IDX, size of images, more than the
    machine's memory holds, truncated, over-long, or a label above 9.
    """
    kind = "images" if magic == IMAGES else "labels"
    with _told(path, kind):
        raw = read_bytes(path, memory())
        if path.parent == SHIPPED and hashlib.sha256(raw).hexdigest() != SHA256.get(path.name):
            raise UserError(f"{path}: SHA-256 differs from the official file's: install the package again")
        source = Gzip(raw) if raw[:2] == GZIP else Plain(raw)
        head = source.take(4 + 4 * (magic & 0xFF))
        shape = _shape(path, magic, head, source)
        expected = prod(shape)
        _require_fit(path, kind, expected, source.most)
        data = source.take(expected)
        over = source.take(1)  # and gzip's own checksum
    if len(data) < expected or over:
        has = f"over-long: more than {expected}" if over else f"truncated: {len(data)}"
        raise UserError(f"{path}: {has} bytes of {kind}, the header says {expected}: copy it again")
    array = np.frombuffer(data, np.uint8).reshape(shape)
    if magic == LABELS and array.size and array.max() >= CLASSES:
        at = int(np.argmax(array >= CLASSES))
        raise UserError(f"{path}: label {array[at]} at index {at}: labels go from 0 to {CLASSES - 1}")
    return array


@contextmanager
def _told(path: Path, kind: str) -> Iterator[None]:
    """Context of reading `path`: what goes wrong becomes a UserError."""
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
    """What the header of an IDX file says; UserError where it is none of the right kind."""
    kind = "images" if magic == IMAGES else "labels"
    if int.from_bytes(head[:4], "big") != magic or len(head) < 4 + 4 * (magic & 0xFF):
        start = head + source.take(SNIFF)
        found = what_is(start) or f"starts with {start[:4].hex()}, IDX {kind} start with {magic:08x}"
        raise UserError(f"{path}: {found}: give an IDX file of {kind}")
    shape = tuple(int.from_bytes(head[i : i + 4], "big") for i in range(4, len(head), 4))
    if magic == IMAGES and shape[1:] != (SIDE, SIDE):
        raise UserError(f"{path}: images of {shape[1]}×{shape[2]}, the network takes {SIDE}×{SIDE}")
    return shape


def _require_fit(path: Path, kind: str, expected: int, most: int) -> None:
    """UserError where the header says more than the file can hold, or the machine."""
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
    """Files of `folder` that are called `name`, in other case, with dots for dashes, gzipped; likeliest first."""
    wanted = name.lower().replace("-", ".")
    found = []
    for entry in sorted(os.listdir(folder)):
        plain = entry.lower().removesuffix(".gz").replace("-", ".")
        if plain == wanted:
            path = folder / entry
            try:
                empty = not path.stat().st_size
            except OSError:
                empty = False  # told when it is read
            found.append((empty, entry not in (f"{name}.gz", name), not entry.lower().endswith(".gz"), path))
    return [path for *_, path in sorted(found)]


def _find(folder: Path, name: str) -> Path:
    """The file `name` in a folder, however it is spelled; UserError says what is there instead."""
    if found := _variants(folder, name):
        return found[0]
    entries = sorted(os.listdir(folder))
    shown = ", ".join(printable(entry, 40) for entry in entries[:5]) or "nothing"
    more = f" and {len(entries) - 5} more" if len(entries) > 5 else ""
    raise UserError(
        f"{folder / name}: no such file, with or without .gz, is there: found {shown}{more};"
        f" expected {', '.join(NAMES)}"
    )


def _folder(path: Path) -> Path:
    """The folder that holds the files: the one given, or the one below it in which torchvision keeps them."""
    os.listdir(path)
    if _variants(path, NAMES[0]):
        return path
    below = [place for place in (path / "raw", *sorted(path.glob("*/raw"))) if os.path.isdir(place)]
    held = [place for place in below if _variants(place, NAMES[0])]
    if len(held) > 1:
        raise UserError(f"--data {path}: holds several data sets: give one of {', '.join(map(str, held))}")
    return held[0] if held else path


def _part(folder: Path, prefix: str, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    image_path = _find(folder, f"{prefix}-images-idx3-ubyte")
    label_path = _find(folder, f"{prefix}-labels-idx1-ubyte")
    images, labels = read_idx(image_path, IMAGES), read_idx(label_path, LABELS)
    if len(images) != len(labels):
        raise UserError(
            f"{image_path} has {len(images)} images, {label_path.name} {len(labels)} labels:"
            " they belong to different sets"
        )
    if not len(images):
        raise UserError(f"{image_path}: holds no images")
    return images[:limit], labels[:limit]


def load(folder: str | None = None, limit_train: int | None = None, limit_test: int | None = None) -> Dataset:
    """The four files in `folder` (default: the MNIST of the package), the first `limit` of each set."""
    path = SHIPPED if folder is None else expanded(folder, "--data")
    try:
        held = path if path == SHIPPED else _folder(path)
        return Dataset(
            "MNIST (in the package)" if path == SHIPPED else str(held),
            *_part(held, "train", limit_train),
            *_part(held, "t10k", limit_test),
        )
    except FileNotFoundError:
        raise UserError(
            f"--data {path}: no such folder; it should hold {NAMES[0]}.gz and its three companions"
        ) from None
    except NotADirectoryError:
        raise UserError(f"--data {path}: is no folder: give the one that holds {NAMES[0]}.gz") from None
    except OSError as error:
        raise UserError(f"--data {path}: cannot be read {reason(error, path)}") from None
