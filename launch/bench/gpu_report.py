"""`distrib gpu-report`, which `make test-gpu` calls: every check and benchmark that needs a GPU, in one file.

Each part is a process with a bound on its time. The file is written anew after each, so that nothing is lost
where the machine goes away; a part that is in the file, and passed, is not run again. A rehearsal runs all of
it in small on a machine without a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from distrib.errors import EXIT_CRASH, UserError
from distrib.files import write_atomically
from distrib.run.machine import environment
from launch.entry import one_process, positive
from launch.machine import DISTRIB, MPI_DEFAULTS, NO_END, finish, machine
from nn.cuda.backend import cupy_backend
from nn.device import NUMPY

BENCH = (*DISTRIB, "bench")
PYTEST, UNPOOLED = (sys.executable, "-m", "pytest"), (sys.executable, "tests/gpu/unpooled.py")
TELLING = ("-q", "-o", "faulthandler_timeout=120")  # says where a test hangs
STEP = (*BENCH, "step", "--backend", "cupy", "--comm", "none", "--repeats", "3", "--json")
RUN = (*BENCH, "run", "--backend", "cupy", "--ranks", "1", "--json")
CHECK = (sys.executable, "tests/gpu/checks.py")
GPU = {"DISTRIB_TEST_GPU": "1"}
SHARED_GPU = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_MAX_CTAS": "8", "NCCL_NVLS_ENABLE": "0"}
SHARED_TESTS = {**GPU, **SHARED_GPU, "DISTRIB_TEST_ALL": "1"}
"""A test that finds no NCCL for several ranks on a GPU fails, instead of being skipped."""


class Part(NamedTuple):
    """One process of the report."""

    group: str  # a letter; a to f are the first half hour's order
    command: tuple[str, ...]
    environment: dict[str, str]
    limit: float  # seconds after which it is ended
    usual: float  # seconds on an H100, estimated


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


def cases(room: str, *names: str, by: tuple[str, ...] = PYTEST) -> tuple[str, ...]:
    """Tests of a file, on the GPU; those whose names hold a word, where one is given."""
    return (*by, *TELLING, room, *(("-k", " or ".join(names)) if names else ()))


def checked(tool: str, *names: str) -> tuple[str, ...]:
    """Some kernels under one of compute-sanitizer's tools, which slows them down a hundredfold."""
    return (
        "compute-sanitizer",
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        *cases(KERNELS, *names, by=UNPOOLED),
    )


def graph(precision: str) -> tuple[str, ...]:
    """The default recipe, in graphs, eagerly, and on the host."""
    return (*CHECK, "graph", "--backend", "cupy", "--precision", precision, "--steps", "2000")


KERNELS, GRAPHS, REAL = "tests/nn/test_kernels.py", "tests/distrib/test_graph.py", "tests/nn/test_gpu.py"
LONGEST = 480
"""Seconds of a part: a machine that is lent may end a command after ten minutes."""


def parts() -> dict[str, Part]:
    """The parts by name: the most telling first, none longer than LONGEST."""
    torch, many, reference = ("--against", "torch"), ("--steps", "1000"), ("--epochs", "2")
    other = ("--model", "resnet20", "--data", "synthetic:4096x32x32x3:10")
    on_host = (*BENCH, "step", "--backend", "numpy", "--batch-size", "8", "--json")
    few = ("test_loss", "test_optimizers", "test_global_pool")
    killed = (*CHECK, "killed", "--backend", "cupy", "--comm", "nccl")
    doctor = (*DISTRIB, "doctor", "--json")
    return {
        "nvidia-smi": Part("a", ("nvidia-smi",), {}, 60, 3),
        "doctor": Part("a", doctor, {}, 120, 20),
        "doctor-2": Part("a", ("mpirun", "-n", "2", *doctor), SHARED_GPU, 120, 25),
        "memcheck": Part("a", checked("memcheck", *few), GPU, 240, 90),
        "racecheck": Part("a", checked("racecheck", *few), GPU, 240, 90),
        "tests-kernels": Part("a", cases(KERNELS), GPU, 300, 90),
        "tests-cudnn": Part("a", cases(REAL, "cudnn"), GPU, 300, 60),
        "tests-graph": Part("a", cases(GRAPHS), GPU, LONGEST, 90),
        "tests-gpu-one": Part("a", cases(REAL, "graph_replays", "float32_training"), GPU, 300, 40),
        "graph-float32": Part("b", graph("float32"), {}, 300, 60),
        "graph-tf32": Part("b", graph("tf32"), {}, 300, 60),
        "step-8-tf32": Part("c", step(8, "tf32", *many, *torch), {}, LONGEST, 150),
        "kernels-8-tf32": Part("c", kernels(8, "tf32"), {}, 200, 30),
        "tests-ranks": Part("d", cases(REAL, "nccl", "bf16_gradients", "rank_that"), SHARED_TESTS, 400, 150),
        "allreduce-nccl": Part("d", ranks(2, "allreduce", "--comm", "nccl"), SHARED_GPU, 200, 50),
        "killed": Part("d", killed, SHARED_GPU, 200, 40),
        "ranks-2": Part("d", ranks(2, "step", "--comm", "nccl"), SHARED_GPU, 200, 40),
        "reference-ours": Part("e", training("reference", 1), {}, 240, 50),
        "reference-torch": Part("e", training("reference", 1, *reference, *torch), {}, LONGEST, 240),
        "step-512-tf32": Part("f", step(512, "tf32", *torch), {}, 400, 120),
        "step-512-bf16": Part("f", step(512, "bf16", *torch), {}, 400, 120),
        "step-2048-tf32": Part("f", step(2048, "tf32", *torch), {}, 400, 120),
        "step-2048-bf16": Part("f", step(2048, "bf16", *torch), {}, 400, 120),
        "fast99": Part("f", training("fast99", 10), {}, 300, 120),
        "best": Part("f", training("best", 3), {}, LONGEST, 90),
        "reference-five": Part("f", training("reference", 5), {}, LONGEST, 220),
        "tests-rest": Part("g", cases(REAL, "mpi", "resume_to_the_bit"), GPU, LONGEST, 180),
        "ranks-4": Part("g", ranks(4, "step", "--comm", "nccl"), SHARED_GPU, 200, 50),
        "allreduce-staged": Part("g", ranks(2, "allreduce", "--comm", "mpi"), {}, 200, 50),
        "step-8-eager": Part("g", step(8, "tf32", "--no-cuda-graph"), {}, 200, 30),
        "step-8-float32": Part("g", step(8, "float32", *many, *torch), {}, 400, 150),
        "step-512-float32": Part("g", step(512, "float32", *torch), {}, 400, 120),
        "step-512-resnet20": Part("g", step(512, "tf32", *other, *torch), {}, 400, 120),
        "kernels-512-tf32": Part("g", kernels(512, "tf32"), {}, 200, 30),
        "kernels-512-bf16": Part("g", kernels(512, "bf16"), {}, 200, 30),
        "numpy-vectorised": Part("g", (*on_host, "--repeats", "3"), {}, 200, 20),
        "numpy-loop": Part(
            "g", (*on_host, "--steps", "1", "--repeats", "1", "--against", "loop"), {}, 400, 90
        ),
    }


ON_HOST = {"cupy": "numpy", "nccl": "mpi", "tf32": "float32", "bf16": "float32"}
"""What stands for an option's value in a rehearsal."""

SMALL = {
    "step": ("--width", "0.0625", "--steps", "2", "--repeats", "1"),
    "allreduce": ("--max-bytes", "4096", "--seconds", "0.05", "--repeats", "1"),
    "run": ("--width", "0.0625", "--limit-train", "256", "--limit-test", "64", "--repeats", "1"),
    "graph": ("--width", "0.0625", "--steps", "40", "--host-steps", "20"),
    "killed": ("--width", "0.0625"),
}
"""Options that a command takes besides in a rehearsal; of two alike the last counts."""


def rehearsal(part: Part) -> Part:
    """The same in small without a GPU: on the host or on the doubles; tests of a GPU are only collected."""
    command = part.command
    if command[0] == "compute-sanitizer":
        return part._replace(command=command[command.index(sys.executable) :], environment={})
    if "pytest" in command:
        return part._replace(command=(*command, "--collect-only"))
    if "kernels" in command:
        return part._replace(command=cases(GRAPHS, "test_kernels_are_listed"))
    small = next((more for name, more in SMALL.items() if name in command), ())
    return part._replace(command=(*(ON_HOST.get(word, word) for word in command), *small))


def choose(only: list[str] | None, nccl: Path | None) -> dict[str, Part]:
    """The parts whose names hold a word of `only`, or whose group is one; `nccl` is loaded where ranks share
    a GPU."""
    found = {}
    for name, part in parts().items():
        groups = {each.group for each in parts().values()}
        if only and not any(part.group == word if word in groups else word in name for word in only):
            continue
        if nccl and SHARED_GPU.items() <= part.environment.items():
            part = part._replace(environment={**part.environment, "LD_PRELOAD": str(nccl.resolve())})
        found[name] = part
    if not found:
        raise UserError(f"--only {' '.join(only or ())}: no part's name holds that: {', '.join(parts())}")
    return found


def run(command: tuple[str, ...], more: dict[str, str], limit: float) -> dict[str, Any]:
    """What a part printed, JSON where it is that, and how it ended."""
    done = finish(command, {**MPI_DEFAULTS, **os.environ, **more}, limit)
    result = {"command": shown(command), "environment": more, "code": done.code, "seconds": done.seconds}
    result["stderr"] = done.err[-10_000:]
    try:
        return {**result, "result": json.loads(done.out)}
    except ValueError:
        return {**result, "stdout": done.out[-30_000:]}


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


class Turns:
    """Runs parts, one after another, while the budget lasts; `report` is the file's contents."""

    def __init__(self, out: Path, report: dict[str, Any], budget: float | None) -> None:
        self.out, self.report, self.budget = out, report, budget
        self.begin = time.monotonic()

    def left(self) -> float:
        """Seconds of the budget."""
        return math.inf if self.budget is None else self.budget - (time.monotonic() - self.begin)

    def take(self, name: str, part: Part) -> None:
        """Run a part, unless it has been run, cannot be, or would not end in time."""
        before = self.report["parts"].get(name, {})
        if before.get("code") == 0 or (self.budget is not None and over(before)):
            print(f"{name}: {'passed' if before.get('code') == 0 else 'failed'} before")
            return
        if part.usual > self.left():
            print(f"{name}: left for the next call")
            return
        print(f"{name}: {shown(part.command)}", flush=True)
        tool = part.command[0]
        if shutil.which(tool):
            found = run(part.command, part.environment, min(part.limit, self.left()))
            if found["code"] == NO_END and found["seconds"] < part.limit:
                found["cut"] = True
        else:
            found = {"command": shown(part.command), "not_run": f"there is no {tool} on the path"}
        print_part(name, found)
        self.report["parts"][name] = found
        write_atomically(self.out, json.dumps(self.report, indent=2).encode())

    def end(self, chosen: dict[str, Part]) -> bool:
        """Print how the parts ended; whether none failed."""
        found = {name: self.report["parts"].get(name, {}) for name in chosen}
        lists = {
            "failed": [name for name, each in found.items() if over(each) and each["code"]],
            "not run": [name for name, each in found.items() if "not_run" in each],
            "left for the next call": [name for name, each in found.items() if not each or each.get("cut")],
        }
        words = [f"{what}: {', '.join(names)}" for what, names in lists.items() if names]
        passed = sum(each.get("code") == 0 for each in found.values())
        print("; ".join([f"{self.out}: {passed} of {len(chosen)} parts passed", *words]))
        return not lists["failed"]


def over(found: dict[str, Any]) -> bool:
    """Whether a part ran to its end, or to its own limit."""
    return "code" in found and not found.get("cut")


@one_process
def gpu_report(
    out: Annotated[Path, typer.Option(help="The report; parts that passed in it are not run again.")] = Path(
        "gpu-report.json"
    ),
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PART", help="Run the parts whose names hold this, or of a group; repeatable."),
    ] = None,
    budget: Annotated[
        float | None,
        positive("--budget", "Seconds; what would not end by then, the same command runs when called again."),
    ] = None,
    nccl: Annotated[Path | None, typer.Option(help="NCCL's library for ranks that share a GPU.")] = None,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Run all in small, without a GPU: on the host, on doubles.")
    ] = False,
    show: Annotated[bool, typer.Option("--list", help="List the parts and their commands.")] = False,
) -> None:
    """Run every check and benchmark that needs a GPU, one after another, into one JSON file.

    Exit code 1 if a part failed. Example: distrib gpu-report --only kernels
    """
    chosen = choose(only, nccl)
    if rehearse:
        chosen = {name: rehearsal(part) for name, part in chosen.items()}
    if show:
        print_list(chosen)
        return
    try:
        about = {"gpu": "none: a rehearsal"} if rehearse else cupy_backend().describe()
    except RuntimeError as error:
        raise UserError(f"distrib gpu-report needs a GPU: {error}") from None
    for note in missing():
        print(f"note: {note}", file=sys.stderr)
    report = json.loads(out.read_text()) if out.exists() else {"parts": {}}
    report |= {"machine": machine(), "device": about, "host": environment(0, NUMPY)}
    turns = Turns(out, report, budget)
    for name, part in chosen.items():
        turns.take(name, part)
    raise typer.Exit(0 if turns.end(chosen) else EXIT_CRASH)


def print_list(chosen: dict[str, Part]) -> None:
    """Print a line for each part: group, name, usual seconds, limit, command."""
    for name, part in chosen.items():
        print(f"{part.group} {name:18} {part.usual:5.0f} s {part.limit:5.0f} s  {shown(part.command)}")
    usual, limit = (sum(each) for each in zip(*((part.usual, part.limit) for part in chosen.values())))
    print(f"  {'in all':18} {usual:5.0f} s as a rule, at most {limit:.0f} s")


def print_part(name: str, found: dict[str, Any]) -> None:
    """Print how a part ended, with its last words if it failed."""
    if "not_run" in found:
        print(f"{name}: not run: {found['not_run']}", flush=True)
        return
    state = "CUT OFF" if found.get("cut") else "FAILED" if found["code"] else "passed"
    print(f"{name}: {state} in {found['seconds']:.0f} s", flush=True)
    if found["code"]:
        said = found.get("stdout") or json.dumps(found.get("result", ""))
        print((said + found.get("stderr", ""))[-2000:], flush=True)
