"""`distrib gpu-report`, which `make test-gpu` calls: every check and benchmark that needs a GPU, in one file.

Each part is a process with a bound on its time. The file is written anew after each, so that nothing is lost
where the machine goes away; a part that is in the file, and passed, is not run again.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from distrib.errors import EXIT_CRASH, UserError
from distrib.run.folder import environment
from launch.entry import one_process
from launch.machine import DISTRIB, MPI_DEFAULTS, finish, machine
from nn.cuda.backend import cupy_backend
from nn.device import NUMPY

BENCH = (*DISTRIB, "bench")
PYTEST = (sys.executable, "-m", "pytest", "-q")
STEP = (*BENCH, "step", "--backend", "cupy", "--comm", "none", "--repeats", "3", "--json")
RUN = (*BENCH, "run", "--backend", "cupy", "--ranks", "1", "--json")
GPU = {"DISTRIB_TEST_GPU": "1"}
SHARED_GPU = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_MAX_CTAS": "8", "NCCL_NVLS_ENABLE": "0"}


Part = tuple[tuple[str, ...], dict[str, str], float]
"""Command, environment, seconds allowed."""


def ranks(number: int, *more: str) -> tuple[str, ...]:
    """A benchmark on several ranks of one GPU."""
    return ("mpirun", "-n", str(number), *BENCH, *more, "--backend", "cupy", "--json")


def step(batch: int, precision: str, *more: str) -> tuple[str, ...]:
    """`bench step` on the GPU."""
    return (*STEP, "--batch-size", str(batch), "--precision", precision, *more)


def kernels(batch: int, precision: str) -> tuple[str, ...]:
    return (*BENCH, "kernels", "--batch-size", str(batch), "--precision", precision, "--json")


def training(recipe: str, repeats: int, *more: str) -> tuple[str, ...]:
    """`bench run` on the GPU."""
    return (*RUN, "--recipe", recipe, "--precision", "tf32", "--repeats", str(repeats), *more)


def tests(room: str, *names: str) -> tuple[str, ...]:
    """Tests of a file, on the GPU; those whose names hold a word, where one is given."""
    return (*PYTEST, room, *(("-k", " or ".join(names)) if names else ()))


def checked(tool: str, *names: str) -> tuple[str, ...]:
    """Some kernels under one of compute-sanitizer's tools, which slows them down a hundredfold."""
    return ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *tests(KERNELS, *names))


KERNELS, GRAPHS, REAL = "tests/nn/test_kernels.py", "tests/distrib/test_graph.py", "tests/nn/test_gpu.py"
LONGEST = 480
"""Seconds of a part: a machine that is lent may end a command after ten minutes."""


def parts() -> dict[str, Part]:
    """The parts by name: the most telling first, none longer than LONGEST."""
    torch, many, reference = ("--against", "torch"), ("--steps", "1000"), ("--epochs", "2")
    on_host = (*BENCH, "step", "--backend", "numpy", "--batch-size", "8", "--json")
    return {
        "memcheck": (checked("memcheck", "test_loss", "test_optimizers", "test_global_pool"), GPU, 240),
        "racecheck": (checked("racecheck", "test_loss", "test_optimizers", "test_global_pool"), GPU, 240),
        "tests-kernels": (tests(KERNELS), GPU, 300),
        "tests-cudnn": (tests(REAL, "cudnn"), GPU, 300),
        "tests-graph": (tests(GRAPHS), GPU, LONGEST),
        "tests-gpu-one": (tests(REAL, "graph", "float32_training"), GPU, 300),
        "step-8-tf32": (step(8, "tf32", *many, *torch), {}, LONGEST),
        "kernels-8-tf32": (kernels(8, "tf32"), {}, 200),
        "tests-gpu": (tests(REAL), GPU, LONGEST),
        "ranks-2": (ranks(2, "step", "--comm", "nccl"), SHARED_GPU, 200),
        "allreduce-nccl": (ranks(2, "allreduce", "--comm", "nccl"), SHARED_GPU, 200),
        "reference-ours": (training("reference", 1), {}, 240),
        "reference-torch": (training("reference", 1, *reference, *torch), {}, LONGEST),
        "step-512-tf32": (step(512, "tf32", *torch), {}, 400),
        "step-512-bf16": (step(512, "bf16", *torch), {}, 400),
        "step-2048-tf32": (step(2048, "tf32", *torch), {}, 400),
        "step-2048-bf16": (step(2048, "bf16", *torch), {}, 400),
        "fast99": (training("fast99", 10), {}, 300),
        "best": (training("best", 3), {}, LONGEST),
        "reference-five": (training("reference", 5), {}, LONGEST),
        "ranks-4": (ranks(4, "step", "--comm", "nccl"), SHARED_GPU, 200),
        "allreduce-staged": (ranks(2, "allreduce", "--comm", "mpi"), {}, 200),
        "step-8-eager": (step(8, "tf32", "--no-cuda-graph"), {}, 200),
        "step-8-float32": (step(8, "float32", *many, *torch), {}, 400),
        "step-512-float32": (step(512, "float32", *torch), {}, 400),
        "kernels-512-tf32": (kernels(512, "tf32"), {}, 200),
        "kernels-512-bf16": (kernels(512, "bf16"), {}, 200),
        "numpy-vectorised": ((*on_host, "--repeats", "3"), {}, 200),
        "numpy-loop": ((*on_host, "--steps", "1", "--repeats", "1", "--against", "loop"), {}, 400),
    }


def run(command: tuple[str, ...], more: dict[str, str], limit: float) -> dict[str, Any]:
    """What a part printed, JSON where it is that, and how it ended."""
    done = finish(command, {**MPI_DEFAULTS, **os.environ, **more}, limit)
    result = {"command": shown(command), "environment": more, "code": done.code, "seconds": done.seconds}
    try:
        return {**result, "result": json.loads(done.out)}
    except ValueError:
        return {**result, "stdout": done.out[-8000:], "stderr": done.err[-4000:]}


def shown(command: tuple[str, ...]) -> str:
    return " ".join(command).replace(sys.executable, "python")


def missing() -> list[str]:
    """What parts need that is not installed."""
    needs = {"pytest": "the tests", "torch": "comparisons with PyTorch", "mpi4py": "several ranks"}
    found = [
        f"{name} is missing, which {what} need: those parts will fail"
        for name, what in needs.items()
        if importlib.util.find_spec(name) is None
    ]
    if shutil.which("mpirun") is None:
        found.append("there is no mpirun on the path: parts with several ranks will fail")
    return found


@one_process
def gpu_report(
    out: Annotated[Path, typer.Option(help="The report; parts that passed in it are not run again.")] = Path(
        "gpu-report.json"
    ),
    only: Annotated[str, typer.Option(metavar="PART", help="Run the parts whose names hold this.")] = "",
    show: Annotated[bool, typer.Option("--list", help="List the parts and their commands.")] = False,
) -> None:
    """Run every check and benchmark that needs a GPU, one after another, into one JSON file.

    Exit code 1 if a part failed. Example: distrib gpu-report --only kernels
    """
    chosen = {name: part for name, part in parts().items() if only in name}
    if not chosen:
        raise UserError(f"--only {only}: no part's name holds that: {', '.join(parts())}")
    if show:
        for name, (command, _, limit) in chosen.items():
            print(f"{name:18} {limit:5.0f} s  {shown(command)}")
        print(f"{'in all, at most':18} {sum(limit for _, _, limit in chosen.values()):5.0f} s")
        return
    try:
        about = cupy_backend().describe()
    except RuntimeError as error:
        raise UserError(f"distrib gpu-report needs a GPU: {error}") from None
    for note in missing():
        print(f"note: {note}", file=sys.stderr)
    report = json.loads(out.read_text()) if out.exists() else {"parts": {}}
    report |= {"machine": machine(), "device": about, "host": environment(0, NUMPY)}
    for name, part in chosen.items():
        if report["parts"].get(name, {}).get("code") == 0:
            print(f"{name}: passed before")
            continue
        print(f"{name}: {shown(part[0])}", flush=True)
        report["parts"][name] = found = run(*part)
        print_part(name, found)
        out.write_text(json.dumps(report, indent=2))
    failed = [name for name in chosen if report["parts"][name]["code"]]
    names = f"; failed: {', '.join(failed)}" if failed else ""
    print(f"{out}: {len(chosen) - len(failed)} of {len(chosen)} parts passed{names}")
    raise typer.Exit(EXIT_CRASH if failed else 0)


def print_part(name: str, found: dict[str, Any]) -> None:
    """Print how a part ended, with its last words if it failed."""
    state = "FAILED" if found["code"] else "passed"
    print(f"{name}: {state} in {found['seconds']:.0f} s", flush=True)
    if found["code"]:
        print((found.get("stdout", "") + found.get("stderr", ""))[-2000:], flush=True)
