"""Evaluation: every image counts exactly once, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from distrib.comm.base import Communicator
from distrib.data.sampler import shard
from nn.array import Array
from nn.layer import StepContext
from nn.network import Network
from nn.ops.batch import LABELS, Source, gather_batch
from nn.ops.loss import loss_and_gradient

HOST_BATCH, DEVICE_BATCH = 128, 1000
"""Images of a rank's evaluation batch: on the host few, to fit the caches; on a GPU enough to fill it."""


Run = Callable[[Sequence[Callable[[], None]]], None]
"""Does several pieces of work, maybe side by side."""


def batch_size(model: Network) -> int:
    """Images of one evaluation batch."""
    return HOST_BATCH if model.backend.on_host else DEVICE_BATCH


LEAST_BATCH = 16
"""Images below which a batch is slow."""


def evaluated_part(images: int, size: int, rank: int, ranks: int, in_blocks: bool) -> slice:
    """Which images a rank evaluates; `in_blocks` whole batches of `size`, the same on any number of ranks."""
    if not in_blocks:
        return shard(images, rank, ranks)
    part = shard(-(-images // size), rank, ranks)
    return slice(part.start * size, min(part.stop * size, images))


def infer(model: Network, images: Array, labels: Array, start: int, stop: int) -> tuple[Array, Array]:
    """Logits (n, classes) with the running statistics, and labels (n,), of images[start:stop] (uint8)."""
    xp, n = model.backend.xp, stop - start
    x, y = model.buffers.image("input", (n, *model.shape)), model.buffers.persistent("labels", (n,), LABELS)
    images = images.reshape(len(images), *model.shape)
    source = Source(images, labels, xp.arange(start, stop, dtype=np.int32))
    gather_batch(x, y, source, xp.zeros(1, np.int64), n, 0)
    return model.forward(x, StepContext(training=False)), y


def in_turn(works: Sequence[Callable[[], None]]) -> None:
    """Do one piece of work after another."""
    for work in works:
        work()


def evaluate(
    networks: Sequence[Network],
    images: Array,
    labels: Array,
    loss: str,
    comm: Communicator,
    keep: list[np.ndarray] | None = None,
    in_blocks: bool = False,
    run: Run = in_turn,
) -> tuple[float, float]:
    """(mean loss, accuracy in percent) over all images. Each rank evaluates one contiguous shard.

    `run` does the work of all `networks`, which have the same weights, maybe side by side. Appends the logits
    of this rank's shard to `keep`, batch by batch, if it is given. `in_blocks`, the batches are the same on
    any number of ranks, and so are the bits.
    """
    backend, dtype, size = networks[0].backend, networks[0].dtype, batch_size(networks[0])
    if not in_blocks:
        size = min(size, max(LEAST_BATCH, size // len(networks)))  # together they take the memory of one
    part = evaluated_part(len(images), size, comm.rank, comm.size, in_blocks)
    starts = range(part.start, part.stop, size)
    found = backend.xp.zeros((len(starts), 2), np.float64)
    kept = [np.zeros(0, dtype)] * len(starts)

    def share(network: Network, first: int) -> None:
        zero, local_loss, metrics = (backend.xp.zeros(length, dtype) for length in (1, 1, 3))
        for number in range(first, len(starts), len(networks)):
            start = starts[number]
            logits, wanted = infer(network, images, labels, start, min(start + size, part.stop))
            unused = network.buffers.persistent("dlogits", logits.shape, str(dtype))
            loss_and_gradient(logits, wanted, zero, unused, local_loss, metrics, loss=loss, count=1)
            found[number] = metrics[:2]
            if keep is not None:
                kept[number] = np.array(backend.to_host(logits))

    run([partial(share, network, first) for first, network in enumerate(networks)])
    sums = backend.xp.zeros((-(-len(images) // size) if in_blocks else 1, 2), np.float64)
    for start, one in zip(starts, found, strict=True):
        sums[start // size if in_blocks else 0] += one
    if keep is not None:
        keep += kept
    comm.all_reduce(sums.reshape(-1)).wait()  # in blocks, one part of each is not zero: nothing is rounded
    total, correct = backend.to_host(sums).sum(0)
    return float(total) / len(images), 100 * float(correct) / len(images)
