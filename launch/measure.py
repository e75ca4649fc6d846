"""What the benchmarks share: options, how to say a spread, the machine, its matrix-product peak, PyTorch at hand.

Both sides take turns, so that each pair of measurements saw the same machine; ratios are of pairs.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import statistics
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from distrib import THREAD_VARIABLES, launched_ranks
from distrib.errors import UserError
from nn.device import NUMPY, Backend

BatchSize = Annotated[int, typer.Option(help="Global batch.")]
Width = Annotated[float, typer.Option(help="Multiplier of all channel counts.")]
Repeats = Annotated[int, typer.Option(help="Measurements of each side, in alternation.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def machine() -> str:
    """Processor and cores, for the head of a report."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, NumPy {np.__version__}"


def spread(values: list[float], digits: int = 4) -> str:
    """Median (least–most)."""
    return f"{statistics.median(values):.{digits}g} ({min(values):.{digits}g}–{max(values):.{digits}g})"


def matrix_peak(backend: Backend = NUMPY) -> float:
    """GFLOP/s of this process's product of two float32 matrices: 1024×1024, on a GPU 8192×8192 (TF32 where that is chosen)."""
    side = 1024 if backend.on_host else 8192
    a = backend.asarray(np.random.default_rng(0).random((side, side), np.float32))
    out = backend.xp.empty_like(a)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        backend.xp.matmul(a, a, out=out)
        if not backend.on_host:
            backend.stream.synchronize()
        seconds.append(time.perf_counter() - begin)
    return float(2 * side**3 / statistics.median(seconds) / 1e9)


MPI_DEFAULTS = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}
"""What Open MPI needs to start as root, and more ranks than cores."""


def child_environment(threads: int) -> dict[str, str]:
    """The environment of a process with `threads` BLAS threads, without what a launcher of ours left in it."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OMPI_COMM", "PMIX_", "PRTE_JOB"))
    }
    return MPI_DEFAULTS | kept | {name: str(threads) for name in THREAD_VARIABLES}


def refuse_launcher(command: str) -> None:
    """UserError where mpirun or srun started more than one rank of a command that is one process."""
    if launched_ranks() > 1:
        raise UserError(f"{command} is one process: start it without mpirun or srun")


def peak_bytes() -> int:
    """The most memory this process ever held, libraries included.

    Not `ru_maxrss` where it can be helped: a child inherits its parent's.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def pool_bytes(backend: Backend) -> int:
    """Memory of the GPU that this process holds through CuPy."""
    return int(backend.xp.get_default_memory_pool().total_bytes())


def require_torch(option: str) -> None:
    """UserError where PyTorch is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"{option}: PyTorch is not installed: pip install torch")
