"""Starts MPI where nobody has, and joins the ranks that a launcher started."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

from distrib import launched_ranks
from distrib.comm.base import SingleControl
from distrib.comm.mpi import free
from distrib.config import CHOICES
from distrib.errors import UserError
from distrib.faults.watchdog import Watchdog, abort_on_crash, kill_after

SLOW_IO_FACTOR = 10
"""Timeouts that the ranks wait for work of rank 0 alone, such as writing to a slow shared disk."""

LEAST_MPI_INIT, MPI_INIT_TIMEOUTS = 60, 5
"""MPI_Init is considered hung after so many seconds and so many timeouts: in a large job it takes long."""

_mpi_is_ours = False  # whether this module started MPI, not the program before


def import_mpi(timeout: float = 60.0) -> Any:
    """Import `mpi4py.MPI`, which calls MPI_Init. RuntimeError in one line if it cannot be imported."""
    global _mpi_is_ours
    os.environ.setdefault("OMPI_MCA_btl", "^ofi,uct")  # saves a second in MPI_Init
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")  # more ranks than cores must not starve
    if "mpi4py.MPI" in sys.modules:
        return sys.modules["mpi4py.MPI"]
    try:
        with kill_after(max(LEAST_MPI_INIT, MPI_INIT_TIMEOUTS * timeout), "MPI_Init"):
            from mpi4py import MPI
    except ImportError as error:
        raise RuntimeError(f"mpi4py is not installed ({error}): pip install mpi4py") from None
    except RuntimeError as error:  # mpi4py reports a missing library in many lines
        first = str(error).strip().splitlines()[0]
        raise RuntimeError(f"no MPI library ({first}): install your system's, or 'distrib[mpi]'") from None
    _mpi_is_ours = True
    return MPI


def own_base(joined: Any) -> Any:
    """A communicator that only meetings use, and revoke: never a program's own one."""
    if not hasattr(joined, "Revoke"):
        raise UserError("--elastic: needs mpi4py 4.1: pip install 'mpi4py>=4.1'")
    return joined if _mpi_is_ours else joined.Dup()


def may_leave_mpi() -> None:
    """Let only `end_mpi` end MPI, so that `leave_mpi` can do without. Call it before MPI starts."""
    with suppress(ImportError):  # `join` tells of it
        import mpi4py

        mpi4py.rc.finalize = False


def leave_mpi() -> None:
    """Do not end MPI when the process exits: after the death of a rank, MPI_Finalize may wait for it."""
    atexit.unregister(end_mpi)


def end_mpi(mpi: Any, seconds: float) -> None:
    """Call MPI_Finalize, which waits for all ranks; kill this process if it takes longer than `seconds`."""
    if not mpi.Is_finalized():
        with kill_after(seconds, "MPI_Finalize"):
            mpi.Finalize()


def _started_ranks() -> int:
    """Number of ranks that a launcher started, as its variables say or an MPI that is already up."""
    mpi = sys.modules.get("mpi4py.MPI")
    up = mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized()
    return max(launched_ranks(), mpi.COMM_WORLD.Get_size() if mpi and up else 1)


def _given(comm: Any) -> tuple[Any, str]:
    """`join` on a caller's mpi4py communicator."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not isinstance(comm, mpi.Comm):
        raise UserError(f"comm {comm!r}: give {', '.join(CHOICES['comm'])}, or an mpi4py communicator")
    _require_mpi_up(mpi)
    if comm == mpi.COMM_NULL:
        raise UserError("comm MPI.COMM_NULL: only the ranks of a communicator can connect on it")
    if comm.Is_inter():
        raise UserError("comm: an intercommunicator has no ranks of its own: give its Merge()")
    return comm, f"{comm.Get_size()} ranks of the given communicator"


def _require_mpi_up(mpi: Any) -> None:
    if mpi.Is_finalized():
        raise UserError("MPI has been finalized, and cannot start again: connect before MPI.Finalize()")
    if not mpi.Is_initialized():
        raise UserError("mpi4py was told not to start MPI: call MPI.Init() before you connect")


def join(comm: Any, timeout: float) -> tuple[Any, str]:
    """(communicator, explanation): MPI_COMM_WORLD if there is more than this process, or the given one."""
    if not isinstance(comm, str):
        return _given(comm)
    launched = _started_ranks()
    if comm == "none" and launched > 1:  # a shell inside srun -n 4 --pty, say
        return (
            SingleControl(),
            f"one process, as --comm none asks, though the launcher counts {launched} ranks",
        )
    if comm in ("auto", "none") and launched == 1:
        return SingleControl(), "one process: no mpirun or srun started more"
    try:
        mpi = import_mpi(timeout)
    except RuntimeError as error:
        raise UserError(f"--comm {comm} with {launched} ranks: {error}") from None
    _require_mpi_up(mpi)
    world = mpi.COMM_WORLD
    if world.Get_size() == 1 and launched > 1:
        raise UserError(
            f"{launched} ranks were started but MPI sees 1 in each: launcher and MPI library do not match;"
            " use the mpirun of this MPI library, or srun --mpi=pmix; for one process alone give --comm none"
        )
    return world, f"{world.Get_size()} ranks over MPI"


def own(joined: Any, watchdog: Watchdog, resources: ExitStack) -> Any:
    """A duplicate of an mpi4py communicator: what a program sends there never meets what we send."""
    with watchdog.waiting("the meeting of all ranks"):
        control_comm = joined.Dup()
    resources.callback(free, control_comm)
    end_with_process(lambda: control_comm.Abort(1), watchdog, resources)
    return control_comm


def end_with_process(abort: Callable[[], None], watchdog: Watchdog, resources: ExitStack) -> None:
    """If this module started MPI: `abort` at an uncaught exception, and end MPI when the process exits."""
    if _mpi_is_ours:
        resources.callback(abort_on_crash(watchdog, abort))
        atexit.unregister(end_mpi)
        # while rank 0 may still write a checkpoint
        atexit.register(end_mpi, import_mpi(), SLOW_IO_FACTOR * watchdog.timeout)
