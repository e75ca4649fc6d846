"""Reads a data set from an .npz file: x_train, y_train, x_test, y_test, and optionally class_names."""

from __future__ import annotations

import zipfile
from math import prod
from pathlib import Path

import numpy as np

from distrib.data.dataset import Dataset, Reading, make
from distrib.data.sniff import memory
from distrib.errors import UserError
from distrib.files import printable, reason

NAMES = ("x_train", "y_train", "x_test", "y_test")


READING = ()


def recognises(path: Path) -> bool:
    """Whether `path` is an .npz file, by its name."""
    return path.suffix.lower() == ".npz" and path.is_file()


def read(path: Path, _: Reading = Reading()) -> Dataset:  # noqa: B008  # it cannot change
    """Read the data set in `path`. Refuses arrays of Python objects, which could run code."""
    try:
        with zipfile.ZipFile(path) as archive:
            held = {entry.removesuffix(".npy"): entry for entry in archive.namelist()}
            if missing := [name for name in NAMES if name not in held]:
                has = printable(", ".join(sorted(held)), 200) or "nothing"
                raise UserError(
                    f"{path}: holds {has}, and no {', '.join(missing)}: give all of {', '.join(NAMES)}"
                )
            wanted = (*NAMES, *held.keys() & {"class_names"})
            arrays = {name: _array(path, archive, name, held[name]) for name in wanted}
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read {reason(error, path)}") from None
    except Exception as error:  # whatever the parsers of zip files and of NumPy's headers raise
        what = printable(f"{type(error).__name__}: {error}".splitlines()[0], 100)
        raise UserError(f"{path}: is damaged, or no .npz file ({what}): write it with np.savez") from None
    x_train, y_train, x_test, y_test = (arrays[name] for name in NAMES)
    return make(str(path), (x_train, y_train), (x_test, y_test), _names(path, arrays.get("class_names")))


def _names(path: Path, array: np.ndarray | None) -> tuple[str, ...] | None:
    if array is None:
        return None
    if array.ndim != 1 or array.dtype.kind not in "US" or not array.size:
        raise UserError(f"{path}: class_names is {array.dtype} of shape {array.shape}: give a list of texts")
    found = array.tolist()
    return tuple(each.decode(errors="replace") if isinstance(each, bytes) else each for each in found)


def _array(path: Path, archive: zipfile.ZipFile, name: str, entry: str) -> np.ndarray:
    """Read one array; UserError if it exceeds this machine's memory or holds Python objects."""
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        headers = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
        shape, fortran, dtype = headers[version != (1, 0)](file)
        size = prod(shape) * dtype.itemsize
        if dtype.hasobject:
            raise UserError(f"{path}: {name} holds Python objects, which are not read: give numbers or text")
        if min(shape, default=0) < 0 or size > memory():
            what = f"{size / 1e9:.0f} GB, more than this machine's memory"
            raise UserError(f"{path}: {name} has {what}: give a smaller set")
        data = file.read(size)
        if len(data) != size or file.read(1):
            raise UserError(f"{path}: {name} is truncated or over-long: write the file again")
    array = np.frombuffer(data, dtype).reshape(shape[::-1] if fortran else shape)
    return np.ascontiguousarray(array.T) if fortran else array
