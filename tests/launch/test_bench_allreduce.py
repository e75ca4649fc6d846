"""`distrib bench allreduce`: its figures are what they are called, and a wrong sum is found."""

from __future__ import annotations

import json
import subprocess
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import HELPERS, crew, run
from nccl_double import Cuda, _bound, _Event, _Stream
from strict_array import StrictModule
from test_strict import StrictBackend

from distrib.comm.base import SingleCommunicator, SingleControl
from distrib.comm.world import World
from distrib.faults.watchdog import Watchdog
from launch.bench import allreduce as bench_allreduce
from launch.bench.allreduce import message_sizes
from launch.bench.meter import GRAPH_CALLS, bandwidths
from launch.bench.sums import PART, Values
from nn.device import NUMPY

QUICK = ("--repeats", "3", "--seconds", "0.01")
SMALL = (*QUICK, "--min-bytes", "8", "--max-bytes", "5000000", "--factor", "100")

APP = """
import sys, typer
from launch.bench import allreduce as bench
from distrib.train import run_app
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(bench.allreduce)
{before}
sys.exit(run_app(app))
"""


def allreduce(
    *arguments: str, ranks: int = 1, before: str = "", check: bool = True
) -> subprocess.CompletedProcess[str]:
    """The command alone or under mpirun, after the statements `before`."""
    return run("-c", APP.format(before=before), *arguments, ranks=ranks, check=check, env=HELPERS)


def check_figures(row: dict, found: dict, ranks: int) -> None:
    """Bandwidths follow from the time by nccl-tests' definitions."""
    assert len(found["seconds"]) == 3
    assert min(found["seconds"]) > 0
    assert found["iterations"] >= 1
    assert found["algbw_gb_s"] == pytest.approx(row["bytes"] / np.median(found["seconds"]) / 1e9)
    assert found["busbw_gb_s"] == pytest.approx(found["algbw_gb_s"] * 2 * (ranks - 1) / ranks)


@pytest.mark.parametrize(
    ("ranks", "dtype", "comm"),
    [
        (1, "float32", "auto"),
        (1, "float64", "mpi"),
        (2, "float32", "auto"),
        (3, "float64", "mpi"),
    ],
)
def test_json(ranks: int, dtype: str, comm: str) -> None:
    done = allreduce(*SMALL, "--dtype", dtype, "--comm", comm, "--backend", "numpy", "--json", ranks=ranks)
    result, itemsize = json.loads(done.stdout), np.dtype(dtype).itemsize
    assert {
        name: result[name]
        for name in (
            "ranks",
            "hosts",
            "backend",
            "communicator",
            "dtype",
            "repeats",
            "device",
            "no_graph",
            "out_of_memory",
            "wrong",
        )
    } == {
        "ranks": ranks,
        "hosts": 1,
        "backend": "numpy",
        "communicator": "none" if (ranks, comm) == (1, "auto") else "mpi",
        "dtype": dtype,
        "repeats": 3,
        "device": None,
        "no_graph": "host arrays",
        "out_of_memory": None,
        "wrong": None,
    }
    assert "cores" in result["machine"]
    assert [row["bytes"] for row in result["sizes"]] == [8, 800, 80000, 5000000]
    for row in result["sizes"]:
        assert (row["elements"] * itemsize, row["wrong"], row["graph"]) == (row["bytes"], 0, None)
        check_figures(row, row, ranks)
    assert done.stderr == "", "no progress where nobody looks"


@pytest.mark.parametrize("ranks", [1, 2])
def test_table(ranks: int) -> None:
    lines = allreduce(*SMALL, "--backend", "numpy", ranks=ranks).stdout.splitlines()
    assert "cores" in lines[0]
    assert f"float32, {ranks} rank(s) on 1 host(s)" in lines[1]
    assert any("nothing to send" in line for line in lines) == (ranks == 1)
    assert "graph" not in "".join(lines)
    head, *rows = lines[-5:]
    assert head.split() == [
        "bytes",
        "iterations",
        "time",
        "a",
        "call",
        "algbw",
        "GB/s",
        "busbw",
        "GB/s",
        "wrong",
    ]
    assert [row.split()[0] for row in rows] == ["8", "800", "80000", "5000000"]
    for row in rows:
        assert len(row) == len(head)
        assert row.split()[-1] == "0"
        assert (float(row.split()[-2]) == 0) == (ranks == 1), "the bus bandwidth of one rank"


@pytest.mark.parametrize(
    ("least", "most", "factor", "itemsize", "expected"),
    [
        (8, 1 << 28, 8, 4, [8, 64, 512, 4096, 32768, 262144, 2097152, 16777216, 134217728, 268435456]),
        (8, 64, 2, 8, [8, 16, 32, 64]),
        (8, 8, 2, 8, [8]),
        (11, 50, 3, 8, [8, 32, 48]),
        (4, 15, 2, 4, [4, 8, 12]),
        (5, 9, 2, 4, [4, 8]),
        (8, 9, 2, 8, [8]),
    ],
)
def test_sizes(least: int, most: int, factor: int, itemsize: int, expected: list[int]) -> None:
    assert message_sizes(least, most, factor, itemsize) == expected


@pytest.mark.parametrize(("ranks", "bus"), [(1, 0.0), (2, 4.0), (4, 6.0), (8, 7.0)])
def test_bandwidths(ranks: int, bus: float) -> None:
    """1 GB in a quarter of a second; nccl-tests' factors 0, 1, 1.5 and 1.75."""
    assert bandwidths(10**9, 0.25, ranks) == (4.0, pytest.approx(bus))


def of_rank(rank: int, size: int) -> Any:
    return SimpleNamespace(rank=rank, size=size, backend=NUMPY)


@pytest.mark.parametrize(("size", "dtype"), [(1, "float32"), (2, "float32"), (3, "float64"), (5, "float32")])
def test_values(size: int, dtype: str) -> None:
    """The sum of all ranks' values in closed form, exact also across a part's end.

    What is off is counted and named.
    """
    count, values = PART + 300, [Values(of_rank(rank, size), dtype) for rank in range(size)]
    filled = [np.empty(count, dtype) for _ in values]
    for own, x in zip(values, filled, strict=True):
        own.fill(x)
    i = np.arange(count)
    for rank, x in enumerate(filled):
        assert (x == i % 251 + rank + 1).all()
    total = np.sum(filled, axis=0, dtype=dtype)
    assert (total == size * (i % 251) + size * (size + 1) // 2).all()
    assert values[-1].compare(total, 1) == (0, None)
    assert values[0].compare(total * np.asarray(float(size) ** 7, dtype), 8) == (0, None)
    for index, value in ((PART + 7, np.nan), (PART - 1, np.inf), (0, np.nextafter(total[0], 0))):
        before, total[index] = float(total[index]), value
        wrong, first = values[0].compare(total, 1)
        assert first is not None
        assert (wrong, first["index"], first["expected"]) in [(n, index, before) for n in (1, 2, 3)]
        assert first["value"] == pytest.approx(float(total[index]), nan_ok=True)


@pytest.mark.parametrize("shift", [2**k for k in range(1, 20)])
def test_a_shift_by_a_power_of_two_shows_everywhere(shift: int) -> None:
    values = Values(of_rank(0, 2), "float32")
    assert values.compare(values.sums[shift:], 1)[0] == len(values.sums) - shift


BROKEN = """
from distrib.comm.base import DONE
from distrib.comm.mpi import MpiCommunicator
good = MpiCommunicator.all_reduce
def all_reduce(self, x, overlap=False):
    {what}
    return DONE
MpiCommunicator.all_reduce = all_reduce
"""


@pytest.mark.parametrize(
    ("what", "size", "message", "wrong"),
    [
        ("pass", 8, "rank 0 has 1 at index 0, not 3; 4 wrong element(s)", 4),
        ("good(self, x); x *= self.size", 8, "rank 0 has 6 at index 0, not 3; 4 wrong", 4),
        ("good(self, x); x[77:78] += self.rank", 800, "rank 1 has 158 at index 77, not 157; 1 wrong", 1),
        (
            "good(self, x); x[1200000:1200002] *= float('nan')",
            5000000,
            "rank 0 has nan at index 1200000, not 443; 4 wrong",
            4,
        ),
        ("good(self, x[:-1])", 8, "rank 0 has 2 at index 1, not 5; 2 wrong", 2),
    ],
)
def test_a_wrong_sum_is_found(what: str, size: int, message: str, wrong: int) -> None:
    done = allreduce(
        *SMALL, "--backend", "numpy", "--json", ranks=2, before=BROKEN.format(what=what), check=False
    )
    assert done.returncode == 1
    assert f"distrib: error: wrong sum of {size} bytes (eager): {message}" in done.stderr
    assert "Traceback" not in done.stderr
    result = json.loads(done.stdout)
    assert [row["wrong"] for row in result["sizes"]] == [0] * (len(result["sizes"]) - 1) + [wrong]
    assert result["sizes"][-1]["bytes"] == result["wrong"]["bytes"] == size
    assert result["sizes"][-1]["seconds"] == []


def test_a_wrong_sum_in_the_table() -> None:
    before = BROKEN.format(what="good(self, x); x[100:] += 1")
    done = allreduce(*SMALL, "--backend", "numpy", ranks=2, before=before, check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].split() == ["800", "0", "–", "–", "–", "200"]


@pytest.mark.parametrize("as_json", [False, True])
def test_out_of_memory_ends_the_list(as_json: bool) -> None:
    """A pebibyte: one line, what was measured stays, and that is no error."""
    done = allreduce(
        *QUICK,
        "--min-bytes",
        "1024",
        "--max-bytes",
        str(1 << 50),
        "--factor",
        str(1 << 40),
        *(["--json"] if as_json else []),
        "--backend",
        "numpy",
        ranks=2,
    )
    assert done.stderr == ""
    if as_json:
        result = json.loads(done.stdout)
        assert [row["bytes"] for row in result["sizes"]] == [1024]
        assert result["out_of_memory"].startswith(f"out of memory at {1 << 50} bytes")
    else:
        assert done.stdout.splitlines()[-1].startswith(
            f"out of memory at {1 << 50} bytes, where the list ends: rank 0: "
        )


def test_memory_that_one_rank_lacks_ends_the_list_of_all() -> None:
    before = """
import numpy as np
from distrib import launched_rank
empty = np.empty
def limited(shape, *more, **options):
    if launched_rank() == 1 and shape == 20000:
        raise MemoryError("planted")
    return empty(shape, *more, **options)
np.empty = limited
"""
    result = json.loads(allreduce(*SMALL, "--backend", "numpy", "--json", ranks=2, before=before).stdout)
    assert [row["bytes"] for row in result["sizes"]] == [8, 800]
    assert result["out_of_memory"] == "out of memory at 80000 bytes, where the list ends: rank 1: planted"


def test_a_rank_that_does_not_come_ends_the_job() -> None:
    what = "import time; time.sleep(3600) if self.rank else good(self, x)"
    done = allreduce(
        *SMALL, "--backend", "numpy", "--timeout", "5", ranks=2, before=BROKEN.format(what=what), check=False
    )
    assert done.returncode not in (0, 2)
    assert "rank 0 on" in done.stderr
    assert "raise --timeout" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "bf16"), "--dtype bf16: choose float32 or float64"),
        (("--comm", "none"), "--comm none: choose auto, mpi or nccl"),
        (("--backend", "torch"), "--backend torch: choose auto, numpy or cupy"),
        (("--comm", "nccl", "--backend", "numpy"), "--comm nccl needs --backend cupy"),
        (("--min-bytes", "4", "--dtype", "float64"), "--min-bytes 4"),
        (("--min-bytes", "0"), "--min-bytes 0"),
        (("--max-bytes", "4"), "--max-bytes 4"),
        (("--max-bytes", str(1 << 70)), "--max-bytes"),
        (("--factor", "1"), "--factor 1"),
        (("--repeats", "0"), "--repeats 0"),
        (("--seconds", "nan"), "--seconds nan"),
        (("--seconds", "0"), "--seconds 0"),
        (("--timeout", "inf"), "--timeout inf"),
        (("--factor", "x"), "--factor"),
    ],
)
def test_wrong_use(arguments: tuple[str, ...], message: str, command_line) -> None:
    code, out, err = command_line(bench_allreduce.allreduce, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_wrong_use_on_two_ranks() -> None:
    done = allreduce("--comm", "nccl", "--backend", "numpy", ranks=2, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("distrib: error") == 1


# On a device: doubles of streams, events that tell the time, graphs and NCCL; real ranks.


class _TimedEvent(_Event):
    """The time at which the stream came to the last record: at once where nothing was queued before it."""

    at: float | None = None

    def record(self, stream: _Stream | None = None) -> None:
        stream = stream or self.cuda.current
        idle = stream.ran == len(stream.work)
        stream.work.append(self._stamp)
        super().record(stream)
        if idle:
            stream.run()

    def _stamp(self) -> None:
        self.at = time.perf_counter()


class _CapturingStream(_Stream):
    """What is queued during a capture goes into a graph and does not run."""

    start: int | None = None

    def begin_capture(self, mode: int | None = None) -> None:
        if self is self.null:
            raise RuntimeError("cudaErrorStreamCaptureUnsupported")
        assert self.ran == len(self.work), "a capture begins on an idle stream"
        self.start = len(self.work)

    def end_capture(self) -> Graph:
        assert self.start is not None
        captured, self.work[self.start :] = self.work[self.start :], []
        self.start = None
        return Graph(captured)

    def synchronize(self) -> None:
        assert self.start is None, "a capture cannot be waited for"
        super().synchronize()


class Graph:
    lose = 0  # calls that every graph loses: for the negative test

    def __init__(self, work: list) -> None:
        assert len(work) == GRAPH_CALLS
        self.work = work[: GRAPH_CALLS - Graph.lose]

    def launch(self, stream: Any) -> None:
        stream.work.extend(self.work)


class GraphCuda(Cuda):
    """Adds to the double of `cupy.cuda` what this benchmark uses."""

    def __init__(self, log: list) -> None:
        super().__init__(log)
        self.Event, self.Stream = _bound(_TimedEvent, cuda=self), _bound(_CapturingStream, cuda=self)
        self.current = self.compute = self.Stream.null = self.Stream(null=True)

    def get_elapsed_time(self, begin: _TimedEvent, end: _TimedEvent) -> float:
        assert begin.at is not None
        assert end.at is not None
        return 1e3 * (end.at - begin.at)

    def getDevice(self) -> int:
        return 0

    def getDeviceProperties(self, device: int) -> dict[str, bytes]:
        return {"name": b"Double"}


def strict_backend(cuda: GraphCuda) -> StrictBackend:
    xp: Any = StrictModule()
    xp.cuda = cuda
    return StrictBackend("strict", xp, "NHWC")


DEVICE = """
from mpi4py import MPI
from distrib.faults.watchdog import Watchdog
from distrib.comm.mpi import StagedCommunicator
from distrib.comm.nccl import NcclCommunicator
from conftest import crew
from distrib.comm.world import World
from nccl_double import Nccl
from test_bench_allreduce import Graph, GraphCuda, strict_backend
log, mpi = [], MPI.COMM_WORLD
cuda = GraphCuda(log)
cuda.nccl = Nccl(mpi, cuda, log)
backend, watchdog = strict_backend(cuda), Watchdog(mpi.rank, 600)

def nccl():
    return NcclCommunicator(mpi, cuda, cuda.nccl, 0, watchdog, lambda: backend.xp.zeros(1, "float32"))

def staged():
    return StagedCommunicator(mpi, watchdog, backend)

bench.connect = lambda *_: World({comm}(), mpi, backend, "double", watchdog, crew(mpi.size))
{more}
"""
ON_DEVICE = (*QUICK, "--max-bytes", "80000", "--factor", "100")


def on_device(
    comm: str, *arguments: str, ranks: int, more: str = "", check: bool = True
) -> subprocess.CompletedProcess[str]:
    return allreduce(
        *ON_DEVICE, *arguments, ranks=ranks, before=DEVICE.format(comm=comm, more=more), check=check
    )


@pytest.mark.parametrize(("ranks", "dtype"), [(2, "float32"), (3, "float64")])
def test_nccl_is_measured_outside_and_inside_a_graph(ranks: int, dtype: str) -> None:
    result = json.loads(on_device("nccl", "--dtype", dtype, "--json", ranks=ranks).stdout)
    assert (result["communicator"], result["no_graph"], result["device"]) == (
        "nccl",
        None,
        "Double, NCCL 22501",
    )
    assert [row["bytes"] for row in result["sizes"]] == [8, 800, 80000]
    for row in result["sizes"]:
        check_figures(row, row, ranks)
        check_figures(row, row["graph"], ranks)
        assert row["graph"]["iterations"] % GRAPH_CALLS == 0
        assert row["wrong"] == 0


def test_nccl_table() -> None:
    *_, note, head, first, _, _ = on_device("nccl", ranks=2).stdout.splitlines()
    assert f"replayed from a CUDA graph of {GRAPH_CALLS} calls" in note
    assert head.count("algbw GB/s") == 2
    assert len(first) == len(head)
    assert "–  " not in first


def test_all_calls_go_to_one_stream_that_is_not_the_default() -> None:
    more = """
import atexit
def look():
    streams = {entry.stream for entry in log[first:] if entry[0] == "allReduce"}
    print("streams", len(streams), 0 in streams, flush=True)
atexit.register(look)
world = bench.connect()
bench.connect = lambda *_: world
first = len(log)
"""
    lines = on_device("nccl", ranks=2, more=more).stdout.splitlines()
    assert [line for line in lines if line.startswith("streams")] == ["streams 1 False"] * 2


def test_a_graph_that_loses_a_call_is_found() -> None:
    done = on_device("nccl", "--json", ranks=2, more="Graph.lose = 1", check=False)
    assert done.returncode == 1
    assert "wrong sum of 8 bytes (a graph of 8): rank 0 has 192 at index 0, not 384; 4 wrong" in done.stderr


def test_a_capture_that_fails_on_one_rank_leaves_the_column_empty() -> None:
    more = """
good = NcclCommunicator.all_reduce
def all_reduce(self, x, overlap=False):
    if cuda.current.__dict__.get("start") is not None and self.rank == 1:
        raise RuntimeError("planted")
    return good(self, x, overlap)
NcclCommunicator.all_reduce = all_reduce
Graph.__init__ = lambda self, work: None
"""
    result = json.loads(on_device("nccl", "--json", ranks=2, more=more).stdout)
    assert result["no_graph"] == "rank 1: RuntimeError: planted"
    assert [row["graph"] for row in result["sizes"]] == [None] * 3
    assert (
        "after a failed capture: rank 1: RuntimeError: planted"
        in on_device("nccl", ranks=2, more=more).stdout
    )


@pytest.mark.parametrize("ranks", [2, 3])
def test_mpi_through_the_host_has_no_graph(ranks: int) -> None:
    result = json.loads(on_device("staged", "--json", ranks=ranks).stdout)
    assert (result["communicator"], result["device"]) == ("mpi", "Double")
    assert "MPI copies through the host" in result["no_graph"]
    for row in result["sizes"]:
        check_figures(row, row, ranks)
        assert (row["graph"], row["wrong"]) == (None, 0)
    lines = on_device("staged", ranks=ranks).stdout.splitlines()
    assert any(line.startswith("no graph: MPI copies through the host") for line in lines)
    assert lines[-1].split()[-4:] == ["–", "–", "–", "0"]


def test_one_process_on_a_device(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    backend = strict_backend(GraphCuda([]))
    world = World(SingleCommunicator(), SingleControl(), backend, "double", Watchdog(0, 600), crew(1))
    monkeypatch.setattr(bench_allreduce, "connect", lambda *_: world)
    bench_allreduce.allreduce(max_bytes=64, repeats=3, seconds=0.01, as_json=True)
    result = json.loads(capsys.readouterr().out)
    assert "queues nothing" in result["no_graph"]
    assert [row["busbw_gb_s"] for row in result["sizes"]] == [0, 0]
    bench_allreduce.allreduce(max_bytes=64, repeats=3, seconds=0.01)
    assert "nothing to send" in capsys.readouterr().out
