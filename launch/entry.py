"""What the commands of one process share: who works under a launcher, paths as typed, mistakes in a line."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distrib import launched_rank
from distrib.errors import UserError
from distrib.files import expanded, printable, reason


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


def at_home(value: Any, name: str) -> Any:
    """A path, or each of a list of paths, with a leading `~` replaced; messages name it `name`."""
    if isinstance(value, list):
        return [at_home(each, name) for each in value]
    if isinstance(value, Path):
        return expanded(str(value), name)
    return str(expanded(value, "--run-dir")) if name == "run_dir" and value else value
