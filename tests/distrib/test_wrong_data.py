"""What --data or predict is given by mistake: the message says what it is, and what fits that."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import write_idx
from PIL import Image

from distrib.data import formats
from distrib.data.dataset import Reading
from distrib.errors import UserError
from distrib.pictures.prepare import read_pictures, read_scaled

BY_CLASS = "put those of each class into train/NAME/ and test/NAME/$"


def pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 5).save(folder / name, "PNG")


def files(folder: Path, *names: str, content: bytes = b"hello") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {  # name: (fill it, the message after its name)
    "nothing": (lambda _: None, "holds nothing, which is no data set: give a folder of IDX .*, or an .npz"),
    "texts": (lambda f: files(f, "a.txt", "b.txt"), r"holds a\.txt, b\.txt, which is no data set: give a "),
    "many": (lambda f: files(f, *"abcdefg"), "holds a, b, c, d, e and 2 more, which is no data set"),
    "escapes": (lambda f: files(f, "\x1b[31m"), r"holds \?\[31m, which"),
    "no classes": (lambda f: pictures(f, "1.PNG"), f"holds pictures, but no train/ and test/: {BY_CLASS}"),
    "no parts": (
        lambda f: pictures(f, "cat/1.png", "dog/1.png"),
        f"holds pictures in cat, dog, but no train/ and test/: {BY_CLASS}",
    ),
    "other parts": (
        lambda f: pictures(f, "Train/a/1.png", "Validation/a/1.png"),
        "holds Train, Validation: name the folders of the two parts train and test$",
    ),
    "one deeper": (
        lambda f: pictures(f, "set/train/a/1.png"),
        "is no data set, but holds set: give .*/data/set$",
    ),
    "a file in it": (lambda f: files(f, "x.NPZ"), r"is no data set, but holds x\.NPZ: give .*/data/x\.NPZ$"),
    "pickles": (
        lambda f: files(f, "data_batch_1", "test_batch"),
        "holds CIFAR's Python version, which is not read: give its binary version",
    ),
    "pickles of 100": (lambda f: files(f, "train", "test", "meta"), "holds CIFAR's Python version"),
    "an archive": (lambda f: files(f, "cifar.tar.gz"), r"holds cifar\.tar\.gz: unpack that$"),
}


@pytest.mark.quick
@pytest.mark.parametrize("reading", [Reading(), Reading(size="32")])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_no_data_set(name: str, reading: Reading, tmp_path: Path) -> None:
    """It says what is there, whatever options for another format are given."""
    fill, words = FOLDERS[name]
    (tmp_path / "data").mkdir()
    fill(tmp_path / "data")
    with pytest.raises(UserError, match=f"^--data {re.escape(str(tmp_path / 'data'))}: {words}") as found:
        formats.load(str(tmp_path / "data"), reading=reading)
    assert "\n" not in str(found.value)


@pytest.mark.quick
def test_a_file_that_is_no_data_set(tmp_path: Path) -> None:
    files(tmp_path, "idx/train-images-idx3-ubyte.gz", "x.zip", "x.csv")
    os.mkfifo(tmp_path / "fifo.npz")
    for name, words in {
        "idx/train-images-idx3-ubyte.gz": "is no data set, the folder that it is in is one: give .*/idx$",
        "x.zip": "is an archive: unpack it, and give the folder$",
        "x.csv": "is no data set: give a folder of IDX files",
        "fifo.npz": "is no data set: give a folder of IDX files",
    }.items():
        with pytest.raises(UserError, match=f"^--data {re.escape(str(tmp_path / name))}: {words}"):
            formats.load(str(tmp_path / name))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("test_batch.bin", r"data_batch_1\.bin: cannot be read .*: it is not there: restore it$"),
        ("test.bin", r"train\.bin: cannot be read .*: it is not there: restore it$"),
        ("t10k-labels-idx1-ubyte", "train-images-idx3-ubyte: no such file.* found t10k-labels-idx1-ubyte;"),
    ],
)
def test_one_file_of_a_set_tells_its_format(name: str, words: str, tmp_path: Path) -> None:
    files(tmp_path, name)
    with pytest.raises(UserError, match=words):
        formats.load(str(tmp_path))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is an empty file: copy it again, or remove it$"),
        (b"a,b\n", "is a text file: give a picture, or remove it$"),
        (b"%PDF-1.4", "is a PDF document: export the page as PNG, or remove it$"),
        (b"\x93NUMPY\x01\0", "is a NumPy array: save it as PNG, or remove it$"),
        (b"\x1f\x8b\x08\0", "is a gzip file: unpack it first, or remove it$"),
        (bytes(range(128, 256)), "is of an unknown kind: give a picture, or remove it$"),
        (None, "is a link to nothing: restore the picture, or remove it$"),
    ],
)
def test_no_picture_among_those_of_a_class(content: bytes | None, words: str, tmp_path: Path) -> None:
    pictures(tmp_path, "train/a/1.png", "test/a/1.png")
    bad = tmp_path / "train" / "a" / "2.png"
    if content is None:
        bad.symlink_to(tmp_path / "gone.png")
    else:
        bad.write_bytes(content)
    with pytest.raises(UserError, match=f"^{re.escape(str(bad))}: {words}"):
        formats.load(str(tmp_path))


@pytest.mark.quick
def test_pictures_in_the_wrong_depth(tmp_path: Path) -> None:
    pictures(tmp_path, "test/1.png", "train/a/x/1.png")
    with pytest.raises(UserError, match=r"train: holds no pictures: put them into \S+/train/a, not deeper"):
        formats.load(str(tmp_path))
    pictures(tmp_path / "other", "test/1.png", "train/1.png")
    with pytest.raises(UserError, match="train: holds no folders: put pictures of each class into NAME/ in"):
        formats.load(str(tmp_path / "other"))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is an empty file: copy it again$"),
        (b"\xff\xd8\xff\xe0\0", "is a damaged JPEG picture: copy it again$"),
        (bytes.fromhex("00000803 00000000 00000020 00000020"), "holds no images: give another file$"),
        (
            bytes.fromhex("00000801 00000001 00"),
            "IDX images start with 00000803: give an IDX file of images$",
        ),
        (
            bytes.fromhex("00000804 00000001 00000001 00000001 00000003 000000"),
            "IDX images start with 00000803: name it idx4 if its images have channels, else idx3$",
        ),
        (b"a,b\n", "is a text file: give PNG or other pictures, or IDX files$"),
        (b"%PDF-1.4", "is a PDF document: export the page as PNG$"),
    ],
)
def test_no_picture_for_a_network(content: bytes, words: str, tmp_path: Path) -> None:
    """In colour, and of digits."""
    files(tmp_path, "x.png", content=content)
    for read in (lambda path: read_scaled(path, (32, 32, 3)), read_pictures):
        with pytest.raises(UserError, match=f"x.png: .*{words}"):
            read(tmp_path / "x.png")


@pytest.mark.quick
def test_images_of_another_size(tmp_path: Path) -> None:
    write_idx(tmp_path / "idx3", np.zeros((2, 9, 9), np.uint8))
    write_idx(tmp_path / "idx4", np.zeros((2, 9, 9, 3), np.uint8))
    for name, size in (("idx3", "9×9"), ("idx4", "9×9×3")):
        with pytest.raises(
            UserError, match=f"{name}: images of {size}, the network takes 28×28: scale them$"
        ):
            read_pictures(tmp_path / name)
        with pytest.raises(
            UserError, match=f"{name}: images of {size}, the network takes 8×9×3: scale them$"
        ):
            read_scaled(tmp_path / name, (8, 9, 3))


@pytest.mark.quick
def test_a_picture_that_was_cut(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(file, "PNG")
    (tmp_path / "x.png").write_bytes(file.getvalue()[:2000])
    for read in (lambda path: read_scaled(path, (32, 32, 3)), read_pictures):
        with pytest.raises(
            UserError, match=r"cannot be read as a picture .*: copy it again, or save it as PNG$"
        ):
            read(tmp_path / "x.png")


@pytest.mark.quick
def test_an_archive_of_arrays_by_an_upper_case_name(tmp_path: Path) -> None:
    parts = {"x_train": np.zeros((3, 8, 8), np.uint8), "y_train": np.arange(3)}
    with (tmp_path / "D.NPZ").open("wb") as file:
        np.savez(file, **parts, x_test=parts["x_train"], y_test=parts["y_train"])  # type: ignore[arg-type]
    assert formats.load(str(tmp_path / "D.NPZ")).classes == 3
    (tmp_path / "D.NPZ").write_bytes(b"")
    with pytest.raises(UserError, match=r"is damaged, or no \.npz file .*: write it with np\.savez$"):
        formats.load(str(tmp_path / "D.NPZ"))
