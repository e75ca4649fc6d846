"""Recognises data files by their first bytes, and reads them, gzipped or not, without inflating too much."""

from __future__ import annotations

import os
import zlib
from contextlib import suppress
from pathlib import Path

GZIP = b"\x1f\x8b"

SNIFF = 512
"""Number of first bytes by which a file is recognised."""

RATIO = 1032
"""Most bytes that one compressed byte can inflate to (zlib's bound)."""

KINDS = (
    (b"PK\x03\x04", "is a zip file"),
    (b"\x89PNG\r\n\x1a\n", "is a PNG picture"),
    (b"\xff\xd8\xff", "is a JPEG picture"),
    (b"GIF8", "is a GIF picture"),
    (b"\x93NUMPY", "is a NumPy array (.npy)"),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
    (b"PAR1", "is a Parquet file"),
    (b"BZh", "is a bzip2 file"),
    (b"\xfd7zXZ\x00", "is an xz file"),
    (b"\x28\xb5\x2f\xfd", "is a zstd file"),
    (b"version https://git-lfs", "is a pointer of git-lfs, whose file was not fetched (git lfs pull)"),
    *((bytes([0x80, version]), "is a Python pickle") for version in range(2, 6)),
)


def what_is(start: bytes) -> str | None:
    """Describe a file that starts with these bytes: "is a PNG picture, no IDX file"; None if unknown."""
    if not start:
        return "is empty"
    if start[:2] == GZIP:
        return "is gzipped twice"
    if start[257:262] == b"ustar":
        return "is a tar archive"
    if start.startswith(b"PK\x03\x04") and b".npy" in start[30:120]:
        return "is a NumPy archive (.npz)"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--")):
        return "is an HTML page (a failed download?), no IDX file"
    return next((f"{name}, no IDX file" for magic, name in KINDS if start.startswith(magic)), None)


class Plain:
    """The bytes of a file, read in order; `most` is their number."""

    def __init__(self, raw: bytes) -> None:
        self.most, self._raw, self._at = len(raw), raw, 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes, fewer at the end."""
        part = self._raw[self._at : self._at + count]
        self._at += len(part)
        return part


CHUNK = 1 << 16
"""Bytes of a file given to zlib at once: it copies what is left over."""


class Gzip:
    """The contents of a gzipped file, inflated as they are read; `most` bounds their number."""

    def __init__(self, raw: bytes) -> None:
        self.most, self._raw, self._at = RATIO * len(raw), memoryview(raw), 0
        self._stream = zlib.decompressobj(31)

    def take(self, count: int) -> bytes:
        """The next `count` bytes, fewer at the end, where gzip's checksum is checked.

        EOFError if the file is truncated, zlib.error if it is damaged.
        """
        parts: list[bytes] = []
        while count:
            given, stream = self._raw[self._at : self._at + CHUNK], self._stream
            part = stream.decompress(given, count)
            self._at += len(given) - len(stream.unused_data if stream.eof else stream.unconsumed_tail)
            parts.append(part)
            count -= len(part)
            if stream.eof:  # the end of a member; another may follow
                if not self._skip_zeros():
                    break
                self._stream = zlib.decompressobj(31)
            elif count and not part and not given:
                raise EOFError
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _skip_zeros(self) -> bool:
        """Go on behind a member's padding; False at the end of the file."""
        while self._at < len(self._raw):
            given = bytes(self._raw[self._at : self._at + CHUNK])
            rest = given.lstrip(b"\0")
            self._at += len(given) - len(rest)
            if rest:
                return True
        return False


def memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's limit."""
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # "max" if there is no limit
        found = min(found, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return found
