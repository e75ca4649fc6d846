"""A data set: images, labels and class names. It determines image shape and number of classes."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from distrib.errors import UserError
from distrib.files import printable


class Reading(NamedTuple):
    """How files are read, where their format leaves a choice; see the options of these names."""

    split: str | None = None
    size: str | None = None
    grey: bool = False


@dataclass(frozen=True)
class Dataset:
    """Training and test set: images uint8 (N, H, W, C), labels (N,) from 0, and class names by label."""

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    validation_images: np.ndarray | None = None  # held back from the training set
    validation_labels: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an image."""
        h, w, c = self.train_images.shape[1:]
        return h, w, c

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def first(self, train: int | None, test: int | None) -> Dataset:
        """Keep the first images of each set; None keeps all."""
        return replace(
            self,
            train_images=self.train_images[:train],
            train_labels=self.train_labels[:train],
            test_images=self.test_images[:test],
            test_labels=self.test_labels[:test],
        )

    def hold_back(self, share: float, seed: int) -> Dataset:
        """Move a `share` of the training images of each class, drawn by `seed`, into a validation set."""
        rng, held = np.random.default_rng((seed, 4)), np.zeros(len(self.train_labels), bool)
        for label in range(self.classes):
            mine = np.flatnonzero(self.train_labels == label)
            held[rng.permutation(mine)[: round(share * len(mine))]] = True
        if held.all() or not held.any():
            what = "all" if held.any() else "none"
            raise UserError(f"--validation {share}: holds back {what} of {len(held)} training images")
        return replace(
            self,
            train_images=self.train_images[~held],
            train_labels=self.train_labels[~held],
            validation_images=self.train_images[held],
            validation_labels=self.train_labels[held],
        )

    def digest(self) -> str:
        """SHA-256 of all arrays. Drops the axis of a single channel, so that runs of version 0.1 resume."""
        sha = hashlib.sha256()
        arrays = [self.train_images, self.train_labels, self.test_images, self.test_labels]
        if self.validation_images is not None and self.validation_labels is not None:
            arrays += [self.validation_images, self.validation_labels]
        for array in arrays:
            plain = array[..., 0] if array.ndim == 4 and array.shape[-1] == 1 else array
            sha.update(f"{plain.shape}".encode())
            sha.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)  # no copy
        return sha.hexdigest()

    def describe(self) -> dict[str, object]:
        """What config.json holds of it, so that readers need not load it."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "class_names": list(self.class_names),
            "train_images": len(self.train_images),
            "test_images": len(self.test_images),
            **({} if self.validation_images is None else {"validation_images": len(self.validation_images)}),
        }

    def notes(self) -> list[str]:
        """Warnings to print: classes without a training image."""
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
    """Check and build a data set from (images, labels) of both sets; UserError says what is wrong with which.

    Images are uint8 (N, H, W, C), or (N, H, W) for one channel. Without `class_names`, the largest training
    label gives the number of classes, `least` at least, and their names are their numbers.
    """
    parts = []
    for part, (images, labels) in (("training", train), ("test", test)):
        images = images[..., None] if images.ndim == 3 else images
        if images.dtype != np.uint8 or images.ndim != 4:
            raise UserError(
                f"{name}: {part} images are {images.dtype} of shape {images.shape}: give uint8 (N, H, W, C)"
            )
        if images.shape[1] in (1, 3) and images.shape[3] > 4:
            raise UserError(
                f"{name}: {part} images of shape {images.shape} look like (N, C, H, W): give (N, H, W, C), as"
                " x.transpose(0, 2, 3, 1) makes them"
            )
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise UserError(
                f"{name}: {part} labels are {labels.dtype} of shape {labels.shape}: give integers (N,)"
            )
        if len(images) != len(labels):
            raise UserError(
                f"{name}: has {len(images)} {part} images and {len(labels)} labels: give each a label"
            )
        if not images.size:
            raise UserError(f"{name}: holds no {part} images: add some")
        parts.append((images, labels))
    (train_images, train_labels), (test_images, test_labels) = parts
    if train_images.shape[1:] != test_images.shape[1:]:
        raise UserError(
            f"{name}: training images are {_size(train_images)}, test images {_size(test_images)}:"
            " give both the same size"
        )
    if class_names and len(set(class_names)) < len(class_names):
        twice = printable(Counter(class_names).most_common(1)[0][0], 60)
        raise UserError(f"{name}: two classes have the same name, {twice}: give each one of its own")
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
    """Number of classes by the largest label; UserError if most have no image, as if it were damaged."""
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
        raise UserError(
            f"{where} label {labels[at]} at index {at}: labels go from 0 to {classes - 1}: correct it"
        )
