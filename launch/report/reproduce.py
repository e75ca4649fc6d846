"""`distrib reproduce`: all that the reference reports, run here, in one report beside its own figures.

Each run has a folder, named after its options: finished runs are skipped, interrupted runs resume.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from distrib.data import formats
from distrib.errors import EXIT_REQUEUE, UserError
from distrib.files import write_atomically
from distrib.run.console import on_terminal
from distrib.train import parse
from launch.entry import choice, number, one_process
from launch.machine import all_threads, child_environment, devices, require_torch
from launch.report.plots import make_folder
from launch.report.records import shown
from launch.report.reference import BATCH, PARTS, ROWS, Job, Settings, jobs, read_settings
from launch.report.reference_page import write_report
from launch.report.times import measure_times


def execute(job: Job, show: Callable[[int], None]) -> None:
    """Run a job to its end; Ctrl-C stops it with a checkpoint. UserError with its last words if it fails."""
    make_folder(job.folder.parent)
    log = job.folder.with_suffix(".log")
    threads = all_threads() if job.row.torch else 1
    with open(log, "ab") as file:
        earlier = file.tell()
        child = subprocess.Popen(
            job.command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=child_environment(threads),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            while child.poll() is None:
                show(job.step())
                time.sleep(0.5)
        except BaseException:
            child.send_signal(signal.SIGUSR1)
            try:
                child.wait(120)
            except subprocess.TimeoutExpired:
                child.kill()
            raise
    if child.returncode:
        said = log.read_bytes()[earlier:].decode(errors="replace")
        words = [line for line in said.splitlines() if line.startswith("distrib")]
        raise UserError(
            f"{job.folder.name} ended with code {child.returncode}: {words[-1] if words else 'no word'};"
            f" see {log}; give the same command to resume once the cause is gone"
        )


@one_process
def reproduce(
    only: Annotated[str | None, choice("--only", "A part alone.", *PARTS)] = None,
    epochs: Annotated[int, typer.Option(help="Epochs of each run.")] = 8,
    limit_train: Annotated[int | None, typer.Option(help="Use only the first N training images.")] = None,
    limit_test: Annotated[int | None, typer.Option(help="Use only the first N test images.")] = None,
    width: Annotated[float, typer.Option(help="Multiplier of all channel counts.")] = 1.0,
    seeds: Annotated[int, number("--seeds", "Runs of each line, with seeds 0, 1, 2, …")] = 1,
    ranks: Annotated[
        int | None,
        number(
            "--ranks", "Ranks of our runs.", show_default="one a core, 4 images each at least; on a GPU 1"
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of the runs and of the report; what it holds is not run again.")
    ] = Path("reproduce"),
    report_only: Annotated[
        bool, typer.Option("--report", help="Run nothing: write the report of what is there.")
    ] = False,
) -> None:
    """All that the reference reports: accuracies, ablation, loss curves, times, beside its own figures.

    With the reference's settings that is six runs, each more than half an hour on two cores. It can be
    stopped (Ctrl-C) and resumed by the same command, and run in parts. The report, OUT/report.html and
    OUT/report.md, holds the parts that were run, each with the settings it was last asked for with.

    Example: distrib reproduce --only ablation --epochs 1 --limit-train 10000
    """
    gpu = bool(devices())
    best = ranks or (1 if gpu else min(len(os.sched_getaffinity(0)), BATCH // 4))
    settings = Settings(epochs, limit_train, limit_test, width, seeds, best, "cupy" if gpu else "numpy")
    config = parse(settings.options(0))
    config.resolve(best, formats.load(None, limit_train))  # a mistake is told before anything runs
    path = out / "settings.json"
    stored = read_settings(path) if path.exists() else {}
    wanted = [only] if only else list(PARTS)
    if not report_only:
        if set(wanted) - {"ablation"}:
            require_torch("distrib reproduce, but for --only ablation")
        make_folder(out)
        stored |= dict.fromkeys(wanted, settings)
        write_atomically(
            path, json.dumps({part: asdict(each) for part, each in stored.items()}, indent=2).encode()
        )
        code = work(wanted, settings, out)
        if code:
            raise typer.Exit(code)
    if not stored:
        raise UserError(f"{out}: holds nothing yet: leave out --report")
    write_report(stored, out)
    parts = ", ".join(part for part in PARTS if part in stored)
    print(f"{shown(str(out / 'report.html'))} and {shown(str(out / 'report.md'))}: {parts}")


def work(parts: list[str], settings: Settings, out: Path) -> int:
    """Run what is missing; returns the exit code."""
    every: dict[Path, Job] = {
        job.folder: job for part in parts if part in ROWS for job in jobs(part, settings, out)
    }
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        disable=not on_terminal(),
    )
    for ending in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: the run must not go on alone
        signal.signal(ending, signal.default_int_handler)
    try:
        with bar:
            for number, job in enumerate(every.values(), 1):
                name = f"{number}/{len(every)} {job.row.name}, seed {job.seed}"
                if job.finished():
                    bar.console.print(f"{name}: there already") if bar.disable else None
                    continue
                if bar.disable:
                    steps = f"{settings.steps()} steps, from {job.step()}"
                    print(f"{name}: {steps}; distrib watch {shown(str(job.folder))} shows it", flush=True)
                task = bar.add_task(name, total=settings.steps(), completed=job.step())
                execute(job, lambda step, task=task: bar.update(task, completed=step))  # type: ignore[misc]
            if "time" in parts:
                task = bar.add_task("times", total=None)
                measure_times(settings, out, lambda way: bar.update(task, description=f"times: {way}"))
    except KeyboardInterrupt:
        print("distrib: stopped; the same command resumes it", file=sys.stderr)
        return EXIT_REQUEUE
    return 0
