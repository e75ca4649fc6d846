"""The double of a device refuses what CUDA refuses of a capture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from device_double import device, double_only, needs_device
from strict_array import CaptureError

from nn.device import capture

pytestmark = [needs_device, double_only]


class Work:
    """Two streams, and a kernel to queue on either."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.cuda = backend, backend.cuda
        self.side = self.cuda.Stream(non_blocking=True)
        self.x, self.y = (backend.xp.zeros(1, "float32") for _ in range(2))

    def kernel(self) -> None:
        kernels = self.backend.algorithms["stem"].kernels
        kernels.launch("float32", "add", (1,), (256,), self.x, self.y, 1)

    def fork(self) -> None:
        """Queue a kernel on the side stream."""
        event = self.cuda.Event()
        self.cuda.get_current_stream().record(event)
        self.side.wait_event(event)
        with self.side:
            self.kernel()

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
        work.kernel()
        work.join()

    work.y[...] = 1
    capture(work.cuda, both).launch()
    assert work.backend.to_host(work.x) == 2


def late_join(work: Work) -> None:
    """Joined, and then something more is queued there."""
    work.fork()
    work.join()
    with work.side:
        work.kernel()


def on_another_stream(work: Work) -> None:
    with work.side:
        work.kernel()


REFUSED: dict[str, tuple[Callable[[Work], None], str]] = {
    "never joined": (Work.fork, "Unjoined"),
    "joined too early": (late_join, "Unjoined"),
    "never forked": (on_another_stream, "Implicit"),
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
