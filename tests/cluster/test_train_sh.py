"""slurm/train.sh from top to bottom, against commands of Slurm that do what they must on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LIMIT, ROOT, environment, summary

from distrib.faults.heartbeat import Heartbeat

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


KILLED, KILLED_TOO = "srun: error: node2: task 1: Killed", "srun: error: node1: task 0: Killed"
EXITED = "srun: error: node2: task 1: Exited with exit code 3"


@pytest.mark.parametrize(
    ("lines", "accused"),
    [
        ([KILLED, KILLED_TOO], "rank 1 on node2 failed at step 5: killed by signal 9"),
        ([EXITED, KILLED_TOO], "rank 0 on node1 failed at step 4: its process ended without an error"),
        ([], "rank 0 on node1 failed at step 4: its process ended without an error"),
    ],
)
def test_srun_names_a_killed_rank_whose_shell_could_not(
    commands: dict[str, str], lines: list[str], accused: str, tmp_path: Path
) -> None:
    """The rank that ended first, and only where it was killed; else the last heartbeats tell."""
    ranks, here = tmp_path / "ranks", tmp_path / "here"
    ranks.mkdir()
    for rank, step in ((0, 4), (1, 5)):
        beat = Heartbeat(rank=rank, host=f"node{rank + 1}", pid=4000 + rank, step=step, time=1000.0 + rank)
        (ranks / f"{rank:05}.json").write_text(json.dumps(vars(beat)))
    said = "".join(f"echo '{line}' >>{tmp_path / 'log'}\n" for line in lines)
    programs = {
        "srun": f"[ $1 != --mpi=list ] || {{ echo pmix; exit; }}\ncp -r {ranks} run/ranks\n{said}exit 137\n",
        "scontrol": f"echo StdOut={tmp_path / 'log'}\n",
    }
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text("#!/bin/bash\n" + text)
    (tmp_path / "log").touch()
    done = submit(commands, here, "--run-dir", "run")
    assert f"failed with exit code 137: {accused}" in done.stdout + done.stderr
    assert json.loads((here / "run" / "failure.json").read_text())["pid"] in (4000, 4001)
