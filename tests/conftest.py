"""What several tests share: real MPI, the command line as a person calls it, a small data set."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import needs
import numpy as np
import pytest
import typer

from distrib.comm.world import Member
from distrib.data.dataset import Dataset, make
from distrib.train import run_app

if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore

ROOT = Path(__file__).parent.parent
collect_ignore = [] if os.environ.get("DISTRIB_TEST_GPU") == "1" else ["nn/test_gpu.py"]
ROOMS = ("doubles", "nn", "distrib", "launch", "cluster")
FOLDERS = [ROOT, *(ROOT / "tests" / room for room in ("", *ROOMS))]
HELPERS = {"PYTHONPATH": os.pathsep.join([*map(str, FOLDERS), os.environ.get("PYTHONPATH", "")])}
"""The environment of a subprocess that imports a test's helpers."""
LIMIT = 600  # seconds; no test may hang, nor fail because the machine is busy
QUESTIONS = ("ldconfig", "lscpu")  # what libraries ask about the machine as they are imported
NOT_STARTED = "The PMIx server's listener thread failed to start"
"""What mpirun said once before it had started anything."""

# as the README sets it, but for the last
MPI_ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    # ranks that wait leave the cores to other tests
    "OMPI_MCA_mpi_yield_when_idle": "1",
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(name, ...): what the test needs beside the dev extra: needs.py")
    config.addinivalue_line("markers", "quick: starts no other process")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of starts would each compile the package
    if "DISTRIB_CACHE_DIR" not in os.environ:  # else it is a worker's, who shares it
        os.environ["DISTRIB_CACHE_DIR"] = config.cache_folder = tempfile.mkdtemp()
    beside = str(Path(sys.executable).parent)  # mpirun of the virtual environment, activated or not
    os.environ["PATH"] = os.pathsep.join((beside, os.environ.get("PATH", "")))
    # a shell's background job ignores the first and nohup's the second, which some tests send
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(getattr(config, "cache_folder", ""), ignore_errors=True)


LONG = [
    f"test_{name}"
    for name in (
        *("slurm", "suspend", "hosts", "failures", "doctor", "elastic", "bring_up", "graph", "reproduce"),
        *("shards_device", "pictures", "bench", "shards", "comm", "kill", "bench_allreduce", "report", "cli"),
        *(
            "kernels",
            "entry",
            "resume",
            "ranks",
            "scale",
            "api",
            "output",
            "export",
            "models",
            "torch_parity",
        ),
        *("data", "validation", "networks", "cache", "hostile", "follow_torch", "nccl"),
    )
]
"""Where several workers share the tests, these files come first: those that wait, then those that compute."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        needs.require(*mark.args)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if lines := needs.not_run(terminalreporter.getreports("skipped")):
        terminalreporter.section("not run", yellow=True)
        terminalreporter.write_line("\n".join(lines))


@pytest.fixture(autouse=True)
def starts_no_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold a test that is marked `quick` to its word."""
    if not request.node.get_closest_marker("quick"):
        return

    class Refused(subprocess.Popen):
        def __init__(self, command: str | list[str], *more: object, **options: object) -> None:
            program = Path(command if isinstance(command, str) else command[0]).name
            assert program in QUESTIONS, f"a quick test starts {command}"
            super().__init__(command, *more, **options)

    monkeypatch.setattr(subprocess, "Popen", Refused)


def environment(more: dict[str, str] | None = None) -> dict[str, str]:
    """Of every subprocess: MPI as the README sets it, one BLAS thread (other threads round otherwise)."""
    return {
        **os.environ,
        **MPI_ENVIRONMENT,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",  # PyTorch's threads must not spin while others have work
        **(more or {}),
    }


def run(
    *command: object, cwd: Path = ROOT, env: dict[str, str] | None = None, check: bool = True, ranks: int = 1
) -> subprocess.CompletedProcess[str]:
    """Run Python with `command` in a subprocess, under mpirun where ranks > 1; AssertionError on failure."""
    python = [sys.executable, "-W", "error::DeprecationWarning:nn", *map(str, command)]
    if ranks > 1:
        mpirun = Path(sys.executable).with_name("mpirun")
        python = [str(mpirun) if mpirun.exists() else "mpirun", "-n", str(ranks), *python]
    for _ in range(3):
        done = subprocess.run(
            python, cwd=cwd, env=environment(env), text=True, capture_output=True, timeout=LIMIT
        )
        if NOT_STARTED not in done.stdout + done.stderr:
            break
    if check:
        assert done.returncode == 0, f"{' '.join(python)}\n{done.stdout}\n{done.stderr}"
    return done


def before_each_step(code: str) -> str:
    """A program that trains, and does `code`, one statement in which `self` is the Trainer, before each
    step."""
    return f"""
import os, signal, sys, time
from distrib import loop as train
plain = train.Trainer.step
def step(self, *given):
    {code}
    plain(self, *given)
train.Trainer.step = step
from distrib.train import main
sys.exit(main())
"""


def at(rank: int, step: int, code: str) -> str:
    """`before_each_step`, on one rank and before one step (from 0) only."""
    return before_each_step(f"if self.world.rank == {rank} and self.progress.step == {step}: {code}")


def pause(path: Path) -> str:
    """The statement that waits until a file is there, for `at` and `before_each_step`."""
    return f"any(os.path.exists({str(path)!r}) or time.sleep(0.02) for _ in iter(int, 1))"


def wait_for(condition: Callable[[], object], what: str, process: subprocess.Popen | None = None) -> None:
    """Come back once `condition` holds; AssertionError where `process` ends before, or after LIMIT
    seconds."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, f"not in {LIMIT} s: {what}"
        assert process is None or process.poll() is None or condition(), (
            f"ended with {process.returncode}: {what}"
        )
        time.sleep(0.02)


def train(
    folder: Path, *arguments: object, ranks: int = 1, check: bool = True, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python -m distrib.train --run-dir FOLDER …`, on `ranks` ranks."""
    return run("-m", "distrib.train", "--run-dir", folder, *arguments, ranks=ranks, check=check, env=env)


EACH = """
import json, sys
from distrib.train import main
for sys.argv[1:] in json.loads(sys.argv[1]):
    if code := main():
        sys.exit(code)
"""


def train_each(*runs: tuple[object, ...], ranks: int = 1, **more: Any) -> None:
    """`python -m distrib.train` with the arguments of each run, one after another in the same processes.

    For what does not depend on a process of its own: starting one costs more than a short run.
    """
    run("-c", EACH, json.dumps([[str(each) for each in given] for given in runs]), ranks=ranks, **more)


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    """The loss of each logged step."""
    return [line["loss"] for line in metrics(folder) if "loss" in line]


def crew(size: int) -> list[Member]:
    """The ranks of a world that a test makes itself."""
    return [Member(number, size, "here", 0) for number in range(size)]


def write_idx(path: Path, array: np.ndarray) -> None:
    """An IDX file of unsigned bytes, gzipped if the name says so; of images of one channel, without its
    axis."""
    array = array[..., 0] if array.ndim == 4 and array.shape[3] == 1 else array
    head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    data = head + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def sized(train: int, test: int) -> Dataset:
    """A data set of so many black images."""
    parts = [(np.zeros((count, 28, 28), np.uint8), np.zeros(count, np.uint8)) for count in (train, test)]
    return make("black", parts[0], parts[1], least=10)


@pytest.fixture
def command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Call a command's function, or a whole app, as the command line does, within this process.

    Gives exit code, standard output and standard error.
    """

    def call(command: Callable[..., None] | typer.Typer, *arguments: object) -> tuple[int, str, str]:
        app = command if isinstance(command, typer.Typer) else typer.Typer(add_completion=False)
        if app is not command:
            app.command()(command)
        monkeypatch.setattr(sys, "argv", ["distrib", *map(str, arguments)])
        capsys.readouterr()
        before = {number: signal.getsignal(number) for number in signal.valid_signals()}
        try:
            return run_app(app), *capsys.readouterr()
        finally:  # a run that ends with its process ignores signals, and so would all that later tests start
            for number, handler in before.items():
                if handler is not None and signal.getsignal(number) is not handler:
                    signal.signal(number, handler)

    return call


@pytest.fixture
def small_data(tmp_path: Path) -> Path:
    """A folder in MNIST's format with 64 training and 32 test images of random pixels."""
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(7)
    for prefix, count in (("train", 64), ("t10k", 32)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", rng.integers(0, 256, (count, 28, 28)))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", rng.integers(0, 10, count))
    return folder
