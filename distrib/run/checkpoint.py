"""Checkpoints: two safetensors files, whole or not there, each verified before anything is taken from it.

`step-NNNNNNNN.safetensors` is the model alone; `step-NNNNNNNN.state.safetensors` holds the optimizer's
vectors, the position in the run, and the SHA-256 of the model file. The state is written first, the model
last: a checkpoint is valid only if both verify. No file runs code: safetensors hold numbers and text.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import queue
import re
import stat
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from distrib.config import Config
from distrib.data.dataset import Dataset
from distrib.data.sniff import memory
from distrib.errors import UserError
from distrib.files import fits, parse_object, reason, shown, write_atomically
from nn.network import parameter_shapes
from nn.ops.loss import LOSSES
from nn.resnet9 import MODELS, VARIANTS

MODEL_NAME = re.compile(r"step-\d+\.safetensors")
WIDEST = 64
"""The largest width that is believed."""

OLDER: dict[str, Any] = {"model": "resnet9", "shape": [28, 28, 1], "class_names": [str(i) for i in range(10)]}
"""What version 0.1 did not say of a model."""

ABOUT = {
    "model": "str",
    "shape": "list[int]",
    "class_names": "list[str]",
    "variant": "str",
    "width": "float",
    "loss": "str",
    "dtype": "str",
}
POSITION = {
    "step": "int",
    "loss_sum": "float",
    "correct": "float",
    "images": "int",
    "images_per_rank": "list[int]",
    "wall_seconds": "float",
    "train_seconds": "float",
    "last_epoch": "dict[str, float]",
    "optimizer_steps": "int",
    "world_size": "int",
    "environment": "dict[str, str | int]",
    "config": "dict",
    "data": "str",
}
"""What a model's file says of the model, and a state's file of the run, by type."""

Tensors = dict[str, np.ndarray]


def model_spec(config: Config, data: Dataset) -> dict[str, Any]:
    """The description of a model in its file: all that it takes to make it again."""
    return {
        "model": "resnet9",
        "shape": list(data.shape),
        "class_names": list(data.class_names),
        "variant": config.variant,
        "width": config.width,
        "loss": config.loss,
        "dtype": config.dtype,
    }


AGAIN = ", then run again with the same --run-dir to resume"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in host memory. `about` is the model's variant, width and loss."""

    path: Path
    model: Tensors
    about: dict[str, Any]
    optimizer: Tensors
    position: dict[str, Any]


def digest(tensors: Tensors) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        sha.update(f"{name} {array.dtype} {array.shape}\n".encode())
        sha.update(array.reshape(-1).view(np.uint8).data)  # no copy
    return sha.hexdigest()


def model_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.safetensors"


def state_path(model: Path) -> Path:
    return model.with_name(model.name.removesuffix(".safetensors") + ".state.safetensors")


def save_checkpoint(
    folder: Path,
    step: int,
    model: Tensors,
    about: dict[str, Any],
    optimizer: Tensors,
    position: dict[str, Any],
    keep: int,
) -> Path:
    """Save one checkpoint, then remove all but the newest `keep`. Refuses non-finite numbers."""
    for name, tensor in (*model.items(), *optimizer.items()):
        if not np.isfinite(tensor).all():
            raise UserError(f"{name} is not finite after step {step}: nothing was saved; try a lower --lr")
    path = model_path(folder, step)
    about_text, position_text = json.dumps(about), json.dumps(position)
    model_bytes = save(model, {"format": "pt", "about": about_text, "checksum": _checksum(model, about_text)})
    model_sha = hashlib.sha256(model_bytes).hexdigest()
    state = {
        "position": position_text,
        "model_sha256": model_sha,
        "checksum": _checksum(optimizer, position_text + model_sha),
    }
    write_atomically(state_path(path), save(optimizer, state), AGAIN)
    write_atomically(path, model_bytes, AGAIN)
    paths = list_checkpoints(folder)
    kept = [each for each in paths if each.name <= path.name][
        :keep
    ]  # later ones are of a course that was left
    with suppress(OSError):  # what cannot be removed is no failure of this save
        for old in set(paths) - set(kept):
            old.unlink(missing_ok=True)
        for orphan in folder.glob("step-*.state.safetensors"):  # a state without its model is of no use
            if not orphan.with_name(orphan.name.replace(".state", "")).exists():
                orphan.unlink()
    return path


class Saver:
    """Saves checkpoints in a thread of its own, one after another: training waits for the copies only.

    What goes wrong with one is raised by the next `start` or `wait`. The thread exists from the beginning, as
    none could be started once memory has run out; an ending process lets it finish the save at hand.
    """

    def __init__(self) -> None:
        self.used = False
        self._work = queue.SimpleQueue[tuple[Any, ...] | None]()
        self._idle = threading.Event()
        self._idle.set()
        self._error: BaseException | None = None
        threading.Thread(target=self._run, daemon=True, name="checkpoint").start()
        atexit.register(self._idle.wait)

    def start(self, *arguments: Any) -> None:
        """Begin `save_checkpoint(*arguments)`, once the one before is done; the tensors must be copies."""
        self.wait()
        self.used = True
        self._idle.clear()
        try:
            self._work.put(arguments)
        except BaseException:  # no memory: there is nothing to wait for
            self._idle.set()
            raise

    def wait(self) -> None:
        """Return when the last one is on disk."""
        self._idle.wait()
        if self._error:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Finish the save at hand, then end the thread."""
        self._idle.wait()
        self._work.put(None)
        atexit.unregister(self._idle.wait)

    def _run(self) -> None:
        while arguments := self._work.get():
            try:
                save_checkpoint(*arguments)
            except BaseException as error:
                self._error = error
            del arguments  # the copies
            self._idle.set()


def list_checkpoints(folder: Path) -> list[Path]:
    """Model files in `folder`, newest first, valid or not; UserError where it cannot be read."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot be read {reason(error, folder)}") from None
    return [folder / name for name in sorted(names, reverse=True) if MODEL_NAME.fullmatch(name)]


def _checksum(tensors: Tensors, text: str) -> str:
    return hashlib.sha256((digest(tensors) + text).encode()).hexdigest()


def _require_file(path: Path) -> None:
    """UserError where `path` is no file, cannot be read, or is more than this machine's memory holds."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise UserError(f"{path}: is no file: give a checkpoint (step-….safetensors), or a run's folder")
        with open(path, "rb"):
            pass
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read {reason(error, path)}") from None
    if about.st_size > memory():
        raise UserError(f"{path}: has {about.st_size / 1e9:.0f} GB, more than this machine's memory holds")


def _read(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata of one file; UserError names it and what is wrong."""
    _require_file(path)
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, MemoryError) as error:
        raise UserError(
            f"{path}: truncated, damaged or no safetensors file ({shown(error, 200)}): use another checkpoint"
        ) from None


def _require_finite(path: Path, tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype.kind not in "fiu":
            raise UserError(f"{path}: tensor {shown(name)} is of type {tensor.dtype}: use another checkpoint")
        if not np.isfinite(tensor).all():
            raise UserError(f"{path}: tensor {shown(name)} is not finite: use another checkpoint")


def _object(path: Path, name: str, text: str, kinds: dict[str, str]) -> dict[str, Any]:
    """The JSON object `text` of a file's metadata, with values of these types where they are there."""
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


def _about(path: Path, text: str, tensors: Tensors) -> dict[str, Any]:
    """The description of a model, of a network that exists and whose tensors are those of the file.

    A network is made before it takes its tensors: a width or a shape from a stranger could ask for any
    memory.
    """
    about = {**OLDER, **_object(path, "description", text, ABOUT)}
    choices: dict[str, Any] = {
        "model": MODELS,
        "variant": VARIANTS,
        "loss": LOSSES,
        "dtype": ("float32", "float64"),
    }
    for key, known in choices.items():
        if key in about and about[key] not in known:
            raise UserError(f"{path}: has {key} {shown(about[key])}: use another checkpoint")
    if not ABOUT.keys() <= about.keys():
        return about  # of no network of ours: who makes one asks for what is missing
    options = {"variant": about["variant"], "width": about["width"]}
    try:
        if len(about["shape"]) != 3 or not 0 < about["width"] <= WIDEST:
            raise ValueError(f"shape {shown(about['shape'])}, width {shown(about['width'])}")
        wanted = parameter_shapes(
            MODELS[about["model"]], tuple(about["shape"]), len(about["class_names"]), options
        )
        for name, shape in wanted.items():
            if name not in tensors or tensors[name].shape != shape:
                has = f"is of shape {tensors[name].shape}" if name in tensors else "is missing"
                raise ValueError(f"tensor {name} {has}")
    except ValueError as error:
        raise UserError(
            f"{path}: does not hold the model that it describes ({error}): use another checkpoint"
        ) from None
    return about


def load_model(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and description of a model file that this program wrote; UserError where it does not verify."""
    tensors, metadata = _read(path)
    if "about" not in metadata or "checksum" not in metadata:
        raise UserError(f"{path}: not a checkpoint of this program (it has no description of the model)")
    if metadata["checksum"] != _checksum(tensors, metadata["about"]):
        raise UserError(f"{path}: damaged: its checksum does not match: use another checkpoint")
    _require_finite(path, tensors)
    return tensors, _about(path, metadata["about"], tensors)


def load_checkpoint(path: Path) -> Checkpoint:
    """Both files of a checkpoint, verified; UserError names the file and what is wrong with it."""
    model, about = load_model(path)
    beside = state_path(path)
    optimizer, metadata = _read(beside)
    if not {"position", "model_sha256", "checksum"} <= metadata.keys():
        raise UserError(f"{beside}: not a state file of this program: use another checkpoint")
    if metadata["checksum"] != _checksum(optimizer, metadata["position"] + metadata["model_sha256"]):
        raise UserError(f"{beside}: damaged: its checksum does not match: use another checkpoint")
    with open(path, "rb") as file:
        model_sha = hashlib.file_digest(file, "sha256").hexdigest()
    if model_sha != metadata["model_sha256"]:
        raise UserError(
            f"{path}: damaged: not the file that its state was saved with: use another checkpoint"
        )
    _require_finite(beside, optimizer)
    position = _object(beside, "position", metadata["position"], POSITION)
    for key, value in position.items():
        if POSITION.get(key) == "int" and not 0 <= value < 1 << 53:
            raise UserError(f"{beside}: its position has {key} {shown(value)}: use another checkpoint")
    if "environment" in position:  # it is shown
        position["environment"] = {
            shown(k): shown(v, 200) if isinstance(v, str) else v for k, v in position["environment"].items()
        }
    return Checkpoint(path, model, about, optimizer, position)


def require_whole(found: Checkpoint) -> None:
    """UserError where a checkpoint of `Trainer` lacks something, or has what this version does not know."""
    beside, has = state_path(found.path), found.position.keys()
    for what, names in (("lacks", POSITION.keys() - has), ("has an unknown", has - POSITION.keys())):
        if names:
            raise UserError(
                f"{beside}: its position {what} {shown(', '.join(sorted(names)))}: it is of another program"
                " or version: use another checkpoint"
            )
    for name, tensor in found.optimizer.items():
        like = found.model.get(name.partition("/")[2])
        if like is None or like.shape != tensor.shape:
            raise UserError(f"{beside}: tensor {shown(name)} does not fit the model: use another checkpoint")


def find(path: Path) -> Checkpoint:
    """The checkpoint in a file, or the newest valid one in a run's folder or in its folder of checkpoints."""
    if not os.path.isdir(path):
        return load_checkpoint(path)
    folder = path / "checkpoints" if os.path.isdir(path / "checkpoints") else path
    found, problems = newest_valid(folder)
    if found is None:
        what = f"no valid checkpoint ({problems[0]})" if problems else "holds no checkpoint"
        raise UserError(f"{path}: {what}: give a run's folder or a checkpoint (step-….safetensors)")
    return found


def newest_valid(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, or None, and what is wrong with the newer ones."""
    problems: list[str] = []
    for path in list_checkpoints(folder):
        try:
            return load_checkpoint(path), problems
        except UserError as error:
            problems.append(str(error))
    return None, problems
