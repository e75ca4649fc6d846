"""`distrib bench ops`: every operation of a step at its shapes, and each algorithm of convolution."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import numpy as np

from distrib.config import build
from launch.bench.measure import BatchSize, Repeats, Width, matrix_peak, spread
from launch.entry import AsJson, choice
from launch.machine import machine, refuse_launcher, require_torch
from nn.array import Array
from nn.buffers import Buffers
from nn.device import NUMPY
from nn.layer import StepContext
from nn.layers import Conv, ConvBN, Residual
from nn.models import MODELS
from nn.network import Network
from nn.ops import norm as F
from nn.ops.conv import Geometry, choose_algorithm, conv_backward, conv_forward
from nn.ops.loss import softmax_cross_entropy
from nn.optim import Adam

SAME = Geometry(1, 1, 1)
WAYS = ("forward", "backward")


Times = dict[str, list[float]]
"""Milliseconds of each repeat, by the name of the job."""


def layers(model: Network) -> list[tuple[ConvBN, int, bool]]:
    """(layer, side of the image, whether a residual is added) of each that occurs, equal ones once."""
    adders = {layer.adder for layer in model.layers.walk() if isinstance(layer, Residual)}
    found: dict[tuple[Any, ...], tuple[ConvBN, int, bool]] = {}
    for layer in model.layers.walk():
        if isinstance(layer, ConvBN):
            side, added = layer.in_shape[0], layer in adders
            found.setdefault((side, layer.conv.c_in, layer.conv.out, added), (layer, side, added))
    return list(found.values())


def take_turns(jobs: dict[str, Callable[[], Any]], repeats: int) -> Times:
    """Each repeat runs all jobs one after another; the first is not counted."""
    times: Times = {name: [] for name in jobs}
    for repeat in range(repeats + 1):
        for name, job in jobs.items():
            begin = time.perf_counter()
            job()
            if repeat:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def random_image(buffers: Buffers, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    image = buffers.image(name, shape)
    image[...] = rng.standard_normal(shape)
    return image


def convolution(side: int, conv: Conv, batch: int, repeats: int, torch: bool) -> dict[str, Any]:
    """Milliseconds forward and backward of each algorithm, the algorithm that is chosen, and its error."""
    rng = np.random.default_rng(0)
    x_shape, w_shape = (batch, side, side, conv.c_in), (3, 3, conv.c_in, conv.out)
    y_shape = SAME.out_shape(x_shape, w_shape)
    w = (rng.standard_normal(w_shape) / (3 * conv.c_in**0.5)).astype(np.float32)
    jobs: dict[str, Callable[[], Any]] = {}
    for algorithm in ("patches", "winograd"):
        buffers = Buffers()
        x, dy = random_image(buffers, "in", x_shape, rng), random_image(buffers, "dy", y_shape, rng)
        y, dw = buffers.image("out", y_shape), np.empty_like(w)
        dx = buffers.image("dx", x_shape) if conv.c_in > 1 else None
        saved: list[Any] = [None]

        def forward(
            algorithm: str = algorithm,
            x: Array = x,
            y: Array = y,
            buffers: Buffers = buffers,
            saved: list = saved,
        ) -> None:
            saved[0] = conv_forward(x, w, SAME, y, buffers, algorithm)

        def backward(
            algorithm: str = algorithm,
            dy: Array = dy,
            dw: Array = dw,
            dx: Array = dx,
            buffers: Buffers = buffers,
            saved: list = saved,
        ) -> None:
            conv_backward(dy, saved[0], w, SAME, dw, dx, buffers, algorithm)

        jobs |= {f"{algorithm} forward": forward, f"{algorithm} backward": backward}
    if torch:
        jobs |= torch_convolution(x_shape, w, conv.c_in > 1)
    chosen = choose_algorithm(x_shape, w_shape, SAME, NUMPY)
    return {
        "ms": take_turns(jobs, repeats),
        "chosen": chosen,
        "gflop": 2 * batch * side**2 * w.size / 1e9,
        "error": error_of(chosen, w, side),
    }


def error_of(algorithm: str, w: Array, side: int) -> float:
    """Largest error of y, dw, dx in float32, over each one's largest value; against patches in float64."""
    found: list[list[Array]] = []
    for dtype, name in (("float32", algorithm), ("float64", "patches")):
        buffers, rng, weights = Buffers(dtype=dtype), np.random.default_rng(1), w.astype(dtype)
        x = random_image(buffers, "in", (4, side, side, w.shape[2]), rng)
        np.maximum(x.astype("float32"), 0, out=x)  # as after a ReLU
        dy = random_image(buffers, "dy", (*x.shape[:3], w.shape[3]), rng)
        dy[...] = dy.astype("float32")
        y, dx, dw = buffers.image("out", dy.shape), buffers.image("dx", x.shape), np.empty_like(weights)
        conv_backward(
            dy, conv_forward(x, weights, SAME, y, buffers, name), weights, SAME, dw, dx, buffers, name
        )
        found.append([y, dx, dw])
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(*found, strict=True))


def torch_convolution(x_shape: tuple[int, ...], w: Array, need_dx: bool) -> dict[str, Callable[[], Any]]:
    """The same in PyTorch, channels-last."""
    import torch

    n, h, _, c = x_shape
    x = torch.randn(n, c, h, h).contiguous(memory_format=torch.channels_last).requires_grad_(need_dx)
    weight = (
        torch.tensor(w.transpose(3, 2, 0, 1).copy())
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
    )
    dy = torch.randn(n, w.shape[3], h, h).contiguous(memory_format=torch.channels_last)
    held: dict[str, Any] = {}

    def forward() -> None:
        held["y"] = torch.nn.functional.conv2d(x, weight, padding=1)

    def backward() -> None:
        torch.autograd.grad(held["y"], [x, weight] if need_dx else [weight], dy)

    return {"torch forward": forward, "torch backward": backward}


def batch_norm(side: int, block: ConvBN, residual: bool, batch: int, repeats: int, torch: bool) -> Times:
    """Batch norm (→ + residual) → ReLU (→ max-pool), forward and backward."""
    rng, buffers = np.random.default_rng(0), Buffers()
    channels, pool = block.conv.out, block.norm.pool
    shape = (batch, side, side, channels)
    out = (batch, side // 2, side // 2, channels) if pool else shape
    z, dy = random_image(buffers, "z", shape, rng), random_image(buffers, "dy", out, rng)
    y, one = buffers.image("y", out), np.ones(channels, np.float32)
    more = random_image(buffers, "more", shape, rng) if residual else None
    weights, over = F.Norm(one, one, one.copy(), one.copy()), F.Count(batch * side**2)
    after, saved = F.After(pool=pool, residual=more), list[Any]()

    def forward() -> None:
        saved[:] = [F.norm_forward(z, weights, y, after, over, buffers)]

    def backward() -> None:
        F.norm_backward(dy, saved[0], weights, one.copy(), one.copy(), over, buffers)

    jobs: dict[str, Callable[[], Any]] = {"distrib forward": forward, "distrib backward": backward}
    if torch:
        jobs |= torch_batch_norm(shape, pool, residual)
    return take_turns(jobs, repeats)


def torch_batch_norm(shape: tuple[int, ...], pool: bool, residual: bool) -> dict[str, Callable[[], Any]]:
    import torch

    n, h, _, c = shape
    z, more = (
        torch.randn(n, c, h, h).contiguous(memory_format=torch.channels_last).requires_grad_()
        for _ in range(2)
    )
    layer = torch.nn.BatchNorm2d(c)
    held: dict[str, Any] = {}

    def forward() -> None:
        y = torch.relu(layer(z) + more if residual else layer(z))
        held["y"] = torch.nn.functional.max_pool2d(y, 2) if pool else y
        held["dy"] = torch.ones_like(held["y"])

    def backward() -> None:
        wanted = [z, layer.weight, layer.bias, *([more] if residual else [])]
        torch.autograd.grad(held["y"], wanted, held["dy"])

    return {"torch forward": forward, "torch backward": backward}


def head(model: Network, batch: int, repeats: int, torch: bool) -> Times:
    """Global max-pool → linear → softmax cross-entropy, forward and backward together."""
    rng, (pool, linear_layer) = np.random.default_rng(0), model.layers.children()[-2:]
    (h, w, c), classes = pool.in_shape, model.classes
    x, labels = random_image(model.buffers, "bench.x", (batch, h, w, c), rng), rng.integers(0, classes, batch)
    step = StepContext(training=True, global_batch=batch)

    def both() -> None:
        _, dy = softmax_cross_entropy(linear_layer.forward(pool.forward(x, step), step), labels, batch)
        model.buffers.release(
            pool.backward(linear_layer.backward(dy, step, lambda _: None), step, lambda _: None)
        )

    jobs: dict[str, Callable[[], Any]] = {"distrib": both}
    if torch:
        import torch as pytorch

        x_t = pytorch.randn(batch, c, h, w).contiguous(memory_format=pytorch.channels_last).requires_grad_()
        linear, wanted = pytorch.nn.Linear(c, classes), pytorch.tensor(labels)

        def theirs() -> None:
            logits = linear(pytorch.nn.functional.max_pool2d(x_t, (h, w)).flatten(1))
            pytorch.nn.functional.cross_entropy(logits, wanted).backward()

        jobs["torch"] = theirs
    return take_turns(jobs, repeats)


def optimizer(model: Network, width: float, repeats: int, torch: bool) -> Times:
    """An Adam step over all parameters."""
    adam = Adam(model.params)
    jobs: dict[str, Callable[[], Any]] = {"distrib": lambda: adam.step(1e-3)}
    if torch:
        import torch as pytorch

        from launch.torch_peer.network import TorchResNet9

        theirs = TorchResNet9(width=width)
        for parameter in theirs.parameters():
            parameter.grad = pytorch.zeros_like(parameter)
        jobs["torch"] = pytorch.optim.Adam(theirs.parameters()).step
    return take_turns(jobs, repeats)


def ops(
    batch_size: BatchSize = 64,
    width: Width = 1.0,
    repeats: Repeats = 7,
    against: Annotated[
        str | None, choice("--against", "torch: the same operations in PyTorch, channels-last.", "torch")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Each operation of a training step at each shape, with every algorithm of convolution and its error.

    Example: distrib bench ops --batch-size 32 --against torch
    """
    refuse_launcher("distrib bench ops")
    build({"batch_size": batch_size, "width": width})  # refuses what no run could have
    torch = against == "torch"
    if torch:
        require_torch("--against torch")
    model = Network(MODELS["resnet9"], (28, 28, 1), 10, {"width": width})
    result: dict[str, Any] = {
        "machine": machine(),
        "batch_size": batch_size,
        "width": width,
        "matrix_peak_gflops": matrix_peak(),
        "layers": [],
    }
    say: Callable[[str], None] = (lambda _: None) if as_json else print
    say(
        f"{result['machine']}; batch {batch_size}, width {width}, float32, matrix product"
        f" {result['matrix_peak_gflops']:.0f} GFLOP/s; ms, forward + backward"
    )
    seen = set()
    for block, side, added in layers(model):
        conv = block.conv
        row: dict[str, Any] = {"name": block.name, "side": side, "channels": [conv.c_in, conv.out]}
        row["residual"] = added
        if (shape := (side, conv.c_in, conv.out)) not in seen:
            seen.add(shape)
            row["convolution"] = convolution(side, conv, batch_size, repeats, torch)
        row["batch_norm_ms"] = batch_norm(side, block, added, batch_size, repeats, torch)
        result["layers"].append(row)
        for line in layer_lines(row, block.norm.pool):
            say(line)
    result["head_ms"] = head(model, batch_size, repeats, torch)
    result["adam_ms"] = optimizer(model, width, repeats, torch)
    for name in ("head", "adam"):
        times = (f"{side} {spread(ms, 3)}" for side, ms in result[f"{name}_ms"].items())
        say(f"{name}: {', '.join(times)}")
    if as_json:
        print(json.dumps(result, indent=2))


def layer_lines(row: dict[str, Any], pool: bool) -> Iterator[str]:
    """The text of a row, for people."""
    side, (c_in, out) = row["side"], row["channels"]
    yield f"{row['name']}: {side}×{side}, {c_in}→{out}"
    found = row.get("convolution") or {"ms": {}}
    for algorithm in sides(found["ms"]):
        work = found["gflop"] * (3 if c_in > 1 else 2)
        rate = 1e3 * work / sum(statistics.median(found["ms"][f"{algorithm} {way}"]) for way in WAYS)
        note = f", chosen, error {found['error']:.1e}" if algorithm == found["chosen"] else ""
        label = f"convolution, {algorithm}"
        yield f"    {label:44} {pair(found['ms'], algorithm)}   {rate:.0f} GFLOP/s{note}"
    label = f"batch norm, {'residual, ' if row['residual'] else ''}ReLU, {'pool, ' if pool else ''}"
    for name in sides(row["batch_norm_ms"]):
        yield f"    {label + name:44} {pair(row['batch_norm_ms'], name)}"


def sides(times: Times) -> list[str]:
    """The names in these times, forward and backward once."""
    return list(dict.fromkeys(job.rpartition(" ")[0] for job in times))


def pair(times: Times, name: str) -> str:
    """Forward + backward, each with its spread."""
    return " + ".join(spread(times[f"{name} {way}"], 3) for way in WAYS)
