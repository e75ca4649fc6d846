"""Images and labels in IDX files, gzipped or not: MNIST, which ships with the package, or any set like it."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distrib.errors import UserError

SHIPPED = Path(__file__).parent / "data" / "mnist"
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

    UserError names the file and what is wrong with it: unreadable, checksum (files of the package), magic,
    size of images, truncated, over-long, or a label above 9.
    """
    kind = "images" if magic == IMAGES else "labels"
    try:
        raw = path.read_bytes()
        if path.parent == SHIPPED and hashlib.sha256(raw).hexdigest() != SHA256.get(path.name):
            raise UserError(f"{path}: SHA-256 differs from the official file's: install the package again")
        data = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {kind} are expected here, with or without .gz") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read as gzip ({error}): copy the file again") from None
    head = 4 + 4 * (magic & 0xFF)
    if len(data) < head or int.from_bytes(data[:4], "big") != magic:
        found = data[:4].hex() or "nothing"
        raise UserError(
            f"{path}: starts with {found}, IDX {kind} start with {magic:08x}: give an IDX file of {kind}"
        )
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, head, 4))
    if magic == IMAGES and shape[1:] != (SIDE, SIDE):
        raise UserError(f"{path}: images of {shape[1]}×{shape[2]}, the network takes {SIDE}×{SIDE}")
    expected = int(np.prod(shape, dtype=object))
    if len(data) - head != expected:
        state = "truncated" if len(data) - head < expected else "over-long"
        raise UserError(
            f"{path}: {state}: {len(data) - head} bytes of {kind}, the header says {expected}: copy it again"
        )
    array = np.frombuffer(data, np.uint8, offset=head).reshape(shape)
    if magic == LABELS and array.size and array.max() >= CLASSES:
        at = int(np.argmax(array >= CLASSES))
        raise UserError(f"{path}: label {array[at]} at index {at}: labels go from 0 to {CLASSES - 1}")
    return array


def _find(folder: Path, stem: str) -> Path:
    for name in (f"{stem}.gz", stem):
        if (folder / name).exists():
            return folder / name
    return folder / f"{stem}.gz"


def _part(folder: Path, prefix: str, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    image_path = _find(folder, f"{prefix}-images-idx3-ubyte")
    label_path = _find(folder, f"{prefix}-labels-idx1-ubyte")
    images, labels = read_idx(image_path, IMAGES), read_idx(label_path, LABELS)
    if len(images) != len(labels):
        raise UserError(
            f"{image_path} has {len(images)} images, {label_path.name} {len(labels)} labels: they belong to different sets"
        )
    if not len(images):
        raise UserError(f"{image_path}: holds no images")
    return images[:limit], labels[:limit]


def load(folder: str | None = None, limit_train: int | None = None, limit_test: int | None = None) -> Dataset:
    """The four files in `folder` (default: the MNIST of the package), the first `limit` of each set."""
    path = SHIPPED if folder is None else Path(folder)
    if not path.is_dir():
        raise UserError(
            f"--data {path}: no such folder; it should hold train-images-idx3-ubyte.gz and its three companions"
        )
    return Dataset(
        "MNIST (in the package)" if path == SHIPPED else str(path),
        *_part(path, "train", limit_train),
        *_part(path, "t10k", limit_test),
    )
