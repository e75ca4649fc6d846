"""Says what lies in the place of a data set, and what to give instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from distrib.files import alternatives, printable

PICTURES = (
    *(".png", ".jpg", ".jpeg", ".gif", ".tif", ".tiff", ".bmp", ".webp", ".ppm", ".pgm", ".ico", ".avif"),
    *(".jp2", ".qoi"),
)
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")
PARTS = {"train", "training", "test", "testing", "val", "valid", "validation"}
"""What others call the two parts, in lower case."""

PYTHON = ({"data_batch_1", "test_batch"}, {"train", "test", "meta"})
"""Files of CIFAR-10 and CIFAR-100 as Python pickles, which could run code."""

BY_CLASS = "put those of each class into train/NAME/ and test/NAME/"
MOST_NAMED = 5


def instead(path: Path, known: Callable[[Path], bool], forms: Iterable[str]) -> str:
    """What `path` is, with the remedy: "is an archive: unpack it". `known` tells whether a path is a set."""
    return _folder(path, known, forms) if path.is_dir() else _file(path, known, forms)


def _file(path: Path, known: Callable[[Path], bool], forms: Iterable[str]) -> str:
    if known(path.absolute().parent):
        return f"is no data set, the folder that it is in is one: give {path.parent}"
    if path.suffix.lower() in ARCHIVES:
        return "is an archive: unpack it, and give the folder"
    return f"is no data set: give {', or '.join(forms)}"


def _folder(path: Path, known: Callable[[Path], bool], forms: Iterable[str]) -> str:
    entries = sorted(each for each in path.iterdir() if each.name[0] != ".")
    folders = [each for each in entries if each.is_dir()]
    files = [each for each in entries if each.is_file()]
    if sets := [each for each in entries if known(each)]:
        return (
            f"is no data set, but holds {_names(sets)}: give {alternatives([*map(str, sets[:MOST_NAMED])])}"
        )
    if any({each.name for each in files} >= names for names in PYTHON):
        return "holds CIFAR's Python version, which is not read: give its binary version (…-binary.tar.gz)"
    if parts := [each for each in folders if each.name.lower() in PARTS]:
        return f"holds {_names(parts)}: name the folders of the two parts train and test"
    if any(map(_picture, files)):
        return f"holds pictures, but no train/ and test/: {BY_CLASS}"
    if any(_picture(file) for folder in folders for file in folder.iterdir()):
        return f"holds pictures in {_names(folders)}, but no train/ and test/: {BY_CLASS}"
    if packed := [each for each in files if each.suffix.lower() in ARCHIVES]:
        return f"holds {_names(packed)}: unpack that"
    return f"holds {_names(entries) or 'nothing'}, which is no data set: give {', or '.join(forms)}"


def _picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES


def _names(paths: list[Path]) -> str:
    more = f" and {len(paths) - MOST_NAMED} more" if len(paths) > MOST_NAMED else ""
    return ", ".join(printable(each.name, 40) for each in paths[:MOST_NAMED]) + more
