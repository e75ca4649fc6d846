"""Checks of whole runs that `distrib gpu-report` makes on a GPU; a rehearsal makes them on the host.

    python tests/gpu/checks.py graph --steps 2000     # graphs against eager steps, and against the host
    python tests/gpu/checks.py killed --comm nccl     # one of two ranks is killed: who is named?

Each prints JSON and ends with exit code 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distrib.faults.heartbeat import is_dead, read_failure, read_heartbeats
from launch.machine import DISTRIB, MPI_DEFAULTS, end, finish, mpirun

TRAIN = (sys.executable, "-m", "distrib.train")
NEAR = {"float32": (1e-4, 1e-3), "tf32": (2e-3, 2e-2), "bf16": (1e-2, 1e-1)}
"""How far the first two losses may be from the host's, which has 7e-8 and 1.7e-5 between its own two ways to
convolve, and 2e-4 and 2e-3 with inputs rounded as TF32 rounds them."""
MEAN = 0.05
"""How far the mean loss of the host's steps may be: after some ten, rounding takes two runs apart, yet they
learn alike. Of 100 steps it is 0.004 between those two ways, 0.009 with rounded inputs."""
LIMIT = 240.0
WAIT = 120.0
"""Seconds for a run, and for the start and the end of one that is killed."""


def child_environment() -> dict[str, str]:
    return {**MPI_DEFAULTS, **os.environ}


def train(folder: Path, *more: str) -> dict[str, Any]:
    """A run: its losses, digest, speed, and what it said of graphs."""
    done = finish((*TRAIN, "--run-dir", str(folder), *more), child_environment(), LIMIT)
    if done.code:
        raise RuntimeError(
            f"{' '.join(more)} ended with code {done.code}:\n{done.out[-2000:]}{done.err[-2000:]}"
        )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "losses": [line["loss"] for line in lines if "loss" in line],
        "digest": summary["parameter_digest"],
        "images_per_second": summary["images_per_second"],
        "seconds": done.seconds,
        "without_graphs": "no CUDA graph" in done.out + done.err,
    }


def graph(options: argparse.Namespace) -> dict[str, Any]:
    """The default recipe in graphs, eagerly with the same plans, and its first steps on the host."""
    o = options
    common = (
        "--width",
        str(o.width),
        "--log-every",
        "1",
        "--checkpoint-every",
        "1000000",
        "--limit-test",
        "1000",
    )
    device = (*common, "--backend", o.backend, "--precision", o.precision, "--max-steps", str(o.steps))
    host = (*common, "--backend", "numpy", "--precision", "float32", "--max-steps", str(o.host_steps))
    with tempfile.TemporaryDirectory() as room:
        graphs, eager = Path(room, "graphs"), Path(room, "eager")
        runs = {"graphs": train(graphs, *device)}
        eager.mkdir()
        if (graphs / "plans.json").exists():
            shutil.copy(graphs / "plans.json", eager)
        runs["eager"] = train(eager, *device, "--no-cuda-graph")
        runs["host"] = train(Path(room, "host"), *host)
    return judged(runs, o.precision)


def judged(runs: dict[str, dict[str, Any]], precision: str) -> dict[str, Any]:
    """What `graph` prints: the comparisons, and what is wrong."""
    losses = {name: run.pop("losses") for name, run in runs.items()}
    length = len(losses["host"])
    means = {name: statistics.mean(each[:length]) for name, each in losses.items()}
    first, second = (abs(losses["graphs"][i] / losses["host"][i] - 1) for i in range(2))
    mean = abs(means["graphs"] / means["host"] - 1)
    wrong = {
        "graphs and eager steps end with different parameters": runs["graphs"]["digest"]
        != runs["eager"]["digest"],
        "graphs and eager steps have different losses": losses["graphs"] != losses["eager"],
        "there were no graphs": runs["graphs"]["without_graphs"],
        f"the first loss is {first:.2g} from the host's": not first <= NEAR[precision][0],
        f"the second loss is {second:.2g} from the host's": not second <= NEAR[precision][1],
        f"the mean loss of {length} steps is {mean:.2g} from the host's": not mean <= MEAN,
    }
    return {
        "wrong": [words for words, holds in wrong.items() if holds],
        "steps": len(losses["graphs"]),
        "losses_apart": [first, second, mean],
        "mean_losses": means,
        "first_losses": {name: each[:10] for name, each in losses.items()},
        "runs": runs,
    }


def until(condition: Callable[[], Any], what: str) -> float:
    """Wait; seconds that it took, RuntimeError after WAIT."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > WAIT:
            raise RuntimeError(f"not in {WAIT:g} s: {what}")
        time.sleep(0.05)
    return time.monotonic() - begin


def killed(options: argparse.Namespace) -> dict[str, Any]:
    """Kill rank 1 of two once it trains: the job ends, the verdict names it, nothing is left running."""
    o = options
    with tempfile.TemporaryDirectory() as room:
        folder = Path(room, "run")
        command = [*mpirun(2), *TRAIN, "--run-dir", str(folder), "--backend", o.backend, "--comm", o.comm]
        command += ["--width", str(o.width), "--epochs", "50", "--timeout", "20", "--log-every", "10"]
        with Path(room, "said").open("w+") as said:
            job = subprocess.Popen(
                command, env=child_environment(), stdout=said, stderr=said, start_new_session=True
            )
            try:
                pids = kill_one(folder, job, o.after)
                seconds = until(lambda: job.poll() is not None, "the job's end")
            finally:
                end(job)
                said.seek(0)
                last = said.read()[-2000:]
        verdict = finish((*DISTRIB, "verdict", "--ended", str(folder)), child_environment(), WAIT)
        failure = read_failure(folder) or {}
    wrong = {
        "the job ended as if nothing had happened": job.returncode in (0, 85),
        "the verdict is not rank 1": failure.get("rank") != 1,
        "a rank is left running": not all(map(is_dead, pids)),
    }
    return {
        "wrong": [words for words, holds in wrong.items() if holds],
        "code": job.returncode,
        "seconds_until_the_end": seconds,
        "verdict": (verdict.out + verdict.err).strip(),
        "said": last,
    }


def kill_one(folder: Path, job: subprocess.Popen, after: int) -> list[int]:
    """Kill rank 1 once both ranks are beyond step `after`; the ranks' processes."""

    def both_train() -> bool:
        if job.poll() is not None:
            raise RuntimeError(f"the job ended with code {job.returncode} before a rank was killed")
        beats = read_heartbeats(folder)
        return len(beats) == 2 and min(beat.step for beat in beats) > after

    until(both_train, f"both ranks beyond step {after}")
    pids = [beat.pid for beat in read_heartbeats(folder)]
    os.kill(pids[1], signal.SIGKILL)
    return pids


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of a command line, with the function to call as `check`."""
    parser = argparse.ArgumentParser(description="Checks of whole runs, for `distrib gpu-report`.")
    commands = parser.add_subparsers(required=True)
    for check in (graph, killed):
        command = commands.add_parser(check.__name__, help=check.__doc__)
        command.set_defaults(check=check)
        command.add_argument("--backend", default="numpy")
        command.add_argument("--width", type=float, default=1.0)
        if check is graph:
            command.add_argument("--precision", default="float32")
            command.add_argument("--steps", type=int, default=2000)
            command.add_argument("--host-steps", type=int, default=100)
        else:
            command.add_argument("--comm", default="mpi")
            command.add_argument("--after", type=int, default=20)
    return parser.parse_args(arguments)


def main() -> int:
    options = parse(sys.argv[1:])
    try:
        found = options.check(options)
    except RuntimeError as error:
        found = {"wrong": [str(error)]}
    print(json.dumps(found, indent=2))
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
