"""`distrib bench kernels`: the time of every kernel of a training step on a GPU, and of the whole step."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table

from distrib.comm.world import connect
from distrib.config import build
from distrib.data import formats
from distrib.errors import UserError
from distrib.trainer import Trainer
from distrib.warmup import global_batches, warm_up
from launch.bench.measure import BatchSize, Data, NetworkName, Variant, Width
from launch.entry import AsJson, choice
from launch.machine import machine, refuse_launcher
from nn.device import capture

COPIES, ROUNDS = 50, 7
"""A kernel's time is that of a graph with COPIES of it, divided by them: the median of ROUNDS."""

Launch = tuple[str, Callable[[], None]]


def launches(trainer: Trainer, kind: tuple[int, ...]) -> list[Launch]:
    """(name, call that queues it again) of everything that an eager step queues."""
    found: list[Launch] = []
    algorithms = trainer.world.backend.algorithms
    kernels, convolutions = algorithms["stem"].kernels, algorithms.get("cudnn")

    def record(target: Any, method: str, name: Callable[..., str]) -> None:
        plain = getattr(target, method)

        def recording(*arguments: Any) -> None:
            found.append((name(*arguments), partial(plain, *arguments)))
            plain(*arguments)

        setattr(target, method, recording)

    record(kernels, "launch", lambda _, name, *__: name)
    if convolutions:
        record(convolutions, "_run", lambda operation, *_: f"cuDNN {operation}")
    try:
        trainer.compute(*kind)
    finally:
        del kernels.launch
        if convolutions:
            del convolutions._run
    return found


def microseconds(cuda: Any, work: Callable[[], None], copies: int) -> float:
    """Device time of `work`, from a graph of `copies` of it."""
    stream = cuda.get_current_stream()
    work()  # whatever is made at a first call
    graph, times = capture(cuda, work, copies), []
    for _ in range(ROUNDS + 1):  # the first warms up
        start, stop = cuda.Event(), cuda.Event()
        start.record(stream)
        graph.launch(stream)
        stop.record(stream)
        stop.synchronize()
        times.append(1e3 * cuda.get_elapsed_time(start, stop) / copies)
    return median(times[1:])


def kernels(
    batch_size: BatchSize = 8,
    width: Width = 1.0,
    model: NetworkName = "resnet9",
    data: Data = None,
    variant: Variant = "baseline",
    precision: Annotated[
        str, choice("--precision", "Its steps are graphs.", "float32", "tf32", "bf16")
    ] = "tf32",
    as_json: AsJson = False,
) -> None:
    """Time every kernel of a training step on one GPU alone, and the step as one graph.

    Kernels run one after another, with warm caches; in the step weight gradients run beside the rest, so the
    sum of the kernels may exceed it. Example: distrib bench kernels --batch-size 8
    """
    refuse_launcher("distrib bench kernels")
    options = {"batch_size": batch_size, "width": width, "variant": variant, "precision": precision}
    options |= {"model": model, "data": data}
    config = build({**options, "limit_test": 1, "backend": "cupy", "comm": "none"})
    world = connect("none", "cupy", precision)
    images = formats.load(data, None, 1)
    trainer = Trainer(config.resolve(1, images), world, images)
    warm_up(trainer, None)
    kind = (0, global_batches(trainer)[0], global_batches(trainer)[0])
    trainer.begin_epoch(0)
    rows_read = 2 * COPIES * (ROUNDS + 2)  # each copy of the last update moves on to the next
    trainer.rates = world.backend.xp.zeros((rows_read, 2), trainer.rates.dtype)
    found = launches(trainer, kind)
    if not trainer.capturable():
        raise UserError(
            f"--model {model}, --precision {precision}: its steps cannot be graphs: use tf32, bf16 or"
            " float32, with cuDNN, and convolutions that it has"
        )
    rows: list[dict[str, Any]] = []
    for name, call in found:
        trainer.step_in_epoch.fill(0)
        rows.append({"name": name, "microseconds": microseconds(world.backend.cuda, call, COPIES)})
    trainer.step_in_epoch.fill(0)
    whole = microseconds(world.backend.cuda, partial(trainer.compute, *kind), 1)
    total = sum(row["microseconds"] for row in rows)
    result = {
        "machine": machine(),
        "device": world.backend.describe(),
        **options,
        "kernels": rows,
        "launches": len(rows),
        "sum_microseconds": total,
        "step_microseconds": whole,
        "outside_percent": max(0.0, 100 * (1 - total / whole)),
    }
    print(json.dumps(result, indent=2)) if as_json else print_report(result)


def print_report(r: dict[str, Any]) -> None:
    """Print the table for people."""
    title = f"{r['device'].get('gpu')}: {r['model']}, batch {r['batch_size']}, {r['precision']}"
    title += f", width {r['width']}"
    table = Table("kernel", "µs", "%", title=title)
    total = r["sum_microseconds"]
    for row in r["kernels"]:
        table.add_row(row["name"], f"{row['microseconds']:.2f}", f"{100 * row['microseconds'] / total:.1f}")
    Console().print(table)
    print(
        f"{r['launches']} launches, {total:.1f} µs one after another; the step as a graph"
        f" {r['step_microseconds']:.1f} µs: {r['outside_percent']:.0f} % outside kernels"
    )
