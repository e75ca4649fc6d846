"""`make demo-kill`: the demo on four ranks, of which two are killed; it shows that this changes nothing.

Run it as `python -m launch.demo_kill`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO

import typer

from distrib.errors import UserError
from distrib.faults import survived
from distrib.faults.heartbeat import read_heartbeats
from distrib.files import read_json
from distrib.train import run_app
from launch.machine import child_environment, mpirun, refuse_launcher
from launch.report.runs import read_run

DEATHS = ((0, 140), (2, 280))
"""(rank, logged step after which it is killed), of 469 steps."""

LIMIT = 600
"""Seconds that a run may take on a very slow machine."""


def demo_kill() -> None:
    """Train the demo on four ranks, kill two of them, and compare the result with that of a quiet run."""
    refuse_launcher("make demo-kill")
    place = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-demo-kill"
    print("kill -9 of two of four ranks, rank 0 among them:", flush=True)
    killed = train(place, ["--with-ft", "ulfm"], ["--elastic"], DEATHS)
    print("\nthe same without a death:", flush=True)
    quiet = train(place.with_name(f"{place.name}-quiet"), [], [], ())
    print()
    for entry in survived.read(place):
        print(f"{survived.line(entry)}: {entry['seconds']:.2f} s lost")
    same = killed == quiet
    print(f"digest of the parameters: {killed[:16]}… and {quiet[:16]}…: {'equal' if same else 'DIFFERENT'}")
    if not same:
        raise typer.Exit(1)


def train(folder: Path, launcher: list[str], options: list[str], deaths: Iterable[tuple[int, int]]) -> str:
    """A run of the demo on four ranks, of which some die; returns the digest of its parameters."""
    command = [*mpirun(4), *launcher, sys.executable, "-m", "distrib.train", "--recipe", "demo"]
    command += ["--reproducible", "--backend", "numpy", "--run-dir", str(folder), *options]
    with subprocess.Popen(
        command, env=child_environment(1), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        assert child.stdout
        reader = threading.Thread(target=forward, args=(child.stdout,), daemon=True)
        reader.start()
        try:
            for rank, step in deaths:
                kill(folder, rank, step, child)
            child.wait(LIMIT)
        finally:
            child.terminate()
        reader.join(5)
    if child.returncode:
        raise UserError(f"{folder}: the run ended with exit code {child.returncode}: see its lines above")
    return str(read_json(folder / "summary.json")["parameter_digest"])


def kill(folder: Path, rank: int, step: int, child: subprocess.Popen[str]) -> None:
    """Kill a rank once `step` is logged."""
    while child.poll() is None:
        with suppress(OSError, UserError):
            if read_run(folder).log.last_step >= step:
                break
        time.sleep(0.05)
    for beat in read_heartbeats(folder):
        if beat.rank == rank and child.poll() is None:
            print(f"kill -9 {beat.pid}    # rank {rank}, at step {beat.step}", flush=True)
            os.kill(beat.pid, signal.SIGKILL)


def forward(lines: IO[str]) -> None:
    """Print a run's lines, without those that Open MPI prints of each sum that a death cuts short."""
    for line in lines:
        if not line.startswith("NBC_Progress") and line.startswith(
            ("epoch", "finished", "rank ", "distrib:")
        ):
            print(line, end="", flush=True)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(demo_kill)
    sys.exit(run_app(app))
