"""`distrib bench save`: what a checkpoint costs the training beside which it is written."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from distrib import state
from distrib.comm.world import connect
from distrib.config import build
from distrib.data import formats
from distrib.errors import UserError
from distrib.run.folder import Run
from distrib.trainer import Trainer, blas_threads
from distrib.warmup import warm_up
from launch.bench_step import ours
from launch.measure import AsJson, BatchSize, Repeats, Width, machine, spread


def save(
    batch_size: BatchSize = 8,
    width: Width = 1.0,
    every: Annotated[int, typer.Option(help="Steps from one checkpoint to the next.")] = 50,
    folder: Annotated[
        Path, typer.Option(help="Write to a folder in this one, removed at the end: the disk counts.")
    ] = Path(),
    repeats: Repeats = 9,
    as_json: AsJson = False,
) -> None:
    """Saving's share of the training time, at one checkpoint every so many steps; alone or under mpirun.

    Stretches of training with one checkpoint and without take turns; `held up` is what the call itself waits for,
    the copies of the tensors; the whole cost holds what the thread that writes takes from the steps after it too.

    Example: mpirun -n 2 distrib bench save
    """
    if min(batch_size, every, repeats) < 1:
        raise UserError("--batch-size, --every and --repeats: give 1 or more")
    if not folder.is_dir():
        raise UserError(f"--folder {folder}: no such folder: make it, or give another")
    config = build({"batch_size": batch_size, "width": width, "limit_test": 1})
    world = connect(timeout=600)
    with world.agree():
        data = formats.load(None, None, 1)
        config = config.resolve(world.size, data)
    trainer = Trainer(config, world, data)
    warm_up(trainer, None)
    steps = ours(trainer, every, evaluate=False)
    plain: list[float] = []
    saving: list[float] = []
    held: list[float] = []
    with tempfile.TemporaryDirectory(
        prefix=".bench-save-", dir=folder, ignore_cleanup_errors=True
    ) as temporary:
        run = Run(Path(temporary)) if world.rank == 0 else None
        with world.agree():
            if run:
                run.prepare(config, None, trainer.environment(), data.about())
        for repeat in range(repeats + 1):  # the first warms up
            without = steps()["seconds"]
            begin = time.perf_counter()
            state.save(trainer, run)
            waited = time.perf_counter() - begin
            beside = steps()["seconds"]
            with world.agree():
                trainer.saver.wait()  # the stretch without a checkpoint has none left to write
            if repeat:
                plain.append(without)
                saving.append(waited + beside)
                held.append(waited)
    if world.rank == 0:
        result: dict[str, Any] = {
            "machine": machine(),
            "ranks": world.size,
            "threads": world.size * blas_threads(),
            "batch_size": batch_size,
            "width": width,
            "every": every,
            "step_ms": [1e3 * seconds / every for seconds in plain],
            "held_up_ms": [1e3 * seconds for seconds in held],
            "held_up_percent": [100 * a / b for a, b in zip(held, plain, strict=True)],
            "cost_percent": [100 * (a / b - 1) for a, b in zip(saving, plain, strict=True)],
        }
        print(json.dumps(result, indent=2)) if as_json else show(result)
    trainer.close()


def show(r: dict[str, Any]) -> None:
    """The report of `bench save`."""
    print(
        f"{r['machine']}\ntraining, {r['ranks']} rank(s), {r['threads']} thread(s) in total, batch {r['batch_size']}, width"
        f" {r['width']}, a checkpoint every {r['every']} steps, {len(r['step_ms'])} pairs"
    )
    print(f"  a step          {spread(r['step_ms'])} ms")
    print(
        f"  held up         {spread(r['held_up_ms'], 3)} ms a checkpoint: {spread(r['held_up_percent'], 2)} %"
    )
    print(
        f"  the whole cost  {statistics.median(r['cost_percent']):.1f} %"
        f" ({min(r['cost_percent']):.1f} to {max(r['cost_percent']):.1f}) of the training time"
    )
