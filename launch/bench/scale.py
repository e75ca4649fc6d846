"""`distrib scale`: strong and weak scaling, measured on the ranks at hand."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import statistics
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from distrib import __version__
from distrib.config import build
from distrib.errors import UserError
from distrib.files import MOST_JSON, read_bytes
from launch.bench.measure import BackendName, BatchSize, Precision, Variant, Width, spread
from launch.entry import AsJson, number, one_process, positive
from launch.machine import DISTRIB, child_environment, devices, finish, machine, mpirun
from launch.report import plots

MPIRUN = "mpirun -n {ranks}"
MOST_RANKS = 4096
TRAINING_IMAGES = 60_000
HEADS = ("batch", "images/s", "step ms", "efficiency", "communication")


def child(command: list[str], limit: float) -> dict[str, Any]:
    """The JSON that a command prints, with one BLAS thread a rank; UserError where none comes."""
    shown = shlex.join(command)
    if shutil.which(command[0]) is None:
        raise UserError(f"--launch: {command[0]} is not on PATH: give this machine's launcher")
    done = finish(command, child_environment(1), limit)
    if done.late:
        raise UserError(f"not done after {limit:g} s: {shown}: give a longer --timeout, or a smaller --width")
    with suppress(ValueError):
        if not done.code:
            return done.json()
    why = f"no figures, code {done.code} ({done.last_words()}) from {shown}"
    raise UserError(done.mistake() or f"{why}: try it alone, or give another --launch")


def command_of(ranks: int, batch: int, settings: dict[str, Any]) -> list[str]:
    """The command of one measurement."""
    launcher = settings["launch"]
    start = [part.replace("{ranks}", str(ranks)) for part in shlex.split(launcher)]
    options = {"batch-size": batch} | {name: value for name, value in settings.items() if name != "launch"}
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [*(mpirun(ranks) if launcher == MPIRUN else start), *DISTRIB, "bench", "step", *given, "--json"]


def stored_points(path: Path) -> list[dict[str, Any]]:
    """The lines of points.jsonl; none where it is not there. A torn line is none."""
    found = []
    try:
        data = read_bytes(path, MOST_JSON)
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error}): give another --out") from None
    for text in data.splitlines():
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            found.append({name: json.loads(text)[name] for name in ("key", "load", "result")})
    return found


def measure(
    tasks: list[tuple[int, int]], settings: dict[str, Any], path: Path, timeout: float
) -> list[dict[str, Any]]:
    """A line of points.jsonl for each (ranks, batch): measured and stored, unless it is there."""
    stored, found, load = stored_points(path), [], os.getloadavg()[0]
    console = Console(stderr=True, highlight=False)
    shown = track(tasks, "measuring", console=console, disable=not console.is_terminal)
    for place, (ranks, batch) in enumerate(shown, 1):
        key = {"ranks": ranks, "batch_size": batch, **settings, "machine": machine(), "version": __version__}
        line = next((line for line in stored if line["key"] == key), None)
        before = ": measured before" if line else ""
        what = f"{place}/{len(tasks)}  {ranks} rank(s), batch {batch}{before}"
        console.print(what, soft_wrap=True)
        if line is None:
            line = {"key": key, "load": load, "result": child(command_of(ranks, batch, settings), timeout)}
            with open(path, "a") as file:
                file.write(f"\n{json.dumps(line)}")  # the newline first: this may follow a torn line
        found.append(line)
    return found


def row_of(series: str, r: dict[str, Any], one: dict[str, Any], places: int) -> dict[str, Any]:
    """The figures of a point from its result of `bench step`; `one` is one rank's of the same series."""
    ranks, batch = r["ranks"], r["batch_size"]
    if r["backend"] == "numpy" and r["threads"] != ranks:
        raise UserError(
            f"{ranks} rank(s) had {r['threads']} BLAS threads: have --launch pass on OMP_NUM_THREADS=1,"
            " and give another --out"
        )
    rates, alone = (each["images_per_second"]["distrib"] for each in (r, one))
    rate, phases = statistics.median(rates), r["phases_ms"]
    step = 1e3 * batch / rate
    return {
        "series": series,
        "ranks": ranks,
        "batch_size": batch,
        "crowded": r["machine"] == machine() and ranks > places * r["hosts"],  # elsewhere nobody knows
        "images_per_second": rate,
        "rates": rates,
        "step_ms": step,
        "efficiency": rate / ranks / statistics.median(alone),
        "communication": (phases["sums"] + phases["gradients"]) / step if phases else None,
    }


def report(
    settings: dict[str, Any],
    series: list[tuple[str, int, int]],
    lines: list[dict[str, Any]],
    places: int,
) -> dict[str, Any]:
    """All that is measured, for (strong or weak, ranks, batch) in `series`; a host has `places` for ranks."""
    results = {(line["key"]["ranks"], line["key"]["batch_size"]): line["result"] for line in lines}
    ones = {name: results[ranks, batch] for name, ranks, batch in series if ranks == 1}
    rows = [row_of(name, results[ranks, batch], ones[name], places) for name, ranks, batch in series]
    load = max(line["load"] for line in lines)
    notes = {
        f"* more ranks than the {places} core(s) or GPU(s) of a host": any(row["crowded"] for row in rows),
        f"Other programs used this machine (load {load:.1f} before the measurement): points are slower and"
        " scatter more": load > 0.25 * places,
    }
    return {
        "version": __version__,
        "machine": lines[0]["result"]["machine"],
        "command": shlex.join(["distrib", *sys.argv[1:]]),
        "settings": settings,
        "notes": [note for note, holds in notes.items() if holds],
        "measured": rows,
        "points": lines,
    }


def table_of(name: str, r: dict[str, Any]) -> dict[str, Any]:
    """The table of strong or weak scaling, for the page and the terminal."""
    rows = []
    for row in r["measured"]:
        if row["series"] == name:
            shares = (row["efficiency"], row["communication"])
            percent = ["–" if share is None else f"{100 * share:.1f} %" for share in shares]
            figures = [str(row["batch_size"]), spread(row["rates"]), f"{row['step_ms']:.4g}", *percent]
            rows.append((f"{row['ranks']}{'*' if row['crowded'] else ''}", figures))
    return {"title": f"{name.capitalize()} scaling", "first": "ranks", "heads": HEADS, "rows": rows}


def figures(r: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Name, title and figure of each plot."""
    for what, title, factor in (("efficiency", "efficiency, %", 100), ("images_per_second", "images/s", 1)):
        with plots.figure(4.6, 3.2) as (made, (axes,)):
            for name, colour in zip(("strong", "weak"), plots.COLOURS, strict=False):
                rows = [row for row in r["measured"] if row["series"] == name]
                ranks = [row["ranks"] for row in rows]
                one = factor * rows[0][what]
                ideal = [one if factor > 1 else one * p for p in ranks]
                axes.plot(ranks, [factor * row[what] for row in rows], "o-", color=colour, label=name)
                axes.plot(ranks, ideal, ":", color=colour, label=f"{name}, ideal")
            axes.set_xscale("log", base=2)
            axes.set(xlabel="ranks", xticks=ranks, xticklabels=ranks, title=title)
            axes.set_ylim(bottom=0)
            axes.legend(fontsize=7)
            yield what, title, made


def publish(r: dict[str, Any], out: Path, png: bool) -> str:
    """Write scale.json, scale.html and, if asked for, the plots; the text for a terminal."""
    drawn = []
    for name, title, made in figures(r):
        drawn.append(plots.svg(made, title))
        if png:
            plots.save(made, out / f"{name}.png")
    tables = [table_of(name, r) for name in ("strong", "weak")]
    plots.write(out / "scale.html", plots.render("scale.html.j2", r=r, tables=tables, drawn=drawn))
    plots.write(out / "scale.json", json.dumps(r, indent=2))
    lines = [r["machine"], r["command"]]
    for table in tables:
        cells = [[table["first"], *table["heads"]], *([head, *values] for head, values in table["rows"])]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += ["", table["title"]]
        lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells]
    return "\n".join([*lines, "", *r["notes"], f"{out / 'scale.html'} has the plots"])


def points(most: int, batch: int, batch_per_rank: int) -> list[tuple[str, int, int]]:
    """(strong or weak, ranks, batch) of each point: 1, 2, 4, … and `most` ranks."""
    counts = sorted({most, *(1 << i for i in range(most.bit_length()))})
    strong = [("strong", ranks, batch) for ranks in counts if ranks <= batch]
    return strong + [("weak", ranks, ranks * batch_per_rank) for ranks in counts]


@one_process
def scale(
    ranks: Annotated[
        int | None,
        number(
            "--ranks",
            "Most ranks to measure: 1, 2, 4, … and this.",
            most=MOST_RANKS,
            show_default="cores or GPUs of this host",
        ),
    ] = None,
    batch_size: BatchSize = 64,
    batch_size_per_rank: Annotated[
        int, number("--batch-size-per-rank", "Images a rank of weak scaling.")
    ] = 32,
    width: Width = 1.0,
    variant: Variant = "baseline",
    precision: Precision = "float32",
    backend: BackendName = "auto",
    repeats: Annotated[
        int,
        number("--repeats", "Measurements of each point, of a second each; the median counts.", most=1000),
    ] = 5,
    launcher: Annotated[
        str, typer.Option("--launch", help="The launcher's command line; srun --mpi=pmix -n {ranks}, say.")
    ] = MPIRUN,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder of points.jsonl, scale.json and scale.html; what it holds is not measured again."
        ),
    ] = Path("scale"),
    png: Annotated[bool, typer.Option("--png", help="Plots as PNG files too.")] = False,
    timeout: Annotated[float, positive("--timeout", "Seconds that one point may take.")] = 900.0,
    as_json: AsJson = False,
) -> None:
    """Strong and weak scaling on the ranks at hand: images/s, step time, efficiency, communication.

    One BLAS thread a rank throughout, so that one rank is a fair baseline. Run the same command again to
    resume. Example: distrib scale --width 0.25
    """
    plots.require("matplotlib", "jinja2")
    settings = {"width": width, "variant": variant, "precision": precision, "backend": backend}
    build({"batch_size": batch_size, **settings})  # a mistake is told before anything runs
    places = (0 if backend == "numpy" else len(devices())) or len(os.sched_getaffinity(0))
    most = ranks or places
    if batch_size_per_rank * most > TRAINING_IMAGES:
        limit = TRAINING_IMAGES // most
        raise UserError(f"--batch-size-per-rank {batch_size_per_rank}: give 1 to {limit} for {most} ranks")
    if "{ranks}" not in launcher:
        raise UserError(f"--launch {launcher}: put {{ranks}} where their number goes, as in {MPIRUN}")
    settings |= {"repeats": repeats, "launch": launcher}
    series = points(most, batch_size, batch_size_per_rank)
    tasks = list(dict.fromkeys((ranks, batch) for _, ranks, batch in series))
    plots.make_folder(out)
    found = measure(tasks, settings, out / "points.jsonl", timeout)
    try:
        result = report(settings, series, found, places)
    except (KeyError, TypeError, AttributeError, ArithmeticError, statistics.StatisticsError) as error:
        said = f"{type(error).__name__}: {error}"  # a line that somebody else wrote
        raise UserError(
            f"{out / 'points.jsonl'}: holds no points of this program ({said}): remove it"
        ) from None
    text = publish(result, out, png)
    print(json.dumps(result, indent=2) if as_json else text)
