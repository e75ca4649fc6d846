"""Files of a run's folder, read one by one, whoever wrote them.

Each is read within bounds, and each value has the type that a run gives it. What does not fit is a UserError
that names the file and the value; a line of metrics.jsonl, or a rank's file, is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from distrib.config import options
from distrib.errors import UserError
from distrib.faults import heartbeat
from distrib.faults.heartbeat import MAX_CAUSE, Heartbeat
from distrib.files import fits, printable, read_json

MOST_LINE, MOST_NAMES, MOST_TEXT = 1 << 16, 200, 200
"""Bytes of a line of metrics.jsonl, names of config.json, letters of a value shown."""

LARGEST = 1e15
"""Greater numbers are no figures of a run."""

REMEDY = "restore it, or leave this run out"
NUMBERS = (int, float)
SUMMARY_KINDS = {
    **dict.fromkeys(("epochs", "steps", "world_size", "parameters"), "int | None"),
    **dict.fromkeys(("test_accuracy", "test_loss", "train_accuracy", "train_loss"), "float | None"),
    **dict.fromkeys(("images_per_second", "wall_seconds"), "float | None"),
    **dict.fromkeys(("backend", "communicator"), "str | None"),
    "finished": "bool",
}
AT_LEAST_ONE = ("epochs", "batch_size", "batch_size_per_rank", "limit_train", "limit_test", "log_every")


def sound(kind: str, value: Any) -> bool:
    """Whether `value` is of a type such as "float | None"; numbers are below LARGEST too."""
    return fits(kind, value) and (type(value) not in NUMBERS or is_figure(value))


def is_figure(value: Any) -> bool:
    """Whether `value` is a number, finite and below LARGEST."""
    return type(value) in NUMBERS and -LARGEST < value < LARGEST


def read_typed(path: Path, kinds: dict[str, str]) -> dict[str, Any]:
    """The JSON object in a file, where each name of `kinds` is of that kind; UserError names what is not."""
    values = read_json(path, remedy=REMEDY)
    for name, kind in kinds.items():
        if name in values and not sound(kind, values[name]):
            raise UserError(f'{path}: "{name}" is {brief(values[name])}, which is no {kind}: {REMEDY}')
    return values


def brief(value: Any) -> str:
    """A JSON value in a few letters."""
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "an object"
    return printable(json.dumps(value, ensure_ascii=False), 40)


def scalars(values: Any) -> dict[str, Any]:
    """The first names of an object, fit to be shown, with their values; what is no text or number is "…"."""
    found = list(values.items())[:MOST_NAMES] if isinstance(values, dict) else []
    return {
        printable(name, 60): value if sound("int | float | str | bool | None", value) else "…"
        for name, value in found
    }


DATASET = {
    "name": "str",
    "shape": "list[int]",
    "class_names": "list[str]",
    "train_images": "int",
    "test_images": "int",
}
"""Types of what config.json says of the data; runs of version 0.1 say nothing."""


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(options, environment, about the data set) in a run's config.json; UserError where it is none."""
    values = read_typed(path, {name: kind for name, kind, *_ in options()})
    for name in AT_LEAST_ONE:
        if values.get(name) is not None and values[name] < 1:
            raise UserError(f'{path}: "{name}" is {values[name]}, which is below 1: {REMEDY}')
    environment, known = values.pop("environment", {}), [name for name, *_ in options() if name in values]
    dataset = values.pop("dataset", {})
    if not isinstance(dataset, dict) or not all(
        fits(DATASET[k], v) for k, v in dataset.items() if k in DATASET
    ):
        dataset = {}
    return {name: values.pop(name) for name in known} | scalars(values), scalars(environment), dataset


def read_summary(path: Path) -> dict[str, Any]:
    """A run's summary.json: its figures, and `finished`; UserError where it is none."""
    values = read_typed(path, SUMMARY_KINDS)
    return {"finished": False, **{name: values[name] for name in SUMMARY_KINDS if name in values}}


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """The last heartbeat of every rank of the run in `folder`, by rank, fit to be shown."""
    beats = {
        beat.rank: beat
        for beat in heartbeat.read_heartbeats(folder)
        if beat.rank >= 0 and 0 < beat.pid < 1 << 31
    }
    return [
        replace(beat, host=shown(beat.host), doing=shown(beat.doing), state=printable(beat.state, MAX_CAUSE))
        for _, beat in sorted(beats.items())
    ]


def shown(text: str) -> str:
    """A text that somebody else wrote, for a page or a terminal."""
    return printable(text, MOST_TEXT)


def whole_lines(file: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """(line, bytes up to its end from here) of each line that ends; b"" for one longer than MOST_LINE."""
    read, line = 0, b""
    while part := file.readline(MOST_LINE):
        read += len(part)
        line = line + part if len(line) <= MOST_LINE else line
        if part.endswith(b"\n"):
            yield (line if len(line) <= MOST_LINE else b""), read
            line = b""


def line_of(text: bytes) -> dict[str, Any] | None:
    """The figures in a line of metrics.jsonl, with `step` and `epoch` whole numbers from 1; else None.

    A logged step's has a `loss`, NaN where it is no finite number; an epoch's has none.
    """
    try:
        values = json.loads(text)
        found = {  # is_figure, without a call for each of a long run's numbers
            name: v for name, v in values.items() if type(v) in NUMBERS and -LARGEST < v < LARGEST
        }
        step, epoch = found["step"], found["epoch"]
    except (ValueError, RecursionError, AttributeError, KeyError):  # half a line, or no object
        return None
    if not (isinstance(step, int) and isinstance(epoch, int) and step >= 1 and epoch >= 1):
        return None
    return found if "loss" not in values else {"loss": float("nan"), **found}
