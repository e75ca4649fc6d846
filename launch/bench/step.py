"""`distrib bench step`: whole training steps on real data, alone or under mpirun."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import typer
from threadpoolctl import threadpool_limits

from distrib.comm.world import World, connect
from distrib.config import CHOICES, Config, build
from distrib.data import formats, sampler
from distrib.data.dataset import Dataset
from distrib.errors import UserError
from distrib.evaluate import infer
from distrib.graph import READ_EVERY
from distrib.timing import PHASES
from distrib.trainer import Trainer
from distrib.warmup import warm_up
from launch.bench.fitness import MOST_SETS, Verdict, judge, watched
from launch.bench.measure import (
    BackendName,
    BatchSize,
    Comm,
    Data,
    NetworkName,
    Precision,
    Repeats,
    Variant,
    Width,
    matrix_peak,
    peak_bytes,
    pool_bytes,
)
from launch.bench.step_text import print_report, with_ratios
from launch.entry import AsJson, choice, number
from launch.machine import machine, require_torch
from launch.torch_peer.worker import Worker, kinds, require_layers, require_plain

AGAINST = (
    "torch: PyTorch, both memory layouts, as many threads as ours, or on the GPU eagerly and"
    " compiled with CUDA graphs; loop: this network with its convolutions as plain loops (slow)."
)

Rows = dict[str, list[dict[str, Any]]]
"""The measurements of each side, by its name."""


def step(
    batch_size: BatchSize = 64,
    width: Width = 1.0,
    model: NetworkName = "resnet9",
    variant: Variant = "baseline",
    optimizer: Annotated[str, choice("--optimizer", "Optimizer.", *CHOICES["optimizer"])] = "adam",
    data: Data = None,
    precision: Precision = "float32",
    backend: BackendName = "auto",
    comm: Comm = "auto",
    graph: Annotated[
        bool, typer.Option("--cuda-graph/--no-cuda-graph", help="On a GPU, whole steps as CUDA graphs.")
    ] = True,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Forward passes of evaluation instead of training.")
    ] = False,
    steps: Annotated[
        int | None, number("--steps", "Steps of one measurement; without it, about a second's.")
    ] = None,
    repeats: Repeats = 7,
    against: Annotated[str | None, choice("--against", AGAINST, "torch", "loop")] = None,
    as_json: AsJson = False,
) -> None:
    """Whole training steps: images/s, where a step's time goes, peak memory; alone or under mpirun.

    Figures are unfit to quote where other processes took more than 5 % of the cores, or where pairs scatter
    by more than 30 % of their median. Such a set is measured again, up to three times in all.

    Example: mpirun -n 2 distrib bench step --against torch
    """
    if evaluate and against == "loop":
        raise UserError("--evaluate --against loop: the loop only trains: leave out --evaluate")
    given = {"batch_size": batch_size, "width": width, "variant": variant, "optimizer": optimizer}
    given |= {"model": model, "data": data, "limit_test": 1, "precision": precision}
    given |= {"backend": backend, "comm": comm, "cuda_graph": graph}
    config = build(given)
    if against == "torch":
        require_plain(config)
    world = connect(comm, backend, precision, timeout=600)
    with world.fail_together():
        images = formats.load(data, None, 1)
        config = config.resolve(world.size, images)
    bench = Bench(config, world, images, steps, evaluate)
    if against == "loop":
        bench.add_plain_loop()
    if against == "torch":
        bench.add_torch()
    result = bench.figures(repeats)
    if world.rank == 0:
        result = with_ratios(result)
        print(json.dumps(result, indent=2)) if as_json else print_report(result)
    bench.close()


class Bench:
    """Our trainer, warmed up, and the sides that it is compared with: measurements of `steps` steps each."""

    def __init__(
        self, config: Config, world: World, data: Dataset, steps: int | None, evaluate: bool
    ) -> None:
        self.config, self.world, self.data, self.evaluate = config, world, data, evaluate
        self.trainer = Trainer(config, world, data)
        warm_up(self.trainer, None)
        one = ours(self.trainer, 1, evaluate)
        one()
        about_a_second = max(1, round(1.0 / one()["seconds"]))
        self.steps = steps or world.broadcast(about_a_second, "the number of steps")
        self.measure = ours(self.trainer, self.steps, evaluate)
        self.held = buffer_bytes(self.trainer)
        self.threads = world.size * self.trainer.threads
        self.plain_loop: Callable[[], dict[str, Any]] | None = None
        self.workers: dict[str, Worker | None] = {}  # on rank 0 alone

    def add_plain_loop(self) -> None:
        """Compare with one step with every convolution as a plain loop, scaled to `steps`."""
        trainer = Trainer(self.config, self.world, self.data)
        for conv in trainer.model.convs():
            conv.algorithm = "loop"
        one = ours(trainer, 1, evaluate=False)
        self.plain_loop = lambda: {"seconds": one()["seconds"] * self.steps}

    def add_torch(self) -> None:
        """Compare with PyTorch in each memory layout, started by rank 0."""
        require_torch("--against torch")
        require_layers(self.trainer.model.layers, self.config.model)
        config = replace(self.config, backend=self.world.backend.name)
        for kind in kinds(not self.world.backend.on_host):
            worker = None
            if self.world.rank == 0:
                worker = Worker(config, kind, self.threads, self.steps, self.evaluate)
            self.workers[f"torch {kind}"] = worker

    def turn(self) -> dict[str, dict[str, Any]]:
        """One measurement of each side; of PyTorch on rank 0 alone."""
        sides: dict[str, Callable[[], Any]] = {"distrib": self.measure}
        if self.plain_loop:
            sides["plain loop"] = self.plain_loop
        for name, worker in self.workers.items():
            sides[name] = partial(wait_quietly, self.world, worker)
        return {name: watched(self.world, side) for name, side in sides.items()}

    def matrix_peak(self) -> float | None:
        """GFLOP/s of matrix products on all ranks together; CuPy has none in bf16."""
        if self.config.precision == "bf16":
            return None
        with threadpool_limits(self.trainer.threads, "blas"):  # as many as there are threads of one
            mine = matrix_peak(self.world.backend)
        return sum(self.world.allgather(mine, "the peak"))

    def fittest(self, repeats: int) -> tuple[Rows, list[float], list[Verdict]]:
        """(the measurements of each side, the matrix peaks between them, the verdict on them and on others).

        Sets are measured until one is fit, or the least spoiled of several must do.
        """
        self.turn()  # only warms up
        self.matrix_peak()
        sets: list[tuple[Rows, list[float], Verdict]] = []
        while not sets or (sets[-1][2].unfit and len(sets) < MOST_SETS):
            rows, peaks = self.rows(repeats)
            known = {name: each for name, each in rows.items() if all(each)}  # on rank 0 all
            sets.append((rows, peaks, self.world.broadcast(judge(known), "the verdict")))
        sets.sort(key=lambda each: (bool(each[2].unfit), each[2].most + each[2].spread))
        return *sets[0][:2], [verdict for _, _, verdict in sets]

    def rows(self, repeats: int) -> tuple[Rows, list[float]]:
        """(the measurements of each side, the matrix peaks between them)."""
        rows: Rows = {}
        peaks = []
        for _ in range(repeats):
            for name, row in self.turn().items():
                rows.setdefault(name, []).append(row)
            peaks.append(self.matrix_peak())
        return rows, [peak for peak in peaks if peak is not None]

    def phases(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Milliseconds of a step by phase: the mean over ranks, the median over `rows`.

        Empty on a device, which works behind the host's clock.
        """
        everyone = self.world.allgather([row["phases"] for row in rows], "the phases")
        if self.evaluate or not self.world.backend.on_host:
            return {}
        return {
            name: 1e3
            / self.steps
            * statistics.median(statistics.mean(rank[i][name] for rank in everyone) for i in range(len(rows)))
            for name in PHASES
        }

    def figures(self, repeats: int) -> dict[str, Any]:
        """All that is measured; PyTorch's part on rank 0 alone."""
        world, trainer, on_host = self.world, self.trainer, self.world.backend.on_host
        memory = None if on_host else world.allgather(pool_bytes(world.backend), "peak memory")
        rows, peaks, verdicts = self.fittest(repeats)
        grown = buffer_bytes(trainer) - self.held
        alone = reduce_alone(trainer) if world.size > 1 and not self.evaluate else None
        memory = memory or world.allgather(peak_bytes(), "peak memory")
        images = self.steps * self.config.batch_size
        found = {name: [row for row in each if row] for name, each in rows.items()}
        theirs = {
            name: [each[-1]["peak_bytes"]]
            for name, each in found.items()
            if each and "peak_bytes" in each[-1]
        }
        return {
            "machine": machine(),
            "backend": world.backend.name,
            "ranks": world.size,
            "hosts": len(set(world.hosts)),
            "threads": self.threads,
            "precision": self.config.precision,
            "device": world.backend.describe(),
            "graph": bool(trainer.graphs and trainer.graphs.replays),
            "batch_size": self.config.batch_size,
            "width": self.config.width,
            "variant": self.config.network,
            "evaluate": self.evaluate,
            "steps": self.steps,
            "fit": not verdicts[0].unfit,
            "unfit": verdicts[0].unfit,
            "others": verdicts[0].others,
            "sets": [{"others": each.most, "spread": each.spread} for each in verdicts],
            "images_per_second": {
                name: [images / row["seconds"] for row in each] for name, each in found.items()
            },
            "phases_ms": self.phases(rows["distrib"]),
            "matrix_peak_gflops": peaks,
            "peak_bytes": {"distrib": memory, **theirs},
            "workspace_grown_bytes": grown,
            "flops_per_image": trainer.model.flops(training=not self.evaluate),
            "gradient_buckets": len(trainer.reducer.buckets),
            "all_reduce_alone_ms": None if alone is None else 1e3 * alone,
        }

    def close(self) -> None:
        """End PyTorch's processes and the trainer."""
        for worker in self.workers.values():
            if worker:
                worker.close()
        self.trainer.close()
        self.trainer.world.transport.close()


def ours(trainer: Trainer, steps: int, evaluate: bool) -> Callable[[], dict[str, Any]]:
    """A function that trains (or evaluates) `steps` batches and says how long that took, by phase."""
    batch, world, on_host = trainer.config.batch_size, trainer.world, trainer.world.backend.on_host
    whole = len(trainer.images) // batch  # steps with a whole batch

    def train() -> None:
        left = steps
        while left:
            done = trainer.progress.step % trainer.steps_per_epoch
            if done == whole:  # not the smaller last one
                trainer.results.read()
                trainer.progress.step += trainer.steps_per_epoch - whole
                done = 0
            times = 1 if on_host else min(left, whole - done, READ_EVERY - len(trainer.results.unread))
            trainer.step(times)
            left -= times
            if on_host or len(trainer.results.unread) == READ_EVERY:
                trainer.results.read(wait=on_host)
        trainer.results.read()

    def infer_only() -> None:
        own = sampler.shard(batch, world.rank, world.size)
        networks, run = trainer.evaluators()
        logits = [trainer.local_loss] * len(networks)

        def share(number: int, first: int) -> None:
            part = sampler.shard(own.stop - own.start, number, len(networks))
            given = trainer.images, trainer.labels, first + part.start, first + part.stop
            logits[number] = infer(networks[number], *given)[0]

        for step in range(steps):
            first = step % whole * batch + own.start
            run([partial(share, number, first) for number in range(len(networks))])
        for each in logits:
            world.backend.to_host(each)  # the device is waited for once

    def measure() -> dict[str, Any]:
        before = trainer.timer.seconds.copy()
        world.transport.barrier()
        begin = time.perf_counter()
        infer_only() if evaluate else train()
        world.transport.barrier()
        seconds = time.perf_counter() - begin
        return {
            "seconds": seconds,
            "phases": {name: trainer.timer.seconds[name] - before[name] for name in PHASES},
        }

    return measure


def buffer_bytes(trainer: Trainer) -> int:
    """Bytes of the buffers of all networks."""
    networks = [trainer.model, *(trainer.shards.networks if trainer.shards else [])]
    return sum(network.buffers.nbytes() for network in networks)


def reduce_alone(trainer: Trainer) -> float:
    """Seconds of one all-reduce of all gradient buckets with nothing beside it."""
    seconds = []
    for _ in range(7):
        trainer.world.transport.barrier()
        begin = time.perf_counter()
        for parameter in reversed(list(trainer.params)):
            trainer.reducer.ready(parameter)
        trainer.reducer.wait()
        trainer.world.transport.barrier()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def wait_quietly(world: World, measure: Callable[[], Any] | None) -> Any:
    """Rank 0 measures in PyTorch; the other ranks sleep, so that it has all cores."""
    with world.watchdog.waiting("PyTorch's measurement"):
        done = measure() if measure else None
        if world.size > 1:
            request = world.control_comm.Ibarrier()
            while not request.Test():
                time.sleep(0.02)
    return done
