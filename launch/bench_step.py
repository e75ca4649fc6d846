"""`distrib bench step`: whole training steps on real data, alone or under mpirun."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import typer

from distrib.comm.world import World, connect
from distrib.config import Config, build
from distrib.data import formats, sampler
from distrib.data.dataset import Dataset
from distrib.errors import UserError
from distrib.evaluate import infer
from distrib.results import HISTORY
from distrib.timing import PHASES
from distrib.trainer import Trainer, blas_threads
from distrib.warmup import warm_up
from launch.measure import (
    AsJson,
    BatchSize,
    Repeats,
    Width,
    machine,
    matrix_peak,
    peak_bytes,
    pool_bytes,
    require_torch,
    spread,
)
from launch.torch_bench import Worker, kinds


def ours(trainer: Trainer, steps: int, evaluate: bool) -> Callable[[], dict[str, Any]]:
    """A function that trains (or evaluates) `steps` batches and says how long that took, by phase."""
    batch, world = trainer.config.batch_size, trainer.world
    whole = len(trainer.images) // batch  # steps with a whole batch

    def train() -> None:
        for _ in range(steps):
            if trainer.at.step % trainer.steps_per_epoch == whole:  # not the smaller last one
                trainer.results.read()
                trainer.at.step += trainer.steps_per_epoch - whole
            trainer.step()
            if world.backend.on_host or len(trainer.results.unread) == HISTORY:
                trainer.results.read(wait=world.backend.on_host)
        trainer.results.read()

    def infer_only() -> None:
        for step in range(steps):
            part = sampler.share(batch, world.rank, world.size)
            first = step % whole * batch
            logits = infer(
                trainer.model, trainer.images, trainer.labels, first + part.start, first + part.stop
            )[0]
        world.backend.to_host(logits)  # the device is waited for once

    def measure() -> dict[str, Any]:
        before = trainer.laps.seconds.copy()
        world.comm.barrier()
        begin = time.perf_counter()
        infer_only() if evaluate else train()
        world.comm.barrier()
        seconds = time.perf_counter() - begin
        return {
            "seconds": seconds,
            "phases": {name: trainer.laps.seconds[name] - before[name] for name in PHASES},
        }

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
        trainer.world.comm.barrier()
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
    variant: Annotated[
        str, typer.Option(help="baseline, avgpool, conv-shortcut or three-blocks.")
    ] = "baseline",
    optimizer: Annotated[str, typer.Option(help="adam or sgd.")] = "adam",
    precision: Annotated[str, typer.Option(help="float32, float64, and on a GPU tf32 or bf16.")] = "float32",
    backend: Annotated[str, typer.Option(help="numpy, cupy, or auto.")] = "auto",
    comm: Annotated[str, typer.Option(help="none, mpi, nccl, or auto.")] = "auto",
    graph: Annotated[
        bool, typer.Option("--cuda-graph/--no-cuda-graph", help="On a GPU, whole steps as CUDA graphs.")
    ] = True,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Forward passes of evaluation instead of training.")
    ] = False,
    steps: Annotated[
        int | None, typer.Option(help="Steps of one measurement; without it, about a second's.")
    ] = None,
    repeats: Repeats = 7,
    against: Annotated[
        str | None,
        typer.Option(
            help="torch: PyTorch, both memory layouts, as many threads as ranks × BLAS threads, or on the GPU"
            " eagerly and compiled with CUDA graphs;"
            " loop: this network with its convolutions as plain loops (slow)."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Whole training steps: images/s, where a step's time goes, peak memory; alone or under mpirun.

    Example: mpirun -n 2 distrib bench step --against torch
    """
    if against not in (None, "torch", "loop"):
        raise UserError(f"--against {against}: choose torch or loop, or leave it out")
    if evaluate and against == "loop":
        raise UserError(
            "--evaluate --against loop: the loop is compared in training only: leave out --evaluate"
        )
    if min(batch_size, repeats, 1 if steps is None else steps) < 1:
        raise UserError("--batch-size, --steps and --repeats: give 1 or more")
    if batch_size > 60000:
        raise UserError(f"--batch-size {batch_size}: the data has only 60000 images")
    if against == "torch" and precision == "float64":
        raise UserError("--against torch: not in float64")
    config = build(
        {
            "batch_size": batch_size,
            "width": width,
            "variant": variant,
            "optimizer": optimizer,
            "limit_test": 1,
            "precision": precision,
            "backend": backend,
            "comm": comm,
            "cuda_graph": graph,
        }
    )
    world = connect(comm, backend, precision, timeout=600)
    with world.agree():
        data = formats.load(None, None, 1)
        config = config.resolve(world.size, data)
    trainer = Trainer(config, world, data)
    warm_up(trainer, None)
    one = ours(trainer, 1, evaluate)
    one()
    steps = steps or world.broadcast(max(1, round(1.0 / one()["seconds"])), "the number of steps")
    measure = ours(trainer, steps, evaluate)
    held = trainer.model.buffers.nbytes()
    threads = world.size * blas_threads()
    slow = plain_loop(config, world, data, steps) if against == "loop" else None
    workers = torch_workers(config, world, threads, steps, evaluate) if against == "torch" else {}
    on_host, bf16 = world.backend.on_host, precision == "bf16"
    memory = None if on_host else world.allgather(pool_bytes(world.backend), "peak memory")
    rows: dict[str, list[dict[str, Any]]] = {}
    peaks: list[float] = []
    for repeat in range(repeats + 1):  # the first warms up
        done = {"distrib": measure()}
        if slow:
            done["plain loop"] = slow()
        for name, worker in workers.items():
            done[name] = wait_quietly(world, worker)
        peak = (
            0.0 if bf16 else sum(world.allgather(matrix_peak(world.backend), "the peak"))
        )  # CuPy has no product in bf16
        if repeat:
            peaks += [peak] if peak else []
            for name, row in done.items():
                rows.setdefault(name, []).append(row)
    grown = trainer.model.buffers.nbytes() - held
    alone = reduce_alone(trainer) if world.size > 1 and not evaluate else None
    memory = memory or world.allgather(peak_bytes(), "peak memory")
    show_phases = on_host and not evaluate  # a device works behind the host's clock
    phases = world.allgather([row["phases"] for row in rows["distrib"]], "the phases")
    if world.rank == 0:
        images = steps * batch_size
        result: dict[str, Any] = {
            "machine": machine(),
            "backend": world.backend.name,
            "ranks": world.size,
            "threads": threads,
            "precision": precision,
            "device": world.backend.describe(),
            "graph": bool(trainer.graphs and trainer.graphs.replays),
            "batch_size": batch_size,
            "width": width,
            "variant": variant,
            "evaluate": evaluate,
            "steps": steps,
            "images_per_second": {
                name: [images / row["seconds"] for row in found if row] for name, found in rows.items()
            },
            "phases_ms": {}
            if not show_phases
            else {
                name: statistics.median(
                    1e3 * statistics.mean(rank[i][name] for rank in phases) / steps for i in range(repeats)
                )
                for name in PHASES
            },
            "matrix_peak_gflops": peaks,
            "peak_bytes": {"distrib": memory},
            "workspace_grown_bytes": grown,
            "flops_per_image": trainer.model.flops(training=not evaluate),
            "gradient_buckets": len(trainer.reducer.buckets),
            "all_reduce_alone_ms": None if alone is None else 1e3 * alone,
        }
        for name, found in rows.items():
            if "peak_bytes" in found[-1]:
                result["peak_bytes"][name] = [found[-1]["peak_bytes"]]
        result = with_ratios(result)
        print(json.dumps(result, indent=2)) if as_json else show(result)
    for worker in workers.values():
        if worker:
            worker.close()
    trainer.close()


def plain_loop(config: Config, world: World, data: Dataset, steps: int) -> Callable[[], dict[str, Any]]:
    """A measurement of one step with every convolution as a plain loop, scaled to `steps`."""
    trainer = Trainer(config, world, data)
    for conv in trainer.model.convs():
        conv.algorithm = "loop"
    one = ours(trainer, 1, evaluate=False)
    return lambda: {"seconds": one()["seconds"] * steps}


def torch_workers(
    config: Config, world: World, threads: int, steps: int, evaluate: bool
) -> dict[str, Worker | None]:
    """PyTorch in each memory layout, started by rank 0."""
    require_torch("--against torch")
    config = replace(config, backend=world.backend.name)
    return {
        f"torch {kind}": Worker(config, kind, threads, steps, evaluate) if world.rank == 0 else None
        for kind in kinds(not world.backend.on_host)
    }


def with_ratios(result: dict[str, Any]) -> dict[str, Any]:
    """Adds the ratios to the better of the others, pair by pair, and the share of the matrix peak."""
    rates = result["images_per_second"]
    mine = rates["distrib"]
    others = [name for name in rates if name != "distrib"]
    if others:
        best = max(others, key=lambda name: statistics.median(rates[name]))
        ratios = {name: [a / b for a, b in zip(mine, rates[name], strict=True)] for name in others}
        result |= {"against": best, "ratio": ratios[best], "ratios": ratios}
    result["gflops"] = [rate * result["flops_per_image"] / 1e9 for rate in mine]
    return result


def show(result: dict[str, Any]) -> None:
    """The report of `bench step`."""
    r = result
    kind = "evaluation" if r["evaluate"] else "training"
    device = ", ".join(f"{name} {value}" for name, value in r["device"].items())
    print(
        f"{r['machine']}{f'; {device}' if device else ''}\n{kind}, {r['ranks']} rank(s), "
        f"{'whole steps as CUDA graphs' if r['graph'] else str(r['threads']) + ' thread(s) in total'}, batch"
        f" {r['batch_size']}, width {r['width']}, {r['variant']}, {r['precision']}, {r['steps']} steps a measurement"
    )
    for name, rates in r["images_per_second"].items():
        memory = r["peak_bytes"].get(name)
        peak = (
            f"   peak memory {max(memory) / 2**20:.0f} MiB" + (" a rank" if len(memory) > 1 else "")
            if memory
            else ""
        )
        print(f"  {name:26} {spread(rates)} images/s{peak}")
    for name, ratio in r.get("ratios", {}).items():
        print(f"  ratio to {name}: {spread(ratio)}{'  (the best of them)' if name == r['against'] else ''}")
    print(f"  direct convolution's work done at {spread(r['gflops'])} GFLOP/s", end="")
    if r["matrix_peak_gflops"]:
        share = [100 * a / b for a, b in zip(r["gflops"], r["matrix_peak_gflops"], strict=True)]
        print(f"; matrix product {spread(r['matrix_peak_gflops'])} GFLOP/s: {spread(share, 3)} %", end="")
    print()
    print(f"  workspace after warm-up grew by {r['workspace_grown_bytes']} bytes")
    if r["phases_ms"]:
        print("  ms a step: " + ", ".join(f"{name} {ms:.3g}" for name, ms in r["phases_ms"].items()))
    if r["all_reduce_alone_ms"] is not None and r["phases_ms"]:
        waited, alone = r["phases_ms"]["gradients"], r["all_reduce_alone_ms"]
        print(
            f"  gradients: {r['gradient_buckets']} bucket(s) take {alone:.3g} ms alone; {waited:.3g} ms of waiting (for the"
            f" slower rank too) remain after the backward: {max(0.0, 100 * (1 - waited / alone)):.0f} % hidden"
        )
