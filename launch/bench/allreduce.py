"""`distrib bench allreduce`: the all-reduce of the communicator alone, by size of the message.

Bandwidths are those of nccl-tests (its doc/PERFORMANCE.md): algorithm bandwidth is bytes / time; bus
bandwidth is algorithm bandwidth × 2(n − 1)/n, what each link of an ideal ring of n ranks carries, so it
compares with the hardware's whatever n is. GB are 1e9 bytes.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from distrib.comm.world import World, connect
from distrib.errors import EXIT_CRASH, UserError
from launch.bench.measure import BackendName, Repeats, spread
from launch.bench.meter import GRAPH_CALLS, Meter, NoMemory, WrongSum
from launch.entry import AsJson, choice, number, positive
from launch.machine import machine


def message_sizes(least: int, most: int, factor: int, itemsize: int) -> list[int]:
    """Bytes: `least`, `least`·factor, … and `most`, each rounded down to whole elements, equal ones once."""
    found = []
    while least < most:
        found.append(least)
        least *= factor
    return list(dict.fromkeys(size // itemsize * itemsize for size in [*found, most]))


def device_of(world: World) -> str | None:
    """GPU, and the version of the communicator's library."""
    if world.backend.on_host:
        return None
    cuda = world.backend.xp.cuda
    name = cuda.runtime.getDeviceProperties(cuda.runtime.getDevice())["name"]
    versions = [f"{library.upper()} {version}" for library, version in world.comm_version.items()]
    return ", ".join([name.decode() if isinstance(name, bytes) else str(name), *versions])


def allreduce(
    min_bytes: Annotated[int, number("--min-bytes", "Smallest message.", 4)] = 8,
    max_bytes: Annotated[int, number("--max-bytes", "Largest message; always measured.", 4, 1 << 60)] = 1
    << 28,
    factor: Annotated[int, number("--factor", "From one size to the next.", 2)] = 8,
    dtype: Annotated[str, choice("--dtype", "Type of the elements.", "float32", "float64")] = "float32",
    comm: Annotated[str, choice("--comm", "Communicator.", "auto", "mpi", "nccl")] = "auto",
    backend: BackendName = "auto",
    repeats: Repeats = 7,
    seconds: Annotated[
        float, positive("--seconds", "Time to measure each size for; in a graph as long again.")
    ] = 1.0,
    timeout: Annotated[
        float, positive("--timeout", "Seconds after which a wait for another rank ends the job.")
    ] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Time and bandwidth of an all-reduce at each size, every element checked; alone or under mpirun.

    Example: mpirun -n 2 distrib bench allreduce --max-bytes 16777216
    """
    itemsize = np.dtype(dtype).itemsize
    if not itemsize <= min_bytes <= max_bytes:
        raise UserError(
            f"--min-bytes {min_bytes} --max-bytes {max_bytes}: the first must hold a {dtype}, the second must"
            " not be less"
        )
    world = connect(comm, backend, dtype, timeout + seconds)
    result, error = report(
        world, message_sizes(min_bytes, max_bytes, factor, itemsize), dtype, repeats, seconds, as_json
    )
    if world.rank == 0 and as_json:
        print(json.dumps(result, indent=2), flush=True)
    world.transport.close()
    if error:
        if world.rank == 0:
            print(f"distrib: error: {error}", file=sys.stderr, flush=True)
        raise typer.Exit(EXIT_CRASH)


def report(
    world: World, sizes: list[int], dtype: str, repeats: int, seconds: float, as_json: bool
) -> tuple[dict[str, Any], WrongSum | None]:
    """Measure all sizes, a line of text each unless `as_json`; (what was found, what was wrong)."""
    lines = world.rank == 0 and not as_json
    say: Callable[[str], None] = (lambda text: print(text, flush=True)) if lines else lambda _: None
    meter = Meter(world, dtype, repeats, seconds)
    known = meter.no_graph
    result: dict[str, Any] = {
        "machine": machine(),
        "device": device_of(world),
        "ranks": world.size,
        "hosts": len(set(world.hosts)),
        "backend": world.backend.name,
        "communicator": world.transport.name,
        "reason": world.choice_explanation,
        "dtype": dtype,
        "repeats": repeats,
        "seconds_a_size": seconds,
        "sizes": [],
        "no_graph": None,
        "out_of_memory": None,
        "wrong": None,
    }
    for line in head(result, known):
        say(line)
    with Console(stderr=True, quiet=lines or world.rank > 0).status("") as status:
        error = measure_all(meter, sizes, result, say, status.update)
    if meter.no_graph != known:
        say(f"no graph was measured after a failed capture: {meter.no_graph}")
    return result | {"no_graph": meter.no_graph}, error


def measure_all(
    meter: Meter,
    sizes: list[int],
    result: dict[str, Any],
    say: Callable[[str], None],
    progress: Callable[[str], None],
) -> WrongSum | None:
    """Fill in the rows of `result` until memory ends, or a sum is wrong."""
    graphs = not meter.world.backend.on_host
    for nbytes in sizes:
        progress(f"{nbytes} bytes")
        try:
            row, error = meter.measure(nbytes), None
        except NoMemory as missing:
            result["out_of_memory"] = str(missing)
            say(str(missing))
            break
        except WrongSum as found:
            error = found.with_traceback(None)  # which would hold a graph, and NCCL at its end
            row, result["wrong"] = wrong_row(nbytes, meter.dtype, found.wrong), found.found
        result["sizes"].append(row)
        say(text_row(row, graphs))
        if error:
            return error
    return None


def wrong_row(nbytes: int, dtype: str, wrong: int) -> dict[str, Any]:
    """The row of a size whose sum was wrong: no time was taken."""
    empty: dict[str, Any] = {"iterations": 0, "seconds": [], "algbw_gb_s": None, "busbw_gb_s": None}
    elements = nbytes // np.dtype(dtype).itemsize
    return {"bytes": nbytes, "elements": elements, **empty, "graph": None, "wrong": wrong}


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
            "one rank: there is nothing to send, so the bus bandwidth is 0, and a time is the call's alone"
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
