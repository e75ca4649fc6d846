"""`distrib submit`: the sbatch command that it makes; a pretend sbatch writes down what it was given."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT

from launch.submit import script_path, submit

SCRIPT = str(ROOT / "slurm" / "train.sh")
CLUSTER = ["--nodes", "2", "--gpus-per-node", "4", "--time", "2:00:00", "--partition", "P"]


@pytest.fixture
def call(command_line):
    return partial(command_line, submit)


@pytest.fixture
def sbatch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder on PATH with an sbatch that writes its arguments and PYTHON into `given` there."""
    file = tmp_path / "bin" / "sbatch"
    file.parent.mkdir()
    file.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" "$PYTHON" "$LAUNCHER" >{tmp_path}/given\necho "123;cluster"\n'
    )
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{file.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("PYTHON", raising=False)
    return tmp_path


def test_submits_and_tells_how_to_follow(call, sbatch: Path) -> None:
    code, out, _ = call(*CLUSTER, "--", "--seed", "1", "--lr", "0.1")
    assert code == 0
    assert (sbatch / "given").read_text().split("\n")[:-1] == [
        "--parsable",
        "--nodes=2",
        "--gpus-per-node=4",
        "--ntasks-per-node=4",
        "--time=2:00:00",
        "--partition=P",
        SCRIPT,
        "--seed",
        "1",
        "--lr",
        "0.1",
        sys.executable,
        "pmix",
    ]
    for text in (
        "job 123 ",
        "squeue --job 123",
        "tail -F slurm-123.log",
        "runs/slurm-123",
        "scancel --signal=USR1 --batch 123",
    ):
        assert text in out


def test_run_folder_goes_to_the_program(call, sbatch: Path) -> None:
    code, out, _ = call("--run-dir", "runs/a b", "--launcher", "mpirun", "--array", "0-2")
    assert code == 0
    assert "'runs/a b'/TASK" in out
    given = (sbatch / "given").read_text().splitlines()
    assert "--array=0-2" in given
    assert given[-4:] == ["--run-dir", "runs/a b", sys.executable, "mpirun"]


def test_dry_run_prints_command_and_script(call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    code, out, _ = call(
        *CLUSTER, "--gpus-per-node", "0", "--ntasks-per-node", "8", "--dry-run", "--", "--run-dir", "a b"
    )
    assert code == 0
    command, script = out.split("\n", 1)
    assert shlex.split(command)[3:] == [
        "sbatch",
        "--parsable",
        "--nodes=2",
        "--gpus-per-node=0",
        "--ntasks-per-node=8",
        "--time=2:00:00",
        "--partition=P",
        SCRIPT,
        "--run-dir",
        "a b",
    ]
    assert script.endswith(Path(SCRIPT).read_text())


def test_no_sbatch_is_one_line(call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    code, out, err = call(*CLUSTER)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "no sbatch on PATH" in err


def test_elastic_without_mpirun_is_one_line(call, sbatch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(sbatch / "bin"))
    monkeypatch.setenv("PYTHON", str(sbatch / "bin" / "python"))
    code, out, err = call("--", "--elastic")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--elastic: needs the mpirun of Open MPI 5" in err
    assert not (sbatch / "given").exists()
    (sbatch / "bin" / "mpirun").touch(mode=0o755)
    code, _, _ = call("--", "--elastic")
    assert code == 0
    assert "--elastic" in (sbatch / "given").read_text().splitlines()


def test_refusal_of_sbatch_is_one_line(call, sbatch: Path) -> None:
    (sbatch / "bin" / "sbatch").write_text(
        "#!/bin/sh\necho 'sbatch: error: invalid partition specified: P' >&2\nexit 1\n"
    )
    code, _, err = call(*CLUSTER)
    assert (code, err.count("\n")) == (2, 1)
    assert "sbatch refused the job: error: invalid partition specified: P" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--", "--lr", "0"], "--lr 0.0"),
        (["--", "--recipe", "none"], "--recipe none"),
        (["--", "--no-such-option"], "--no-such-option"),
        (["--nodes", "0"], "--nodes 0"),
        (["--gpus-per-node", "-1"], "--gpus-per-node -1"),
        (["--gpus-per-node", "4", "--ntasks-per-node", "2"], "--ntasks-per-node 2"),
        (["--gpus-per-node", "0", "--ntasks-per-node", "0"], "--ntasks-per-node 0"),
        (["--run-dir", "a", "--", "--run-dir", "b"], "--run-dir a"),
        (["--launcher", "srun"], "--launcher srun"),
    ],
)
def test_mistakes_are_told_before_anything_is_submitted(
    call, sbatch: Path, arguments: list[str], words: str
) -> None:
    code, _, err = call(*arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert words in err
    assert not (sbatch / "given").exists()


def test_the_script_is_sound() -> None:
    assert script_path() == Path(SCRIPT)
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    alone = subprocess.run(["bash", SCRIPT], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert alone.returncode == 2
    assert alone.stderr == "train.sh: start me with sbatch: sbatch slurm/train.sh\n"
