"""A trace holds what the ranks did, on one clock, in the format that Perfetto opens."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from conftest import HELPERS, run, summary
from device_double import REAL, device, double_only, needs_device
from test_elastic import train as mortal_train
from test_graph import a_trainer, steps

from distrib import train
from distrib.config import build
from distrib.errors import UserError
from distrib.options import steps_between
from distrib.tracing.trace import traced
from distrib.trainer import Trainer
from launch.report.timeline import Timeline, of_events

OPTIONS = "--width 0.0625 --limit-train 96 --limit-test 40 --batch-size 16 --epochs 2 --backend numpy"
TRAINING = OPTIONS.split()

PROGRAM = """
import sys, time
from functools import partial
from distrib import launched_rank
ahead, plain_clock = 5.0 * launched_rank(), time.perf_counter
time.perf_counter = lambda: plain_clock() + ahead  # as on hosts of their own
from distrib import train, trainer
trainer.Reducer = partial(trainer.Reducer, bucket_bytes=1 << 13)
plain = trainer.Trainer.step
def step(self, *times):
    time.sleep(0.05 * (self.world.rank == 2))
    plain(self, *times)
trainer.Trainer.step = step
sys.exit(train.main())
"""
"""Rank 2 is slow, each rank has a clock of its own, and there are several buckets."""


def require_valid(trace: dict[str, Any]) -> dict[tuple[int, str], list[dict]]:
    """Hold a trace to the format, event by event; returns the spans of each process and named thread."""
    assert set(trace) == {"traceEvents", "displayTimeUnit", "otherData"}
    assert trace["displayTimeUnit"] in ("ms", "ns")
    keys = {
        "M": {"ph", "name", "pid", "tid", "args"},
        "X": {"ph", "name", "cat", "pid", "tid", "ts", "dur", "args"},
        "s": {"ph", "name", "cat", "pid", "tid", "ts", "id", "args"},
        "f": {"ph", "name", "cat", "pid", "tid", "ts", "id", "bp"},
    }
    names: dict[tuple[int, int], str] = {}
    spans = defaultdict(list)
    flows: dict[tuple[str, str, str], list[dict]] = defaultdict(list)
    for event in trace["traceEvents"]:
        assert set(event) == keys[event["ph"]], event
        assert type(event["pid"]) is int
        assert type(event["tid"]) is int
        assert isinstance(event["name"], str)
        if event["ph"] == "M":
            kind = event["name"]
            assert kind in ("process_name", "process_sort_index", "thread_name", "thread_sort_index")
            assert [*event["args"]] == ["name" if kind.endswith("name") else "sort_index"]
            if kind == "thread_name":
                assert (event["pid"], event["tid"]) not in names
                names[event["pid"], event["tid"]] = event["args"]["name"]
            continue
        assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
            spans[event["pid"], event["tid"]].append(event)
        else:
            flows[event["cat"], event["name"], event["id"]].append(event)
    assert set(spans) == set(names), "each thread has a name, and something in it"
    for events in spans.values():
        require_nested(events)
    for ends in flows.values():
        assert [event["ph"] for event in ends] == ["s", "f"]
        begin, end = ends
        assert begin["ts"] <= end["ts"]
        assert end["bp"] == "e"
        for each in ends:  # bound to the span that is open there
            assert enclosing(spans[each["pid"], each["tid"]], each["ts"]), each
    return {(pid, names[pid, tid]): events for (pid, tid), events in spans.items()}


def ns(microseconds: float) -> int:
    return round(1000 * microseconds)


def end(event: dict) -> int:
    return ns(event["ts"]) + ns(event["dur"])


def require_nested(events: list[dict]) -> None:
    """A span ends before the one around it does."""
    around: list[dict] = []
    for event in sorted(events, key=lambda event: (ns(event["ts"]), -ns(event["dur"]))):
        while around and end(around[-1]) <= ns(event["ts"]):
            around.pop()
        assert not around or end(event) <= end(around[-1]), (around[-1], event)
        around.append(event)


def enclosing(events: list[dict], at: float) -> list[str]:
    """Names of the spans around a moment."""
    return [event["name"] for event in events if ns(event["ts"]) <= ns(at) <= end(event)]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    """A run of four ranks, its trace, and what it printed."""
    folder = tmp_path_factory.mktemp("trace") / "run"
    more = "--checkpoint-every", 4, "--trace", folder / "trace.json", "--trace-steps", "4:8"
    done = run("-c", PROGRAM, "--run-dir", folder, *TRAINING, *more, ranks=4)
    return folder, json.loads((folder / "trace.json").read_text()), done.stdout


def test_four_ranks_in_the_format(four: tuple[Path, dict, str]) -> None:
    folder, trace, printed = four
    threads = require_valid(trace)
    assert "trace: steps 4 to 8 in " in printed
    assert trace["otherData"]["steps"] == [4, 8]
    assert trace["otherData"]["dropped_spans"] == 0
    processes = [event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"]
    assert [name.split(" on ")[0] for name in processes] == [f"rank {rank}" for rank in range(4)]
    for rank in range(4):
        compute = threads[rank, "compute"]
        found = {
            kind: [e for e in compute if e["cat"] == kind] for kind in ("step", "phase", "layer", "save")
        }
        assert [event["args"]["step"] for event in found["step"]] == [4, 5, 6, 7, 8]
        phases = [event["name"] for event in found["phase"]]
        assert phases == 5 * ["data", "forward", "backward", "gradients", "optimizer"]
        counts = Counter(event["name"] for event in found["layer"])
        for layer in ("stem", "stem.0", "res1.1.1", "stage3", "fc"):
            assert counts[f"{layer} backward"] == 5
            assert counts[f"{layer} forward"] == 5 + 1, "one batch of the evaluation"
        assert len(found["save"]) == 3, "after steps 4, 6 (the epoch's end) and 8"
        assert sum(event["cat"] == "evaluation" for event in compute) == 1
        assert {"wait: sum", "wait: bucket 0"} <= {
            event["name"] for event in compute if event["cat"] == "wait"
        }
    assert [event["cat"] for event in threads[0, "checkpoint"]][:2] == ["save", "save"]
    assert (1, "checkpoint") not in threads
    assert summary(folder)["finished"]


def test_arrows_lead_from_each_gradient_to_its_bucket(four: tuple[Path, dict, str]) -> None:
    _, trace, _ = four
    threads = require_valid(trace)
    flows = [event for event in trace["traceEvents"] if event["ph"] in "sf"]
    arrows = list(zip(flows[::2], flows[1::2], strict=True))
    names = Counter((begin["pid"], begin["args"]["gradient"]) for begin, _ in arrows)
    assert set(names.values()) == {5}
    assert len(names) == 4 * (8 * 3 + 2), "of all parameters of all ranks"
    wire = {
        pid: [e for (p, name), es in threads.items() if p == pid and name[:4] == "wire" for e in es]
        for pid in range(4)
    }
    buckets = set()
    for begin, finish in arrows:
        layer = begin["args"]["gradient"].rpartition(".")[0]
        assert f"{layer} backward" in enclosing(threads[begin["pid"], "compute"], begin["ts"])
        (bucket,) = {
            e["name"] for e in wire[finish["pid"]] if (e["tid"], e["ts"]) == (finish["tid"], finish["ts"])
        }
        buckets.add((bucket, layer.split(".")[0]))
    assert ("bucket 0", "fc") in buckets
    last = max(int(bucket.split()[1]) for bucket, _ in buckets)
    assert last > 2
    assert (f"bucket {last}", "stem") in buckets


def test_one_clock_for_all(four: tuple[Path, dict, str]) -> None:
    """No rank has a sum before the last rank has given its part, though their clocks are 5 s apart."""
    _, trace, _ = four
    errors = trace["otherData"]["clock_error_us"]
    assert errors["0"] == 0
    slack = 2 * max(errors.values())
    assert slack < 5e4
    threads = require_valid(trace)
    sums = []
    for rank in range(4):
        events = [e for (p, name), es in threads.items() if p == rank and name[:4] == "wire" for e in es]
        sums.append(sorted((e for e in events if e["name"] == "bucket 1"), key=lambda event: event["ts"]))
    assert [len(each) for each in sums] == [5] * 4
    for same in zip(*sums, strict=True):
        assert min(e["ts"] + e["dur"] for e in same) >= max(e["ts"] for e in same) - slack


def test_the_report_names_whom_the_others_wait_for(four: tuple[Path, dict, str]) -> None:
    found = of_events(four[1])
    assert isinstance(found, Timeline)
    assert found.traced == 5
    assert found.waited_for.startswith("The others wait for rank 2 on ")
    for _, step in found.ranks:
        shares = step.shares
        assert shares["compute"] + shares["exposed"] == pytest.approx(100)
        assert 0 <= shares["hidden"] <= shares["compute"]
    assert found.mean["hidden"] > 0


def test_a_death_in_the_traced_steps(tmp_path: Path) -> None:
    """The survivors trace what is left of them."""
    path = tmp_path / "trace.json"
    done = mortal_train(
        tmp_path / "run", "1:5:sum_over_ranks:SIGKILL", "--trace", path, "--trace-steps", "3:8", ranks=3
    )
    assert done.returncode == 0, done.stdout + done.stderr
    trace = json.loads(path.read_text())
    threads = require_valid(trace)
    assert {pid for pid, _ in threads} == {0, 2}
    assert trace["otherData"]["steps"] == [6, 8]
    assert "trace: of the 2 rank(s) that are left" in done.stdout


@needs_device
def test_a_devices_steps_are_timed_by_its_events(tmp_path: Path) -> None:
    """Eagerly, where others are replays of a graph; and each span is a range of NVTX's."""
    path, said = tmp_path / "trace.json", list[str]()
    with device("float32") as backend:
        trainer = a_trainer(backend, trace=str(path), trace_steps="5:6")
        plain = attributes(trainer)
        with traced(trainer, said.append):
            steps(trainer, 4)
            replays = trainer.graphs.replays
            steps(trainer, 2)
            assert trainer.graphs is None
            assert attributes(trainer) != plain
            steps(trainer, 1)
            assert trainer.graphs.replays == replays + 1
            assert attributes(trainer) == plain, "nothing of it is left"
        if not REAL:
            names = [name for name, *_ in backend.cuda.nvtx.ranges]
            assert {"step 5", "stem.0 forward", "beside the backward"} <= set(names)
            assert backend.cuda.nvtx.depth == 0
    assert said == [
        f"trace: steps 5 to 6 in {path}, {path.stat().st_size / 1e6:.1f} MB: open it at ui.perfetto.dev"
    ]
    trace = json.loads(path.read_text())
    threads = require_valid(trace)
    assert {name for _, name in threads} == {"compute", "side stream"}
    assert "eagerly" in trace["otherData"]["times"]
    spans = {event["name"]: event for event in threads[0, "compute"]}
    assert spans["res1.0.0 forward"]["dur"] > 0
    assert end(spans["res2 forward"]) <= ns(spans["fc backward"]["ts"])


NCCL = """
from mpi4py import MPI
from device_double import CapturedNccl, device
from distrib.comm.mpi import MpiCommunicator
from distrib.comm.nccl import NcclCommunicator
from distrib.comm.reducer import Reducer
from distrib.tracing.trace import traced
from test_graph import *
world, watchdog = MPI.COMM_WORLD, Watchdog(MPI.COMM_WORLD.Get_rank(), 600)
with device("float32") as backend:
    nccl, zero = CapturedNccl(world, backend.cuda, []), lambda: backend.xp.zeros(1, "float32")
    comm = NcclCommunicator(world, backend.cuda, nccl, 0, watchdog, zero, backend.side_stream)
    host = MpiCommunicator(world, watchdog)
    config = Config(**OPTIONS | BY_EIGHT, trace=PATH, trace_steps="2:3")
    trainer = Trainer(config, World(comm, world, backend, "", watchdog, crew(2), host), random_data(18))
    trainer.reducer = Reducer(trainer.params, comm, "float32", 1 << 12)
    plain = trainer.reducer.ready
    trainer.reducer.ready = lambda parameter: (backend.cuda.touch(), plain(parameter))
    warm_up(trainer, None)
    with traced(trainer, print):
        steps(trainer, 5)
    assert trainer.graphs.replays == 3, trainer.graphs.replays
    trainer.close(), comm.close()
"""


@double_only
@needs_device
def test_nccls_buckets_are_timed_on_their_stream(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    run("-c", f"PATH = {str(path)!r}\n{NCCL}", ranks=2, env=HELPERS)
    threads = require_valid(json.loads(path.read_text()))
    assert set(threads) == {
        (rank, track) for rank in range(2) for track in ("compute", "side stream", "wire")
    }
    buckets = [event["name"] for event in threads[1, "wire"]]
    assert buckets == 2 * [f"bucket {number}" for number in range(len(buckets) // 2)]
    assert len(buckets) > 4
    waits = Counter(event["name"] for event in threads[1, "compute"] if event["cat"] == "wait")
    assert waits["wait: bucket 0"] == 2
    assert waits["wait: sum"] == 2 * 8 * 3, "batch norm's, of eight layers"


def attributes(trainer: Trainer) -> list[set[str]]:
    """What is set on the objects that a trace wraps."""
    found = [trainer, trainer.saver, trainer.timer, trainer.reducer, trainer.world.transport]
    found += [trainer.world.backend.side_stream, *trainer.model.layers.walk()]
    return [{name for name, value in vars(each).items() if callable(value)} for each in found]


def train_alone(command_line: Any, *options: object) -> tuple[int, str, str]:
    return command_line(
        train.with_options(train.train_command),
        "--comm",
        "none",
        "--shards",
        3,
        "--reproducible",
        *TRAINING,
        *options,
    )


def test_one_process_in_threads(tmp_path: Path, command_line: Any) -> None:
    """Each virtual shard has a track of its own, and no bit of the result changes."""
    path = tmp_path / "trace.json"
    code, said, _ = train_alone(
        command_line, "--run-dir", tmp_path / "on", "--trace", path, "--trace-steps", "2:100"
    )
    assert code == 0
    assert "trace: steps 2 to 12 in" in said
    threads = require_valid(json.loads(path.read_text()))
    assert {(0, "compute"), (0, "shard 0"), (0, "shard 2"), (0, "checkpoint")} == set(threads) - {
        (0, "shard 1")
    }
    assert "res1.0 forward" in {event["name"] for event in threads[0, "shard 2"]}
    assert not any(event["cat"] == "wait" for event in threads[0, "compute"]), "there is nobody to wait for"
    code, said, _ = train_alone(command_line, "--run-dir", tmp_path / "off")
    assert "trace:" not in said
    assert summary(tmp_path / "on")["parameter_digest"] == summary(tmp_path / "off")["parameter_digest"]


def test_a_run_that_ends_before(tmp_path: Path, command_line: Any) -> None:
    path = tmp_path / "run" / "trace.json"  # in a folder that the run makes
    code, said, _ = train_alone(command_line, "--run-dir", path.parent, "--trace", path, "--max-steps", 3)
    assert code == 0
    assert "trace: none is written: the run ended after step 3, before step 10" in said
    more = "--trace", path, "--trace-steps", "1:2", "--max-steps", 5
    code, said, _ = train_alone(command_line, "--run-dir", path.parent, *more)
    assert code == 0
    assert "trace: none is written: step 2 was done before" in said
    assert not path.exists()


@pytest.mark.quick
def test_a_place_where_none_can_be_written(tmp_path: Path, command_line: Any) -> None:
    (tmp_path / "folder").mkdir()
    for place, why in (
        ("folder", "is a folder"),
        ("gone/trace.json", "there is no folder"),
        ("x" * 300, "shorter name"),
    ):
        code, _, error = train_alone(command_line, "--run-dir", tmp_path / "run", "--trace", tmp_path / place)
        assert code == 2
        assert error.startswith("distrib: error: --trace ")
        assert why in error
        assert not (tmp_path / "run").exists()
    assert {each.name for each in tmp_path.iterdir()} == {"folder"}


@pytest.mark.quick
def test_bad_options() -> None:
    assert steps_between("10:14") == (10, 14)
    assert steps_between("7:7") == (7, 7)
    for text in (
        "5",
        "0:3",
        "7:3",
        "1:101",
        "a:b",
        "1:2:3",
        "-1:3",
        "1.5:3",
        "²:3",
        ":",
        "9" * 30 + ":" + "9" * 30,
    ):
        with pytest.raises(UserError, match=r"--trace-steps .*: give A:B, as 10:14"):
            build({"trace": "x.json", "trace_steps": text})
    with pytest.raises(UserError, match="--trace-steps 1:2: needs --trace"):
        build({"trace_steps": "1:2"})
