"""The `distrib` command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

import distrib  # first: it sets the number of BLAS threads before NumPy is imported
from distrib.train import run_app, train_command
from launch.entry import number, one_process

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

Is this machine fit for it, alone or under mpirun or srun:

    distrib doctor
""",
)
app.command("train")(train_command)

Model = Annotated[
    Path, typer.Argument(help="A checkpoint (step-….safetensors), or a run's folder: its newest.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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


@app.command()
@one_process
def evaluate(
    checkpoint: Model,
    data: Annotated[
        str | None, typer.Option(help="The data set, as for train.", show_default="the run's own")
    ] = None,
    limit_test: Annotated[int | None, number("--limit-test", "Use only the first N test images.")] = None,
    as_json: AsJson = False,
) -> None:
    """Accuracy and loss of a checkpoint on the test set.

    Example: distrib evaluate runs/first --json
    """
    from distrib.data import formats
    from distrib.comm.base import SingleCommunicator
    from distrib.evaluate import evaluate as run
    from launch.report.records import shown
    from launch.report.runs import data_of, load_model

    found = load_model(checkpoint)
    test = formats.load(data or data_of(checkpoint), limit_test=limit_test)
    found.require_fit(test)
    loss, accuracy = run(found.model, test.test_images, test.test_labels, found.loss, SingleCommunicator())
    result = {
        "checkpoint": str(found.path),
        "data": test.name,
        "images": len(test.test_images),
        "test_loss": loss,
        "test_accuracy": accuracy,
    }
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        print(
            f"{shown(str(found.path))}: test accuracy {accuracy:.2f} %, loss {loss:.4f}"
            f" on {result['images']} images of {shown(test.name)}"
        )


def _add_commands() -> None:
    from launch.bench.app import app as bench
    from launch.bench.gpu_report import gpu_report
    from launch.bench.scale import scale
    from launch.doctor import doctor
    from launch.export import export
    from launch.predict import predict
    from launch.report.page import report
    from launch.report.reproduce import reproduce
    from launch.submit import submit
    from launch.torch_peer.train import torch_train
    from launch.verdict import verdict
    from launch.watch import watch

    for command in (one_process(predict), watch, report, export, reproduce, scale, doctor, submit, verdict):
        app.command()(command)
    app.add_typer(bench, name="bench")
    for command in (torch_train, gpu_report):  # for reproduce and make
        app.command(hidden=True)(command)


_add_commands()


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run_app(app))


if __name__ == "__main__":
    main()
