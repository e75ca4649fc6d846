"""`distrib train`: trains in this process, or starts several ranks and ends as they do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Annotated, Any

import typer

from distrib import launched_ranks
from distrib.config import build
from distrib.errors import EXIT_REQUEUE, EXIT_USAGE, LaunchError
from distrib.faults.parent import end_with_parent
from distrib.train import train as train_here
from distrib.train import with_options
from launch.entry import number
from launch.machine import child_environment, mpirun, threads_each

ELASTIC = ("--with-ft", "ulfm")
"""What makes Open MPI's mpirun keep the others when a rank dies."""

Ranks = Annotated[
    int | None,
    number("--ranks", "Start so many ranks on this machine, as mpirun would. Default: this process alone."),
]


def train(ranks: int | None = None, **given: Any) -> None:
    """Train ResNet-9 on MNIST or your pictures: in one process, or on several ranks.

    Examples:

      distrib train --recipe demo

      distrib train --ranks 4 --epochs 1 --limit-train 8000
    """
    if ranks is not None and launched_ranks() > 1:
        raise LaunchError(
            f"--ranks {ranks}: mpirun or srun has started {launched_ranks()} rank(s) already: leave this"
            " option out, or start without them"
        )
    config = build(given)
    if ranks is None or ranks == 1:
        raise typer.Exit(train_here(config))
    launcher, *count = mpirun(ranks)
    start = [launcher, *(ELASTIC if config.elastic else ()), *count]
    command = [*start, sys.executable, "-m", "distrib.train", *arguments(given)]
    raise typer.Exit(run_ranks(command, child_environment(threads_each(ranks))))


with_options(train, ranks=Ranks)


def arguments(given: dict[str, Any]) -> Iterator[str]:
    """The options that were `given`, as one types them."""
    for name, value in given.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{'' if value else 'no-'}{flag}"
        elif value is not None:
            yield f"--{flag}={value}"


def run_ranks(command: list[str], env: dict[str, str]) -> int:
    """Run mpirun to its end; returns its exit code.

    A signal that asks a run to stop reaches the ranks as SIGUSR1, which mpirun passes on: at others it kills
    them within a second. So mpirun is in a session of its own, where the terminal's do not reach it. A second
    Ctrl-C does kill them. What stops and continues this process stops and continues them.
    """
    job = Job()
    for each in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGTSTP):
        if signal.getsignal(each) is not signal.SIG_IGN or each in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(each, job.pause if each == signal.SIGTSTP else job.stop)
    job.mpirun = subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=partial(end_with_parent, signal.SIGTERM),
    )
    if job.asked:  # before there was anything to stop
        job.mpirun.terminate()
    assert job.mpirun.stderr
    for text in without_banner(job.mpirun.stderr):
        sys.stderr.buffer.write(text)  # which never fails, see `secure_output`
        sys.stderr.flush()
    code = job.mpirun.wait()
    return 128 - code if code < 0 else code


class Job:
    """mpirun, and the signals that were sent to it."""

    def __init__(self) -> None:
        self.mpirun: subprocess.Popen[bytes] | None = None
        self.asked = set[int]()

    def stop(self, number: int, _: object) -> None:
        """Ask the ranks to stop with a checkpoint; at a second Ctrl-C, end them."""
        again = number == signal.SIGINT and number in self.asked
        self.asked.add(number)
        self.send(signal.SIGTERM if again else signal.SIGUSR1)

    def pause(self, *_: object) -> None:
        """Stop with the ranks; here execution goes on when this process is continued."""
        self.send(signal.SIGTSTP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self.send(signal.SIGCONT)

    def send(self, number: int) -> None:
        if self.mpirun:
            self.mpirun.send_signal(number)


RULE = b"-" * 74
"""Around what mpirun itself says."""


def without_banner(lines: Iterable[bytes]) -> Iterator[bytes]:
    """What comes from the ranks and mpirun, but for the lines in which mpirun tells of an exit code.

    A rank that ends with a code of ours has said why.
    """
    of_ours = re.compile(rf"Exit code: +({EXIT_USAGE}|{EXIT_REQUEUE})\n".encode())
    held: list[bytes] = []
    for line in lines:
        rule = line.startswith(RULE)
        if not held and not rule:
            yield line
            continue
        held.append(line)
        if (rule and len(held) > 1) or len(held) > 20:
            text = b"".join(held)
            if not of_ours.search(text):
                yield text
            held = []
    yield b"".join(held)
