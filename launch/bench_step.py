"""`distrib bench step`: whole training steps on real data, alone or under mpirun."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from distrib import mnist, sampler
from distrib.config import Config, build
from distrib.errors import UserError
from distrib.evaluate import load_batch
from distrib.trainer import PHASES, Trainer, blas_threads
from distrib.world import World, connect
from launch.measure import (
    AsJson,
    BatchSize,
    Repeats,
    Width,
    machine,
    matrix_peak,
    peak_bytes,
    require_torch,
    spread,
)
from launch.torch_bench import LAYOUTS, Worker
from nn.layers import Pass


def ours(trainer: Trainer, steps: int, order: Any, evaluate: bool) -> Callable[[], dict[str, Any]]:
    """A function that trains (or evaluates) `steps` batches and says how long that took, by phase."""
    batch, world = trainer.config.batch_size, trainer.world
    whole = len(order) // batch  # steps with a whole batch

    def measure() -> dict[str, Any]:
        before = trainer.laps.seconds.copy()
        world.comm.barrier()
        begin = time.perf_counter()
        for step in range(steps):
            own, count = sampler.batch_indices(order, step % whole, batch, world.rank, world.size)
            indices = world.backend.asarray(own)
            if evaluate:
                x = load_batch(trainer.model, trainer.images, indices)
                world.backend.to_host(trainer.loss(trainer.model.forward(x, Pass(train=False)), trainer.labels[indices], 1)[0])
            else:
                trainer.step(indices, count)
                trainer.read_results()
        world.comm.barrier()
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "phases": {name: trainer.laps.seconds[name] - before[name] for name in PHASES}}

    return measure


def reduce_alone(trainer: Trainer) -> float:
    """Seconds of one all-reduce of all gradient buckets with nothing beside it."""
    seconds = []
    for _ in range(7):
        trainer.world.comm.barrier()
        begin = time.perf_counter()
        for parameter in reversed(list(trainer.params)):
            trainer.reducer.ready(parameter)
        trainer.reducer.wait()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def wait_quietly(world: World, measure: Callable[[], Any] | None) -> Any:
    """Rank 0 measures in PyTorch; the others, which have nothing to measure, sleep, so that it has all cores."""
    with world.watchdog.waiting("PyTorch's measurement"):
        done = measure() if measure else None
        if world.size > 1:
            request = world.control.Ibarrier()
            while not request.Test():
                time.sleep(0.02)
    return done


def step(
    batch_size: BatchSize = 64,
    width: Width = 1.0,
    variant: Annotated[str, typer.Option(help="baseline, avgpool, conv-shortcut or three-blocks.")] = "baseline",
    optimizer: Annotated[str, typer.Option(help="adam or sgd.")] = "adam",
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Forward passes of evaluation instead of training.")] = False,
    steps: Annotated[int | None, typer.Option(help="Steps of one measurement; without it, about a second's.")] = None,
    repeats: Repeats = 7,
    against: Annotated[
        str | None,
        typer.Option(help="torch: PyTorch, both memory layouts, as many threads as ranks × BLAS threads;"
                          " loop: this network with its convolutions as plain loops (slow)."),
    ] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Whole training steps: images/s, where a step's time goes, peak memory; alone or under mpirun.

    Example: mpirun -n 2 distrib bench step --against torch
    """
    if against not in (None, "torch", "loop"):
        raise UserError(f"--against {against}: choose torch or loop, or leave it out")
    if evaluate and against == "loop":
        raise UserError("--evaluate --against loop: the loop is compared in training only: leave out --evaluate")
    if min(batch_size, repeats, 1 if steps is None else steps) < 1:
        raise UserError("--batch-size, --steps and --repeats: give 1 or more")
    if batch_size > 60000:
        raise UserError(f"--batch-size {batch_size}: the data has only 60000 images")
    world = connect(timeout=600)
    config = build({"batch_size": batch_size, "width": width, "variant": variant, "optimizer": optimizer, "limit_test": 1})
    with world.agree():
        config = config.resolve(world.size, 60000, 1)
        data = mnist.load(None, None, 1)
    trainer = Trainer(config, world, data)
    order = sampler.permutation(0, 0, len(data.train_images))
    one = ours(trainer, 1, order, evaluate)
    one()
    steps = steps or world.broadcast(max(1, round(1.0 / one()["seconds"])), "the number of steps")
    measure = ours(trainer, steps, order, evaluate)
    held = trainer.model.ws.nbytes()
    threads = world.size * blas_threads()
    slow = plain_loop(config, world, data, steps, order) if against == "loop" else None
    workers = torch_workers(config, world, threads, steps, evaluate) if against == "torch" else {}
    rows: dict[str, list[dict[str, Any]]] = {}
    peaks: list[float] = []
    for repeat in range(repeats + 1):  # the first warms up
        done = {"distrib": measure()}
        if slow:
            done["plain loop"] = slow()
        for name, worker in workers.items():
            done[name] = wait_quietly(world, worker)
        peak = sum(world.allgather(matrix_peak(), "the peak"))
        if repeat:
            peaks.append(peak)
            for name, row in done.items():
                rows.setdefault(name, []).append(row)
    grown = trainer.model.ws.nbytes() - held
    alone = reduce_alone(trainer) if world.size > 1 and not evaluate else None
    memory = world.allgather(peak_bytes(), "peak memory")
    phases = world.allgather([row["phases"] for row in rows["distrib"]], "the phases")
    if world.rank == 0:
        images = steps * batch_size
        result: dict[str, Any] = {
            "machine": machine(), "backend": world.backend.name, "ranks": world.size, "threads": threads,
            "batch_size": batch_size, "width": width, "variant": variant, "evaluate": evaluate, "steps": steps,
            "images_per_second": {name: [images / row["seconds"] for row in found if row] for name, found in rows.items()},
            "phases_ms": {} if evaluate else {
                name: statistics.median(1e3 * statistics.mean(rank[i][name] for rank in phases) / steps for i in range(repeats))
                for name in PHASES
            },
            "matrix_peak_gflops": peaks, "peak_bytes": {"distrib": memory}, "workspace_grown_bytes": grown,
            "flops_per_image": trainer.model.flops(train=not evaluate),
            "gradient_buckets": len(trainer.reducer.buckets), "all_reduce_alone_ms": None if alone is None else 1e3 * alone,
        }  # fmt: skip
        for name, found in rows.items():
            if "peak_bytes" in found[-1]:
                result["peak_bytes"][name] = [found[-1]["peak_bytes"]]
        result = with_ratios(result)
        print(json.dumps(result, indent=2)) if as_json else show(result)
    for worker in workers.values():
        if worker:
            worker.close()
    world.comm.close()


def plain_loop(config: Config, world: World, data: mnist.Dataset, steps: int, order: Any) -> Callable[[], dict[str, Any]]:
    """A measurement of one step with every convolution as a plain loop, scaled to `steps`."""
    trainer = Trainer(config, world, data)
    for conv in trainer.model.convs():
        conv.form = "loop"
    one = ours(trainer, 1, order, evaluate=False)
    return lambda: {"seconds": one()["seconds"] * steps}


def torch_workers(config: Config, world: World, threads: int, steps: int, evaluate: bool) -> dict[str, Worker | None]:
    """PyTorch in each memory layout, started by rank 0."""
    require_torch("--against torch")
    return {f"torch {layout}": Worker(config, layout, threads, steps, evaluate) if world.rank == 0 else None
            for layout in LAYOUTS}  # fmt: skip


def with_ratios(result: dict[str, Any]) -> dict[str, Any]:
    """Adds the ratios to the better of the others, pair by pair, and the share of the matrix peak."""
    rates = result["images_per_second"]
    mine = rates["distrib"]
    others = [name for name in rates if name != "distrib"]
    if others:
        best = max(others, key=lambda name: statistics.median(rates[name]))
        result |= {"against": best, "ratio": [a / b for a, b in zip(mine, rates[best], strict=True)]}
    result["gflops"] = [rate * result["flops_per_image"] / 1e9 for rate in mine]
    return result


def show(result: dict[str, Any]) -> None:
    """The report of `bench step`."""
    r = result
    kind = "evaluation" if r["evaluate"] else "training"
    print(f"{r['machine']}\n{kind}, {r['ranks']} rank(s), {r['threads']} thread(s) in total, batch {r['batch_size']},"
          f" width {r['width']}, {r['variant']}, float32, {r['steps']} steps a measurement")  # fmt: skip
    for name, rates in r["images_per_second"].items():
        memory = r["peak_bytes"].get(name)
        peak = f"   peak memory {max(memory) / 2**20:.0f} MiB" + (" a rank" if len(memory) > 1 else "") if memory else ""
        print(f"  {name:20} {spread(rates)} images/s{peak}")
    if "ratio" in r:
        print(f"  ratio to {r['against']}: {spread(r['ratio'])}")
    share = [100 * a / b for a, b in zip(r["gflops"], r["matrix_peak_gflops"], strict=True)]
    print(f"  direct convolution's work done at {spread(r['gflops'])} GFLOP/s; matrix product"
          f" {spread(r['matrix_peak_gflops'])} GFLOP/s: {spread(share, 3)} %")  # fmt: skip
    print(f"  workspace after warm-up grew by {r['workspace_grown_bytes']} bytes")
    if r["phases_ms"]:
        print("  ms a step: " + ", ".join(f"{name} {ms:.3g}" for name, ms in r["phases_ms"].items()))
    if r["all_reduce_alone_ms"] is not None:
        waited, alone = r["phases_ms"]["gradients"], r["all_reduce_alone_ms"]
        print(f"  gradients: {r['gradient_buckets']} bucket(s) take {alone:.3g} ms alone; {waited:.3g} ms of waiting (for the"
              f" slower rank too) remain after the backward: {max(0.0, 100 * (1 - waited / alone)):.0f} % hidden")  # fmt: skip
