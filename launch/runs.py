"""A run's folder, read for those who want to look at it: what happened, and what the model says of the test images."""

from __future__ import annotations

import gzip
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from distrib import mnist
from distrib.config import Config
from distrib.errors import UserError
from distrib.evaluate import HOST_BATCH
from distrib.predict import load
from distrib.predict import logits as logits_of
from launch.plots import shown

POINTS = 600
"""Most points of a curve: more are averaged, as no screen shows them."""


@dataclass
class RunData:
    """config.json, metrics.jsonl and summary.json of one run; `summary` is empty while it is running."""

    path: Path
    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    steps: list[dict[str, Any]]
    epochs: list[dict[str, Any]]
    summary: dict[str, Any]

    @property
    def state(self) -> str:
        """finished, stopped, or unfinished: running, or ended without a word."""
        return "unfinished" if not self.summary else "finished" if self.summary["finished"] else "stopped"

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, values) of a number of the logged steps, averaged where there are many; epochs may be fractions."""
        found = [(line["step"], line[name]) for line in self.steps if line.get(name) is not None]
        if not found:
            return np.empty(0), np.empty(0)
        parts = np.array_split(np.array(found, float), min(len(found), POINTS))
        steps, values = np.array([part.mean(0) for part in parts]).T
        return steps / self.steps_per_epoch, values

    def by_epoch(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, values) of a number of the epochs' lines."""
        found = [(line["epoch"], line[name]) for line in self.epochs if name in line]
        epochs, values = np.array(found, float).reshape(-1, 2).T
        return epochs, values

    @property
    def steps_per_epoch(self) -> float:
        """Of the first whole epoch; before its end, by the options."""
        if self.epochs:
            return float(self.epochs[0]["step"] / self.epochs[0]["epoch"])
        images = self.config["limit_train"] or training_images(self.config["data"]) or mnist.TRAINING_IMAGES
        return float(-(-images // self.config["batch_size"]))

    @property
    def last(self) -> dict[str, Any]:
        """The figures of the last lines, named as in summary.json, of a run that has none yet."""
        last = {**(self.epochs[-1] if self.epochs else {}), "epochs": len(self.epochs)}
        return {**last, "steps": max((line["step"] for line in (*self.steps, *self.epochs)), default=0)}

    def parts_ms(self) -> dict[str, float] | None:
        """Milliseconds of a step that go to compute, communication and data; None where a GPU's graph hides them."""
        names, steps = ("compute", "communication", "data"), 0
        sums = dict.fromkeys(names, 0.0)
        for before, line in zip([{"step": 0}, *self.steps], self.steps, strict=False):
            if line.get("compute_seconds") is not None:
                steps += line["step"] - before["step"]
                for name in names:
                    sums[name] += line[f"{name}_seconds"]
        return {name: 1e3 * total / steps for name, total in sums.items()} if steps else None


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean of each value and its neighbours, a thirtieth of all on either side, one at least."""
    reach = max(1, len(values) // 30)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    first, last = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    return np.asarray((sums[last] - sums[first]) / (last - first))


def read_run(path: Path) -> RunData:
    """The run in a folder; UserError where it holds none."""
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: holds no run (it has no config.json): give a run's folder")
    config = _json(path / "config.json")
    environment = config.pop("environment", {})
    lines = []
    if (path / "metrics.jsonl").exists():
        for text in (path / "metrics.jsonl").read_text(errors="replace").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:  # the last line of a run that is going on, or was killed
                continue
    summary = _json(path / "summary.json") if (path / "summary.json").exists() else {}
    return RunData(
        path,
        shown(path.resolve().name),
        {**asdict(Config()), **config},
        environment,
        [line for line in lines if "loss" in line],
        [line for line in lines if "loss" not in line],
        summary,
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}): restore it, or leave this run out") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: cannot be read (no JSON object): restore it, or leave this run out")
    return value


def training_images(data: str | None) -> int | None:
    """Images of the training set by the head of its file; None where it cannot be read."""
    for path in (Path(data or mnist.SHIPPED) / f"train-images-idx3-ubyte{ending}" for ending in (".gz", "")):
        with suppress(OSError, EOFError), (gzip.open if path.suffix else open)(path, "rb") as file:
            return int.from_bytes(file.read(8)[4:], "big") or None
    return None


def logits_of_test_images(run: RunData) -> tuple[np.ndarray, mnist.Dataset, int]:
    """(logits (images, 10), data, step) of the test images after the run's last step, or at its newest checkpoint.

    The first are read from logits.safetensors, the second computed. UserError where the run has no checkpoint yet, or
    its data cannot be had.
    """
    data = mnist.load(run.config["data"], 1, run.config["limit_test"])
    try:
        with safe_open(run.path / "logits.safetensors", framework="numpy") as file:
            logits, step = file.get_tensor("logits"), int(file.metadata()["step"])
        if logits.shape == (len(data.test_images), 10) and step == run.summary.get("steps"):
            return logits, data, step
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        pass  # a run that goes on, or was stopped
    model, images = load(run.path).model, data.test_images
    found = [
        logits_of(model, images, start, min(start + HOST_BATCH, len(images)))
        for start in range(0, len(images), HOST_BATCH)
    ]
    return np.concatenate(found), data, model.batches_tracked
