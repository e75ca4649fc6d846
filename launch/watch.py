"""`distrib watch`: follow a run from another terminal. It only reads the run's folder."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from distrib.errors import UserError
from distrib.faults import survived
from distrib.faults.heartbeat import FAILED, STALE_SECONDS, SURVIVED
from distrib.run.console import PLAIN_SECONDS, on_terminal
from launch.entry import one_process, positive
from launch.report.follow import Follower
from launch.report.records import shown

AVERAGED, SHOWN_EPOCHS, SHOWN_RANKS = 20, 6, 16
"""Logged steps of the running accuracy; epochs and ranks with a line of their own."""


def sparkline(values: Iterable[float]) -> str:
    """A block for each value, as high as it lies between lowest and highest; of logarithms if all are > 0."""
    found = [value for value in values if math.isfinite(value)]
    found = [math.log(value) for value in found] if found and min(found) > 0 else found
    low, high = min(found, default=0.0), max(found, default=0.0)
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * (value - low) / ((high - low) or 1)))] for value in found)


def figures(run: Follower) -> dict[str, str]:
    """What the last logged steps say; accuracy is a mean of some."""
    if not run.steps:
        return {}
    last, hits = run.steps[-1], [line.get("accuracy", 0.0) for line in list(run.steps)[-AVERAGED:]]
    return {
        "loss": f"{last['loss']:.4f}",
        "accuracy": f"{sum(hits) / len(hits):.2f} %",
        "speed": f"{last.get('images_per_second', 0):.0f} images/s",
        "learning rate": f"{last.get('lr', 0):.3g}",
    }


def epoch_line(line: dict[str, Any], epochs: int) -> str:
    """As the run itself says it."""
    held = "validation" if "validation_loss" in line else "test"
    (train, own), (test, accuracy) = (
        (line.get(f"{part}_loss", math.nan), line.get(f"{part}_accuracy", math.nan))
        for part in ("train", held)
    )
    return (
        f"epoch {line['epoch']}/{epochs}: train loss {train:.4f}, accuracy {own:.2f} %;"
        f" {held} loss {test:.4f}, accuracy {accuracy:.2f} %"
    )


def ranks(run: Follower, most: int) -> Iterator[Table | Text]:
    """A line for each rank; beyond `most` only those that stand out: ended, stale, furthest behind."""
    order = sorted(
        run.heartbeats,
        key=lambda beat: (beat.running and run.age(beat) < 2 * STALE_SECONDS, beat.step, beat.rank),
    )
    shown, rest = sorted(order[:most], key=lambda beat: beat.rank), order[most:]
    table = Table("rank", "host", "step", "does", "heartbeat", box=None, pad_edge=False, header_style="dim")
    for beat in shown:
        bad = beat.state.startswith(FAILED) or (beat.running and run.age(beat) > 10)
        cells = (
            beat.rank,
            beat.host,
            beat.step,
            beat.doing if beat.running else beat.state,
            f"{run.age(beat):.0f} s ago",
        )
        table.add_row(*(cropped(str(cell)) for cell in cells), style="red" if bad else "")
    yield table
    if rest:
        steps, oldest = [beat.step for beat in rest], max(run.age(beat) for beat in rest)
        yield Text(
            f"and {len(rest)} more at steps {min(steps)} to {max(steps)}, the last heartbeat of each at"
            f" most {oldest:.0f} s ago"
        )


def lost_line(entry: dict[str, Any]) -> str:
    """A rank that died while the others went on."""
    return f"{survived.line(entry)}; the others went on after {entry['seconds']:.2f} s"


def cropped(text: str, style: str = "") -> Text:
    return Text(text, style, no_wrap=True, overflow="crop")


def view(run: Follower, console: Console) -> Group:
    """The whole state, for a terminal or, once, for a file."""
    c, said, (share, epoch, step) = run.config, figures(run), run.progress()
    network = c.get("variant") if c.get("model", "resnet9") == "resnet9" else c["model"]
    names = [network, f"width {c.get('width')}", c.get("optimizer")]
    names += [f"batch {c['batch_size']}", c.get("precision")]
    losses = [line["loss"] for line in run.steps if math.isfinite(line["loss"])]
    losses = losses[-max(8, console.width - 60) :]
    if losses and console.encoding.startswith("utf"):
        said["loss"] += (
            f"  {sparkline(losses)}  {min(losses):.2g} to {max(losses):.2g} in {len(losses)} logged steps"
        )
    grid = Table.grid(padding=(0, 2))
    grid.add_row(epoch, ProgressBar(1.0, share, width=max(10, min(60, console.width - 20))))
    for name, text in {"step": step, **said}.items():
        grid.add_row(name, cropped(text))
    epochs = [cropped(epoch_line(line, c["epochs"])) for line in list(run.epochs)[-SHOWN_EPOCHS:]]
    most = min(SHOWN_RANKS, max(3, console.height - 10 - len(epochs))) if console.is_terminal else SHOWN_RANKS
    return Group(
        cropped(f"{shown_path(run)}  {shown(', '.join(map(str, names)))}", "bold"),
        grid,
        *epochs,
        *(cropped(lost_line(entry), "yellow") for entry in run.survived[-SHOWN_EPOCHS:]),
        *(ranks(run, most) if run.heartbeats else [Text("no heartbeat yet")]),
    )


def plain(run: Follower) -> str:
    """The state in a line, for a log file."""
    alive = [beat for beat in run.heartbeats if not beat.state.startswith(SURVIVED)]
    (_, epoch, step), ages = run.progress(), [run.age(beat) for beat in alive]
    parts = [epoch, *(f"{name} {text}" for name, text in {"step": step, **figures(run)}.items())]
    parts.append(f"{len(ages)} rank(s), last heartbeat {max(ages):.0f} s ago" if ages else "no heartbeat yet")
    parts += [f"{len(run.survived)} died, the others went on"] if run.survived else []
    return "  ".join(parts)


def shown_path(run: Follower) -> str:
    """The folder, for a terminal."""
    return shown(str(run.folder))


def wait_for(run: Follower, console: Console, patience: float) -> None:
    """Return when the folder holds a run; UserError where it does not within `patience` seconds."""
    begin = time.monotonic()
    (run.folder / "config.json").exists()  # what the system refuses of the path is told at once
    if run.folder.exists() and not run.folder.is_dir():
        raise UserError(f"{run.folder}: is a file: give a run's folder")
    run.look()
    if not run.config and not run.fault and patience:
        console.out(f"waiting up to {patience:g} s for {shown_path(run)}", highlight=False)
    while not run.config:
        if run.fault:  # config.json comes whole: waiting mends nothing
            raise UserError(run.fault)
        if time.monotonic() - begin >= patience:
            state = "holds no run (config.json)" if run.folder.is_dir() else "no such folder"
            after = f" after {patience:g} s" if patience else ""
            raise UserError(f"{run.folder}: {state}{after}: give a run's folder")
        time.sleep(0.2)
        run.look()


def follow(run: Follower, console: Console, interval: float) -> None:
    """Show the run until it ends. Where nobody reads any more, the exit code still tells."""
    said, told = -math.inf, run.ended
    show = Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
    with show if console.is_terminal and not console.is_dumb_terminal else contextlib.nullcontext() as live:
        while True:
            if live:
                live.update(view(run, console), refresh=True)
            new = min(run.ended - told, len(run.epochs)) if run.ended > told and not live else 0
            for line in list(run.epochs)[-new:] if new else []:
                console.out(epoch_line(line, run.config["epochs"]), highlight=False)
            told = run.ended
            if not live and time.monotonic() - said >= PLAIN_SECONDS:
                console.out(plain(run), highlight=False)
                said = time.monotonic()
            if run.end:
                return
            time.sleep(interval)
            run.look()


@one_process
def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, which may not be there yet.")],
    once: Annotated[bool, typer.Option("--once", help="Print the present state and end.")] = False,
    interval: Annotated[float, positive("--interval", "Seconds between looks into the folder.")] = 1.0,
    timeout: Annotated[
        float, positive("--timeout", "Seconds to wait for the run to begin, or for the next heartbeat.")
    ] = 60.0,
) -> None:
    """Show a run's live progress from any terminal: loss, accuracy, speed, and what each rank does.

    It ends with the run. Exit code: 0 finished, 85 stopped, 1 failed or without a heartbeat for --timeout
    seconds. Ctrl-C leaves the run alone. Into a file it prints a line for each epoch, and every ten seconds.
    """
    found, console = Follower(run, timeout), Console(highlight=False, force_terminal=on_terminal())
    if not console.is_terminal:
        console.width = 200
    try:
        wait_for(found, console, 0 if once else timeout)
        if once:
            while found.doubt and not found.end:
                time.sleep(0.2)
                found.look()
            console.print(view(found, console))
        else:
            follow(found, console, interval)
    except KeyboardInterrupt:
        console.out("no longer watching; the run continues", highlight=False)
        raise typer.Exit(130) from None  # as shells count Ctrl-C
    if found.end:
        console.out(found.end[1], highlight=False)
        raise typer.Exit(found.end[0])
