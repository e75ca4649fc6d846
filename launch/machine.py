"""This machine, for the commands: what it is, its GPUs, its launcher, and other programs that they start."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distrib import THREAD_VARIABLES, launched_ranks
from distrib.errors import LaunchError, UserError
from nn.cuda.backend import import_cupy

MPI_DEFAULTS = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}
"""What Open MPI needs to start as root, and more ranks than cores."""

DISTRIB = (sys.executable, "-m", "launch.cli")
"""The `distrib` command of this Python."""

NO_END = -1
"""Exit code of a program that was ended because its time was up, or that could not be started."""


def machine() -> str:
    """Processor and cores, for the head of a report."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, NumPy {np.__version__}"


def all_threads() -> int:
    """Threads of a process that has the machine for itself: OMP_NUM_THREADS, else all its cores."""
    return threads_each(1)


def threads_each(ranks: int) -> int:
    """Threads of each of `ranks` ranks on this machine: OMP_NUM_THREADS, else its share of the cores."""
    cores = len(os.sched_getaffinity(0))
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, cores // ranks))


@functools.cache
def devices() -> list[tuple[str, str]]:
    """Name and UUID of each visible GPU; none where CuPy or a GPU is missing."""
    try:
        runtime = import_cupy().cuda.runtime
    except RuntimeError:
        return []
    about = [runtime.getDeviceProperties(device) for device in range(runtime.getDeviceCount())]
    return [(each["name"].decode(), device_name(each["uuid"])) for each in about]


def device_name(raw: bytes) -> str:
    """A GPU's UUID as nvidia-smi writes it."""
    return f"GPU-{uuid.UUID(bytes=raw)}" if len(raw) == 16 else f"GPU-{raw.hex()}"


def require_torch(option: str) -> None:
    """UserError where PyTorch is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"{option}: PyTorch is not installed: pip install torch")


def refuse_launcher(command: str) -> None:
    """LaunchError where mpirun or srun started more than one rank of a command that is one process."""
    if launched_ranks() > 1:
        raise LaunchError(f"{command} is one process: start it without mpirun or srun")


def mpirun(ranks: int) -> list[str]:
    """What starts `ranks` ranks, nothing for one: the mpirun beside this Python, or the one on the path."""
    if ranks == 1:
        return []
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which("mpirun", path=places)
    if found is None:
        raise UserError("--ranks above 1: no mpirun is installed: pip install 'distrib[mpi]', or --ranks 1")
    return [found, "-n", str(ranks)]


def child_environment(threads: int) -> dict[str, str]:
    """The environment of a child with `threads` BLAS threads, without what our launcher left in it."""
    left = ("OMPI_COMM", "PMIX_", "PRTE_JOB")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left)}
    return MPI_DEFAULTS | kept | {name: str(threads) for name in THREAD_VARIABLES}


class Done(NamedTuple):
    """A program that has ended."""

    code: int
    out: str
    err: str
    seconds: float
    late: bool = False  # its time was up

    def last_words(self) -> str:
        """The last line that it printed, for an error message."""
        lines = [line.strip() for line in (self.err or self.out).splitlines() if line.strip("- ")]
        return lines[-1] if lines else "it printed nothing"

    def mistake(self) -> str | None:
        """The message of an error that one of our commands printed."""
        start = "distrib: error: "
        lines = (line.strip() for line in self.err.splitlines())
        return next((line.removeprefix(start) for line in lines if line.startswith(start)), None)

    def json(self) -> dict[str, Any]:
        """The JSON object that it printed, after what a launcher may have printed; ValueError without one."""
        return dict(json.loads(self.out[self.out.index("{") :]))


def finish(command: list[str] | tuple[str, ...], env: dict[str, str], limit: float | None = None) -> Done:
    """Run a program to its end, at most `limit` seconds; an interruption ends its children too."""
    begin = time.perf_counter()
    pipe = subprocess.PIPE
    try:
        child = subprocess.Popen(
            command, env=env, stdout=pipe, stderr=pipe, text=True, errors="replace", start_new_session=True
        )
    except OSError as error:
        return Done(NO_END, "", str(error), 0.0)
    with child:
        try:
            out, err = child.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            end(child)
            out, err = child.communicate()
            return Done(
                NO_END, out, f"{err}\nended after {limit:g} s", time.perf_counter() - begin, late=True
            )
        finally:
            end(child)
    return Done(child.returncode, out, err, time.perf_counter() - begin)


def end(child: subprocess.Popen[str]) -> None:
    """End a program and its children: SIGTERM first, with which mpirun ends its ranks on other hosts too."""
    for number in (signal.SIGTERM, signal.SIGKILL) if child.poll() is None else ():
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(child.pid, number)
            child.wait(10)
