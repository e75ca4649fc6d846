"""Every check and benchmark that needs a GPU, one after another, into one JSON file: `make test-gpu`.

    python -m launch.gpu_report [--out gpu-report.json] [--only WORD] [--list]

Each part is a process with a bound on its time; what it printed is kept, and the file is written anew after each, so
that nothing is lost where the machine goes away. A part that is already in the file, and passed, is not run again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

try:
    from distrib.run.folder import environment
    from launch.measure import MPI_DEFAULTS, machine
    from nn.cuda.backend import cupy_backend
    from nn.device import NUMPY
except ImportError as error:
    sys.exit(
        f"make test-gpu needs a Python with this package's dependencies ({error}): see GPU.md, and give it as PYTHON="
    )

BENCH = (sys.executable, "-m", "launch.cli", "bench")
PYTEST = (sys.executable, "-m", "pytest", "-q")
STEP = (*BENCH, "step", "--backend", "cupy", "--comm", "none", "--repeats", "3", "--json")
RUN = (*BENCH, "run", "--backend", "cupy", "--ranks", "1", "--json")
GPU = {"DISTRIB_TEST_GPU": "1"}
SHARED_GPU = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_MAX_CTAS": "8", "NCCL_NVLS_ENABLE": "0"}


def mpirun(ranks: int) -> tuple[str, ...]:
    return ("mpirun", "-n", str(ranks))


def parts() -> dict[str, tuple[tuple[str, ...], dict[str, str], float]]:
    """Name → command, environment, seconds allowed: the most telling first."""
    found: dict[str, tuple[tuple[str, ...], dict[str, str], float]] = {
        "tests-kernels": ((*PYTEST, "tests/test_kernels.py", "tests/test_graph.py"), GPU, 560),
        "step-8-tf32": (
            (*STEP, "--batch-size", "8", "--precision", "tf32", "--steps", "1000", "--against", "torch"),
            {},
            560,
        ),
        "kernels-8-tf32": ((*BENCH, "kernels", "--batch-size", "8", "--json"), {}, 200),
    }
    for batch in ("512", "2048"):
        for precision in ("tf32", "bf16"):
            command = (*STEP, "--batch-size", batch, "--precision", precision, "--against", "torch")
            found[f"step-{batch}-{precision}"] = command, {}, 560
    found |= {
        "fast99": ((*RUN, "--recipe", "fast99", "--precision", "tf32", "--repeats", "10"), {}, 560),
        "tests-gpu": ((*PYTEST, "tests/test_gpu.py"), GPU, 1200),
        "reference-ours": ((*RUN, "--recipe", "reference", "--precision", "tf32", "--repeats", "5"), {}, 560),
        "ranks-2": (
            (*mpirun(2), *BENCH, "step", "--backend", "cupy", "--comm", "nccl", "--json"),
            SHARED_GPU,
            200,
        ),
        "ranks-4": (
            (*mpirun(4), *BENCH, "step", "--backend", "cupy", "--comm", "nccl", "--json"),
            SHARED_GPU,
            200,
        ),
        "allreduce-nccl": (
            (*mpirun(2), *BENCH, "allreduce", "--backend", "cupy", "--comm", "nccl", "--json"),
            SHARED_GPU,
            200,
        ),
        "allreduce-staged": (
            (*mpirun(2), *BENCH, "allreduce", "--backend", "cupy", "--comm", "mpi", "--json"),
            {},
            200,
        ),
        "step-8-eager": ((*STEP, "--batch-size", "8", "--precision", "tf32", "--no-cuda-graph"), {}, 200),
        "step-8-float32": (
            (*STEP, "--batch-size", "8", "--precision", "float32", "--steps", "1000", "--against", "torch"),
            {},
            560,
        ),
        "step-512-float32": (
            (*STEP, "--batch-size", "512", "--precision", "float32", "--against", "torch"),
            {},
            560,
        ),
        "kernels-512-tf32": ((*BENCH, "kernels", "--batch-size", "512", "--json"), {}, 200),
        "kernels-512-bf16": (
            (*BENCH, "kernels", "--batch-size", "512", "--precision", "bf16", "--json"),
            {},
            200,
        ),
        "numpy-vectorised": (
            (*BENCH, "step", "--backend", "numpy", "--batch-size", "8", "--repeats", "3", "--json"),
            {},
            200,
        ),
        "numpy-loop": (
            (
                *BENCH,
                "step",
                "--backend",
                "numpy",
                "--batch-size",
                "8",
                "--steps",
                "1",
                "--repeats",
                "1",
                "--against",
                "loop",
                "--json",
            ),
            {},
            400,
        ),
        "reference-torch": (
            (*RUN, "--recipe", "reference", "--precision", "tf32", "--repeats", "1", "--against", "torch"),
            {},
            3000,
        ),
    }
    return found


def run(command: tuple[str, ...], more: dict[str, str], limit: float) -> dict[str, Any]:
    """What a part said; JSON where it printed that."""
    begin, env = time.perf_counter(), {**MPI_DEFAULTS, **os.environ, **more}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit, check=False)
        code, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as error:
        code, out, err = (
            -1,
            *(
                text.decode(errors="replace") if isinstance(text, bytes) else text or ""
                for text in (error.stdout, error.stderr)
            ),
        )
        err += f"\nended after {limit:.0f} s"
    except OSError as error:
        code, out, err = -1, "", str(error)
    result: dict[str, Any] = {
        "command": " ".join(command).replace(sys.executable, "python"),
        "environment": more,
        "code": code,
        "seconds": time.perf_counter() - begin,
    }
    try:
        return {**result, "result": json.loads(out)}
    except ValueError:
        return {**result, "stdout": out[-8000:], "stderr": err[-4000:]}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-report.json"))
    parser.add_argument("--only", default="", help="run the parts whose names hold this word")
    parser.add_argument("--list", action="store_true", help="name the parts and their commands, and end")
    given = parser.parse_args()
    chosen = {name: part for name, part in parts().items() if given.only in name}
    if not chosen:
        print(f"--only {given.only}: no part's name holds that: {', '.join(parts())}", file=sys.stderr)
        return 2
    if given.list:
        for name, (command, _, limit) in chosen.items():
            print(f"{name:18} {limit:5.0f} s  {' '.join(command).replace(sys.executable, 'python')}")
        return 0
    try:
        about = cupy_backend().describe()
    except RuntimeError as error:
        print(f"make test-gpu needs a GPU: {error}", file=sys.stderr)
        return 2
    for module, what in (
        ("pytest", "the tests"),
        ("torch", "comparisons with PyTorch"),
        ("mpi4py", "several ranks"),
    ):
        if importlib.util.find_spec(module) is None:
            print(f"note: {module} is missing, which {what} need: those parts will fail", file=sys.stderr)
    if shutil.which("mpirun") is None:
        print("note: there is no mpirun on the path: parts with several ranks will fail", file=sys.stderr)
    report = json.loads(given.out.read_text()) if given.out.exists() else {"parts": {}}
    report |= {"machine": machine(), "device": about, "host": environment(0, NUMPY)}
    for name, (command, more, limit) in chosen.items():
        if report["parts"].get(name, {}).get("code") == 0:
            print(f"{name}: passed before")
            continue
        print(f"{name}: {' '.join(command).replace(sys.executable, 'python')}", flush=True)
        report["parts"][name] = found = run(command, more, limit)
        print(
            f"{name}: {'passed' if found['code'] == 0 else 'FAILED'} in {found['seconds']:.0f} s", flush=True
        )
        if found["code"]:
            print((found.get("stdout", "") + found.get("stderr", ""))[-2000:], flush=True)
        given.out.write_text(json.dumps(report, indent=2))
    failed = [name for name in chosen if report["parts"][name]["code"]]
    print(
        f"{given.out}: {len(chosen) - len(failed)} of {len(chosen)} parts passed"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
