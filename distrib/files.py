"""Reads files within bounds, and writes them without following links: someone else may have planted them.

A folder that you give may be a link. The last part of a name that this program creates must not be.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from distrib.errors import UserError

MOST_JSON = 16 << 20
"""Largest JSON file that is read, in bytes. Those of a run have a few thousand."""

NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)

REMEDIES = {
    errno.ENOSPC: "the disk is full: make room",
    errno.EDQUOT: "the disk quota is used up: make room",
    errno.EFBIG: "the limit on a file's size is reached: raise it (ulimit -f), or make room",
    errno.EROFS: "the disk is mounted read-only: give another place",
    errno.EACCES: "permissions are missing: grant them, or give another place",
    errno.EPERM: "permissions are missing: grant them, or give another place",
    errno.ENOENT: "it is not there: restore it",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOTDIR: "a file is in the place of a folder: give another place",
    errno.EISDIR: "a folder is in the place of a file: remove it, or give another place",
    errno.ELOOP: "a link is in its place: remove it",
    errno.EEXIST: "something else is in its place: remove it",
    errno.ENXIO: "something else is in its place: remove it",
    errno.EIO: "the disk does not answer as it should: check it",
    errno.ESTALE: "its disk was lost or exported anew: mount it again",
}
"""Remedies for errors of the operating system."""


def reason(error: OSError | ValueError, path: Path) -> str:
    """Why `path` cannot be read or written, and the remedy: "(No space left on device): make room"."""
    if not isinstance(error, OSError):  # a name with a NUL in it
        return f"({printable(str(error))}): give another name"
    remedy = REMEDIES.get(error.errno or 0, "check the disk and the permissions")
    if error.errno == errno.ENOENT and not os.path.isdir(path.parent):
        remedy = f"its folder {path.parent} is gone: removed, renamed or unmounted"
    return f"({error.strerror or error}): {remedy}"


def printable(text: str, most: int = 500) -> str:
    """`text` for a terminal or a log: cut at `most`, with "?" for escapes, line breaks and the like."""
    short = text if len(text) <= most else f"{text[: most - 1]}…"
    return "".join(letter if letter.isprintable() else "?" for letter in short)


def short(name: str, most: int) -> str:
    """`name` in at most `most` letters, its middle left out: names of a kind often differ at their ends."""
    head = most // 2
    return name if len(name) <= most else f"{name[:head]}…{name[len(name) - (most - 1 - head) :]}"


def alternatives(names: Sequence[str]) -> str:
    """The names as "a, b or c"."""
    return " or ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def parsed(flag: str, text: Any, kind: type) -> Any:
    """The number that was given for an option; UserError if it is none. `kind` is int or float."""
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{flag} {printable(str(text), 60)}: give {what}") from None


def expanded(name: str, option: str) -> Path:
    """The path given for `option`, with ~ expanded; UserError if it cannot be a path."""
    if not name or "\0" in name:
        raise UserError(f"{option} {printable(name) or '(nothing)'}: give a name")
    found = os.path.expanduser(name)
    if found.startswith("~"):
        user = name[1:].partition("/")[0]
        whose = f"there is no user {printable(user, 40)}" if user else "your home folder is not known"
        raise UserError(f"{option} {printable(name)}: {whose}: give the whole path, or ./{printable(name)}")
    return Path(found)


def number(value: Any) -> float | None:
    """`value` if it is a finite number (true and false are not), else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an integer beyond float's range
        return None


def fits(kind: str, value: Any) -> bool:
    """Whether a JSON value has a type, written as an annotation: "int | None", "dict[str, float]"."""
    if kind.startswith("list["):
        return isinstance(value, list) and all(fits(kind[5:-1], each) for each in value)
    if kind.startswith("dict[str, "):
        return isinstance(value, dict) and all(fits(kind[10:-1], each) for each in value.values())
    if " | " in kind:
        return any(fits(part, value) for part in kind.split(" | "))
    if kind == "float":
        return number(value) is not None
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 128
    if kind == "None":
        return value is None
    return isinstance(value, {"str": str, "bool": bool, "dict": dict}[kind])


def shown(value: Any, most: int = 60) -> str:
    """A value from a file, for a message."""
    return printable(str(value), most)


def _opener(more: int) -> Callable[[str, int], int]:
    """An opener for `open` that adds `more` flags."""
    return lambda name, flags: os.open(name, flags | more, 0o666)


def _open_regular(path: Path, mode: str, flags: int) -> BinaryIO:
    file = open(path, mode, opener=_opener(flags))  # noqa: SIM115  # returned
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return cast(BinaryIO, file)
    file.close()
    raise OSError(errno.EEXIST, "not a regular file", str(path))


def open_to_read(path: Path) -> BinaryIO:
    """Open a regular file, following links; OSError for anything else."""
    return _open_regular(path, "rb", os.O_NONBLOCK)  # a FIFO would block until there is a writer


def open_to_append(path: Path) -> BinaryIO:
    """Open or create a regular file, not following links; OSError for anything else."""
    return _open_regular(path, "ab", os.O_NONBLOCK | NOFOLLOW)  # a FIFO without a reader gives ENXIO


def read_bytes(path: Path, most: int) -> bytes:
    """Read a regular file. OSError if it cannot be read, ValueError if it has more than `most` bytes."""
    with open_to_read(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"larger than {most} bytes")
        data = file.read(size + 1)
        while len(data) > size and (more := file.read(1 << 16)):  # it grows
            data += more
            if len(data) > most:
                raise ValueError(f"larger than {most} bytes")
        return data


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object; ValueError if `text` is none, nested too deep, or not UTF-8."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def read_json(path: Path, most: int = MOST_JSON, remedy: str = "restore the file") -> dict[str, Any]:
    """Read a JSON object from a file of at most `most` bytes; UserError with `remedy` if that fails."""
    try:
        return parse_object(read_bytes(path, most))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as JSON ({printable(str(error), 200)}): {remedy}") from None


def create(path: Path, data: bytes | Iterable[bytes] = b"", sync: bool = False) -> None:
    """Write a new file; FileExistsError if anything has its name, other OSErrors if it cannot be written."""
    with open(path, "xb", opener=_opener(NOFOLLOW)) as file:
        file.writelines([data] if isinstance(data, bytes) else data)
        if sync:
            file.flush()
            os.fsync(file.fileno())


def temporary(path: Path) -> Path:
    """The temporary file in which the next contents of `path` are written."""
    return path.with_name(f".{path.name}.tmp")


def replace(path: Path, data: bytes | Iterable[bytes], sync: bool = False) -> None:
    """Replace the contents of `path` atomically; OSError. With `sync`, they survive a power cut."""
    beside = temporary(path)
    try:
        beside.unlink(missing_ok=True)  # left by a killed process, or a planted link
        create(beside, data, sync)
        os.replace(beside, path)
    except OSError:
        with suppress(OSError):  # also fails on a read-only disk
            beside.unlink()
        raise
    if sync:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def append(path: Path, data: bytes) -> None:
    """Append `data` to `path`, or create it; OSError, also for a link."""
    with open_to_append(path) as file:
        file.write(data)


def write_atomically(path: Path, data: bytes, after: str = "") -> None:
    """`replace` with `sync`; UserError with reason, remedy and `after` if the file cannot be written."""
    try:
        replace(path, data, sync=True)
    except (OSError, ValueError) as error:
        gone = isinstance(error, FileNotFoundError)
        raise UserError(f"{path}: cannot be written {reason(error, path)}{'' if gone else after}") from None


def require_place(path: Path) -> None:
    """UserError where no file can be at `path`: no folder for it, or a folder, device or FIFO is there."""
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}: make it, or give another place")
    if path.exists() and not path.is_file():  # to replace /dev/null by a file would harm the machine
        raise UserError(f"{path}: is {'a folder' if path.is_dir() else 'no file'}: give a file's name")


def write(path: Path, content: str | bytes) -> None:
    """`path` holds all of a result, or what it held before. UserError for a device, FIFO or folder."""
    require_place(path)
    data = content.encode(errors="replace") if isinstance(content, str) else content
    write_atomically(path, data, "; nothing was written")


def require(*modules: str) -> None:
    """UserError where a library of the extra `report` is missing."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise UserError(f"{module} is not installed: pip install 'distrib[report]'")


MOST_LISTED = 20
"""Bad files that a message names."""


def listed(folder: Path | None, broken: list[str]) -> str:
    """All that is wrong with some files, in one line: messages that start with their paths."""
    if len(broken) == 1:
        return broken[0]
    shown = "; ".join(each.removeprefix(f"{folder}/") for each in broken[:MOST_LISTED])
    more = f"; and {len(broken) - MOST_LISTED} more" if len(broken) > MOST_LISTED else ""
    where = f"{folder}: " if folder else ""
    return f"{where}{len(broken)} pictures cannot be used: {shown}{more}"
