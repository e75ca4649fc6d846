"""Lesson 2: each rank takes a shard of the batch; a naive all-reduce adds up the gradients."""

import numpy as np

from distrib import connect
from distrib.data import formats, sampler
from nn.layer import StepContext
from nn.layers import Flatten, Linear, ReLU, Sequential
from nn.network import Network
from nn.ops.loss import softmax_cross_entropy
from nn.optim import SGD

IMAGES, BATCH, LR = 1603, 32, 0.1  # 50 whole batches, and one of 3 images


def net(shape, classes):
    return Sequential(flat=Flatten(), hidden=Linear(32), relu=ReLU(), out=Linear(classes))


world = connect(backend="numpy")
comm = world.comm
data = formats.load(limit_train=IMAGES)
network = Network(net, data.shape, data.classes, seed=0)  # the same weights on all ranks
optimizer = SGD(network.params)
order = sampler.permutation(seed=0, epoch=0, images=IMAGES)  # the same order on all ranks
steps = sampler.steps_per_epoch(IMAGES, BATCH)

for step in range(steps):
    # this rank's shard of the batch, and how many images all ranks have together
    mine, count = sampler.batch_indices(order, step, BATCH, comm.rank, comm.size)
    context = StepContext(training=True, global_batch=count)
    logits = network.forward(data.train_images[mine].astype(np.float32) / 255, context)
    loss, dlogits = softmax_cross_entropy(logits, data.train_labels[mine], count)  # Σ of its shard / count
    network.backward(dlogits, context)

    # for comparison, the wrong way: each rank's mean over its own shard, then the mean of these
    wrong = network.params.grads * (count / max(1, len(mine)))
    comm.all_reduce(wrong, op="mean").wait()

    for parameter in network.params:  # the naive way: one message for each parameter, one after the other
        comm.all_reduce(parameter.grad).wait()
    total = comm.all_reduce(np.array([loss])).wait()[0]
    optimizer.step(LR)

    if comm.rank == 0 and step in (0, 25, steps - 1):
        right = network.params.grads
        off = 100 * np.linalg.norm(wrong - right) / np.linalg.norm(right)
        shards = [
            len(order[step * BATCH :][:BATCH][sampler.shard(count, r, comm.size)]) for r in range(comm.size)
        ]
        print(f"step {step}: images {shards}, loss {total:.4f}, a mean of means is {off:.1f} % off")

everyone = comm.all_gather(network.params.values).wait()
if comm.rank == 0:
    print(f"all ranks hold the same weights: {bool((everyone == everyone[0]).all())}")
    print(f"the length of the weights: {np.linalg.norm(everyone[0]):.4f}")
world.close()
