"""What a result depends on beside the configuration: the processor and the libraries."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

from distrib import __version__
from distrib.sources import code_digest
from nn.device import Backend


def blas_threads() -> int:
    """Threads that BLAS uses for matrix products."""
    return max(
        (int(pool["num_threads"]) for pool in threadpool_info() if pool["user_api"] == "blas"), default=1
    )


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
