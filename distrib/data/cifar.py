"""Reads CIFAR-10 and CIFAR-100 in their binary versions: records of labels, then 32×32 pixels by plane.

Krizhevsky (2009); the files are those of cifar-10-binary.tar.gz and cifar-100-binary.tar.gz, unpacked.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distrib.data.dataset import Dataset, Reading, make
from distrib.data.sniff import memory
from distrib.errors import UserError
from distrib.files import printable, read_bytes, reason

SIDE, PIXELS = 32, 3 * 32 * 32
TEN = [f"data_batch_{i}.bin" for i in range(1, 6)]
LAYOUTS = {  # name: (training files, test file, names of the classes, labels of a record)
    "CIFAR-10": (TEN, "test_batch.bin", "batches.meta.txt", 1),
    "CIFAR-100": (["train.bin"], "test.bin", "fine_label_names.txt", 2),  # coarse, then fine
}


READING = ()


def recognises(path: Path) -> bool:
    """Whether a folder holds CIFAR files."""
    return path.is_dir() and _layout(path) is not None


def _layout(path: Path) -> str | None:
    return next(
        (
            name
            for name, (train, test, *_) in LAYOUTS.items()
            if any((path / each).exists() for each in (*train, test))
        ),
        None,
    )


def read(path: Path, _: Reading = Reading()) -> Dataset:  # noqa: B008  # it cannot change
    """Read the data set in a folder, with the names of its classes if their file is there."""
    name = _layout(path) or "CIFAR-10"
    train, test, names, labels = LAYOUTS[name]
    parts = [_records(path / each, labels) for each in train]
    images, wanted = (np.concatenate(each) for each in zip(*parts, strict=True))
    classes = 10 if labels == 1 else 100
    return make(
        f"{name} in {path}",
        (images, wanted),
        _records(path / test, labels),
        _names(path / names, classes) or tuple(map(str, range(classes))),
    )


def _records(path: Path, labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 32, 32, 3) and the last label of each record."""
    try:
        data = read_bytes(path, memory())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read {reason(error, path)}") from None
    size = labels + PIXELS
    if not data or len(data) % size:
        raise UserError(f"{path}: {len(data)} bytes are no whole number of records of {size}: copy it again")
    records = np.frombuffer(data, np.uint8).reshape(-1, size)
    images = records[:, labels:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, labels - 1].copy()


def _names(path: Path, classes: int) -> tuple[str, ...] | None:
    try:
        lines = read_bytes(path, 1 << 16).decode(errors="replace").split("\n")
    except (OSError, ValueError):
        return None
    found = tuple(printable(line.strip(), len(line)) for line in lines if line.strip())
    return found if len(found) == classes else None
