"""Print, on one line, the versions of what the GPU path is made of here; "-" for what is missing."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from collections.abc import Callable
from importlib import import_module, metadata

PACKAGES = {
    "NumPy": ("numpy",),
    "CuPy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
    "PyTorch": ("torch",),
    "frontend of cuDNN": ("nvidia-cudnn-frontend",),
    "mpi4py": ("mpi4py",),
    "pytest": ("pytest",),
}


def installed(*names: str) -> str:
    """Version of the first of these packages that is there."""
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "-"


def loaded(ask: Callable[[], str]) -> str:
    """What a library says of itself, once it is loaded."""
    try:
        return ask()
    except (ImportError, AttributeError, OSError, RuntimeError, ValueError):
        return "-"


def nccl() -> str:
    number = import_module("cupy.cuda.nccl").get_version()
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def mpi() -> str:
    said = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=False)
    return said.stdout.split("\n")[0].rpartition(" ")[2]


def versions() -> str:
    found = {"Python": platform.python_version()}
    found |= {name: installed(*names) for name, names in PACKAGES.items()}
    found["cuDNN"] = loaded(lambda: import_module("cudnn").backend_version_string())
    found["NCCL"] = loaded(nccl)
    found["NVRTC"] = loaded(lambda: "{}.{}".format(*import_module("cupy.cuda").nvrtc.getVersion()))
    found["Open MPI"] = loaded(mpi)
    return ", ".join(f"{name} {version}" for name, version in found.items())


if __name__ == "__main__":
    print(versions())
