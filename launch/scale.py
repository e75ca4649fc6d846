"""`distrib scale`: strong and weak scaling, measured here, predicted by `launch.scale_model`."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from distrib import __version__
from distrib.config import build
from distrib.data import idx as mnist
from distrib.errors import UserError
from distrib.files import MOST_JSON, read_bytes
from launch import plots
from launch.bench_run import mpirun
from launch.doctor import devices
from launch.entry import one_process
from launch.measure import AsJson, Width, child_environment, machine, spread
from launch.scale_model import MOST_RANKS, NET, Model, Point, fit, left_out, levels, predict
from nn.network import Network
from nn.resnet9 import MODELS

MPIRUN = "mpirun -n {ranks}"


def child(command: list[str], seconds: float) -> dict[str, Any]:
    """The JSON that a command prints, with one BLAS thread a rank; UserError where none comes."""
    shown, pipe = shlex.join(command), subprocess.PIPE
    if shutil.which(command[0]) is None:
        raise UserError(f"--launch: {command[0]} is not on PATH: give this machine's launcher")
    with subprocess.Popen(
        command, env=child_environment(1), stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise UserError(
                f"not done after {seconds:g} s: {shown}: give a longer --timeout, or a smaller --width"
            ) from None
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL) if process.poll() is None else ():
                with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(
                        process.pid, number
                    )  # SIGTERM first: mpirun then ends its ranks, on other hosts too
                    process.wait(10)
    lines = [line.strip() for line in (err or out).splitlines() if line.strip("- ")] or ["without a word"]
    with suppress(ValueError):
        if not process.returncode:
            return dict(json.loads(out[out.index("{") :]))  # a launcher may have printed before
    said = next(
        (line.removeprefix("distrib: error: ") for line in lines if line.startswith("distrib: error: ")), None
    )
    why = f"no figures, code {process.returncode} ({lines[-1]}) from {shown}"
    raise UserError(said or f"{why}: try it alone, or give another --launch")


def command_of(kind: str, ranks: int, batch: int, s: dict[str, Any]) -> list[str]:
    """The command of one measurement."""
    launch = [part.replace("{ranks}", str(ranks)) for part in shlex.split(s["launch"])]
    if s["launch"] == MPIRUN:
        launch = [mpirun(), *launch[1:]] if ranks > 1 else []
    more = [
        "--batch-size",
        batch,
        "--width",
        s["width"],
        "--variant",
        s["variant"],
        "--precision",
        s["precision"],
    ]
    more = more if kind == "step" else ["--seconds", 0.2, "--max-bytes", 1 << 22]
    return [
        *launch,
        sys.executable,
        "-m",
        "launch.cli",
        "bench",
        kind,
        *map(str, more),
        "--backend",
        s["backend"],
        "--repeats",
        str(s["repeats"]),
        "--json",
    ]


def lines_of(path: Path) -> list[bytes]:
    """The lines of points.jsonl; none where it is not there."""
    try:
        data = read_bytes(path, MOST_JSON)
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error}): give another --out") from None
    return data.splitlines()


def measure(
    tasks: list[tuple[str, int, int]], settings: dict[str, Any], path: Path, timeout: float
) -> list[dict[str, Any]]:
    """A line of points.jsonl for each (kind, ranks, batch): measured and stored, unless it is there."""
    stored, found, load = [], [], os.getloadavg()[0]
    for text in lines_of(path):
        with suppress(ValueError, KeyError, TypeError, RecursionError):  # a torn line is none
            stored.append({name: json.loads(text)[name] for name in ("key", "load", "result")})
    console = Console(stderr=True, highlight=False)
    for i, (kind, ranks, batch) in enumerate(
        track(tasks, "measuring", console=console, disable=not console.is_terminal), 1
    ):
        key = {
            "kind": kind,
            "ranks": ranks,
            "batch_size": batch,
            **settings,
            "machine": machine(),
            "version": __version__,
        }
        line = next((line for line in stored if line["key"] == key), None)
        what = f"{kind}, {ranks} rank(s){f', batch {batch}' if batch else ''}"
        what += ": measured before" if line else ""
        console.print(f"{i}/{len(tasks)}  bench {what}", soft_wrap=True)
        if line is None:
            line = {
                "key": key,
                "load": load,
                "result": child(command_of(kind, ranks, batch, settings), timeout),
            }
            with open(path, "a") as file:
                file.write(f"\n{json.dumps(line)}")  # the newline first: this may follow a torn line
        found.append(line)
    return found


def point_of(r: dict[str, Any], hosts: int, crowded: bool) -> Point:
    """The step in a result of `bench step`."""
    if r["backend"] == "numpy" and r["threads"] != r["ranks"]:
        raise UserError(
            f"{r['ranks']} rank(s) had {r['threads']} BLAS threads: have --launch pass on OMP_NUM_THREADS=1,"
            " and give another --out"
        )
    phases = {
        name: r["phases_ms"][name] / 1e3 for name in ("sums", "gradients", "backward") if r["phases_ms"]
    }
    rate = statistics.median(r["images_per_second"]["distrib"])
    return Point(r["ranks"], r["batch_size"], r["batch_size"] / rate, **phases, hosts=hosts, crowded=crowded)


def report(
    settings: dict[str, Any],
    series: list[tuple[str, int, int]],
    lines: list[dict[str, Any]],
    bare: Model,
    told: dict[str, float],
) -> dict[str, Any]:
    """All that is measured, fitted and predicted, for (strong or weak, ranks, batch) in `series`.

    `told` is what the person says of the network.
    """
    results = [(line["key"]["kind"], line["result"]) for line in lines]
    hosts = {1: 1, **{r["ranks"]: r["hosts"] for kind, r in results if kind == "allreduce"}}
    crowded = {
        r["ranks"]: r["machine"] == machine() and r["ranks"] > bare.full * hosts[r["ranks"]]
        for _, r in results
    }  # elsewhere it is the launcher's affair
    steps = {(r["ranks"], r["batch_size"]): r for kind, r in results if kind == "step"}
    points = {at: point_of(r, hosts[at[0]], crowded[at[0]]) for at, r in steps.items()}
    host, net, source = levels(
        [r for kind, r in results if kind == "allreduce" and not crowded[r["ranks"]]], bare.net
    )
    if told:
        net, source["net"] = (
            replace(net, **told),
            "given" if len(told) == 2 else f"{source['net']}, but for what was given",
        )
    bare = replace(bare, host=host, net=net, buckets=results[0][1]["gradient_buckets"])
    every, rows = list(points.values()), []
    model, used, one = (
        fit(every, bare),
        [q for q in every if not q.crowded],
        {name: points[p, b] for name, p, b in series if p == 1},
    )
    for name, p, b in series:
        q = points[p, b]
        seconds = model.at(q).step(p, q.images)
        rows.append(
            {
                "series": name,
                "ranks": p,
                "batch_size": b,
                "crowded": q.crowded,
                "images_per_second": b / q.step,
                "rates": steps[p, b]["images_per_second"]["distrib"],
                "step_ms": 1e3 * q.step,
                "efficiency": b / q.step / p * one[name].step / one[name].batch,
                "communication": None if q.sums is None else 1 - q.compute / q.step,
                "model_ms": 1e3 * seconds,
                "error": seconds / q.step - 1,
                "left_out_error": left_out(every, q, bare),
            }
        )
    model = replace(model, full=max(bare.full, model.ranks_per_host))
    predicted = {name: list(predict(model, q.batch, name == "weak")) for name, q in one.items()}
    last, load = predicted["strong"][-1]["ranks"], max(line["load"] for line in lines)
    notes = {
        f"5 parameters of a step (a, b, κ, ω, e) are fitted to {len(used)} measured point(s). With so few"
        " the fit is weak: errors near 0 are its making and prove nothing; the error of a point left"
        " out of the fit says more.": len(used) < 12,
        "No point has several ranks with a core or GPU each: κ and ω are taken as 0, e as 100 %.": all(
            q.ranks == 1 for q in used
        ),
        f"* more ranks than the {bare.full} core(s) or GPU(s) of a host: measured, but left out of the"
        " fit.": len(used) < len(every),
        f"Others used this machine (load {load:.1f} before the measurement): points are slower and scatter"
        " more, and the model, which carries that on, predicts a machine as busy.": load > 0.25 * bare.full,
        f"Strong scaling ends at {last} ranks: with more, some have no image of {one['strong'].batch}.": last
        < MOST_RANKS,
    }
    return {
        "version": __version__,
        "machine": results[0][1]["machine"],
        "command": shlex.join(["distrib", *sys.argv[1:]]),
        "settings": settings,
        "notes": [note for note, holds in notes.items() if holds],
        "measured": rows,
        "predicted": predicted,
        "model": asdict(model),
        "source": source,
        "points": lines,
    }


def cells(row: dict[str, Any]) -> list[str]:
    """A predicted row, or a measured one, which is longer, as text."""
    shares = zip(
        [row[k] for k in ("efficiency", "communication", "error", "left_out_error") if k in row],
        ("", "", "+", "+"),
        strict=False,
    )
    percent = [
        "–" if share is None else f"{round(100 * share, 1) + 0.0:{sign}.1f} %" for share, sign in shares
    ]
    rate = spread(row["rates"]) if "rates" in row else f"{row['images_per_second']:.4g}"
    return [
        f"{row['ranks']}{'*' if row.get('crowded') else ''}",
        str(row["batch_size"]),
        rate,
        f"{row['step_ms']:.4g}",
        *percent[:2],
        *([f"{row['model_ms']:.4g}", *percent[2:]] if "model_ms" in row else []),
    ]


def figures(r: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Name, title and figure of each plot."""
    for what, title, factor in (
        ("efficiency", "efficiency, %", 100),
        ("images_per_second", "images/s", 1),
        *((name, f"share of a step's time, %, {name} scaling", 100) for name in r["predicted"]),
    ):
        with plots.figure(4.6, 3.2) as (made, (axes,)):
            axes.set_xscale("log", base=2)
            axes.set(
                xlabel="ranks",
                xticks=(ticks := [4**i for i in range(7)]),
                xticklabels=ticks,
                title=title,
                yscale="linear" if factor > 1 else "log",
            )
            for (name, rows), colour in zip(r["predicted"].items(), plots.COLOURS, strict=False):
                p, points = (
                    [row["ranks"] for row in rows],
                    [row for row in r["measured"] if row["series"] == name],
                )
                if what == name:
                    shares = [
                        [100 * row["parts_ms"][part] / row["step_ms"] for row in rows]
                        for part in rows[0]["parts_ms"]
                    ]
                    axes.stackplot(p, shares, labels=list(rows[0]["parts_ms"]), colors=plots.COLOURS)
                elif what in rows[0]:
                    axes.plot(p, [factor * row[what] for row in rows], color=colour, label=f"{name}, model")
                    axes.plot(
                        [q["ranks"] for q in points],
                        [factor * q[what] for q in points],
                        "o",
                        color=colour,
                        label=f"{name}, measured",
                    )
                    axes.plot(
                        p,
                        [factor * rows[0][what] * (n if factor == 1 else 1) for n in p],
                        ":",
                        color=colour,
                        label=f"{name}, ideal",
                    )
            axes.legend(frameon=True, fontsize=7, loc="lower left" if what in r["predicted"] else "best")
            yield what, title, made


def publish(r: dict[str, Any], out: Path, png: bool) -> str:
    """Write scale.json, scale.html and, if asked for, the plots; the text for a terminal."""
    drawn, lines = [], [r["machine"], r["command"]]
    both, head = (
        r["predicted"],
        [
            "ranks",
            "batch",
            "images/s",
            "step ms",
            "efficiency",
            "communication",
            "model ms",
            "error",
            "left out",
        ],
    )
    tables = {
        f"measured, {name} scaling": [head, *(cells(row) for row in r["measured"] if row["series"] == name)]
        for name in both
    }
    tables |= {f"predicted, {name} scaling": [head[:6], *map(cells, rows)] for name, rows in both.items()}
    for name, title, made in figures(r):
        drawn.append(plots.svg(made, title))
        if png:
            plots.save(made, out / f"{name}.png")
    plots.write(out / "scale.html", plots.render("scale.html.j2", r=r, tables=tables, drawn=drawn))
    plots.write(out / "scale.json", json.dumps(r, indent=2))
    for title, rows in tables.items():
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += [
            "",
            title,
            *("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows),
        ]
    return "\n".join([*lines, "", *r["notes"], f"model and assumptions: {out / 'scale.html'}"])


@one_process
def scale(
    ranks: Annotated[
        int | None,
        typer.Option(
            help="Most ranks to measure: 1, 2, 4, … and this.", show_default="cores or GPUs of this host"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Global batch of strong scaling.")] = 64,
    batch_size_per_rank: Annotated[int, typer.Option(help="Images a rank of weak scaling.")] = 32,
    width: Width = 1.0,
    variant: Annotated[
        str, typer.Option(help="baseline, avgpool, conv-shortcut or three-blocks.")
    ] = "baseline",
    precision: Annotated[str, typer.Option(help="float32, float64, and on a GPU tf32 or bf16.")] = "float32",
    backend: Annotated[str, typer.Option(help="numpy, cupy, or auto.")] = "auto",
    repeats: Annotated[
        int, typer.Option(help="Measurements of each point, of a second each; the median counts.")
    ] = 5,
    launcher: Annotated[
        str, typer.Option("--launch", help="The launcher's command line; srun --mpi=pmix -n {ranks}, say.")
    ] = MPIRUN,
    ranks_per_host: Annotated[
        int | None, typer.Option(help="Of the prediction.", show_default="cores or GPUs of this host")
    ] = None,
    net_latency: Annotated[
        float | None,
        typer.Option(
            help="Of an all-reduce between two hosts, µs.",
            show_default="as measured on several hosts, else 5",
        ),
    ] = None,
    net_bandwidth: Annotated[
        float | None,
        typer.Option(
            help="Between hosts, GB/s.", show_default="as measured on several hosts, else 10: 100 Gb/s"
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder of points.jsonl, scale.json and scale.html; what it holds is not measured again."
        ),
    ] = Path("scale"),
    png: Annotated[bool, typer.Option("--png", help="Plots as PNG files too.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that one point may take.")] = 900.0,
    as_json: AsJson = False,
) -> None:
    """Strong and weak scaling on the ranks at hand, and a model fitted to it that predicts up to 4,096 ranks.

    One BLAS thread a rank throughout, so that one rank is a fair baseline. An interrupted measurement resumes
    where it was. Example: distrib scale --width 0.25
    """
    plots.require("matplotlib", "jinja2")
    config = build(
        {
            "batch_size": batch_size,
            "width": width,
            "variant": variant,
            "precision": precision,
            "backend": backend,
        }
    )
    places = (0 if backend == "numpy" else len(devices())) or len(os.sched_getaffinity(0))
    most, own = (places if given is None else given for given in (ranks, ranks_per_host))
    for flag, value, least, limit in (
        ("ranks", most, 1, MOST_RANKS),
        ("batch-size", batch_size, 1, 60000),
        ("batch-size-per-rank", batch_size_per_rank, 1, 60000 // max(1, most)),
        ("repeats", repeats, 1, 1000),
        ("ranks-per-host", own, 1, MOST_RANKS),
        ("timeout", timeout, 1, 1e6),
        ("net-latency", net_latency, 0, 1e6),
        ("net-bandwidth", net_bandwidth, 1e-3, 1e6),
    ):
        if value is not None and not least <= value <= limit:
            raise UserError(f"--{flag} {value:g}: give {least:g} to {limit:g}")
    if "{ranks}" not in launcher:
        raise UserError(f"--launch {launcher}: put {{ranks}} where their number goes, as in {MPIRUN}")
    settings = {
        "width": width,
        "variant": variant,
        "precision": precision,
        "backend": backend,
        "repeats": repeats,
        "launch": launcher,
    }
    counts = sorted({most, *(1 << i for i in range(most.bit_length()))})
    series = [("strong", p, batch_size) for p in counts if p <= batch_size] + [
        ("weak", p, p * batch_size_per_rank) for p in counts
    ]
    tasks = list(
        dict.fromkeys([("step", p, b) for _, p, b in series] + [("allreduce", p, 0) for p in counts if p > 1])
    )
    options = {"variant": variant, "width": width}
    network = Network(MODELS["resnet9"], mnist.SHAPE, mnist.CLASSES, options, dtype=config.dtype)
    # a layer sums means, squares and, backward, two at once, in float64
    sums, sum_bytes = 3 * len(network.convs()), 4 * 8 * sum(conv.out for conv in network.convs())
    bare = Model(NET, NET, own, places, sums, sum_bytes, 1, network.params.comm_buffer.nbytes)
    told = {
        name: x
        for name, x in (
            ("latency", net_latency and net_latency / 1e6),
            ("per_byte", net_bandwidth and 1e-9 / net_bandwidth),
        )
        if x is not None
    }
    plots.make_folder(out)
    found = measure(tasks, settings, out / "points.jsonl", timeout)
    try:
        result = report(settings, series, found, bare, told)
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:  # a line that somebody else wrote
        said = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{out / 'points.jsonl'}: holds no points of this program ({said}): remove it"
        ) from None
    text = publish(result, out, png)
    print(json.dumps(result, indent=2) if as_json else text)
