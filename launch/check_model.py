"""`distrib check-model`: whether a network of your own does what training relies on, layer by layer."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Annotated, Any

import typer

from distrib import models
from distrib.check_model import Finding, Row, check, describe
from distrib.data import formats
from distrib.data.dataset import Reading
from distrib.errors import EXIT_USAGE, UserError
from distrib.files import printable, shown
from launch.entry import AsJson, choice, number, one_process
from nn.layer import text
from nn.resnet9 import VARIANTS


@one_process
def check_model(
    model: Annotated[
        str, typer.Argument(help=f"{', '.join(models.MODELS)}, or {models.FORM}: your own, which is run.")
    ],
    data: Annotated[
        str | None, typer.Option(help="The data set, as for train.", show_default="MNIST")
    ] = None,
    variant: Annotated[str, choice("--variant", "Of resnet9.", *VARIANTS)] = "baseline",
    width: Annotated[float, number("--width", "Multiplier of all channel counts.", 0.001, 64, float)] = 1.0,
    size: Annotated[str | None, typer.Option(help="HxW of pictures, as for train.")] = None,
    grey: Annotated[bool, typer.Option("--grey", help="Take pictures without their colours.")] = False,
    split: Annotated[str | None, typer.Option(help="Of EMNIST's files, as for train.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check a network on a few random images of the data's shape, in float64, and name the faulty layer.

    Exit code 0 if all checks pass, else 2. What a failure means:

    **builds**: the layers do not fit together, the images, or the number of classes.

    **runs**: a pass raises an error, makes another shape than `infer` returns, or NaN.

    **precision**: a layer computes in float32 although the network is in float64: its gradients cannot be
    checked, and --precision float64 would not be any. Use self.dtype.

    **buffers**: a layer forgets to release memory, releases it twice, uses it afterwards, or overwrites its
    input: other layers get wrong numbers.

    **announcements**: a gradient is not written to its memory, or on_grad is not called once for it when it
    is complete: ranks would not sum it.

    **gradients**: a layer's backward is not the derivative of its forward, by difference quotients.

    **network**: each layer is right alone, and all together are not: one loses what it keeps for backward.

    **repeats**: the same images give something else the second time: a layer keeps state, or draws random
    numbers other than by step.keys. Runs cannot be resumed or repeated.

    **ranks**: a step on two ranks is not that of one: a layer computes on the images that a rank happens to
    have, instead of the global batch.

    **evaluation**: an image's logits depend on which images are evaluated with it.

    Examples:

      distrib check-model net.py:net --data synthetic:100x32x32x3:10

      distrib check-model resnet9 --width 0.5
    """
    function = found(model)
    loaded = formats.load(data, reading=Reading(split, size, grey))
    options = models.options_of(function, {"variant": variant, "width": width}, model)
    findings = [
        without_option(each, model) for each in check(function, loaded.shape, loaded.classes, options)
    ]
    failed = any(finding.status != "ok" for finding in findings)
    builds = findings[0].status == "ok"
    rows = describe(function, loaded.shape, loaded.classes, options) if builds else []
    if as_json:
        print(json.dumps(report(model, loaded.name, loaded.shape, loaded.classes, rows, findings), indent=2))
    else:
        print(f"{shown(model)} on {shown(loaded.name)}: {text(loaded.shape)}, {loaded.classes} classes\n")
        if rows:
            print(f"{table(rows)}\n")
        for finding in findings:
            if finding.status != "not checked":
                print(f"{finding.check:<14}{finding.status:<7} {finding.text}")
        if left := [finding.check for finding in findings if finding.status == "not checked"]:
            print(f"{'not checked':<21} {', '.join(left)}: mend first what failed")
    raise typer.Exit(EXIT_USAGE if failed else 0)


def found(model: str) -> Any:
    """The network's function; UserError without the option that other commands name it by."""
    try:
        return models.find(model)
    except UserError as error:
        raise UserError(str(error).removeprefix("--model ")) from None


def without_option(finding: Finding, model: str) -> Finding:
    """A finding without the network's name, which the first line has."""
    return replace(finding, text=finding.text.removeprefix(f"--model {printable(model, 200)}: "))


def report(
    model: str, data: str, shape: Any, classes: int, rows: list[Row], findings: list[Finding]
) -> dict[str, Any]:
    """All of it for --json."""
    return {
        "model": model,
        "data": data,
        "shape": list(shape),
        "classes": classes,
        "parameters": sum(row.parameters for row in rows),
        "flops": sum(row.flops for row in rows),
        "layers": [asdict(row) for row in rows],
        "checks": [asdict(finding) for finding in findings],
    }


def table(rows: list[Row]) -> str:
    """A line for each layer, and their sum: MFLOP are those of training on one image."""
    lines = [("layer", "kind", "input → output", "parameters", "MFLOP")]
    for row in rows:
        shapes = f"{text(row.in_shape)} → {text(row.out_shape)}"
        name, kind = shown(row.name, 40), shown(row.kind, 30)
        lines.append((name, kind, shapes, f"{row.parameters:,}", f"{row.flops / 1e6:,.2f}"))
    total = sum(row.parameters for row in rows), sum(row.flops for row in rows) / 1e6
    lines.append(("total", "", "", f"{total[0]:,}", f"{total[1]:,.2f}"))
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    return "\n".join(
        "  ".join(f"{cell:{'>' if i > 2 else '<'}{widths[i]}}" for i, cell in enumerate(line))
        for line in lines
    )
