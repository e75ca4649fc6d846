"""All-reduces, checked and timed: what `distrib bench allreduce` measures with."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from distrib.comm.base import SingleCommunicator
from distrib.comm.world import World
from launch.bench.sums import Values
from nn.array import Array

GRAPH_CALLS = 8
"""All-reduces in a captured graph."""
MOST_CALLS = 100_000


class NoMemory(Exception):
    """A rank has no memory for a size; raised on all ranks alike."""


class WrongSum(Exception):
    """An all-reduce left a wrong element on some rank; raised on all ranks alike."""

    def __init__(self, wrong: int, found: dict[str, Any]) -> None:
        super().__init__(
            "wrong sum of {bytes} bytes ({way}): rank {rank} has {value:g} at index {index},"
            " not {expected:g}; {wrong} wrong element(s) on all ranks".format(wrong=wrong, **found)
        )
        self.wrong, self.found = wrong, found


def bandwidths(nbytes: int, seconds: float, ranks: int) -> tuple[float, float]:
    """(algorithm, bus) bandwidth in GB/s, as nccl-tests defines them."""
    algorithm = nbytes / seconds / 1e9
    return algorithm, algorithm * 2 * (ranks - 1) / ranks


class Meter:
    """All-reduces of all ranks together, checked and timed; the slowest rank's time counts.

    On a device the calls are queued on a stream of their own, and events tell the time.
    """

    def __init__(self, world: World, dtype: str, repeats: int, seconds: float) -> None:
        self.world, self.dtype, self.repeats, self.goal = world, dtype, repeats, seconds / repeats
        self.cuda = None if world.backend.on_host else world.backend.xp.cuda
        self.stream: Any = contextlib.nullcontext()
        if self.cuda:
            self.stream = self.cuda.Stream(non_blocking=True)
            self.begin, self.end = self.cuda.Event(), self.cuda.Event()
        self.no_graph = why_no_graph(world)
        with self.stream:
            self.values = Values(world, dtype)

    def meet(self) -> None:
        """Return when every rank's device is idle and every rank has called."""
        if self.cuda:
            with self.world.watchdog.waiting("all_reduce"):
                self.stream.synchronize()
        with self.world.watchdog.waiting("barrier"):
            self.world.transport.barrier()

    def seconds(self, run: Callable[[], Any], count: int) -> float:
        """The slowest rank's seconds for `count` runs in a row."""
        self.meet()
        begin = time.perf_counter()
        with self.world.watchdog.waiting("all_reduce"):
            if self.cuda:
                self.begin.record(self.stream)
            for _ in range(count):
                run()
            if self.cuda:
                self.end.record(self.stream)
        took = time.perf_counter() - begin
        if self.cuda:
            with self.world.watchdog.waiting("all_reduce"):
                self.end.synchronize()
            took = self.cuda.get_elapsed_time(self.begin, self.end) / 1e3
        return max(1e-9, *self.world.allgather(took, "the times"))

    def count(self, run: Callable[[], Any]) -> int:
        """How many runs take about `goal` seconds: rank 0 decides.

        The first run after a pause is slow: it does not count.
        """
        count, enough = 1, False
        self.seconds(run, 1)
        while not enough:
            took = self.seconds(run, count)
            longer = min(MOST_CALLS, max(1, round(count * min(10.0, self.goal / took))))
            decision = (longer, took >= self.goal / 2 or longer == MOST_CALLS)
            count, enough = self.world.broadcast(decision, "the number of calls")
        return count

    def figures(self, x: Array, run: Callable[[], Any], calls: int) -> dict[str, Any]:
        """Seconds of one all-reduce of zeros, which stay zeros, and bandwidths; a run makes `calls`."""
        x.fill(0)
        count = self.count(run)
        seconds = [self.seconds(run, count) / (count * calls) for _ in range(self.repeats)]
        algorithm, bus = bandwidths(x.nbytes, statistics.median(seconds), self.world.size)
        return {"iterations": count * calls, "seconds": seconds, "algbw_gb_s": algorithm, "busbw_gb_s": bus}

    def check(self, x: Array, run: Callable[[], Any], calls: int, way: str) -> None:
        """Run once on known values and compare every element on every rank; WrongSum if one is wrong."""
        self.values.fill(x)
        self.seconds(run, 1)
        wrong, first = self.values.compare(x, calls)
        everyone = self.world.allgather((wrong, first), "the comparison of sums")
        for rank, (_, found) in enumerate(everyone):
            if found:
                raise WrongSum(
                    sum(count for count, _ in everyone),
                    {"bytes": x.nbytes, "way": way, "rank": rank, **found},
                )

    def capture(self, x: Array) -> Any:
        """A graph of several all-reduces, or None, then with `no_graph` set, on all ranks alike."""
        graph = why = None
        try:
            self.stream.begin_capture()
            try:
                for _ in range(GRAPH_CALLS):
                    self.world.transport.all_reduce(x)
            finally:
                graph = self.stream.end_capture()
        except RuntimeError as error:
            why = f"{type(error).__name__}: {error}"
        self.no_graph = first_reason(self.world.allgather(why, "the capture of a graph"))
        return None if self.no_graph else graph

    def measure(self, nbytes: int) -> dict[str, Any]:
        """One line of the table; WrongSum, NoMemory."""
        with self.stream:
            x = vector(self.world, nbytes, self.dtype)

            def call() -> None:
                self.world.transport.all_reduce(x).wait()

            self.check(x, call, 1, "eager")
            row = {"bytes": nbytes, "elements": x.size, **self.figures(x, call, 1), "graph": None, "wrong": 0}
            graph = None if self.no_graph else self.capture(x)
            if graph:

                def launch() -> None:
                    graph.launch(self.stream)

                self.check(x, launch, GRAPH_CALLS, f"a graph of {GRAPH_CALLS}")
                row["graph"] = self.figures(x, launch, GRAPH_CALLS)
            self.meet()
        return row


def why_no_graph(world: World) -> str | None:
    """Why this communicator cannot be captured in a CUDA graph; None if it can."""
    if world.backend.on_host:
        return "host arrays"
    if isinstance(world.transport, SingleCommunicator):
        return "one process without a communicator queues nothing"
    return None if world.transport.graph_safe else "MPI copies through the host, which no graph holds"


def first_reason(everyone: list[str | None]) -> str | None:
    """The first rank's reason that is one, with its rank."""
    return next((f"rank {rank}: {why}" for rank, why in enumerate(everyone) if why), None)


def available() -> float:
    """Bytes of memory that this host can still give; infinite where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


def vector(world: World, nbytes: int, dtype: str) -> Array:
    """Zeros on every rank; NoMemory where one cannot have them and the copies that a call makes.

    A host gives out memory that it does not have and then kills, so it is asked first.
    """
    staged = world.transport.staged
    copies = 3 if staged else 2 if world.backend.on_host else 0  # on the host, MPI's own included
    need = copies * nbytes * world.hosts.count(world.hosts[world.rank])
    have = min(world.allgather(available(), "the memory at hand"))  # all asked before any takes
    x = why = None
    try:
        if need > have:
            raise MemoryError(
                f"the ranks of this host need {need / 1e9:.4g} GB, and {have / 1e9:.4g} GB are available"
            )
        x = world.backend.xp.empty(nbytes // np.dtype(dtype).itemsize, dtype)
        x.fill(0)
        if staged:
            x[...] = world.backend.asarray(np.array(world.backend.to_host(x)))
    except MemoryError as error:
        why = str(error) or "out of memory"
    if missing := first_reason(world.allgather(why, "the allocation")):
        raise NoMemory(f"out of memory at {nbytes} bytes, where the list ends: {missing}")
    return x
