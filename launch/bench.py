"""`distrib bench`: speed on real data, against PyTorch on the same work in the same run."""

from __future__ import annotations

import typer

from launch.bench_allreduce import allreduce
from launch.bench_kernels import kernels
from launch.bench_ops import ops
from launch.bench_run import run
from launch.bench_save import save
from launch.bench_step import step

app = typer.Typer(help="Measure speed, against PyTorch in the same run.", no_args_is_help=True)
app.command()(step)
app.command()(ops)
app.command()(allreduce)
app.command()(kernels)
app.command()(save)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(run)


@app.callback()
def group() -> None:
    """Measure speed, against PyTorch in the same run."""
