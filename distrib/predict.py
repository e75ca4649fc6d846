"""What a trained model says of single images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from distrib import checkpoint as ckpt
from distrib import mnist
from distrib.errors import UserError
from distrib.evaluate import HOST_BATCH, infer
from nn.resnet9 import ResNet9


@dataclass(frozen=True)
class Loaded:
    """A model from a checkpoint, ready on the host."""

    path: Path
    model: ResNet9
    loss: str


def load(path: Path) -> Loaded:
    """The model in a checkpoint file, or in the newest valid checkpoint of a run's folder."""
    if path.is_dir():
        candidates = ckpt.list_checkpoints(path / "checkpoints") or ckpt.list_checkpoints(path)
        if not candidates:
            raise UserError(f"{path}: holds no checkpoint (step-….safetensors): give a run's folder or a checkpoint")
        found, problems = ckpt.newest_valid(candidates[0].parent)
        if found is None:
            raise UserError(f"{path}: no valid checkpoint: {problems[0]}")
        path, tensors, about = found.path, found.model, found.about
    else:
        tensors, about = ckpt.load_model(path)
    try:
        model = ResNet9(about["variant"], about["width"], dtype=about["dtype"])
        model.load_state_dict(tensors)
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: does not hold the model that it describes ({error}): use another checkpoint") from None
    return Loaded(path, model, about["loss"])


def predict_files(loaded: Loaded, paths: list[Path]) -> list[dict[str, Any]]:
    """For each image of each file: its name, digit, probability, all probabilities, whether it was inverted."""
    results: list[dict[str, Any]] = []
    for path in paths:
        for name, images, inverted in _read(path):
            for start in range(0, len(images), HOST_BATCH):
                stop = min(start + HOST_BATCH, len(images))
                for i, p in enumerate(_probabilities(loaded, images, start, stop), start):
                    results.append({
                        "image": f"{name}[{i}]" if len(images) > 1 else name,
                        "digit": int(p.argmax()), "probability": float(p.max()),
                        "probabilities": p.tolist(), "inverted": inverted,
                    })  # fmt: skip
    return results


def _probabilities(loaded: Loaded, images: np.ndarray, start: int, stop: int) -> np.ndarray:
    logits, _ = infer(loaded.model, images, np.zeros(len(images), np.uint8), start, stop)
    logits = logits.astype(np.float64)
    if loaded.loss == "bce":
        return 1 / (1 + np.exp(-logits))
    exp = np.exp(logits - logits.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)


def _read(path: Path) -> Iterator[tuple[str, np.ndarray, bool]]:
    """(name, images uint8 (N, 28, 28), inverted) in the file `path`."""
    try:
        with Image.open(path) as picture:
            flat = Image.new("RGBA", picture.size, "white")
            flat.alpha_composite(picture.convert("RGBA"))
            pixels = np.asarray(flat.convert("L").resize((mnist.SIDE, mnist.SIDE), Image.Resampling.LANCZOS))
    except UnidentifiedImageError:
        yield str(path), mnist.read_idx(path, mnist.IMAGES), False
        return
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give PNG pictures or IDX files of images") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as a picture ({error}): give PNG pictures or IDX files") from None
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    inverted = bool(np.median(border) > 127)
    yield str(path), (255 - pixels if inverted else pixels)[None], inverted
