"""The double of a device refuses what CUDA refuses of a capture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import HELPERS, run
from device_double import device, double_only, needs_device
from strict_array import CaptureError

from nn.device import capture

pytestmark = [needs_device, double_only]


class Work:
    """Two streams, and a kernel to queue on either."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.cuda = backend, backend.cuda
        self.side = self.cuda.Stream(non_blocking=True)
        self.x, self.y, self.z = (backend.xp.zeros(1, "float32") for _ in range(3))

    def kernel(self, onto: str = "x") -> None:
        """Add y to x, or to another array."""
        kernels = self.backend.algorithms["stem"].kernels
        kernels.launch("float32", "add", (1,), (256,), getattr(self, onto), self.y, 1)

    def fork(self, onto: str = "x") -> None:
        """Queue a kernel on the side stream."""
        event = self.cuda.Event()
        self.cuda.get_current_stream().record(event)
        self.side.wait_event(event)
        with self.side:
            self.kernel(onto)

    def join(self) -> None:
        event = self.cuda.Event()
        self.side.record(event)
        self.cuda.get_current_stream().wait_event(event)


@pytest.fixture
def work() -> Iterator[Work]:
    with device("float32") as backend:
        yield Work(backend)


def test_a_fork_that_is_joined(work: Work) -> None:
    def both() -> None:
        work.fork()
        work.kernel("z")
        work.join()
        work.kernel()

    work.y[...] = 1
    graph = capture(work.cuda, both)
    assert graph.uploaded, "else the first launch has to"
    graph.launch()
    assert work.backend.to_host(work.x) == 2
    assert work.backend.to_host(work.z) == 1


def late_join(work: Work) -> None:
    """Joined, and then something more is queued there."""
    work.fork()
    work.join()
    with work.side:
        work.kernel()


def on_another_stream(work: Work) -> None:
    with work.side:
        work.kernel()


def beside(work: Work) -> None:
    """Both streams add to x at once."""
    work.fork()
    work.kernel()
    work.join()


def handed_on(work: Work) -> None:
    """y is written while the side stream may still read it."""
    work.fork()
    kernels = work.backend.algorithms["stem"].kernels
    kernels.launch("float32", "add", (1,), (256,), work.y, work.z, 1)
    work.join()


REFUSED: dict[str, tuple[Callable[[Work], None], str]] = {
    "never joined": (Work.fork, "Unjoined"),
    "joined too early": (late_join, "Unjoined"),
    "never forked": (on_another_stream, "Implicit"),
    "two writers": (beside, "no event orders them"),
    "memory handed on too early": (handed_on, "no event orders them"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(work: Work, name: str) -> None:
    faulty, why = REFUSED[name]
    with pytest.raises(CaptureError, match=why):
        capture(work.cuda, lambda: faulty(work))


def test_an_event_from_before_the_capture(work: Work) -> None:
    event = work.cuda.Event()
    work.cuda.get_current_stream().record(event)
    capture(work.cuda, lambda: work.side.wait_event(event))  # which has no part in it
    with pytest.raises(CaptureError, match="Isolation"):
        capture(work.cuda, lambda: work.cuda.get_current_stream().wait_event(event))


def test_an_event_of_a_capture_is_not_waited_for(work: Work) -> None:
    event = work.cuda.Event()
    capture(work.cuda, lambda: work.cuda.get_current_stream().record(event))
    with pytest.raises(AssertionError, match="cudaErrorCapturedEvent"):
        event.synchronize()
    work.cuda.get_current_stream().record(event)
    event.synchronize()


def test_no_pinned_copy_is_begun_in_a_capture(work: Work) -> None:
    with pytest.raises(AssertionError, match="pinned memory"):
        capture(work.cuda, lambda: work.backend.start_copy(work.x))


NCCL = """
import os
from mpi4py import MPI
from device_double import CapturedNccl, device
from nccl_double import NcclError, OrderError
from nn.device import capture
world = MPI.COMM_WORLD

def communicator(nccl):
    unique_id = world.bcast(nccl.get_unique_id() if world.rank == 0 else None)
    return nccl.NcclCommunicator(world.size, unique_id, world.rank)

with device("float32") as backend:
    cuda, x = backend.cuda, backend.xp.zeros(1, "float32")
    cuda.setDevice(0)
    nccl = CapturedNccl(world, cuda, [])
    comm = communicator(nccl)
    def work():
        comm.allReduce(x.data.ptr, x.data.ptr, 1, nccl.NCCL_FLOAT32, nccl.NCCL_SUM, cuda.stream.ptr)
    capture(cuda, work).launch()
    try:
        capture(cuda, work) if world.rank else work()
        raise SystemExit("one rank captured while the other ran")
    except OrderError:
        pass
    for version, allowed, works in ((22809, "1", False), (23007, "0", False), (23007, "1", True)):
        nccl.gpu, nccl.version = "the only one", version
        os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = allowed
        try:
            communicator(nccl)
            assert works, (version, allowed)
        except NcclError as error:
            assert not works and "Duplicate GPU" in str(error), (version, allowed, error)
"""


def test_nccl_wants_its_ranks_together_and_each_a_gpu() -> None:
    """Ranks capture at the same time; two share a GPU only from version 2.30 on, and if told to."""
    run("-c", NCCL, ranks=2, env=HELPERS)
