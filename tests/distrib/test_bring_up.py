"""Faults while four ranks connect, one by one: every rank ends, and the words say who and why."""

from __future__ import annotations

import re
import subprocess

import pytest
from conftest import HELPERS, run

RANKS = 4
CONNECT = """
import os, sys, threading, time
from distrib import launched_rank
from distrib.comm import choice, nccl, start, world
from distrib.errors import UserError
from nccl_double import Cuda, Nccl
from strict_array import StrictModule
from test_strict import StrictBackend

rank, log = launched_rank(), []
cuda, xp = Cuda(log, devices=4), StrictModule()
xp.cuda = cuda

def planted(*_, **__):
    raise RuntimeError("planted")

def cupy_backend(precision, local_rank):
    from mpi4py import MPI
    cuda.nccl = Nccl(MPI.COMM_WORLD, cuda, log)
    cuda.setDevice(local_rank % cuda.devices)
    return StrictBackend("cupy", xp, "NHWC")

choice.backends.cupy_backend = cupy_backend
choice.import_nccl = lambda: cuda.nccl
start.LEAST_MPI_INIT, start.MPI_INIT_TIMEOUTS = 0, 1
plain_own = world.own

plain_init = Nccl.__init__
def without_communicators(self, *more):
    plain_init(self, *more)
    self.NcclCommunicator = planted

class Failing:
    "A control communicator whose broadcast fails, as that of the unique id."
    def __init__(self, *joined):
        self.comm = plain_own(*joined)
    def __getattr__(self, name):
        return planted if name == "bcast" else getattr(self.comm, name)

{fault}
try:
    with world.connect({comm!r}, "cupy", timeout={timeout}) as joined:
        x = xp.ones(3)
        joined.comm.all_reduce(x).wait()
        print(f"sum {{joined.backend.to_host(x)[0]}}, {{joined.choice_explanation}}")
except UserError as error:
    print(f"error: {{error}}", flush=True)
from mpi4py import MPI
assert MPI.COMM_WORLD.allreduce(1) == 4
assert threading.active_count() == 1 and sys.excepthook is sys.__excepthook__
"""


def connect(fault: str, comm: str = "nccl", timeout: int = 100) -> subprocess.CompletedProcess[str]:
    """All ranks connect; `fault` is what is wrong. With a short `timeout` some rank must wait in vain."""
    code = CONNECT.format(fault=fault, comm=comm, timeout=timeout)
    return run("-c", code, ranks=RANKS, env=HELPERS, check=False)


@pytest.mark.parametrize("comm", ["nccl", "auto"])
def test_without_a_fault(comm: str) -> None:
    done = connect("", comm)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sum 4.0, backend cupy") == RANKS, done.stdout
    assert done.stdout.count("communicator nccl (4 ranks over MPI)") == RANKS


HEARD_OF = {
    "no GPU on one rank": (
        "if rank == 2: choice.backends.cupy_backend = lambda *_: (cupy_backend(*_), planted())",
        "--backend cupy: rank 2: planted",
    ),
    "a library broken on one rank": (
        "if rank == 2: choice.backends.cupy_backend = lambda *_: (cupy_backend(*_), {}['planted'])",
        "--backend cupy: rank 2: KeyError: 'planted'",
    ),
    "no NCCL on one rank": (
        "if rank == 1: Nccl.available = False",
        "--comm nccl: CuPy finds no NCCL library: pip install nvidia-nccl-cu12 (or -cu13) (rank 1)",
    ),
    "NCCL broken on one rank": (
        "if rank == 3: choice.import_nccl = planted",
        "--comm nccl: CuPy cannot load NCCL (RuntimeError: planted) (rank 3)",
    ),
    "no unique id": (
        "if rank == 0: Nccl.get_unique_id = planted",
        "the choice of a GPU for NCCL: RuntimeError: planted (rank 0)",
    ),
    "before the exchange": (
        "if rank == 2: cuda.Device = planted",
        "the choice of a GPU for NCCL: RuntimeError: planted (rank 2)",
    ),
    "one device twice": (
        "if rank == 3: cuda.setDevice = lambda _: setattr(cuda, 'device', 2)",
        "--comm nccl: ranks 2, 3 share one GPU, which takes NCCL 2.30 (found 22501) and",
    ),
    "NCCL fails on all": (
        "nccl.NcclCommunicator._connect = planted",
        "the set-up of NCCL: RuntimeError: planted",
    ),
    "after the first sum": (
        "if rank == 3: nccl.NcclCommunicator._warm_up = lambda self: (plain(self), planted())",
        "the set-up of NCCL: RuntimeError: planted (rank 3)",
    ),
}


@pytest.mark.parametrize("fault", HEARD_OF)
def test_a_fault_that_all_ranks_hear_of(fault: str) -> None:
    """One error, the same words on all ranks; MPI is as usable as before."""
    code, words = HEARD_OF[fault]
    done = connect(f"plain = nccl.NcclCommunicator._warm_up\n{code}")
    assert done.returncode == 0, done.stderr
    errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(errors) == RANKS, done.stdout
    assert len(set(errors)) == 1, errors
    assert words in errors[0]


@pytest.mark.parametrize("fault", ["no NCCL on one rank", "one device twice"])
def test_what_auto_does_without_nccl(fault: str) -> None:
    done = connect(HEARD_OF[fault][0], "auto")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sum 4.0, backend cupy") == RANKS
    assert done.stdout.count("communicator mpi (4 ranks over MPI; no NCCL: ") == RANKS


ALONE = {
    "in the exchange": (2, "world.own = Failing"),
    "before the id is sent": (0, "world.own = Failing"),
    "after the exchange": (2, "Nccl.__init__ = without_communicators"),
    "in the first sum": (1, "nccl.NcclCommunicator._warm_up = planted"),
}


@pytest.mark.parametrize("fault", ALONE)
def test_a_fault_when_the_others_are_inside_nccl(fault: str) -> None:
    """They cannot be told: the watchdogs end the job, and the first one says the error."""
    rank, code = ALONE[fault]
    done = connect(f"if rank == {rank}: {code}", timeout=10)
    assert done.returncode not in (0, 2), done.stdout
    assert f"distrib: rank {rank} on " in done.stderr
    assert "s in the set-up of NCCL, which failed here (RuntimeError: planted) at step 0" in done.stderr
    assert "sum" not in done.stdout


@pytest.mark.parametrize(
    ("fault", "timeout", "words"),
    [
        ("if rank == 3: time.sleep(3600)", 2, "spent 2 s in MPI_Init: another rank or the launcher is gone"),
        # which the launcher may find out
        ("if rank == 3: sys.exit(0)", 2, "spent 2 s in MPI_Init|process rank 3 with PID"),
        (
            "from mpi4py import MPI\nif rank == 3: time.sleep(3600)",
            2,
            "waited 2 s in the meeting of all ranks",
        ),
        ("from mpi4py import MPI\nif rank == 3: sys.exit(0)", 2, "waited 2 s in the meeting of all ranks"),
        ("from mpi4py import MPI\nif rank == 3: raise OSError('planted')", 2, "OSError: planted"),
    ],
)
def test_a_rank_that_never_comes(fault: str, timeout: int, words: str) -> None:
    done = connect(fault, timeout=timeout)
    assert done.returncode not in (0, 2), done.stdout
    assert re.search(words, done.stderr), done.stderr
    assert "sum" not in done.stdout


def test_a_rank_that_fails_before_mpi_ends_the_others() -> None:
    """The launcher sees it: nobody waits for MPI_Init's bound."""
    done = connect("start.LEAST_MPI_INIT = 3600\nif rank == 3: raise OSError('planted')")
    assert done.returncode not in (0, 2)
    assert "OSError: planted" in done.stderr


def test_a_name_without_a_communicator_is_refused() -> None:
    """It does not become one of the others."""
    code = """
from distrib.comm import world
from distrib.errors import UserError
world.CHOICES = {**world.CHOICES, "comm": (*world.CHOICES["comm"], "ring")}
try:
    world.connect("ring", "numpy")
except UserError as error:
    print(error)
"""
    assert run("-c", code, ranks=2).stdout == "--comm ring needs --backend cupy\n" * 2
