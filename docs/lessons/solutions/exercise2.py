"""A solution of exercise 2."""

import numpy as np


def global_gradient(mean, images, comm):
    """The mean gradient over the images of all ranks, the same array of numbers on each."""
    sent = np.zeros(mean.size + 1)
    if images:
        sent[:-1] = mean * images
    sent[-1] = images
    comm.all_reduce(sent).wait()
    return sent[:-1] / sent[-1]
