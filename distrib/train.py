"""The entry point `python -m distrib.train`: builds options from the fields of `Config`, then trains."""

from __future__ import annotations

import distrib.shadow  # noqa: F401  # first, see there

# isort: split

import inspect
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Annotated, Any

import typer

from distrib import launched_rank, launched_ranks
from distrib.config import CHOICES, Config, build, options
from distrib.errors import EXIT_USAGE, LaunchError, UserError
from distrib.faults.guard import guarded
from distrib.files import parsed, printable
from distrib.loop import train
from distrib.run.console import secure_output

TYPES = {"int": int, "float": float, "str": str, "bool": bool}


def train_command(**given: Any) -> None:
    """Train ResNet-9 on MNIST or your pictures: in one process, or on all ranks that mpirun or srun started.

    Examples:

      distrib train --recipe demo

      mpirun -n 4 python -m distrib.train --epochs 1 --limit-train 8000
    """
    config = build(given)
    with guarded() if config.elastic else nullcontext():
        code = train(config, exiting=True)
    raise typer.Exit(code)


def _parser(flag: str, kind: type) -> Callable[[str], Any]:
    return lambda text: parsed(flag, text, kind)


def _signature() -> inspect.Signature:
    """A typer option for each field. None means "not given", so that a recipe can set it."""
    parameters = []
    for name, kind, default, text in options():
        base: Any = TYPES[kind.split(" | ")[0]]
        shown = text if default in (None, False) else f"{text} [default: {default}]"
        flag = f"--{name.replace('_', '-')}"
        if base is bool:
            flag = f"{flag}/--no-{flag[2:]}"
        extra: dict[str, Any] = {}
        if base in (int, float):  # typer's message lacks the value
            extra = {"metavar": base.__name__.upper(), "parser": _parser(flag, base)}
        elif base is str:
            extra = {"metavar": "NAME" if name in (*CHOICES, "recipe", "model") else "PATH"}
        annotation = Annotated[base | None, typer.Option(flag, help=shown, show_default=False, **extra)]
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )
    return inspect.Signature(parameters)


def with_options(command: Any) -> Any:
    """Give `command(**given)` the options of a training run as its parameters."""
    command.__signature__ = _signature()
    command.__annotations__ = {p.name: p.annotation for p in command.__signature__.parameters.values()}
    return command


with_options(train_command)


def parse(arguments: list[str]) -> Config:
    """The configuration that `distrib train` builds from these arguments."""
    found: list[Config] = []
    app = typer.Typer(add_completion=False)
    app.command()(with_options(lambda **given: found.append(build(given))))
    app(arguments, standalone_mode=False)
    if not found:  # --help
        raise typer.Exit
    return found[0]


def run_app(app: typer.Typer) -> int:
    """Run a typer application. A UserError becomes one line and exit code 2."""
    secure_output()
    try:
        code = app(standalone_mode=False)
        return int(code or 0)
    except UserError as error:
        return _print_once(str(error), isinstance(error, LaunchError))
    except typer.Exit as done:
        return int(done.exit_code)
    except typer.Abort:
        return EXIT_USAGE
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's usage errors
            message = error.format_message()
            if not message:  # no command: click has printed the help
                return EXIT_USAGE
            parts = message.split("Value error, ")  # ours, within click's
            return _print_once(parts[1] if len(parts) > 1 else f"{message} (see --help)")
        raise


def _print_once(message: str, everywhere: bool = False) -> int:
    """Print an error that all ranks of a launcher may have only once, on rank 0.

    Before MPI starts, a rank cannot tell whether the others have the same error. So it gives rank 0 three
    seconds to print it first and thereby end the job, and then prints it, too, unless it is one
    that is found `everywhere`. After MPI has started, all ranks have the same error.
    """
    rank = launched_rank() if launched_ranks() > 1 else 0
    before_mpi = "mpi4py.MPI" not in sys.modules
    if rank and before_mpi:
        time.sleep(3)  # less than the 10 s after which srun kills the other ranks
    if not rank or (before_mpi and not everywhere):
        print(
            f"distrib: error: {printable(message, 2000)}{f' (rank {rank})' if rank else ''}",
            file=sys.stderr,
            flush=True,
        )
    return EXIT_USAGE


def main() -> int:
    """`python -m distrib.train`: the same options as `distrib train`."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command("train")(train_command)
    return run_app(app)


if __name__ == "__main__":
    sys.exit(main())
