"""`distrib bench ops`: every operation of a step at its shapes, one after another, and the forms of convolution."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import typer

from distrib.config import build
from distrib.errors import UserError
from launch.measure import (
    AsJson,
    BatchSize,
    Repeats,
    Width,
    machine,
    matrix_peak,
    refuse_launcher,
    require_torch,
    spread,
)
from nn import functional as F
from nn import losses
from nn.backend import NUMPY, Array
from nn.conv import Geometry, choose_form, conv_backward, conv_forward
from nn.functional import EPS
from nn.layers import ConvBN, Pass, Residual
from nn.optim import Adam
from nn.resnet9 import CLASSES, ResNet9
from nn.workspace import Workspace

SAME = Geometry(1, 1, 1)
WAYS = ("forward", "backward")


Times = dict[str, list[float]]
"""Milliseconds of each repeat, by the name of the job."""


def layers(model: ResNet9) -> list[tuple[ConvBN, int, bool]]:
    """(layer, side of the image, whether a residual is added) of each that occurs, equal ones once."""
    seconds = {stage.second for stage in model.stages if isinstance(stage, Residual)}
    found: dict[tuple[Any, ...], tuple[ConvBN, int, bool]] = {}
    for conv, side in model.sides():
        added = conv in seconds
        found.setdefault((side, conv.c_in, conv.c_out, added), (conv, side, added))
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


def random_image(ws: Workspace, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    image = ws.image(name, shape)
    image[...] = rng.standard_normal(shape)
    return image


def convolution(side: int, conv: ConvBN, batch: int, repeats: int, torch: bool) -> dict[str, Any]:
    """Milliseconds forward and backward of each form, the form that is chosen, and its error."""
    rng = np.random.default_rng(0)
    x_shape, w_shape = (batch, side, side, conv.c_in), (3, 3, conv.c_in, conv.c_out)
    y_shape = SAME.out_shape(x_shape, w_shape)
    w = (rng.standard_normal(w_shape) / (3 * conv.c_in**0.5)).astype(np.float32)
    jobs: dict[str, Callable[[], Any]] = {}
    for form in ("patches", "winograd"):
        ws = Workspace()
        x, dy = random_image(ws, "in", x_shape, rng), random_image(ws, "dy", y_shape, rng)
        y, dw = ws.image("out", y_shape), np.empty_like(w)
        dx = ws.image("dx", x_shape) if conv.c_in > 1 else None
        saved: list[Any] = [None]

        def forward(
            form: str = form, x: Array = x, y: Array = y, ws: Workspace = ws, saved: list = saved
        ) -> None:
            saved[0] = conv_forward(x, w, SAME, y, ws, form)

        def backward(
            form: str = form,
            dy: Array = dy,
            dw: Array = dw,
            dx: Array = dx,
            ws: Workspace = ws,
            saved: list = saved,
        ) -> None:
            conv_backward(dy, saved[0], w, SAME, dw, dx, ws, form)

        jobs |= {f"{form} forward": forward, f"{form} backward": backward}
    if torch:
        jobs |= torch_convolution(x_shape, w, conv.c_in > 1)
    chosen = choose_form(x_shape, w_shape, SAME, NUMPY)
    return {
        "ms": take_turns(jobs, repeats),
        "chosen": chosen,
        "gflop": 2 * batch * side**2 * w.size / 1e9,
        "error": error_of(chosen, w, side),
    }


def error_of(form: str, w: Array, side: int) -> float:
    """Largest error of y, dw, dx in float32, relative to each one's largest value; against patches in float64."""
    found: list[list[Array]] = []
    for dtype, name in (("float32", form), ("float64", "patches")):
        ws, rng, weights = Workspace(dtype=dtype), np.random.default_rng(1), w.astype(dtype)
        x = random_image(ws, "in", (4, side, side, w.shape[2]), rng)
        np.maximum(x.astype("float32"), 0, out=x)  # as after a ReLU
        dy = random_image(ws, "dy", (*x.shape[:3], w.shape[3]), rng)
        dy[...] = dy.astype("float32")
        y, dx, dw = ws.image("out", dy.shape), ws.image("dx", x.shape), np.empty_like(weights)
        conv_backward(dy, conv_forward(x, weights, SAME, y, ws, name), weights, SAME, dw, dx, ws, name)
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


def batch_norm(side: int, conv: ConvBN, residual: bool, batch: int, repeats: int, torch: bool) -> Times:
    """Batch norm (→ + residual) → ReLU (→ max-pool), forward and backward."""
    rng, ws = np.random.default_rng(0), Workspace()
    shape = (batch, side, side, conv.c_out)
    out = (batch, side // 2, side // 2, conv.c_out) if conv.pool else shape
    z, dy = random_image(ws, "z", shape, rng), random_image(ws, "dy", out, rng)
    y, dz, gate = ws.image("y", out), ws.image("dz", shape), F.Gate(ws.image("passed", shape, "bool"))
    if conv.pool:
        gate = F.Gate(gate.passed, ws.image("top", out), ws.image("open", out, "bool"))
    gamma, count = np.ones(conv.c_out, np.float32), batch * side**2
    more = random_image(ws, "more", shape, rng) if residual else None

    def forward() -> None:
        _, var = F.batch_norm_statistics(z, count, ws, None)
        F.activate(z, (var + EPS) ** -0.5, gamma, gamma, y, ws, residual=more, pool=conv.pool, gate=gate)

    def backward() -> None:
        F.batch_norm_backward(dy, z, gamma, gamma, count, ws, None, dz, gate=gate)

    jobs: dict[str, Callable[[], Any]] = {"distrib forward": forward, "distrib backward": backward}
    if torch:
        jobs |= torch_batch_norm(shape, conv.pool, residual)
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


def head(model: ResNet9, batch: int, repeats: int, torch: bool) -> Times:
    """Global max-pool → linear → softmax cross-entropy, forward and backward together."""
    rng, ours, c = np.random.default_rng(0), model.head, model.head.channels
    x, labels = random_image(model.ws, "bench.x", (batch, 3, 3, c), rng), rng.integers(0, CLASSES, batch)
    step = Pass(train=True, images=batch)

    def both() -> None:
        _, dy = losses.softmax_cross_entropy(ours.forward(x, step), labels, batch)
        ours.backward(dy, lambda _: None)

    jobs: dict[str, Callable[[], Any]] = {"distrib": both}
    if torch:
        import torch as pytorch

        x_t = pytorch.randn(batch, c, 3, 3).contiguous(memory_format=pytorch.channels_last).requires_grad_()
        linear, wanted = pytorch.nn.Linear(c, CLASSES), pytorch.tensor(labels)

        def theirs() -> None:
            logits = linear(pytorch.nn.functional.max_pool2d(x_t, 3).flatten(1))
            pytorch.nn.functional.cross_entropy(logits, wanted).backward()

        jobs["torch"] = theirs
    return take_turns(jobs, repeats)


def optimizer(model: ResNet9, repeats: int, torch: bool) -> Times:
    """An Adam step over all parameters."""
    adam = Adam(model.params)
    jobs: dict[str, Callable[[], Any]] = {"distrib": lambda: adam.step(1e-3)}
    if torch:
        import torch as pytorch

        from launch.torch_resnet9 import TorchResNet9

        theirs = TorchResNet9(width=model.head.channels / 256)
        for parameter in theirs.parameters():
            parameter.grad = pytorch.zeros_like(parameter)
        jobs["torch"] = pytorch.optim.Adam(theirs.parameters()).step
    return take_turns(jobs, repeats)


def ops(
    batch_size: BatchSize = 64,
    width: Width = 1.0,
    repeats: Repeats = 7,
    against: Annotated[
        str | None, typer.Option(help="torch: the same operations in PyTorch, channels-last.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Each operation of a training step at each shape, with every form of convolution and its error.

    Example: distrib bench ops --batch-size 32 --against torch
    """
    if against not in (None, "torch"):
        raise UserError(f"--against {against}: choose torch, or leave it out")
    if repeats < 1:
        raise UserError(f"--repeats {repeats}: give 1 or more")
    refuse_launcher("distrib bench ops")
    build({"batch_size": batch_size, "width": width})  # refuses what no run could have
    if torch := against == "torch":
        require_torch("--against torch")
    model, seen = ResNet9(width=width), set()
    result: dict[str, Any] = {
        "machine": machine(),
        "batch_size": batch_size,
        "width": width,
        "matrix_peak_gflops": matrix_peak(),
        "layers": [],
    }
    say = (lambda _: None) if as_json else print
    say(
        f"{result['machine']}; batch {batch_size}, width {width}, float32, matrix product"
        f" {result['matrix_peak_gflops']:.0f} GFLOP/s; ms, forward + backward"
    )
    for conv, side, added in layers(model):
        shape = side, conv.c_in, conv.c_out
        row: dict[str, Any] = {
            "name": conv.name,
            "side": side,
            "channels": [conv.c_in, conv.c_out],
            "residual": added,
        }
        say(f"{conv.name}: {side}×{side}, {conv.c_in}→{conv.c_out}")
        if shape not in seen:
            seen.add(shape)
            row["convolution"] = found = convolution(side, conv, batch_size, repeats, torch)
            for form in ("patches", "winograd", *(["torch"] if torch else [])):
                ms = found["ms"]
                work = found["gflop"] * (3 if conv.c_in > 1 else 2)
                rate = 1e3 * work / sum(statistics.median(ms[f"{form} {way}"]) for way in WAYS)
                note = f", chosen, error {found['error']:.1e}" if form == found["chosen"] else ""
                say(f"    {'convolution, ' + form:44} {pair(ms, form)}   {rate:.0f} GFLOP/s{note}")
        row["batch_norm_ms"] = batch_norm(side, conv, added, batch_size, repeats, torch)
        label = "batch norm, " + ("residual, " if added else "") + "ReLU, " + ("pool, " if conv.pool else "")
        for name in ("distrib", *(["torch"] if torch else [])):
            say(f"    {label + name:44} {pair(row['batch_norm_ms'], name)}")
        result["layers"].append(row)
    for name, found in (
        ("head_ms", head(model, batch_size, repeats, torch)),
        ("adam_ms", optimizer(model, repeats, torch)),
    ):
        result[name] = found
        say(
            f"{name.removesuffix('_ms')}: "
            + ", ".join(f"{side} {spread(ms, 3)}" for side, ms in found.items())
        )
    if as_json:
        print(json.dumps(result, indent=2))


def pair(times: Times, name: str) -> str:
    """Forward + backward, each with its spread."""
    return " + ".join(spread(times[f"{name} {way}"], 3) for way in WAYS)
