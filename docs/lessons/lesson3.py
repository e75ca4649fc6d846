"""Lesson 3: buckets of gradients leave while the backward still runs."""

import time

import numpy as np

from distrib import connect
from distrib.comm.reducer import Reducer
from distrib.data import formats, sampler
from nn.layer import StepContext, named
from nn.layers import Flatten, Linear, ReLU, Sequential
from nn.network import Network
from nn.ops.loss import softmax_cross_entropy

BATCH, STEPS = 256, 12
WAYS = {"a message for each parameter": 1, "buckets of 512 KiB": 512 << 10, "one message": 1 << 30}


def net(shape, classes):
    hidden = [layer for i in range(1, 8) for layer in (named(f"fc{i}", Linear(256)), ReLU())]
    return Sequential(Flatten(), *hidden, named("out", Linear(classes)))


class Watched:
    """A communicator that notes after which gradient it was asked to send, and how much."""

    def __init__(self, comm):
        self.comm, self.gradient, self.sent = comm, "", []

    def all_reduce(self, x, **more):
        self.sent.append(f"{self.gradient}: {x.nbytes / 1024:.0f} KiB")
        return self.comm.all_reduce(x, **more)


world = connect(backend="numpy")
comm, data = world.comm, formats.load(limit_train=BATCH)
network, context = Network(net, data.shape, data.classes), StepContext(True, BATCH)
mine = sampler.shard(BATCH, comm.rank, comm.size)
images, labels = data.train_images[mine].astype(np.float32) / 255, data.train_labels[mine]

for way, size in WAYS.items():
    watched, seconds = Watched(comm), []
    reducer = Reducer(network.params, watched, bucket_bytes=size)

    def on_grad(parameter, watched=watched, reducer=reducer):
        watched.gradient = parameter.name
        reducer.ready(parameter)  # sends the buckets that are now complete

    for _ in range(STEPS):
        watched.sent.clear()
        _, dlogits = softmax_cross_entropy(network.forward(images, context), labels, BATCH)
        begin = time.perf_counter()
        network.backward(dlogits, context, on_grad)
        middle = time.perf_counter()
        reducer.wait()
        seconds.append((middle - begin, time.perf_counter() - middle))
    if comm.rank == 0:
        backward, waited = 1000 * np.median(seconds, axis=0)
        print(f"{way}: {len(watched.sent)} sent; backward {backward:.2f} ms, then waited {waited:.2f} ms")
        print("".join(f"  sent after {each}\n" for each in watched.sent if size > 1), end="")
