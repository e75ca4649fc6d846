"""`distrib watch`: follows a run from another terminal by what it writes into its folder.

Nothing is written there. What cannot be read is waited for, as a file that is half written, or passed over.
"""

from __future__ import annotations

import contextlib
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

from distrib.errors import EXIT_CRASH, EXIT_REQUEUE, UserError
from distrib.faults import heartbeat as board
from distrib.faults.heartbeat import SILENT, TOLD_TO_STOP, Word
from distrib.files import open_to_read
from distrib.run.console import PLAIN_SECONDS, on_terminal
from launch.entry import one_process
from launch.records import (
    line_of,
    read_config,
    read_summary,
    read_words,
    shown,
    whole_lines,
)
from launch.runs import training_images

KEPT, AVERAGED, SHOWN_EPOCHS, SHOWN_RANKS = 60, 20, 6, 16
"""Logged steps of the sparkline and of the running accuracy; epochs and ranks with a line of their own."""

LONGEST = 1e9
"""Seconds, thirty years, of a time left that is told."""


class Follower:
    """What a run's folder tells, read again by each `look`. What is half written is read when it is whole."""

    def __init__(self, folder: Path, patience: float) -> None:
        self.folder, self.patience = folder, patience
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.words: list[Word] = []
        self.steps: deque[dict[str, Any]] = deque(maxlen=KEPT)  # lines of logged steps
        self.epochs: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self.ended = 0  # epochs, those that are kept no more included
        self.end: tuple[int, str] | None = None  # exit code and verdict
        self.doubt: float | None = None  # since when the run seems to be over without a last file
        self.fault = ""  # why config.json cannot be read
        self._inode = self._offset = 0
        self._heard: dict[
            int, tuple[float, float]
        ] = {}  # by rank: its last word's time, when it was seen here
        self._news = time.monotonic()  # when any rank's word was new, or was first looked for

    def look(self) -> None:
        """Read the folder again."""
        self._read_config()
        self.words = read_words(self.folder)  # before the summary: a rank that says "finished" has written it
        for word in self.words:
            told, _ = self._heard.get(word.rank, (None, 0))
            if told != word.time:  # the clocks of hosts differ: they count for the first word only
                age = max(0.0, time.time() - word.time) if told is None else 0.0
                self._news = time.monotonic()
                self._heard[word.rank] = word.time, self._news - age
        with contextlib.suppress(OSError):
            self._read_metrics()
        self.summary = {}
        with contextlib.suppress(OSError, UserError):
            self.summary = read_summary(self.folder / "summary.json")
        self.end = self._end()

    def _read_config(self) -> None:
        """Take in config.json where it is a run's; else what was read before stands."""
        path = self.folder / "config.json"
        try:
            found, _ = read_config(path) if path.exists() else ({}, {})
            self.fault = ""
        except (OSError, UserError) as error:  # half written, damaged, or its disk does not answer
            found, self.fault = {}, str(error)
        if None not in (found.get("epochs"), found.get("batch_size")):
            self.config = found

    def _read_metrics(self) -> None:
        """Take in the whole lines that are new, of which the last are kept."""
        with open_to_read(self.folder / "metrics.jsonl") as file:
            about = os.fstat(file.fileno())
            if about.st_ino != self._inode or about.st_size < self._offset:  # a resumed run writes it anew
                self._inode, self._offset, self.ended = about.st_ino, 0, 0
                self.steps.clear()
                self.epochs.clear()
            file.seek(self._offset)
            last = deque[bytes](maxlen=2 * KEPT)  # lines of steps as they are: few of many are shown
            begin = self._offset
            for text, read in whole_lines(file):
                self._offset = begin + read
                if b'"loss"' in text:
                    last.append(text)
                elif line := line_of(text):
                    self.epochs.append(line)
                    self.ended += 1
            self.steps.extend(line for text in last if (line := line_of(text)) and "loss" in line)

    def progress(self) -> tuple[float, str, str]:
        """(share of all steps done, "epoch 4/8", "25000/60000  left 0:31:20").

        All steps are those to --max-steps where the run ends there, unknown where its data cannot be found.
        The time left is at the speed of the last logged steps, evaluations apart.
        """
        epochs, batch, ended = self.config["epochs"], self.config["batch_size"], self.epochs
        logged = max((lines[-1]["step"] for lines in (self.steps, ended) if lines), default=0)
        slowest = min((word.step for word in self.words if word.running), default=0) - 1
        done = self.summary.get("steps") or max(logged, slowest)
        images = self.config.get("limit_train") or training_images(self.config.get("data")) or 0
        per_epoch = ended[-1]["step"] // ended[-1]["epoch"] if ended else -(-images // batch)
        total = min(per_epoch * epochs, self.config.get("max_steps") or per_epoch * epochs)
        rates = [line.get("images_per_second", 0) for line in list(self.steps)[-5:]]
        rates = [rate for rate in rates if rate > 0]
        text = f"{done}/{total or '?'}"
        if total and rates and not self.end:
            seconds = max(0, total - done) * batch * len(rates) / sum(rates)
            text += f"  left {timedelta(seconds=round(seconds))}" if seconds < LONGEST else "  left ?"
        number = min(done // per_epoch + 1, epochs) if per_epoch else "?"
        return max(0.0, min(1.0, done / total)) if total else 0.0, f"epoch {number}/{epochs}", text

    def silence(self, word: Word) -> float:
        """Seconds since a rank's last word."""
        return max(0.0, time.monotonic() - self._heard[word.rank][1])

    def _end(self) -> tuple[int, str] | None:
        """(exit code, verdict) of a run that goes on no more."""
        if self.summary:
            return verdict_of(self.summary, self.config.get("max_steps"))
        if failure := board.read_verdict(self.folder):
            return EXIT_CRASH, board.line(failure)
        alive = [word for word in self.words if word.running or word.state == TOLD_TO_STOP]
        here = socket.gethostname()
        quiet = min((self.silence(word) for word in alive), default=time.monotonic() - self._news)
        lost = all(word.host == here and board.gone(word.pid) for word in alive)
        gone = bool(self.words) and quiet > SILENT and lost
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
        step = max(word.step for word in words)
        return f"it ended with a message and without a result at step {step}: see its log"
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
        summary.get("finished"),
    )
    asked = max_steps is not None and steps >= max_steps
    state = "ended as --max-steps asked" if asked else "stopped, with a checkpoint to go on from,"
    test = "" if accuracy is None else f"test accuracy {accuracy:.2f} %, "
    text = (
        f"{'finished' if finished else state} at step {steps}:"
        f" {test}{summary.get('wall_seconds') or 0:.1f} s,"
        f" {summary.get('images_per_second') or 0:.0f} images/s on {summary.get('world_size') or '?'} rank(s)"
    )
    return (0 if finished or asked else EXIT_REQUEUE), text


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
    (train, own), (test, accuracy) = (
        (line.get(f"{part}_loss", math.nan), line.get(f"{part}_accuracy", math.nan))
        for part in ("train", "test")
    )
    return (
        f"epoch {line['epoch']}/{epochs}: train loss {train:.4f}, accuracy {own:.2f} %;"
        f" test loss {test:.4f}, accuracy {accuracy:.2f} %"
    )


def ranks(run: Follower, most: int) -> Iterator[Table | Text]:
    """A line for each rank; of more than `most` those that stand out: ended, silent, furthest behind."""
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
        steps, silent = [word.step for word in rest], max(run.silence(word) for word in rest)
        yield Text(
            f"and {len(rest)} more at steps {min(steps)} to {max(steps)}, the last word of each at most"
            f" {silent:.0f} s ago"
        )


def cropped(text: str, style: str = "") -> Text:
    return Text(text, style, no_wrap=True, overflow="crop")


def view(run: Follower, console: Console) -> Group:
    """The whole state, for a terminal or, once, for a file."""
    c, said, (share, epoch, step) = run.config, figures(run), run.progress()
    names = [c.get("variant"), f"width {c.get('width')}", c.get("optimizer")]
    names += [f"batch {c['batch_size']}", c.get("precision")]
    losses = [line["loss"] for line in run.steps if math.isfinite(line["loss"])][
        -max(8, console.width - 60) :
    ]
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


def shown_path(run: Follower) -> str:
    """The folder, for a terminal."""
    return shown(str(run.folder))


def wait_for(run: Follower, console: Console, seconds: float) -> None:
    """Return when the folder holds a run; UserError where it does not within `seconds`."""
    begin = time.monotonic()
    (run.folder / "config.json").exists()  # what the system refuses of the path is told at once
    if run.folder.exists() and not run.folder.is_dir():
        raise UserError(f"{run.folder}: is a file: give a run's folder")
    run.look()
    if not run.config and seconds:
        console.out(f"waiting up to {seconds:g} s for {shown_path(run)}", highlight=False)
    while not run.config:
        if time.monotonic() - begin >= seconds:
            if run.fault:
                raise UserError(run.fault)
            state = "holds no run (config.json)" if run.folder.is_dir() else "no such folder"
            after = f" after {seconds:g} s" if seconds else ""
            raise UserError(f"{run.folder}: {state}{after}: give a run's folder")
        time.sleep(0.2)
        run.look()


def follow(run: Follower, console: Console, interval: float) -> None:
    """Show the run until it ends, in silence where nobody reads any more: the exit code still tells."""
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
    interval: Annotated[float, typer.Option(help="Seconds between looks into the folder.")] = 1.0,
    timeout: Annotated[
        float, typer.Option(help="Seconds to wait for the run to begin, or for any rank's next word.")
    ] = 60.0,
) -> None:
    """Follow a running job from another terminal: progress, loss, accuracy, speed, and what each rank does.

    It ends with the run: exit code 0 where it has finished, 85 where it was stopped, 1 with the verdict where
    it failed or its ranks fell silent. Ctrl-C leaves the run alone. In a file: a line for each epoch, and
    every ten seconds.
    """
    for name, seconds in (("interval", interval), ("timeout", timeout)):
        if not 0 < seconds < math.inf:
            raise UserError(f"--{name} {seconds}: give a finite number of seconds above 0")
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
        console.out("not watched any more; the run goes on", highlight=False)
        raise typer.Exit(130) from None  # as shells count Ctrl-C
    if found.end:
        console.out(found.end[1], highlight=False)
        raise typer.Exit(found.end[0])
