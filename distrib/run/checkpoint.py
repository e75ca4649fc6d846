"""Saves and loads checkpoints: two safetensors files, written atomically and verified before use.

`step-NNNNNNNN.safetensors` holds only the model. `step-NNNNNNNN.state.safetensors` holds the optimizer's
vectors, the position in the run, and the SHA-256 of the model file. The model file is written last, and a
checkpoint is valid only if both verify. Loading runs no code: safetensors files hold only numbers and text.
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
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from distrib.data.sniff import memory
from distrib.errors import UserError
from distrib.files import reason, shown, write_atomically
from distrib.run.model_spec import Tensors, check_model_spec, parse_metadata

BEST = "best.safetensors"
"""The model of the epoch that did best on the images held back."""

MODEL_NAME = re.compile(r"step-(\d+)\.safetensors")
POSITION_TYPES = {
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
"""Types of the fields of the position in a state file."""

AGAIN = ", then run again with the same --run-dir to resume"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in host memory. `model_spec` is what `describe_model` returned."""

    path: Path
    model: Tensors
    model_spec: dict[str, Any]
    optimizer: Tensors
    position: dict[str, Any]


def digest(tensors: Tensors) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors, sorted by name."""
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
    model_spec: dict[str, Any],
    optimizer: Tensors,
    position: dict[str, Any],
    keep: int,
) -> Path:
    """Save one checkpoint, then remove all but the newest `keep`. UserError for non-finite numbers."""
    for name, tensor in (*model.items(), *optimizer.items()):
        if not np.isfinite(tensor).all():
            raise UserError(f"{name} is not finite after step {step}: nothing was saved; try a lower --lr")
    path, position_text = model_path(folder, step), json.dumps(position)
    model_bytes = _model_file(model, model_spec)
    model_sha = hashlib.sha256(model_bytes).hexdigest()
    state = {
        "position": position_text,
        "model_sha256": model_sha,
        "checksum": _checksum(optimizer, position_text + model_sha),
    }
    write_atomically(state_path(path), save(optimizer, state), AGAIN)
    write_atomically(path, model_bytes, AGAIN)
    _remove_old(folder, path, keep)
    return path


def _model_file(model: Tensors, model_spec: dict[str, Any]) -> bytes:
    text = json.dumps(model_spec)
    return save(model, {"format": "pt", "about": text, "checksum": _checksum(model, text)})


def save_model(path: Path, model: Tensors, model_spec: dict[str, Any]) -> None:
    """Write a model by itself, atomically."""
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, _model_file(model, model_spec), AGAIN)


def _remove_old(folder: Path, newest: Path, keep: int) -> None:
    """Remove all but `keep` checkpoints up to `newest`. Later steps belong to an abandoned continuation."""
    paths = list_checkpoints(folder)
    kept = [each for each in paths if each.name <= newest.name][:keep]
    with suppress(OSError):  # the save itself succeeded
        for old in set(paths) - set(kept):
            old.unlink(missing_ok=True)
        for orphan in folder.glob("step-*.state.safetensors"):  # useless without its model
            if not orphan.with_name(orphan.name.replace(".state", "")).exists():
                orphan.unlink()


class Saver:
    """Saves checkpoints in a thread, one after another, so that training waits only for the copies.

    The next `start` or `wait` raises the errors of a save. The thread starts at once, because it could not
    start later if memory has run out. A process that exits lets it finish the current save.
    """

    def __init__(self) -> None:
        self.used, self.begun = False, time.monotonic()  # `begun`: the last save, or this
        self._work = queue.SimpleQueue[tuple[Any, ...] | None]()
        self._idle = threading.Event()
        self._idle.set()
        self._error: BaseException | None = None
        self.write = save_checkpoint
        self._thread = threading.Thread(target=self._run, daemon=True, name="checkpoint")
        self._thread.start()
        atexit.register(self._idle.wait)

    def start(self, *arguments: Any) -> None:
        """Start `save_checkpoint(*arguments)`, after the one before is done. The tensors must be copies."""
        self.wait()
        self.used, self.begun = True, time.monotonic()
        self._idle.clear()
        try:
            self._work.put(arguments)
        except BaseException:  # out of memory: nothing was started
            self._idle.set()
            raise

    def wait(self) -> None:
        """Return when the last checkpoint is on disk."""
        self._idle.wait()
        if self._error:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Finish the current save, then end the thread."""
        self._idle.wait()
        self._work.put(None)
        self._thread.join()
        atexit.unregister(self._idle.wait)

    def _run(self) -> None:
        while arguments := self._work.get():
            try:
                self.write(*arguments)
            except BaseException as error:
                self._error = error
            del arguments  # the copies
            self._idle.set()


def list_checkpoints(folder: Path) -> list[Path]:
    """Model files in `folder`, newest first, valid or not; UserError if it cannot be read."""
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
    """UserError if `path` is no regular file, cannot be read, or is larger than this machine's memory."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: is no file: give a checkpoint (step-….safetensors), or a run's folder")
        with open(path, "rb"):
            pass
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: give a checkpoint, or a run's folder") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read {reason(error, path)}") from None
    if status.st_size > memory():
        raise UserError(f"{path}: has {status.st_size / 1e9:.0f} GB, more than this machine's memory holds")


def _read(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata of one file; UserError says what is wrong with it."""
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


def load_model(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and model spec of a model file that this program wrote; UserError if it does not verify."""
    tensors, metadata = _read(path)
    if "about" not in metadata or "checksum" not in metadata:
        raise UserError(f"{path}: not a checkpoint of this program (it has no description of the model)")
    if metadata["checksum"] != _checksum(tensors, metadata["about"]):
        raise UserError(f"{path}: damaged: its checksum does not match: use another checkpoint")
    _require_finite(path, tensors)
    return tensors, check_model_spec(path, metadata["about"], tensors)


def load_checkpoint(path: Path) -> Checkpoint:
    """Load and verify both files of a checkpoint; UserError says what is wrong with which."""
    model, model_spec = load_model(path)
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
    position = parse_metadata(beside, "position", metadata["position"], POSITION_TYPES)
    for key, value in position.items():
        if POSITION_TYPES.get(key) == "int" and not 0 <= value < 1 << 53:
            raise UserError(f"{beside}: its position has {key} {shown(value)}: use another checkpoint")
    if "environment" in position:  # which is printed
        position["environment"] = {
            shown(k): shown(v, 200) if isinstance(v, str) else v for k, v in position["environment"].items()
        }
    return Checkpoint(path, model, model_spec, optimizer, position)


def require_complete(found: Checkpoint) -> None:
    """UserError if a checkpoint lacks fields that `Trainer` needs, or has unknown ones."""
    beside, has = state_path(found.path), found.position.keys()
    for what, names in (
        ("lacks", POSITION_TYPES.keys() - has),
        ("has an unknown", has - POSITION_TYPES.keys()),
    ):
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
    """Load a checkpoint file, or the newest valid checkpoint in a run's folder or its checkpoints/."""
    if not os.path.isdir(path):
        return load_checkpoint(path)
    folder = path / "checkpoints" if os.path.isdir(path / "checkpoints") else path
    found, problems = newest_valid(folder)
    if found is None:
        what = f"no valid checkpoint ({problems[0]})" if problems else "holds no checkpoint"
        raise UserError(f"{path}: {what}: give a run's folder or a checkpoint (step-….safetensors)")
    return found


def newest_valid(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """(the newest checkpoint that verifies, or None; what is wrong with the newer ones)."""
    problems: list[str] = []
    for path in list_checkpoints(folder):
        try:
            return load_checkpoint(path), problems
        except UserError as error:
            problems.append(str(error))
    return None, problems
