"""`distrib bench allreduce`: the all-reduce of the communicator alone, by size of the message.

Bandwidths are those of nccl-tests (its doc/PERFORMANCE.md): algorithm bandwidth is bytes / time; bus
bandwidth is algorithm bandwidth × 2(n − 1)/n, what each link of an ideal ring of n ranks carries, so it
compares with the hardware's whatever n is. GB are 1e9 bytes.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from distrib.comm.world import World, connect
from distrib.errors import EXIT_CRASH, UserError
from launch.measure import AsJson, Repeats, machine, spread
from nn.array import Array

CHOICES = {
    "comm": ("auto", "mpi", "nccl"),
    "backend": ("auto", "numpy", "cupy"),
    "dtype": ("float32", "float64"),
}
PERIOD = 251
"""Elements after which the values repeat: a prime, so that a shift by any power of two shows."""
PART = PERIOD << 12
"""Elements that are filled or compared at once: the memory this takes beside the vector."""
GRAPH_CALLS = 8
"""All-reduces in a captured graph."""
MOST_CALLS = 100_000


class NoMemory(Exception):
    """A rank has no memory for a size; raised on all ranks alike."""


class WrongSum(Exception):
    """An all-reduce left a wrong element on some rank; raised on all ranks alike."""

    def __init__(self, wrong: int, found: dict[str, Any]) -> None:
        super().__init__(
            "wrong sum of {bytes} bytes ({way}): rank {rank} has {value:g} at index {index}, not {expected:g};"
            " {wrong} wrong element(s) on all ranks".format(wrong=wrong, **found)
        )
        self.wrong, self.found = wrong, found


def message_sizes(least: int, most: int, factor: int, itemsize: int) -> list[int]:
    """Bytes: `least`, `least`·factor, … and at last `most`, each rounded down to whole elements, equal ones once."""
    found = []
    while least < most:
        found.append(least)
        least *= factor
    return list(dict.fromkeys(size // itemsize * itemsize for size in [*found, most]))


def bandwidths(nbytes: int, seconds: float, ranks: int) -> tuple[float, float]:
    """(algorithm, bus) bandwidth in GB/s, as nccl-tests defines them."""
    algorithm = nbytes / seconds / 1e9
    return algorithm, algorithm * 2 * (ranks - 1) / ranks


class Values:
    """What the ranks sum: element i of rank r is i mod 251 + r + 1, whole and never zero.

    The sum, n·(i mod 251) + n(n + 1)/2, is exact in float32 for up to 5000 ranks, in any order of adding.
    """

    def __init__(self, world: World, dtype: str) -> None:
        self.world = world
        steps = np.arange(PART) % PERIOD
        self.own = world.backend.asarray((steps + world.rank + 1).astype(dtype))
        self.sums = world.backend.asarray(
            (world.size * steps + world.size * (world.size + 1) // 2).astype(dtype)
        )

    def fill(self, x: Array) -> None:
        for begin in range(0, x.size, PART):
            part = x[begin : begin + PART]
            part[...] = self.own[: part.size]

    def compare(self, x: Array, calls: int) -> tuple[int, dict[str, float] | None]:
        """(wrong elements, the first of them) of `x`, filled and then all-reduced `calls` times.

        Each call after the first multiplies by n. One call must be exact; more may round.
        """
        n, to_host, xp = self.world.size, self.world.backend.to_host, self.world.backend.xp
        tolerance = calls * n * float(np.finfo(str(x.dtype)).eps) if calls > 1 else 0.0
        wrong, first = 0, None
        for begin in range(0, x.size, PART):
            part = x[begin : begin + PART]
            right = self.sums[: part.size] * float(n) ** (calls - 1)
            off = ~(xp.abs(part - right) <= right * tolerance)  # a NaN is off too
            count = int(to_host(off.sum()))
            if count and first is None:
                at = int(to_host(off.argmax()))
                value, expected = (float(to_host(y[at : at + 1])[0]) for y in (part, right))
                first = {"index": begin + at, "value": value, "expected": expected}
            wrong += count
        return wrong, first


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
            self.world.comm.barrier()

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
        """How many runs take about `goal` seconds: rank 0 decides. The first run after a pause is slow: it does not count."""
        count, enough = 1, False
        self.seconds(run, 1)
        while not enough:
            took = self.seconds(run, count)
            longer = min(MOST_CALLS, max(1, round(count * min(10.0, self.goal / took))))
            decision = (longer, took >= self.goal / 2 or longer == MOST_CALLS)
            count, enough = self.world.broadcast(decision, "the number of calls")
        return count

    def figures(self, x: Array, run: Callable[[], Any], calls: int) -> dict[str, Any]:
        """Seconds of one all-reduce of zeros, which stay zeros, and bandwidths; a run makes `calls` of them."""
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
                    self.world.comm.all_reduce(x)
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
                self.world.comm.all_reduce(x).wait()

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
    if world.comm.name == "none":
        return "one process without a communicator queues nothing"
    return None if world.comm.captures else "MPI copies through the host, which no graph holds"


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
    staged = world.comm.name == "mpi" and not world.backend.on_host
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


def device_of(world: World) -> str | None:
    """GPU, and NCCL's version where it is used."""
    if world.backend.on_host:
        return None
    cuda = world.backend.xp.cuda
    name = cuda.runtime.getDeviceProperties(cuda.runtime.getDevice())["name"]
    nccl = f", NCCL {cuda.nccl.get_version()}" if world.comm.name == "nccl" else ""
    return (name.decode() if isinstance(name, bytes) else str(name)) + nccl


def allreduce(
    min_bytes: Annotated[int, typer.Option(help="Smallest message.")] = 8,
    max_bytes: Annotated[int, typer.Option(help="Largest message; always measured.")] = 1 << 28,
    factor: Annotated[int, typer.Option(help="From one size to the next.")] = 8,
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    comm: Annotated[str, typer.Option(help="auto, mpi or nccl.")] = "auto",
    backend: Annotated[str, typer.Option(help="auto, numpy or cupy.")] = "auto",
    repeats: Repeats = 7,
    seconds: Annotated[
        float, typer.Option(help="Time to measure each size for; in a graph as long again.")
    ] = 1.0,
    timeout: Annotated[
        float, typer.Option(help="Seconds after which a wait for another rank ends the job.")
    ] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Time and bandwidth of an all-reduce at each size, every element checked; alone or under mpirun.

    Example: mpirun -n 2 distrib bench allreduce --max-bytes 16777216
    """
    for name, value in (("comm", comm), ("backend", backend), ("dtype", dtype)):
        if value not in CHOICES[name]:
            raise UserError(
                f"--{name} {value}: choose {', '.join(CHOICES[name][:-1])} or {CHOICES[name][-1]}"
            )
    itemsize = np.dtype(dtype).itemsize
    if not itemsize <= min_bytes <= max_bytes <= 1 << 60:
        raise UserError(
            f"--min-bytes {min_bytes} --max-bytes {max_bytes}: the first must hold a {dtype}, the second must not be less"
        )
    if factor < 2 or repeats < 1:
        raise UserError(
            f"--factor {factor} --repeats {repeats}: give a factor of 2 or more, and 1 repeat or more"
        )
    for flag, number in (("seconds", seconds), ("timeout", timeout)):
        if not 0 < number < math.inf:
            raise UserError(f"--{flag} {number:g}: give a finite number above 0")
    world = connect(comm, backend, dtype, timeout + seconds)
    result, error = report(
        world, message_sizes(min_bytes, max_bytes, factor, itemsize), dtype, repeats, seconds, as_json
    )
    if world.rank == 0 and as_json:
        print(json.dumps(result, indent=2), flush=True)
    world.comm.close()
    if error:
        if world.rank == 0:
            print(f"distrib: error: {error}", file=sys.stderr, flush=True)
        raise typer.Exit(EXIT_CRASH)


def report(
    world: World, sizes: list[int], dtype: str, repeats: int, seconds: float, as_json: bool
) -> tuple[dict[str, Any], WrongSum | None]:
    """Measure all sizes, a line of text each as it is done unless `as_json`; what was found, and what was wrong."""
    lines = world.rank == 0 and not as_json
    say: Callable[[str], None] = (lambda text: print(text, flush=True)) if lines else lambda _: None
    meter = Meter(world, dtype, repeats, seconds)
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "machine": machine(),
        "device": device_of(world),
        "ranks": world.size,
        "hosts": len(set(world.hosts)),
        "backend": world.backend.name,
        "communicator": world.comm.name,
        "reason": world.reason,
        "dtype": dtype,
        "repeats": repeats,
        "seconds_a_size": seconds,
        "sizes": rows,
        "no_graph": None,
        "out_of_memory": None,
        "wrong": None,
    }
    for line in head(result, meter.no_graph):
        say(line)
    error, graphs, known = None, not world.backend.on_host, meter.no_graph
    with Console(stderr=True, quiet=lines or world.rank > 0).status("") as status:
        for nbytes in sizes:
            status.update(f"{nbytes} bytes")
            try:
                rows.append(meter.measure(nbytes))
            except NoMemory as missing:
                result["out_of_memory"] = str(missing)
                say(str(missing))
                break
            except WrongSum as found:
                error, result["wrong"] = (
                    found.with_traceback(None),
                    found.found,
                )  # which would hold a graph, and NCCL at its end
                rows.append(
                    {
                        "bytes": nbytes,
                        "elements": nbytes // np.dtype(dtype).itemsize,
                        "iterations": 0,
                        "seconds": [],
                        "algbw_gb_s": None,
                        "busbw_gb_s": None,
                        "graph": None,
                        "wrong": found.wrong,
                    }
                )
            say(text_row(rows[-1], graphs))
            if error:
                break
    if meter.no_graph != known:
        say(f"no graph was measured after a failed capture: {meter.no_graph}")
    return result | {"no_graph": meter.no_graph}, error


def head(result: dict[str, Any], no_graph: str | None) -> list[str]:
    """The lines above the table."""
    r = result
    found = [
        r["machine"] + (f"; {r['device']}" if r["device"] else ""),
        f"all-reduce of {r['dtype']}, {r['ranks']} rank(s) on {r['hosts']} host(s): {r['reason']};"
        f" the slowest rank's time, median (least–most) of {r['repeats']}",
    ]
    if r["ranks"] == 1:
        found.append(
            "one rank: there is nothing to send, so the bus bandwidth is 0 and a time is that of the call alone"
        )
    title = f"{'bytes':>11} {'iterations':>10}   {'time a call':30} {'algbw GB/s':>10} {'busbw GB/s':>10}"
    if r["device"]:
        found.append(
            f"no graph: {no_graph}"
            if no_graph
            else f"the second half: replayed from a CUDA graph of {GRAPH_CALLS} calls"
        )
        title += f"   {'in a graph':30} {'algbw GB/s':>10} {'busbw GB/s':>10}"
    return [*found, f"{title} {'wrong':>6}"]


def text_row(row: dict[str, Any], graphs: bool) -> str:
    """One line of the table."""
    cells = [figures_text(row)] + ([figures_text(row["graph"])] if graphs else [])
    return f"{row['bytes']:11} {row['iterations']:10}   {'   '.join(cells)} {row['wrong']:6}"


def figures_text(found: dict[str, Any] | None) -> str:
    """Time and bandwidths, or as much empty space."""
    if not found or not found["seconds"]:
        return f"{'–':30} {'–':>10} {'–':>10}"
    middle = statistics.median(found["seconds"])
    scale, unit = next(
        (s, u) for s, u in ((1e6, "µs"), (1e3, "ms"), (1.0, "s")) if middle * s < 1000 or u == "s"
    )
    text = f"{spread([scale * value for value in found['seconds']])} {unit}"
    return f"{text:30} {found['algbw_gb_s']:10.4g} {found['busbw_gb_s']:10.4g}"
