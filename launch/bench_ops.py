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
from launch.measure import AsJson, BatchSize, Repeats, Width, machine, matrix_peak, require_torch
from nn import functional as F
from nn.backend import Array
from nn.conv import Geometry, choose_form, conv_backward, conv_forward
from nn.layers import ConvBN, Residual
from nn.optim import Adam
from nn.resnet9 import ResNet9
from nn.workspace import Workspace

SAME = Geometry(1, 1, 1)


def layers(width: float) -> list[tuple[str, int, ConvBN]]:
    """(name, side of the image, layer) of each 3×3 convolution that occurs, shapes once."""
    found: dict[tuple[int, int, int], tuple[str, int, ConvBN]] = {}
    side = 28
    for stage in ResNet9(width=width).stages:
        for conv in stage.convs() if isinstance(stage, Residual) else [stage]:
            found.setdefault((side, conv.c_in, conv.c_out), (conv.name, side, conv))
        if isinstance(stage, ConvBN) and stage.pool:
            side //= 2
    return list(found.values())


def take_turns(jobs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each job; each repeat runs all of them, the first is not counted."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(repeats + 1):
        for name, job in jobs.items():
            begin = time.perf_counter()
            job()
            if repeat:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in times.items()}


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

        def forward(form: str = form, x: Array = x, y: Array = y, ws: Workspace = ws, saved: list = saved) -> None:
            saved[0] = conv_forward(x, w, SAME, y, ws, form)

        def backward(form: str = form, dy: Array = dy, dw: Array = dw, dx: Array = dx, ws: Workspace = ws,
                     saved: list = saved) -> None:  # fmt: skip
            conv_backward(dy, saved[0], w, SAME, dw, dx, ws, form)

        jobs |= {f"{form} forward": forward, f"{form} backward": backward}
    if torch:
        jobs |= torch_convolution(x_shape, w, conv.c_in > 1)
    chosen = choose_form(x_shape, w_shape, SAME, "HWNC")
    return {"ms": take_turns(jobs, repeats), "chosen": chosen, "gflop": 2 * batch * side**2 * w.size / 1e9,
            "error": error_of(chosen, w, side)}  # fmt: skip


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
    weight = torch.tensor(w.transpose(3, 2, 0, 1).copy()).contiguous(memory_format=torch.channels_last).requires_grad_()
    dy = torch.randn(n, w.shape[3], h, h).contiguous(memory_format=torch.channels_last)
    held: dict[str, Any] = {}

    def forward() -> None:
        held["y"] = torch.nn.functional.conv2d(x, weight, padding=1)

    def backward() -> None:
        torch.autograd.grad(held["y"], [x, weight] if need_dx else [weight], dy)

    return {"torch forward": forward, "torch backward": backward}


def batch_norm(side: int, conv: ConvBN, batch: int, repeats: int, torch: bool) -> dict[str, float]:
    """Milliseconds of batch norm → ReLU (→ max-pool), forward and backward."""
    rng, ws = np.random.default_rng(0), Workspace()
    shape = (batch, side, side, conv.c_out)
    out = (batch, side // 2, side // 2, conv.c_out) if conv.pool else shape
    z, dy = random_image(ws, "z", shape, rng), random_image(ws, "dy", out, rng)
    y, dz, gate = ws.image("y", out), ws.image("dz", shape), F.Gate(ws.image("passed", shape, "bool"))
    if conv.pool:
        gate = F.Gate(gate.passed, ws.image("top", out), ws.image("open", out, "bool"))
    gamma, count = np.ones(conv.c_out, np.float32), batch * side**2

    def forward() -> None:
        _, var = F.batch_norm_statistics(z, count, ws, None)
        F.activate(z, (var + 1e-5) ** -0.5, gamma, gamma, y, ws, pool=conv.pool, gate=gate)

    def backward() -> None:
        F.batch_norm_backward(dy, z, gamma, gamma, count, ws, None, dz, gate=gate)

    jobs: dict[str, Callable[[], Any]] = {"distrib forward": forward, "distrib backward": backward}
    if torch:
        jobs |= torch_batch_norm(shape, conv.pool)
    return take_turns(jobs, repeats)


def torch_batch_norm(shape: tuple[int, ...], pool: bool) -> dict[str, Callable[[], Any]]:
    import torch

    n, h, _, c = shape
    z = torch.randn(n, c, h, h).contiguous(memory_format=torch.channels_last).requires_grad_()
    layer = torch.nn.BatchNorm2d(c)
    held: dict[str, Any] = {}

    def forward() -> None:
        y = torch.relu(layer(z))
        held["y"] = torch.nn.functional.max_pool2d(y, 2) if pool else y

    def backward() -> None:
        torch.autograd.grad(held["y"], [z, layer.weight, layer.bias], torch.ones_like(held["y"]))

    return {"torch forward": forward, "torch backward": backward}


def optimizer(width: float, repeats: int, torch: bool) -> dict[str, float]:
    """Milliseconds of an Adam step over all parameters."""
    model = ResNet9(width=width)
    adam = Adam(model.params)
    jobs: dict[str, Callable[[], Any]] = {"distrib": lambda: adam.step(1e-3)}
    if torch:
        import torch as pytorch

        from launch.torch_resnet9 import TorchResNet9

        theirs = TorchResNet9(width=width)
        for parameter in theirs.parameters():
            parameter.grad = pytorch.zeros_like(parameter)
        jobs["torch"] = pytorch.optim.Adam(theirs.parameters()).step
    return take_turns(jobs, repeats)


def ops(
    batch_size: BatchSize = 64,
    width: Width = 1.0,
    repeats: Repeats = 7,
    against: Annotated[str | None, typer.Option(help="torch: the same operations in PyTorch, channels-last.")] = None,
    as_json: AsJson = False,
) -> None:
    """Each operation of a training step at each shape, with every form of convolution and its error.

    Example: distrib bench ops --batch-size 32 --against torch
    """
    if against not in (None, "torch"):
        raise UserError(f"--against {against}: choose torch, or leave it out")
    if repeats < 1:
        raise UserError(f"--repeats {repeats}: give 1 or more")
    build({"batch_size": batch_size, "width": width})  # refuses what no run could have
    if torch := against == "torch":
        require_torch("--against torch")
    result: dict[str, Any] = {"machine": machine(), "batch_size": batch_size, "width": width,
                              "matrix_peak_gflops": matrix_peak(), "layers": []}  # fmt: skip
    if not as_json:
        print(f"{result['machine']}; batch {batch_size}, width {width}, float32, matrix product"
              f" {result['matrix_peak_gflops']:.0f} GFLOP/s; ms forward + backward")  # fmt: skip
    for name, side, conv in layers(width):
        found = convolution(side, conv, batch_size, repeats, torch)
        norm = batch_norm(side, conv, batch_size, repeats, torch)
        result["layers"].append({"name": name, "side": side, "channels": [conv.c_in, conv.c_out],
                                 "convolution": found, "batch_norm_ms": norm})  # fmt: skip
        if as_json:
            continue
        print(f"{name}: {side}×{side}, {conv.c_in}→{conv.c_out}; convolution by {found['chosen']}, error {found['error']:.1e}")
        for form in ("patches", "winograd", *(["torch"] if torch else [])):
            forward, backward = (found["ms"][f"{form} {way}"] for way in ("forward", "backward"))
            work = found["gflop"] * (3 if conv.c_in > 1 else 2)
            print(f"    {form:10} {forward:8.2f} + {backward:8.2f}   {1e3 * work / (forward + backward):6.0f} GFLOP/s")
        label = "batch norm, ReLU, pool" if conv.pool else "batch norm, ReLU"
        for side_name in ("distrib", *(["torch"] if torch else [])):
            print(f"    {label + ', ' + side_name:32} {norm[f'{side_name} forward']:8.2f} + {norm[f'{side_name} backward']:8.2f}")
    result["adam_ms"] = optimizer(width, repeats, torch)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        print("Adam: " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in result["adam_ms"].items()))
