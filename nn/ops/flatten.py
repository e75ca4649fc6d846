"""Images as vectors, in the order in which PyTorch flattens them: channel by channel."""

from __future__ import annotations

from nn.array import Array, op


@op
def flatten(x: Array, y: Array) -> None:
    """y (N, C·H·W) for x (N, H, W, C)."""
    n, h, w, c = x.shape
    y.reshape(n, c, h, w)[...] = x.transpose(0, 3, 1, 2)


@op
def unflatten(dy: Array, dx: Array) -> None:
    """dx (N, H, W, C) for dy (N, C·H·W)."""
    n, h, w, c = dx.shape
    dx.transpose(0, 3, 1, 2)[...] = dy.reshape(n, c, h, w)
