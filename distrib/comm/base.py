"""The communicator protocols, and the communicator of a single process.

`distrib.comm.mpi` and `distrib.comm.nccl` implement the same protocols on host and on device arrays.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from distrib.errors import UserError
from nn.array import Array

BF16 = "sum of bfloat16"
"""The operation on uint16 that hold the bits of bfloat16, which NumPy does not have."""


class Handle(Protocol):
    """A collective that may still be running."""

    def wait(self) -> Any:
        """Return when the result is in place; on a GPU, when work queued from now on will see it."""


class Sums(Protocol):
    """What a `Reducer` needs: a communicator, or `world.comm`."""

    def all_reduce(self, x: Array, *, overlap: bool = False, op: str = "sum") -> Handle:
        """Sum the contiguous vector `x` over ranks, in place; `op` is "sum" or `BF16`.

        With `overlap`, the sum runs beside the computation until `wait`. Without, whatever is computed next
        sees the result.
        """


class Communicator(Sums, Protocol):
    """Collectives over all ranks. Every rank calls the same ones in the same order."""

    name: str
    rank: int
    size: int
    version: str
    """Of the library, if it may change the order of a sum; else empty."""
    graph_safe: bool
    """Whether a CUDA graph can hold the collectives."""
    sums_bf16: bool
    """Whether it can sum bfloat16, which travels as uint16."""
    staged: bool
    """Whether it copies device arrays through the host."""

    def broadcast(self, x: Array, root: int = 0) -> None:
        """Overwrite `x` with rank `root`'s."""

    def barrier(self) -> None:
        """Return when every rank has called it."""

    def abort(self) -> None:
        """End the whole job, from any thread, whatever the other ranks are doing."""

    def close(self) -> None:
        """Release the communicator. Every rank calls it; a second call does nothing."""


class Transport(Communicator, Protocol):
    """A communicator with what `distrib.comm.library` is made of.

    All arrays are contiguous vectors of bytes, 32 or 64-bit integers, float32 or float64. Nothing is checked.
    The caller keeps them alive until the handle's `wait`.
    """

    def start_reduce(self, x: Array, op: str, overlap: bool = False) -> Handle:
        """Put x_0 ∘ x_1 ∘ … of all ranks in place of `x`; ∘ is "sum", "max" or "min"."""

    def start_broadcast(self, x: Array, root: int) -> Handle:
        """Overwrite `x` with rank `root`'s."""

    def start_gather(self, x: Array, into: Array) -> Handle:
        """Put the vectors of all ranks, by rank, into one of `size` times as many elements."""

    def start_scatter(self, x: Array, into: Array, op: str) -> Handle:
        """Put this rank's part of the reduced `x`, which has `size` times as many elements, in `into`."""

    def start_exchange(
        self, send: Array | None, to: int | None, receive: Array | None, source: int | None
    ) -> Handle:
        """Send to one rank and receive from one, in any order of ranks; None: nothing."""

    def synchronize(self) -> None:
        """Return when all results that were waited for are in place on the device."""

    def abandon(self) -> None:
        """After the death of a rank, end what is under way; a second call does nothing."""

    def over(self, control_comm: Any) -> Transport:
        """A transport of the same kind over the ranks of `control_comm`."""


class Done:
    """The handle of a collective that is complete."""

    def wait(self) -> None:
        pass


DONE = Done()


class SingleCommunicator:
    """One process: every collective is already complete."""

    name, rank, size = "none", 0, 1
    version, graph_safe, sums_bf16, staged = "", True, True, False

    def all_reduce(self, x: Array, overlap: bool = False, op: str = "sum") -> Handle:
        return DONE

    def broadcast(self, x: Array, root: int = 0) -> None:
        pass

    def barrier(self) -> None:
        pass

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass

    def start_reduce(self, x: Array, op: str, overlap: bool = False) -> Handle:
        return DONE

    def start_broadcast(self, x: Array, root: int) -> Handle:
        return DONE

    def start_gather(self, x: Array, into: Array) -> Handle:
        into[...] = x
        return DONE

    def start_scatter(self, x: Array, into: Array, op: str) -> Handle:
        into[...] = x
        return DONE

    def start_exchange(
        self, send: Array | None, to: int | None, receive: Array | None, source: int | None
    ) -> Handle:
        assert (send is None) == (receive is None), "one process can only send to itself"
        if receive is not None:
            receive[...] = send
        return DONE

    def synchronize(self) -> None:
        pass

    def abandon(self) -> None:
        pass

    def over(self, control_comm: Any) -> SingleCommunicator:
        return self


class SingleControl:
    """Control communicator (small Python objects) of one process, with the names of `mpi4py.MPI.Comm`."""

    rank = 0

    def allgather(self, value: Any) -> list[Any]:
        return [value]

    def bcast(self, value: Any, root: int = 0) -> Any:
        return value


def first_error(found: list[str | None], name_rank_0: bool = True) -> str | None:
    """The first of the errors that each rank has or has not, with its rank unless all have one."""
    for rank, text in enumerate(found):
        if text is not None:
            named = not all(found) and (rank > 0 or name_rank_0)
            return f"{text} (rank {rank})" if named else text
    return None


@contextmanager
def raised_by_all(control_comm: Any, waiting: Any, doing: str) -> Iterator[None]:
    """Turn any exception of one rank in the block into the same UserError on all ranks.

    `waiting` is `Watchdog.waiting`. Should the others hang in the block, the one that failed waits half as
    long, so that the job's last words name its error.
    """
    failed: Exception | None = None
    try:
        with waiting(doing):
            yield
    except Exception as error:
        failed = error
    why = failed and (str(failed) if isinstance(failed, UserError) else f"{type(failed).__name__}: {failed}")
    with waiting(f"{doing}, which failed here ({why})", 0.5) if why else waiting(doing):
        text = first_error(control_comm.allgather(why))
    if text:
        raise UserError(f"{doing}: {text}") from failed
