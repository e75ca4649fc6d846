"""A run's folder, followed while the run goes on: what it wrote, and how it ended.

What cannot be read is waited for, as a file that is half written, or passed over.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections import deque
from datetime import timedelta
from pathlib import Path
from typing import Any

from distrib.errors import EXIT_CRASH, EXIT_REQUEUE, UserError
from distrib.faults import heartbeat, survived
from distrib.faults.heartbeat import STALE_SECONDS, TOLD_TO_STOP, Heartbeat
from distrib.files import open_to_read
from launch.report.records import line_of, read_config, read_heartbeats, read_summary, whole_lines
from launch.report.runs import images_of

KEPT = 60
"""Logged steps, and epochs, that are kept."""

LONGEST = 1e9
"""Seconds, thirty years, of a time left that is told."""


class Follower:
    """What a run's folder tells, read again by each `look`. What is half written is read when it is whole."""

    def __init__(self, folder: Path, patience: float) -> None:
        self.folder, self.patience = folder, patience
        self.config: dict[str, Any] = {}
        self.dataset: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.heartbeats: list[Heartbeat] = []
        self.survived: list[dict[str, Any]] = []  # ranks that died while the others went on
        self.steps: deque[dict[str, Any]] = deque(maxlen=KEPT)  # lines of logged steps
        self.epochs: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self.ended = 0  # epochs, those that are kept no more included
        self.end: tuple[int, str] | None = None  # exit code and verdict
        self.doubt: float | None = None  # since when the run seems to be over, though without a last file
        self.fault = ""  # why config.json cannot be read
        self._inode = self._offset = 0
        # by rank: the time in its heartbeat, when that was seen here
        self._seen: dict[int, tuple[float, float]] = {}
        self._news = time.monotonic()  # when any heartbeat was new, or was first looked for

    def look(self) -> None:
        """Read the folder again."""
        self._read_config()
        # before the summary, which a rank writes before its heartbeat says "finished"
        self.heartbeats = read_heartbeats(self.folder)
        self.survived = survived.read(self.folder)
        for beat in self.heartbeats:
            known, _ = self._seen.get(beat.rank, (None, 0))
            if known != beat.time:  # clocks differ between hosts: they count for the first heartbeat only
                age = max(0.0, time.time() - beat.time) if known is None else 0.0
                self._news = time.monotonic()
                self._seen[beat.rank] = beat.time, self._news - age
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
            found, _, self.dataset = read_config(path) if path.exists() else ({}, {}, {})
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
        slowest = min((beat.step for beat in self.heartbeats if beat.running), default=0) - 1
        done = self.summary.get("steps") or max(logged, slowest)
        images = images_of(self.config, self.dataset) or 0
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

    def age(self, beat: Heartbeat) -> float:
        """Seconds since a rank's last heartbeat."""
        return max(0.0, time.monotonic() - self._seen[beat.rank][1])

    def _end(self) -> tuple[int, str] | None:
        """(exit code, verdict) of a run that has ended; None while it runs."""
        if self.summary:
            return verdict_of(self.summary, self.config.get("max_steps"))
        if failure := heartbeat.read_failure(self.folder):
            return EXIT_CRASH, heartbeat.format_failure(failure)
        alive = [beat for beat in self.heartbeats if beat.running or beat.state == TOLD_TO_STOP]
        here = socket.gethostname()
        quiet = min((self.age(beat) for beat in alive), default=time.monotonic() - self._news)
        near = [heartbeat.is_dead(beat.pid) for beat in alive if beat.host == here]
        gone = bool(self.heartbeats) and quiet > STALE_SECONDS and len(near) == len(alive) and all(near)
        suspended = not all(near)  # or busy: its processes are there
        if not self.config or not (gone or (quiet > self.patience and not suspended)):
            self.doubt = None
            return None
        self.doubt = self.doubt or time.monotonic()  # the last files of a run may be on their way
        if time.monotonic() - self.doubt <= STALE_SECONDS:
            return None
        return EXIT_CRASH, diagnose(
            self.heartbeats, alive, gone, f"no heartbeat of any rank for {quiet:.0f} s"
        )


def diagnose(beats: list[Heartbeat], alive: list[Heartbeat], gone: bool, quiet: str) -> str:
    """The verdict on a run without a last file: no more heartbeats, or ranks that ended with a message."""
    if not beats:
        return f"{quiet}: it did not start, or was killed; see its log"
    failed = any(beat.state.startswith(heartbeat.FAILED) for beat in beats)
    if not alive and not failed:
        step = max(beat.step for beat in beats)
        return f"it ended with a message and without a result at step {step}: see its log"
    culprit, cause = heartbeat.find_culprit(beats, {beat.rank for beat in alive}, len(beats), beats[0], quiet)
    if gone and not failed:
        cause = "its process is gone: killed, or out of memory"
    failure = {"rank": culprit.rank, "host": culprit.host, "step": culprit.step, "cause": cause}
    line = heartbeat.format_failure(failure)
    return line if gone or failed else f"{quiet}: {line}"


def verdict_of(summary: dict[str, Any], max_steps: int | None) -> tuple[int, str]:
    """(exit code, line) of a run with a summary."""
    steps, accuracy, finished = (summary.get(name) for name in ("steps", "test_accuracy", "finished"))
    steps = steps or 0
    asked = max_steps is not None and steps >= max_steps
    state = "ended as --max-steps asked" if asked else "stopped, with a checkpoint to resume from,"
    test = "" if accuracy is None else f"test accuracy {accuracy:.2f} %, "
    text = (
        f"{'finished' if finished else state} at step {steps}:"
        f" {test}{summary.get('wall_seconds') or 0:.1f} s,"
        f" {summary.get('images_per_second') or 0:.0f} images/s on {summary.get('world_size') or '?'} rank(s)"
    )
    return (0 if finished or asked else EXIT_REQUEUE), text
