"""Lesson 1: one rank trains a small network. Forward, backward, step."""

import numpy as np

from distrib.data import formats, sampler
from nn.layer import StepContext
from nn.layers import Flatten, Linear, ReLU, Sequential
from nn.network import Network
from nn.ops.loss import softmax_cross_entropy
from nn.optim import SGD

IMAGES, BATCH, LR = 3200, 32, 0.1


def net(shape, classes):
    """784 pixels → 32 hidden values → a logit for each of 10 digits."""
    return Sequential(flat=Flatten(), hidden=Linear(32), relu=ReLU(), out=Linear(classes))


data = formats.load(limit_train=IMAGES, limit_test=1000)  # MNIST: it lies in the package
network = Network(net, data.shape, data.classes, seed=0, dtype="float64")
optimizer = SGD(network.params)
order = sampler.permutation(seed=0, epoch=0, images=IMAGES)
context = StepContext(training=True, global_batch=BATCH)


def forward(indices):
    """The loss of these images, and its gradient by the logits."""
    x = data.train_images[indices] / 255
    logits = network.forward(x, context)
    return softmax_cross_entropy(logits, data.train_labels[indices], len(indices))


for step in range(IMAGES // BATCH):
    batch = order[step * BATCH : (step + 1) * BATCH]
    loss, dlogits = forward(batch)  # 1. forward
    network.backward(dlogits, context)  # 2. backward: fills network.params.grads
    if step % 33 == 0:
        print(f"step {step}: loss {loss:.3f}")
    if step == 0:  # is the gradient right? Change one weight a little, and look at the loss
        weight, at, h = network.params["out.weight"], (3, 1), 1e-5
        told = weight.grad[at]
        weight.value[at] += h
        above = forward(batch)[0]
        weight.value[at] -= 2 * h
        below = forward(batch)[0]
        weight.value[at] += h
        print(f"dL/dw by backward {told:.6f}, by two losses {(above - below) / (2 * h):.6f}")
    optimizer.step(LR)  # 3. step: values ← values − LR · grads

logits = network.forward(data.test_images / 255, StepContext(training=False))
accuracy = 100 * np.mean(logits.argmax(1) == data.test_labels)
print(f"parameters: {network.params.count}; right on the test images: {accuracy:.1f} %")
