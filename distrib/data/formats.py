"""Loads a data set of any known format."""

from __future__ import annotations

from types import ModuleType

from distrib.data import cifar, idx, npz, pictures, synthetic
from distrib.data.dataset import Dataset
from distrib.errors import UserError
from distrib.files import expanded, reason

FORMATS: dict[str, ModuleType] = {
    "a folder of IDX files (train-images-idx3-ubyte.gz and its three companions)": idx,
    "a folder of CIFAR-10's or CIFAR-100's binary files": cifar,
    "a folder of pictures by class (train/NAME/*, test/NAME/*)": pictures,
    "an .npz file with x_train, y_train, x_test, y_test": npz,
}
"""Formats that --data takes: modules with `recognises(path)` and `read(path)`."""


def load(data: str | None = None, limit_train: int | None = None, limit_test: int | None = None) -> Dataset:
    """Load the first images of the data set that --data names; by default MNIST, which the package holds."""
    found = idx.read(idx.SHIPPED, limit_train, limit_test) if data is None else _whole(data)
    return found.first(limit_train, limit_test)


def _whole(data: str) -> Dataset:
    if synthetic.recognises(data):
        return synthetic.read(data)
    path = expanded(data, "--data")
    try:
        if not path.exists():
            raise UserError(f"--data {path}: no such folder or file; give {', or '.join(FORMATS)}")
        form = next((form for form in FORMATS.values() if form.recognises(path)), None)
        if form is None and path.is_file():
            raise UserError(f"--data {path}: is no data set: give {', or '.join(FORMATS)}")
        found: Dataset = (form or idx).read(path)  # idx reports what the folder holds instead
        return found
    except OSError as error:
        raise UserError(f"--data {path}: cannot be read {reason(error, path)}") from None
