"""Evaluation: every image counts exactly once, on any number of ranks."""

from __future__ import annotations

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


def batch_size(model: Network) -> int:
    """Images of one evaluation batch."""
    return HOST_BATCH if model.backend.on_host else DEVICE_BATCH


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


def evaluate(
    model: Network,
    images: Array,
    labels: Array,
    loss: str,
    comm: Communicator,
    keep: list[np.ndarray] | None = None,
    in_blocks: bool = False,
) -> tuple[float, float]:
    """(mean loss, accuracy in percent) over all images. Each rank evaluates one contiguous shard.

    Appends the logits of this rank's shard to `keep`, batch by batch, if it is given. `in_blocks`, the
    batches are the same on any number of ranks, and so are the bits.
    """
    xp, dtype, size = model.backend.xp, model.dtype, batch_size(model)
    batches = -(-len(images) // size)
    part = evaluated_part(len(images), size, comm.rank, comm.size, in_blocks)
    sums = xp.zeros((batches if in_blocks else 1, 2), np.float64)
    zero, local_loss, metrics = (xp.zeros(length, dtype) for length in (1, 1, 3))
    for start in range(part.start, part.stop, size):
        logits, wanted = infer(model, images, labels, start, min(start + size, part.stop))
        unused = model.buffers.persistent("dlogits", logits.shape, str(dtype))
        loss_and_gradient(logits, wanted, zero, unused, local_loss, metrics, loss=loss, count=1)
        sums[start // size if in_blocks else 0] += metrics[:2]
        if keep is not None:
            keep.append(np.array(model.backend.to_host(logits)))
    comm.all_reduce(sums.reshape(-1)).wait()  # in blocks, one part of each is not zero: nothing is rounded
    total, correct = model.backend.to_host(sums).sum(0)
    return float(total) / len(images), 100 * float(correct) / len(images)
