"""The report of `distrib reproduce`: tables beside the reference's figures, and the training losses."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distrib.files import write
from launch.machine import machine
from launch.report.plots import figure, render, save, svg
from launch.report.reference import ROWS, Row, Settings, jobs
from launch.report.runs import RunData, read_run, smooth
from launch.report.times import read_times, time_table, times_path


def spread(values: list[float], form: str = "{:.2f}") -> str:
    """One value, or mean (least–most)."""
    if not values:
        return "–"
    mean = form.format(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ({form.format(min(values))}–{form.format(max(values))})"


def tables(stored: dict[str, Settings], out: Path) -> list[dict[str, Any]]:
    """What the report's tables say, of the parts that were run: title, note, heads, rows."""
    found = []
    for part, title, heads in (
        ("accuracy", "Accuracy, %", ["training", "test", "reference: training", "reference: test"]),
        ("ablation", "Ablation: test accuracy, %", ["here", "reference"]),
    ):
        if part in stored:
            runs = finished_runs(part, stored[part], out)
            rows = [(row.label, accuracies(row, runs[row.name], part)) for row in ROWS[part]]
            note = stored[part].say()
            if part == "accuracy":
                note += "; training: while it was trained on, over the last epoch"
            found.append({"title": title, "note": note, "heads": heads, "rows": rows})
    if "time" in stored and (path := times_path(stored["time"], out)).exists():
        found.append(time_table(stored["time"], read_times(path)))
    return found


def finished_runs(part: str, settings: Settings, out: Path) -> dict[str, list[RunData]]:
    """The runs of a part that have a result, by the name of the row."""
    found: dict[str, list[RunData]] = {row.name: [] for row in ROWS[part]}
    for job in jobs(part, settings, out):
        if job.finished():
            found[job.row.name].append(read_run(job.folder))
    return found


def accuracies(row: Row, runs: list[RunData], part: str) -> list[str]:
    """The cells of a row: ours, then the reference's."""
    test, train = (
        spread([value for run in runs if (value := run.summary.get(name)) is not None])
        for name in ("test_accuracy", "train_accuracy")
    )
    if part == "ablation":
        return [test, f"{row.test:.2f}"]
    return [train, test, f"{row.train:.2f}", f"{row.test:.2f}"]


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
    """Write OUT/report.html, and the same as OUT/report.md with OUT/curves.png."""
    found, plots = tables(stored, out), []
    if "curves" in stored and any(job.finished() for job in jobs("curves", stored["curves"], out)):
        draw_curves(stored["curves"], out, lambda made, title: plots.append((title, svg(made, title))))
        draw_curves(stored["curves"], out, lambda made, _: save(made, out / "curves.png"))
    parts = [markdown(table) for table in found]
    parts += [f"### {title}\n\n![training loss](curves.png)\n" for title, _ in plots]
    write(out / "report.md", "\n".join(parts))
    write(out / "report.html", render("reproduce.html.j2", tables=found, plots=plots, machine=machine()))


def markdown(table: dict[str, Any]) -> str:
    """A table of the report."""
    heads = ["", *table["heads"]]
    rows = [heads, ["---"] * len(heads), *([label, *values] for label, values in table["rows"])]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"### {table['title']}", "", *lines, "", table["note"] + ".", ""])
