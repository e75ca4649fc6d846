"""Ranks without MPI, for the checks: threads, and a communicator with two collectives of `world.comm`."""

import threading

import numpy as np


class Result:
    """What a collective returns: `wait` gives its array."""

    def __init__(self, array):
        self.array = array

    def wait(self):
        return self.array


class ThreadComm:
    """The communicator of one thread of `size`. `calls` counts its collectives."""

    def __init__(self, rank, size, meeting, given):
        self.rank, self.size, self.calls = rank, size, 0
        self._meeting, self._given = meeting, given

    def all_reduce(self, x, op="sum"):
        """x ← x_0 + x_1 + … over ranks, in place; with op="mean" divided by their number."""
        total = np.sum(self._everyone(x), axis=0, dtype=x.dtype)
        x[...] = total / self.size if op == "mean" else total
        return Result(x)

    def all_gather(self, x):
        """A new array (size, *x.shape) with the arrays of all ranks, by rank."""
        return Result(np.stack(self._everyone(x)))

    def _everyone(self, x):
        self.calls += 1
        self._given[self.rank] = np.array(x)
        self._meeting.wait()
        everyone = list(self._given)
        self._meeting.wait()
        return everyone


def on_ranks(size, work):
    """[(result of work(comm), comm) of each rank]; what a rank raises is raised here."""
    meeting, given = threading.Barrier(size, timeout=10), [None] * size
    comms = [ThreadComm(rank, size, meeting, given) for rank in range(size)]
    results, errors = [None] * size, []

    def serve(comm):
        try:
            results[comm.rank] = work(comm)
        except threading.BrokenBarrierError:
            errors.append(AssertionError(f"rank {comm.rank} waited for a rank that made fewer calls"))
        except BaseException as error:
            errors.insert(0, error)
            meeting.abort()

    threads = [threading.Thread(target=serve, args=(comm,)) for comm in comms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return list(zip(results, comms, strict=True))
