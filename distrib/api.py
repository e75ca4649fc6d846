"""Training from Python: `distrib.fit`, and `distrib.load` for a network that was trained before."""

from __future__ import annotations

import difflib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from distrib import launched_rank, models, predict
from distrib.comm.base import SingleCommunicator
from distrib.comm.world import connect
from distrib.config import Config, build
from distrib.data import dataset, formats
from distrib.data.dataset import Dataset, Reading
from distrib.errors import OnAllRanks, UserError
from distrib.evaluate import evaluate
from distrib.export import format_of, onnx_bytes, require_free, to_safetensors
from distrib.files import fits, read_json, shown, write
from distrib.loop import Caller, OnEpoch, train_on
from distrib.run.machine import limit_threads
from distrib.run.model_spec import network_arguments
from distrib.trainer import Trainer
from nn.network import Model, Network

Data = Dataset | str | os.PathLike[str] | tuple[np.ndarray, ...]
"""A data set: (x_train, y_train, x_test, y_test), a path or name as --data takes it, or a `Dataset`."""

ARRAYS = "(arrays)"
"""What a run's config.json names as its data where the images came from a program."""


@dataclass(frozen=True)
class Trained:
    """A trained network, on the host. `summary` is that of its run, None where it has not ended.

    Images are uint8 (N, H, W, C), or (N, H, W) of one channel, as the network was trained on.
    """

    summary: dict[str, Any] | None
    _loaded: predict.Loaded
    _rank: int = 0

    @property
    def network(self) -> Network:
        """The layers and their weights; `network.state_dict()` has the weights by PyTorch's names."""
        return self._loaded.model

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by label."""
        return self._loaded.class_names

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits (N, classes) of `images`."""
        images, size = self._checked(images), predict.HOST_BATCH
        with _our_settings():
            parts = [
                predict.logits(self.network, images, start, min(start + size, len(images)))
                for start in range(0, len(images), size)
            ]
        return np.concatenate([np.zeros((0, self.network.classes), self.network.dtype), *parts])

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Probabilities (N, classes), float64: softmax, or sigmoid of a network trained with bce."""
        return predict.probabilities(self.logits(images).astype(np.float64), self._loaded.loss)

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Labels (N,) of `images`: the class with the largest logit, the first of equals."""
        return self.logits(images).argmax(1)

    def evaluate(self, data: Data) -> dict[str, float]:
        """{"test_loss": …, "test_accuracy": percent} on the test set of `data`, or on (images, labels)."""
        found = self._test_set(data)
        self._loaded.require_fit(found)
        sets = found.test_images, found.test_labels
        with _our_settings():
            loss, accuracy = evaluate([self.network], *sets, self._loaded.loss, SingleCommunicator())
        return {"test_loss": loss, "test_accuracy": accuracy}

    def export(self, path: str | os.PathLike[str]) -> None:
        """Write NAME.onnx (needs the extra `report`) or NAME.safetensors. Of several ranks, rank 0 writes.

        Where onnxruntime is installed, an ONNX graph must give our logits, or nothing is written.
        """
        if self._rank:
            return
        out = Path(path)
        kind = format_of(out, None)
        require_free(out, self._loaded.path)
        write(out, to_safetensors(self._loaded) if kind == "safetensors" else onnx_bytes(self._loaded))

    def _checked(self, images: np.ndarray) -> np.ndarray:
        images = np.asarray(images)
        h, w, c = self.network.shape
        if images.ndim == 3 and c == 1:
            images = images[..., None]
        if images.dtype != np.uint8 or images.shape[1:] != (h, w, c):
            raise UserError(
                f"images: {images.dtype} of shape {images.shape}: give uint8 of shape (N, {h}, {w}, {c})"
            )
        return images

    def _test_set(self, data: Data) -> Dataset:
        h, w, c = self.network.shape
        if isinstance(data, str | os.PathLike):
            name = os.fspath(data)
            return formats.load(name, reading=formats.taken(name, Reading(size=f"{h}x{w}", grey=c == 1)))
        if isinstance(data, tuple) and len(data) == 2:
            names = tuple(self.class_names)
            return dataset.make("arrays", _arrays(data), _arrays(data), names)
        return _dataset(data)


def fit(
    model: str | Model = "resnet9",
    data: Data | None = None,
    *,
    run_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    on_epoch: OnEpoch | None = None,
    comm: Any = "auto",
    **options: Any,
) -> Trained:
    """Train a network, alone or on all ranks that mpirun or srun started; returns it on every rank.

    `model` is what --model takes, or a function of (shape, classes) that returns layers. `data` is
    (x_train, y_train, x_test, y_test), images uint8 (N, H, W, C), a path or a `Dataset`; by default MNIST.
    `options` are those of the command line: `batch_size=64` for --batch-size 64.

    With `run_dir` the run is kept there, and resumed if it was stopped; without, nothing is written.
    `on_epoch` is called on every rank with a dict: epoch, step, train_loss, test_accuracy and so on. `comm`
    may be an mpi4py communicator: its ranks train, over a duplicate.

    Raises UserError, a ValueError with the words of the command line, on all ranks that know of the mistake.
    What a rank alone raises ends the job, within `timeout` seconds. A signal stops the run after a step, with
    a checkpoint if it has a folder; then the signal has its usual effect, as KeyboardInterrupt.
    """
    config, caller = _arrange(model, data, run_dir, comm, options)
    caller = replace(caller, on_epoch=on_epoch, prints=progress, writes=config.run_dir is not None)
    try:
        with (
            _our_settings(),
            connect(comm, config.backend, config.precision, config.timeout, config.elastic) as world,
        ):
            trainer, summary = train_on(world, config, caller)
            trained = Trained(summary, _on_host(trainer, config), world.rank)
    except OnAllRanks as carried:
        raise carried.__cause__ or carried from None
    if trainer.stop_requested:
        signal.raise_signal(trainer.stop_requested)
    return trained


def load(path: str | os.PathLike[str], model: str | Model | None = None) -> Trained:
    """The network of a run's folder (the best that it kept, else the newest) or of a checkpoint's file.

    One that does not ship needs its `model` again, as `fit` took it: a stored run never runs a file.
    UserError says what is wrong with what is stored.
    """
    place = Path(path)
    loaded = predict.load(place, model)
    summary = place / "summary.json"
    known = read_json(summary, remedy="restore the file") if summary.is_file() else None
    return Trained(known, loaded, launched_rank())


def _on_host(trainer: Trainer, config: Config) -> predict.Loaded:
    """The trained network, built again with NumPy's arrays and memory of its own."""
    network = Network(*network_arguments(trainer.model_spec, trainer.function), dtype=config.dtype)
    network.load_state_dict(trainer.state_dict())
    return predict.Loaded(Path(config.run_dir or "the network"), network, trainer.model_spec)


def _arrange(
    model: str | Model, data: Data | None, run_dir: Any, comm: Any, options: dict[str, Any]
) -> tuple[Config, Caller]:
    """What a command's options say, and what only a program can give."""
    function, found = None, None
    if not isinstance(model, str):
        if not callable(model):
            raise UserError(f"model {shown(model)}: give a name, or a function of (shape, classes)")
        model, function = models.given(model)
    if data is not None and not isinstance(data, str | os.PathLike):
        data, found = ARRAYS, _dataset(data)
    given = {
        "model": model,
        "data": None if data is None else os.fspath(data),
        "run_dir": None if run_dir is None else os.fspath(run_dir),
        "comm": comm if isinstance(comm, str) else "auto",
    }
    return build({**_typed(options), **given}), Caller(found, function)


def _typed(options: dict[str, Any]) -> dict[str, Any]:
    """The options, with plain numbers; TypeError for one that does not exist, UserError for another type."""
    kinds = {each.name: str(each.type) for each in fields(Config)}
    found = {}
    for name, value in options.items():
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, 1)
            raise TypeError(f"fit() has no option {name}{f': did you mean {near[0]}?' if near else ''}")
        plain = value.item() if isinstance(value, np.generic) else value
        if not fits(kinds[name], plain) and plain is not None:
            raise UserError(f"--{name.replace('_', '-')} {shown(repr(value))}: give {kinds[name]}")
        found[name] = plain
    return found


def _arrays(pair: Any) -> tuple[np.ndarray, np.ndarray]:
    images, labels = map(np.asarray, pair)
    return images, labels


def _dataset(data: Any) -> Dataset:
    if isinstance(data, Dataset):
        return data
    if not isinstance(data, tuple | list) or len(data) != 4:
        kind = type(data).__name__ + (f" of {len(data)}" if isinstance(data, tuple | list) else "")
        raise UserError(f"data: a {kind}: give (x_train, y_train, x_test, y_test), a path or a Dataset")
    return dataset.make("arrays", _arrays(data[:2]), _arrays(data[2:]))


@contextmanager
def _our_settings() -> Iterator[None]:
    """Context with NumPy's warnings off and, of several ranks, one BLAS thread each, as for a command."""
    with np.errstate(all="ignore"), limit_threads():
        yield
