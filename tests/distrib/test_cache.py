"""The cache of prepared data: the same set, made once, shared by the ranks of a host, never a stale one."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run, summary, train
from PIL import Image

from distrib.data import cache, formats, pictures
from distrib.data.dataset import Dataset, Reading
from distrib.errors import UserError

RNG = np.random.default_rng(0)


def a_folder(folder: Path, side: int = 9, count: int = 4) -> str:
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = RNG.integers(0, 256, (side, side, 3), np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")
    return str(folder)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DISTRIB_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was read and not taken from the cache."""
    found: list[str] = []
    plain = pictures.read

    def read(path: Path, reading: Reading) -> Dataset:
        found.append(str(path))
        return plain(path, reading)

    monkeypatch.setattr(pictures, "read", read)
    return found


def is_mapped(array: Any) -> bool:
    """Whether its memory is a file's."""
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap.mmap)


def entries(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.is_dir())


@pytest.mark.quick
def test_a_file_rewritten_with_its_old_time_is_read_again(place: Path, tmp_path: Path) -> None:
    """As archives are unpacked: same names, sizes and times of change."""
    for value in (10, 200):
        for part in ("train", "test"):
            (tmp_path / "set" / part / "a").mkdir(parents=True, exist_ok=True)
            file = tmp_path / "set" / part / "a" / "0.bmp"
            file.unlink(missing_ok=True)
            Image.new("RGB", (20, 20), (value,) * 3).save(file)
            os.utime(file, (0, 0))
        assert formats.load(str(tmp_path / "set")).train_images[0, 0, 0].tolist() == [value]


@pytest.mark.quick
def test_the_second_time_it_is_mapped(place: Path, reads: list[str], tmp_path: Path) -> None:
    data = a_folder(tmp_path / "set")
    first, second = formats.load(data), formats.load(data)
    assert reads == [data]
    for one in (first, second):
        assert type(one.train_images) is np.ndarray
        assert not one.train_images.flags.writeable
        assert is_mapped(one.train_images)
    assert first.digest() == second.digest() == pictures.read(Path(data), Reading()).digest()
    assert (second.name, second.class_names) == (data, ("cat", "dog"))
    assert formats.load(data, limit_train=3).train_images.shape == (3, 9, 9, 3)
    assert entries(place)[0].stat().st_mode & 0o077 == 0, "nobody else reads it"


@pytest.mark.quick
def test_what_changes_makes_it_void(
    place: Path, reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options, a file's contents, one more, one less, the code; the entry before goes."""
    data = a_folder(tmp_path / "set")
    changed = tmp_path / "set" / "train" / "cat" / "0.png"
    digests = [formats.load(data).digest(), formats.load(data, reading=Reading(grey=True)).digest()]
    Image.fromarray(RNG.integers(0, 256, (9, 9, 3), np.uint8)).save(changed)
    digests.append(formats.load(data).digest())
    changed.rename(changed.with_name("9.png"))
    digests.append(formats.load(data).digest())
    changed.with_name("9.png").unlink()
    digests.append(formats.load(data).digest())
    assert len(set(digests)) == len(digests) == len(reads)
    monkeypatch.setattr(cache, "code_digest", lambda: "another")
    assert formats.load(data).digest() == digests[-1]
    assert len(reads) == len(digests) + 1
    assert len(entries(place)) == 1


@pytest.mark.quick
@pytest.mark.parametrize("damage", ["cut", "gone", "text", "shape"])
def test_a_damaged_entry_is_made_again(place: Path, reads: list[str], tmp_path: Path, damage: str) -> None:
    data = a_folder(tmp_path / "set")
    expected = formats.load(data).digest()
    (entry,) = entries(place)
    images = entry / "train_images.npy"
    if damage == "cut":
        images.write_bytes(images.read_bytes()[:200])
    elif damage == "gone":
        images.unlink()
    elif damage == "text":
        (entry / "about.json").write_text("[]")
    else:
        np.save(images, np.zeros((2, 9, 9, 3), np.uint8))
    assert formats.load(data).digest() == expected
    assert len(reads) == 2
    assert formats.load(data).digest() == expected
    assert len(reads) == 2


@pytest.mark.quick
def test_without_a_place_there_is_none(
    reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in its way, a folder that others may write to: the data is read as without it."""
    data = a_folder(tmp_path / "set")
    (tmp_path / "file").touch()
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    for place in (tmp_path / "file", shared, "/proc/nope"):
        monkeypatch.setenv("DISTRIB_CACHE_DIR", str(place))
        assert formats.load(data).train_images.flags.writeable
    assert len(reads) == 3
    assert not list(shared.iterdir())


@pytest.mark.quick
def test_a_full_disk_and_an_error(
    place: Path, reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = a_folder(tmp_path / "set")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        assert len(formats.load(data).train_images) == 8
    assert not entries(place), "no part of it is left"
    (tmp_path / "set" / "train" / "cat" / "bad.png").write_text("no picture")
    for _ in range(2):
        with pytest.raises(UserError, match=r"bad\.png"):
            formats.load(data)
    assert not entries(place)


@pytest.mark.quick
def test_what_is_quick_to_read_is_kept_from_a_size_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = RNG.integers(0, 256, (30, 8, 8, 3), np.uint8), np.arange(30) % 3
    np.savez(tmp_path / "d.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    assert formats.load(str(tmp_path / "d.npz")).digest()
    assert not entries(place)
    monkeypatch.setattr(cache, "LEAST_BYTES", 1000)
    plain = formats.load(str(tmp_path / "d.npz")).digest()
    assert len(entries(place)) == 1
    assert formats.load(str(tmp_path / "d.npz")).digest() == plain


def _prepare(data: str, folder: str, queue: Any) -> None:
    os.environ["DISTRIB_CACHE_DIR"] = folder
    count = 0
    plain = pictures.read

    def read(path: Path, reading: Reading) -> Dataset:
        nonlocal count
        count += 1
        return plain(path, reading)

    pictures.read = read
    queue.put((formats.load(data).digest(), count))


def test_several_processes_prepare_it_once(tmp_path: Path) -> None:
    data = a_folder(tmp_path / "set", side=60, count=30)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=_prepare, args=(data, str(tmp_path / "cache"), queue)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    found = [queue.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    assert len({digest for digest, _ in found}) == 1
    assert sorted(count for _, count in found) == [0, 0, 0, 1]


def test_ranks_share_its_pages(tmp_path: Path) -> None:
    """Of 100 MB, each of four ranks has a quarter to itself: the images count once on a host."""
    n, side = 8000, 64
    images, labels = RNG.integers(0, 256, (n, side, side, 3), np.uint8), np.arange(n) % 3
    np.savez(tmp_path / "d.npz", x_train=images, y_train=labels, x_test=images[:30], y_test=labels[:30])
    script = """
import sys
from distrib import loop
plain = loop.Trainer.close
def close(self):
    text = open("/proc/self/smaps").read()
    shares = [int(part.split()[0]) for block in text.split("VmFlags")
              if "train_images.npy" in block for part in [block.split("Pss:")[1]]]
    print("images, kB:", sum(shares), flush=True)
    plain(self)
loop.Trainer.close = close
from distrib.train import main
sys.exit(main())
"""
    options = ("--data", tmp_path / "d.npz", "--model", "mlp", "--width", 0.01, "--batch-size", 2000)
    options += ("--max-steps", 2, "--epochs", 1)
    env = {"DISTRIB_CACHE_DIR": str(tmp_path / "cache")}
    sizes = {}
    for ranks in (1, 4):
        done = run("-c", script, "--run-dir", tmp_path / str(ranks), *options, ranks=ranks, env=env)
        sizes[ranks] = [int(found) for found in re.findall(r"images, kB: (\d+)", done.stdout)]
        assert len(sizes[ranks]) == ranks
        assert 0 < sum(sizes[ranks]) <= 1.05 * images.nbytes / 1024
    assert sum(sizes[4]) <= 1.3 * sizes[1][0]


def test_a_run_on_pictures_resumes_from_the_cache(tmp_path: Path) -> None:
    data = a_folder(tmp_path / "set", side=20)
    options = ("--data", data, "--model", "mlp", "--width", 0.1, "--batch-size", 4, "--epochs", 3)
    env = {"DISTRIB_CACHE_DIR": str(tmp_path / "cache")}
    train(tmp_path / "whole", *options, env={"DISTRIB_CACHE_DIR": "/proc/nope"})
    train(tmp_path / "parts", *options, "--max-steps", 3, env=env)
    train(tmp_path / "parts", *options, env=env)
    one, other = (summary(tmp_path / name)["parameter_digest"] for name in ("whole", "parts"))
    assert one == other
