"""Classifies single images with a trained model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distrib import models
from distrib.data.dataset import Dataset
from distrib.errors import UserError
from distrib.evaluate import HOST_BATCH, infer
from distrib.files import listed, printable, shown
from distrib.pictures.prepare import Pictures, read_pictures, read_scaled
from distrib.run import checkpoint as ckpt
from distrib.run.model_spec import network_arguments
from nn.layer import text
from nn.network import Model, Network
from nn.ops.batch import LABELS

DIGITS = [str(digit) for digit in range(10)]


@dataclass(frozen=True)
class Loaded:
    """A model from a checkpoint, ready on the host, with its model spec (see `describe_model`)."""

    path: Path
    model: Network
    model_spec: dict[str, Any]

    @property
    def loss(self) -> str:
        return str(self.model_spec["loss"])

    def require_fit(self, data: Dataset) -> None:
        """UserError if the network takes images of another shape than `data`, or has other classes."""
        shape, classes = self.model.shape, self.model.classes
        if (shape, classes) != (data.shape, data.classes):
            raise UserError(
                f"{self.path}: takes images of {text(shape)} and tells {classes} classes apart; {data.name}"
                f" has {text(data.shape)} and {data.classes}: give the data it was trained with (--data)"
            )

    @property
    def step(self) -> int:
        """Training steps that it has had: by the name of its checkpoint, or as batch norm counts them."""
        if "step" in self.model_spec:
            return int(self.model_spec["step"])
        named = ckpt.MODEL_NAME.fullmatch(self.path.name)
        return int(named[1]) if named else self.model.batches_tracked

    @property
    def class_names(self) -> list[str]:
        return list(self.model_spec["class_names"])

    @property
    def digits(self) -> bool:
        """Whether it classifies digits in images like MNIST's."""
        return self.model.shape == (28, 28, 1) and self.class_names == DIGITS


DAMAGES = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)
"""What a file that says nonsense of its model may make raise."""


def load(path: Path, own: str | Model | None = None) -> Loaded:
    """Load the model from a checkpoint file, or of a run's folder: the best that it kept, else the newest.

    `own` makes the layers of a network that does not ship: a function, or FILE.py:FUNCTION, which its user
    gave. UserError, whatever a file says.
    """
    try:
        return _load(path, own)
    except DAMAGES as error:
        if isinstance(error, UserError):
            raise
        said = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path}: its description of the model is damaged ({printable(said, 100)}):"
            " use another checkpoint"
        ) from None


def _load(path: Path, own: str | Model | None) -> Loaded:
    function: Model | None = None
    if own is not None and not isinstance(own, str):
        own, function = models.given(own)
    if path.is_dir() and (best := path / "checkpoints" / ckpt.BEST).exists():
        path = best
    if path.is_dir():
        candidates = ckpt.list_checkpoints(path / "checkpoints") or ckpt.list_checkpoints(path)
        if not candidates:
            raise UserError(
                f"{path}: holds no checkpoint (step-….safetensors): give a run's folder or a checkpoint"
            )
        found, problems = ckpt.newest_valid(candidates[0].parent)
        if found is None:
            raise UserError(f"{path}: no valid checkpoint: {problems[0]}")
        path, tensors, model_spec = found.path, found.model, found.model_spec
    else:
        tensors, model_spec = ckpt.load_model(path)
    name = model_spec["model"]
    if own is None and not models.ships(name):
        raise UserError(f"{path}: its network is {shown(name, 200)}: give that with --model, if you trust it")
    if own is not None and models.ships(name) and own != name:
        raise UserError(f"--model {shown(own, 200)}: {path} holds {name}: leave it out")
    if own is not None and not models.ships(own):
        function = function or models.find(own)
    try:
        with models.building(own or name):
            model = Network(*network_arguments(model_spec, function), dtype=model_spec["dtype"])
        model.load_state_dict(tensors)
        return Loaded(path, model, model_spec)
    except UserError:
        raise
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{path}: does not hold the model that it describes ({error}): use another checkpoint"
        ) from None


def predict_files(loaded: Loaded, paths: list[Path], as_is: bool = False) -> list[dict[str, Any]]:
    """`predict` for each image of each file; UserError lists all files that cannot be read."""
    return [result for pictures in read_all(loaded, paths, as_is) for result in predict(loaded, pictures)]


def read_all(loaded: Loaded, paths: list[Path], as_is: bool = False) -> list[Pictures]:
    """`read` for each file; UserError lists all that cannot be read."""
    found, broken = list[Pictures](), list[str]()
    for path in paths:
        try:
            found.append(read(loaded, path, as_is))
        except UserError as error:
            broken.append(str(error))
    if broken:
        raise UserError(listed(None, broken))
    return found


def read(loaded: Loaded, path: Path, as_is: bool = False) -> Pictures:
    """Read the images of a file as the network takes them: digits prepared like MNIST's, others scaled."""
    shape = loaded.model.shape
    if loaded.digits:
        return read_pictures(path, as_is)
    h, w, c = shape
    if c not in (1, 3):
        raise UserError(f"{loaded.path}: takes images of {c} channels, which no picture has")
    return read_scaled(path, (h, w, c))


def predict(loaded: Loaded, pictures: Pictures) -> Iterator[dict[str, Any]]:
    """Classify each image: its name, class, probability, probabilities of all classes, if it was inverted.

    Probabilities are the softmax of the logits. For a model trained with bce they are sigmoids, one for each
    class, and need not sum to 1. The class is the one with the largest logit, the first of equals. An empty
    image has class None, and all probabilities are 0. If classes are digits, `digit` is the number.
    """
    count = len(pictures.pixels)
    for start in range(0, count, HOST_BATCH):
        z = logits(loaded.model, pictures.pixels, start, min(start + HOST_BATCH, count)).astype(np.float64)
        for i, (row, p) in enumerate(zip(z, probabilities(z, loaded.loss), strict=True), start):
            drawn = bool(pictures.drawn[i])
            best = int(row.argmax())  # large sigmoids round to equal ones
            yield {
                "image": pictures.name(i),
                "class": loaded.class_names[best] if drawn else None,
                **({"digit": best if drawn else None} if loaded.digits else {}),
                "probability": float(p[best]) if drawn else 0.0,
                "probabilities": p.tolist() if drawn else [0.0] * len(p),
                "inverted": bool(pictures.inverted[i]),
            }


def logits(model: Network, images: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Logits (n, classes) of images[start:stop] (uint8), as a new array."""
    return np.array(infer(model, images, np.zeros(len(images), LABELS), start, stop)[0])


def probabilities(z: np.ndarray, loss: str) -> np.ndarray:
    """softmax(z), or for `loss` bce sigmoid(z), of logits z (N, classes) in float64."""
    if loss == "bce":
        return np.exp(-np.logaddexp(0, -z))  # 1 / (1 + exp(−z)), which would overflow
    exp = np.exp(z - z.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)
