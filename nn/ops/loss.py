"""The two losses, each with its gradient, and the operation that a training step calls."""

from __future__ import annotations

from collections.abc import Callable

from nn.array import Array, namespace, op


def softmax_cross_entropy(
    logits: Array, labels: Array, count: int, smoothing: float = 0.0
) -> tuple[Array, Array]:
    """−Σ t · log softmax(logits) / count over these images, and its gradient (softmax − t) / count.

    t = (1 − s)·onehot(label) + s/K, with s the label smoothing (Szegedy et al. 2016, section 7). `count` is
    the number of images of the global batch, of which these may be a part. Logits (N, K), labels (N,)
    integers. Each row is shifted by its own maximum, so nothing overflows.
    """
    xp, classes = namespace(logits), logits.shape[1]
    shifted = logits - logits.max(1, keepdims=True)
    exp = xp.exp(shifted)
    total = exp.sum(1, keepdims=True)
    target = (labels[:, None] == xp.arange(classes)).astype(logits.dtype)
    if smoothing:
        target = target * (1 - smoothing) + smoothing / classes
    loss = ((xp.log(total) - shifted) * target).sum() / count
    return loss, (exp / total - target) / count


def binary_cross_entropy(logits: Array, labels: Array, count: int) -> tuple[Array, Array]:
    """Sigmoid with binary cross-entropy from logits z against one-hot t, the mean over images and classes.

    Σ [max(z, 0) − z·t + log(1 + exp(−|z|))] / (count · K), which neither overflows nor takes log 0, and its
    gradient (sigmoid(z) − t) / (count · K).
    """
    xp = namespace(logits)
    t = (labels[:, None] == xp.arange(logits.shape[1])).astype(logits.dtype)
    decay = xp.exp(-xp.abs(logits))
    terms = xp.maximum(logits, 0) - logits * t + xp.log1p(decay)
    sigmoid = xp.where(logits >= 0, 1 / (1 + decay), decay / (1 + decay))
    scale = count * logits.shape[1]
    return terms.sum() / scale, (sigmoid - t) / scale


LOSSES: dict[str, Callable[..., tuple[Array, Array]]] = {
    "ce": softmax_cross_entropy,
    "bce": binary_cross_entropy,
}


@op
def loss_and_gradient(
    logits: Array,
    labels: Array,
    stop: Array,
    dlogits: Array,
    local_loss: Array,
    step_metrics: Array,
    *,
    loss: str,
    count: int,
    smoothing: float = 0.0,
) -> None:
    """Writes dlogits, local_loss = [loss], step_metrics = [loss, correct, stop] of a part of `count` images.

    `loss` names one of LOSSES; `correct` counts the images whose largest logit (the first of equals) is the
    label's.
    """
    more = {"smoothing": smoothing} if smoothing else {}
    part, dlogits[...] = LOSSES[loss](logits, labels, count, **more)
    local_loss[0] = step_metrics[0] = part
    step_metrics[1] = (logits.argmax(1) == labels).sum()
    step_metrics[2] = stop[0]
