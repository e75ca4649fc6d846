"""`distrib submit`: a training job for Slurm, from options; slurm/train.sh is the script that runs."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from distrib.errors import UserError
from distrib.files import printable
from distrib.train import parse
from launch.entry import choice, number, one_process
from launch.machine import finish
from launch.report.records import shown

LAUNCHERS = ("pmix", "pmi2", "mpirun")

PLACES = ("../slurm/train.sh", "slurm/train.sh")
"""The batch script, seen from this file: in the repository, in an installed package."""


def script_path() -> Path:
    """slurm/train.sh of the repository or of the installed package."""
    here = Path(__file__).resolve().parent
    found = next((here / place for place in PLACES if (here / place).is_file()), None)
    if found is None:
        raise UserError(
            f"slurm/train.sh is neither beside {here} nor in it: install distrib again, or use the repository"
        )
    return found.resolve()


def sbatch_command(
    script: Path,
    nodes: int,
    gpus_per_node: int,
    ntasks_per_node: int | None,
    training: list[str],
    **options: str | int | None,
) -> list[str]:
    """The sbatch command: `options` by name, those that are None left to the script's #SBATCH lines."""
    ranks = ntasks_per_node or max(gpus_per_node, 1)
    if gpus_per_node and ranks != gpus_per_node:
        raise UserError(
            f"--ntasks-per-node {ranks} with --gpus-per-node {gpus_per_node}: one rank per GPU; leave it out"
        )
    given = {"nodes": nodes, "gpus_per_node": gpus_per_node, "ntasks_per_node": ranks, **options}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    return ["sbatch", "--parsable", *flags, str(script), *training]


def require_mpirun() -> None:
    """UserError unless mpirun is beside this Python or on PATH: slurm/train.sh starts --elastic by it."""
    python = os.environ.get("PYTHON") or sys.executable
    beside = Path(shutil.which(python) or python).with_name("mpirun")
    if not os.access(beside, os.X_OK) and shutil.which("mpirun") is None:
        raise UserError(
            f"--elastic: needs the mpirun of Open MPI 5, which is neither {beside} nor on PATH: install"
            " distrib[mpi], or load Open MPI"
        )


def _send(command: list[str], variables: dict[str, str]) -> str:
    """Run sbatch; the job's number. UserError with sbatch's own words where it refuses."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "no sbatch on PATH: submit from a login node of a Slurm cluster, or look with --dry-run"
        )
    done = finish(command, {**os.environ, **variables})
    if done.code:
        words = (done.err.strip() or f"exit code {done.code}").replace("sbatch: ", "")
        raise UserError(f"sbatch refused the job: {' '.join(words.split())}")
    return done.out.strip().split(";")[0]


def how_to_follow(job: str, run_dir: str | None, array: str | None) -> str:
    """What you may type next."""
    log = f"slurm-{job}.log"
    notes = [
        ("state", f"squeue --job {job}"),
        ("log", f"tail -F {log}"),
        ("results", shown(shlex.quote(run_dir or f"runs/slurm-{job}"))),
        ("stop with a checkpoint, requeue, resume", f"scancel --signal=USR1 --batch {job}"),
        ("stop for good", f"scancel {job}"),
    ]
    if array:
        notes[1] = ("logs", f"tail -F slurm-*.log, whose names scontrol show job {job} tells as StdOut")
        notes[2] = ("results", f"{shown(shlex.quote(run_dir))}/TASK" if run_dir else f"runs/slurm-{job}_TASK")
    return "\n".join([f"job {job} submitted", *(f"  {what + ':':<41}{text}" for what, text in notes)])


@one_process
def submit(
    training: Annotated[
        list[str] | None,
        typer.Argument(help="After --: options of distrib train, which win over the script's."),
    ] = None,
    nodes: Annotated[int, number("--nodes", "Nodes.")] = 1,
    gpus_per_node: Annotated[
        int, number("--gpus-per-node", "GPUs of a node, one rank each; 0 on a partition without.", least=0)
    ] = 1,
    ntasks_per_node: Annotated[
        int | None, number("--ntasks-per-node", "Ranks of a node without GPUs.", show_default="1")
    ] = None,
    cpus_per_task: Annotated[
        int | None, typer.Option(help="Cores of a rank.", show_default="the script's")
    ] = None,
    time: Annotated[
        str | None, typer.Option(help="Time limit, as sbatch takes it: 2:00:00.", show_default="the script's")
    ] = None,
    partition: Annotated[str | None, typer.Option(help="Partition.", show_default="the cluster's")] = None,
    account: Annotated[str | None, typer.Option(help="Account.", show_default="yours")] = None,
    array: Annotated[
        str | None, typer.Option(help="Array, as sbatch takes it: 0-4; each task's number is its seed.")
    ] = None,
    launcher: Annotated[
        str, choice("--launcher", "pmix or pmi2 (srun --mpi), or mpirun.", *LAUNCHERS, envvar="LAUNCHER")
    ] = "pmix",
    run_dir: Annotated[
        str | None,
        typer.Option(
            envvar="RUN_DIR",
            help="The run's folder; a run in it is resumed.",
            show_default="runs/slurm-JOB",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the command and the script, submit nothing.")
    ] = False,
) -> None:
    """Submit a training run to Slurm; sbatch's options win over the #SBATCH lines of slurm/train.sh.

    Examples:

      distrib submit --nodes 2 --gpus-per-node 4 --time 2:00:00 --partition gpu -- --seed 1

      distrib submit --gpus-per-node 0 --ntasks-per-node 8 --dry-run
    """
    given = list(training or [])
    config = parse(given)  # a mistake is told now, not when the job starts
    if run_dir is not None and config.run_dir is not None:
        raise UserError(f"--run-dir {run_dir} and, after --, --run-dir {config.run_dir}: give one of them")
    run_dir = run_dir or config.run_dir
    if run_dir is not None and config.run_dir is None:
        given += ["--run-dir", run_dir]
    script = script_path()
    command = sbatch_command(
        script,
        nodes,
        gpus_per_node,
        ntasks_per_node,
        given,
        cpus_per_task=cpus_per_task,
        time=time,
        partition=partition,
        account=account,
        array=array,
    )
    variables = {"PYTHON": os.environ.get("PYTHON") or sys.executable, "LAUNCHER": launcher}
    if dry_run:
        line = shlex.join(["env", *(f"{name}={value}" for name, value in variables.items()), *command])
        print(printable(line, len(line)))
        print(f"\n# {script}\n{script.read_text()}", end="")
        return
    if config.elastic:
        require_mpirun()
    print(how_to_follow(_send(command, variables), run_dir, array))
