"""The MNIST of the package, data sets in other folders, and what is said of damaged files."""

from __future__ import annotations

import gzip
import hashlib
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import write_idx

from distrib.data import formats, sniff
from distrib.data import idx as mnist
from distrib.data.dataset import Dataset
from distrib.errors import UserError

pytestmark = pytest.mark.quick

IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte"  # as small_data has them
TRAIN_LABELS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
TEST_LABELS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@pytest.fixture(scope="module")
def package() -> Dataset:
    return formats.load()


def arrays(data: Dataset) -> tuple[np.ndarray, ...]:
    return data.train_images, data.train_labels, data.test_images, data.test_labels


def test_package_holds_mnist(package: Dataset) -> None:
    assert [array.shape for array in arrays(package)] == [
        (60000, 28, 28, 1),
        (60000,),
        (10000, 28, 28, 1),
        (10000,),
    ]
    assert all(array.dtype == np.uint8 for array in arrays(package))
    assert np.bincount(package.train_labels).tolist() == TRAIN_LABELS
    assert np.bincount(package.test_labels).tolist() == TEST_LABELS
    assert package.train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert package.train_images.mean() / 255 == pytest.approx(0.1307, abs=5e-5)
    assert package.train_images[:10000].std() / 255 == pytest.approx(0.308, abs=1e-3)


def test_checksums_are_of_the_shipped_files() -> None:
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in mnist.SHIPPED.glob("*.gz")}
    assert found == mnist.SHA256


def test_limits_take_the_first_images(package: Dataset) -> None:
    part = formats.load(limit_train=100, limit_test=7)
    for few, all_ in zip(arrays(part), arrays(package)):
        assert len(few) in (100, 7)
        np.testing.assert_array_equal(few, all_[: len(few)])
    assert part.digest() != package.digest()


def test_folder_gzipped_or_not(tmp_path: Path, package: Dataset) -> None:
    """The same contents, whether files are gzipped, plain, or some of each."""
    digests = set()
    for folder, plain in (("gz", 0), ("plain", 4), ("mixed", 2)):
        (tmp_path / folder).mkdir()
        names = sorted(mnist.SHA256)
        for i, name in enumerate(names):
            magic = mnist.IMAGES if "images" in name else mnist.LABELS
            array = mnist.read_idx(mnist.SHIPPED / name, magic)[:50]
            write_idx(tmp_path / folder / (name.removesuffix(".gz") if i < plain else name), array)
        data = formats.load(str(tmp_path / folder))
        assert data.name == str(tmp_path / folder)
        np.testing.assert_array_equal(data.train_images, package.train_images[:50])
        np.testing.assert_array_equal(data.test_labels, package.test_labels[:50])
        digests.add(data.digest())
    assert len(digests) == 1


def test_copy_of_the_package_reads_alike(tmp_path: Path, package: Dataset) -> None:
    for path in mnist.SHIPPED.glob("*.gz"):
        (tmp_path / path.name).symlink_to(path)
    assert formats.load(str(tmp_path)).digest() == package.digest()


def test_other_compression_is_only_refused_in_the_package(small_data: Path) -> None:
    """Checksums bind the package's own files; a person's data may be anything that is IDX."""
    path = small_data / "train-images-idx3-ubyte.gz"
    before = formats.load(str(small_data)).digest()
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 1, mtime=1))
    assert formats.load(str(small_data)).digest() == before


def test_digest_sees_every_array(small_data: Path) -> None:
    before = formats.load(str(small_data))
    changed = {before.digest()}
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        parts = {
            key: getattr(before, key).copy()
            for key in ("train_images", "train_labels", "test_images", "test_labels")
        }
        parts[name].flat[3] ^= 1
        changed.add(replace(before, **parts).digest())
    assert len(changed) == 5


def content(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def put(path: Path, data: bytes) -> None:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: p.unlink(), "no such file.*found .*expected train-images"),
    "folder": (lambda p: (p.unlink(), p.mkdir()), "Is a directory.*a folder is in the place of a file"),
    "empty": (lambda p: p.write_bytes(b""), "is empty: give an IDX file"),
    "one byte": (lambda p: put(p, content(p)[:1]), "starts with 00.*give an IDX file"),
    "half a header": (lambda p: put(p, content(p)[:6]), "is cut within its header: copy it again, or give"),
    "header alone": (
        lambda p: put(p, content(p)[: 4 + 4 * content(p)[3]]),
        "truncated.*header says.*copy it again",
    ),
    "last byte missing": (lambda p: put(p, content(p)[:-1]), "truncated.*header says.*copy it again"),
    "over-long": (lambda p: put(p, content(p) + b"\0"), "over-long.*header says.*copy it again"),
    "magic": (lambda p: put(p, b"\0\0\x0d" + content(p)[3:]), "starts with 00000d0.*give an IDX file"),
    "huge header": (
        lambda p: put(p, content(p)[:4] + b"\xff" * 4 + content(p)[8:]),
        "truncated.*copy it again",
    ),
    "no gzip": (
        lambda p: p.write_bytes(b"\x1f\x8b" + b"junk" * 9),
        "cannot be read as gzip.*copy the file again",
    ),
}


@pytest.mark.parametrize(
    "name", [IMAGES, LABELS, IMAGES.replace("train", "t10k"), LABELS.replace("train", "t10k")]
)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_data_file(damage: str, name: str, small_data: Path) -> None:
    apply, remedy = DAMAGE[damage]
    apply(small_data / name)
    with pytest.raises(UserError) as caught:
        formats.load(str(small_data))
    assert str(small_data / (name.removesuffix(".gz") if damage == "missing" else name)) in str(caught.value)
    assert re.search(remedy, str(caught.value))
    assert "\n" not in str(caught.value)


HUGE = bytes.fromhex("00000803 ffffffff 0000001c 0000001c")
FOREIGN: dict[str, tuple[bytes, str]] = {
    "HTML": (b"\n<!DOCTYPE html><title>404</title>", "is an HTML page (a failed download?), no IDX file"),
    "XML": (b"<?xml version='1.0'?><Error/>", "is an HTML page"),
    "zip": (b"PK\x03\x04" + b"\0" * 26 + b"train-images-idx3-ubyte", "is a zip file"),
    "npz": (b"PK\x03\x04" + b"\0" * 26 + b"x_train.npy", "is a NumPy archive (.npz)"),
    "tar": (b"train-images".ljust(257, b"\0") + b"ustar\x0000", "is a tar archive"),
    "PNG": (b"\x89PNG\r\n\x1a\n", "is a PNG picture"),
    "JPEG": (b"\xff\xd8\xff\xe0", "is a JPEG picture"),
    "pickle": (b"\x80\x04\x95", "is a Python pickle"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "other": (b"\x01\x02\x03\x04\x05", "starts with 01020304, IDX images start with 00000803"),
    "empty": (b"", "is empty"),
}


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_idx_file_is_told(kind: str, gzipped: bool, small_data: Path) -> None:
    data, message = FOREIGN[kind]
    path = small_data / IMAGES
    path.write_bytes(gzip.compress(data) if gzipped else data)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        formats.load(str(small_data))
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith(": give an IDX file of images")


def test_a_file_gzipped_twice_and_one_cut(small_data: Path) -> None:
    path = small_data / IMAGES
    whole = path.read_bytes()
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(UserError, match="is gzipped twice"):
        formats.load(str(small_data))
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"is a truncated gzip file.*copy the file again"):
        formats.load(str(small_data))


def peak(work: Callable[[], object]) -> int:
    """The most bytes that Python had while `work` ran."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_bomb_is_inflated_as_far_as_its_header_says(small_data: Path) -> None:
    """200 MB of zeros behind a header of ten images."""
    path = small_data / IMAGES
    head = bytes.fromhex("00000803 0000000a 0000001c 0000001c")
    path.write_bytes(gzip.compress(head + bytes(200_000_000), 1))

    def refuse() -> None:
        with pytest.raises(
            UserError, match="over-long: more than 7840 bytes of images, the header says 7840"
        ):
            formats.load(str(small_data))

    assert peak(refuse) < 5_000_000


@pytest.mark.parametrize("name", [IMAGES, IMAGES.removesuffix(".gz")])
def test_a_header_of_four_billion_images(name: str, small_data: Path) -> None:
    (small_data / IMAGES).unlink()
    put(small_data / name, HUGE + bytes(1000))

    def refuse() -> None:
        with pytest.raises(UserError, match="truncated: the header says 3367254359280 bytes of images"):
            formats.load(str(small_data))

    assert peak(refuse) < 5_000_000


def test_more_than_the_machine_holds(small_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gzip file that may well hold what its header says."""
    monkeypatch.setattr(mnist, "memory", lambda: 1_000_000)
    head = bytes.fromhex("00000803 00000800 0000001c 0000001c")
    put(small_data / IMAGES, head + bytes(2048 * 784))
    with pytest.raises(UserError, match=r"of images, and this machine has .* of memory: give a smaller set"):
        formats.load(str(small_data))


@pytest.mark.parametrize("size", [0, 5, 200_000])
def test_gzip_in_any_pieces(size: int) -> None:
    """One member, two, padded, with padding between them; and none of it cut off without a word."""
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
    member, padding = gzip.compress(data), bytes(sniff.CHUNK + 7)
    for text in (member, member * 2, member + padding, member + padding + member):
        pieces, stream = [], sniff.Gzip(text)
        while len(pieces) < 2 or len(pieces[-1]) == 777:
            pieces.append(stream.take(777))
        assert b"".join(pieces) == gzip.decompress(text)
    for missing in (1, 8, len(member) // 2):
        with pytest.raises(EOFError):
            sniff.Gzip(member[:-missing]).take(size + 1)


def test_many_empty_members_are_passed_at_once() -> None:
    """Each step copies a piece of the file: were it the whole rest, this would take hours."""
    assert sniff.Gzip(gzip.compress(b"") * 200_000 + gzip.compress(b"x")).take(9) == b"x"


def test_gzip_of_several_members(small_data: Path) -> None:
    path = small_data / IMAGES
    plain, before = content(path), formats.load(str(small_data)).digest()
    path.write_bytes(
        gzip.compress(plain[:7]) + gzip.compress(plain[7:1000]) + gzip.compress(plain[1000:]) + b"\0"
    )
    assert formats.load(str(small_data)).digest() == before
    path.write_bytes(gzip.compress(plain) + b"junk")
    with pytest.raises(UserError, match="cannot be read as gzip"):
        formats.load(str(small_data))


def renamed(folder: Path, into: Path, name: Callable[[str], str]) -> None:
    into.mkdir(parents=True, exist_ok=True)
    for path in list(folder.glob("*ubyte*")):
        path.rename(into / name(path.name))


@pytest.mark.parametrize(
    ("below", "name"),
    [
        (".", lambda name: name.replace("-idx", ".idx")),
        (".", str.upper),
        (".", lambda name: name.replace("images", "Images").replace(".gz", ".GZ")),
        ("MNIST/raw", str),
        ("FashionMNIST/raw", str),
        ("raw", lambda name: name.replace("-idx", ".idx")),
    ],
)
def test_other_spellings_and_torchvision_s_folders(
    below: str, name: Callable[[str], str], small_data: Path
) -> None:
    before = formats.load(str(small_data)).digest()
    renamed(small_data, small_data / below, name)
    data = formats.load(str(small_data))
    assert data.digest() == before
    assert data.name == str(small_data / below)


def test_several_sets_below_the_folder(small_data: Path) -> None:
    for name in ("MNIST", "KMNIST"):
        (small_data / name / "raw").mkdir(parents=True)
        for path in small_data.glob("*ubyte*"):
            (small_data / name / "raw" / path.name).write_bytes(path.read_bytes())
    formats.load(str(small_data))
    renamed(small_data, small_data / "x", str)
    with pytest.raises(UserError, match=r"several data sets: give one of \S+/KMNIST/raw, \S+/MNIST/raw"):
        formats.load(str(small_data))


def test_an_empty_file_beside_a_good_one(small_data: Path) -> None:
    before = formats.load(str(small_data)).digest()
    (small_data / f"{LABELS}.gz").touch()
    put(small_data / IMAGES.removesuffix(".gz"), content(small_data / IMAGES))
    (small_data / IMAGES).write_bytes(b"")
    assert formats.load(str(small_data)).digest() == before


def test_what_is_found_instead_is_told(small_data: Path) -> None:
    renamed(small_data, small_data, lambda name: f"\x1b{name}x")
    with pytest.raises(UserError) as caught:
        formats.load(str(small_data))
    text = str(caught.value)
    assert text.startswith(f"{small_data / 'train-images-idx3-ubyte'}: no such file")
    assert "found ?t10k-images-idx3-ubyte.gzx, " in text
    assert "expected train-images-idx3-ubyte, train-labels-idx1-ubyte, " in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 300, "File name too long"),
        ("data/train-labels-idx1-ubyte", "is no data set, the folder that it is in is one: give data"),
        ("data/train-labels-idx1-ubyte/x", "no such folder or file; give a folder of IDX files"),
        ("a\0b", "give a name"),
        ("", "give a name"),
        ("nowhere", "no such folder"),
    ],
)
def test_a_folder_that_is_none(
    name: str, message: str, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_data.parent)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        formats.load(name)
    assert str(caught.value).startswith("--data ")


def test_a_folder_that_one_may_not_enter(small_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.listdir", refuse)
    with pytest.raises(
        UserError, match=f"--data {small_data}: cannot be read .Permission denied.: permissions"
    ):
        formats.load(str(small_data))


def test_a_home_folder(small_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(small_data.parent))
    assert formats.load("~/data").digest() == formats.load(str(small_data)).digest()
    with pytest.raises(
        UserError, match="--data ~nobodyatall/x: there is no user nobodyatall: give the whole"
    ):
        formats.load("~nobodyatall/x")


def test_gzip_cut_or_changed_anywhere(small_data: Path) -> None:
    path = small_data / IMAGES
    whole, images = path.read_bytes(), mnist.read_idx(path, mnist.IMAGES)
    for length in (*range(24), len(whole) // 2, len(whole) - 8, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=re.escape(str(path))):
            mnist.read_idx(path, mnist.IMAGES)
    for at in np.random.default_rng(1).integers(10, len(whole), 30):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(UserError, match=re.escape(str(path))):
            mnist.read_idx(path, mnist.IMAGES)
    path.write_bytes(whole)
    np.testing.assert_array_equal(mnist.read_idx(path, mnist.IMAGES), images)


@pytest.mark.parametrize("name", mnist.SHA256)
def test_changed_file_of_the_package(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray((mnist.SHIPPED / name).read_bytes())
    data[4] ^= 1  # the time in gzip's header: the contents stay, the checksum does not
    (tmp_path / name).write_bytes(data)
    monkeypatch.setattr(mnist, "SHIPPED", tmp_path)
    with pytest.raises(UserError, match=f"{name}: SHA-256 differs.*install the package again"):
        mnist.read_idx(tmp_path / name, mnist.IMAGES if "images" in name else mnist.LABELS)


def test_unpacked_file_in_the_package(small_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mnist, "SHIPPED", small_data)
    with pytest.raises(UserError, match=f"{LABELS}: SHA-256 differs.*install the package again"):
        mnist.read_idx(small_data / LABELS, mnist.LABELS)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (LABELS, np.zeros(63), "64 images, train-labels-idx1-ubyte 63 labels"),
        (
            LABELS.replace("train", "t10k"),
            np.arange(32) % 11,
            "test label 10 at index 10: labels go from 0 to 9",
        ),
        (LABELS, np.full(64, 255), "training label 255 at index 0: most classes below it have no image"),
        (LABELS, np.zeros((64, 28, 28)), "IDX labels start with 00000801"),
        (IMAGES, np.zeros((64, 28, 27)), "training images are 28×27×1, test images 28×28×1"),
        (IMAGES, np.zeros(64), "IDX images start with 00000803"),
    ],
)
def test_well_formed_but_wrong_data(name: str, array: np.ndarray, message: str, small_data: Path) -> None:
    write_idx(small_data / name, array)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        formats.load(str(small_data))
    assert str(small_data) in str(caught.value)


def test_no_images(small_data: Path) -> None:
    write_idx(small_data / IMAGES, np.zeros((0, 28, 28)))
    write_idx(small_data / LABELS, np.zeros(0))
    with pytest.raises(UserError, match=f"{IMAGES}: holds no images"):
        formats.load(str(small_data))
