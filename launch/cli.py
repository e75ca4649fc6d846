"""The `distrib` command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import distrib  # first: it sets the number of BLAS threads before NumPy is imported
from distrib.train import run_app, train_command

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""
Data-parallel training of ResNet-9 on MNIST, in plain CuPy and NumPy.

The first run, a quarter of a minute on two cores, to 99 % test accuracy:

    mpirun -n 2 python -m distrib.train --recipe demo

On one GPU, or one process on the CPU:

    distrib train --recipe demo --run-dir runs/first

Look at what came out:

    distrib evaluate runs/first

    distrib predict runs/first digit.png --draw

    distrib report runs/first

From another terminal, while it runs:

    distrib watch runs/first

Does a network of your own do what training relies on:

    distrib check-model net.py:net

Is this machine fit for it, alone or under mpirun or srun:

    distrib doctor
""",
)
app.command("train")(train_command)


def version(show: bool) -> None:
    if show:
        print(f"distrib {distrib.__version__}")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _add_commands() -> None:
    from launch.bench.app import app as bench
    from launch.bench.gpu_report import gpu_report
    from launch.bench.scale import scale
    from launch.check_model import check_model
    from launch.doctor import doctor
    from launch.evaluate import evaluate
    from launch.export import export
    from launch.predict import predict
    from launch.report.page import report
    from launch.report.reproduce import reproduce
    from launch.submit import submit
    from launch.torch_peer.train import torch_train
    from launch.verdict import verdict
    from launch.verify_ranks import verify_ranks
    from launch.watch import watch

    everyday = evaluate, predict, watch, report, export, check_model
    for command in (*everyday, reproduce, scale, doctor, submit, verdict):
        app.command()(command)
    passes_on = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(context_settings=passes_on)(verify_ranks)
    app.add_typer(bench, name="bench")
    for command in (torch_train, gpu_report):  # for reproduce and make
        app.command(hidden=True)(command)


_add_commands()


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run_app(app))


if __name__ == "__main__":
    main()
