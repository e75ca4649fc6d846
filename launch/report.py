"""`distrib report`: one page, or plots, for one run or a comparison of several."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from PIL import Image
from rich.progress import Progress

from distrib.console import on_terminal
from distrib.errors import UserError
from distrib.predict import probabilities
from launch.plots import figure, plain, render, save, shown, svg, write
from launch.runs import RunData, logits_of_test_images, read_run, smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WORST = 24
"""Wrongly classified digits that a page shows of each run."""

UNLIKE = ("label_smoothing", "shift", "rotate", "average")
"""Options with which training and test loss are not of the same kind."""

SUMMARY = {
    "test accuracy": ("test_accuracy", "{:.2f} %"),
    "test loss": ("test_loss", "{:.4f}"),
    "training accuracy": ("train_accuracy", "{:.2f} %"),
    "training loss": ("train_loss", "{:.4f}"),
    "epochs": ("epochs", "{}"),
    "steps": ("steps", "{:,}"),
    "ranks": ("world_size", "{}"),
    "backend": ("backend", "{}"),
    "communicator": ("communicator", "{}"),
    "images/s": ("images_per_second", "{:,.0f}"),
    "wall time, s": ("wall_seconds", "{:,.1f}"),
    "parameters": ("parameters", "{:,}"),
}


@dataclass
class Digits:
    """What a run's model says of the test images."""

    step: int  # after which
    confusion: np.ndarray  # (10, 10): images of digit i that were taken for j
    worst: list[dict[str, Any]]  # the surest mistakes first: index, label, said, probability, picture

    @property
    def per_class(self) -> list[tuple[int, int, float]]:
        """(digit, images, accuracy in percent)."""
        return [
            (digit, int(row.sum()), 100 * row[digit] / max(1, row.sum()))
            for digit, row in enumerate(self.confusion)
        ]


def digits(run: RunData) -> Digits | str:
    """Confusion matrix and mistakes of the run's last checkpoint; why not, where it has none or its data is gone."""
    try:
        logits, data, step = logits_of_test_images(run)
    except UserError as error:
        return str(error)
    labels, said = data.test_labels, logits.argmax(1)
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (labels, said), 1)
    probability = probabilities(logits.astype("float64"), run.config["loss"]).max(1)
    wrong = np.flatnonzero(said != labels)
    surest = wrong[np.argsort(-probability[wrong], kind="stable")][:WORST]
    worst = [
        {
            "index": int(i),
            "label": int(labels[i]),
            "said": int(said[i]),
            "probability": 100 * float(probability[i]),
            "picture": _picture(data.test_images[i]),
        }
        for i in surest
    ]
    return Digits(step, confusion, worst)


def _picture(image: np.ndarray) -> str:
    """A PNG in a data: address, black on white."""
    file = io.BytesIO()
    Image.fromarray(255 - image).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _loss(ax: Axes, runs: list[RunData]) -> None:
    for run in runs:
        epochs, values = run.curve("loss")
        (line,) = ax.plot(epochs, smooth(values), label=plain(run.name))
        if len(runs) == 1:
            ax.plot(
                epochs, np.maximum(values, 1e-7), color=line.get_color(), alpha=0.2, linewidth=0.6, zorder=1
            )
        epochs, values = run.by_epoch("test_loss")
        ax.plot(
            epochs,
            values,
            "o",
            color=line.get_color(),
            markersize=4,
            label="test" if len(runs) == 1 else None,
        )
    ax.set_yscale("log")
    ax.set(title="Loss (lines: training, smoothed; points: test)", xlabel="epoch")


def _accuracy(ax: Axes, runs: list[RunData]) -> None:
    for run in runs:
        epochs, values = run.by_epoch("test_accuracy")
        (line,) = ax.plot(epochs, values, marker="o", markersize=4, label=plain(run.name))
        epochs, values = run.by_epoch("train_accuracy")
        ax.plot(
            epochs,
            values,
            marker=".",
            linestyle=line.get_linestyle(),
            color=line.get_color(),
            alpha=0.4,
            linewidth=0.9,
        )
    ax.set(title="Accuracy, % (strong: test; pale: training)", xlabel="epoch")


def _rate(ax: Axes, runs: list[RunData]) -> None:
    for run in runs:
        ax.plot(*run.curve("lr"))
    ax.set(title="Learning rate", xlabel="epoch")
    ax.set_ylim(bottom=0)


def _throughput(ax: Axes, runs: list[RunData]) -> None:
    for run in runs:
        ax.plot(*run.curve("images_per_second"))
    ax.set(title="Images/s", xlabel="epoch")
    ax.set_ylim(bottom=0)


def _time(ax: Axes, runs: list[RunData]) -> None:
    timed = [(plain(run.name), parts) for run in runs if (parts := run.parts_ms())]
    left = np.zeros(len(timed))
    for part in ("compute", "communication", "data"):
        width = np.array([parts[part] for _, parts in timed])
        ax.barh([name for name, _ in timed], width, left=left, label=part)
        left += width
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    made: Any = ax.get_figure()
    made.legend(ncols=3, loc="outside lower center")
    ax.set(title="Where a step's time goes, ms (the first rank's clock)")


PLOTS: dict[str, tuple[str, Callable[[Any, list[RunData]], None]]] = {
    "loss": ("Training and test loss", _loss),
    "accuracy": ("Test and training accuracy", _accuracy),
    "rate": ("Learning rate", _rate),
    "throughput": ("Throughput", _throughput),
    "time": ("Where a step's time goes", _time),
}


def draw(runs: list[RunData], use: Callable[[Any, str, str], None]) -> None:
    """Make each plot and hand it to `use(figure, name, title)`."""
    for name, (title, plot) in PLOTS.items():
        if name == "time" and not any(run.parts_ms() for run in runs):
            continue
        height = max(2.2, 1.2 + 0.3 * len(runs)) if name == "time" else 3.0
        with figure(6.0, height) as (made, (ax,)):
            plot(ax, runs)
            if len(runs) > 1 and name in ("loss", "accuracy"):
                ax.legend(fontsize=7, ncols=2)
            use(made, name, title)


def rows(
    runs: list[RunData], part: Callable[[RunData], dict[str, Any]], differing: bool
) -> list[tuple[str, list[str]]]:
    """(name, value of each run), all of them or only those that differ between runs."""
    names = list(dict.fromkeys(name for run in runs for name in part(run)))
    found = [
        (name, ["–" if (value := part(run).get(name)) is None else str(value) for run in runs])
        for name in names
    ]
    return [row for row in found if not differing or len(set(row[1])) > 1]


def page(runs: list[RunData], progress: Callable[[str], None] = lambda _: None) -> str:
    """The whole page, self-contained."""

    def figure_of(run: RunData, field: str, form: str) -> str:
        value = run.summary.get(field)
        value = run.last.get(field) if value is None else value
        return "–" if value is None else form.format(value)

    plots: list[str] = []
    draw(runs, lambda made, _, title: plots.append(svg(made, title)))
    details = []
    for run in runs:
        progress(run.name)
        details.append((run, digits(run)))
    return render(
        "report.html.j2",
        runs=runs,
        plots=plots,
        details=details,
        summary=[(label, [figure_of(run, *what) for run in runs]) for label, what in SUMMARY.items()],
        parts=[(run.name, run.parts_ms()) for run in runs],
        config=rows(runs, lambda run: run.config, differing=False),
        unlike=[run.name for run in runs if any(run.config[name] for name in UNLIKE)],
        differences=rows(
            runs, lambda run: {k: v for k, v in run.config.items() if k != "run_dir"}, differing=True
        ),
        environment=rows(runs, lambda run: run.environment, differing=False),
    )


def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="Folders of runs; several are compared.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The page, or with --png the folder of the plots.",
            show_default="RUN/report.html, or report.html for several; RUN/plots, or plots",
        ),
    ] = None,
    png: Annotated[bool, typer.Option("--png", help="Write the plots alone, as PNG files.")] = False,
) -> None:
    """A page for one run, or for a comparison of several: curves, tables, and the digits that were taken for others.

    Self-contained, without JavaScript, fit for a phone and for print; also of a run that is still going on.

    Examples:

      distrib report runs/first

      distrib report runs/a runs/b --out comparison.html
    """
    runs = [read_run(folder) for folder in folders]
    if not any(run.steps or run.epochs for run in runs):
        raise UserError(f"{folders[0]}: nothing was logged yet (metrics.jsonl): wait for its first steps")
    names = [run.name for run in runs]
    for run in runs:  # of runs in folders of one name, the whole path tells
        if names.count(run.name) > 1:
            run.name = shown(str(run.path))
    home = runs[0].path if len(runs) == 1 else Path()
    if png:
        folder = out or home / "plots"
        draw(runs, lambda made, name, _: save(made, folder / f"{name}.png"))
        print(f"{folder}: {len(list(folder.glob('*.png')))} plots")
        return
    with Progress(disable=not on_terminal(), transient=True) as bar:
        task = bar.add_task("looking at digits", total=len(runs))
        text = page(
            runs, lambda name: bar.update(task, advance=1, description=f"looking at digits of {name}")
        )
    path = out or home / "report.html"
    write(path, text)
    print(f"{path}: {len(runs)} run(s), {len(text) / 1e6:.1f} MB")
