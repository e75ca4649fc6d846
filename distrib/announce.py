"""What a run says on the terminal at its start and at its end."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from distrib.comm.world import World
from distrib.config import Config
from distrib.data.dataset import Dataset
from distrib.run.console import Screen
from distrib.run.folder import Run
from distrib.trainer import Trainer
from nn.layer import text

MIN_IMAGES_PER_RANK = 4
"""Images of a step below which another rank on a host does not pay: the fewest in docs/benchmarks.md."""

MOST_THREADS = 8
"""Threads of one process beyond which ranks may be faster: its threads share one Python interpreter."""


def suggest_ranks(world: World, config: Config, threads: int) -> str | None:
    """Suggest a number of ranks if they leave cores idle with their `threads` each; else None."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    best = min(cores, config.batch_size // MIN_IMAGES_PER_RANK)
    several_hosts = len(set(world.hosts)) > 1
    if not world.backend.on_host or several_hosts or best <= world.size:
        return None
    if world.size * threads >= cores and (world.size > 1 or threads <= MOST_THREADS):
        return None
    return (
        f"{cores} cores, {world.size} rank(s) of {threads} thread(s): more ranks may be faster:"
        f" mpirun -n {best} python -m distrib.train …"
    )


def print_start(screen: Screen, trainer: Trainer, data: Dataset, run: Run | None) -> None:
    """Print the resolved configuration, world, backend and data, then notes."""
    config, world = trainer.config, trainer.world
    shown = {name: value for name, value in asdict(config).items() if value is not None and name != "run_dir"}
    hosts = sorted(set(world.hosts))
    screen.table(
        "distrib train",
        {
            **{name.replace("_", "-"): value for name, value in shown.items()},
            "run folder": run.path if run else "none: nothing is written",
            "world": f"{world.size} rank(s) on {', '.join(hosts)}, {trainer.threads} thread(s) each",
            "chosen": world.choice_explanation,
            "result": agreement(config),
            "data": f"{data.name}: {len(data.train_images)} training, {len(data.test_images)} test images of"
            f" {text(data.shape)} pixels, {data.classes} classes",
            "model": f"{trainer.params.count:,} parameters, {trainer.steps} steps",
        },
    )
    for note in [
        *(run.notes if run else ()),
        *data.notes(),
        *world.backend.notes,
        suggest_ranks(world, config, trainer.threads),
    ]:
        if note:
            screen.say(f"note: {note}")


def agreement(config: Config) -> str:
    """What the number of ranks does to the result."""
    if config.reproducible:
        return f"the same bits on 1 to {config.shards} ranks: {config.shards} virtual shards"
    if config.batch_norm == "local":
        return "depends on the number of ranks: --batch-norm local"
    return "the same on any number of ranks, up to rounding"


def print_result(screen: Screen, summary: dict[str, Any], run: Run | None) -> None:
    """Print the result, at the end."""
    state = "finished" if summary["finished"] else f"ended early at step {summary['steps']}"
    accuracy = summary["test_accuracy"]
    rate, where = summary["images_per_second"], f"; results in {run.path}" if run else ""
    test = "" if accuracy is None else f"test accuracy {accuracy:.2f} %, "
    screen.say(
        f"{state}: {test}{summary['wall_seconds']:.1f} s, {rate or 0:.0f} images/s on"
        f" {summary['world_size']} rank(s){where}"
    )
