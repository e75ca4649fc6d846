"""Runs a command: a mistake is one line on standard error, and exit code 2. Imports nothing large."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from distrib import launched_rank, launched_ranks
from distrib.errors import EXIT_USAGE, LaunchError, UserError
from distrib.files import printable
from distrib.run.console import secure_output

if TYPE_CHECKING:
    import typer


def run_work(work: Callable[[], int]) -> int:
    """The exit code of `work`. A UserError becomes one line and exit code 2."""
    secure_output()
    try:
        return work()
    except UserError as error:
        return _print_once(str(error), isinstance(error, LaunchError))
    except KeyboardInterrupt:  # before a run handles signals
        return 130


def run_app(app: typer.Typer) -> int:
    """Run a typer application; what it says of wrong use is one line, too."""
    return run_work(lambda: _run(app))


def _run(app: typer.Typer) -> int:
    import typer

    try:
        return int(app(standalone_mode=False) or 0)
    except typer.Exit as done:
        return int(done.exit_code)
    except typer.Abort:
        return EXIT_USAGE
    except UserError:
        raise
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
