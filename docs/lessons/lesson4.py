"""Lesson 4: batch norm over ranks, and the same bits on any number of ranks."""

import numpy as np

import distrib
from distrib.data.sampler import shard
from nn.layers import ConvBN, Flatten, Linear, Sequential


def net(shape, classes):
    """Two convolutions, each with batch norm."""
    return Sequential(ConvBN(8, pool=2), ConvBN(16, pool=2), Flatten(), Linear(classes))


def moments(x, comm):
    """Mean and variance of the numbers of all ranks, of which this one has `x`: in two passes."""
    total = comm.all_reduce(np.array([x.sum(), x.size])).wait()
    mean = total[0] / total[1]
    squares = comm.all_reduce(np.array([((x - mean) ** 2).sum()])).wait()
    return mean, squares[0] / total[1]


numbers = np.random.default_rng(4).normal(10, 2, 13)  # what a channel is for 13 images
with distrib.connect(backend="numpy") as world:
    x = numbers[shard(13, world.rank, world.size)]
    own = world.comm.all_gather(np.array([x.mean(), x.var()])).wait()
    mean, variance = moments(x, world.comm)
    first = world.rank == 0
if first:
    for rank, (m, v) in enumerate(own):
        print(f"rank {rank} alone: mean {m:.3f}, variance {v:.3f}")
    print(f"over all ranks: mean {mean:.3f}, variance {variance:.3f}")
    print(f"(0.1 + 0.2) + 0.3 = {(0.1 + 0.2) + 0.3}, 0.1 + (0.2 + 0.3) = {0.1 + (0.2 + 0.3)}")

ways = {
    "statistics of each rank alone": {"batch_norm": "local"},
    "statistics of all ranks": {"batch_norm": "sync"},  # this is the default
    "the same bits": {"reproducible": True, "shards": 6},
}
for way, options in ways.items():
    trained = distrib.fit(
        net,
        epochs=1,
        batch_size=48,
        lr=0.01,
        limit_train=480,
        limit_test=200,
        backend="numpy",
        progress=False,
        **options,
    )
    if first:
        loss, digest = trained.summary["test_loss"], trained.summary["parameter_digest"][:8]
        print(f"{way}: test loss {loss:.6f}, weights {digest}")
