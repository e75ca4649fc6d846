"""slurm/train.sh from top to bottom, against commands of Slurm that do what they must on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LIMIT, ROOT, environment, summary

SRUN = """#!/bin/bash
[ "$1" != --mpi=list ] || { echo pmix; exit; }
while [ "${1#--}" != "$1" ]; do shift; done
exec "$@"
"""


@pytest.fixture
def commands(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of one rank."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path / "home"),
        "PYTHON": sys.executable,
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "1",
        "SLURM_NTASKS": "1",
        "SLURM_CPUS_ON_NODE": "1",
    }


def submit(commands: dict[str, str], cwd: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    cwd.mkdir(exist_ok=True)
    script = ["bash", str(ROOT / "slurm" / "train.sh"), *map(str, arguments), "--backend", "numpy"]
    return subprocess.run(
        script, cwd=cwd, env=environment(commands), capture_output=True, text=True, timeout=LIMIT
    )


def test_a_recipe_s_limit_is_a_cap(commands: dict[str, str], small_data: Path, tmp_path: Path) -> None:
    """The script's recipe takes 30,000 images, and the data has 64: nobody asked for more."""
    done = submit(commands, tmp_path / "here", "--data", small_data)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "here" / "runs" / "slurm-7"
    assert summary(folder)["images_per_rank"] == [64]
    assert json.loads((folder / "config.json").read_text())["limit_train"] == 64
    given = submit(
        commands, tmp_path / "here", "--data", small_data, "--limit-train", 30000, "--run-dir", "b"
    )
    assert given.returncode == 2
    assert "distrib: error: --limit-train 30000: the data has only 64 images" in given.stderr


def test_a_home_folder_behind_an_equals_sign(
    commands: dict[str, str], small_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    options = ("--data", small_data, "--max-steps", 1)
    done = submit(commands, tmp_path / "here", *options, "--run-dir=~/a")
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "home" / "a")["steps"] == 1
    assert not list((tmp_path / "here").iterdir())
    done = submit(commands, tmp_path / "here", *options, "--run-dir=~nobodyatall/a")
    assert done.returncode == 2
    assert done.stderr == "train.sh: --run-dir ~nobodyatall/a: give the whole path\n"
