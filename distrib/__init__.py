"""Ranks, data and the training loop of a data-parallel trainer for ResNet-9.

Importing this package sets the number of BLAS threads, which must happen before NumPy is imported.
"""

import importlib
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distrib.api import Trained, fit, load
    from distrib.comm.world import World, connect
    from distrib.data.dataset import Dataset
    from distrib.errors import UserError

__version__ = "0.1.0"

__all__ = ["Dataset", "Trained", "UserError", "World", "connect", "fit", "load"]

_PLACES = {
    "api": ("Trained", "fit", "load"),
    "comm.world": ("World", "connect"),
    "data.dataset": ("Dataset",),
    "errors": ("UserError",),
}


def __getattr__(name: str) -> Any:
    """What the package offers to Python, imported when it is first asked for: a command needs less."""
    for place, names in _PLACES.items():
        if name in names:
            return getattr(importlib.import_module(f"distrib.{place}"), name)
    raise AttributeError(f"module 'distrib' has no attribute {name!r}")


THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

_SIZE_VARIABLES = (
    "OMPI_COMM_WORLD_SIZE",  # Open MPI
    "PMI_SIZE",  # MPICH, Intel MPI
    "MV2_COMM_WORLD_SIZE",  # MVAPICH2
    "SLURM_STEP_NUM_TASKS",  # srun
)


_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID")


def launched_rank() -> int:
    """This process's rank, read from the launcher's environment, without MPI; 0 without a launcher."""
    return next((int(os.environ[name]) for name in _RANK_VARIABLES if os.environ.get(name)), 0)


def launched_ranks() -> int:
    """Number of ranks that mpirun or srun started, read from the environment; 1 without a launcher."""
    return max((int(os.environ.get(name) or 1) for name in _SIZE_VARIABLES), default=1)


LAUNCHERS = ("prterun", "prted", "mpirun", "mpiexec", "orterun", "orted", "hydra_pmi_proxy")
"""Names of mpirun's processes that start ranks. Slurm's step daemon is not one of them."""


GUARD = "DISTRIB_GUARD"
"""Variable with the pid of the process that guards this one; see `distrib.faults.guard`."""


def parent() -> tuple[int, str]:
    """(pid, name) of the process that started this one, skipping a guard and a shell in between; on Linux."""
    pid, name = os.getppid(), ""
    with suppress(OSError, ValueError):
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        while name in ("bash", "dash", "sh") or str(pid) == os.environ.get(GUARD):
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
            name = Path(f"/proc/{pid}/comm").read_text().strip()
    return pid, name


if launched_ranks() > 1:  # one rank per core, so that element-wise work runs on all cores too
    for _name in THREAD_VARIABLES:
        os.environ.setdefault(_name, "1")

from distrib.shadow import require_own_nn  # noqa: E402  # does not import NumPy

require_own_nn()
