"""Prints a run: a table at the start, progress, and the result. Only rank 0 prints."""

from __future__ import annotations

import io
import os
import select
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from distrib import LAUNCHERS, parent

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

PLAIN_SECONDS = 10.0
"""Seconds between lines of progress if the output is a file."""


def on_terminal() -> bool:
    """Whether the output is a terminal. mpirun gives its ranks one even if it writes to a log file."""
    if not sys.stdout.isatty():
        return False
    pid, name = parent()
    if name not in LAUNCHERS:
        return True
    try:
        return os.readlink(f"/proc/{pid}/fd/1").startswith(("/dev/pts/", "/dev/tty"))
    except OSError:
        return False


class Unfailing(io.FileIO):
    """Standard output or error that never fails: what cannot be written is lost."""

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # a non-blocking file that is full
                select.select([], [self], [])
        except OSError:
            return len(data)
        return written


def secure_output() -> None:
    """Make printing never fail, and reserve the numbers of closed standard streams.

    A terminal without UTF-8 gets "?" for what it cannot show.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):  # unless a caller replaced it
            raw: Any = Unfailing(number, "w", closefd=False)
            at_once = getattr(stream, "write_through", False)  # PYTHONUNBUFFERED
            lines = number == 2 or getattr(stream, "line_buffering", False)
            new = io.TextIOWrapper(
                raw if at_once else io.BufferedWriter(raw),
                getattr(stream, "encoding", None),
                "replace",
                line_buffering=lines,
                write_through=at_once,
            )
            setattr(sys, name, new)


class Screen:
    """Shows the progress of a run: a bar on a terminal, a line every few seconds in a log file.

    Rich is imported for a terminal alone, because each run would start later by it.
    """

    def __init__(self, active: bool) -> None:
        self._bar: Progress | None = None
        self._console: Console | None = None
        self._last_line = time.monotonic()
        self._active = active
        if active and on_terminal():
            from rich.console import Console

            self._console = Console(highlight=False, force_terminal=True)

    def say(self, text: str) -> None:
        """Print one line."""
        if self._console:
            self._console.print(text, markup=False, soft_wrap=True)
        elif self._active:
            print(text, flush=True)

    def table(self, title: str, rows: Mapping[str, Any]) -> None:
        """Print names and values, one per line."""
        if not self._console:
            widest = max(map(len, rows))
            self.say("\n".join([title, *(f"{name:{widest}} {value}" for name, value in rows.items())]))
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
        for name, value in rows.items():
            table.add_row(name, Text(str(value)))
        self._console.print(table)

    def start(self, steps: int, done: int, epochs: int) -> None:
        """Start to show progress over `steps` steps, of which `done` are done."""
        self._first, self._begin, self._steps, self._epochs = done, time.monotonic(), steps, epochs
        if not self._console:
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[info]}"),
            console=self._console,
            refresh_per_second=4,
            redirect_stdout=False,
            redirect_stderr=False,  # a crash must reach the real stderr
        )
        self._task = bar.add_task(f"epoch 1/{epochs}", total=steps, completed=done, info="")
        bar.start()

    def due(self) -> bool:
        """Whether `progress` would show anything now. Cheap to call."""
        if not self._active:
            return False
        interval = 0.25 if self._bar else PLAIN_SECONDS
        return time.monotonic() - self._last_line >= interval

    def progress(self, step: int, epoch: int, loss: float, images_per_second: float) -> None:
        """Show that `step` steps are done."""
        self._last_line = time.monotonic()
        info = f"loss {loss:.4f}  {images_per_second:.0f} images/s"
        if self._bar is not None:
            self._bar.update(
                self._task, completed=step, description=f"epoch {epoch + 1}/{self._epochs}", info=info
            )
            return
        rate = (time.monotonic() - self._begin) / max(1, step - self._first)
        left = timedelta(seconds=round(rate * (self._steps - step)))
        self.say(f"epoch {epoch + 1}/{self._epochs}  step {step}/{self._steps}  {info}  left {left}")

    def close(self) -> None:
        """End the progress display."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
