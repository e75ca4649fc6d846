"""The MNIST of the package, and data sets in other folders, gzipped or not."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest
from conftest import write_idx

from distrib import mnist

TRAIN_LABELS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
TEST_LABELS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@pytest.fixture(scope="module")
def package() -> mnist.Dataset:
    return mnist.load()


def arrays(data: mnist.Dataset) -> tuple[np.ndarray, ...]:
    return data.train_images, data.train_labels, data.test_images, data.test_labels


def test_package_holds_mnist(package: mnist.Dataset) -> None:
    assert [array.shape for array in arrays(package)] == [(60000, 28, 28), (60000,), (10000, 28, 28), (10000,)]
    assert all(array.dtype == np.uint8 for array in arrays(package))
    assert np.bincount(package.train_labels).tolist() == TRAIN_LABELS
    assert np.bincount(package.test_labels).tolist() == TEST_LABELS
    assert package.train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert package.train_images.mean() / 255 == pytest.approx(0.1307, abs=5e-5)
    assert package.train_images[:10000].std() / 255 == pytest.approx(0.308, abs=1e-3)


def test_checksums_are_of_the_shipped_files() -> None:
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in mnist.SHIPPED.glob("*.gz")}
    assert found == mnist.SHA256


def test_limits_take_the_first_images(package: mnist.Dataset) -> None:
    part = mnist.load(limit_train=100, limit_test=7)
    for few, all_ in zip(arrays(part), arrays(package)):
        assert len(few) in (100, 7)
        np.testing.assert_array_equal(few, all_[: len(few)])
    assert part.digest() != package.digest()


def test_folder_gzipped_or_not(tmp_path: Path, package: mnist.Dataset) -> None:
    """The same contents, whether files are gzipped, plain, or some of each."""
    digests = set()
    for folder, plain in (("gz", 0), ("plain", 4), ("mixed", 2)):
        (tmp_path / folder).mkdir()
        names = sorted(mnist.SHA256)
        for i, name in enumerate(names):
            magic = mnist.IMAGES if "images" in name else mnist.LABELS
            array = mnist.read_idx(mnist.SHIPPED / name, magic)[:50]
            write_idx(tmp_path / folder / (name.removesuffix(".gz") if i < plain else name), array)
        data = mnist.load(str(tmp_path / folder))
        assert data.name == str(tmp_path / folder)
        np.testing.assert_array_equal(data.train_images, package.train_images[:50])
        np.testing.assert_array_equal(data.test_labels, package.test_labels[:50])
        digests.add(data.digest())
    assert len(digests) == 1


def test_copy_of_the_package_reads_alike(tmp_path: Path, package: mnist.Dataset) -> None:
    for path in mnist.SHIPPED.glob("*.gz"):
        (tmp_path / path.name).symlink_to(path)
    assert mnist.load(str(tmp_path)).digest() == package.digest()


def test_other_compression_is_only_refused_in_the_package(small_data: Path) -> None:
    """Checksums bind the package's own files; a person's data may be anything that is IDX."""
    path = small_data / "train-images-idx3-ubyte.gz"
    before = mnist.load(str(small_data)).digest()
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 1, mtime=1))
    assert mnist.load(str(small_data)).digest() == before


def test_digest_sees_every_array(small_data: Path) -> None:
    before = mnist.load(str(small_data))
    changed = {before.digest()}
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        parts = {key: getattr(before, key).copy() for key in ("train_images", "train_labels", "test_images", "test_labels")}
        parts[name].flat[3] ^= 1
        changed.add(mnist.Dataset(before.name, **parts).digest())
    assert len(changed) == 5
