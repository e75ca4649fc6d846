"""What the benchmarks share: options, how to say a spread, the matrix-product peak, peak memory.

Both sides take turns, so that each pair of measurements saw the same machine; ratios are of pairs.
"""

from __future__ import annotations

import resource
import statistics
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from distrib import models
from distrib.config import CHOICES
from launch.entry import choice, number, positive
from nn.device import NUMPY, Backend

BatchSize = Annotated[int, number("--batch-size", "Global batch.", most=60_000)]
Width = Annotated[float, positive("--width", "Multiplier of all channel counts.")]
NetworkName = Annotated[
    str,
    typer.Option("--model", help=f"{', '.join(models.MODELS)}, or {models.FORM}: your own, which is run."),
]
Data = Annotated[str | None, typer.Option("--data", help="The data set, as for train.", show_default="MNIST")]
Variant = Annotated[str, choice("--variant", "Variant of ResNet-9.", *CHOICES["variant"])]
Precision = Annotated[
    str, choice("--precision", "Type of numbers (tf32 and bf16 on a GPU).", *CHOICES["precision"])
]
BackendName = Annotated[str, choice("--backend", "Array library.", *CHOICES["backend"])]
Comm = Annotated[str, choice("--comm", "Communicator.", *CHOICES["comm"])]
Repeats = Annotated[int, number("--repeats", "Measurements of each side, in alternation.")]


def spread(values: list[float], digits: int = 4) -> str:
    """Median (least–most)."""
    return f"{statistics.median(values):.{digits}g} ({min(values):.{digits}g}–{max(values):.{digits}g})"


def matrix_peak(backend: Backend = NUMPY) -> float:
    """GFLOP/s of this process's product of two float32 matrices.

    1024×1024, on a GPU 8192×8192 (TF32 where that is chosen).
    """
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
