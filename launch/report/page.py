"""`distrib report`: one page, or plots, for one run or a comparison of several."""

from __future__ import annotations

import base64
import io
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from PIL import Image
from rich.markup import escape
from rich.progress import Progress

from distrib.data.sampler import Augmentation
from distrib.errors import UserError
from distrib.files import printable, write
from distrib.predict import probabilities
from distrib.run.console import on_terminal
from launch.entry import one_process
from launch.report.plots import figure, logarithmic, plain, render, save, svg
from launch.report.records import shown
from launch.report.runs import PARTS, POINTS, RunData, logits_of_test_images, read_run, smooth
from launch.report.timeline import timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_CLASSES = 20
"""Classes of which a page shows a confusion matrix; of more, the ones that are mixed up most."""

WORST = 24
"""Wrongly classified digits that a page shows of each run."""

COLUMNS, COMPUTED, LEGEND, BARS = 4, 8, 21, 30
"""Most runs with a column each; whose models are run for digits; with a line in a legend; with a bar."""

UNLIKE = ("label_smoothing", *Augmentation._fields, "average")
"""Options with which training and test loss are not of the same kind."""

SHOWN_DEATHS = 50
"""Ranks of a run that died, of which a page tells."""

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
class Answers:
    """What a run's model says of the test images."""

    step: int  # after which
    names: tuple[str, ...]  # of the classes
    confusion: np.ndarray  # (classes, classes): images of class i that were taken for j
    worst: list[dict[str, Any]]  # the surest mistakes first: index, label, said, probability, picture

    @property
    def per_class(self) -> list[tuple[str, int, int, float]]:
        """(name, images, wrong ones, accuracy in percent); of many classes those with the lowest accuracy."""
        found = [
            (name, int(row.sum()), int(row.sum() - row[i]), 100 * row[i] / max(1, row.sum()))
            for i, (name, row) in enumerate(zip(self.names, self.confusion, strict=True))
        ]
        return found if self.few else sorted(found, key=lambda each: each[-1])[:MOST_CLASSES]

    @property
    def few(self) -> bool:
        """Whether a page can show every class."""
        return len(self.names) <= MOST_CLASSES

    @property
    def mixed_up(self) -> list[tuple[str, str, int]]:
        """(class, taken for, images): what happened most often."""
        wrong = self.confusion - np.diag(np.diag(self.confusion))
        order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_CLASSES].tolist()
        pairs = [divmod(each, len(self.names)) for each in order]
        return [(self.names[i], self.names[j], int(wrong[i, j])) for i, j in pairs if wrong[i, j]]


def answers(run: RunData, compute: bool = True) -> Answers | str:
    """Confusion matrix and mistakes of the last checkpoint, or why not: there is none, or no data."""
    try:
        logits, data, step = logits_of_test_images(run, compute)
    except (UserError, OSError) as error:
        return printable(str(error))
    images, labels, said, names = data.test_images, data.test_labels, logits.argmax(1), data.class_names
    confusion = np.zeros((data.classes, data.classes), int)
    np.add.at(confusion, (labels, said), 1)
    probability = probabilities(logits.astype("float64"), run.config["loss"]).max(1)
    wrong = np.flatnonzero(said != labels)
    surest = wrong[np.argsort(-probability[wrong], kind="stable")][:WORST]
    worst = [
        {
            "index": int(i),
            "label": names[labels[i]],
            "said": names[said[i]],
            "probability": 100 * float(probability[i]),
            "picture": _picture(images[i]),
        }
        for i in surest
    ]
    return Answers(step, names, confusion, worst)


def _picture(image: np.ndarray) -> str:
    """A PNG in a data: address; of one channel black on white."""
    file = io.BytesIO()
    shown = 255 - image[..., 0] if image.shape[2] in (1, 2) else image[..., :3]
    Image.fromarray(np.ascontiguousarray(shown)).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def held_out(runs: list[RunData]) -> str:
    """On what the epochs of these runs report."""
    return " or ".join(sorted({run.held_out for run in runs}))


def _loss(ax: Axes, runs: list[RunData]) -> None:
    most = points_of(runs)
    for run in runs:
        epochs, values = run.curve("loss", most)
        (line,) = ax.plot(epochs, smooth(values), label=label_of(run, runs))
        if len(runs) == 1:
            pale = np.maximum(values, 1e-7)
            ax.plot(epochs, pale, color=line.get_color(), alpha=0.2, linewidth=0.6, zorder=1)
        epochs, values = run.by_epoch(f"{run.held_out}_loss", most)
        label = run.held_out if len(runs) == 1 else None
        ax.plot(epochs, values, "o", color=line.get_color(), markersize=4, label=label)
    logarithmic(ax)
    ax.set(title=f"Loss (lines: training, smoothed; points: {held_out(runs)})", xlabel="epoch")


def _accuracy(ax: Axes, runs: list[RunData]) -> None:
    most = points_of(runs)
    for run in runs:
        epochs, values = run.by_epoch(f"{run.held_out}_accuracy", most)
        (line,) = ax.plot(epochs, values, marker="o", markersize=4, label=label_of(run, runs))
        look: dict[str, Any] = {"linestyle": line.get_linestyle(), "color": line.get_color()}
        epochs, values = run.by_epoch("train_accuracy", most)
        ax.plot(epochs, values, marker=".", alpha=0.4, linewidth=0.9, **look)
    ax.set(title=f"Accuracy, % (strong: {held_out(runs)}; pale: training)", xlabel="epoch")
    ax.set_xlim(left=0)


def _rate(ax: Axes, runs: list[RunData]) -> None:
    for run in runs:
        ax.plot(*run.curve("lr", points_of(runs)))
    ax.set(title="Learning rate", xlabel="epoch")
    ax.set_ylim(bottom=0)


def _throughput(ax: Axes, runs: list[RunData]) -> None:
    for run in runs:
        ax.plot(*run.curve("images_per_second", points_of(runs)))
    ax.set(title="Images/s", xlabel="epoch")
    ax.set_ylim(bottom=0)


def label_of(run: RunData, runs: list[RunData]) -> str:
    """A run's name, shortened for a legend; numbered where another is shortened to the same."""
    label = plain(run.name)
    alike = [each for each in runs if plain(each.name) == label] if len(runs) <= BARS else [run]
    return label if len(alike) == 1 else f"{alike.index(run) + 1}: {label}"


def points_of(runs: list[RunData]) -> int:
    """Points of a run's curve: together at most as many as of LEGEND runs."""
    return max(20, min(2 * POINTS, LEGEND * POINTS // len(runs)))


def _time(ax: Axes, runs: list[RunData]) -> None:
    timed = [(label_of(run, runs), parts) for run in runs if (parts := run.parts_ms())]
    title = "Where a step's time goes, ms (the first rank's clock)"
    if len(timed) > BARS:
        title = f"Where a step's time goes, ms (the first {BARS} of {len(timed)} runs)"
    timed = timed[:BARS]
    left, places = np.zeros(len(timed)), np.arange(len(timed))
    for part in PARTS:
        width = np.array([parts[part] for _, parts in timed])
        ax.barh(places, width, left=left, label=part)
        left += width
    ax.set_yticks(places, [name for name, _ in timed], fontsize=7)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    made: Any = ax.get_figure()
    made.legend(ncols=3, loc="outside lower center")
    made.suptitle(title, x=0.01, ha="left", fontsize=10)  # above the names too: they may be long


PLOTS: dict[str, tuple[str, Callable[[Any, list[RunData]], None]]] = {
    "loss": ("Training and test loss", _loss),
    "accuracy": ("Test and training accuracy", _accuracy),
    "rate": ("Learning rate", _rate),
    "throughput": ("Throughput", _throughput),
    "time": ("Where a step's time goes", _time),
}


def draw(runs: list[RunData], use: Callable[[Any, str, str], None]) -> None:
    """Make each plot and hand it to `use(figure, name, title)`."""
    timed = sum(run.parts_ms() is not None for run in runs)
    named = 1 < len(runs) <= LEGEND
    for name, (title, plot) in PLOTS.items():
        if name == "time" and not timed:
            continue
        legend = named and name in ("loss", "accuracy")
        height = max(2.2, 1.2 + 0.3 * min(timed, BARS)) if name == "time" else 3.0
        with figure(6.0, height + (0.2 + 0.16 * -(-len(runs) // 2) if legend else 0)) as (made, (ax,)):
            plot(ax, runs)
            if legend:  # below, where names of any length cover no curve
                made.legend(fontsize=7, ncols=2, loc="outside lower center")
            use(made, name, title)


Rows = list[tuple[str, list[str]]]


def rows(runs: list[RunData], part: Callable[[RunData], dict[str, Any]]) -> Rows:
    """(name, value of each run) of whatever any of them has."""
    names = list(dict.fromkeys(name for run in runs for name in part(run)))
    values = [[part(run).get(name) for run in runs] for name in names]
    return [
        (name, ["–" if value is None else printable(str(value), 100) for value in each])
        for name, each in zip(names, values, strict=True)
    ]


@dataclass
class Table:
    """A table of a page: a column for each run, or of more than COLUMNS runs a line for each."""

    first: str
    heads: list[str]
    rows: Rows

    @classmethod
    def of(cls, runs: list[RunData], found: Rows, first: str = "") -> Table:
        names = [run.name for run in runs]
        if len(runs) <= COLUMNS:
            return cls(first, names, found)
        turned = [(name, [values[i] for _, values in found]) for i, name in enumerate(names)]
        return cls("run", [name for name, _ in found], turned)


def same_and_other(runs: list[RunData], found: Rows, first: str) -> list[Table]:
    """What is the same in all runs, in one column, and what is not; of a single run all in one."""
    if len(runs) == 1:
        return [Table.of(runs, found, first)]
    same = [(name, values[:1]) for name, values in found if len(set(values)) == 1]
    other = [row for row in found if len(set(row[1])) > 1]
    return [
        *([Table(first, ["all runs"], same)] if same else []),
        *([Table.of(runs, other, first)] if other else []),
    ]


def figure_of(run: RunData, field: str, form: str) -> str:
    """A figure of the result, or of the last lines while there is none."""
    value = run.summary.get(field)
    value = run.last.get(field) if value is None else value
    return "–" if value is None else shown(form.format(value))


def headline(run: RunData) -> str:
    """What a run's large figure, its accuracy, is of."""
    if figure_of(run, *SUMMARY["test accuracy"]) == "–":
        return f"the test accuracy is not known yet: {run.state}"
    text = "of the test images named right"
    if epoch := run.log.last_epoch.get("epoch"):
        text += f" after epoch {epoch} of {run.config['epochs']}"
    if run.summary:
        network = f"{shown(run.config['model'])}, {figure_of(run, *SUMMARY['parameters'])} parameters"
        time = f"{figure_of(run, 'wall_seconds', '{:,.0f}')} s on {figure_of(run, *SUMMARY['ranks'])} rank(s)"
        text += f", by {network}, trained in {time}"
    return f"{text}; {run.state}"


def page(runs: list[RunData], progress: Callable[[str], None] = lambda _: None) -> str:
    """The whole page, self-contained."""
    plots: list[str] = []
    draw(runs, lambda made, _, title: plots.append(svg(made, title)))
    details = []
    for run in runs:
        progress(run.name)
        details.append((run, answers(run, len(runs) <= COMPUTED)))
    summary = [(label, [figure_of(run, *what) for run in runs]) for label, what in SUMMARY.items()]
    options = rows(runs, lambda run: run.config)
    differing = [(name, each) for name, each in options if name != "run_dir" and len(set(each)) > 1]
    folders = " ".join(shlex.quote(shown(str(run.path))) for run in runs[:COMPUTED])
    return render(
        "report.html.j2",
        runs=runs,
        plots=plots,
        timelines=[(run.name, timeline(run.path, run.config["trace"])) for run in runs[:COLUMNS]],
        died=[(run.name, entry) for run in runs for entry in run.survived[:SHOWN_DEATHS]],
        named=len(runs) <= LEGEND,
        details=details,
        accuracy=summary[0][1][0],
        headline=headline(runs[0]),
        results=Table.of(runs, [("state", [run.state for run in runs]), *summary]),
        parts=[(run.name, run.parts_ms()) for run in runs],
        unlike=[run.name for run in runs if any(run.config[name] for name in UNLIKE)],
        differences=Table.of(runs, differing, "option") if differing else None,
        config=same_and_other(runs, options, "option"),
        environment=same_and_other(runs, rows(runs, lambda run: run.environment), ""),
        command=f"distrib report {folders}{' …' if len(runs) > COMPUTED else ''}",
    )


@one_process
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
    """A page for one run, or a comparison of several: curves, tables, and digits taken for others.

    Self-contained, without JavaScript, fit for a phone and for print; also of a run that is still going on.

    Examples:

      distrib report runs/first

      distrib report runs/a runs/b --out comparison.html
    """
    runs = [read_run(folder) for folder in folders]
    if not any(run.log.steps or run.log.epochs for run in runs):
        raise UserError(f"{folders[0]}: nothing was logged yet (metrics.jsonl): wait for its first steps")
    names = [run.name for run in runs]
    for run in runs:  # of runs in folders of one name, the whole path tells
        if names.count(run.name) > 1:
            run.name = shown(str(run.path))
    home = runs[0].path if len(runs) == 1 else Path()
    if png:
        folder = out or home / "plots"
        draw(runs, lambda made, name, _: save(made, folder / f"{name}.png"))
        print(f"{shown(str(folder))}: {len(list(folder.glob('*.png')))} plots")
        return
    with Progress(disable=not on_terminal(), transient=True) as bar:
        task = bar.add_task("looking at digits", total=len(runs))
        text = page(runs, lambda name: bar.update(task, advance=1, description=f"digits of {escape(name)}"))
    path = out or home / "report.html"
    write(path, text)
    print(f"{shown(str(path))}: {len(runs)} run(s), {len(text) / 1e6:.1f} MB")
