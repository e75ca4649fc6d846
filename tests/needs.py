"""What tests need beyond `make`'s virtual environment: checked here alone, and said once at the end of the
run.

`@pytest.mark.needs("g++")` on a test or a module, or `require("g++")` inside one. Where the need is not met
the test is skipped, and the last lines of the run say how many were and which package brings it; with
DISTRIB_TEST_ALL=1 in the environment, as `.ci/run` sets it, the test fails instead. No test skips by other
means (test_layout.py).
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import nvrtc
import pytest

REAL_GPU = os.environ.get("DISTRIB_TEST_GPU") == "1"
"""Whether `device_double.device` gives the real GPU."""


class Need(NamedTuple):
    met: Callable[[], bool]
    words: str
    remedy: str


def programs(*names: str) -> bool:
    """Whether all are on PATH, or where Debian keeps root's."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    return all(shutil.which(name, path=path) for name in names)


def packages(*names: str) -> Callable[[], bool]:
    """Whether all can be found, without importing them."""
    return lambda: all(map(importlib.util.find_spec, names))


def installed(*names: str) -> Callable[[], bool]:
    """Whether pip has installed all."""

    def met() -> bool:
        found = {each.name for each in importlib.metadata.distributions()}
        return found.issuperset(names)

    return met


def works(*command: str) -> bool:
    return programs(command[0]) and subprocess.run(command, capture_output=True).returncode == 0


def chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("google-chrome")


def hosts() -> bool:
    """Root that may make network namespaces, with iproute2."""
    return os.geteuid() == 0 and programs("ip") and works("unshare", "--net", "--uts", "true")


def slurm() -> bool:
    return hosts() and programs("slurmctld", "slurmd", "munged", "srun", "sbatch")


def mounts() -> bool:
    """Root that may mount."""
    return os.geteuid() == 0 and works("unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/tmp")


def nccl(version: int = 0) -> bool:
    """Whether CuPy finds NCCL's library."""
    try:
        from cupy.cuda import nccl

        return nccl.get_version() >= version
    except (ImportError, AttributeError):
        return False


SLURM = "slurmctld slurmd slurm-client munge libpmix2 iproute2"
DEV, REPORT = "pip install -e '.[dev]'", "pip install -e '.[report]'"
NEEDS = {
    "g++": Need(lambda: programs("g++"), "g++", "apt-get install g++"),
    "chromium": Need(lambda: chromium() is not None, "Chromium", "apt-get install chromium"),
    "hosts": Need(hosts, "root, network namespaces and ip", "apt-get install iproute2, as root"),
    "slurm": Need(slurm, "root, network namespaces and Slurm", f"apt-get install {SLURM}, as root"),
    "mounts": Need(mounts, "the right to mount", "start it as root"),
    "torch": Need(packages("torch"), "PyTorch", "pip install torch"),
    "onnx": Need(packages("onnx", "onnxruntime"), "ONNX and its runtime", REPORT),
    "report": Need(packages("matplotlib", "jinja2"), "the extra report", REPORT),
    "tensorboard": Need(packages("tensorboard"), "TensorBoard", DEV),
    "notebook": Need(packages("nbclient", "nbformat", "ipykernel"), "a notebook's kernel", DEV),
    "build": Need(packages("build"), "build", DEV),
    "cupy": Need(packages("cupy"), "CuPy", DEV),
    "nvrtc": Need(installed(*nvrtc.PACKAGES.values()), "NVRTC of CUDA 12 and 13", DEV),
    "cudnn": Need(packages("cudnn"), "cuDNN's frontend", "pip install --no-deps nvidia-cudnn-frontend"),
    "nccl": Need(nccl, "NCCL's library", DEV),
    "double": Need(lambda: not REAL_GPU, "the double of a GPU", "leave out DISTRIB_TEST_GPU"),
    "shared GPU": Need(
        lambda: nccl(23000), "NCCL 2.30, for ranks that share a GPU", "pip install nvidia-nccl-cu12"
    ),
}


@functools.cache
def met(name: str) -> bool:
    return NEEDS[name].met()


def require(*names: str) -> None:
    """Skip the test where a need is not met, or fail it with DISTRIB_TEST_ALL=1."""
    for name in names:
        if not met(name):
            reason = f"needs {NEEDS[name].words}: {NEEDS[name].remedy}"
            if os.environ.get("DISTRIB_TEST_ALL") == "1":
                pytest.fail(reason, pytrace=False)
            pytest.skip(reason)


def not_run(skipped: Iterable[pytest.TestReport]) -> list[str]:
    """A line for each need that was not met: how many tests of which files, and the remedy."""
    files: dict[str, list[str]] = defaultdict(list)
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        files[re.sub("^Skipped: ", "", reason)].append(Path(report.nodeid.split("::")[0]).stem)
    lines = []
    for reason, names in sorted(files.items()):
        tests = f"{len(names)} test{'s' * (len(names) > 1)} of {', '.join(sorted(set(names)))}"
        lines.append(f"not run: {tests}: {reason}")
    return lines
