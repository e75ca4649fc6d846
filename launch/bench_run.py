"""`distrib bench run`: a whole training run, start to finish, against the same recipe in PyTorch."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from distrib.config import Config
from distrib.data import idx as mnist
from distrib.errors import EXIT_USAGE, UserError
from distrib.train import parse
from launch import torch_bench
from launch.measure import AsJson, child_environment, machine, refuse_launcher, require_torch, spread
from launch.torch_bench import kinds

FIXED = ("seed", "run_dir", "resume", "max_steps")


def timed(command: list[str], threads: int) -> tuple[str, float]:
    """Standard output of a command, and its seconds from start to end; UserError where it was used wrongly."""
    begin = time.perf_counter()
    done = subprocess.run(
        command, env=child_environment(threads), capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - begin
    if done.returncode == EXIT_USAGE:
        raise UserError(
            next(line for line in done.stderr.splitlines() if line.strip()).removeprefix("distrib: error: ")
        )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with code {done.returncode}:\n{done.stderr or done.stdout}"
        )
    return done.stdout, seconds


def mpirun() -> str:
    """The launcher beside this Python, or the one on the path; UserError where there is none."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which("mpirun", path=places)
    if found is None:
        raise UserError("--ranks above 1: no mpirun is installed: pip install 'distrib[mpi]', or --ranks 1")
    return found


def ours(options: list[str], ranks: int, threads: int) -> dict[str, float]:
    """One run of `python -m distrib.train` on `ranks` ranks."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = [mpirun(), "-n", str(ranks)] if ranks > 1 else []
        command = [*launcher, sys.executable, "-m", "distrib.train", *options, "--run-dir", folder]
        _, seconds = timed(command, max(1, threads // ranks))
        summary = json.loads((Path(folder) / "summary.json").read_text())
    return {"process_seconds": seconds, **{name: summary[name] for name in ("wall_seconds", "test_accuracy")}}


def theirs(config: Config, kind: str, threads: int) -> dict[str, float]:
    """The same recipe in PyTorch, in one process."""
    out, seconds = timed(torch_bench.command("train", config, kind, threads), threads)
    return {"process_seconds": seconds, **json.loads(out.strip().splitlines()[-1])}


def run(
    context: typer.Context,
    ranks: Annotated[int, typer.Option(help="Ranks of our side; PyTorch gets as many threads.")] = 2,
    repeats: Annotated[
        int, typer.Option(help="Runs of each side, in alternation, with seeds 0, 1, 2, …")
    ] = 3,
    against: Annotated[
        str | None, typer.Option(help="torch: the same recipe in PyTorch, both layouts.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Whole training runs: seconds from the first step to the end of the last evaluation, and test accuracy.

    On a GPU give --backend cupy and --ranks 1. All options of `distrib train` may be given, but for those of the run folder, --seed and --max-steps.
    Example: distrib bench run --recipe demo --against torch
    """
    if against not in (None, "torch"):
        raise UserError(f"--against {against}: choose torch, or leave it out")
    if min(ranks, repeats) < 1:
        raise UserError("--ranks and --repeats: give 1 or more")
    refuse_launcher("distrib bench run")
    config = parse(context.args)
    for name in FIXED:
        if getattr(config, name) != getattr(Config(), name):
            raise UserError(f"--{name.replace('_', '-')}: is chosen by the benchmark: leave it out")
    data = mnist.load(config.data, config.limit_train, config.limit_test)
    config = config.resolve(ranks, len(data.train_images), len(data.test_images))
    if against:
        require_torch("--against torch")
        if config.loss != "ce" or config.precision == "float64" or config.batch_norm != "sync":
            raise UserError("--against torch: compares --loss ce and --batch-norm sync, and not in float64")
    gpu = config.backend == "cupy"
    sides = ["distrib", *(f"torch {kind}" for kind in (kinds(gpu) if against else ()))]
    results: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    with Console(stderr=True).status("") as status:
        for seed in range(repeats):
            for name in sides:
                status.update(f"seed {seed}: {name}")
                if name == "distrib":
                    found = ours([*context.args, "--seed", str(seed)], ranks, ranks)
                else:
                    found = theirs(replace(config, seed=seed), name.split(" ", 1)[1], ranks)
                results[name].append(found)
    report: dict[str, Any] = {"machine": machine(), "ranks": ranks, "options": context.args, "runs": results}
    if against:
        best = min(
            sides[1:], key=lambda name: statistics.median(row["wall_seconds"] for row in results[name])
        )
        pairs = zip(results[best], results["distrib"], strict=True)
        report |= {
            "against": best,
            "ratio": [theirs["wall_seconds"] / ours["wall_seconds"] for theirs, ours in pairs],
        }
    if as_json:
        print(json.dumps(report, indent=2))
        return
    print(
        f"{report['machine']}\n{' '.join(context.args)}: {ranks} rank(s) of ours, {ranks} thread(s) of PyTorch"
    )
    for name, rows in results.items():
        accuracy = [row["test_accuracy"] for row in rows]
        print(
            f"  {name:20} {spread([row['wall_seconds'] for row in rows], 3)} s; whole process"
            f" {spread([row['process_seconds'] for row in rows], 3)} s; test accuracy mean"
            f" {statistics.mean(accuracy):.2f} % ({min(accuracy):.2f}–{max(accuracy):.2f})"
        )
    if against:
        print(f"  ratio of seconds, {report['against']} to distrib: {spread(report['ratio'], 3)}")
