"""Faults while four ranks connect, one by one: every rank ends, and the words say who and why."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
from conftest import HELPERS, run

RANKS = 4
CONNECT = """
import json, sys, threading, time
from distrib import launched_rank
from distrib.comm import choice, nccl, start, world
from distrib.errors import UserError
from nccl_double import Cuda, Nccl
from strict_array import StrictModule
from test_strict import StrictBackend

rank, log, xp = launched_rank(), [], StrictModule()

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
plain, plain_own, plain_init = nccl.NcclCommunicator._warm_up, world.own, Nccl.__init__

def without_communicators(self, *more):
    plain_init(self, *more)
    self.NcclCommunicator = planted

class Failing:
    "A control communicator whose broadcast fails, as that of the unique id."
    def __init__(self, *joined):
        self.comm = plain_own(*joined)
    def __getattr__(self, name):
        return planted if name == "bcast" else getattr(self.comm, name)

def found(fault, comm, timeout):
    global cuda
    cuda = xp.cuda = Cuda(log, devices=4)
    exec(fault, globals())
    try:
        with world.connect(comm, "cupy", timeout=timeout) as joined:
            x = xp.ones(3)
            joined.comm.all_reduce(x).wait()
            return f"sum {joined.backend.to_host(x)[0]}, {joined.choice_explanation}"
    except UserError as error:
        return f"error: {error}"

places = choice, choice.backends, nccl.NcclCommunicator, Nccl, world
before = [dict(vars(place)) for place in places]
for given in json.loads(sys.argv[1]):
    words = found(*given)
    from mpi4py import MPI
    everyone = MPI.COMM_WORLD.gather(words)
    if rank == 0:
        print(json.dumps(everyone))
    assert MPI.COMM_WORLD.allreduce(1) == 4
    assert threading.active_count() == 1 and sys.excepthook is sys.__excepthook__
    for place, values in zip(places, before):  # the next one finds everything as it was
        for name in values:
            if vars(place)[name] is not values[name]:
                setattr(place, name, values[name])
"""


def connect(*faults: tuple[str, str], timeout: int = 100) -> subprocess.CompletedProcess[str]:
    """All ranks connect, once for each (what is wrong, name of the communicator), and rank 0 prints a line
    of what each rank found. With a short `timeout` some rank must wait in vain."""
    given = json.dumps([(*each, timeout) for each in faults])
    return run("-c", CONNECT, given, ranks=RANKS, env=HELPERS, check=False)


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


def test_in_one_program() -> None:
    """What all ranks hear of is one error, the same words on all; MPI is as usable as before, and whoever
    asks for no certain communicator gets one."""
    no_nccl = "no NCCL on one rank", "one device twice"
    done = connect(
        ("", "nccl"),
        ("", "auto"),
        *((code, "nccl") for code, _ in HEARD_OF.values()),
        *((HEARD_OF[fault][0], "auto") for fault in no_nccl),
        ("", "nccl"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second, *errors, third, fourth, last = map(json.loads, done.stdout.splitlines())
    for found in (first, second, last):
        assert len(found) == RANKS
        assert all(each.startswith("sum 4.0, backend cupy") for each in found), found
        assert all("communicator nccl (4 ranks over MPI)" in each for each in found), found
    for found, (fault, (_, words)) in zip(errors, HEARD_OF.items(), strict=True):
        assert len(found) == RANKS
        assert found[0].startswith("error: "), (fault, found)
        assert len(set(found)) == 1, (fault, found)
        assert words in found[0], fault
    for found in (third, fourth):
        assert all(each.startswith("sum 4.0, backend cupy") for each in found), found
        assert all("communicator mpi (4 ranks over MPI; no NCCL: " in each for each in found), found


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
    done = connect((f"if rank == {rank}: {code}", "nccl"), timeout=10)
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
    done = connect((fault, "nccl"), timeout=timeout)
    assert done.returncode not in (0, 2), done.stdout
    assert re.search(words, done.stderr), done.stderr
    assert "sum" not in done.stdout


def test_a_rank_that_fails_before_mpi_ends_the_others() -> None:
    """The launcher sees it: nobody waits for MPI_Init's bound."""
    done = connect(("start.LEAST_MPI_INIT = 3600\nif rank == 3: raise OSError('planted')", "nccl"))
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
