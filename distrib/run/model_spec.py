"""The model spec in a checkpoint: what it takes to build the model's network again, and its checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from distrib import models
from distrib.config import Config
from distrib.data.dataset import Dataset
from distrib.errors import UserError
from distrib.files import fits, parse_object, shown
from nn.network import Model, parameter_shapes
from nn.ops.loss import LOSSES
from nn.resnet9 import VARIANTS

Tensors = dict[str, np.ndarray]

MAX_WIDTH = 64
"""Files with a larger width are refused."""

DEFAULT_SPEC: dict[str, Any] = {
    "model": "resnet9",
    "shape": [28, 28, 1],
    "class_names": [str(i) for i in range(10)],
}
"""Fields of a model spec that files of version 0.1 lack."""

SPEC_TYPES = {
    "model": "str",
    "shape": "list[int]",
    "class_names": "list[str]",
    "variant": "str",
    "width": "float",
    "loss": "str",
    "dtype": "str",
}
"""Types of the fields of a model spec. The file of a run's best epoch has `step`, too."""


def describe_model(config: Config, data: Dataset) -> dict[str, Any]:
    """The model spec of a run: everything needed to build its network again."""
    return {
        "model": config.model,
        "shape": list(data.shape),
        "class_names": list(data.class_names),
        "variant": config.variant,
        "width": config.width,
        "loss": config.loss,
        "dtype": config.dtype,
    }


def network_arguments(
    model_spec: dict[str, Any], function: Model | None = None
) -> tuple[Any, tuple[int, int, int], int, dict[str, Any]]:
    """The first arguments of `Network` for a model spec: builder, image shape, classes, options.

    `function` makes the layers of a network that does not ship: what a spec names is never run.
    """
    h, w, c = model_spec["shape"]
    name = model_spec["model"]
    if function is None:
        function = models.MODELS[name]
    wanted = {option: model_spec[option] for option in models.DEFAULTS}
    options = models.options_of(function, wanted, name)
    return function, (h, w, c), len(model_spec["class_names"]), options


def check_model_spec(path: Path, text: str, tensors: Tensors) -> dict[str, Any]:
    """The model spec in a file, checked: it must describe a network with exactly these tensors.

    Checks shapes without building the network, as a width from an untrusted file could ask for any memory;
    those of a network that does not ship are checked by who has its function.
    """
    model_spec = {**DEFAULT_SPEC, **parse_metadata(path, "description", text, {**SPEC_TYPES, "step": "int"})}
    choices: dict[str, Any] = {
        "variant": VARIANTS,
        "loss": LOSSES,
        "dtype": ("float32", "float64"),
    }
    for key, known in choices.items():
        if key in model_spec and model_spec[key] not in known:
            raise UserError(f"{path}: has {key} {shown(model_spec[key])}: use another checkpoint")
    if not SPEC_TYPES.keys() <= model_spec.keys():
        return model_spec  # not of a run: whoever builds the network reports the missing field
    try:
        models.require_form(model_spec["model"])
        if len(model_spec["shape"]) != 3 or not 0 < model_spec["width"] <= MAX_WIDTH:
            raise ValueError(f"shape {shown(model_spec['shape'])}, width {shown(model_spec['width'])}")
        if not models.ships(model_spec["model"]):
            return model_spec
        wanted = parameter_shapes(*network_arguments(model_spec))
        for name, shape in wanted.items():
            if name not in tensors or tensors[name].shape != shape:
                has = f"is of shape {tensors[name].shape}" if name in tensors else "is missing"
                raise ValueError(f"tensor {name} {has}")
    except ValueError as error:
        raise UserError(
            f"{path}: does not hold the model that it describes ({error}): use another checkpoint"
        ) from None
    return model_spec


def parse_metadata(path: Path, name: str, text: str, kinds: dict[str, str]) -> dict[str, Any]:
    """The JSON object `text` in a file's metadata. Fields in `kinds` must be of these types, if present."""
    try:
        found = parse_object(text)
    except ValueError as error:
        what = shown(error, 200)
        raise UserError(f"{path}: its {name} cannot be read ({what}): use another checkpoint") from None
    for key, kind in kinds.items():
        if key in found and not fits(kind, found[key]):
            raise UserError(
                f"{path}: its {name} has {key} {shown(found[key])}, not {kind}: use another checkpoint"
            )
    return found
