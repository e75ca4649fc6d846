"""Loads a data set of any known format."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import ModuleType

from distrib.data import cache, cifar, idx, npz, pictures, synthetic, unknown
from distrib.data.dataset import Dataset, Reading
from distrib.errors import UserError
from distrib.files import alternatives, expanded, reason, shown

FORMATS: dict[str, ModuleType] = {
    "a folder of IDX files (train-images-idx3-ubyte.gz and its three companions)": idx,
    "a folder of CIFAR-10's or CIFAR-100's binary files": cifar,
    "a folder of pictures by class (train/NAME/*, test/NAME/*)": pictures,
    "an .npz file with x_train, y_train, x_test, y_test": npz,
}
"""Formats that --data takes: modules with `recognises(path)`, `read(path, reading)`, READING its options."""


def load(
    data: str | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
    reading: Reading = Reading(),  # noqa: B008  # it cannot change
) -> Dataset:
    """Load the first images of the data set that --data names; by default MNIST, which the package holds."""
    if data is None:
        _require_taken(reading, ())
        found = idx.read(idx.SHIPPED, reading, limit_train, limit_test)
    else:
        found = _whole(data, reading)
    return found.first(limit_train, limit_test)


def _form(path: Path) -> ModuleType | None:
    """The first format that recognises `path`."""
    return next((form for form in FORMATS.values() if form.recognises(path)), None)


def taken(data: str, reading: Reading) -> Reading:
    """Those of `reading` that the format of `data` has a use for."""
    form = _form(Path(data)) if Path(data).exists() else None
    names = form.READING if form else ()
    return Reading(**{name: value for name, value in reading._asdict().items() if name in names})


def _require_taken(reading: Reading, taken: tuple[str, ...]) -> None:
    """UserError for an option that the format has no use for."""
    for name, value in reading._asdict().items():
        if value and name not in taken:
            known = (form for form, module in FORMATS.items() if name in module.READING)
            raise UserError(
                f"--{name}{'' if value is True else f' {shown(value)}'}: is for {alternatives([*known])}:"
                " leave it out"
            )


def _whole(data: str, reading: Reading) -> Dataset:
    if synthetic.recognises(data):
        _require_taken(reading, ())
        return synthetic.read(data)
    path = expanded(data, "--data")
    try:
        if not path.exists():
            raise UserError(f"--data {path}: no such folder or file; give {', or '.join(FORMATS)}")
        form = _form(path)
        if form is None:
            found = unknown.instead(path, lambda each: _form(each) is not None, FORMATS)
            raise UserError(f"--data {path}: {found}")
        _require_taken(reading, form.READING)
        return cache.through(path, reading, form is pictures, partial(form.read, path, reading))
    except OSError as error:
        raise UserError(f"--data {path}: cannot be read {reason(error, path)}") from None
