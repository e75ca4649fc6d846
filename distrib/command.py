"""The options of a training run on the command line, built from the fields of `Config`."""

from __future__ import annotations

import inspect
import sys
from typing import Annotated, Any

import typer

from distrib.config import build, options
from distrib.errors import EXIT_USAGE, UserError

TYPES = {"int": int, "float": float, "str": str, "bool": bool}


def train_command(**given: Any) -> None:
    """Train ResNet-9 on MNIST: in one process, or on all ranks that mpirun or srun started.

    Examples:

      distrib train --recipe demo

      mpirun -n 4 python -m distrib.train --epochs 1 --limit-train 8000
    """
    from distrib.train import train

    raise typer.Exit(train(build(given)))


def _signature() -> inspect.Signature:
    """One typer option for each field; None stands for "not given", so that a recipe can fill it in."""
    parameters = []
    for name, kind, default, text in options():
        base: Any = TYPES[kind.split(" | ")[0]]
        shown = text if default in (None, False) else f"{text} [default: {default}]"
        flag = f"--{name.replace('_', '-')}"
        annotation = Annotated[base | None, typer.Option(flag, help=shown, show_default=False)]
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )
    return inspect.Signature(parameters)


train_command.__signature__ = _signature()  # type: ignore[attr-defined]
train_command.__annotations__ = {p.name: p.annotation for p in train_command.__signature__.parameters.values()}  # type: ignore[attr-defined]


def run_app(app: typer.Typer) -> int:
    """Run a typer application; a UserError becomes one line and exit code 2."""
    from distrib import launched_ranks

    try:
        code = app(standalone_mode=False)
        return int(code or 0)
    except UserError as error:
        # under a launcher all ranks hold the same error; the first says it
        if launched_ranks() == 1 or _rank() == 0:
            print(f"distrib: error: {error}", file=sys.stderr, flush=True)
        return EXIT_USAGE
    except typer.Exit as done:
        return int(done.exit_code)
    except typer.Abort:
        return EXIT_USAGE
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's own usage errors
            if launched_ranks() == 1 or _rank() == 0:
                print(f"distrib: error: {error.format_message()} (see --help)", file=sys.stderr, flush=True)
            return EXIT_USAGE
        raise


def _rank() -> int:
    """This process's rank by the launcher's environment, before or without MPI."""
    import os

    names = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID")
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), 0)


def main() -> int:
    """`python -m distrib.train`: the same options as `distrib train`."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command("train")(train_command)
    return run_app(app)
