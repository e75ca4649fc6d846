"""The NCCL communicator without a GPU: real ranks, a double that moves host memory by pointer."""

from __future__ import annotations

import subprocess

from conftest import HELPERS, run
from needs import require

PRELUDE = """
import sys
from mpi4py import MPI
import numpy as np
from nccl_double import Cuda, Nccl, Call, OrderError
from strict_array import StrictArray, strict
from distrib.comm.nccl import NcclCommunicator
from distrib.faults.watchdog import Watchdog
log = []
world = MPI.COMM_WORLD
rank, size = world.Get_rank(), world.Get_size()
cuda = Cuda(log)
nccl = Nccl(world, cuda, log)
watchdog = Watchdog(rank, 600)
comm = NcclCommunicator(world, cuda, nccl, 0, watchdog, lambda: strict.zeros(1, "float32"))
"""


def with_ranks(body: str, ranks: int = 4, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run("-c", PRELUDE + body, ranks=ranks, check=check, env=HELPERS)


def test_bootstrap_order() -> None:
    """Watchdog armed, device chosen, id made by rank 0 alone, init, one warm-up all-reduce."""
    with_ranks("""
names = [entry[0] for entry in log]
expected = ["setDevice", *(["get_unique_id"] if rank == 0 else []), "NcclCommunicator", "allReduce"]
found = [name for name in names if name in ("setDevice", "get_unique_id", "NcclCommunicator", "allReduce")]
assert found == expected, names
assert "synchronize" in names[names.index("allReduce"):]
assert watchdog.on_expiry, "the watchdog must be able to abort NCCL"
""")


def test_counts_codes_offsets_and_values() -> None:
    """Slices of a flat vector: pointer, count, dtype code and sum are those of the slice."""
    with_ranks("""
for dtype, code in (("float32", 7), ("float64", 8), ("int32", 2), ("int64", 4), ("float16", 6)):
    flat = StrictArray(np.arange(100).astype(dtype))
    before = flat._a.copy()
    cuda.touch()
    log.clear()
    handles = [comm.all_reduce(flat[60:100], overlap=True), comm.all_reduce(flat[10:60], overlap=True)]
    calls = [entry for entry in log if entry[0] == "allReduce"]
    base = flat.data.ptr
    assert [(c.sendbuf - base, c.recvbuf - base, c.elements, c.datatype, c.op) for c in calls] == [
        (60 * flat.itemsize, 60 * flat.itemsize, 40, code, 0),
        (10 * flat.itemsize, 10 * flat.itemsize, 50, code, 0)]
    assert len({c.stream for c in calls}) == 1 and calls[0].stream != 0, "buckets have their own stream"
    assert (flat._a == before).all(), "nothing may be in place before the wait"
    for handle in handles:
        handle.wait()
    assert (flat._a[10:] == before[10:] * size).all() and (flat._a[:10] == before[:10]).all()
sums = StrictArray(np.full(6, rank + 1.0))
log.clear()
comm.all_reduce(sums)
assert (sums._a == size * (size + 1) / 2).all(), "an immediate sum is in place at once, in stream order"
assert [c.stream for c in log if c[0] == "allReduce"] == [0]
value = StrictArray(np.full(3, rank, "float32"))
comm.broadcast(value, root=2)
assert (value._a == 2).all()
comm.barrier()
try:
    comm.all_reduce(StrictArray(np.zeros(2, bool)))
    raise SystemExit("bool was accepted")
except ValueError as error:
    assert "bool" in str(error)
comm.close()
""")


def test_the_wait_joins_streams_not_the_host() -> None:
    with_ranks(
        """
flat = StrictArray(np.ones(8, "float32"))
cuda.touch()
log.clear()
comm.all_reduce(flat, overlap=True).wait()
names = [entry[0] for entry in log if entry[0] not in ("run", "check_async_error")]
assert names == ["record", "wait_event", "allReduce", "record", "wait_event"], names
""",
        ranks=2,
    )


def test_the_double_catches_a_missing_event() -> None:
    """The negative check: a communicator that does not wait for the gradient is found out."""
    with_ranks(
        """
flat = StrictArray(np.ones(8, "float32"))
comm.all_reduce(flat, overlap=True).wait()
cuda.touch()
try:
    comm._reduce(flat, "sum", comm.comm_stream)
    raise SystemExit("not found out")
except OrderError:
    pass
""",
        ranks=2,
    )


def test_an_asynchronous_error_ends_the_job() -> None:
    """NCCL reports it to nobody who does not ask: the watchdog does, while the main thread is busy
    elsewhere."""
    done = with_ranks(
        """
import time
if rank == 1:
    nccl.async_status = 6
time.sleep(3600)
""",
        ranks=2,
        check=False,
    )
    assert done.returncode not in (0, 2, 85)
    assert "distrib: rank 1 on" in done.stderr
    assert "found at step 0: NCCL_ERROR_REMOTE_ERROR" in done.stderr
    assert "rank 0 on" not in done.stderr.replace("mpirun", "")


TRAINING = """
from distrib.data.dataset import make
from distrib.config import Config
from distrib.trainer import Trainer
from distrib.comm.world import World
from distrib.comm.reducer import Reducer
from distrib.comm.base import SingleCommunicator, SingleControl
from test_strict import STRICT, crew
rng = np.random.default_rng(1)
images, labels = rng.integers(0, 256, (26, 28, 28), np.uint8), rng.integers(0, 10, 26, np.uint8)
data = make("random", *[(images, labels)] * 2, least=10)
config = Config(batch_size=8, width=0.0625, precision="float64")

def train(comm, control):
    trainer = Trainer(config, World(comm, control, STRICT, "test", watchdog, crew(comm.size)), data)
    trainer.reducer = Reducer(trainer.params, comm, bucket_bytes=1 << 12)
    plain = trainer.reducer.ready
    trainer.reducer.ready = lambda parameter: (cuda.touch(), plain(parameter))
    for _ in range(4):  # the last batch has 2 images: two of four ranks have none
        trainer.step()
    trainer.results.read()
    return STRICT.to_host(trainer.params.values), trainer.progress.loss_sum

together, loss = train(comm, world)
alone, expected = train(SingleCommunicator(), SingleControl())
assert abs(loss - expected) < 1e-9 * abs(expected), (loss, expected)
assert np.abs(together - alone).max() < 1e-9
everyone = world.allgather(together.tobytes())
assert all(other == everyone[0] for other in everyone)
sums = sum(entry[0] == "allReduce" for entry in log)
assert sums > 4 * (2 * 8 + 3), "buckets and batch-norm sums over NCCL"
"""


def test_training_over_the_double_equals_one_rank() -> None:
    """Four steps of the whole trainer, pointers, streams and events included."""
    with_ranks(TRAINING)


def real_nccl():
    """`cupy.cuda.nccl` with its library."""
    require("nccl")
    from cupy.cuda import nccl

    return nccl


def test_unique_id_of_the_real_library() -> None:
    first, second = (real_nccl().get_unique_id() for _ in range(2))
    assert len(first) == len(second) == 128
    assert first != second


def test_unique_id_is_broadcast_by_the_real_library() -> None:
    real_nccl()
    body = """
from mpi4py import MPI
from cupy.cuda import nccl
world = MPI.COMM_WORLD
unique_id = world.bcast(nccl.get_unique_id() if world.Get_rank() == 0 else None, root=0)
everyone = world.allgather(bytes(i & 255 for i in unique_id))
assert len(unique_id) == 128 and len(set(everyone)) == 1
"""
    run("-c", body, ranks=4)


def test_constants_equal_the_real_library() -> None:
    nccl = real_nccl()
    from nccl_double import Nccl

    names = [name for name in dir(nccl) if name.startswith("NCCL_") and hasattr(Nccl, name)]
    assert len(names) > 10
    assert {name: getattr(nccl, name) for name in names} == {name: getattr(Nccl, name) for name in names}
