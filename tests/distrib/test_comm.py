"""`world.comm` and `connect`: the library for a caller's own arrays, inside a caller's own program."""

from __future__ import annotations

import threading

import pytest
from conftest import HELPERS, run

from distrib.comm.world import connect
from distrib.errors import UserError

JOINED = """
from comm_suite import *
from distrib.comm.world import connect
"""
ON_HOST = JOINED + "world = connect({comm!r}, 'numpy')\n"
ON_DEVICE = (
    JOINED
    + """
from mpi4py import MPI
from nccl_double import Cuda, Nccl
from test_strict import STRICT as backend
from distrib.comm.mpi import MpiCommunicator, StagedCommunicator
from distrib.comm.nccl import NcclCommunicator
from distrib.faults.watchdog import Watchdog
mpi, watchdog, log = MPI.COMM_WORLD, Watchdog(MPI.COMM_WORLD.rank, 60), []
cuda = Cuda(log)
nccl = Nccl(mpi, cuda, log)
staged = StagedCommunicator(mpi, watchdog, backend)
device = NcclCommunicator(mpi, cuda, nccl, 0, watchdog, lambda: backend.xp.zeros(1, "float32"))
host = MpiCommunicator(mpi, watchdog)
world = World({comm}, mpi, backend, "double", watchdog, crew(mpi.size), host)
"""
)
ONE_DEVICE = (
    JOINED
    + """
from test_strict import STRICT as backend
from distrib.comm.base import SingleControl
from distrib.faults.watchdog import Watchdog
single = SingleCommunicator()
world = World(single, SingleControl(), backend, "double", Watchdog(0, 60), crew(1), single)
"""
)


def suite(prelude: str, ranks: int) -> None:
    run("-c", prelude + "whole_suite(world)", ranks=ranks, env=HELPERS)


@pytest.mark.parametrize(("comm", "ranks"), [("none", 1), ("mpi", 1), ("auto", 2), ("mpi", 3)])
def test_on_a_host(comm: str, ranks: int) -> None:
    suite(ON_HOST.format(comm=comm), ranks)


def test_on_one_device() -> None:
    suite(ONE_DEVICE, 1)


@pytest.mark.parametrize(("comm", "ranks"), [("device", 1), ("device", 2), ("device", 3), ("staged", 3)])
def test_on_devices(comm: str, ranks: int) -> None:
    """NCCL's double and MPI through the host: the same results, the same refusals."""
    suite(ON_DEVICE.format(comm=comm), ranks)


def test_bfloat16_is_summed_only_where_that_is_asked_for() -> None:
    """A Reducer over `world.comm`, as over the transport; a caller's uint16 are integers."""
    body = """
from distrib.comm.base import BF16
from distrib.comm.reducer import Reducer
from nn.params import Parameters, Spec
from nn.ops.bf16 import to_bf16
xp, sums = backend.xp, []
for comm in (world.transport, world.comm):
    params = Parameters([Spec(name, (16,)) for name in "abcd"], backend, "float32")
    params.comm_buffer[...] = xp.array(np.arange(params.comm_buffer.size) * (mpi.rank + 1.0) / 3)
    reducer = Reducer(params, comm, "bf16", bucket_bytes=128)
    for name in "dcba":
        reducer.ready(params[name])
    reducer.wait()
    sums.append(backend.to_host(params.comm_buffer))
assert len(reducer.buckets) == 2 and (sums[0] == sums[1]).all() and sums[0][5] == 5, sums
bits = xp.zeros(3, "uint16")
to_bf16(xp.array(np.array([1, 1.5, -2], "float32")), bits)
integers = bits.copy()
expected = (backend.to_host(bits).astype(int) * 2).astype("uint16")
assert (backend.to_host(world.comm.all_reduce(integers).wait()) == expected).all()
doubled = backend.to_host(world.comm.all_reduce(bits, BF16).wait())
assert (doubled == [0x4000, 0x4040, 0xC080]).all(), doubled
host_bits = np.zeros(3, "uint16")
for x, words in ((host_bits, "needs NCCL"), (bits[::2], "contiguous array of uint16")):
    with pytest.raises(UserError, match=words):
        world.comm.all_reduce(x, BF16)
world.close()
"""
    run("-c", ON_DEVICE.format(comm="device") + body, ranks=2, env=HELPERS)


CALLER = """
import sys, threading
import numpy as np
from mpi4py import MPI
from distrib.comm.world import connect
from distrib.errors import UserError
whole, hook = MPI.COMM_WORLD, sys.excepthook
part = whole.Split(0 if whole.rank < 3 else 1, key=-whole.rank)  # three ranks, in reverse, and one alone
mail, news = np.zeros(1), np.zeros(1)
pending = [part.Irecv(mail, MPI.ANY_SOURCE, MPI.ANY_TAG), whole.Irecv(news, MPI.ANY_SOURCE, MPI.ANY_TAG)]
token, reduced = np.full(1, part.rank, "int64"), np.ones(1)
started = part.Iallreduce(MPI.IN_PLACE, reduced)
with connect(part, "numpy") as world:
    assert (world.rank, world.size) == (part.rank, part.size)
    x = np.full(5, whole.rank + 1.0)
    assert (world.comm.all_reduce(x).wait() == (6 if whole.rank < 3 else 4)).all()
    after, before = (part.rank + 1) % part.size, (part.rank - 1) % part.size
    got = np.zeros(1, "int64")
    world.comm.exchange(token, after, got, before).wait()
    assert got == before, "our messages met the program's"
    assert not pending[0].Test()
    inner = world.comm.split(0)
    inner.barrier()
started.Wait()
assert reduced == part.size
part.Send(np.full(1, 5.0), (part.rank + 1) % part.size)
whole.Send(np.full(1, 7.0), (whole.rank + 1) % whole.size)
MPI.Request.Waitall(pending)
assert (mail, news) == (5, 7)
assert sys.excepthook is hook and not MPI.Is_finalized()
assert threading.active_count() == 1
with connect(backend="numpy") as world:  # all of them
    assert world.size == 4
    try:
        connect(MPI.COMM_NULL)
        raise SystemExit("MPI.COMM_NULL was taken")
    except UserError as error:
        assert "only the ranks of a communicator can connect on it" in str(error)
part.Free()
assert whole.allreduce(1) == 4
MPI.Finalize()
try:
    connect()
    raise SystemExit("connected on a finalized MPI")
except UserError as error:
    assert "MPI has been finalized, and cannot start again" in str(error), error
"""


def test_in_a_program_of_mpi4py() -> None:
    """On a part of its ranks, beside its own messages, and everything as it was afterwards."""
    run("-c", CALLER, ranks=4)


AGAIN = """
import os, sys, threading
import numpy as np
from distrib.comm.world import connect
def open_now():
    return len(os.listdir("/proc/self/fd")), threading.active_count(), sys.excepthook
def a_new_one():  # the number of the next communicator: the lowest that is free
    if ranks == 1:
        return 0
    from mpi4py import MPI
    new = MPI.COMM_WORLD.Dup()
    number = new.py2f()
    new.Free()
    return number
ranks, found = int(sys.argv[1]), []
for turn in range(50):
    with connect(backend="numpy") as world:
        group = world.comm.split(world.rank)
        assert group.size == 1
        world.comm.all_reduce(np.ones(3))  # nobody waits for it
        assert world.comm.all_reduce(np.ones(3), what="a sum").wait()[0] == ranks
    if turn in (1, 49):
        found.append((*open_now(), a_new_one()))
assert found[0] == found[1], found
assert found[0][1] == 1 and sys.excepthook is sys.__excepthook__
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_connecting_fifty_times_leaves_nothing(ranks: int) -> None:
    run("-c", AGAIN, ranks, ranks=ranks)


NOT_MET = """
import sys, time
import numpy as np
from distrib.comm.world import connect
world = connect(backend="numpy", timeout=1)
world.comm.checked = sys.argv[1] == "checked"
x = np.ones(3)
if world.rank == 0:
    time.sleep(3600)
world.comm.all_reduce(x, what="the residual norm").wait()
"""


@pytest.mark.parametrize(
    ("checked", "words"),
    [("checked", "the agreement on the residual norm"), ("unchecked", "the residual norm")],
)
def test_a_wait_in_vain_says_what_for(checked: str, words: str) -> None:
    done = run("-c", NOT_MET, checked, ranks=2, check=False)
    assert done.returncode not in (0, 2)
    assert f"waited 1 s in {words} at step 0: another rank has stopped" in done.stderr
    assert "distrib: rank 1 on" in done.stderr


def test_unchecked_calls_exchange_nothing_more() -> None:
    body = """
class Counting:
    calls = 0
    def __getattr__(self, name):
        return getattr(world.control_comm, name)
    def allgather(self, value):
        self.calls += 1
        return world.control_comm.allgather(value)
world.comm._control = counting = Counting()
x = np.ones(3)
world.comm.all_reduce(x).wait()
assert counting.calls == 1
world.comm.checked = False
for _ in range(3):
    world.comm.all_reduce(x).wait()
    world.comm.barrier()
assert counting.calls == 1 and x[0] == 16
with pytest.raises(UserError, match="op 'product'"):
    world.comm.all_reduce(x, "product")
world.close()
"""
    run("-c", ON_HOST.format(comm="mpi") + body, ranks=2, env=HELPERS)


def test_a_world_closes_after_an_error_of_all_and_not_after_one_rank_s() -> None:
    body = """
import threading
with pytest.raises(UserError), world:
    world.comm.all_reduce(np.ones(world.rank + 1))
assert threading.active_count() == 1
with pytest.raises(UserError, match="the communicator is closed"):
    world.comm.barrier()
world = connect(backend="numpy")
with world:
    if world.rank == 1:
        raise ValueError("planted")
    world.comm.barrier()
"""
    done = run("-c", ON_HOST.format(comm="mpi") + body, ranks=2, env=HELPERS, check=False)
    assert "failed at step 0: ValueError: planted" in done.stderr
    assert done.returncode not in (0, 2)


def test_an_array_on_another_gpu() -> None:
    body = """
import dataclasses, types
class Elsewhere(backend.xp.ndarray):
    device = types.SimpleNamespace(id=1)
world.backend = dataclasses.replace(backend, cuda=cuda)
with pytest.raises(UserError, match="an array on GPU 1: copy it to this rank's, GPU 0"):
    world.comm.all_reduce(Elsewhere(np.ones(3)))
"""
    run("-c", ON_DEVICE.format(comm="device") + body, env=HELPERS)


@pytest.mark.quick
def test_what_connect_refuses() -> None:
    for options, words in (
        ({"comm": "ncl"}, "--comm ncl: give one of auto, none, mpi, nccl"),
        ({"comm": 3}, "comm 3: give auto, none, mpi, nccl, or an mpi4py communicator"),
        ({"backend": "torch"}, "--backend torch: give one of auto, numpy, cupy"),
        ({"precision": "int8"}, "--precision int8: give one of"),
        ({"timeout": 0}, "--timeout 0: must be a number"),
    ):
        before = threading.active_count()
        with pytest.raises(UserError) as caught:
            connect(**options)  # type: ignore[arg-type]
        assert words in str(caught.value)
        assert threading.active_count() == before


@pytest.mark.quick
def test_a_cupy_array_in_a_world_of_numpy() -> None:
    class ndarray:
        __module__ = "cupy"

    with connect("none", "numpy") as world, pytest.raises(UserError, match="connect\\(backend='cupy'\\)"):
        world.comm.all_reduce(ndarray())
