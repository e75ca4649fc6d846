"""Checkpoints: whole or not there, verified before use, kept through full disks and non-finite numbers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import LIMIT, ROOT, run, summary
from needs import require
from safetensors.numpy import load_file
from test_bad_input import SMALL, assert_one_line, snapshot

import distrib.loop
from distrib.config import Config
from distrib.errors import UserError
from distrib.run import checkpoint as ckpt
from distrib.train import main

LENGTHS = (0, 1, 7, 8, 9, 100, 0.5, -1)  # bytes, a fraction, or from the end
LIMITED = """import resource, sys
size = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
from distrib.train import main
from distrib.config import Config
sys.exit(main())"""
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small_data: Path) -> Call:
    """A small training run within this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr("distrib.loop.stop_on_signals", lambda *_: nullcontext())

    def command(folder: Path, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(
            sys,
            "argv",
            ["distrib", *map(str, ("--run-dir", folder, "--data", small_data, *SMALL, *arguments))],
        )
        capsys.readouterr()
        return main(), *capsys.readouterr()

    return command


@pytest.fixture
def stopped(call: Call, tmp_path: Path) -> Path:
    """A run of 4 steps that ended after 3, with checkpoints at 1, 2 and 3."""
    assert call(tmp_path / "run", "--max-steps", 3, "--checkpoint-every", 1)[0] == 0
    return tmp_path / "run"


def newest(folder: Path) -> Path:
    return ckpt.list_checkpoints(folder / "checkpoints")[0]


def cut(path: Path, length: float) -> None:
    size = path.stat().st_size
    os.truncate(
        path, size + int(length) if length < 0 else int(length * size) if 0 < length < 1 else int(length)
    )


def saved(folder: Path, step: int, keep: int = 3, fill: float = 1.0) -> Path:
    tensors = {"a": np.full((3, 4), fill, np.float32), "b": np.arange(5, dtype=np.float32)}
    return ckpt.save_checkpoint(folder, step, tensors, {"variant": "baseline"}, tensors, {"step": step}, keep)


def test_files_are_plain_safetensors(stopped: Path) -> None:
    path = newest(stopped)
    found = ckpt.load_checkpoint(path)
    for file, tensors in ((path, found.model), (ckpt.state_path(path), found.optimizer)):
        plain = load_file(file)
        assert plain
        assert ckpt.digest(plain) == ckpt.digest(tensors)
    assert found.position["step"] == 3


FORBIDDEN = r"(import|from) .*(pickle|marshal|shelve)|\b(np|torch|pickle|marshal)\.loads?\("


def test_no_pickle_in_the_code() -> None:
    for path in (path for folder in ("distrib", "nn", "launch") for path in (ROOT / folder).rglob("*.py")):
        assert not re.search(FORBIDDEN, path.read_text()), path


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["model", "optimizer"])
def test_non_finite_is_not_saved(which: str, bad: float, tmp_path: Path) -> None:
    saved(tmp_path, 1)
    before = snapshot(tmp_path)
    good, wrong = {"w": np.ones(3, np.float32)}, {"w": np.array([1, bad, 1], np.float32)}
    model, optimizer = (wrong, good) if which == "model" else (good, wrong)
    with pytest.raises(UserError, match=r"w is not finite after step 7: nothing was saved; try a lower --lr"):
        ckpt.save_checkpoint(tmp_path, 7, model, {}, optimizer, {}, 1)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_keep_keeps_the_newest(keep: int, tmp_path: Path) -> None:
    for step in (1, 2, 9, 10, 100, 1000):
        path = saved(tmp_path, step, keep)
        assert ckpt.load_checkpoint(path).position == {"step": step}
    steps = (9, 10, 100, 1000)[-keep:]
    assert sorted(snapshot(tmp_path)) == sorted(
        f"step-{s:08d}.{kind}" for s in steps for kind in ("safetensors", "state.safetensors")
    )


def test_keep_does_not_remove_what_was_just_saved(tmp_path: Path) -> None:
    """Going on from an older checkpoint, the damaged newer one does not push the good ones out."""
    for step in (2, 4):
        path = saved(tmp_path, step)
    cut(path, 0.5)
    saved(tmp_path, 3, keep=1)
    found, _ = ckpt.newest_valid(tmp_path)
    assert found is not None
    assert found.position == {"step": 3}


@pytest.mark.parametrize("which", [0, 1])
def test_every_flipped_byte_and_cut_is_found(which: int, stopped: Path) -> None:
    path = newest(stopped)
    file, good = (path, ckpt.state_path(path))[which], ckpt.load_checkpoint(path)
    whole, rng = file.read_bytes(), np.random.default_rng(which)
    header = 8 + int.from_bytes(whole[:8], "little")
    for at in (*rng.integers(0, len(whole), 30), *rng.integers(0, header, 60), *range(8)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.integers(8))]) + whole[at + 1 :])
        try:
            found = ckpt.load_checkpoint(path)
        except UserError:
            continue
        same = [ckpt.digest(part) for part in (found.model, found.optimizer)] == [
            ckpt.digest(part) for part in (good.model, good.optimizer)
        ]
        assert same, f"byte {at}"
        assert (found.position, found.model_spec) == (good.position, good.model_spec), f"byte {at}"
    for length in LENGTHS:
        file.write_bytes(whole)
        cut(file, length)
        with pytest.raises(UserError, match=f"{file.name}: .*use another checkpoint"):
            ckpt.load_checkpoint(path)
    file.unlink()
    with pytest.raises(UserError, match=f"{file.name}: no such file"):
        ckpt.load_checkpoint(path)


def test_state_of_another_save(tmp_path: Path) -> None:
    """Two valid files that were not saved together are no checkpoint."""
    path, other = saved(tmp_path / ".", 1), tmp_path / "other"
    other.mkdir()
    shutil.copy(saved(other, 1, fill=2.0), path)
    with pytest.raises(UserError, match="not the file that its state was saved with: use another checkpoint"):
        ckpt.load_checkpoint(path)


def test_damaged_newest_is_passed_over(stopped: Path, call: Call, tmp_path: Path) -> None:
    path = newest(stopped)
    cut(path, 0.5)
    code, out, err = call(stopped)
    assert (code, err) == (0, "")
    assert re.search(rf"note: skipped: \S+{path.name}: .*use another checkpoint", out)
    assert "resuming from step-00000002.safetensors, step 2 of 4" in out
    assert call(tmp_path / "whole", "--log-every", 1)[0] == 0
    assert summary(stopped)["parameter_digest"] == summary(tmp_path / "whole")["parameter_digest"]


def test_all_damaged(stopped: Path, call: Call) -> None:
    for path, file in zip(ckpt.list_checkpoints(stopped / "checkpoints"), (Path, ckpt.state_path, Path)):
        cut(file(path), 0.9)
    before = snapshot(stopped)
    code, _, err = call(stopped)
    assert_one_line(
        code, err, stopped / "checkpoints", newest(stopped).name, "no valid checkpoint", "new --run-dir"
    )
    assert snapshot(stopped) == before


def assert_unharmed(folder: Path, before: dict[str, str]) -> None:
    after = snapshot(folder)
    assert before.items() <= after.items()
    assert not [name for name in after if name.endswith(".tmp")]
    found, problems = ckpt.newest_valid(folder)
    assert (found is not None, problems) == (True, [])


@pytest.mark.parametrize(
    ("optimizer", "size", "file"), [("adam", 60_000, "state.safetensors"), ("sgd", 20_000, "04.safetensors")]
)
def test_file_that_cannot_grow(
    optimizer: str, size: int, file: str, call: Call, small_data: Path, tmp_path: Path
) -> None:
    """The write ends half-way, in the state (the first file) or in the model (the second)."""
    folder, options = tmp_path / "run", ("--optimizer", optimizer)
    assert call(folder, "--max-steps", 2, *options)[0] == 0
    before = snapshot(folder / "checkpoints")
    done = run("-c", LIMITED, size, "--run-dir", folder, "--data", small_data, *SMALL, *options, check=False)
    assert_one_line(done.returncode, done.stderr, file, "File too large", "ulimit -f", "--run-dir")
    assert_unharmed(folder / "checkpoints", before)
    assert call(folder, *options)[0] == 0
    assert call(tmp_path / "whole", *options)[0] == 0
    assert summary(folder)["parameter_digest"] == summary(tmp_path / "whole")["parameter_digest"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB: one checkpoint and a half."""
    require("mounts")
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


def test_full_disk(disk: Path, call: Call, tmp_path: Path) -> None:
    folder = disk / "run"
    assert call(folder, "--max-steps", 2)[0] == 0
    before = snapshot(folder / "checkpoints")
    code, _, err = call(folder)
    assert_one_line(code, err, "step-00000004", "No space left", "--run-dir")
    assert_unharmed(folder / "checkpoints", before)
    subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
    assert call(folder)[0] == 0
    assert call(tmp_path / "whole")[0] == 0
    assert summary(folder)["parameter_digest"] == summary(tmp_path / "whole")["parameter_digest"]


def test_read_only_disk(disk: Path, call: Call) -> None:
    assert call(disk / "run", "--max-steps", 2)[0] == 0
    before = snapshot(disk)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    code, _, err = call(disk / "run")
    assert_one_line(code, err, disk / "run", "Read-only")
    assert snapshot(disk) == before


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that saves waits for the next step, which would never come if saving held training up."""
    seen, plain = [], ckpt.save_checkpoint
    made: list[Any] = []

    def slow(*arguments: Any) -> Path:
        step, deadline = arguments[1], time.monotonic() + LIMIT
        while step < 4 and made[0].progress.step == step:
            assert time.monotonic() < deadline, "training waits for the checkpoint"
            time.sleep(0.01)
        seen.append((step, made[0].progress.step))
        return plain(*arguments)

    class Known(distrib.loop.Trainer):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(ckpt, "save_checkpoint", slow)
    monkeypatch.setattr(distrib.loop, "Trainer", Known)
    options = Config(
        epochs=1,
        batch_size=8,
        limit_train=32,
        limit_test=8,
        width=1 / 16,
        checkpoint_every=1,
        run_dir=str(tmp_path),
    )
    assert distrib.loop.train(options) == 0
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    assert all(at > step for step, at in seen[:3])
    for path in ckpt.list_checkpoints(tmp_path / "checkpoints"):
        assert ckpt.load_checkpoint(path).position["step"] == int(path.stem.split("-")[1]), (
            "of the moment, not of later"
        )


def test_what_goes_wrong_in_the_thread_is_raised_by_the_next_call(tmp_path: Path) -> None:
    saver = ckpt.Saver()
    saver.start(tmp_path / "nowhere", 1, {"a": np.ones(1)}, {}, {}, {}, 3)
    with pytest.raises(UserError, match="cannot be written"):
        saver.wait()
    saver.wait()
