"""A run's folder: config.json, metrics.jsonl, checkpoints/, summary.json. Only rank 0 writes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors.numpy import save

from distrib.config import Config, require_types
from distrib.errors import UserError
from distrib.faults import survived
from distrib.files import (
    append,
    create,
    fits,
    number,
    open_to_append,
    open_to_read,
    parse_object,
    read_json,
    reason,
    replace,
    write_atomically,
)
from distrib.run import checkpoint as ckpt
from distrib.run import events

LONGEST_LINE = 1 << 20
"""Longest line of metrics.jsonl that a resume keeps, in bytes. Ours have a few hundred."""

TAIL = 1 << 16
"""Bytes at the end of metrics.jsonl in which the lines of the last step are looked for."""


def new_folder(config: Config) -> Path:
    """A new path runs/<time>-<name>."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = config.recipe or f"{config.network}-{config.optimizer}"
    base = Path("runs") / f"{stamp}-{name}"
    path, number = base, 1
    while os.path.exists(path):
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


class Run:
    """A run's folder. As a context manager, it holds the folder's lock.

    Call `stored`, `open` and `prepare` in this order; then the run may write.
    """

    def __init__(self, path: Path | None, config: Config | None = None) -> None:
        """Use `path`, or a new folder named after `config`."""
        self._config = config if path is None else None
        self._set_path(path or new_folder(self._config or Config()))
        self.notes: list[str] = []
        self._lock: BinaryIO | None = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock:
            self._lock.close()

    def _set_path(self, path: Path) -> None:
        self.path, self.checkpoints, self.metrics_path = path, path / "checkpoints", path / "metrics.jsonl"

    def _read_json(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        try:
            path.stat()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"--run-dir {self.path}: cannot be read {reason(error, path)}") from None
        return read_json(path, remedy="give another --run-dir, or restore the file")

    def stored(self) -> dict[str, Any] | None:
        """The configuration of the run in the folder; None if it holds none."""
        found = None if self._config else self._read_json("config.json")
        if found is not None:
            require_types(found, self.path / "config.json")
        return found

    def open(self, config: Config, native: bool = True) -> ckpt.Checkpoint | None:
        """Check the folder; returns the checkpoint to resume from, or None.

        UserError if it holds a finished run, a run with other settings, a run despite --resume none, or no
        valid checkpoint. A `native` checkpoint must be one of `Trainer`.
        """
        if not self._config:  # a new folder is not checked: another run may just be creating it
            self._check(config)
        found = self._find(config)
        if found and native:
            ckpt.require_complete(found)
        return found

    def _check(self, config: Config) -> None:
        """Lock the folder; UserError if what it holds forbids a run with `config`."""
        self._take_lock()
        stored = self.stored()
        summary = self._read_json("summary.json") or {}
        saved = bool(ckpt.list_checkpoints(self.checkpoints))
        if (stored is not None or saved) and config.resume == "none":
            raise UserError(
                f"--run-dir {self.path}: holds a run: give a new folder, or --resume auto to resume it"
            )
        if summary.get("finished") and config.epochs <= (stored or {}).get("epochs", 0):
            raise UserError(
                f"--run-dir {self.path}: holds a finished run: give a new folder, or more --epochs"
            )
        different = config.differences(stored) if stored and saved else []
        if different:
            raise UserError(
                f"--run-dir {self.path}: holds a run with other settings: {'; '.join(different)}:"
                " give the same ones, or a new folder"
            )

    def _take_lock(self) -> None:
        """Lock the folder, if it exists; UserError if another process holds the lock."""
        if self._lock or not os.path.isdir(self.path):
            return
        path = self.path / "lock"
        try:
            self._lock = open_to_append(path)  # locked until it is closed
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--run-dir {self.path}: another run is writing there:"
                " wait for its end, or give another folder"
            ) from None
        except OSError as error:
            if os.path.lexists(path) and not (path.is_file() and not path.is_symlink()):
                raise UserError(f"{path}: cannot be opened {reason(error, path)}") from None
            # a file system without locks, or no permission to write, which the first write reports

    def _find(self, config: Config) -> ckpt.Checkpoint | None:
        if config.resume not in ("auto", "none"):
            return ckpt.find(Path(config.resume))
        if self._config:
            return None
        found, problems = ckpt.newest_valid(self.checkpoints)
        if problems and found is None:
            raise UserError(f"{self.checkpoints}: no valid checkpoint ({problems[0]}): give a new --run-dir")
        self.notes += [f"skipped: {problem}" for problem in problems]
        kept = ("config.json", "metrics.jsonl", "summary.json")
        if found is None and any(os.path.exists(self.path / name) for name in kept):
            self.notes.append(f"{self.path} holds a run without a checkpoint: starting over")
        return found

    def prepare(
        self,
        config: Config,
        found: ckpt.Checkpoint | None,
        environment: dict[str, Any],
        dataset: dict[str, object],
    ) -> None:
        """Make the folder ready for the run, resumed from `found`. Nothing is changed in it before."""
        try:
            while fresh := self._config:  # two runs that start at once must not take the same folder
                try:
                    self.path.mkdir(parents=True)
                    self._config = None
                except FileExistsError:
                    self._set_path(new_folder(fresh))
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise UserError(f"--run-dir {self.path}: cannot be made {reason(error, self.path)}") from None
        self._take_lock()
        try:
            self._clear()
            whole = {**asdict(config), "environment": environment, "dataset": dataset}
            if config.data is not None and os.path.exists(config.data):
                whole["data"] = os.path.abspath(config.data)  # for commands that run elsewhere
            if config.trace is not None:
                whole["trace"] = os.path.abspath(config.trace)
            replace(self.path / "config.json", json.dumps(whole, indent=2).encode(), sync=True)
            step = found.position["step"] if found else 0
            if os.path.lexists(self.metrics_path):
                replace(self.metrics_path, self._kept(step), sync=True)
            self._begin_events(step)
            (self.path / "summary.json").unlink(missing_ok=True)
        except OSError as error:
            path = Path(str(error.filename or self.path))
            raise UserError(f"{path}: cannot be used {reason(error, path)}") from None

    def take_over(self, step: int) -> None:
        """Become the writer of a run after `step`, in the place of a rank that has died."""
        self._take_lock()
        self._remove_partial()
        self._begin_events(step)

    def _begin_events(self, step: int) -> None:
        """Begin a file for TensorBoard with what follows `step`."""
        begin = time.time()
        self.events_path = self.path / events.name(self.path, socket.gethostname(), begin)
        create(self.events_path, events.head(begin) + events.start(begin, step + 1))

    def note_ranks(self, step: int, ranks: int) -> None:
        """Write to TensorBoard's file that `ranks` are left after `step`."""
        append(self.events_path, events.scalars({"time": time.time(), "step": step, "ranks": ranks}))

    def cut(self, step: int, closed: bool) -> None:
        """Cut a torn line, and those past `step`, from metrics.jsonl; without `closed`, its epoch's, too."""
        for start, line in self._tail():
            try:
                found = parse_object(line) if line.endswith(b"\n") else {}
            except ValueError:
                found = {}
            at = number(found.get("step"))
            if at is None or at > step or (at == step and not closed and "loss" not in found):
                os.truncate(self.metrics_path, start)
                return

    def has_step(self, step: int) -> bool:
        """Whether metrics.jsonl has the line of a step, one of the last."""
        found = [parse_object(line) for _, line in self._tail()]
        return any(line.get("step") == step and "loss" in line for line in found)

    def _tail(self) -> list[tuple[int, bytes]]:
        """The last lines of metrics.jsonl, each with where it starts."""
        if not os.path.lexists(self.metrics_path):
            return []
        with open_to_read(self.metrics_path) as file:
            start = max(0, file.seek(0, os.SEEK_END) - TAIL)
            file.seek(start)
            if start:
                start += len(file.readline())
            lines = []
            for line in file:
                lines.append((start, line))
                start += len(line)
        return lines

    def _clear(self) -> None:
        """Remove heartbeats and failure.json of an earlier start, and temporary files of a killed one."""
        ranks = self.path / "ranks"
        if ranks.is_symlink():  # so that nothing is written elsewhere
            ranks.unlink()
        shutil.rmtree(ranks, ignore_errors=True)
        self._forget_failure()
        self._remove_partial()

    def _forget_failure(self) -> None:
        """Keep of failure.json only which ranks were survived."""
        before = survived.read(self.path)
        with contextlib.suppress(OSError):
            (self.path / "failure.json").unlink(missing_ok=True)
        survived.keep(self.path, before)

    def _remove_partial(self) -> None:
        """Remove checkpoints that a killed process was writing."""
        for leftover in self.checkpoints.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)

    def _kept(self, step: int) -> Iterator[bytes]:
        """The complete lines of metrics.jsonl up to `step`, one at a time."""
        try:
            file = open_to_read(self.metrics_path)
        except FileNotFoundError:
            return
        with file:
            whole = True  # False within a line that is too long
            while line := file.readline(LONGEST_LINE):
                ends = line.endswith(b"\n") or len(line) < LONGEST_LINE  # the last may lack its line break
                if whole and ends and self._within(line, step):
                    yield line.rstrip(b"\n") + b"\n"
                whole = ends

    @staticmethod
    def _within(line: bytes, step: int) -> bool:
        """Whether a line of metrics.jsonl is complete and at most of `step`."""
        try:
            at = number(parse_object(line).get("step"))
        except ValueError:
            return False
        return at is not None and at <= step

    def plans(self, device: dict[str, str]) -> dict[str, str]:
        """The convolution plans stored for this `device` (GPU model and libraries), by operation."""
        stored = self._read_json("plans.json") or {}
        if stored.get("about") != device:
            return {}
        plans = stored.get("plans")
        if not isinstance(plans, dict) or not fits("dict[str, str]", plans):
            raise UserError(f"{self.path / 'plans.json'}: holds no plans: remove the file")
        return dict(plans)

    def keep_plans(self, device: dict[str, str], plans: dict[str, str]) -> None:
        """Write plans.json."""
        text = json.dumps({"about": device, "plans": plans}, indent=2)
        write_atomically(self.path / "plans.json", text.encode(), ckpt.AGAIN)

    def log(self, values: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl and a record to TensorBoard's file."""
        values = {"time": time.time(), **values}
        path = self.metrics_path
        try:
            append(path, json.dumps(values).encode() + b"\n")
            path = self.events_path
            append(path, events.scalars(values))
        except OSError as error:
            gone = isinstance(error, FileNotFoundError)
            after = "" if gone else ckpt.AGAIN
            raise UserError(f"{path}: cannot be written {reason(error, path)}{after}") from None

    def keep_logits(self, batches: list[np.ndarray], step: int) -> None:
        """Write logits.safetensors: float32 (images, classes) of the test images after the last step.

        Without batches, because the run was stopped, remove an earlier file.
        """
        path = self.path / "logits.safetensors"
        if batches:
            logits = np.concatenate(batches).astype(np.float32)
            write_atomically(path, save({"logits": logits}, {"step": str(step)}), ckpt.AGAIN)
            return
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{path}: cannot be removed {reason(error, path)}") from None

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json, the last file of a run. Removes what failure.json says of a failure."""
        self._forget_failure()
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=2).encode(), ckpt.AGAIN)
