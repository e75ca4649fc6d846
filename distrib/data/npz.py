"""A data set in one .npz file: x_train, y_train, x_test, y_test, and class_names where it has them."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from distrib.data.dataset import Dataset, make
from distrib.data.sniff import memory
from distrib.errors import UserError
from distrib.files import printable, reason

NAMES = ("x_train", "y_train", "x_test", "y_test")


def recognises(path: Path) -> bool:
    """Whether `path` is such a file, by its name."""
    return path.suffix == ".npz" and path.is_file()


def read(path: Path) -> Dataset:
    """The data set in `path`. Nothing in it runs code: arrays of Python objects are refused."""
    try:
        with zipfile.ZipFile(path) as archive:
            held = {name.removesuffix(".npy") for name in archive.namelist()}
            if missing := [name for name in NAMES if name not in held]:
                has = printable(", ".join(sorted(held)), 200) or "nothing"
                raise UserError(
                    f"{path}: holds {has}, and no {', '.join(missing)}: give all of {', '.join(NAMES)}"
                )
            arrays = {name: _array(path, archive, name) for name in (*NAMES, *held & {"class_names"})}
    except OSError as error:
        raise UserError(f"{path}: cannot be read {reason(error, path)}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: is damaged, or no .npz file ({printable(str(error), 200)})") from None
    names = tuple(map(str, arrays["class_names"].tolist())) if "class_names" in arrays else None
    x_train, y_train, x_test, y_test = (arrays[name] for name in NAMES)
    return make(str(path), (x_train, y_train), (x_test, y_test), names)


def _array(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array; UserError where its header says more than the machine can hold, or promises objects."""
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        header = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = header(file)
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if dtype.hasobject:
            raise UserError(f"{path}: {name} holds Python objects, which are not read: give numbers or text")
        if size > memory():
            raise UserError(f"{path}: {name} has {size / 1e9:.0f} GB, more than this machine's memory")
        data = file.read(size)
        if len(data) != size or file.read(1):
            raise UserError(f"{path}: {name} is truncated or over-long: write the file again")
    array = np.frombuffer(data, dtype).reshape(shape[::-1] if fortran else shape)
    return np.ascontiguousarray(array.T) if fortran else array
