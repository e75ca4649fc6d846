"""`distrib verdict`: which rank ended a job that failed, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distrib.errors import UserError
from distrib.faults import heartbeat
from launch.entry import one_process


@one_process
def verdict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    ended: Annotated[
        bool, typer.Option("--ended", help="The job is over: a rank without a new heartbeat has died.")
    ] = False,
) -> None:
    """Say which rank ended a job that failed, and why, after the fact.

    It reads failure.json, or concludes from the ranks' last heartbeats and writes failure.json.
    Example: distrib verdict runs/first
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such folder: give a run's folder")
    print(f"distrib: {heartbeat.explain(run, ended)}")
