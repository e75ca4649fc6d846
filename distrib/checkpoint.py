"""Checkpoints: two safetensors files, whole or not there, each verified before anything is taken from it.

`step-NNNNNNNN.safetensors` is the model alone; `step-NNNNNNNN.state.safetensors` holds the optimizer's
vectors, the position in the run, and the SHA-256 of the model file. The state is written first, the model
last: a checkpoint is valid only if both verify. No file runs code: safetensors hold numbers and text.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from distrib.errors import UserError
from distrib.files import write_atomically

Tensors = dict[str, np.ndarray]
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
    ]  # a later one is of a course that was left
    for old in set(paths) - set(kept):
        old.unlink(missing_ok=True)
    for orphan in folder.glob("step-*.state.safetensors"):  # a state without its model is of no use
        if not orphan.with_name(orphan.name.replace(".state", "")).exists():
            orphan.unlink()
    return path


class Saver:
    """Saves checkpoints in a thread of its own, one after another: training waits for the copies only.

    What goes wrong with one is raised by the next `start` or `wait`.
    """

    def __init__(self) -> None:
        self.used = False
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, *arguments: Any) -> None:
        """Begin `save_checkpoint(*arguments)`, once the one before is done; the tensors must be copies."""
        self.wait()
        self.used = True
        # no daemon: an ending process lets it finish
        self._thread = threading.Thread(target=self._save, args=arguments, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when the last one is on disk."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def _save(self, *arguments: Any) -> None:
        try:
            save_checkpoint(*arguments)
        except BaseException as error:
            self._error = error


def list_checkpoints(folder: Path) -> list[Path]:
    """Model files in `folder`, newest first, valid or not."""
    paths = [
        path for path in folder.glob("step-*.safetensors") if not path.name.endswith(".state.safetensors")
    ]
    return sorted(paths, reverse=True)


def _checksum(tensors: Tensors, text: str) -> str:
    return hashlib.sha256((digest(tensors) + text).encode()).hexdigest()


def _read(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata of one file; UserError names it and what is wrong."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: truncated, damaged or no safetensors file ({error}): use another checkpoint"
        ) from None


def load_model(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and description of a model file that this program wrote; UserError where it does not verify."""
    tensors, metadata = _read(path)
    if "about" not in metadata or "checksum" not in metadata:
        raise UserError(f"{path}: not a checkpoint of this program (it has no description of the model)")
    if metadata["checksum"] != _checksum(tensors, metadata["about"]):
        raise UserError(f"{path}: damaged: its checksum does not match: use another checkpoint")
    return tensors, json.loads(metadata["about"])


def load_checkpoint(path: Path) -> Checkpoint:
    """Both files of a checkpoint, verified; UserError names the file and what is wrong with it."""
    model, about = load_model(path)
    optimizer, metadata = _read(state_path(path))
    if not {"position", "model_sha256", "checksum"} <= metadata.keys():
        raise UserError(f"{state_path(path)}: not a state file of this program: use another checkpoint")
    if metadata["checksum"] != _checksum(optimizer, metadata["position"] + metadata["model_sha256"]):
        raise UserError(f"{state_path(path)}: damaged: its checksum does not match: use another checkpoint")
    if hashlib.sha256(path.read_bytes()).hexdigest() != metadata["model_sha256"]:
        raise UserError(
            f"{path}: damaged: not the file that its state was saved with: use another checkpoint"
        )
    return Checkpoint(path, model, about, optimizer, json.loads(metadata["position"]))


def newest_valid(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, or None, and what is wrong with the newer ones."""
    problems: list[str] = []
    for path in list_checkpoints(folder):
        try:
            return load_checkpoint(path), problems
        except UserError as error:
            problems.append(str(error))
    return None, problems
