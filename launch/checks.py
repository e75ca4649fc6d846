"""What `distrib doctor` checks on each rank by itself: libraries, data, disk, GPUs, launcher."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_info

from distrib import launched_ranks
from distrib.comm.choice import MULTI_RANK_NCCL
from distrib.comm.start import import_mpi
from distrib.comm.world import World
from distrib.data import formats
from distrib.errors import UserError
from launch.machine import devices
from nn.cuda.backend import cupy_version, import_cupy

OK, WARNING, FAILURE = "ok", "warning", "failure"
LITTLE, TOO_LITTLE = 1 << 30, 100 << 20
"""Bytes of free disk. A checkpoint of the whole network with Adam takes 30 MB; to write it, as much again."""
ANSWER = 30.0
"""Seconds that `mpirun --version` may take: a busy machine is no broken one."""


class Finding(NamedTuple):
    """One line of the report; `look` fills in the name."""

    state: str
    found: str
    remedy: str = ""
    name: str = ""


class Facts(NamedTuple):
    """What a rank tells the others about its place."""

    host: str
    cores: list[int]
    threads: int
    mpi_size: int  # 0 without MPI
    gpus: list[str]
    nccl: int


def look(name: str, check: Callable[..., Finding], *args: Any) -> Finding:
    """What a check finds, whatever happens in it."""
    try:
        found = check(*args)
    except UserError as error:
        found = Finding(FAILURE, *parted(str(error)))
    except ImportError as error:
        found = Finding(FAILURE, str(error), "install the package again, with what it depends on")
    except Exception as error:
        found = Finding(FAILURE, f"{type(error).__name__}: {error}", "mend what the message names")
    return found._replace(name=name, remedy="" if found.state == OK else found.remedy)


def parted(message: str) -> tuple[str, str]:
    """(what is wrong, remedy) of an error message that ends in its remedy."""
    found, _, remedy = message.rpartition(": ")
    return (found, remedy) if found else (remedy, "see README.md")


def installed(*packages: str) -> str:
    """Name and version of the first of these packages that is there."""
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return f"{name} {metadata.version(name)}"
    return f"{packages[0]} not installed"


def version(text: str) -> str:
    """The first version number in a text."""
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return found[0] if found else "of unknown version"


def blas_pool() -> dict[str, Any]:
    """What threadpoolctl says of NumPy's BLAS; empty where it does not know it."""
    return next((pool for pool in threadpool_info() if pool["user_api"] == "blas"), {})


def blas() -> Finding:
    if pool := blas_pool():
        library = f"{pool['internal_api']} {pool.get('version')}"
        return Finding(OK, f"NumPy {np.__version__}, {library}, {pool['num_threads']} thread(s) a rank")
    return Finding(
        WARNING,
        f"NumPy {np.__version__}, its BLAS is not known",
        "install NumPy's wheel, which brings OpenBLAS",
    )


def data(folder: str | None) -> Finding:
    try:
        found = formats.load(folder)
    except UserError as error:
        return Finding(
            FAILURE,
            str(error),
            "copy it again, or leave out --data" if folder else "install the package again",
        )
    how = "not known to us" if folder else "as shipped"
    images = f"{len(found.train_images)} + {len(found.test_images)} images"
    return Finding(OK, f"{found.name}: {images}, SHA-256 {found.digest()[:12]}…, {how}")


def disk(run_dir: str) -> Finding:
    place = Path(run_dir).absolute()
    try:
        place = next(path for path in (place, *place.parents) if path.exists())
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(1 << 16))
        free = shutil.disk_usage(place).free
    except OSError as error:
        said = f"{place}: cannot be written ({error.strerror})"
        return Finding(FAILURE, said, "give --run-dir in a folder of yours on a disk with space")
    state = FAILURE if free < TOO_LITTLE else WARNING if free < LITTLE else OK
    return Finding(
        state, f"{free / 1e9:.1f} GB free at {place}", "free some, or give --run-dir on another disk"
    )


def driver() -> str:
    """Version of NVIDIA's driver; empty where there is none."""
    with contextlib.suppress(OSError):
        return version(Path("/proc/driver/nvidia/version").read_text())
    return ""


def cupy() -> Finding:
    try:
        runtime = import_cupy().cuda.runtime
    except RuntimeError as error:
        if not driver():
            return Finding(OK, f"{error}; nor is there a driver")
        remedy = "install distrib[cuda12] or distrib[cuda13], as the driver allows, or a newer driver"
        return Finding(WARNING, f"{error}, though there is a driver {driver()}", remedy)
    ours, drivers = (
        f"{number // 1000}.{number % 1000 // 10}"
        for number in (runtime.runtimeGetVersion(), runtime.driverGetVersion())
    )
    return Finding(OK, f"{cupy_version()} with CUDA {ours}; driver {driver()}, for CUDA {drivers}")


def gpus() -> Finding:
    found = (
        ", ".join(f"{name} {identity}" for name, identity in devices()) or "none visible, and none is needed"
    )
    limit = os.environ.get("CUDA_VISIBLE_DEVICES")
    return Finding(OK, found if limit is None else f"{found} (CUDA_VISIBLE_DEVICES={limit})")


@functools.cache
def nccl_number() -> int:
    """Version of the NCCL that CuPy finds, as NCCL writes it (23203); 0 without one, or without a GPU."""
    nccl = importlib.import_module("cupy.cuda.nccl") if devices() else None
    return int(nccl.get_version()) if nccl and nccl.available else 0


def nccl() -> Finding:
    number = nccl_number()
    if not devices():
        return Finding(OK, f"not needed without a GPU ({installed('nvidia-nccl-cu12', 'nvidia-nccl-cu13')})")
    if not number:
        return Finding(
            WARNING,
            "CuPy finds no NCCL library: ranks sum through the host",
            "pip install nvidia-nccl-cu12 (or -cu13)",
        )
    able = "can" if number >= MULTI_RANK_NCCL else "cannot"
    return Finding(
        OK,
        f"{number // 10000}.{number // 100 % 100}.{number % 100}, which {able} put several ranks on one GPU",
    )


def mpi_library() -> Finding:
    try:
        text = import_mpi().Get_library_version()
    except RuntimeError as error:
        return Finding(FAILURE if launched_ranks() > 1 else WARNING, *parted(str(error)))
    return Finding(OK, f"{family(text)} {version(text)}, {installed('mpi4py')}")


def family(text: str) -> str:
    """Whose MPI says this of itself; MPICH's descendants share its way of starting ranks."""
    words = {"Open MPI": r"Open ?MPI|OpenRTE|PRRTE|prte", "MPICH": r"MPICH|HYDRA|Intel|MVAPICH"}
    return next((name for name, word in words.items() if re.search(word, text)), "unknown MPI")


def launcher() -> Finding:
    found = f"{launched_ranks()} ranks were started" if launched_ranks() > 1 else "one process"
    mpirun, mpi = shutil.which("mpirun") or shutil.which("mpiexec"), sys.modules.get("mpi4py.MPI")
    if mpirun is None:
        state = OK if shutil.which("srun") or launched_ranks() > 1 else WARNING
        return Finding(
            state,
            f"{found}; no mpirun on the PATH",
            "put your MPI's bin folder there, or pip install 'distrib[mpi]'",
        )
    said = subprocess.run(
        [mpirun, "--version"], capture_output=True, text=True, timeout=ANSWER, errors="replace"
    ).stdout
    found += f"; {mpirun} is of {family(said)} {version(said)}"
    library = mpi.Get_library_version() if mpi else said
    same = family(library) == family(said) and (
        family(said) != "Open MPI" or version(library) == version(said)
    )
    found += "" if same else f", mpi4py's library of {family(library)} {version(library)}"
    return Finding(
        OK if same else WARNING, found, "put that library's mpirun first on the PATH, or use srun --mpi=pmix"
    )


def cudnn(world: World | None) -> Finding:
    frontend = installed("nvidia-cudnn-frontend")
    if not devices():
        return Finding(OK, f"not needed without a GPU ({frontend})")
    if form := world and world.backend.algorithms.get("cudnn"):
        return Finding(OK, f"{form.version}, {frontend}")
    why = (
        " ".join(world.backend.notes) or world.choice_explanation
        if world
        else "not looked at, as the ranks did not come together"
    )
    return Finding(
        WARNING, f"{why} ({frontend})", "pip install nvidia-cudnn-frontend nvidia-cudnn-cu12 (or -cu13)"
    )
