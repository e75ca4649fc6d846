"""`distrib bench step`: training steps on real data, and the same work in PyTorch in the same run."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from distrib import mnist, sampler
from distrib.config import build
from distrib.errors import UserError
from distrib.trainer import Trainer, blas_threads
from distrib.world import World, connect

app = typer.Typer(help="Measure speed, against PyTorch in the same run.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Measure speed, against PyTorch in the same run."""


def ours(trainer: Trainer, steps: int, order: Any) -> Callable[[], float]:
    """A function that trains `steps` steps and returns images per second."""
    batch = trainer.config.batch_size

    def measure() -> float:
        trainer.world.comm.barrier()
        begin = time.perf_counter()
        for step in range(steps):
            own, count = sampler.batch_indices(order, step, batch, trainer.world.rank, trainer.world.size)
            trainer.step(trainer.world.backend.asarray(own), count)
            trainer.read_results()
        return steps * batch / (time.perf_counter() - begin)

    return measure


def theirs(trainer: Trainer, data: mnist.Dataset, steps: int, order: Any, channels_last: bool, threads: int) -> Callable[[], float]:
    """The same steps in eager PyTorch."""
    import torch

    from launch.torch_resnet9 import TorchResNet9

    config, layout = trainer.config, torch.channels_last if channels_last else torch.contiguous_format
    model = TorchResNet9(config.variant, config.width).to(memory_format=layout)
    optimizer = torch.optim.Adam(model.parameters(), config.lr) if config.optimizer == "adam" else torch.optim.SGD(model.parameters(), config.lr)
    images, labels = torch.tensor(data.train_images[:, None]), torch.tensor(data.train_labels).long()

    def measure() -> float:
        torch.set_num_threads(threads)
        begin = time.perf_counter()
        for step in range(steps):
            indices = torch.tensor(order[step * config.batch_size : (step + 1) * config.batch_size])
            x = images[indices].to(torch.float32, memory_format=layout) / 255
            loss = torch.nn.functional.cross_entropy(model(x), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
        return steps * config.batch_size / (time.perf_counter() - begin)

    return measure


def wait_quietly(world: World, measure: Callable[[], float]) -> float:
    """Rank 0 measures; the others sleep, so that it has all cores."""
    if world.size == 1:
        return measure()
    done: float = measure() if world.rank == 0 else 0.0
    request = world.control.Ibarrier()
    while not request.Test():
        time.sleep(0.02)
    return done


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.4g} ({min(values):.4g}–{max(values):.4g})"


@app.command()
def step(
    batch_size: Annotated[int, typer.Option(help="Global batch.")] = 64,
    width: Annotated[float, typer.Option(help="Multiplier of all channel counts.")] = 1.0,
    optimizer: Annotated[str, typer.Option(help="adam or sgd.")] = "adam",
    steps: Annotated[int, typer.Option(help="Steps of one measurement.")] = 5,
    repeats: Annotated[int, typer.Option(help="Measurements, in alternation with PyTorch's.")] = 5,
    against: Annotated[str | None, typer.Option(help="torch: PyTorch with as many threads as there are ranks (alone: as BLAS has).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Images per second of whole training steps on real data, alone or under mpirun.

    Example: mpirun -n 2 distrib bench step --against torch
    """
    if against not in (None, "torch"):
        raise UserError(f"--against {against}: choose torch, or leave it out")
    config = build({"batch_size": batch_size, "width": width, "optimizer": optimizer, "limit_test": 1,
                    "limit_train": min(60000, max(batch_size * steps, 1))})  # fmt: skip
    world = connect(timeout=600)
    data = mnist.load(None, config.limit_train, config.limit_test)
    config = config.resolve(world.size, len(data.train_images), 1)
    trainer = Trainer(config, world, data)
    order = sampler.permutation(0, 0, len(data.train_images))
    threads = world.size * blas_threads()
    measured: dict[str, list[float]] = {}
    runs = {"distrib": ours(trainer, steps, order)}
    if against:
        try:
            runs |= {f"torch {name}": theirs(trainer, data, steps, order, last, threads)
                     for name, last in (("channels-last", True), ("contiguous", False))}  # fmt: skip
        except ImportError:
            raise UserError("--against torch: PyTorch is not installed: pip install torch") from None
    for repeat in range(repeats + 1):  # the first warms up
        for name, measure in runs.items():
            value = measure() if name == "distrib" else wait_quietly(world, measure)
            if repeat:
                measured.setdefault(name, []).append(value)
    if world.rank == 0:
        show(world, config.batch_size, width, threads, measured, as_json)
    world.comm.close()


def show(world: World, batch: int, width: float, threads: int, measured: dict[str, list[float]], as_json: bool) -> None:
    """Rates, and the ratios to the better layout of PyTorch, pair by pair."""
    result: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "world_size": world.size, "threads": threads, "batch_size": batch, "width": width,
        "images_per_second": measured,
        "peak_memory_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }  # fmt: skip
    layouts = [name for name in measured if name != "distrib"]
    if layouts:
        best = max(layouts, key=lambda name: statistics.median(measured[name]))
        result["ratio"] = [a / b for a, b in zip(measured["distrib"], measured[best], strict=True)]
        result["against"] = best
    if as_json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['machine']}; {world.size} rank(s), {threads} thread(s) in total, batch {batch}, width {width}, float32")
    for name, values in measured.items():
        print(f"{name:20} {spread(values)} images/s")
    if layouts:
        print(f"ratio to {result['against']}: {spread(result['ratio'])}")
