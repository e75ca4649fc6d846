"""ReLU and leaky ReLU, with the addition of a bias in the same pass: forward and backward."""

from __future__ import annotations

from typing import Any

from nn.array import Array, blocks, in_memory, namespace, op
from nn.buffers import Buffers
from nn.ops.channels import add_lines, per_channel, totals


@op
def activation_forward(
    x: Array, b: Array | None, y: Array, slope: float, buffers: Buffers, keep: bool = True
) -> Any:
    """y = act(x + b): itself above 0, `slope` (0 to 1) times itself elsewhere. b (C,); y may be x.

    x and y are (N, H, W, C), or (N, C). Returns, where `keep`, what `activation_backward` needs. y must keep
    its contents then. With slope 1 a bias is all there is.
    """
    xp, mask = namespace(x), None
    if keep and slope < 1:
        make = buffers.image if y.ndim == 4 else buffers.persistent
        mask = make("active", y.shape, "bool")
    source, target, active = in_memory(x, y), in_memory(y, y), None if mask is None else in_memory(mask, y)
    shift = per_channel("shift", 0.0 if b is None else b, target, buffers)
    zero = per_channel("zero", 0.0, target, buffers)
    for block in blocks(target):
        out = target[block]
        if b is not None:
            xp.add(source[block], shift, out=out)
        elif x is not y:
            out[...] = source[block]
        if slope == 1:
            continue
        if active is not None:
            xp.greater(out, zero, out=active[block])
        if slope:
            small = buffers.temporary("block", out.shape)
            xp.multiply(out, slope, out=small)
            xp.maximum(out, small, out=out)
        else:
            xp.maximum(out, zero, out=out)
    return mask


@op
def activation_backward(dy: Array, saved: Any, db: Array | None, slope: float, buffers: Buffers) -> None:
    """dy becomes x's gradient: where x + b was not above 0, `slope` times itself; db = Σ of it."""
    xp, target = namespace(dy), in_memory(dy, dy)
    active = None if saved is None else in_memory(saved, dy)
    (total,) = totals(1, target, buffers)
    for block in blocks(target):
        part = target[block]
        if active is not None and slope:
            gain = buffers.temporary("block", part.shape)
            gain[...] = active[block]
            xp.maximum(gain, slope, out=gain)
            part *= gain
        elif active is not None:
            xp.multiply(part, active[block], out=part)
        if db is not None:
            add_lines(total, part, buffers)
    if db is not None:
        db[...] = total.reshape(target.shape[2], -1).sum(0)


@op
def copy(x: Array, y: Array) -> None:
    """y = x, both of one shape and memory order."""
    y[...] = x
