"""Evaluation: every image counts exactly once, on any number of ranks."""

from __future__ import annotations

import numpy as np

from distrib.comm import Communicator
from distrib.sampler import share
from nn.backend import Array
from nn.functional import LOSSES
from nn.layers import Pass
from nn.resnet9 import ResNet9

BATCH = 128
"""Images of one evaluation batch on a rank."""


def load_batch(model: ResNet9, images: Array, indices: Array) -> Array:
    """Images (uint8) at `indices` as the network's input (N, 28, 28, 1), scaled to [0, 1]."""
    x = model.ws.image("input", (len(indices), 28, 28, 1))
    x[..., 0] = images[indices]
    x /= 255
    return x


def logits_of(model: ResNet9, images: Array, indices: Array) -> Array:
    """Logits with the running statistics, (N, 10)."""
    return model.forward(load_batch(model, images, indices), Pass(train=False))


def evaluate(model: ResNet9, images: Array, labels: Array, loss: str, comm: Communicator) -> tuple[float, float]:
    """(mean loss, accuracy in percent) over all images, each rank taking a contiguous part."""
    xp = model.backend.xp
    part = share(len(images), comm.rank, comm.size)
    sums = xp.zeros(2, np.float64)
    for start in range(part.start, part.stop, BATCH):
        indices = xp.arange(start, min(start + BATCH, part.stop))
        logits, wanted = logits_of(model, images, indices), labels[indices]
        sums[0] += LOSSES[loss](logits, wanted, 1)[0]
        sums[1] += (logits.argmax(1) == wanted).sum()
    comm.all_reduce(sums).wait()
    total, correct = model.backend.to_host(sums)
    return float(total) / len(images), 100 * float(correct) / len(images)
