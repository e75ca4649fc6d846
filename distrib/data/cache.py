"""Keeps prepared data in memory-mapped files, whose pages the ranks of a host share.

A folder of pictures takes a while to prepare, and each rank would hold it for itself. So the first rank that
wants it writes it down, under a name that depends on the code and on every file's size and times of change.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from distrib.data.dataset import Dataset, Reading
from distrib.files import create
from distrib.sources import code_digest

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
LEAST_BYTES = 1 << 26
"""Size of files from which on a set that is quick to read is kept, too: 64 MiB."""

WAIT_SECONDS = 600
"""For another process that prepares the same set; after that, this one does, too."""


def through(path: Path, reading: Reading, slow: bool, read: Callable[[], Dataset]) -> Dataset:
    """What `read` makes of `path`, from the cache if it is there, through it if that pays: `slow`, or large.

    A cache that cannot be written is none.
    """
    folder = place()
    if folder is None:
        return read()
    files = listing(path)
    if not slow and sum(size for _, size, _ in files) < LEAST_BYTES:
        return read()
    of_path = _key(str(path), str(path.resolve()))[:16]
    entry = folder / f"{of_path}-{_key(code_digest(), reading, files)[:32]}"
    with _locked(folder / f"{of_path}.lock"):
        if (found := _load(entry)) is not None:
            return found
        data = read()
        with suppress(OSError):  # a full disk
            _store(entry, data)
            for old in folder.glob(f"{of_path}-*"):
                if old != entry:
                    shutil.rmtree(old, ignore_errors=True)
    return _load(entry) or data


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def place() -> Path | None:
    """This user's own folder DISTRIB_CACHE_DIR, or ~/.cache/distrib; None where there can be none."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(os.environ.get("DISTRIB_CACHE_DIR") or Path(base) / "distrib")
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.lstat()
        if stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid() and not about.st_mode & 0o022:
            return folder if os.access(folder, os.W_OK | os.X_OK) else None
    return None


def listing(path: Path) -> list[tuple[str, int, list[int]]]:
    """(name, bytes, marks) of a file, or of all files in a folder; marks change when it is written.

    The time of change alone would not do: archives and `touch` set it back.
    """
    if path.is_file():
        about = path.stat()
        return [(path.name, about.st_size, _marks(about))]
    found = []
    for parent, _, names in os.walk(path, followlinks=True):
        for name in names:
            file = os.path.join(parent, name)
            with suppress(OSError):  # a link to nothing
                about = os.stat(file)
                found.append((os.path.relpath(file, path), about.st_size, _marks(about)))
    return sorted(found)


def _marks(about: os.stat_result) -> list[int]:
    return [about.st_mtime_ns, about.st_ctime_ns, about.st_ino]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; after WAIT_SECONDS, or where locks are not supported, all at once."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError:
        yield
        return
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                break
        yield
    finally:
        os.close(file)


def _load(entry: Path) -> Dataset | None:
    """The set in an entry, its arrays mapped; None where there is none, or it is damaged."""
    try:
        about = json.loads((entry / "about.json").read_bytes())
        arrays = {name: np.lib.format.open_memmap(entry / f"{name}.npy", mode="r") for name in ARRAYS}
        if {name: [list(a.shape), str(a.dtype)] for name, a in arrays.items()} != about["arrays"]:
            return None
        plain = {name: array.view(np.ndarray) for name, array in arrays.items()}
        return Dataset(about["name"], **plain, class_names=tuple(about["class_names"]))
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def _store(entry: Path, data: Dataset) -> None:
    """Write an entry, whole or not at all."""
    beside = entry.with_name(f".{entry.name}.{os.getpid()}")
    try:
        beside.mkdir(mode=0o700)
        arrays = {name: getattr(data, name) for name in ARRAYS}
        for name, array in arrays.items():
            np.save(beside / f"{name}.npy", array)
        about = {
            "name": data.name,
            "class_names": list(data.class_names),
            "arrays": {name: [list(a.shape), str(a.dtype)] for name, a in arrays.items()},
        }
        create(beside / "about.json", json.dumps(about).encode())
        shutil.rmtree(entry, ignore_errors=True)
        beside.rename(entry)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
