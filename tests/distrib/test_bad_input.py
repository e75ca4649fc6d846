"""Wrong data, options and folders: one line with name, value and remedy, exit code 2, nothing is harmed."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import losses, run, train
from safetensors.numpy import save_file

from distrib.errors import EXIT_USAGE, UserError
from distrib.results import StepResults
from distrib.run import checkpoint as ckpt
from distrib.train import main

SMALL = ("--width", 0.0625, "--batch-size", 16, "--epochs", 1, "--backend", "numpy")
Call = Callable[..., tuple[int, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """The command line within this process: (exit code, stderr)."""
    monkeypatch.setattr("distrib.loop.stop_on_signals", lambda *_: nullcontext())

    def command(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["distrib", *map(str, arguments)])
        capsys.readouterr()
        return main(), capsys.readouterr().err

    return command


def assert_one_line(code: int, err: str, *named: object) -> None:
    assert code == EXIT_USAGE, err
    assert len(err.splitlines()) == 1, err
    assert err.startswith("distrib: error: ")
    for text in named:
        assert str(text) in err


def snapshot(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in `folder`."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


OPTIONS = [
    ("--lr", -1),
    ("--lr", 0),
    ("--lr", "nan"),
    ("--lr", "inf"),
    ("--lr", "abc"),
    ("--epochs", 1.5),
    ("--limit-train", 0),
    ("--limit-train", 65),
    ("--limit-test", 0),
    ("--limit-test", 33),
    ("--batch-size", 0),
    ("--variant", "nosuch"),
    ("--recipe", "nosuch"),
    ("--optimizer", "nosuch"),
    ("--loss", "nosuch"),
    ("--schedule", "nosuch"),
    ("--precision", "nosuch"),
    ("--backend", "nosuch"),
    ("--comm", "nosuch"),
    ("--batch-norm", "nosuch"),
    ("--seed", -1),
    ("--seed", "x"),
    ("--nosuch", 3),
    ("--data", "/no/such"),
    ("--precision", "tf32"),
    ("--comm", "nccl"),
]


@pytest.mark.parametrize(("option", "value"), OPTIONS)
def test_bad_option(option: str, value: object, call: Call, small_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, err = call("--run-dir", folder, "--data", small_data, *SMALL, option, value)
    assert_one_line(code, err, option, value if option != "--nosuch" else "")
    assert not folder.exists(), "nothing was begun"


def test_stray_argument_and_missing_value(call: Call) -> None:
    assert_one_line(*call("stray"), "stray", "--help")
    assert_one_line(*call("--lr"), "--lr", "--help")


@pytest.fixture
def finished(call: Call, small_data: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    code, err = call("--run-dir", folder, "--data", small_data, *SMALL)
    assert code == 0, err
    return folder


CHANGED = (
    "--lr 0.5",
    "--seed 3",
    "--variant avgpool",
    "--loss bce",
    "--width 0.125",
    "--batch-size 8",
    "--optimizer sgd",
    "--limit-train 20",
    "--precision float64",
)


def test_folder_that_holds_a_run(finished: Path, call: Call, small_data: Path) -> None:
    before = snapshot(finished)
    again = ("--run-dir", finished, "--data", small_data, *SMALL)
    assert_one_line(*call(*again), f"--run-dir {finished}", "finished run", "new folder, or more --epochs")
    assert_one_line(*call(*again, "--resume", "none"), f"--run-dir {finished}", "--resume auto", "new folder")
    for option in CHANGED:
        code, err = call(*again, "--epochs", 2, *option.split())
        assert_one_line(code, err, f"--run-dir {finished}", f"{option} (the run has ", "new folder")
    assert snapshot(finished) == before


def test_settings_of_config_json_must_match(finished: Path, call: Call, small_data: Path) -> None:
    path = finished / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lr": 0.25}))
    before = snapshot(finished)
    code, err = call("--run-dir", finished, "--data", small_data, *SMALL, "--epochs", 2)
    assert_one_line(code, err, "--lr 0.001 (the run has 0.25)")
    for text in ("{", "[1]", ""):
        path.write_text(text)
        assert_one_line(
            *call("--run-dir", finished, "--data", small_data, *SMALL), path, "--run-dir", "restore"
        )
    assert snapshot(finished) == {**before, "config.json": hashlib.sha256(b"").hexdigest()}


def test_undecodable_metrics(call: Call, small_data: Path, tmp_path: Path) -> None:
    arguments = ("--run-dir", tmp_path / "run", "--data", small_data, *SMALL)
    assert call(*arguments, "--max-steps", 2)[0] == 0
    with open(tmp_path / "run" / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 1, \xff\xfe')
    code, err = call(*arguments)
    assert code == 0, err
    assert b"\xff" not in (tmp_path / "run" / "metrics.jsonl").read_bytes()


def test_in_a_process_of_its_own(finished: Path, small_data: Path) -> None:
    before = snapshot(finished)
    done = train(finished, "--data", small_data, *SMALL, check=False)
    assert_one_line(done.returncode, done.stderr, finished, "finished run")
    (small_data / "train-images-idx3-ubyte.gz").write_bytes(b"")
    done = train(finished, "--data", small_data, *SMALL, check=False)
    assert_one_line(done.returncode, done.stderr, small_data / "train-images-idx3-ubyte.gz")
    assert snapshot(finished) == before


LATE = "import os, sys, time; time.sleep(float(os.environ['OMPI_COMM_WORLD_RANK'] == sys.argv.pop(1))); "


@pytest.mark.parametrize("late", [0, 1])  # the rank that starts a second later
@pytest.mark.parametrize("option", ["--batch-size 1", "--lr nan"])  # found with, and before, MPI
def test_two_ranks_say_it_once(option: str, late: int, small_data: Path, tmp_path: Path) -> None:
    code = LATE + "from distrib.train import main; sys.exit(main())"
    options = (*SMALL, *option.split(), "--run-dir", tmp_path / "run", "--data", small_data)
    done = run("-c", code, late, *options, ranks=2, check=False)
    assert done.returncode == EXIT_USAGE
    assert done.stderr.count("distrib:") == 1, done.stderr
    assert f"distrib: error: {option}: " in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


def test_a_rank_alone_with_a_mistake_before_mpi_says_it(small_data: Path, tmp_path: Path) -> None:
    """As where one host has no MPI library: rank 0 waits in MPI_Init and can say nothing."""
    code = (
        "import os, sys; from distrib.comm import start; alone = os.environ['OMPI_COMM_WORLD_RANK'] == '1';"
        "plain = start.import_mpi\n"
        "def missing(*_):\n    raise RuntimeError('no MPI library (planted)')\n"
        "start.import_mpi = missing if alone else plain\n"
        "from distrib.train import main; sys.exit(main())"
    )
    done = run("-c", code, *SMALL, "--run-dir", tmp_path / "run", "--data", small_data, ranks=2, check=False)
    assert done.returncode == EXIT_USAGE
    own = [line for line in done.stderr.splitlines() if line.startswith("distrib:")]
    assert own == ["distrib: error: --comm auto with 2 ranks: no MPI library (planted) (rank 1)"]


@pytest.fixture
def stopped(call: Call, small_data: Path, tmp_path: Path) -> Path:
    """A run of 4 steps that ended after 3."""
    assert call("--run-dir", tmp_path / "run", "--data", small_data, *SMALL, "--max-steps", 3)[0] == 0
    return tmp_path / "run"


def newest(folder: Path) -> Path:
    return ckpt.list_checkpoints(folder / "checkpoints")[0]


def test_resume_from_a_bad_path(stopped: Path, call: Call, small_data: Path, tmp_path: Path) -> None:
    text, foreign = tmp_path / "text.safetensors", tmp_path / "foreign.safetensors"
    text.write_text("no numbers")
    save_file({"w": np.ones(3, np.float32)}, foreign)
    damaged = shutil.copytree(stopped / "checkpoints", tmp_path / "copy") / newest(stopped).name
    ckpt.state_path(damaged).write_bytes(ckpt.state_path(damaged).read_bytes()[:-1])
    before = snapshot(stopped)
    bad = (
        (text, "no safetensors file"),
        (foreign, "not a checkpoint of this program"),
        (tmp_path / "none", "no such file"),
        (tmp_path, "holds no checkpoint: give a run's folder"),
        (damaged.parent, "no valid checkpoint"),
        (ckpt.state_path(newest(stopped)), "not a checkpoint"),
    )
    for path, message in (*bad, (damaged, "use another checkpoint")):
        code, err = call("--run-dir", stopped, "--data", small_data, *SMALL, "--resume", path)
        assert_one_line(code, err, path.name.removesuffix(".safetensors"), message)
    assert snapshot(stopped) == before


@pytest.mark.parametrize(
    "option", ["--variant avgpool", "--width 0.125", "--loss bce", "--precision float64"]
)
def test_resume_from_another_network(
    option: str, stopped: Path, call: Call, small_data: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    assert call("--run-dir", other, "--data", small_data, *SMALL, "--max-steps", 1, *option.split())[0] == 0
    before = snapshot(stopped)
    code, err = call("--run-dir", stopped, "--data", small_data, *SMALL, "--resume", newest(other))
    assert_one_line(code, err, newest(other), option.split()[1], "use a matching checkpoint")
    assert snapshot(stopped) == before


def test_non_finite_loss_stops_the_run(small_data: Path, tmp_path: Path) -> None:
    options = (
        "--data",
        small_data,
        *SMALL,
        "--optimizer",
        "sgd",
        "--lr",
        1e30,
        "--checkpoint-every",
        1,
        "--log-every",
        1,
    )
    done = train(tmp_path / "run", *options, check=False)
    assert_one_line(done.returncode, done.stderr, "at step 2", "rank 0", "try a lower --lr than 1e+30")
    assert np.isfinite(losses(tmp_path / "run")).all()
    for path in ckpt.list_checkpoints(tmp_path / "run" / "checkpoints"):
        found = ckpt.load_checkpoint(path)
        assert found.position["step"] < 2
        assert all(np.isfinite(tensor).all() for tensor in (*found.model.values(), *found.optimizer.values()))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_non_finite_test_loss_is_no_success(call: Call, small_data: Path, tmp_path: Path) -> None:
    """The only step's training loss is finite; the weights that it leaves are of no use."""
    options = ("--limit-train", 16, "--optimizer", "sgd", "--lr", 1e30)
    code, err = call("--run-dir", tmp_path / "run", "--data", small_data, *SMALL, *options)
    assert_one_line(code, err, "step 1", "try a lower --lr")
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(("own", "rank"), [([1.0, np.nan, np.inf], 1), ([1.0, 2.0, np.inf], 2)])
def test_first_rank_with_a_non_finite_loss(own: list[float], rank: int) -> None:
    world = SimpleNamespace(allgather=lambda _value, _what: [bool(np.isfinite(x)) for x in own])
    results = SimpleNamespace(_world=world, _lr=0.5)
    with pytest.raises(
        UserError, match=rf"loss is nan at step 9, first on rank {rank}: .*lower --lr than 0\.5"
    ):
        StepResults._raise_non_finite(results, 9, own[0], np.nan)  # type: ignore[arg-type]
