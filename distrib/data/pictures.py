"""Reads a data set from pictures in folders by class, train/NAME/* and test/NAME/*, all of one size."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np

from distrib.data.dataset import Dataset, make
from distrib.errors import UserError
from distrib.files import printable

PARTS = ("train", "test")


def recognises(path: Path) -> bool:
    """Whether a folder holds train/ or test/."""
    return any((path / part).is_dir() for part in PARTS)


def read(path: Path) -> Dataset:
    """Read the data set in a folder. Folders in train/ are classes; their sorted order gives the labels."""
    for part in PARTS:
        if not (path / part).is_dir():
            raise UserError(f"{path}: has no folder {part}/: put pictures of each class into {part}/NAME/")
    names = _classes(path / "train")
    if not names:
        raise UserError(f"{path / 'train'}: holds no folders: give one for each class")
    unknown = sorted(set(_classes(path / "test")) - set(names))
    if unknown:
        raise UserError(f"{path / 'test' / unknown[0]}: there is no such class in train/: add it there")
    train, test = (_part(path / part, names) for part in ("train", "test"))
    if train[0].shape[-1] != test[0].shape[-1]:  # one of them in colour
        train, test = ((np.repeat(x, 3, -1) if x.shape[-1] == 1 else x, y) for x, y in (train, test))
    return make(str(path), train, test, tuple(printable(name, 60) for name in names))


def _classes(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir() if each.is_dir() and each.name[0] != ".")


def _part(folder: Path, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W, C) and labels (N,): grey if all are grey, else in colour."""
    files = [
        (file, label)
        for label, name in enumerate(names)
        if (folder / name).is_dir()
        for file in sorted((folder / name).iterdir())
        if file.is_file() and file.name[0] != "."
    ]
    if not files:
        raise UserError(f"{folder}: holds no pictures: put them into {folder / names[0]} and the like")
    images: list[np.ndarray] = []
    for file, _ in files:
        images.append(_picture(file))
        h, w = images[0].shape[:2]
        if images[-1].shape[:2] != (h, w):
            raise UserError(
                f"{file}: is {images[-1].shape[1]}×{images[-1].shape[0]} pixels, {files[0][0].name} {w}×{h}:"
                " scale all pictures to one size"
            )
    channels = max(image.shape[2] for image in images)
    whole = np.empty((len(images), *images[0].shape[:2], channels), np.uint8)
    for place, image in zip(whole, images, strict=True):
        place[...] = image  # grey into each channel
    return whole, np.array([label for _, label in files], np.int64)


def _picture(path: Path) -> np.ndarray:
    """Read a picture as uint8 (H, W, 1), or (H, W, 3) in colour: upright, on black if transparent."""
    from PIL import Image  # here, as it takes a while to import and few runs need it

    from distrib.pictures.files import pixels_of, read_sheets

    mode = ""
    with suppress(OSError, ValueError, SyntaxError), Image.open(path) as picture:  # errors are reported below
        mode = picture.mode
    if mode.startswith(("I", "F")):
        raise UserError(f"{path}: has more than 8 bits a channel: save it with 8, black 0 and white 255")
    found = read_sheets(path, lambda sheet: (pixels_of(sheet), sheet.size))
    if found is None or len(found) > 1:
        what = "no picture that is understood" if found is None else f"{len(found)} pages"
        raise UserError(f"{path}: cannot be read ({what}): remove it")
    pixels, (w, h) = found[0]
    if sorted(pixels.shape[:2]) != sorted((h, w)):
        raise UserError(f"{path}: is {w}×{h} pixels, too large for a data set: scale all pictures down")
    return pixels[..., :1] if (pixels == pixels[..., :1]).all() else pixels
