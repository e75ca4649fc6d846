"""What a result depends on beside the configuration: the processor and the libraries."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

from distrib import THREAD_VARIABLES, __version__, launched_ranks
from distrib.sources import code_digest
from nn.device import Backend


def blas_threads() -> int:
    """Threads that BLAS uses for matrix products."""
    return max(
        (int(pool["num_threads"]) for pool in threadpool_info() if pool["user_api"] == "blas"), default=1
    )


def limit_threads() -> Any:
    """Context in which each of several ranks has the BLAS threads that its environment says, or one.

    NumPy may have been imported before this package could say so there.
    """
    said = next((int(os.environ[name]) for name in THREAD_VARIABLES if os.environ.get(name)), None)
    return threadpool_limits(said if launched_ranks() > 1 else None, "blas")


def environment(threads: int, backend: Backend) -> dict[str, Any]:
    """What must not change, besides the configuration, if a resumed run is to agree to the bit."""
    blas = next(
        (
            f"{p['internal_api']} {p.get('version')} {p.get('architecture', '')}".strip()
            for p in threadpool_info()
            if p["user_api"] == "blas"
        ),
        "unknown",
    )
    return {
        "distrib": __version__,
        "code": code_digest()[:12],
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": blas,
        "processor": _processor(),
        "threads": threads,
        "backend": backend.name,
        **backend.describe(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
