"""The `distrib` command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import distrib  # first: it sets the number of BLAS threads before NumPy is imported
from distrib.command import run_app
from launch.lazy import Place, application, group_of

COMMANDS = {
    "train": Place(
        "launch.train",
        "train",
        "Train ResNet-9 on MNIST or your pictures: in one process, or on several ranks.",
    ),
    "evaluate": Place("launch.evaluate", "evaluate", "Accuracy and loss of a checkpoint on the test set."),
    "predict": Place(
        "launch.predict",
        "predict",
        "The class of each image, with its probability and the next likely ones.",
    ),
    "watch": Place(
        "launch.watch",
        "watch",
        "Show a run's live progress from any terminal: loss, accuracy, speed, and what each rank does.",
    ),
    "report": Place(
        "launch.report.page",
        "report",
        "A page for one run, or a comparison of several: curves, tables, and digits taken for others.",
    ),
    "export": Place(
        "launch.export",
        "export",
        "Write a checkpoint for other programs: an ONNX graph, or tensors for PyTorch's `load_state_dict`.",
    ),
    "check-model": Place(
        "launch.check_model",
        "check_model",
        "Check a network on a few random images of the data's shape, in float64, and name the faulty layer.",
    ),
    "reproduce": Place(
        "launch.report.reproduce",
        "reproduce",
        "All that the reference reports: accuracies, ablation, loss curves, times, beside its own figures.",
    ),
    "scale": Place(
        "launch.bench.scale",
        "scale",
        "Strong and weak scaling on the ranks at hand: images/s, step time, efficiency, communication.",
    ),
    "doctor": Place(
        "launch.doctor",
        "doctor",
        "Check this machine for the trainer: alone, or on all ranks that mpirun or srun started.",
    ),
    "accept": Place(
        "launch.accept.command",
        "accept",
        "Is this cluster fit to train on? Measures all ranks of mpirun or srun, or one, in a minute.",
    ),
    "submit": Place(
        "launch.submit",
        "submit",
        "Submit a training run to Slurm; sbatch's options win over the #SBATCH lines of slurm/train.sh.",
    ),
    "verdict": Place(
        "launch.verdict", "verdict", "Say which rank ended a job that failed, and why, after the fact."
    ),
    "verify-ranks": Place(
        "launch.verify_ranks",
        "verify_ranks",
        "Train the same steps on 1, 2, 3 and 4 ranks, and compare the results: parameters, losses, logits.",
        passes_on=True,
    ),
    "bench": Place("launch.bench.app", "app", "Measure speed, against PyTorch in the same run."),
    # for reproduce and make
    "torch-train": Place(
        "launch.torch_peer.train",
        "torch_train",
        "Train the same network in PyTorch, in one process, with the options of `distrib train`.",
        hidden=True,
    ),
    "gpu-report": Place(
        "launch.bench.gpu_report",
        "gpu_report",
        "Run every check and benchmark that needs a GPU, one after another, into one JSON file.",
        hidden=True,
    ),
}

app = application(
    cls=group_of(COMMANDS),
    no_args_is_help=True,
    help="""
Data-parallel training of ResNet-9 on MNIST, in plain CuPy and NumPy.

The first run, a quarter of a minute on two cores, to 99 % test accuracy:

    distrib train --ranks 2 --recipe demo

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


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run_app(app))


if __name__ == "__main__":
    main()
