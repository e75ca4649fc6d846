"""`distrib bench`: speed on real data, against PyTorch on the same work in the same run."""

from __future__ import annotations

import typer

from launch.bench.allreduce import allreduce
from launch.bench.kernels import kernels
from launch.bench.ops import ops
from launch.bench.run import run
from launch.bench.step import step

app = typer.Typer(help="Measure speed, against PyTorch in the same run.", no_args_is_help=True)
for command in (step, ops, allreduce, kernels):
    app.command()(command)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(run)


@app.callback()
def group() -> None:
    """Measure speed, against PyTorch in the same run."""
