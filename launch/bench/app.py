"""`distrib bench`: speed on real data, against PyTorch on the same work in the same run."""

from __future__ import annotations

from launch.lazy import Place, application, group_of

COMMANDS = {
    "step": Place(
        "launch.bench.step",
        "step",
        "Whole training steps: images/s, where a step's time goes, peak memory; alone or under mpirun.",
    ),
    "ops": Place(
        "launch.bench.ops",
        "ops",
        "Each operation of a training step at each shape, with every algorithm of convolution and its error.",
    ),
    "allreduce": Place(
        "launch.bench.allreduce",
        "allreduce",
        "Time and bandwidth of an all-reduce at each size, every element checked; alone or under mpirun.",
    ),
    "kernels": Place(
        "launch.bench.kernels",
        "kernels",
        "Time every kernel of a training step on one GPU alone, and the step as one graph.",
    ),
    "run": Place(
        "launch.bench.run",
        "run",
        "Whole training runs: seconds from first step to last evaluation, and test accuracy.",
        passes_on=True,
    ),
}

app = application(cls=group_of(COMMANDS), no_args_is_help=True)


@app.callback()
def group() -> None:
    """Measure speed, against PyTorch in the same run."""
