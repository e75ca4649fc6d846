"""The communicator protocol, and the communicator of a single process.

`distrib.comm.mpi` and `distrib.comm.nccl` implement the same protocol on host and on device arrays.
"""

from __future__ import annotations

from typing import Any, Protocol

from nn.array import Array


class Handle(Protocol):
    """A collective under way."""

    def wait(self) -> None:
        """Return when (on a GPU: when work queued from now on will see that) the result is in place."""


class Communicator(Protocol):
    """Collectives over all ranks. Every rank calls the same ones in the same order."""

    name: str
    rank: int
    size: int
    captures: bool
    """Whether a CUDA graph can hold the collectives."""

    def all_reduce(self, x: Array, overlap: bool = False) -> Handle:
        """Sum the contiguous vector `x` over ranks, in place.

        With `overlap` it runs beside the computation until `wait`; without, the result is in place for
        whatever is computed next.
        """

    def broadcast(self, x: Array, root: int = 0) -> None:
        """Overwrite `x` by rank `root`'s, in place."""

    def barrier(self) -> None:
        """Return when every rank has called."""

    def abort(self) -> None:
        """End the whole job, from any thread, whatever the other ranks are doing."""

    def close(self) -> None:
        """Release the communicator; every rank calls it."""


class Done:
    """The handle of what is already complete."""

    def wait(self) -> None:
        pass


DONE = Done()


class SingleCommunicator:
    """One process: every collective is already complete."""

    name, rank, size, captures = "none", 0, 1, True

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
    """Control traffic (small Python objects) of one process; `mpi4py.MPI.Comm` has the same names."""

    rank = 0

    def allgather(self, value: Any) -> list[Any]:
        return [value]

    def bcast(self, value: Any, root: int = 0) -> Any:
        return value
