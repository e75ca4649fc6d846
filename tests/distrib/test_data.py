"""Data sets of every format; and one of 3×32×32 with 100 classes, through every command, by data alone."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run, summary, train, train_each, write_idx
from PIL import Image

from distrib.data import formats
from distrib.data.dataset import Reading, make
from distrib.errors import UserError
from distrib.pictures.prepare import read_pictures, read_scaled
from launch import cli

RNG = np.random.default_rng(5)


def part(count: int, classes: int, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    return RNG.integers(0, 256, (count, *shape), np.uint8), np.arange(count) % classes


def arrays(train: tuple, test: tuple) -> dict[str, np.ndarray]:
    return dict(zip(("x_train", "y_train", "x_test", "y_test"), (*train, *test), strict=True))


def cifar(folder: Path, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Files as Krizhevsky's; returns training images, training labels, test images."""
    folder.mkdir()
    labels = 1 if classes == 10 else 2
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if labels == 1 else ["train.bin"]
    found = []
    for name in (*names, "test_batch.bin" if labels == 1 else "test.bin"):
        x, y = part(2 * classes, classes, 32, 32, 3)
        planes = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
        head = np.stack([np.full(len(y), 7), y], 1)[:, -labels:].astype(np.uint8)
        (folder / name).write_bytes(np.concatenate([head, planes], 1).tobytes())
        found.append((x, y))
    train_images, train_labels = (np.concatenate(each) for each in zip(*found[:-1], strict=True))
    return train_images, train_labels, found[-1][0]


@pytest.mark.quick
@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(tmp_path: Path, classes: int) -> None:
    images, labels, test = cifar(tmp_path / "c", classes)
    names = "batches.meta.txt" if classes == 10 else "fine_label_names.txt"
    (tmp_path / "c" / names).write_text("\n".join(f"name {i}" for i in range(classes)) + "\n\n")
    data = formats.load(str(tmp_path / "c"))
    assert (data.shape, data.classes, data.class_names[-1]) == ((32, 32, 3), classes, f"name {classes - 1}")
    np.testing.assert_array_equal(data.train_images, images)
    np.testing.assert_array_equal(data.train_labels, labels)
    np.testing.assert_array_equal(data.test_images, test)
    name = "test_batch.bin" if classes == 10 else "test.bin"
    (tmp_path / "c" / name).write_bytes((tmp_path / "c" / name).read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{name}: .* no whole number of records"):
        formats.load(str(tmp_path / "c"))


@pytest.mark.quick
def test_npz(tmp_path: Path) -> None:
    both = part(30, 3, 9, 8, 3), part(6, 3, 9, 8, 3)
    path = tmp_path / "d.npz"
    np.savez_compressed(path, **arrays(*both), class_names=np.array(["a", "b", "c\x1b"]))
    data = formats.load(str(path), 10, 2)
    assert (data.shape, data.class_names, len(data.train_images)) == ((9, 8, 3), ("a", "b", "c\x1b"), 10)
    np.testing.assert_array_equal(data.train_images, both[0][0][:10])
    np.savez(path, **{**arrays(*both), "x_train": np.asfortranarray(both[0][0])})
    np.testing.assert_array_equal(formats.load(str(path)).train_images, both[0][0])


NPZ = {  # name: (arrays that replace good ones, words)
    "floats": ({"x_train": np.zeros((30, 8, 8))}, "training images are float64 of shape .* give uint8"),
    "channels first": (
        {"x_train": np.zeros((30, 3, 8, 8), np.uint8)},
        r"shape \(30, 3, 8, 8\) look like \(N, C, H, W\): give \(N, H, W, C\), as x.transpose",
    ),
    "flat": ({"x_train": np.zeros((30, 64), np.uint8)}, "give uint8 .N, H, W, C."),
    "labels": ({"y_train": np.zeros(30)}, "training labels are float64 .* give integers"),
    "fewer labels": ({"y_train": np.zeros(29, int)}, "30 training images and 29 labels"),
    "negative": ({"y_test": np.full(6, -1)}, "test label -1 at index 0: labels go from 0 to 2"),
    "beyond": ({"y_test": np.full(6, 3)}, "test label 3 at index 0: labels go from 0 to 2"),
    "empty": ({"x_test": np.zeros((0, 8, 8), np.uint8), "y_test": np.zeros(0, int)}, "no test images"),
    "other size": ({"x_test": np.zeros((6, 8, 9), np.uint8)}, "8×8×1, test images 8×9×1"),
    "objects": ({"y_train": np.array([None] * 30)}, "y_train holds Python objects"),
    "names": ({"class_names": np.array(["a", "a", "b"])}, "two classes have the same name"),
    "one name": ({"class_names": np.array("abc")}, "class_names is <U3 of shape .*: give a list of texts"),
    "numbers as names": ({"class_names": np.arange(3)}, "class_names is int64 .*: give a list of texts"),
    "a huge label": ({"y_train": np.full(30, 1 << 40)}, "most classes below it have no image"),
    "an unsigned label": ({"y_train": np.full(30, (1 << 64) - 1, np.uint64)}, "most classes below it"),
}


@pytest.mark.quick
@pytest.mark.parametrize("what", NPZ)
def test_wrong_npz(tmp_path: Path, what: str) -> None:
    more, words = NPZ[what]
    np.savez(tmp_path / "d.npz", **{**arrays(part(30, 3, 8, 8), part(6, 3, 8, 8)), **more})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=words):
        formats.load(str(tmp_path / "d.npz"))


class Harm:
    def __reduce__(self) -> tuple:
        return os.system, ("touch /tmp/distrib-harm",)


@pytest.mark.quick
def test_an_npz_runs_no_code_and_bombs_are_refused(tmp_path: Path) -> None:
    path, good = tmp_path / "d.npz", arrays(part(30, 3, 8, 8), part(6, 3, 8, 8))
    np.savez(path, **{**good, "x_train": np.array([Harm()])})
    with pytest.raises(UserError, match="x_train holds Python objects"):
        formats.load(str(path))
    path.write_bytes(pickle.dumps(good))
    with pytest.raises(UserError, match=r"is damaged, or no \.npz file"):
        formats.load(str(path))
    np.savez(path, **{name: array for name, array in good.items() if name != "y_test"})
    with pytest.raises(UserError, match="no y_test: give all of x_train"):
        formats.load(str(path))
    head = (
        b"\x93NUMPY\x01\x00v\x00"
        + b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999999, 8, 8)}"
    )
    with zipfile.ZipFile(path, "w") as archive:
        for name in good:
            archive.writestr(f"{name}.npy", head.ljust(127) + b"\n")
    with pytest.raises(UserError, match=r"x_train has .* GB, more than this machine's memory"):
        formats.load(str(path))
    for bad in (head.replace(b"99999999999999", b"-9"), head[:40], b"\x93NUMPY\x01\x00v\x00" + b"-" * 118):
        with zipfile.ZipFile(path, "w") as archive:
            for name in good:
                archive.writestr(f"{name}.npy", bad.ljust(127) + b"\n")
        with pytest.raises(UserError, match=r"x_train has|is damaged, or no \.npz file"):
            formats.load(str(path))


@pytest.mark.quick
def test_pictures_by_class(tmp_path: Path) -> None:
    for name, count in (("train", 3), ("test", 1)):
        for label, kind in enumerate(("cat", "dog")):
            folder = tmp_path / name / kind
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.full((9, 8), 100 * label + i, np.uint8)).save(folder / f"{i}.png")
    data = formats.load(str(tmp_path))
    assert (data.shape, data.class_names) == ((9, 8, 1), ("cat", "dog"))
    assert data.train_labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert data.train_images[:, 0, 0, 0].tolist() == [0, 100, 1, 101, 2, 102]
    Image.new("RGB", (8, 9), (255, 0, 0)).save(tmp_path / "train" / "cat" / "9.png")
    assert formats.load(str(tmp_path)).shape == (9, 8, 3)
    Image.new("L", (7, 9)).save(tmp_path / "test" / "dog" / "x.png")
    with pytest.raises(UserError, match=r"x\.png: is 7×9 pixels, 0\.png 8×9: give --size"):
        formats.load(str(tmp_path))
    (tmp_path / "test" / "dog" / "x.png").write_text("no picture")
    with pytest.raises(UserError, match=r"x\.png: is a text file: give a picture, or remove it"):
        formats.load(str(tmp_path))
    (tmp_path / "test" / "bird").mkdir()
    (tmp_path / "test").rename(tmp_path / "other")
    with pytest.raises(UserError, match="has no folder test/: put pictures of each class into test/NAME/"):
        formats.load(str(tmp_path))
    (tmp_path / "other").rename(tmp_path / "test")
    with pytest.raises(UserError, match="no such class in train/"):
        formats.load(str(tmp_path))


@pytest.mark.quick
def test_class_names_that_differ_at_their_ends(tmp_path: Path) -> None:
    """They are carried whole, from folders and from CIFAR's list; only names that are alike are refused."""
    names = [f"{'a long name ' * 15}{i}" for i in range(10)]
    for part in ("train", "test"):
        for name in names:
            (tmp_path / "p" / part / name).mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / "p" / part / name / "1.png")
    assert formats.load(str(tmp_path / "p")).class_names == tuple(names)
    cifar(tmp_path / "c", 10)
    (tmp_path / "c" / "batches.meta.txt").write_text("\n".join(names))
    assert formats.load(str(tmp_path / "c")).class_names == tuple(names)
    (tmp_path / "c" / "batches.meta.txt").write_text("\n".join([*names[:8], "bird", "bird"]))
    with pytest.raises(UserError, match="two classes have the same name, bird: give each one of its own"):
        formats.load(str(tmp_path / "c"))


PICTURES = {  # name: (a picture, what the network sees of its pixel in the corner)
    "half transparent": (Image.new("RGBA", (8, 8), (200, 100, 0, 51)), [40, 20, 0]),
    "grey, half transparent": (Image.new("LA", (8, 8), (200, 51)), [40]),
}


@pytest.mark.quick
@pytest.mark.parametrize("what", PICTURES)
def test_pictures_are_read_as_predict_reads_them(tmp_path: Path, what: str) -> None:
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        (tmp_path / part / ".ipynb_checkpoints").mkdir()
        PICTURES[what][0].save(tmp_path / part / "a" / "x.tif")
    data = formats.load(str(tmp_path))
    assert data.class_names == ("a",)
    assert data.train_images[0, 0, 0].tolist() == PICTURES[what][1]


@pytest.mark.quick
@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pictures_of_more_than_16_bits_are_refused(tmp_path: Path, kind: type) -> None:
    """How bright they are cannot be known."""
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        Image.fromarray(np.ones((8, 8), kind)).save(tmp_path / part / "a" / "x.tif")
    with pytest.raises(UserError, match=r"x\.tif: has more than 16 bits a pixel"):
        formats.load(str(tmp_path))


def by_class(folder: Path, pictures: dict[str, Any], **more: Any) -> str:
    """A data set of one class whose two parts hold these pictures, by file name."""
    for part in ("train", "test"):
        (folder / part / "a").mkdir(parents=True)
        for name, picture in pictures.items():
            picture.save(folder / part / "a" / name, **more)
    return str(folder)


@pytest.mark.quick
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_16_bits(tmp_path: Path, ending: str) -> None:
    pixels = RNG.integers(0, 1 << 16, (8, 9), np.uint16)
    data = formats.load(by_class(tmp_path, {f"x.{ending}": Image.fromarray(pixels)}))
    np.testing.assert_array_equal(data.train_images[0, ..., 0], pixels >> 8)


@pytest.mark.quick
def test_pictures_of_any_size_in_any_colours(tmp_path: Path) -> None:
    """--size covers and cuts in the middle; --grey weighs the colours as Pillow does."""
    wide, palette = Image.new("RGB", (40, 10), (255, 0, 0)), Image.new("P", (7, 9), 1)
    wide.paste((0, 0, 255), (15, 0, 25, 10))  # the middle
    palette.putpalette([0, 0, 0, 0, 255, 0])
    name = by_class(tmp_path, {"1.png": wide, "2.gif": palette, "3.png": Image.new("L", (100, 100), 7)})
    data = formats.load(name, reading=Reading(size="10"))
    assert data.shape == (10, 10, 3)
    assert [image[5, 5].tolist() for image in data.train_images] == [[0, 0, 255], [0, 255, 0], [7, 7, 7]]
    assert formats.load(name, reading=Reading(size="4x6")).shape == (4, 6, 3)
    grey = formats.load(name, reading=Reading(size="10", grey=True))
    assert grey.shape == (10, 10, 1)
    assert [int(image[5, 5, 0]) for image in grey.train_images] == [29, 150, 7]
    for bad in ("0", "4x", "x", "99999", "4x5x6"):
        with pytest.raises(UserError, match=f"--size {bad}: give pixels, as 32, or as 32x48"):
            formats.load(name, reading=Reading(size=bad))


@pytest.mark.quick
def test_all_broken_pictures_are_listed(tmp_path: Path) -> None:
    name = by_class(tmp_path, {"1.png": Image.new("L", (8, 8))})
    for i, text in enumerate((b"", b"text", b"\x89PNG\r\n\x1a\nbroken")):
        (tmp_path / "train" / "a" / f"bad{i}.png").write_bytes(text)
    with pytest.raises(UserError) as found:
        formats.load(name)
    message = str(found.value)
    assert message.startswith(f"{tmp_path / 'train'}: 3 pictures cannot be used: a/bad0.png: ")
    assert all(f"a/bad{i}.png" in message for i in range(3))
    assert "\n" not in message


def test_evaluate_on_other_data_than_the_run_had(tmp_path: Path) -> None:
    """A run on pictures of any size is evaluated on an .npz, and the other way round."""
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "p" / part / name).mkdir(parents=True)
            for i in range(4):
                shape = (20 + i, 30, 3)
                Image.fromarray(RNG.integers(0, 256, shape, np.uint8)).save(
                    tmp_path / "p" / part / name / f"{i}.png"
                )
    pictures, options = tmp_path / "p", ("--model", "mlp", "--width", 0.1, "--epochs", 1, "--batch-size", 4)
    read = formats.load(str(pictures), reading=Reading(size="16"))
    parts = {"x_train": read.train_images, "y_train": read.train_labels}
    parts |= {"x_test": read.test_images, "y_test": read.test_labels, "class_names": np.array(["a", "b"])}
    np.savez(tmp_path / "d.npz", **parts)  # type: ignore[arg-type]
    train(tmp_path / "one", *options, "--data", pictures, "--size", 16)
    train(tmp_path / "two", *options, "--data", tmp_path / "d.npz")
    found = []
    for name, data in (("one", None), ("one", "d.npz"), ("two", None), ("two", "p")):
        more = () if data is None else ("--data", tmp_path / data)
        done = run("-m", "launch.cli", "evaluate", tmp_path / name, *more, "--json")
        found.append(json.loads(done.stdout)["test_loss"])
    assert len(set(found)) == 1


@pytest.mark.quick
def test_a_bomb_is_named(tmp_path: Path) -> None:
    """A header that promises more than any picture has."""
    name = by_class(tmp_path, {"1.png": Image.new("L", (8, 8))})
    head = b"IHDR" + (30000).to_bytes(4, "big") * 2 + bytes([16, 0, 0, 0, 0])
    bomb = b"\x89PNG\r\n\x1a\n"
    for chunk in (head, b"IDAT" + zlib.compress(bytes(60001)), b"IEND"):
        bomb += (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    (tmp_path / "train" / "a" / "bomb.png").write_bytes(bomb)
    with pytest.raises(UserError, match=r"bomb\.png: holds more than 178 megapixels: scale it down"):
        formats.load(name)


@pytest.mark.quick
def test_predict_sees_what_training_saw(tmp_path: Path) -> None:
    """Of 16 bits, of another size, and of EMNIST's files."""
    pixels = RNG.integers(8000, 20000, (8, 9), np.uint16)
    pictures = {"x.png": Image.fromarray(pixels), "y.png": Image.new("RGB", (30, 9), "red")}
    data = formats.load(by_class(tmp_path / "p", pictures), reading=Reading(size="6"))
    for file, expected in zip(pictures, data.train_images, strict=True):
        found = read_scaled(tmp_path / "p" / "train" / "a" / file, (6, 6, 3)).pixels
        np.testing.assert_array_equal(found[0], expected)
    (tmp_path / "e").mkdir()
    upright = emnist(tmp_path / "e", "digits", [1, 2])
    file = tmp_path / "e" / "emnist-digits-test-images-idx3-ubyte.gz"
    np.testing.assert_array_equal(read_pictures(file, as_is=True).pixels, upright)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("data", "reading", "words"),
    [
        (None, Reading(size="32"), "--size 32: is for a folder of pictures by class"),
        (None, Reading(split="letters"), "--split letters: is for a folder of IDX files"),
        ("synthetic:20x8x8x3:2", Reading(grey=True), "--grey: is for a folder of pictures by class"),
    ],
)
def test_options_of_other_formats_are_refused(data: str | None, reading: Reading, words: str) -> None:
    with pytest.raises(UserError, match=words):
        formats.load(data, reading=reading)


def emnist(folder: Path, split: str, labels: list[int]) -> np.ndarray:
    """EMNIST's files of a split: images lie transposed."""
    images = RNG.integers(0, 256, (len(labels), 28, 28), np.uint8)
    for part in ("train", "test"):
        write_idx(folder / f"emnist-{split}-{part}-images-idx3-ubyte.gz", images.swapaxes(1, 2))
        write_idx(folder / f"emnist-{split}-{part}-labels-idx1-ubyte.gz", np.array(labels))
    return images


@pytest.mark.quick
def test_emnist(tmp_path: Path) -> None:
    """Upright, numbered from 0, by the letters' own names."""
    letters = emnist(tmp_path, "letters", [1, 26, 3])
    emnist(tmp_path, "balanced", [46, 10, 0])
    data = formats.load(str(tmp_path), reading=Reading(split="letters"))
    np.testing.assert_array_equal(data.train_images[..., 0], letters)
    assert (data.train_labels.tolist(), data.classes) == ([0, 25, 2], 26)
    assert [data.class_names[label] for label in data.test_labels] == ["A", "Z", "C"]
    balanced = formats.load(str(tmp_path), reading=Reading(split="Balanced"))
    assert [balanced.class_names[label] for label in balanced.train_labels] == ["t", "A", "0"]
    assert balanced.classes == 47
    with pytest.raises(UserError, match=r"several data sets \(emnist-balanced, emnist-letters\): give one"):
        formats.load(str(tmp_path))
    with pytest.raises(UserError, match=r"--split digits: .* holds emnist-balanced, emnist-letters"):
        formats.load(str(tmp_path), reading=Reading(split="digits"))
    for name, (x, y) in (("train", part(20, 10, 28, 28)), ("t10k", part(10, 10, 28, 28))):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", x)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", y)
    assert formats.load(str(tmp_path)).classes == 10, "MNIST's own names win"
    assert formats.load(str(tmp_path), reading=Reading(split="letters")).classes == 26
    (tmp_path / "odd").mkdir()
    emnist(tmp_path / "odd", "letters", [0, 1])
    with pytest.raises(UserError, match="has a label 0, and EMNIST's letters start at 1"):
        formats.load(str(tmp_path / "odd"))


@pytest.mark.quick
def test_pictures_are_upright(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, (8, 9), np.uint8)
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        exif = Image.Exif()
        exif[0x0112] = 3  # turned by 180 degrees
        Image.fromarray(pixels[::-1, ::-1]).save(tmp_path / part / "a" / "x.png", exif=exif)
    np.testing.assert_array_equal(formats.load(str(tmp_path)).train_images[0, ..., 0], pixels)


@pytest.mark.quick
def test_the_first_pictures_are_of_all_classes(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for label, count in enumerate((3, 1, 2)):
            (tmp_path / part / "abc"[label]).mkdir(parents=True)
            for number in range(count):
                pixels = np.full((4, 4), 10 * label + number, np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / "abc"[label] / f"{number}.png")
    data = formats.load(str(tmp_path), limit_train=4)
    assert data.train_labels.tolist() == [0, 1, 2, 0]
    assert data.train_images[:, 0, 0, 0].tolist() == [0, 10, 20, 1]
    assert data.test_labels.tolist() == [0, 1, 2, 0, 2, 0]


@pytest.mark.quick
def test_idx_images_of_several_channels(tmp_path: Path) -> None:
    images, labels = RNG.integers(0, 256, (12, 5, 7, 3), np.uint8), np.arange(12) % 4
    for name, count in (("train", 12), ("t10k", 4)):
        write_idx(tmp_path / f"{name}-images-idx4-ubyte.gz", images[:count])
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", labels[:count])
    data = formats.load(str(tmp_path))
    assert data.shape == (5, 7, 3)
    np.testing.assert_array_equal(data.train_images, images)
    np.testing.assert_array_equal(data.test_labels, labels[:4])
    write_idx(tmp_path / "t10k-images-idx4-ubyte.gz", images[:4, ..., 0])
    with pytest.raises(UserError, match="starts with 00000803, IDX images start with 00000804"):
        formats.load(str(tmp_path))


@pytest.mark.quick
def test_files_beside_mnist_s_are_left_alone(tmp_path: Path) -> None:
    for name in ("train", "t10k"):
        x, y = part(20, 10, 28, 28)
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", x)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte", y)
    before = formats.load(str(tmp_path)).digest()
    for other in ("._train-images-idx3-ubyte.gz", "backup-train-images-idx3-ubyte.gz"):
        (tmp_path / other).write_bytes(b"another's")
    assert formats.load(str(tmp_path)).digest() == before


@pytest.mark.quick
def test_emnist_names(tmp_path: Path) -> None:
    for name, count in (("train", 94), ("test", 47)):
        x, y = part(count, 47, 28, 28)
        write_idx(tmp_path / f"emnist-balanced-{name}-images-idx3-ubyte.gz", x)
        write_idx(tmp_path / f"emnist-balanced-{name}-labels-idx1-ubyte", y)
    data = formats.load(str(tmp_path))
    assert (data.classes, data.shape, len(data.test_images)) == (47, (28, 28, 1), 47)
    write_idx(tmp_path / "emnist-letters-train-images-idx3-ubyte.gz", x)
    with pytest.raises(UserError, match=r"several data sets \(emnist-balanced, emnist-letters\)"):
        formats.load(str(tmp_path))


@pytest.mark.quick
def test_synthetic() -> None:
    data = formats.load("synthetic:300x9x8x3:256")
    assert (data.shape, data.classes) == ((9, 8, 3), 256)
    assert data.digest() == formats.load("synthetic:300x9x8x3:256").digest()
    assert not data.notes()
    assert formats.load("synthetic:600x8x8x1:300").train_labels.max() == 299
    for wrong in (
        *("synthetic:", "synthetic:1x2x3:4", "synthetic:0x8x8x1:2", "synthetic:5x8x8x1:9"),
        *("synthetic:2000000000x1x1x1:2", "synthetic:5x8x8x1:00", f"synthetic:{'9' * 5000}x8x8x1:3"),
    ):
        with pytest.raises(UserError, match=f"--data {wrong}: "):
            formats.load(wrong)


@pytest.mark.quick
def test_a_class_without_images_is_a_note() -> None:
    images = np.zeros((4, 8, 8), np.uint8)
    data = make("d", (images, np.array([0, 2, 2, 0])), (images, np.zeros(4, int)), ("a", "b", "c"))
    assert data.notes() == ["no training image of 1 of 3 classes: b"]


OPTIONS = "--width 0.0625 --batch-size 50 --epochs 2 --optimizer sgd --lr 0.05 --checkpoint-every 5".split()  # noqa: SIM905


@pytest.mark.needs("report")
def test_any_data_through_every_command(tmp_path: Path, command_line: Any) -> None:
    """Trains, on two ranks too, stops, resumes, evaluates, predicts, exports and reports."""
    both = part(400, 100, 32, 32, 3), part(200, 100, 32, 32, 3)
    names = [f"kind {i}" for i in range(100)]
    data, whole, folder = tmp_path / "d.npz", tmp_path / "whole", tmp_path / "run"
    options = (*OPTIONS, "--precision", "float64", "--data", data)
    np.savez(data, **arrays(*both), class_names=np.array(names))  # type: ignore[arg-type]
    train_each(("--run-dir", whole, *options), ("--run-dir", folder, *options, "--max-steps", 7))
    said = train(folder, *options, "--shift", 0).stdout
    assert "32×32×3 pixels, 100 classes" in " ".join(said.split())
    assert summary(folder)["parameter_digest"] == summary(whole)["parameter_digest"]
    assert json.loads((folder / "config.json").read_text())["dataset"]["class_names"] == names

    def distrib(*arguments: object) -> str:
        code, out, err = command_line(cli.app, *arguments)
        assert code == 0, err
        return out

    result = json.loads(distrib("evaluate", folder, "--json"))
    assert result["test_accuracy"] == pytest.approx(summary(folder)["test_accuracy"])
    code, _, err = command_line(cli.app, "evaluate", folder, "--data", "synthetic:50x8x8x1:10")
    assert (code, err.count("\n")) == (2, 1)
    assert "takes images of 32×32×3 and tells 100 classes apart" in err
    Image.fromarray(both[1][0][0]).resize((64, 64)).save(tmp_path / "p.png")
    (found,) = json.loads(distrib("predict", folder, tmp_path / "p.png", "--json"))
    assert found["class"] in names
    assert "digit" not in found
    assert len(found["probabilities"]) == 100
    assert "kind " in distrib("predict", folder, tmp_path / "p.png", "--draw")
    exported = distrib("export", folder, tmp_path / "m.onnx", "--check")
    assert "checked with onnxruntime on 200 images" in exported
    distrib("report", folder)
    page = (folder / "report.html").read_text()
    assert "taken for" in page, "of a hundred classes, those mixed up most"
    train(tmp_path / "two", *options, ranks=2)
    assert summary(tmp_path / "two")["test_loss"] == pytest.approx(summary(whole)["test_loss"], rel=1e-9)
