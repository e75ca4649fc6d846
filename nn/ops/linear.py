"""The linear layer: y = x wᵀ + b, with w (K, C) as PyTorch keeps it."""

from __future__ import annotations

from nn.array import Array, namespace, op


@op
def linear_forward(x: Array, w: Array, b: Array, y: Array) -> None:
    """y (N, K) = x wᵀ + b for x (N, C)."""
    y[...] = x @ w.T + b


@op
def linear_backward(dy: Array, x: Array, w: Array, dw: Array, db: Array, dx: Array) -> None:
    """dw (K, C) = dyᵀ x, db (K,) = Σdy, dx (N, C) = dy w."""
    namespace(x).matmul(dy.T, x, out=dw)
    db[...] = dy.sum(0)
    dx[...] = dy @ w
