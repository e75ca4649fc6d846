"""What the reference reports, and the runs that reproduce it.

The reference is a CuPy and NumPy implementation of the same network; its figures are those of single runs on
an H800 GPU, its NumPy one with loops on an 11th-generation i9.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from distrib.data import sampler
from distrib.errors import UserError
from distrib.files import fits, open_to_read, read_json
from launch.machine import DISTRIB, mpirun
from launch.report.records import brief, line_of, read_summary

TRAINING_IMAGES = 60_000
"""Of MNIST, which the reference trains on."""

PARTS = ("accuracy", "ablation", "curves", "time")
BATCH, RATE = 8, 1e-3


@dataclass(frozen=True)
class Row:
    """A line of the reference's tables: a run of ours, or of PyTorch."""

    name: str
    label: str
    options: tuple[str, ...]
    test: float  # the reference's accuracies, percent
    train: float | None = None
    torch: bool = False


SGD, ADAM = ("--optimizer", "sgd"), ("--optimizer", "adam")
TORCH = Row("torch-adam", "PyTorch (Adam)", ADAM, 99.38, 99.67, torch=True)
OURS_SGD = Row("baseline-sgd", "ours (SGD)", SGD, 99.21, 99.46)
OURS_ADAM = Row("baseline-adam", "ours (Adam)", ADAM, 99.43, 99.65)
ROWS = {
    "accuracy": (TORCH, OURS_SGD, OURS_ADAM),
    "ablation": (
        replace(OURS_SGD, label="baseline: residual added, 2 blocks, max pooling (SGD)"),
        Row("avgpool-sgd", "variant 1: average pooling (SGD)", ("--variant", "avgpool", *SGD), 99.46),
        Row(
            "conv-shortcut-sgd",
            "variant 2: residual through a convolution (SGD)",
            ("--variant", "conv-shortcut", *SGD),
            99.19,
        ),
        Row(
            "three-blocks-sgd",
            "variant 3: the same, 3 blocks (SGD)",
            ("--variant", "three-blocks", *SGD),
            99.20,
        ),
        replace(OURS_ADAM, label="variant 4: baseline (Adam)"),
    ),
    "curves": (TORCH, OURS_SGD, OURS_ADAM),
}
SECONDS = {"plain loop": 48994.08, "cupy": 1508.85, "torch": 203.93}
"""The reference's seconds of a training run: NumPy with loops, CuPy, PyTorch."""


@dataclass(frozen=True)
class Settings:
    """How long the runs of a part are: all options that its result depends on, besides the row's own."""

    epochs: int = 8
    limit_train: int | None = None
    limit_test: int | None = None
    width: float = 1.0
    seeds: int = 1
    ranks: int = 1
    backend: str = "numpy"

    def options(self, seed: int) -> list[str]:
        """For `distrib train`."""
        given = {
            "epochs": self.epochs,
            "batch-size": BATCH,
            "lr": RATE,
            "width": self.width,
            "seed": seed,
            "backend": self.backend,
            "limit-train": self.limit_train,
            "limit-test": self.limit_test,
        }
        pairs = [(f"--{name}", str(value)) for name, value in given.items() if value is not None]
        return [text for pair in pairs for text in pair]

    def steps(self) -> int:
        """Of one run."""
        return self.epochs * sampler.steps_per_epoch(self.limit_train or TRAINING_IMAGES, BATCH)

    def say(self) -> str:
        """For people."""
        images = f"{self.limit_train or TRAINING_IMAGES:,} training images"
        few = f", {self.limit_test:,} test images" if self.limit_test else ""
        how = f"batch {BATCH}, rate {RATE:g}, width {self.width:g}, {self.seeds} seed(s)"
        return f"{self.epochs} epoch(s) of {images}{few}, {how}"


@dataclass(frozen=True)
class Job:
    """One training run: where it lies, and what starts it."""

    row: Row
    settings: Settings
    seed: int
    folder: Path
    command: list[str]

    def finished(self) -> bool:
        """Whether it has its result."""
        path = self.folder / "summary.json"
        return path.exists() and bool(read_summary(path)["finished"])

    def step(self) -> int:
        """Steps done, by the last line of metrics.jsonl."""
        with suppress(OSError, IndexError), open_to_read(self.folder / "metrics.jsonl") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 1000))
            return (line_of(file.read(1000).splitlines()[-1]) or {}).get("step", 0)
        return 0


def key(values: Any) -> str:
    """A short name for these values."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]


def jobs(part: str, settings: Settings, out: Path) -> list[Job]:
    """The runs of a part. The number of ranks changes only the speed, so it is no part of a run's name."""
    found = []
    for row in ROWS[part]:
        for seed in range(settings.seeds):
            options = [*row.options, *settings.options(seed)]
            folder = out / "runs" / f"{row.name}-seed{seed}-{key([row.torch, options])}"
            ours = [*mpirun(settings.ranks), sys.executable, "-m", "distrib.train"]
            start = [*DISTRIB, "torch-train"] if row.torch else ours
            command = [*start, "--run-dir", str(folder), "--log-every", "10", *options]
            found.append(Job(row, settings, seed, folder, command))
    return found


def read_settings(path: Path) -> dict[str, Settings]:
    """The parts that were asked for before, with their settings; UserError where somebody damaged them."""
    kinds = {each.name: str(each.type) for each in fields(Settings)}
    found = {}
    for part, values in read_json(path, remedy="restore it, or give another --out").items():
        sound = part in PARTS and isinstance(values, dict) and values.keys() == kinds.keys()
        if not (sound and all(fits(kinds[name], value) for name, value in values.items())):
            raise UserError(f"{path}: holds no settings of {brief(part)}: restore it, or give another --out")
        found[part] = Settings(**values)
        if min(found[part].epochs, found[part].seeds, found[part].ranks) < 1:
            raise UserError(f"{path}: a number of {part} is below 1: restore it, or give another --out")
    return found
