"""A data set: images, labels, the names of its classes. Shape and number of classes come from here."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np

from distrib.errors import UserError
from distrib.files import printable


@dataclass(frozen=True)
class Dataset:
    """Images uint8 (N, H, W, C) and labels (N,), integers from 0, of the training and the test set.

    `class_names` has the name of each class, by label.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an image."""
        h, w, c = self.train_images.shape[1:]
        return h, w, c

    @property
    def classes(self) -> int:
        """How many there are."""
        return len(self.class_names)

    def first(self, train: int | None, test: int | None) -> Dataset:
        """The first images of each set; None takes all."""
        return replace(
            self,
            train_images=self.train_images[:train],
            train_labels=self.train_labels[:train],
            test_images=self.test_images[:test],
            test_labels=self.test_labels[:test],
        )

    def digest(self) -> str:
        """SHA-256 over all arrays; a single channel has no axis there, so that runs of version 0.1 resume."""
        sha = hashlib.sha256()
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            plain = array[..., 0] if array.ndim == 4 and array.shape[-1] == 1 else array
            sha.update(f"{plain.shape}".encode())
            sha.update(array.tobytes())
        return sha.hexdigest()

    def describe(self) -> dict[str, object]:
        """What config.json holds of it, so that readers need not load it."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "class_names": list(self.class_names),
            "train_images": len(self.train_images),
            "test_images": len(self.test_images),
        }

    def notes(self) -> list[str]:
        """What a person should know: classes of which the training set has no image."""
        counts = np.bincount(self.train_labels, minlength=self.classes)
        absent = [name for name, count in zip(self.class_names, counts, strict=True) if not count]
        if not absent:
            return []
        shown = ", ".join(printable(name, 30) for name in absent[:8]) + (" …" if len(absent) > 8 else "")
        return [f"no training image of {len(absent)} of {self.classes} classes: {shown}"]


def make(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    class_names: tuple[str, ...] | None = None,
    least: int = 1,
) -> Dataset:
    """A data set of (images, labels) twice, checked; UserError names the array and what is wrong with it.

    Images are uint8 (N, H, W, C), or (N, H, W) of one channel. Without `class_names` there are as many
    classes as the training labels have, `least` at least, named by their numbers.
    """
    parts = []
    for part, (images, labels) in (("training", train), ("test", test)):
        images = images[..., None] if images.ndim == 3 else images
        if images.dtype != np.uint8 or images.ndim != 4:
            raise UserError(
                f"{name}: {part} images are {images.dtype} of shape {images.shape}: give uint8 (N, H, W, C)"
            )
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise UserError(
                f"{name}: {part} labels are {labels.dtype} of shape {labels.shape}: give integers (N,)"
            )
        if len(images) != len(labels):
            raise UserError(f"{name}: has {len(images)} {part} images and {len(labels)} labels")
        if not images.size:
            raise UserError(f"{name}: holds no {part} images")
        parts.append((images, labels))
    (train_images, train_labels), (test_images, test_labels) = parts
    if train_images.shape[1:] != test_images.shape[1:]:
        raise UserError(
            f"{name}: training images are {_size(train_images)}, test images {_size(test_images)}:"
            " give both the same size"
        )
    if class_names and len(set(class_names)) < len(class_names):
        raise UserError(f"{name}: two classes have the same name: give each one of its own")
    classes = len(class_names) if class_names else max(least, _classes(f"{name}: training", train_labels))
    for part, labels in (("training", train_labels), ("test", test_labels)):
        _check_labels(f"{name}: {part}", labels, classes)
    kind = np.uint8 if classes <= 256 else np.int32
    return Dataset(
        name,
        train_images,
        train_labels.astype(kind, copy=False),
        test_images,
        test_labels.astype(kind, copy=False),
        class_names or tuple(map(str, range(classes))),
    )


def _classes(where: str, labels: np.ndarray) -> int:
    """How many there are by the largest label; UserError where most below it have no image: it is damaged."""
    at = int(labels.argmax())
    classes = int(labels[at]) + 1
    if classes > 10 and len(np.unique(labels)) < classes / 2:
        raise UserError(
            f"{where} label {labels[at]} at index {at}: most classes below it have no image: number the"
            " classes from 0 without gaps, or give class_names"
        )
    return classes


def _size(images: np.ndarray) -> str:
    return "×".join(map(str, images.shape[1:]))


def _check_labels(where: str, labels: np.ndarray, classes: int) -> None:
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        at = int(outside.argmax())
        raise UserError(f"{where} label {labels[at]} at index {at}: labels go from 0 to {classes - 1}")
