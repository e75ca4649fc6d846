"""Number, size and order of the collectives of a step; the same suite on every communicator."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from conftest import ROOT, crew, run
from networks import resnet9

from distrib.comm.base import DONE, SingleCommunicator, SingleControl
from distrib.comm.reducer import Reducer
from distrib.comm.world import World
from distrib.config import Config
from distrib.data.dataset import make
from distrib.faults.watchdog import Watchdog
from distrib.trainer import Trainer
from nn.device import NUMPY
from nn.params import STEP_METRICS, Parameters, Spec
from nn.resnet9 import VARIANTS


class Counting(SingleCommunicator):
    """Records what a step sends."""

    size = 2  # this rank's part is the first half of each batch

    def __init__(self):
        self.sent: list[tuple[bool, int, str]] = []
        self.waits = 0

    def all_reduce(self, x, overlap=False):
        self.sent.append((overlap, x.size, str(x.dtype)))
        return self if overlap else DONE

    def wait(self):
        self.waits += 1


def a_trainer(comm, variant: str = "baseline", width: float = 0.125, **options) -> Trainer:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (16, 28, 28), np.uint8), rng.integers(0, 10, 16, np.uint8)
    data = make("random", *[(images, labels)] * 2, least=10)
    world = World(comm, SingleControl(), NUMPY, "test", Watchdog(0, 600), crew(comm.size))
    trainer = Trainer(Config(batch_size=8, width=width, variant=variant, **options), world, data)
    return trainer


CONVS = {"baseline": 8, "avgpool": 8, "conv-shortcut": 10, "three-blocks": 13}


def test_every_variant_has_its_number_of_convolutions() -> None:
    assert set(CONVS) == set(VARIANTS)


@pytest.mark.parametrize("variant", CONVS)
def test_collectives_of_a_step(variant: str) -> None:
    comm = Counting()
    trainer = a_trainer(comm, variant)
    trainer.step()
    channels = [conv.out for conv in trainer.model.convs()]
    assert len(channels) == CONVS[variant]
    now = [size for overlap, size, _ in comm.sent if not overlap]
    # forward each layer's mean and squares about it, backward Σdy and Σdy·x̂, each pair in one message
    assert sorted(now) == sorted(2 * [2 * c for c in channels])
    assert {dtype for overlap, _, dtype in comm.sent if not overlap} == {"float64"}
    buckets = [(size, dtype) for overlap, size, dtype in comm.sent if overlap]
    assert buckets == [(trainer.params.comm_buffer.size, "float32")]
    assert comm.waits == 1


def test_local_batch_norm_sends_only_gradients() -> None:
    comm = Counting()
    a_trainer(comm, batch_norm="local").step()
    assert [overlap for overlap, *_ in comm.sent] == [True]


def test_buckets_of_the_whole_network() -> None:
    """At full width: buckets of at least 1 MiB, contiguous, from the end of the vector to its start."""
    params = resnet9().params
    buckets = Reducer(params, SingleCommunicator()).buckets
    three = 9 * 256 * 256 + 2 * 256  # a convolution of 256 channels with its batch norm
    fc = 10 * 256 + 16  # the bias is padded to 16
    two = 2 * (9 * 128 * 128 + 2 * 128)  # res1
    first = 9 * 64 + 2 * 64 + 9 * 64 * 128 + 2 * 128  # stem and stage1: what is left
    sizes = [fc + three + len(STEP_METRICS), three, three, 9 * 128 * 256 + 2 * 256, two, first]
    assert [b.stop - b.start for b in buckets] == sizes
    assert buckets[0].stop == params.grads.size + len(STEP_METRICS)
    assert buckets[-1].start == 0
    assert all(later.stop == earlier.start for earlier, later in itertools.pairwise(buckets))
    assert all((b.stop - b.start) * 4 >= 1 << 20 for b in buckets[:-1])


def test_buckets_are_sent_before_the_backward_ends() -> None:
    comm = Counting()
    trainer = a_trainer(comm)
    trainer.reducer = Reducer(trainer.params, comm, bucket_bytes=1 << 10)
    trainer.step()
    order = [overlap for overlap, *_ in comm.sent]
    assert sum(order) > 5
    assert order.index(True) < len(order) - 1 - order[::-1].index(False), "no bucket left before the last sum"


def test_a_bucket_waits_for_all_its_parameters_and_for_its_turn() -> None:
    params = Parameters([Spec(name, (16,)) for name in "abcd"], NUMPY, "float32")
    comm = Counting()
    reducer = Reducer(params, comm, bucket_bytes=2 * 16 * 4 + 12)
    assert reducer.buckets == [slice(32, 67), slice(0, 32)]
    for name, sent in (("a", 0), ("b", 0), ("d", 0), ("c", 2)):
        reducer.ready(params[name])
        assert len(comm.sent) == sent, name
    reducer.wait()
    assert comm.waits == 2


SUITE = """
import numpy as np, sys
from distrib.comm.world import connect
world = connect(comm=sys.argv[1], backend="numpy")
comm, rank, size = world.transport, world.transport.rank, world.transport.size
for _ in range(2):  # twice: what works once may leave state behind
    for dtype in ("float32", "float64"):
        whole = np.arange(10, dtype=dtype) * (rank + 1)
        handle = comm.all_reduce(whole[3:7], overlap=True)
        sums = np.full(5, float(rank), dtype)
        comm.all_reduce(sums).wait()
        handle.wait()
        total = size * (size + 1) // 2
        assert (sums == size * (size - 1) // 2).all(), sums
        expected = np.arange(10, dtype=dtype) * (rank + 1)
        expected[3:7] = np.arange(3, 7) * total
        assert (whole == expected).all(), whole
        empty = np.zeros(0, dtype)
        comm.all_reduce(empty).wait()
        value = np.full(3, rank, dtype)
        comm.broadcast(value, root=size - 1)
        assert (value == size - 1).all()
        comm.barrier()
assert world.control_comm.allgather(rank) == list(range(size))
try:
    with world.fail_together():
        if rank == size - 1:
            from distrib.errors import UserError
            raise UserError("planted")
    raise SystemExit("agree let a mistake pass")
except UserError if "UserError" in dir() else Exception as error:
    assert "planted" in str(error), error
comm.close()
"""


@pytest.mark.parametrize(("comm", "ranks"), [("none", 1), ("mpi", 1), ("mpi", 2), ("mpi", 4)])
def test_communicator_suite(comm: str, ranks: int) -> None:
    run("-c", SUITE, comm, ranks=ranks, cwd=ROOT)
