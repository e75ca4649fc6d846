"""`distrib watch`: follows a run from another terminal by what it writes into its folder; nothing is written there."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import time
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from distrib import board
from distrib.board import SILENT, TOLD_TO_STOP, Word
from distrib.console import PLAIN_SECONDS, Lines, on_terminal
from distrib.errors import EXIT_CRASH, EXIT_REQUEUE, UserError
from launch.runs import training_images

KEPT, AVERAGED, SHOWN_EPOCHS, SHOWN_RANKS = 60, 20, 6, 16
"""Logged steps of the sparkline and of the running accuracy; epochs and ranks with a line of their own."""


class Follower:
    """What a run's folder tells, read again by each `look`. What is half written is read when it is whole."""

    def __init__(self, folder: Path, patience: float) -> None:
        self.folder, self.patience = folder, patience
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.words: list[Word] = []
        self.steps: deque[dict[str, Any]] = deque(maxlen=KEPT)  # lines of logged steps
        self.epochs: list[dict[str, Any]] = []
        self.end: tuple[int, str] | None = None  # exit code and verdict
        self._inode = self._offset = 0
        self._heard: dict[
            int, tuple[float, float]
        ] = {}  # by rank: its last word's time, when it was seen here
        self._news = time.monotonic()  # when any rank's word was new, or was first looked for
        self.doubt: float | None = None  # since when the run seems to be over without a last file

    def look(self) -> None:
        """Read the folder again."""
        config = self._json("config.json") or {}
        self.config = (
            config if {"epochs", "batch_size"} <= config.keys() else self.config
        )  # else no run's, or half written
        self.words = board.read(
            self.folder
        )  # before the summary, which a rank that says "finished" has written
        for word in self.words:
            told, _ = self._heard.get(word.rank, (None, 0))
            if told != word.time:  # the clocks of hosts differ: they count for the first word only
                age = max(0.0, time.time() - word.time) if told is None else 0.0
                self._news = time.monotonic()
                self._heard[word.rank] = word.time, self._news - age
        self._read_metrics()
        self.summary = self._json("summary.json") or {}
        self.end = self._end()

    def _json(self, name: str) -> dict[str, Any] | None:
        with contextlib.suppress(OSError, ValueError):
            value = json.loads((self.folder / name).read_text())
            return value if isinstance(value, dict) else None
        return None

    def _read_metrics(self) -> None:
        """Take in the whole lines that are new."""
        with contextlib.suppress(OSError), open(self.folder / "metrics.jsonl", "rb") as file:
            about = os.fstat(file.fileno())
            if (
                about.st_ino != self._inode or about.st_size < self._offset
            ):  # a run that was gone on with writes it anew
                self._inode, self._offset = about.st_ino, 0
                self.steps.clear()
                self.epochs.clear()
            file.seek(self._offset)
            whole, end, _ = file.read().rpartition(b"\n")
            self._offset += len(whole + end)
            for line in whole.splitlines():
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    values = json.loads(line)
                    if values["step"] and ("loss" in values or "test_loss" in values):
                        (self.steps if "loss" in values else self.epochs).append(values)

    def progress(self) -> tuple[float, str, str]:
        """(share of all steps done, "epoch 4/8", "25000/60000  left 0:31:20").

        All steps are those to --max-steps where the run ends there, unknown where its data cannot be found. The time
        left is at the speed of the last logged steps, evaluations apart.
        """
        epochs, batch, working = (
            self.config["epochs"],
            self.config["batch_size"],
            [word for word in self.words if word.running],
        )
        logged = max((lines[-1]["step"] for lines in (self.steps, self.epochs) if lines), default=0)
        done = self.summary.get("steps") or max(logged, min((word.step for word in working), default=0) - 1)
        images = self.config.get("limit_train") or training_images(self.config.get("data")) or 0
        per_epoch = (
            self.epochs[-1]["step"] // self.epochs[-1]["epoch"] if self.epochs else -(-images // batch)
        )
        total = min(per_epoch * epochs, self.config.get("max_steps") or per_epoch * epochs)
        rates = [line["images_per_second"] for line in list(self.steps)[-5:] if line.get("images_per_second")]
        text = f"{done}/{total or '?'}"
        if total and rates and not self.end:
            text += f"  left {timedelta(seconds=round((total - done) * batch * len(rates) / sum(rates)))}"
        return (
            done / total if total else 0.0,
            f"epoch {min(done // per_epoch + 1, epochs) if per_epoch else '?'}/{epochs}",
            text,
        )

    def silence(self, word: Word) -> float:
        """Seconds since a rank's last word."""
        return max(0.0, time.monotonic() - self._heard[word.rank][1])

    def _end(self) -> tuple[int, str] | None:
        """(exit code, verdict) of a run that goes on no more."""
        if self.summary:
            return verdict_of(self.summary, self.config.get("max_steps"))
        with contextlib.suppress(KeyError):
            if failure := self._json("failure.json"):
                return EXIT_CRASH, board.line(failure)
        alive = [word for word in self.words if word.running or word.state == TOLD_TO_STOP]
        here = socket.gethostname()
        quiet = min((self.silence(word) for word in alive), default=time.monotonic() - self._news)
        gone = (
            bool(self.words)
            and quiet > SILENT
            and all(word.host == here and board.gone(word.pid) for word in alive)
        )
        if not self.config or not (gone or quiet > self.patience):
            self.doubt = None
            return None
        self.doubt = self.doubt or time.monotonic()  # the last files of a run may be on their way
        if time.monotonic() - self.doubt <= SILENT:
            return None
        return EXIT_CRASH, accuse(self.words, alive, gone, f"no word of any rank for {quiet:.0f} s")


def accuse(words: list[Word], alive: list[Word], gone: bool, quiet: str) -> str:
    """The verdict on a run without a last file: its ranks say nothing any more, or ended with a message."""
    if not words:
        return f"{quiet}: it did not start, or ended without a word; see its log"
    failed = any(word.state.startswith(board.FAILED) for word in words)
    if not alive and not failed:
        return f"it ended with a message and without a result at step {max(word.step for word in words)}: see its log"
    word, cause = board.suspect(words, {word.rank for word in alive}, len(words), words[0], quiet)
    if gone and not failed:
        cause = "its process is gone without a word: killed, or out of memory"
    verdict = board.line({"rank": word.rank, "host": word.host, "step": word.step, "cause": cause})
    return verdict if gone or failed else f"{quiet}: {verdict}"


def verdict_of(summary: dict[str, Any], max_steps: int | None) -> tuple[int, str]:
    """(exit code, line) of a run with a summary."""
    steps, accuracy, finished = (
        summary.get("steps") or 0,
        summary.get("test_accuracy"),
        bool(summary.get("finished")),
    )
    asked = max_steps is not None and steps >= max_steps
    state = (
        "finished"
        if finished
        else "ended as --max-steps asked"
        if asked
        else "stopped, with a checkpoint to go on from,"
    )
    test = "" if accuracy is None else f"test accuracy {accuracy:.2f} %, "
    text = (
        f"{state} at step {steps}: {test}{summary.get('wall_seconds') or 0:.1f} s,"
        f" {summary.get('images_per_second') or 0:.0f} images/s on {summary.get('world_size')} rank(s)"
    )
    return (0 if finished or asked else EXIT_REQUEUE), text


def sparkline(values: Iterable[float]) -> str:
    """A block for each value, as high as it lies between the lowest and the highest; of logarithms where all are above 0."""
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
        "speed": f"{last.get('images_per_second') or 0:.0f} images/s",
        "learning rate": f"{last.get('lr', 0):.3g}",
    }


def epoch_line(line: dict[str, Any], epochs: int) -> str:
    """As the run itself says it."""
    return (
        f"epoch {line['epoch']}/{epochs}: train loss {line['train_loss']:.4f}, accuracy {line['train_accuracy']:.2f} %;"
        f" test loss {line['test_loss']:.4f}, accuracy {line['test_accuracy']:.2f} %"
    )


def ranks(run: Follower, most: int) -> Iterator[Table | Text]:
    """A line for each rank; of more than `most` those that stand out: not running, silent, furthest behind."""
    order = sorted(
        run.words, key=lambda word: (word.running and run.silence(word) < 2 * SILENT, word.step, word.rank)
    )
    shown, rest = sorted(order[:most], key=lambda word: word.rank), order[most:]
    table = Table("rank", "host", "step", "does", "last word", box=None, pad_edge=False, header_style="dim")
    for word in shown:
        bad = word.state.startswith(board.FAILED) or (word.running and run.silence(word) > 10)
        cells = (
            word.rank,
            word.host,
            word.step,
            word.doing if word.running else word.state,
            f"{run.silence(word):.0f} s ago",
        )
        table.add_row(*(cropped(str(cell)) for cell in cells), style="red" if bad else "")
    yield table
    if rest:
        yield Text(
            f"and {len(rest)} more at steps {min(word.step for word in rest)} to {max(word.step for word in rest)}, the last"
            f" word of each at most {max(run.silence(word) for word in rest):.0f} s ago"
        )


def cropped(text: str, style: str = "") -> Text:
    return Text(text, style, no_wrap=True, overflow="crop")


def view(run: Follower, console: Console) -> Group:
    """The whole state, for a terminal or, once, for a file."""
    c, shown, (share, epoch, step) = run.config, figures(run), run.progress()
    names = (
        f"{c.get('variant')}, width {c.get('width')}",
        c.get("optimizer"),
        f"batch {c['batch_size']}",
        c.get("precision"),
    )
    losses = [line["loss"] for line in run.steps][-max(8, console.width - 60) :]
    if losses and console.encoding.startswith("utf"):
        shown["loss"] += (
            f"  {sparkline(losses)}  {min(losses):.2g} to {max(losses):.2g} in {len(losses)} logged steps"
        )
    grid = Table.grid(padding=(0, 2))
    grid.add_row(epoch, ProgressBar(1.0, share, width=max(10, min(60, console.width - 20))))
    for name, text in {"step": step, **shown}.items():
        grid.add_row(name, cropped(text))
    epochs = [cropped(epoch_line(line, c["epochs"])) for line in run.epochs[-SHOWN_EPOCHS:]]
    most = min(SHOWN_RANKS, max(3, console.height - 10 - len(epochs))) if console.is_terminal else SHOWN_RANKS
    return Group(
        cropped(f"{run.folder}  {', '.join(map(str, names))}", "bold"),
        grid,
        *epochs,
        *(ranks(run, most) if run.words else [Text("no rank has said a word yet")]),
    )


def plain(run: Follower) -> str:
    """The state in a line, for a log file."""
    (_, epoch, step), heard = run.progress(), [run.silence(word) for word in run.words]
    parts = [epoch, *(f"{name} {text}" for name, text in {"step": step, **figures(run)}.items())]
    parts.append(
        f"{len(heard)} rank(s), last word {max(heard):.0f} s ago" if heard else "no rank has said a word yet"
    )
    return "  ".join(parts)


def wait_for(run: Follower, console: Console, seconds: float) -> None:
    """Return when the folder holds a run; UserError where it does not within `seconds`."""
    begin = time.monotonic()
    run.look()
    if not run.config and seconds:
        console.out(f"waiting up to {seconds:g} s for {run.folder}", highlight=False)
    while not run.config:
        if time.monotonic() - begin >= seconds:
            state = "holds no run (config.json)" if run.folder.is_dir() else "no such folder"
            raise UserError(
                f"{run.folder}: {state}{f' after {seconds:g} s' if seconds else ''}: give a run's folder"
            )
        time.sleep(0.2)
        run.look()


def follow(run: Follower, console: Console, interval: float) -> None:
    """Show the run until it ends, or nobody reads any more."""
    said, epochs = -math.inf, len(run.epochs)
    show = Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
    with show if console.is_terminal and not console.is_dumb_terminal else contextlib.nullcontext() as live:
        while True:
            if live:
                live.update(view(run, console), refresh=True)
            for line in [] if live else run.epochs[epochs:]:
                console.out(epoch_line(line, run.config["epochs"]), highlight=False)
            epochs = len(run.epochs)
            if not live and time.monotonic() - said >= PLAIN_SECONDS:
                console.out(plain(run), highlight=False)
                said = time.monotonic()
            if run.end or console.quiet:
                return
            time.sleep(interval)
            run.look()


def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, which may not be there yet.")],
    once: Annotated[bool, typer.Option("--once", help="Print the present state and end.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between looks into the folder.")] = 1.0,
    timeout: Annotated[
        float, typer.Option(help="Seconds to wait for the run to begin, or for any rank's next word.")
    ] = 60.0,
) -> None:
    """Follow a running job from another terminal: progress, loss, accuracy, speed, and what each rank does.

    It ends with the run: exit code 0 where it has finished, 85 where it was stopped, 1 with the verdict where it
    failed or its ranks fell silent. Ctrl-C leaves the run alone. In a file: a line for each epoch and every ten seconds.
    """
    for name, seconds in (("interval", interval), ("timeout", timeout)):
        if not 0 < seconds < math.inf:
            raise UserError(f"--{name} {seconds}: give a finite number of seconds above 0")
    found, console = Follower(run, timeout), Lines(highlight=False, force_terminal=on_terminal())
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
        console.out("not watched any more; the run goes on", highlight=False)
        raise typer.Exit(130) from None  # as shells count Ctrl-C
    if found.end:
        console.out(found.end[1], highlight=False)
        raise typer.Exit(found.end[0])
