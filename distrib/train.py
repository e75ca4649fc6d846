"""The entry, `python -m distrib.train`: options, built from the fields of `Config`, then the loop."""

from __future__ import annotations

import distrib.shadow  # noqa: F401  # first: in the folder above a clone, `distrib` is that folder to Python

# isort: split

import inspect
import sys
import time
from typing import Annotated, Any

import typer

from distrib import launched_rank, launched_ranks
from distrib.config import Config, build, options
from distrib.errors import EXIT_USAGE, UserError
from distrib.files import printable
from distrib.loop import train
from distrib.run.console import secure_output

TYPES = {"int": int, "float": float, "str": str, "bool": bool}


def train_command(**given: Any) -> None:
    """Train ResNet-9 on MNIST: in one process, or on all ranks that mpirun or srun started.

    Examples:

      distrib train --recipe demo

      mpirun -n 4 python -m distrib.train --epochs 1 --limit-train 8000
    """
    raise typer.Exit(train(build(given), exiting=True))


def _number(flag: str, kind: type) -> Any:
    def parse(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise UserError(
                f"{flag} {text}: give {'a whole number' if kind is int else 'a number'}"
            ) from None

    return parse


def _signature() -> inspect.Signature:
    """One typer option for each field; None stands for "not given", so that a recipe can fill it in."""
    parameters = []
    for name, kind, default, text in options():
        base: Any = TYPES[kind.split(" | ")[0]]
        shown = text if default in (None, False) else f"{text} [default: {default}]"
        flag = f"--{name.replace('_', '-')}"
        if base is bool:
            flag = f"{flag}/--no-{flag[2:]}"
        number = base in (int, float)  # the parser's own message does not tell the value
        extra = {"parser": _number(flag, base), "metavar": kind.split(" | ")[0].upper()} if number else {}
        annotation = Annotated[base | None, typer.Option(flag, help=shown, show_default=False, **extra)]
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )
    return inspect.Signature(parameters)


def with_options(command: Any) -> Any:
    """`command(**given)`, with the options of a training run as its parameters."""
    command.__signature__ = _signature()
    command.__annotations__ = {p.name: p.annotation for p in command.__signature__.parameters.values()}
    return command


with_options(train_command)


def parse(arguments: list[str]) -> Config:
    """The configuration that `distrib train` makes of these arguments."""
    found: list[Config] = []
    app = typer.Typer(add_completion=False)
    app.command()(with_options(lambda **given: found.append(build(given))))
    app(arguments, standalone_mode=False)
    if not found:  # --help
        raise typer.Exit
    return found[0]


def run_app(app: typer.Typer) -> int:
    """Run a typer application; a UserError becomes one line and exit code 2."""
    secure_output()
    try:
        code = app(standalone_mode=False)
        return int(code or 0)
    except UserError as error:
        return _say(str(error))
    except typer.Exit as done:
        return int(done.exit_code)
    except typer.Abort:
        return EXIT_USAGE
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's own usage errors
            message = error.format_message()
            if not message:  # no command was given: the help is printed
                return EXIT_USAGE
            own = message.split("Value error, ")  # the parser's words around one of ours
            return _say(own[1] if len(own) > 1 else f"{message} (see --help)")
        raise


def _say(message: str) -> int:
    """Print an error that all ranks of a launcher hold, once: the first rank says it, the others let it.

    Before MPI a rank cannot know whether it is alone with its mistake: it leaves rank 0 some seconds, with
    which the launcher ends the job, then says it. With MPI all ranks agreed on it.
    """
    rank = launched_rank() if launched_ranks() > 1 else 0
    alone = "mpi4py.MPI" not in sys.modules
    if rank and alone:
        time.sleep(3)  # less than the 10 s after which srun kills who is left
    if not rank or alone:
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
