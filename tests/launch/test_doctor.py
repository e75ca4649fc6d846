"""`distrib doctor`: alone, under mpirun, and what it says where something is missing or broken."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import LIMIT, ROOT, environment, run, wait_for, write_idx

from distrib.data import idx as mnist
from launch import checks, doctor, machine
from launch import checks_together as together
from launch.checks import FAILURE, OK, WARNING, Facts, Finding, look
from launch.doctor import merge

PROGRAM = """
import sys, typer, distrib
from distrib.train import run_app
from launch.doctor import doctor
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(doctor)
sys.exit(run_app(app))
"""
NAMES = [
    "Python",
    "BLAS",
    "data",
    "disk",
    "CuPy",
    "GPUs",
    "NCCL",
    "MPI library",
    "launcher",
    "cuDNN",
    "ranks",
    "hosts",
    "threads",
    "ranks on GPUs",
    "all-reduce",
]


def diagnose(
    *arguments: object, code: int = 0, ranks: int = 1, env: dict[str, str] | None = None
) -> dict[str, dict[str, str]]:
    """The report by name of check; the exit code must be `code`, and there is no traceback."""
    done = run("-c", PROGRAM, *arguments, "--json", ranks=ranks, env=env, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    found = json.loads(done.stdout)
    assert all(list(finding) == ["name", "state", "found", "remedy"] for finding in found)
    assert all(bool(finding["remedy"]) == (finding["state"] != OK) for finding in found)
    assert any(finding["state"] == FAILURE for finding in found) == (code == 2)
    return {finding["name"]: finding for finding in found}


def fake_mpi(folder: Path, package: str = "", module: str = "") -> dict[str, str]:
    """Environment in which mpi4py consists of these two texts."""
    (folder / "mpi4py").mkdir()
    (folder / "mpi4py" / "__init__.py").write_text(package)
    (folder / "mpi4py" / "MPI.py").write_text(module)
    return {"PYTHONPATH": f"{folder}:{ROOT}"}


@pytest.fixture(autouse=True)
def _without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_NTASKS", raising=False)


@pytest.fixture
def _fresh() -> Iterator[None]:
    """Nothing remembered of another test's GPUs."""
    for cached in (checks.devices, checks.nccl_number):
        cached.cache_clear()
    yield
    for cached in (checks.devices, checks.nccl_number):
        cached.cache_clear()


def test_alone() -> None:
    found = diagnose()
    assert list(found) == NAMES
    assert "over 1 rank(s) right" in found["all-reduce"]["found"]
    assert "60000 + 10000 images" in found["data"]["found"]
    assert sys.version.split()[0] in found["Python"]["found"]
    assert "one process" in found["launcher"]["found"]


def test_text() -> None:
    lines = run("-c", PROGRAM, env={"SLURM_NTASKS": "3"}).stdout.splitlines()
    assert [line.split()[0] for line in lines if "→" not in line] == [
        WARNING if name == "ranks" else OK for name in NAMES
    ]
    assert lines[NAMES.index("ranks") + 1].strip() == "→ start all: with srun, or mpirun -n 3"


@pytest.mark.parametrize(("ranks", "env"), [(2, {"SLURM_NTASKS": "2"}), (3, {})])
def test_ranks(ranks: int, env: dict[str, str]) -> None:
    """Real MPI: every rank is counted and summed over, and one report is printed."""
    found = diagnose(ranks=ranks, env=env)
    assert list(found) == NAMES
    assert found["ranks"]["state"] == OK
    assert found["ranks"]["found"] == f"{ranks} rank(s)" + ", as SLURM_NTASKS=2" * bool(env)
    assert found["hosts"]["found"].endswith(f"with {ranks} rank(s)")
    assert (found["all-reduce"]["state"], found["MPI library"]["state"], found["launcher"]["state"]) == (
        OK,
        OK,
        OK,
    )
    assert f"over {ranks} rank(s) right" in found["all-reduce"]["found"]
    assert found["threads"]["found"].startswith(f"{ranks} rank(s) × 1 BLAS thread(s)")


def test_slurm_ntasks() -> None:
    found = diagnose(ranks=2, env={"SLURM_NTASKS": "4"})["ranks"]
    assert (found["state"], found["found"]) == (WARNING, "2 rank(s), but SLURM_NTASKS=4")
    assert "mpirun -n 4" in found["remedy"]


def test_singletons() -> None:
    """A launcher that MPI knows nothing of."""
    found = diagnose(env={"OMPI_COMM_WORLD_SIZE": "4"}, code=2)
    assert (found["ranks"]["state"], found["all-reduce"]["state"]) == (FAILURE, FAILURE)
    assert found["ranks"]["found"] == "4 were started, and MPI sees 1 in each"
    assert "srun --mpi=pmix" in found["ranks"]["remedy"]


@pytest.mark.parametrize(
    ("package", "module", "words"),
    [
        (
            "",
            "raise RuntimeError('cannot load MPI library\\nlibmpi.so: not found')",
            "no MPI library (cannot load MPI library)",
        ),
        ("raise ImportError('none here')", "", "mpi4py is not installed (none here)"),
    ],
)
def test_no_mpi(tmp_path: Path, package: str, module: str, words: str) -> None:
    """One process needs none; several do, and learn it from one report."""
    env = fake_mpi(tmp_path, package, module)
    alone = diagnose(env=env)["MPI library"]
    assert (alone["state"], alone["found"]) == (WARNING, words)
    several = diagnose(env=env, ranks=2, code=2)
    assert (several["MPI library"]["state"], several["MPI library"]["found"]) == (FAILURE, words)
    assert several["ranks"]["state"] == several["all-reduce"]["state"] == FAILURE


def test_mpi_hangs(tmp_path: Path) -> None:
    found = diagnose("--timeout", 8, env=fake_mpi(tmp_path, "", "import time; time.sleep(1000)"), code=2)
    assert list(found) == [*NAMES[:7], "outcome"]
    assert found["outcome"]["found"] == "the check of MPI library: no answer after 16 s"


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("os.kill(os.getpid(), 11)", "SIGSEGV: no daemon"),
        ("os._exit(14)", "exit code 14: no daemon"),
    ],
)
def test_mpi_ends_the_process(tmp_path: Path, end: str, words: str) -> None:
    module = f"import os, sys; print('*** no daemon ***', file=sys.stderr, flush=True); {end}"
    found = diagnose(env=fake_mpi(tmp_path, "", module), code=2)
    assert found["outcome"]["found"] == f"the check of MPI library: {words}"
    assert found["data"]["state"] == OK


def test_launcher_ends_the_job(tmp_path: Path) -> None:
    """The report comes out between SIGTERM and SIGKILL."""
    env = environment(
        fake_mpi(
            tmp_path,
            "",
            f"import pathlib, time; pathlib.Path({str(tmp_path / 'here')!r}).touch(); time.sleep(1000)",
        )
    )
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "--json"], env=env, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    wait_for((tmp_path / "here").exists, "the check of MPI", process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 2
    assert "interrupted" in json.loads(out)[-1]["found"]


def test_one_rank_without_mpi(tmp_path: Path) -> None:
    """It says so itself; the others end within the bound."""
    package = f"""
import os
if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
    raise ImportError("none here")
import sys
sys.path.remove({str(tmp_path)!r})
del sys.modules["mpi4py"]
import mpi4py
"""
    done = run(
        "-c", PROGRAM, "--json", "--timeout", 10, ranks=2, env=fake_mpi(tmp_path, package), check=False
    )
    assert done.returncode != 0
    assert "rank 1 on" in done.stderr
    assert "mpi4py is not installed (none here)" in done.stderr
    assert json.loads(done.stdout)[-1]["state"] == FAILURE


def test_damaged_data(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(mnist.SHIPPED, folder)
    assert diagnose("--data", folder)["data"]["found"].endswith("not known to us")
    name = folder / "train-labels-idx1-ubyte.gz"
    name.write_bytes(name.read_bytes()[:1000])
    found = diagnose("--data", folder, code=2)["data"]
    assert (found["state"], str(name) in found["found"]) == (FAILURE, True)
    assert found["remedy"] == "copy it again, or leave out --data"
    assert "no such folder" in diagnose("--data", tmp_path / "nowhere", code=2)["data"]["found"]


def test_shipped_data_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mnist.SHA256, "t10k-labels-idx1-ubyte.gz", "0")
    found = checks.data(None)
    assert (found.state, found.remedy) == (FAILURE, "install the package again")
    assert "t10k-labels-idx1-ubyte.gz: SHA-256 differs" in found.found


def test_ranks_with_other_data(small_data: Path) -> None:
    """Each rank reads a sound folder, but its host holds other files there."""
    ours = look("data", checks.data, str(small_data))
    write_idx(small_data / "t10k-labels-idx1-ubyte", np.ones(32))
    theirs = look("data", checks.data, str(small_data))
    found = merge([[ours], [theirs], [ours]])[0]
    assert (ours.state, found.state, found.remedy) == (OK, FAILURE, "give all ranks the same data")
    assert found.found == f"rank 0, 2: {ours.found}; rank 1: {theirs.found}"


@pytest.mark.parametrize(("free", "state"), [(50 << 20, FAILURE), (500 << 20, WARNING), (5 << 30, OK)])
def test_free_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, state: str) -> None:
    """Asked of the first folder on the way that is there; nothing is left in it."""
    asked: list[Path] = []

    def disk_usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=free)

    monkeypatch.setattr(checks.shutil, "disk_usage", disk_usage)
    found = look("disk", checks.disk, str(tmp_path / "runs" / "new"))
    assert (found.state, bool(found.remedy)) == (state, state != OK)
    assert asked == [tmp_path]
    assert not list(tmp_path.iterdir())


def test_disk_that_cannot_be_written(tmp_path: Path) -> None:
    """A file where a folder should be, which holds for root too."""
    (tmp_path / "runs").write_text("")
    found = diagnose("--run-dir", tmp_path / "runs" / "x", code=2)["disk"]
    assert (found["state"], "cannot be written" in found["found"]) == (FAILURE, True)


def test_a_check_may_fail_in_any_way() -> None:
    def broken() -> Finding:
        raise KeyError("uuid")

    assert look("GPUs", broken) == Finding(FAILURE, "KeyError: 'uuid'", "mend what the message names", "GPUs")


def test_merge() -> None:
    """The worst state counts; what differs is told by rank, and matters where all should be alike."""
    same = merge([[Finding(OK, "3.13", "", "Python")]] * 3)
    assert same == [Finding(OK, "3.13", "", "Python")]
    python, gpus = merge(
        [
            [Finding(OK, "3.13", "", "Python"), Finding(OK, "A", "", "GPUs")],
            [Finding(OK, "3.12", "", "Python"), Finding(OK, "B", "", "GPUs")],
        ]
    )
    assert python == Finding(
        WARNING, "rank 0: 3.13; rank 1: 3.12", "give all ranks the same Python", "Python"
    )
    assert gpus == Finding(OK, "rank 0: A; rank 1: B", "", "GPUs")
    bad = merge([[Finding(OK, "fine", "", "disk")], [Finding(FAILURE, "full", "free some", "disk")]])
    assert bad == [Finding(FAILURE, "rank 0: fine; rank 1: full", "free some", "disk")]


def fact(
    host: str = "a", cores: int = 4, threads: int = 1, gpus: tuple[str, ...] = (), nccl: int = 0
) -> Facts:
    return Facts(host, list(range(cores)), threads, 2, list(gpus), nccl)


def test_hosts_and_threads() -> None:
    assert together.hosts([fact("a"), fact("a"), fact("b"), fact("b")]).state == OK
    uneven = together.hosts([fact("a"), fact("a"), fact("b")])
    assert (uneven.state, uneven.found) == (WARNING, "a with 2 rank(s), b with 1 rank(s)")
    assert together.threads([fact(threads=2), fact(threads=2), fact("b", threads=4)]).state == OK
    many = together.threads([fact(threads=4), fact(threads=4), fact("b")])
    assert (many.state, many.remedy) == (WARNING, "set OMP_NUM_THREADS=2")
    assert together.threads([fact(cores=1)] * 2).remedy == "start a rank per core, or fewer"
    bound = together.threads([Facts("a", [core], 2, 2, [], 0) for core in range(4)])
    assert (bound.state, bound.remedy) == (WARNING, "set OMP_NUM_THREADS=1")


def test_ranks_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_MULTI_RANK_GPU_ENABLE", raising=False)
    two = ("GPU-1", "GPU-2")
    assert together.sharing([fact(), fact()]).found == "no rank has a GPU"
    assert together.sharing([fact(gpus=two), fact()]).state == WARNING
    assert (
        together.sharing([fact(gpus=two), fact(gpus=two), fact("b", gpus=two)]).found
        == "every rank has its own"
    )
    old = together.sharing([fact(gpus=two, nccl=22800)] * 3)
    assert (old.state, "NCCL 2.30" in old.remedy) == (WARNING, True)
    new = together.sharing([fact(gpus=two, nccl=23203)] * 3)
    assert (new.state, "or set NCCL_MULTI_RANK_GPU_ENABLE=1" in new.remedy) == (WARNING, True)
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    assert together.sharing([fact(gpus=two, nccl=23203)] * 3).state == OK


@pytest.mark.usefixtures("_fresh")
def test_a_machine_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CuPy would say there."""
    runtime = SimpleNamespace(
        getDeviceCount=lambda: 2,
        runtimeGetVersion=lambda: 12090,
        driverGetVersion=lambda: 13000,
        getDeviceProperties=lambda device: {
            "name": b"H100",
            "uuid": bytes(range(16)) if device == 0 else b"\xab\xcd",
        },
    )
    for module in (checks, machine):
        monkeypatch.setattr(
            module, "import_cupy", lambda: SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))
        )
    monkeypatch.setattr(checks, "cupy_version", lambda: "14.2.0")
    monkeypatch.setattr(checks, "driver", lambda: "580.65.06")
    monkeypatch.setattr(
        checks.importlib,
        "import_module",
        lambda _: SimpleNamespace(available=True, get_version=lambda: 23203),
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert checks.cupy().found == "14.2.0 with CUDA 12.9; driver 580.65.06, for CUDA 13.0"
    assert checks.gpus().found == "H100 GPU-00010203-0405-0607-0809-0a0b0c0d0e0f, H100 GPU-abcd"
    assert checks.nccl().found == "2.32.3, which can put several ranks on one GPU"
    world: Any = SimpleNamespace(
        choice_explanation="",
        backend=SimpleNamespace(algorithms={"cudnn": SimpleNamespace(version="9.10")}, notes=()),
    )
    assert checks.cudnn(world).found.startswith("9.10, nvidia-cudnn-frontend")
    world.backend.algorithms, world.backend.notes = {}, ("convolutions without cuDNN",)
    assert checks.cudnn(world).state == WARNING
    assert checks.cudnn(None).state == WARNING


@pytest.mark.usefixtures("_fresh")
def test_a_driver_that_cupy_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is information; a GPU that is not used is a warning."""

    def missing() -> None:
        raise RuntimeError("CuPy 14 sees no GPU (cudaErrorInsufficientDriver)")

    for module in (checks, machine):
        monkeypatch.setattr(module, "import_cupy", missing)
    monkeypatch.setattr(checks, "driver", lambda: "")
    assert checks.cupy().state == OK
    monkeypatch.setattr(checks, "driver", lambda: "470.82")
    assert (checks.cupy().state, checks.gpus().state, checks.nccl().state) == (WARNING, OK, OK)


@pytest.mark.parametrize(
    ("library", "mpirun", "state"),
    [
        ("Open MPI v5.0.11, package: Open MPI", "mpirun (Open MPI) 5.0.11", OK),
        ("Open MPI v5.0.11, package: Open MPI", "mpirun (Open MPI) 4.1.4", WARNING),
        ("Open MPI v5.0.11, package: Open MPI", "HYDRA build details:\n    Version:  4.1", WARNING),
        ("MPICH Version:      4.3.0\nMPICH Release", "HYDRA build details:\n    Version:  4.1", OK),
        (
            "Intel(R) MPI Library 2021.9 for Linux* OS",
            "Intel(R) MPI Library for Linux* OS, Version 2021.9",
            OK,
        ),
    ],
)
def test_whose_mpirun(monkeypatch: pytest.MonkeyPatch, library: str, mpirun: str, state: str) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", SimpleNamespace(Get_library_version=lambda: library))
    monkeypatch.setattr(checks.shutil, "which", lambda name: f"/opt/bin/{name}")
    monkeypatch.setattr(checks.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=mpirun))
    found = look("launcher", checks.launcher)
    assert (found.state, bool(found.remedy)) == (state, state != OK)
    assert "/opt/bin/mpirun is of" in found.found


def test_a_child_that_dies_in_the_middle_of_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    child = tmp_path / "python"
    child.write_text(
        f'#!/bin/bash\necho \'{doctor.MARK}["disk", [["ok", "fine", "", "Python"]]]\'\n'
        f"printf '{doctor.MARK}[\"da'\nkill -9 $$\n"
    )
    child.chmod(0o755)
    monkeypatch.setattr(doctor.sys, "executable", str(child))
    found = doctor.ask(20, None, "runs")
    assert [each.state for each in found] == [OK, FAILURE]
    assert found[1].found.startswith("disk: SIGKILL")


def test_what_a_dead_child_left_behind_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A process of its own that holds its output open: the child's end is what counts."""
    before = threading.enumerate()
    child = tmp_path / "python"
    child.write_text(f"#!/bin/bash\nsleep 100 &\necho $! >{tmp_path}/left\nexit 14\n")
    child.chmod(0o755)
    monkeypatch.setattr(doctor.sys, "executable", str(child))
    monkeypatch.setattr(doctor, "LAST_WORDS", 0.1)
    (found,) = doctor.ask(40, None, "runs")
    left = int((tmp_path / "left").read_text())
    os.kill(left, signal.SIGKILL)  # it was there all the time
    assert found.found == "the start of Python: exit code 14"
    for thread in set(threading.enumerate()) - set(before):
        thread.join(30)


def test_no_mpirun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.shutil, "which", lambda _: None)
    assert checks.launcher().state == WARNING
    monkeypatch.setattr(checks.shutil, "which", lambda name: "/bin/srun" if name == "srun" else None)
    assert checks.launcher().state == OK


def test_timeout_must_be_sound() -> None:
    done = run("-c", PROGRAM, "--timeout", 0, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "distrib: error: --timeout 0: give a finite number above 0\n",
    )
