"""What a trained model says of single images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distrib.data import idx as mnist
from distrib.errors import UserError
from distrib.evaluate import HOST_BATCH, infer
from distrib.pictures.prepare import Pictures, read_pictures
from distrib.run import checkpoint as ckpt
from nn.network import Network
from nn.ops.batch import LABELS
from nn.resnet9 import MODELS


@dataclass(frozen=True)
class Loaded:
    """A model from a checkpoint, ready on the host. `about` is its variant, width, loss and dtype."""

    path: Path
    model: Network
    about: dict[str, Any]

    @property
    def loss(self) -> str:
        return str(self.about["loss"])


def load(path: Path) -> Loaded:
    """The model in a checkpoint file, or in the newest valid checkpoint of a run's folder."""
    if path.is_dir():
        candidates = ckpt.list_checkpoints(path / "checkpoints") or ckpt.list_checkpoints(path)
        if not candidates:
            raise UserError(
                f"{path}: holds no checkpoint (step-….safetensors): give a run's folder or a checkpoint"
            )
        found, problems = ckpt.newest_valid(candidates[0].parent)
        if found is None:
            raise UserError(f"{path}: no valid checkpoint: {problems[0]}")
        path, tensors, about = found.path, found.model, found.about
    else:
        tensors, about = ckpt.load_model(path)
    try:
        options = {"variant": about["variant"], "width": about["width"]}
        model = Network(MODELS["resnet9"], mnist.SHAPE, mnist.CLASSES, options, dtype=about["dtype"])
        model.load_state_dict(tensors)
        return Loaded(path, model, {name: about[name] for name in ("variant", "width", "loss", "dtype")})
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{path}: does not hold the model that it describes ({error}): use another checkpoint"
        ) from None


def predict_files(loaded: Loaded, paths: list[Path], as_is: bool = False) -> list[dict[str, Any]]:
    """`predict` for each image of each file."""
    return [result for path in paths for result in predict(loaded, read_pictures(path, as_is))]


def predict(loaded: Loaded, pictures: Pictures) -> Iterator[dict[str, Any]]:
    """For each image: its name, class, digit, probability, all ten probabilities, whether it was inverted.

    Probabilities are the softmax of the logits; of a model trained with bce their sigmoids, each digit's by itself,
    which need not sum to 1. The digit is that of the largest logit, the first of equals. Of an image on which nothing
    is drawn, class and digit are None and all probabilities 0.
    """
    count = len(pictures.pixels)
    for start in range(0, count, HOST_BATCH):
        z = logits(loaded.model, pictures.pixels, start, min(start + HOST_BATCH, count)).astype(np.float64)
        for i, (row, p) in enumerate(zip(z, probabilities(z, loaded.loss), strict=True), start):
            drawn = bool(pictures.drawn[i])
            digit = int(row.argmax())  # large sigmoids round to equal ones
            yield {
                "image": pictures.name(i),
                "class": str(digit) if drawn else None,
                "digit": digit if drawn else None,
                "probability": float(p[digit]) if drawn else 0.0,
                "probabilities": p.tolist() if drawn else [0.0] * len(p),
                "inverted": bool(pictures.inverted[i]),
            }


def logits(model: Network, images: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Logits (n, 10) of images[start:stop] (uint8), as an array of their own."""
    images = images.reshape(-1, *model.shape)
    return np.array(infer(model, images, np.zeros(len(images), LABELS), start, stop)[0])


def probabilities(z: np.ndarray, loss: str) -> np.ndarray:
    """softmax(z), or for `loss` bce sigmoid(z), of logits z (N, 10) in float64."""
    if loss == "bce":
        return np.exp(-np.logaddexp(0, -z))  # 1 / (1 + exp(−z)), which would overflow
    exp = np.exp(z - z.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)
