"""`distrib bench run`: a whole training run, start to finish, against the same recipe in PyTorch."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from distrib import models
from distrib.config import Config
from distrib.data import formats
from distrib.errors import EXIT_USAGE, UserError
from distrib.run.model_spec import describe_model, network_arguments
from distrib.train import parse
from launch.bench.measure import spread
from launch.entry import AsJson, choice, number
from launch.machine import Done, child_environment, finish, machine, mpirun, refuse_launcher, require_torch
from launch.torch_peer import worker
from launch.torch_peer.worker import kinds, require_layers, require_plain

Results = dict[str, list[dict[str, float]]]
"""A row for each seed, by the name of the side."""

FIXED = ("seed", "run_dir", "resume", "max_steps")


def timed(command: list[str], threads: int) -> Done:
    """A command that has ended well; UserError where it was used wrongly."""
    done = finish(command, child_environment(threads))
    if done.code == EXIT_USAGE:
        raise UserError(done.mistake() or done.last_words())
    if done.code:
        raise RuntimeError(f"{' '.join(command)} ended with code {done.code}:\n{done.err or done.out}")
    return done


def ours(options: list[str], ranks: int, threads: int) -> dict[str, float]:
    """One run of `python -m distrib.train` on `ranks` ranks."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*mpirun(ranks), sys.executable, "-m", "distrib.train", *options, "--run-dir", folder]
        done = timed(command, max(1, threads // ranks))
        summary = json.loads((Path(folder) / "summary.json").read_text())
    figures = {name: summary[name] for name in ("wall_seconds", "test_accuracy")}
    return {"process_seconds": done.seconds, **figures}


def theirs(config: Config, kind: str, threads: int) -> dict[str, float]:
    """The same recipe in PyTorch, in one process."""
    done = timed(worker.command("train", config, kind, threads), threads)
    return {"process_seconds": done.seconds, **json.loads(done.out.strip().splitlines()[-1])}


def run(
    context: typer.Context,
    ranks: Annotated[int, number("--ranks", "Ranks of our side; PyTorch gets as many threads.")] = 2,
    repeats: Annotated[
        int, number("--repeats", "Runs of each side, in alternation, with seeds 0, 1, 2, …")
    ] = 3,
    against: Annotated[
        str | None, choice("--against", "torch: the same recipe in PyTorch, both layouts.", "torch")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Whole training runs: seconds from first step to last evaluation, and test accuracy.

    On a GPU give --backend cupy and --ranks 1. All options of `distrib train` may be given, but for those of
    the run folder, --seed and --max-steps. Example: distrib bench run --recipe demo --against torch
    """
    refuse_launcher("distrib bench run")
    config = recipe(context.args, ranks, bool(against))
    sides = ["distrib", *(f"torch {kind}" for kind in (kinds(config.backend == "cupy") if against else ()))]
    results: Results = {name: [] for name in sides}
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
    report |= ratios(results)
    print(json.dumps(report, indent=2)) if as_json else print_report(report)


def recipe(arguments: list[str], ranks: int, against: bool) -> Config:
    """The configuration of both sides; UserError where they cannot be compared in it."""
    config = parse(arguments)
    for name in FIXED:
        if getattr(config, name) != getattr(Config(), name):
            raise UserError(f"--{name.replace('_', '-')}: is chosen by the benchmark: leave it out")
    data = formats.load(config.data, config.limit_train, config.limit_test, config.reading)
    config = config.resolve(ranks, data)
    if against:
        require_torch("--against torch")
        require_plain(config)
        function, *given, options = network_arguments(describe_model(config, data), models.find(config.model))
        with models.building(config.model):
            require_layers(function(*given, **options), config.model)
    return config


def ratios(results: Results) -> dict[str, Any]:
    """PyTorch's faster way, and its seconds over ours, pair by pair; nothing where it was not measured."""
    medians = {
        name: statistics.median(row["wall_seconds"] for row in rows)
        for name, rows in results.items()
        if name != "distrib"
    }
    if not medians:
        return {}
    best = min(medians, key=lambda name: medians[name])
    pairs = zip(results[best], results["distrib"], strict=True)
    return {
        "against": best,
        "ratio": [theirs["wall_seconds"] / ours["wall_seconds"] for theirs, ours in pairs],
    }


def print_report(r: dict[str, Any]) -> None:
    """Print the report for people."""
    print(r["machine"])
    print(f"{' '.join(r['options'])}: {r['ranks']} rank(s) of ours, {r['ranks']} thread(s) of PyTorch")
    for name, rows in r["runs"].items():
        wall, process, accuracy = (
            [row[figure] for row in rows] for figure in ("wall_seconds", "process_seconds", "test_accuracy")
        )
        print(
            f"  {name:20} {spread(wall, 3)} s; whole process {spread(process, 3)} s; test accuracy mean"
            f" {statistics.mean(accuracy):.2f} % ({min(accuracy):.2f}–{max(accuracy):.2f})"
        )
    if "ratio" in r:
        print(f"  ratio of seconds, {r['against']} to distrib: {spread(r['ratio'], 3)}")
