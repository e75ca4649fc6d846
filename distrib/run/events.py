"""Writes TensorBoard's event files, with the contents of metrics.jsonl.

A file is a sequence of records: length (8 bytes), masked CRC-32C of it, data, masked CRC-32C of that, all
little-endian (`tensorflow/core/lib/io/record_writer.h`); the data is a protocol-buffer message `Event`
(`tensorflow/core/util/event.proto`) of which we use four fields. tensorboardX would import PyTorch if it
is installed, which takes a second at each start.

Each start of a run writes a new file and never changes older ones: TensorBoard reads files in the order of
their names, and follows the newest while it is open. A file starts with its first step; the reader drops that
step and later ones from older files.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PREFIX = "events.out.tfevents."
FILE = re.compile(re.escape(PREFIX) + r"(\d{10,})\.")


def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)  # Castagnoli's polynomial, reflected
        table.append(byte)
    return table


TABLE = _table()


def masked_crc(data: bytes) -> int:
    """CRC-32C, rotated and offset as the format requires."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def record(data: bytes) -> bytes:
    """`data` as one record of the file."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc(length)) + data + struct.pack("<I", masked_crc(data))


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def _field(number: int, data: bytes) -> bytes:
    """A field of bytes: a string or a message."""
    return bytes([number << 3 | 2]) + _varint(len(data)) + data


def _float(value: float) -> bytes:
    """As float32. A loss in float64 that is too large becomes infinite."""
    try:
        return struct.pack("<f", value)
    except OverflowError:
        return struct.pack("<f", math.copysign(math.inf, value))


def head(time: float) -> bytes:
    """The record that a file starts with."""
    return record(b"\x09" + struct.pack("<d", time) + _field(3, b"brain.Event:2"))


def start(time: float, step: int) -> bytes:
    """The record that makes readers drop `step` and later steps from older files (SessionLog.START)."""
    return record(b"\x09" + struct.pack("<d", time) + b"\x10" + _varint(step) + _field(7, b"\x08\x01"))


def name(folder: Path, host: str, now: float) -> str:
    """Name of the next file in `folder`: sorted after all others, whatever this host's clock says."""
    earlier = [FILE.match(path.name) for path in folder.glob(f"{PREFIX}*")]
    newest = max((int(found[1]) for found in earlier if found), default=0)
    return f"{PREFIX}{max(int(now), newest + 1):010}.{host}"


def scalars(line: Mapping[str, Any]) -> bytes:
    """The record of a line of metrics.jsonl: its numbers, as train/… of a step or epoch/… of an epoch."""
    group = "train" if "loss" in line else "epoch"
    values = b"".join(
        _field(1, _field(1, f"{group}/{name}".encode()) + b"\x15" + _float(value))
        for name, value in line.items()
        if name not in ("time", "step") and value is not None
    )
    return record(
        b"\x09" + struct.pack("<d", line["time"]) + b"\x10" + _varint(line["step"]) + _field(5, values)
    )
