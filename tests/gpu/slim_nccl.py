"""Blank the machine code in NCCL's library but that of one architecture, so that it compresses to a tenth.

    python tests/gpu/slim_nccl.py libnccl.so.2 slim.so 90

The library keeps its size and its symbols. Its device code lies in fat binaries in the section .nv_fatbin.
Each has a header (magic number, version, header size, size) and entries (kind, version, header size, size, …,
architecture at byte 28); kind 1 is PTX, kind 2 machine code. A run does not need __nv_relfatbin, which is
for linking.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path

MAGIC, MACHINE_CODE = 0xBA55ED50, 2


def sections(data: bytes | bytearray) -> dict[str, tuple[int, int]]:
    """Where the sections of a 64-bit ELF file lie: {name: (from, to)}."""
    if data[:5] != b"\x7fELF\x02":
        raise ValueError("no 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count, names = struct.unpack_from("<HHH", data, 58)
    heads = [struct.unpack_from("<IIQQQQ", data, table + number * size) for number in range(count)]
    first = heads[names][4]
    found = {}
    for name, _, _, _, offset, length in heads:
        start = first + name
        found[bytes(data[start : data.index(b"\0", start)]).decode()] = offset, offset + length
    return found


def entries(data: bytes | bytearray, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """(kind, architecture, from, to) of the code of each entry of each fat binary between two places."""
    at = start
    while at + 16 <= stop:
        magic, _, head, size = struct.unpack_from("<IHHQ", data, at)
        if magic != MAGIC:
            at += 8
            continue
        at, end = at + head, at + head + size
        while at < end:
            kind, _, head, size = struct.unpack_from("<HHIQ", data, at)
            (architecture,) = struct.unpack_from("<I", data, at + 28)
            yield kind, architecture, at + head, at + head + size
            at += head + size


def slim(data: bytearray, architecture: int) -> tuple[int, int]:
    """Blank all other code in place; (bytes kept, bytes blanked). ValueError where none would be left."""
    places = sections(data)
    start, stop = places.get("__nv_relfatbin", (0, 0))
    data[start:stop] = bytes(stop - start)
    kept, blanked = 0, stop - start
    for kind, own, start, stop in entries(data, *places.get(".nv_fatbin", (0, 0))):
        if (kind, own) == (MACHINE_CODE, architecture):
            kept += stop - start
        else:
            data[start:stop] = bytes(stop - start)
            blanked += stop - start
    if not kept:
        raise ValueError(f"no machine code for sm_{architecture}")
    return kept, blanked


def main() -> None:
    source, target, architecture = sys.argv[1:]
    data = bytearray(Path(source).read_bytes())
    kept, blanked = slim(data, int(architecture))
    Path(target).write_bytes(data)
    print(f"{target}: sm_{architecture} alone, {kept >> 20} MiB of device code kept, {blanked >> 20} blanked")


if __name__ == "__main__":
    main()
