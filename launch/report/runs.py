"""A run's folder, read for those who want to look at it.

What happened: its options, its logged steps and epochs, its result. And what its model says of the test
images. A metrics.jsonl of any length is read line by line and kept in bounded memory.
"""

from __future__ import annotations

import functools
import gzip
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from distrib import predict
from distrib.config import Config
from distrib.data import formats, idx
from distrib.data.dataset import Dataset, Reading
from distrib.errors import UserError
from distrib.evaluate import HOST_BATCH
from distrib.faults import survived
from distrib.files import open_to_read
from distrib.predict import Loaded
from distrib.predict import logits as logits_of
from launch.report.records import REMEDY, line_of, read_config, read_summary, shown, whole_lines

POINTS = 600
"""Points of a curve that are kept at least, and at most twice as many: no screen shows more."""

PARTS = ("compute", "communication", "data")


class Curve:
    """Points (x, y) of any number, in order: neighbours are averaged, so that at most 2·POINTS are kept."""

    def __init__(self) -> None:
        self._each, self._bins = 1, list[list[float]]()  # [sum of x, sum of y, points]

    def add(self, x: float, y: float) -> None:
        bins = self._bins
        if not bins or bins[-1][2] == self._each:
            if len(bins) == 2 * POINTS:
                pairs = zip(bins[::2], bins[1::2], strict=True)
                self._bins = bins = [[a + b for a, b in zip(*pair, strict=True)] for pair in pairs]
                self._each *= 2
            bins.append([0.0, 0.0, 0])
        last = bins[-1]
        last[0] += x
        last[1] += y
        last[2] += 1

    def points(self, most: int = 2 * POINTS) -> tuple[np.ndarray, np.ndarray]:
        """(x, y), averaged to at most `most`."""
        if not self._bins:
            return np.empty(0), np.empty(0)
        bins = np.array(self._bins)
        starts = np.arange(0, len(bins), -(-len(bins) // most))
        x, y, count = np.add.reduceat(bins, starts).T
        return x / count, y / count


@dataclass
class Log:
    """What metrics.jsonl tells, taken in line by line."""

    steps: int = 0  # lines
    epochs: int = 0
    last_step: int = 0
    first_epoch: dict[str, Any] = field(default_factory=dict)
    last_epoch: dict[str, Any] = field(default_factory=dict)
    of_steps: dict[str, Curve] = field(default_factory=dict)
    of_epochs: dict[str, Curve] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    timed: int = 0  # steps that `seconds` are of
    _before: int = 0

    def add(self, line: dict[str, Any]) -> None:
        """Take in a line of `line_of`."""
        self.last_step = max(self.last_step, line["step"])
        if "loss" not in line:
            self.epochs += 1
            self.first_epoch = self.first_epoch or line
            self.last_epoch = line
            held = "validation" if "validation_loss" in line else "test"
            for name in (f"{held}_loss", f"{held}_accuracy", "train_accuracy"):
                self._point(self.of_epochs, name, line["epoch"], line)
            return
        self.steps += 1
        for name in ("loss", "lr", "images_per_second"):
            self._point(self.of_steps, name, line["step"], line)
        spent = [line.get(f"{part}_seconds", -1) for part in PARTS]
        if min(spent) >= 0 and line["step"] > self._before:
            self.timed += line["step"] - self._before
            for part, more in zip(PARTS, spent, strict=True):
                self.seconds[part] += more
        self._before = line["step"]

    @staticmethod
    def _point(curves: dict[str, Curve], name: str, x: float, line: dict[str, Any]) -> None:
        y = line.get(name)
        if y is None or y != y:
            return
        if name not in curves:
            curves[name] = Curve()
        curves[name].add(x, y)


def read_log(path: Path) -> Log:
    """metrics.jsonl; an empty Log where there is none. UserError where it cannot be read."""
    log = Log()
    try:
        with open_to_read(path) as file:
            for text, _ in whole_lines(file):
                if line := line_of(text):
                    log.add(line)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {REMEDY}") from None
    return log


# ---- a run


@dataclass
class RunData:
    """config.json, metrics.jsonl and summary.json of one run; `summary` is empty while it is running."""

    path: Path
    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    dataset: dict[str, Any]
    log: Log
    summary: dict[str, Any]
    survived: list[dict[str, Any]] = field(default_factory=list)  # ranks that died; the others went on

    @property
    def state(self) -> str:
        """finished, stopped, or unfinished: running, or ended without a word."""
        return "unfinished" if not self.summary else "finished" if self.summary["finished"] else "stopped"

    def curve(self, name: str, most: int = 2 * POINTS) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, values) of a number of the logged steps, in at most `most` means; epochs in fractions."""
        steps, values = self.log.of_steps.get(name, Curve()).points(most)
        return steps / self.steps_per_epoch, values

    @property
    def held_out(self) -> str:
        """On what its epochs report: test, or validation images."""
        return "validation" if self.config.get("validation") else "test"

    def by_epoch(self, name: str, most: int = 2 * POINTS) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, values) of a number of the epochs' lines."""
        return self.log.of_epochs.get(name, Curve()).points(most)

    @property
    def steps_per_epoch(self) -> float:
        """Of the first whole epoch; before its end, by the options."""
        if first := self.log.first_epoch:
            return float(first["step"] / first["epoch"])
        images = images_of(self.config, self.dataset) or 1
        return float(-(-images // self.config["batch_size"]))

    @property
    def last(self) -> dict[str, Any]:
        """The figures of the last lines, named as in summary.json, of a run that has none yet."""
        return {**self.log.last_epoch, "epochs": self.log.epochs, "steps": self.log.last_step}

    def parts_ms(self) -> dict[str, float] | None:
        """Milliseconds of a step for compute, communication and data; None where a GPU's graph hides them."""
        seconds, steps = self.log.seconds, self.log.timed
        return (
            {part: 1e3 * seconds[part] / steps for part in PARTS}
            if steps and sum(seconds.values()) > 0
            else None
        )


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean of each value and its neighbours, a thirtieth of all on either side, one at least."""
    reach = max(1, len(values) // 30)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    first, last = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    return np.asarray((sums[last] - sums[first]) / (last - first))


def read_run(path: Path) -> RunData:
    """The run in a folder; UserError where it holds none, or names the file that cannot be read."""
    if not (path / "config.json").exists():
        raise UserError(f"{path}: holds no run (it has no config.json): give a run's folder")
    config, environment, dataset = read_config(path / "config.json")
    summary = path / "summary.json"
    return RunData(
        path,
        shown(path.resolve().name),
        {**asdict(Config()), **config},
        environment,
        dataset,
        read_log(path / "metrics.jsonl"),
        read_summary(summary) if summary.exists() else {},
        survived.read(path),
    )


# ---- what the model says


def images_of(config: dict[str, Any], dataset: dict[str, Any]) -> int | None:
    """Images of a run's training set; of version 0.1's runs by the head of its file, None without one."""
    return dataset.get("train_images") or config.get("limit_train") or training_images(config.get("data"))


def load_data(model: Loaded, data: str | None, limit_test: int | None) -> Dataset:
    """The data of the run that a model is of, read as that run does; or `data`, as the model wants it."""
    checkpoint = model.path
    config: dict[str, Any] = {}
    for folder in (checkpoint, checkpoint.parent, checkpoint.parent.parent):
        if (folder / "config.json").is_file():
            config = read_config(folder / "config.json")[0]
            break
    reading = reading_of(config)
    if data is None:
        return formats.load(config.get("data"), None, limit_test, reading)
    h, w, c = model.model.shape
    wanted = reading._replace(size=f"{h}x{w}", grey=c == 1)
    return formats.load(data, None, limit_test, formats.taken(data, wanted))


def reading_of(config: dict[str, Any]) -> Reading:
    """How a stored run reads its data's files."""
    return Reading(**{name: config[name] for name in Reading._fields if name in config})


def training_images(data: str | None) -> int | None:
    """Images of the training set by the head of its IDX file; None where it cannot be read."""
    for ending in (".gz", ""):
        path = Path(data or idx.SHIPPED) / f"train-images-idx3-ubyte{ending}"
        with suppress(OSError, EOFError, ValueError, zlib.error), open_to_read(path) as file:
            head = gzip.GzipFile(fileobj=file).read(8) if ending else file.read(8)
            return int.from_bytes(head[4:], "big") or None
    return None


@functools.lru_cache(maxsize=2)
def all_test_images(data: str | None, reading: Reading) -> Dataset:
    """A data set with one training image, remembered for the next run of a report."""
    return formats.load(data, limit_train=1, reading=reading)


def logits_of_test_images(run: RunData, compute: bool = True) -> tuple[np.ndarray, Dataset, int]:
    """(logits (n, classes), data, step) of the test images, after the last step or at a checkpoint.

    The first are read from logits.safetensors, the second computed, where `compute` allows it. UserError
    where the run has no checkpoint yet, its data cannot be had, or nothing is kept and nothing may be
    computed.
    """
    limit = run.config["limit_test"]
    data = all_test_images(run.config["data"], reading_of(run.config)).first(None, limit)
    images = data.test_images
    kept = kept_logits(run, len(images), data.classes)
    if kept:
        return kept[0], data, kept[1]
    if not compute:
        raise UserError(f"not computed here, as many runs are compared: distrib report {run.path} shows them")
    loaded = predict.load(run.path)
    loaded.require_fit(data)
    model = loaded.model
    found = [
        logits_of(model, images, start, min(start + HOST_BATCH, len(images)))
        for start in range(0, len(images), HOST_BATCH)
    ]
    return np.concatenate(found), data, loaded.step


def kept_logits(run: RunData, images: int, classes: int) -> tuple[np.ndarray, int] | None:
    """(logits, step) in the run's logits.safetensors, where they are those of its last step."""
    path = run.path / "logits.safetensors"
    with suppress(OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError):
        if not path.is_file():  # safe_open would wait for a FIFO's writer
            return None
        with safe_open(path, framework="numpy") as file:
            step = int(file.metadata()["step"])
            if file.get_slice("logits").get_shape() == [images, classes] and step == run.summary.get("steps"):
                logits = np.asarray(file.get_tensor("logits"), np.float64)
                return (logits, step) if np.isfinite(logits).all() else None
    return None  # a run that goes on, or was stopped
