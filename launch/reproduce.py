"""`distrib reproduce`: all that the reference reports, run here, in one report beside its own figures.

The reference is a CuPy and NumPy implementation of the same network; its figures are those of single runs on
an H800 GPU, its NumPy one with loops on an 11th-generation i9. Each run has a folder, named after its
options: what is there is not run again, what was stopped is resumed.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from distrib.data import idx as mnist
from distrib.data import sampler
from distrib.errors import EXIT_REQUEUE, UserError
from distrib.files import fits, open_to_read, read_json, write_atomically
from distrib.run.console import on_terminal
from distrib.train import parse
from launch.bench_run import mpirun
from launch.doctor import devices
from launch.entry import one_process
from launch.measure import child_environment, machine, require_torch
from launch.plots import figure, make_folder, render, save, svg, write
from launch.records import brief, is_figure, line_of, read_summary, shown
from launch.runs import RunData, read_run, smooth

PARTS = ("accuracy", "ablation", "curves", "time")
BATCH, RATE = 8, 1e-3


@dataclass(frozen=True)
class Row:
    """A line of the reference's tables: a run of ours, or of PyTorch."""

    name: str
    label: str
    options: tuple[str, ...]
    test: float  # the reference's accuracies, percent
    train: float | None = None
    torch: bool = False


SGD, ADAM = ("--optimizer", "sgd"), ("--optimizer", "adam")
TORCH = Row("torch-adam", "PyTorch (Adam)", ADAM, 99.38, 99.67, torch=True)
OURS_SGD = Row("baseline-sgd", "ours (SGD)", SGD, 99.21, 99.46)
OURS_ADAM = Row("baseline-adam", "ours (Adam)", ADAM, 99.43, 99.65)
ROWS = {
    "accuracy": (TORCH, OURS_SGD, OURS_ADAM),
    "ablation": (
        replace(OURS_SGD, label="baseline: residual added, 2 blocks, max pooling (SGD)"),
        Row("avgpool-sgd", "variant 1: average pooling (SGD)", ("--variant", "avgpool", *SGD), 99.46),
        Row(
            "conv-shortcut-sgd",
            "variant 2: residual through a convolution (SGD)",
            ("--variant", "conv-shortcut", *SGD),
            99.19,
        ),
        Row(
            "three-blocks-sgd",
            "variant 3: the same, 3 blocks (SGD)",
            ("--variant", "three-blocks", *SGD),
            99.20,
        ),
        replace(OURS_ADAM, label="variant 4: baseline (Adam)"),
    ),
    "curves": (TORCH, OURS_SGD, OURS_ADAM),
}
SECONDS = {"plain loop": 48994.08, "cupy": 1508.85, "torch": 203.93}
"""The reference's seconds of a training run: NumPy with loops, CuPy, PyTorch."""


@dataclass(frozen=True)
class Settings:
    """How long the runs of a part are: all options that its result depends on, besides the row's own."""

    epochs: int = 8
    limit_train: int | None = None
    limit_test: int | None = None
    width: float = 1.0
    seeds: int = 1
    ranks: int = 1
    backend: str = "numpy"

    def options(self, seed: int) -> list[str]:
        """For `distrib train`."""
        given = {
            "epochs": self.epochs,
            "batch-size": BATCH,
            "lr": RATE,
            "width": self.width,
            "seed": seed,
            "backend": self.backend,
            "limit-train": self.limit_train,
            "limit-test": self.limit_test,
        }
        return [
            text for name, value in given.items() if value is not None for text in (f"--{name}", str(value))
        ]

    def steps(self) -> int:
        """Of one run."""
        return self.epochs * sampler.steps_per_epoch(self.limit_train or mnist.TRAINING_IMAGES, BATCH)

    def say(self) -> str:
        """For people."""
        images = f"{self.limit_train or mnist.TRAINING_IMAGES:,} training images"
        few = f", {self.limit_test:,} test images" if self.limit_test else ""
        how = f"batch {BATCH}, rate {RATE:g}, width {self.width:g}, {self.seeds} seed(s)"
        return f"{self.epochs} epoch(s) of {images}{few}, {how}"


@dataclass(frozen=True)
class Job:
    """One training run: where it lies, and what starts it."""

    row: Row
    settings: Settings
    seed: int
    folder: Path
    command: list[str]

    def finished(self) -> bool:
        """Whether it has its result."""
        path = self.folder / "summary.json"
        return path.exists() and bool(read_summary(path)["finished"])

    def step(self) -> int:
        """Steps done, by the last line of metrics.jsonl."""
        with suppress(OSError, IndexError), open_to_read(self.folder / "metrics.jsonl") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 1000))
            return (line_of(file.read(1000).splitlines()[-1]) or {}).get("step", 0)
        return 0


def all_threads() -> int:
    """Of a process that has the machine for itself: OMP_NUM_THREADS, else all its cores."""
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def key(values: Any) -> str:
    """A short name for these values."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]


def jobs(part: str, settings: Settings, out: Path) -> list[Job]:
    """The runs of a part. The number of ranks changes only the speed, so it is no part of a run's name."""
    found = []
    for row in ROWS[part]:
        for seed in range(settings.seeds):
            options = [*row.options, *settings.options(seed)]
            folder = out / "runs" / f"{row.name}-seed{seed}-{key([row.torch, options])}"
            launcher = [mpirun(), "-n", str(settings.ranks)] if settings.ranks > 1 and not row.torch else []
            module = "launch.torch_train" if row.torch else "distrib.train"
            found.append(
                Job(
                    row,
                    settings,
                    seed,
                    folder,
                    [
                        *launcher,
                        sys.executable,
                        "-m",
                        module,
                        "--run-dir",
                        str(folder),
                        "--log-every",
                        "10",
                        *options,
                    ],
                )
            )
    return found


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


def times_path(settings: Settings, out: Path) -> Path:
    """Where the times of this machine are kept."""
    return (
        out / f"time-{key([settings.width, settings.ranks, all_threads(), machine(), bool(devices())])}.json"
    )


def measure_times(settings: Settings, out: Path, show: Callable[[str], None]) -> None:
    """Images/s of each way to train at batch 8, by `distrib bench step`; kept in OUT, and measured once."""
    threads, path = all_threads(), times_path(settings, out)
    if path.exists():
        return
    common = ["bench", "step", "--batch-size", str(BATCH), "--width", str(settings.width), "--json"]
    ways: dict[str, tuple[list[str], list[str], int]] = {
        "plain loop": ([], ["--against", "loop", "--steps", "1", "--repeats", "3"], threads),
        "vectorised": ([], ["--against", "torch", "--repeats", "5"], threads),
    }
    if settings.ranks > 1:
        ways[f"vectorised, {settings.ranks} ranks"] = (
            [mpirun(), "-n", str(settings.ranks)],
            ["--repeats", "5"],
            1,
        )
    if devices():
        ways["cupy"] = ([], ["--backend", "cupy", "--against", "torch", "--repeats", "5"], threads)
    found: dict[str, Any] = {"machine": machine(), "images_per_second": {}, "commands": {}}
    for way, (launcher, options, count) in ways.items():
        show(way)
        # the host's ways stay on the host where there is a GPU, too
        backend = [] if way == "cupy" else ["--backend", "numpy"]
        command = [*launcher, sys.executable, "-m", "launch.cli", *common, *options, *backend]
        done = subprocess.run(
            command, env=child_environment(count), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise UserError(
                f"{way}: distrib {' '.join([*common, *options])} ended with code {done.returncode}:"
                f" {(done.stderr.strip() or 'no word').splitlines()[-1]}"
            )
        rates = json.loads(done.stdout)["images_per_second"]
        own, others = rates.pop("distrib"), rates
        best = max(others, key=lambda name: statistics.median(others[name]), default=None)
        if way == "plain loop":
            found["images_per_second"][way] = others["plain loop"]
        else:
            found["images_per_second"][way] = own
            if best:
                found["images_per_second"]["PyTorch on the GPU" if way == "cupy" else "PyTorch"] = others[
                    best
                ]
        start = f"mpirun -n {settings.ranks} " if launcher else f"OMP_NUM_THREADS={count} "
        found["commands"][way] = f"{start}distrib {' '.join([*common[:-1], *options, *backend])}"
    write_atomically(path, json.dumps(found, indent=2).encode())


def spread(values: list[float], form: str = "{:.2f}") -> str:
    """One value, or mean (least–most)."""
    if not values:
        return "–"
    mean = form.format(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ({form.format(min(values))}–{form.format(max(values))})"


def tables(stored: dict[str, Settings], out: Path) -> list[dict[str, Any]]:
    """What the report's tables say, of the parts that were run: title, note, heads, rows."""
    found = []
    for part, title in (("accuracy", "Accuracy, %"), ("ablation", "Ablation: test accuracy, %")):
        if part not in stored:
            continue
        rows = []
        for row in ROWS[part]:
            runs = [
                read_run(job.folder)
                for job in jobs(part, stored[part], out)
                if job.row.name == row.name and job.finished()
            ]
            test, train = (
                spread([value for run in runs if (value := run.summary.get(name)) is not None])
                for name in ("test_accuracy", "train_accuracy")
            )
            rows.append(
                (
                    row.label,
                    [train, test, f"{row.train:.2f}", f"{row.test:.2f}"]
                    if part == "accuracy"
                    else [test, f"{row.test:.2f}"],
                )
            )
        heads = (
            ["training", "test", "reference: training", "reference: test"]
            if part == "accuracy"
            else ["here", "reference"]
        )
        note = stored[part].say() + (
            "; training: while it was trained on, over the last epoch" if part == "accuracy" else ""
        )
        found.append({"title": title, "note": note, "heads": heads, "rows": rows})
    if "time" in stored and (path := times_path(stored["time"], out)).exists():
        found.append(time_table(stored["time"], read_times(path)))
    return found


def read_times(path: Path) -> dict[str, Any]:
    """What `measure_times` wrote; UserError where it is something else."""
    found = read_json(path, remedy="remove it, to measure again")
    rates, commands = found.get("images_per_second"), found.get("commands")
    sound = isinstance(rates, dict) and isinstance(commands, dict) and isinstance(found.get("machine"), str)
    sound = sound and all(isinstance(text, str) for text in dict(commands or {}).values())
    for each in dict(rates or {}).values() if sound else ():
        sound = sound and isinstance(each, list) and bool(each) and all(is_figure(x) and x > 0 for x in each)
    if not sound:
        raise UserError(f"{path}: holds no times of this program: remove it, to measure again")
    rates, commands = dict(rates or {}), dict(commands or {})
    return {
        "machine": shown(found["machine"]),
        "images_per_second": {shown(way): each for way, each in rates.items()},
        "commands": {way: shown(text) for way, text in commands.items()},
    }


def read_settings(path: Path) -> dict[str, Settings]:
    """The parts that were asked for before, with their settings; UserError where somebody damaged them."""
    kinds = {each.name: str(each.type) for each in fields(Settings)}
    found = {}
    for part, values in read_json(path, remedy="restore it, or give another --out").items():
        sound = part in PARTS and isinstance(values, dict) and values.keys() == kinds.keys()
        if not (sound and all(fits(kinds[name], value) for name, value in values.items())):
            raise UserError(f"{path}: holds no settings of {brief(part)}: restore it, or give another --out")
        found[part] = Settings(**values)
        if min(found[part].epochs, found[part].seeds, found[part].ranks) < 1:
            raise UserError(f"{path}: a number of {part} is below 1: restore it, or give another --out")
    return found


def time_table(settings: Settings, measured: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a whole run by each way, extrapolated from a few steps."""
    images = settings.epochs * (settings.limit_train or mnist.TRAINING_IMAGES)
    names = {
        "plain loop": "NumPy, convolutions as plain loops",
        "vectorised": "NumPy, one process",
        "cupy": "CuPy",
    }
    rows = []
    for way, rates in measured["images_per_second"].items():
        reference = SECONDS.get("torch" if way.startswith("PyTorch") else way)
        seconds = [images / rate for rate in rates]
        rows.append(
            (
                names.get(way, way.replace("vectorised", "NumPy")),
                [
                    f"{statistics.median(rates):,.4g}",
                    f"{statistics.median(seconds):,.0f} ({min(seconds):,.0f}–{max(seconds):,.0f})",
                    f"{reference:,.0f}" if reference else "–",
                ],
            )
        )
    note = (
        f"{settings.epochs} epoch(s), {images:,} images in all, batch {BATCH}, extrapolated from a few"
        f" steps (of the plain loops one at a time); median (least–most); {measured['machine']};"
        f" by {'; '.join(measured['commands'].values())}"
    )
    return {
        "title": "Seconds of training",
        "note": note,
        "heads": ["images/s", "seconds", "reference: seconds"],
        "rows": rows,
    }


def draw_curves(settings: Settings, out: Path, use: Callable[[Any, str], None]) -> None:
    """Training loss as the reference draws it: PyTorch, ours with SGD, ours with Adam, all together."""
    runs: dict[str, RunData] = {}
    for job in jobs("curves", settings, out):
        if job.seed == 0 and job.finished():
            runs[job.row.label] = read_run(job.folder)
    with figure(13.0, 3.0, columns=len(runs) + 1) as (made, axes):
        for number, (label, run) in enumerate(runs.items()):
            epochs, values = run.curve("loss")
            for ax in (axes[number], axes[-1]):
                ax.plot(epochs, smooth(values), color=f"C{number}", label=label)
            axes[number].plot(epochs, values, color=f"C{number}", alpha=0.2, linewidth=0.6)
            axes[number].set(title=label, ylabel="training loss" if number == 0 else None)
        axes[-1].set(title="Comparison, smoothed")
        axes[-1].legend()
        for ax in axes:
            ax.set(xlabel="epoch", yscale="log")
            ax.set_ylim(1e-5, 4)
        use(made, f"Training loss; {settings.say()}")


def write_report(stored: dict[str, Settings], out: Path) -> None:
    """OUT/report.html, the same as OUT/report.md with OUT/curves.png."""
    found, plots = tables(stored, out), []
    if "curves" in stored and any(job.finished() for job in jobs("curves", stored["curves"], out)):
        draw_curves(stored["curves"], out, lambda made, title: plots.append((title, svg(made, title))))
        draw_curves(stored["curves"], out, lambda made, _: save(made, out / "curves.png"))
    text = []
    for table in found:
        lines = [
            ["", *table["heads"]],
            ["---"] * (1 + len(table["heads"])),
            *([label, *values] for label, values in table["rows"]),
        ]
        text += [
            f"### {table['title']}",
            "",
            *(f"| {' | '.join('–' if v is None else str(v) for v in line)} |" for line in lines),
            "",
            table["note"] + ".",
            "",
        ]
    text += [f"### {title}\n\n![training loss](curves.png)\n" for title, _ in plots]
    write(out / "report.md", "\n".join(text))
    write(out / "report.html", render("reproduce.html.j2", tables=found, plots=plots, machine=machine()))


@one_process
def reproduce(
    only: Annotated[
        str | None, typer.Option(help="A part alone: accuracy, ablation, curves or time.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Epochs of each run.")] = 8,
    limit_train: Annotated[int | None, typer.Option(help="Use only the first N training images.")] = None,
    limit_test: Annotated[int | None, typer.Option(help="Use only the first N test images.")] = None,
    width: Annotated[float, typer.Option(help="Multiplier of all channel counts.")] = 1.0,
    seeds: Annotated[int, typer.Option(help="Runs of each line, with seeds 0, 1, 2, …")] = 1,
    ranks: Annotated[
        int | None,
        typer.Option(
            help="Ranks of our runs.", show_default="one a core, 4 images each at least; on a GPU 1"
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
    if only not in (None, *PARTS):
        raise UserError(f"--only {only}: choose one of {', '.join(PARTS)}")
    if min(seeds, ranks or 1) < 1:
        raise UserError("--seeds and --ranks: give 1 or more")
    gpu = bool(devices())
    best = ranks or (1 if gpu else min(len(os.sched_getaffinity(0)), BATCH // 4))
    settings = Settings(epochs, limit_train, limit_test, width, seeds, best, "cupy" if gpu else "numpy")
    config = parse(settings.options(0))
    config.resolve(best, mnist.TRAINING_IMAGES, 10_000)  # a mistake is told before anything runs
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
