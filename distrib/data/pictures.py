"""A folder of pictures by class: train/NAME/* and test/NAME/*, all of one size."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from distrib.data.dataset import Dataset, make
from distrib.errors import UserError
from distrib.files import printable, reason

MODES = {"1": "L", "L": "L", "I;16": "L"}
"""Pillow's modes of one channel; every other becomes RGB."""


def recognises(path: Path) -> bool:
    """Whether a folder holds train/ and test/."""
    return (path / "train").is_dir() and (path / "test").is_dir()


def read(path: Path) -> Dataset:
    """The data set in a folder; a class is a folder in train/, and its label the place among their names."""
    names = sorted(each.name for each in (path / "train").iterdir() if each.is_dir())
    if not names:
        raise UserError(f"{path / 'train'}: holds no folders: give one for each class")
    unknown = sorted({each.name for each in (path / "test").iterdir() if each.is_dir()} - set(names))
    if unknown:
        raise UserError(f"{path / 'test' / unknown[0]}: there is no such class in train/: add it there")
    train, test = (_part(path / part, names) for part in ("train", "test"))
    if train[0].shape[-1] != test[0].shape[-1]:  # one of them in colour
        train, test = ((np.repeat(x, 3, -1) if x.shape[-1] == 1 else x, y) for x, y in (train, test))
    return make(str(path), train, test, tuple(printable(name, 60) for name in names))


def _part(folder: Path, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W, C) and labels (N,); grey where all are grey, else in colour."""
    files = [
        (file, label)
        for label, name in enumerate(names)
        if (folder / name).is_dir()
        for file in sorted((folder / name).iterdir())
        if file.is_file() and not file.name.startswith(".")
    ]
    if not files:
        raise UserError(f"{folder}: holds no pictures: put them into {folder / names[0]} and the like")
    images = [_picture(file) for file, _ in files]
    first = images[0].shape[:2]
    for (file, _), image in zip(files, images, strict=True):
        if image.shape[:2] != first:
            raise UserError(
                f"{file}: is {image.shape[1]}×{image.shape[0]} pixels, {files[0][0].name}"
                f" {first[1]}×{first[0]}: scale all pictures to one size"
            )
    colour = any(image.shape[2] == 3 for image in images)
    whole = np.stack([np.repeat(x, 3, 2) if colour and x.shape[2] == 1 else x for x in images])
    return whole, np.array([label for _, label in files], np.int64)


def _picture(path: Path) -> np.ndarray:
    try:
        with warnings.catch_warnings(), Image.open(path) as picture:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            array = np.asarray(picture.convert(MODES.get(picture.mode, "RGB")))
    except OSError as error:
        why = reason(error, path) if error.errno else "(no picture that is understood): remove it"
        raise UserError(f"{path}: cannot be read {why}") from None
    except (ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{path}: cannot be read ({printable(str(error), 200)}): remove it") from None
    return array[..., None] if array.ndim == 2 else array
