"""What a trained model says of single images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distrib import checkpoint as ckpt
from distrib import ink, mnist
from distrib.errors import UserError
from distrib.evaluate import HOST_BATCH, infer
from distrib.pictures import Sheet, kind_of, read_sheets
from nn.resnet9 import ResNet9


@dataclass(frozen=True)
class Loaded:
    """A model from a checkpoint, ready on the host. `about` is its variant, width, loss and dtype."""

    path: Path
    model: ResNet9
    about: dict[str, Any]

    @property
    def loss(self) -> str:
        return str(self.about["loss"])


@dataclass(frozen=True)
class Pictures:
    """The images of one file as the network takes them, white on black: uint8 (N, 28, 28)."""

    path: Path
    pixels: np.ndarray
    inverted: np.ndarray  # bool (N,): the image has dark ink on a bright ground

    def name(self, i: int) -> str:
        return f"{self.path}[{i}]" if len(self.pixels) > 1 else str(self.path)


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
        model = ResNet9(about["variant"], about["width"], dtype=about["dtype"])
        model.load_state_dict(tensors)
        return Loaded(path, model, {name: about[name] for name in ("variant", "width", "loss", "dtype")})
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{path}: does not hold the model that it describes ({error}): use another checkpoint"
        ) from None


def predict_files(loaded: Loaded, paths: list[Path]) -> list[dict[str, Any]]:
    """`predict` for each image of each file."""
    return [result for path in paths for result in predict(loaded, read_pictures(path))]


def predict(loaded: Loaded, pictures: Pictures) -> Iterator[dict[str, Any]]:
    """For each image: its name, digit, probability, all ten probabilities, whether it was inverted.

    Probabilities are the softmax of the logits; of a model trained with bce their sigmoids, each digit's by itself,
    which need not sum to 1. The digit is that of the largest logit, the first of equals.
    """
    count = len(pictures.pixels)
    for start in range(0, count, HOST_BATCH):
        z = logits(loaded.model, pictures.pixels, start, min(start + HOST_BATCH, count)).astype(np.float64)
        for i, (row, p) in enumerate(zip(z, probabilities(z, loaded.loss), strict=True), start):
            digit = int(row.argmax())  # large sigmoids round to equal ones
            yield {
                "image": pictures.name(i),
                "digit": digit,
                "probability": float(p[digit]),
                "probabilities": p.tolist(),
                "inverted": bool(pictures.inverted[i]),
            }


def logits(model: ResNet9, images: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Logits (n, 10) of images[start:stop] (uint8), as an array of their own."""
    return np.array(infer(model, images, np.zeros(len(images), np.uint8), start, stop)[0])


def probabilities(z: np.ndarray, loss: str) -> np.ndarray:
    """softmax(z), or for `loss` bce sigmoid(z), of logits z (N, 10) in float64."""
    if loss == "bce":
        return np.exp(-np.logaddexp(0, -z))  # 1 / (1 + exp(−z)), which would overflow
    exp = np.exp(z - z.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)


def read_pictures(path: Path, as_is: bool = False) -> Pictures:
    """The images in the picture or IDX file `path`, as the network takes them."""
    sheets = read_sheets(path)
    if sheets is None:
        return read_idx(path, as_is)
    found = [(as_it_is(sheet), False) if as_is else prepare(sheet) for sheet in sheets]
    return Pictures(path, np.stack([pixels for pixels, _ in found]), np.array([dark for _, dark in found]))


def as_it_is(sheet: Sheet) -> np.ndarray:
    """A picture, white on black already, in grey, on a black ground where it is transparent, scaled to 28×28."""
    grey = luminance(sheet.light) if sheet.alpha is None else luminance(sheet.light) * sheet.alpha
    picture = Image.fromarray(np.round(255 * grey).astype(np.uint8))
    return np.asarray(picture.resize((mnist.SIDE, mnist.SIDE), Image.Resampling.LANCZOS))


def luminance(light: np.ndarray) -> np.ndarray:
    return light[..., 0] if light.shape[2] == 1 else light @ np.array([0.299, 0.587, 0.114], np.float32)


def prepare(sheet: Sheet) -> tuple[np.ndarray, bool]:
    """(uint8 (28, 28), whether the ink is dark) of a picture; all black where nothing is drawn."""
    if sheet.alpha is None and sheet.size == (mnist.SIDE, mnist.SIDE):
        own = mnist_like(sheet.light)
        if own is not None:
            return own
    found, dark = None, None
    if sheet.alpha is None or is_paper(sheet.alpha):
        found = ink.find_digit(on_its_ground(sheet))
    if found is None and sheet.alpha is not None:
        found = ink.find_digit(sheet.alpha[..., None])
        dark = bool(np.median(luminance(sheet.light)[sheet.alpha > 0.5]) < 0.5) if (sheet.alpha > 0.5).any() else None
    if found is None:
        return np.zeros((mnist.SIDE, mnist.SIDE), np.uint8), False
    return found.pixels, found.dark if dark is None else dark


def mnist_like(light: np.ndarray) -> tuple[np.ndarray, bool] | None:
    """A picture of 28×28 that is made as MNIST's are, pixel for pixel, or None."""
    pixels = np.round(255 * luminance(light)).astype(np.uint8)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    dark = bool(np.median(border) > 127)
    drawn = 255 - pixels if dark else pixels
    edge = 255 - border if dark else border
    if np.percentile(edge, 75) > 32 or drawn.max() < 160:
        return None
    rows, cols = (np.flatnonzero((drawn > 32).any(axis)) for axis in (1, 0))
    mass = [float(drawn.sum(axis) @ np.arange(mnist.SIDE)) / float(drawn.sum()) for axis in (1, 0)]
    size = max(np.ptp(rows), np.ptp(cols)) + 1
    return (drawn, dark) if abs(size - 20) <= 1 and all(abs(m - 14) < 0.75 for m in mass) else None


def is_paper(alpha: np.ndarray) -> bool:
    """Whether what is opaque is a sheet, not strokes: wide, compared with its length."""
    opaque = alpha > 0.5
    if not opaque.any():
        return False
    rows, cols = (np.flatnonzero(opaque.any(axis)) for axis in (1, 0))
    box = (np.ptp(rows) + 1) * (np.ptp(cols) + 1)
    return ink.stroke_width(np.pad(opaque, 1)) > 0.42 * np.sqrt(box)


def on_its_ground(sheet: Sheet) -> np.ndarray:
    """The light of a sheet, where it is transparent the middle of its colours."""
    if sheet.alpha is None:
        return sheet.light
    opaque = sheet.alpha > 0.98
    if not opaque.any():
        return sheet.light
    return np.where(opaque[..., None], sheet.light, np.median(sheet.light[opaque], 0))


def read_idx(path: Path, as_is: bool) -> Pictures:
    """The images of an IDX file, dark ink on bright ground inverted as in a picture."""
    with path.open("rb") as file:
        head = file.read(2048)
    if head[:2] not in (b"\x1f\x8b", b"\0\0"):
        raise UserError(f"{path}: is {kind_of(head)}")
    images = mnist.read_idx(path, mnist.IMAGES)
    border = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]])
    dark = not as_is and bool(border.size) and bool(np.median(border) > 127)
    return Pictures(path, 255 - images if dark else images, np.full(len(images), dark))
