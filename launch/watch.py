"""`distrib watch`: follows a run from another terminal by what it writes into its folder; nothing is written there."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import os
import socket
import time
from collections import deque
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from distrib import board, mnist
from distrib.board import SILENT, TOLD_TO_STOP, Word
from distrib.console import PLAIN_SECONDS, Lines, on_terminal
from distrib.errors import EXIT_CRASH, EXIT_REQUEUE, UserError

EXIT_INTERRUPTED = 130

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
        self._heard: dict[int, tuple[float, float]] = {}  # by rank: its last word's time, when it was seen here
        self._begin, self._doubt = time.monotonic(), None  # type: float, float | None

    def look(self) -> None:
        self.config = self._json("config.json") or self.config
        self.words = board.read(self.folder)  # before the summary, which a rank that says "finished" has written
        for word in self.words:
            told, _ = self._heard.get(word.rank, (None, 0))
            if told is None:  # the clocks of hosts differ: it counts for the first word only
                self._heard[word.rank] = word.time, time.monotonic() - max(0.0, time.time() - word.time)
            elif told != word.time:
                self._heard[word.rank] = word.time, time.monotonic()
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
            if about.st_ino != self._inode or about.st_size < self._offset:  # a run that was gone on with writes it anew
                self._inode, self._offset = about.st_ino, 0
                self.steps.clear()
                self.epochs.clear()
            file.seek(self._offset)
            data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._offset += len(whole)
            for line in whole.splitlines():
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    values = json.loads(line)
                    (self.steps if values["step"] and "loss" in values else self.epochs).append(values)

    @property
    def waiting(self) -> bool:
        """Whether there is no run yet."""
        return not self.config

    @property
    def done(self) -> int:
        """Steps done."""
        working = min((word.step - 1 for word in self.words if word.running), default=0)
        logged = max((lines[-1]["step"] for lines in (self.steps, self.epochs) if lines), default=0)
        return int(self.summary.get("steps") or max(working, logged))

    @property
    def total(self) -> int | None:
        """Steps of the whole run, to --max-steps where it ends there; None where the data cannot be found."""
        if self.epochs:
            per_epoch = self.epochs[-1]["step"] // self.epochs[-1]["epoch"]
        elif images := self.config.get("limit_train") or training_images(self.config.get("data")):
            per_epoch = -(-images // self.config["batch_size"])
        else:
            return None
        steps = per_epoch * self.config["epochs"]
        return int(min(steps, self.config.get("max_steps") or steps))

    def left(self) -> timedelta | None:
        """Time to the end at the speed of the last logged steps, evaluations apart."""
        rates = [line["images_per_second"] for line in list(self.steps)[-5:] if line.get("images_per_second")]
        if self.total is None or not rates:
            return None
        return timedelta(seconds=round((self.total - self.done) * self.config["batch_size"] * len(rates) / sum(rates)))

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
        quiet = min((self.silence(word) for word in alive), default=time.monotonic() - self._begin)
        gone = bool(self.words) and all(word.host == here and board._gone(word.pid) for word in alive)
        if self.waiting or not (gone or quiet > self.patience):
            self._doubt = None
            return None
        self._doubt = self._doubt or time.monotonic()  # the last files of a run may be on their way
        return (EXIT_CRASH, self._accuse(alive, gone, quiet)) if time.monotonic() - self._doubt > SILENT else None

    def _accuse(self, alive: list[Word], gone: bool, quiet: float) -> str:
        """The verdict on a run whose ranks say nothing any more, and left none."""
        if not self.words:
            return f"no rank has said a word for {quiet:.0f} s: it did not start, or ended without a word; see its log"
        if failed := [word for word in self.words if word.state.startswith(board.FAILED)]:
            return _line(failed[0], failed[0].state.removeprefix(board.FAILED))
        if not alive:
            return f"it ended with a message and without a result, at step {self.done}: see its log"
        if gone:
            return _line(alive[0], "its process is gone without a word: killed, or out of memory")
        word, cause = board.suspect(alive, {word.rank for word in alive}, len(self.words), alive[0], "")
        return f"no word of any rank for {quiet:.0f} s: {_line(word, cause)}"


def _line(word: Word, cause: str) -> str:
    return board.line({"rank": word.rank, "host": word.host, "step": word.step, "cause": cause})


def verdict_of(summary: dict[str, Any], max_steps: int | None) -> tuple[int, str]:
    """(exit code, line) of a run with a summary."""
    steps, accuracy = summary.get("steps") or 0, summary.get("test_accuracy")
    asked = not summary.get("finished") and max_steps is not None and steps >= max_steps
    state = "finished" if summary.get("finished") else f"ended at step {steps}, as --max-steps asked" if asked else \
        f"stopped at step {steps} with a checkpoint: start it with the same --run-dir to go on"  # fmt: skip
    test = "" if accuracy is None else f"test accuracy {accuracy:.2f} %, "
    text = (f"{state}: {test}{steps} steps, {summary.get('wall_seconds') or 0:.1f} s,"
            f" {summary.get('images_per_second') or 0:.0f} images/s on {summary.get('world_size')} rank(s)")  # fmt: skip
    return (0 if asked or summary.get("finished") else EXIT_REQUEUE), text


def training_images(data: str | None) -> int | None:
    """Images of the training set by the head of its file; None where it cannot be read."""
    for path in (Path(data or mnist.SHIPPED) / f"train-images-idx3-ubyte{ending}" for ending in (".gz", "")):
        with contextlib.suppress(OSError, EOFError), (gzip.open if path.suffix else open)(path, "rb") as file:
            return int.from_bytes(file.read(8)[4:], "big") or None
    return None


def sparkline(values: Iterable[float], ascii_only: bool = False) -> str:
    """A character for each value, from the lowest to the highest; on a log scale where all are above zero."""
    marks = "_.-~^*#@" if ascii_only else "▁▂▃▄▅▆▇█"
    found = [value for value in values if math.isfinite(value)]
    found = [math.log(value) for value in found] if found and min(found) > 0 else found
    low, high = min(found, default=0.0), max(found, default=0.0)
    return "".join(marks[min(7, int(8 * (value - low) / (high - low)))] if high > low else marks[0] for value in found)


def accuracy(run: Follower) -> float | None:
    """Mean accuracy in percent of the last logged batches."""
    found = [line["accuracy"] for line in list(run.steps)[-AVERAGED:] if "accuracy" in line]
    return sum(found) / len(found) if found else None


def figures(run: Follower, console: Console) -> Iterable[tuple[str, str]]:
    """(name, text) of what the last logged steps say."""
    if run.steps:
        last = run.steps[-1]
        losses = [line["loss"] for line in run.steps][-max(8, console.width - 60) :]
        spark = sparkline(losses, not console.encoding.startswith("utf"))
        yield "loss", f"{last['loss']:.4f}  {spark}  {min(losses):.4f} to {max(losses):.4f} in {len(losses)} logged steps"
        yield "accuracy", f"{accuracy(run):.2f} % of the last {min(AVERAGED, len(run.steps))} logged batches"
        yield "speed", f"{last.get('images_per_second') or 0:.0f} images/s"
        yield "learning rate", f"{last.get('lr', 0):.3g}"


def epoch_line(line: dict[str, Any], epochs: int) -> str:
    """As the run itself says it."""
    return (f"epoch {line['epoch']}/{epochs}: train loss {line['train_loss']:.4f}, accuracy {line['train_accuracy']:.2f} %;"
            f" test loss {line['test_loss']:.4f}, accuracy {line['test_accuracy']:.2f} %")  # fmt: skip


def ranks_table(run: Follower, most: int) -> Group:
    """A line for each rank; of more than `most` those that stand out: not running, silent, furthest behind."""
    first = sorted(run.words, key=lambda word: (word.running and run.silence(word) < 2 * SILENT, word.step, word.rank))
    shown, rest = sorted(first[:most], key=lambda word: word.rank), first[most:]
    table = Table("rank", "host", "step", "does", "last word", box=None, pad_edge=False, header_style="dim")
    for word in shown:
        quiet = run.silence(word)
        style = "red" if word.state.startswith(board.FAILED) or (word.running and quiet > 10) else ""
        does = word.doing if word.running else word.state
        table.add_row(*(Text(text, no_wrap=True, overflow="crop") for text in
                        (str(word.rank), word.host, str(word.step), does, f"{quiet:.0f} s ago")), style=style)  # fmt: skip
    if not rest:
        return Group(table)
    steps = [word.step for word in rest]
    return Group(table, Text(f"and {len(rest)} more ranks at steps {min(steps)} to {max(steps)}, heard of within"
                             f" {max(run.silence(word) for word in rest):.0f} s"))  # fmt: skip


def view(run: Follower, console: Console) -> Group:
    """The whole state, for a terminal or, once, for a file."""
    c, total, left = run.config, run.total, run.left()
    head = f"{run.folder}  {c['variant']}, width {c['width']}, {c['optimizer']}, batch {c['batch_size']}, {c['precision']}"
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(no_wrap=True, overflow="crop")
    bar = Table.grid(padding=(0, 2))
    at = f"{run.done}/{total or '?'}" + ("" if left is None or run.end else f"  left {left}")
    bar.add_row(ProgressBar(total or max(1, run.done), run.done, width=max(10, min(40, console.width - 50))), at)
    grid.add_row(f"epoch {epoch_of(run)}/{c['epochs']}", bar)
    for name, text in figures(run, console):
        grid.add_row(name, Text(text, no_wrap=True, overflow="crop"))
    epochs = [Text(epoch_line(line, c["epochs"]), no_wrap=True, overflow="crop") for line in run.epochs[-SHOWN_EPOCHS:]]
    most = min(SHOWN_RANKS, max(3, console.height - 10 - len(epochs))) if console.is_terminal else SHOWN_RANKS
    ranks = [ranks_table(run, most)] if run.words else [Text("no rank has said a word yet")]
    return Group(Text(head, style="bold", no_wrap=True, overflow="crop"), grid, *epochs, *ranks)


def epoch_of(run: Follower) -> int:
    """The epoch of the coming step, from 1."""
    per_epoch = run.epochs[-1]["step"] / run.epochs[-1]["epoch"] if run.epochs else None
    if per_epoch:
        return int(min(run.done // per_epoch + 1, run.config["epochs"]))
    return int(run.steps[-1]["epoch"]) if run.steps else 1


def plain(run: Follower) -> str:
    """The state in a line, for a log file."""
    parts = [f"epoch {epoch_of(run)}/{run.config['epochs']}", f"step {run.done}/{run.total or '?'}"]
    if run.steps:
        last = run.steps[-1]
        parts += [f"loss {last['loss']:.4f}", f"accuracy {accuracy(run):.2f} %",
                  f"{last.get('images_per_second') or 0:.0f} images/s", f"lr {last.get('lr', 0):.3g}"]  # fmt: skip
    if (left := run.left()) is not None:
        parts.append(f"left {left}")
    heard = [run.silence(word) for word in run.words]
    parts.append(f"{len(heard)} rank(s), last word {max(heard):.0f} s ago" if heard else "no rank has said a word yet")
    return "  ".join(parts)
