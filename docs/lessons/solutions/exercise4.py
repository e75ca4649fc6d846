"""A solution of exercise 4."""

import numpy as np


def moments(x, comm):
    """(mean, variance) of the numbers of all ranks, of which this one has the vector `x`, float32."""
    total, count = comm.all_reduce(np.array([x.sum(dtype=np.float64), x.size])).wait()
    mean = total / count
    squares = comm.all_reduce(np.array([((x.astype(np.float64) - mean) ** 2).sum()])).wait()
    return mean, squares[0] / count


def sum_of_shards(mine, comm):
    """The sum of all shards of all ranks, with the same bits on any number of ranks."""
    shards = list(comm.all_gather(mine).wait().reshape(-1, mine.shape[1]))
    while len(shards) > 1:  # neighbours, level by level
        pairs = [a + b for a, b in zip(shards[::2], shards[1::2])]
        shards = pairs + shards[2 * len(pairs) :]
    return shards[0]
