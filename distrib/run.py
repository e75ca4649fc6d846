"""A run's folder: config.json, metrics.jsonl, checkpoints/, summary.json. Rank 0 alone writes."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import platform
import shutil
import socket
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors.numpy import save
from threadpoolctl import threadpool_info

import distrib
import nn
from distrib import __version__, events
from distrib import checkpoint as ckpt
from distrib.config import Config
from distrib.errors import UserError
from nn.device import Backend


def new_folder(config: Config) -> Path:
    """runs/<time>-<name>, not yet there."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = config.recipe or f"{config.variant}-{config.optimizer}"
    base = Path("runs") / f"{stamp}-{name}"
    path, number = base, 1
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


class Run:
    """The folder of one run, opened for a new run or to go on with the one it holds; a context, after which others may."""

    def __init__(self, path: Path | None, config: Config | None = None) -> None:
        """At `path`, or at a new one named after `config`."""
        self._config = config if path is None else None
        self._at(path or new_folder(self._config or Config()))
        self.notes: list[str] = []
        self._lock: IO[str] | None = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock:
            self._lock.close()

    def _at(self, path: Path) -> None:
        self.path, self.checkpoints, self.metrics_path = path, path / "checkpoints", path / "metrics.jsonl"

    def _read_json(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        if not path.exists():
            return None
        try:
            value = json.loads(path.read_text())
            if isinstance(value, dict):
                return value
        except (OSError, ValueError):
            pass
        raise UserError(f"{path}: cannot be read as JSON: give another --run-dir, or restore the file")

    def stored(self) -> dict[str, Any] | None:
        """The configuration of the run that the folder holds."""
        return None if self._config else self._read_json("config.json")

    def open(self, config: Config) -> ckpt.Checkpoint | None:
        """Make the folder or check the run that it holds; returns the checkpoint to go on from.

        UserError: a finished run; a run of other settings; --resume none on a folder that holds a run;
        checkpoints none of which is valid.
        """
        if self._config:  # a new folder, whatever another run that starts now puts there
            return None if config.resume in ("auto", "none") else ckpt.load_checkpoint(Path(config.resume))
        self._claim()
        stored = self.stored()
        summary = self._read_json("summary.json") or {}
        holds_run = stored is not None or bool(ckpt.list_checkpoints(self.checkpoints))
        if holds_run and config.resume == "none":
            raise UserError(
                f"--run-dir {self.path}: holds a run: give a new folder, or --resume auto to go on with it"
            )
        if summary.get("finished") and config.epochs <= (stored or {}).get("epochs", 0):
            raise UserError(
                f"--run-dir {self.path}: holds a finished run: give a new folder, or more --epochs"
            )
        if stored and ckpt.list_checkpoints(self.checkpoints):
            different = config.differences(stored)
            if different:
                raise UserError(
                    f"--run-dir {self.path}: holds a run with other settings: {'; '.join(different)}:"
                    " give the same ones, or a new folder"
                )
        return self._find(config)

    def _claim(self) -> None:
        """UserError where another process has this run's folder; from here on this one has it."""
        if self._lock or not self.path.is_dir():
            return
        try:
            self._lock = open(self.path / "lock", "a")  # noqa: SIM115  # held as long as this
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--run-dir {self.path}: another run is writing there: wait for its end, or give another folder"
            ) from None
        except OSError:  # no locks on this file system, or no right to write: that is told where it is tried
            pass

    def _find(self, config: Config) -> ckpt.Checkpoint | None:
        if config.resume not in ("auto", "none"):
            return ckpt.load_checkpoint(Path(config.resume))
        found, problems = ckpt.newest_valid(self.checkpoints)
        if problems and found is None:
            raise UserError(f"{self.checkpoints}: no valid checkpoint ({problems[0]}): give a new --run-dir")
        self.notes += [f"passed over: {problem}" for problem in problems]
        if found is None and self.metrics_path.exists():
            self.notes.append(f"{self.path} holds a run without a checkpoint: starting afresh")
        return found

    def prepare(self, config: Config, found: ckpt.Checkpoint | None, environment: dict[str, Any]) -> None:
        """Make the folder ready to go on from `found`: the first change to it."""
        try:
            while fresh := self._config:  # runs that start together must not take the same new folder
                try:
                    self.path.mkdir(parents=True)
                    self._config = None
                except FileExistsError:
                    self._at(new_folder(fresh))
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--run-dir {self.path}: cannot be made ({error.strerror}): give another folder"
            ) from None
        self._claim()
        shutil.rmtree(self.path / "ranks", ignore_errors=True)  # what was said in an earlier start
        with contextlib.suppress(OSError):
            (self.path / "failure.json").unlink(missing_ok=True)
        for leftover in self.checkpoints.glob(".*.tmp"):
            leftover.unlink()
        whole = {**asdict(config), "environment": environment}
        ckpt.write_atomically(self.path / "config.json", json.dumps(whole, indent=2).encode())
        (self.path / "summary.json").unlink(missing_ok=True)
        step = found.position["step"] if found else 0
        kept: list[str] = []
        if self.metrics_path.exists():
            kept = [
                line
                for line in self.metrics_path.read_text(errors="replace").splitlines(True)
                if self._within(line, step)
            ]
            ckpt.write_atomically(self.metrics_path, "".join(kept).encode())
        for earlier in self.path.glob("events.out.tfevents.*"):
            earlier.unlink()
        begin = time.time()
        self.events_path = self.path / f"events.out.tfevents.{begin:.0f}.{socket.gethostname()}"
        lines = [{"time": begin, **json.loads(line)} for line in kept]
        ckpt.write_atomically(self.events_path, events.head(begin) + b"".join(map(events.scalars, lines)))

    @staticmethod
    def _within(line: str, step: int) -> bool:
        """Whether a line of metrics.jsonl is whole and not past `step`."""
        try:
            return bool(json.loads(line)["step"] <= step)
        except (ValueError, KeyError, TypeError):
            return False

    def plans(self, about: dict[str, str]) -> dict[str, str]:
        """The convolution plans chosen for this run on the same GPU model and libraries, by operation."""
        stored = self._read_json("plans.json") or {}
        return dict(stored["plans"]) if stored.get("about") == about else {}

    def keep_plans(self, about: dict[str, str], plans: dict[str, str]) -> None:
        """Write plans.json."""
        ckpt.write_atomically(
            self.path / "plans.json", json.dumps({"about": about, "plans": plans}, indent=2).encode()
        )

    def log(self, values: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, and to TensorBoard's file."""
        values = {"time": time.time(), **values}
        path = self.metrics_path
        try:
            with open(path, "a") as file:
                file.write(json.dumps(values) + "\n")
            path = self.events_path
            with open(path, "ab") as beside:
                beside.write(events.scalars(values))
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}): free space is missing; the"
                " last checkpoint is unharmed"
            ) from None

    def keep_logits(self, batches: list[np.ndarray], step: int) -> None:
        """Write logits.safetensors: what the model says of each test image after the last step, (images, 10) float32."""
        path = self.path / "logits.safetensors"
        if batches:
            logits = np.concatenate(batches).astype(np.float32)
            ckpt.write_atomically(path, save({"logits": logits}, {"step": str(step)}))
        else:  # it was stopped: there is no last evaluation
            path.unlink(missing_ok=True)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json, the last file of a run."""
        ckpt.write_atomically(self.path / "summary.json", json.dumps(summary, indent=2).encode())


@functools.cache
def code_digest() -> str:
    """SHA-256 over the sources of `nn` and `distrib`."""
    sha = hashlib.sha256(__version__.encode())
    for package in (nn, distrib):
        for path in sorted(Path(str(package.__file__)).parent.rglob("*")):
            if path.suffix in (".py", ".cu") and path.is_file():
                sha.update(path.name.encode() + path.read_bytes())
    return sha.hexdigest()


def environment(threads: int, backend: Backend) -> dict[str, Any]:
    """What besides the configuration must be the same for a resumed run to agree to the bit."""
    blas = next(
        (
            f"{p['internal_api']} {p.get('version')} {p.get('architecture', '')}".strip()
            for p in threadpool_info()
            if p["user_api"] == "blas"
        ),
        "unknown",
    )
    return {
        "distrib": __version__,
        "code": code_digest()[:12],
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": blas,
        "processor": _processor(),
        "threads": threads,
        "backend": backend.name,
        **backend.describe(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
