"""Reads a data set from pictures in folders by class: train/NAME/* and test/NAME/*."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from distrib.data.dataset import Dataset, Reading, make
from distrib.errors import UserError
from distrib.files import listed, printable

PARTS = ("train", "test")
READING = ("size", "grey")


def recognises(path: Path) -> bool:
    """Whether a folder holds train/ or test/."""
    return any((path / part).is_dir() for part in PARTS)


def read(path: Path, reading: Reading = Reading()) -> Dataset:  # noqa: B008  # it cannot change
    """Read the data set in a folder. Folders in train/ are classes; their sorted order gives the labels."""
    for part in PARTS:
        if not (path / part).is_dir():
            raise UserError(f"{path}: has no folder {part}/: put pictures of each class into {part}/NAME/")
    names = _classes(path / "train")
    if not names:
        raise UserError(f"{path / 'train'}: holds no folders: put pictures of each class into NAME/ in it")
    unknown = sorted(set(_classes(path / "test")) - set(names))
    if unknown:
        raise UserError(f"{path / 'test' / unknown[0]}: there is no such class in train/: add it there")
    train, test = (_part(path / part, names, reading) for part in ("train", "test"))
    if train[0].shape[-1] != test[0].shape[-1]:  # one of them in colour
        train, test = ((np.repeat(x, 3, -1) if x.shape[-1] == 1 else x, y) for x, y in (train, test))
    return make(str(path), train, test, tuple(printable(name, len(name)) for name in names))


def _classes(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir() if each.is_dir() and each.name[0] != ".")


def _part(folder: Path, names: list[str], reading: Reading) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W, C) and labels (N,): grey if all are grey, else in colour.

    The first of each class, then the second of each: so the first N images, too, are of all classes.
    """
    places = [
        (number, label, file)
        for label, name in enumerate(names)
        if (folder / name).is_dir()
        for number, file in enumerate(sorted(filter(_counts, (folder / name).iterdir())))
    ]
    files = [(file, label) for _, label, file in sorted(places)]
    if not files:
        where = folder / names[0]
        raise UserError(f"{folder}: holds no pictures: put them into {where}, not deeper, and the like")
    size = _size(reading.size)
    images, broken = list[np.ndarray](), list[str]()
    for file, _ in files:
        try:
            images.append(_picture(file, size, reading.grey))
        except UserError as error:
            broken.append(str(error))
    if broken:
        raise UserError(listed(folder, broken))
    h, w = images[0].shape[:2]
    for (file, _), image in zip(files, images, strict=True):
        if image.shape[:2] != (h, w):
            own, first = f"{image.shape[1]}×{image.shape[0]}", files[0][0].name
            raise UserError(f"{file}: is {own} pixels, {first} {w}×{h}: give --size, or scale all to one")
    channels = max(image.shape[2] for image in images)
    whole = np.empty((len(images), *images[0].shape[:2], channels), np.uint8)
    for place, image in zip(whole, images, strict=True):
        place[...] = image  # grey into each channel
    return whole, np.array([label for _, label in files], np.int64)


def _counts(file: Path) -> bool:
    """Whether it is a file, or a link to one that is gone, and not hidden."""
    return (file.is_file() or not file.exists()) and file.name[0] != "."


def _size(text: str | None) -> tuple[int, int] | None:
    """(height, width) of --size."""
    if text is None:
        return None
    found = re.fullmatch(r"([1-9]\d{0,3})(?:[x×]([1-9]\d{0,3}))?", text)
    if not found:
        raise UserError(f"--size {printable(text, 40)}: give pixels, as 32, or as 32x48 (height, width)")
    return int(found[1]), int(found[2] or found[1])


def _picture(path: Path, size: tuple[int, int] | None, grey: bool) -> np.ndarray:
    """Read a picture as uint8 (H, W, 1), or (H, W, 3) in colour: upright, on black if transparent."""
    from distrib.pictures.files import deep_pixels, pixels_of, read_sheets  # here: Pillow takes a while
    from distrib.pictures.kinds import kind_of
    from distrib.pictures.prepare import fitted

    if not path.exists():
        raise UserError(f"{path}: is a link to nothing: restore the picture, or remove it")
    deep = deep_pixels(path)
    if deep is None:
        found = read_sheets(path, lambda sheet: (pixels_of(sheet, 1 if grey else None), sheet.size))
        if found is None:
            with path.open("rb") as file:
                raise UserError(f"{path}: is {kind_of(file.read(2048), 'give a picture')}, or remove it")
        if len(found) > 1:
            raise UserError(f"{path}: has {len(found)} pages: save one of them as PNG, or remove it")
        pixels, (w, h) = found[0]
    else:
        pixels, (h, w) = deep, deep.shape[:2]
    if size is not None:
        pixels = fitted(pixels, size)
    elif sorted(pixels.shape[:2]) != sorted((h, w)):
        raise UserError(f"{path}: is {w}×{h} pixels, too large for a data set: give --size")
    return pixels[..., :1] if (pixels == pixels[..., :1]).all() else pixels
