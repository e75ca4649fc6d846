"""What the commands share: who works under a launcher, paths, options with bounds, mistakes in a line."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from distrib import launched_rank
from distrib.errors import UserError
from distrib.files import alternatives, expanded, parsed, printable, reason

Model = Annotated[
    Path, typer.Argument(help="A checkpoint (step-….safetensors), or a run's folder: its newest.")
]
OwnModel = Annotated[
    str | None,
    typer.Option("--model", help="FILE.py:FUNCTION of a network that does not ship; it is run."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def one_process(command: Callable[..., None]) -> Callable[..., None]:
    """`command` as one process: under mpirun or srun rank 0 works, the others end at once, with exit code 0.

    So a shell that a launcher opened (srun --pty bash) can run it too, and the job's exit code is rank 0's. A
    leading `~` of a path is the home folder. What the operating system refuses of a path is a UserError, and
    no message carries a control character to the terminal.
    """

    @functools.wraps(command)
    def run(**given: Any) -> None:
        if launched_rank():
            return
        try:
            command(**{name: at_home(value, name) for name, value in given.items()})
        except UserError as error:
            raise UserError(printable(str(error), 2000)) from None
        except OSError as error:
            if not isinstance(error.filename, str | bytes):  # no path's fault
                raise
            path = os.fsdecode(error.filename)
            said = f"{printable(path, 300)}: cannot be used {reason(error, Path(path))}"
            raise UserError(said) from None

    return run


def number(
    flag: str, text: str, least: float = 1, most: float = math.inf, kind: Any = int, **more: Any
) -> Any:
    """An option for a number from `least` to `most`; an error names option, value and bounds."""
    bounds = f"give {least:g} or more" if most == math.inf else f"give {least:g} to {most:g}"
    return _checked(flag, text, kind, lambda value: least <= value <= most, bounds, more)


def positive(flag: str, text: str, **more: Any) -> Any:
    """An option for a finite number above 0, such as seconds."""
    return _checked(
        flag, text, float, lambda value: 0 < value < math.inf, "give a finite number above 0", more
    )


WIDEST = 18
"""Letters of a list of choices in the column of a terminal's help; a longer one is in the text."""


def choice(flag: str, text: str, *choices: str, **more: Any) -> Any:
    """An option that is one of `choices`, which its help names."""
    last = alternatives(choices)
    metavar = "|".join(choices)
    if len(metavar) > WIDEST:
        text, metavar = f"{text.removesuffix('.')}: {last}.", "NAME"
    more = {"metavar": metavar, **more}
    return _checked(flag, text, str, lambda value: value in choices, f"choose {last}", more)


def _checked(flag: str, text: str, kind: Any, holds: Callable[[Any], bool], remedy: str, more: Any) -> Any:
    def parse(given: Any) -> Any:
        value = given if kind is str else parsed(flag, given, kind)
        if not holds(value):
            raise UserError(f"{flag} {printable(str(given), 60)}: {remedy}")
        return value

    return typer.Option(flag, help=text, parser=parse, **{"metavar": kind.__name__.upper(), **more})


def at_home(value: Any, name: str) -> Any:
    """A path, or each of a list of paths, with a leading `~` replaced; messages name it `name`."""
    if isinstance(value, list):
        return [at_home(each, name) for each in value]
    if isinstance(value, Path):
        return expanded(str(value), name)
    return str(expanded(value, "--run-dir")) if name == "run_dir" and value else value
