"""The communicator protocol, and the communicator of a single process.

`distrib.comm.mpi` and `distrib.comm.nccl` implement the same protocol on host and on device arrays.
"""

from __future__ import annotations

from typing import Any, Protocol

from nn.array import Array


class Handle(Protocol):
    """A collective that may still be running."""

    def wait(self) -> None:
        """Return when the result is in place; on a GPU, when work queued from now on will see it."""


class Communicator(Protocol):
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

    def all_reduce(self, x: Array, overlap: bool = False) -> Handle:
        """Sum the contiguous vector `x` over ranks, in place.

        With `overlap`, the sum runs beside the computation until `wait`. Without, whatever is computed next
        sees the result.
        """

    def broadcast(self, x: Array, root: int = 0) -> None:
        """Overwrite `x` with rank `root`'s."""

    def barrier(self) -> None:
        """Return when every rank has called it."""

    def abort(self) -> None:
        """End the whole job, from any thread, whatever the other ranks are doing."""

    def close(self) -> None:
        """Release the communicator. Every rank calls it."""


class Done:
    """The handle of a collective that is complete."""

    def wait(self) -> None:
        pass


DONE = Done()


class SingleCommunicator:
    """One process: every collective is already complete."""

    name, rank, size = "none", 0, 1
    version, graph_safe, sums_bf16, staged = "", True, True, False

    def all_reduce(self, x: Array, overlap: bool = False) -> Handle:
        return DONE

    def broadcast(self, x: Array, root: int = 0) -> None:
        pass

    def barrier(self) -> None:
        pass

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


class SingleControl:
    """Control communicator (small Python objects) of one process, with the names of `mpi4py.MPI.Comm`."""

    rank = 0

    def allgather(self, value: Any) -> list[Any]:
        return [value]

    def bcast(self, value: Any, root: int = 0) -> Any:
        return value
