"""`distrib export`: a checkpoint as an ONNX graph, or tensors for PyTorch. ONNX needs the extra `report`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distrib.export import OPSET, build, compare, format_of, require_equal, require_free, to_safetensors
from distrib.files import require, write
from distrib.predict import Loaded, load
from launch.entry import Model, OwnModel, number, one_process
from launch.report.records import shown
from launch.report.runs import load_data

if TYPE_CHECKING:
    from onnx import ModelProto


def check_onnx(made: ModelProto, loaded: Loaded, data: str | None, limit: int | None) -> str:
    """Compare with our own logits on the test set: a line that says how near they are, or UserError."""
    test = load_data(loaded, data, limit)
    loaded.require_fit(test)
    difference, others = compare(made.SerializeToString(), loaded, test.test_images)
    require_equal(difference, loaded)
    return (
        f"checked with onnxruntime on {len(test.test_images)} images of {shown(test.name)}: logits differ by"
        f" at most {difference:.1e} of the largest, and {others or 'no'} images get another class"
    )


@one_process
def export(
    checkpoint: Model,
    out: Annotated[Path, typer.Argument(help="The file to write: NAME.onnx or NAME.safetensors.")],
    format: Annotated[
        str | None, typer.Option(help="onnx or safetensors.", show_default="by the ending of OUT")
    ] = None,
    check: Annotated[
        bool | None,
        typer.Option(
            "--check/--no-check",
            help="Compare an ONNX graph's logits with our own before it is written.",
            show_default="where onnxruntime is installed",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="The data set of the check, as for train.", show_default="the run's own"),
    ] = None,
    limit_test: Annotated[
        int | None, number("--limit-test", "Check with the first N test images only.", show_default="all")
    ] = None,
    model: OwnModel = None,
) -> None:
    """Write a checkpoint for other programs: an ONNX graph, or tensors for PyTorch's `load_state_dict`.

    The ONNX graph takes `images`, float32 N×C×H×W in [0, 1], and gives `logits`, N×classes: softmax (or, of a
    model trained with --loss bce, sigmoid) is left to the caller. Examples:

      distrib export runs/first digits.onnx

      distrib export runs/first digits.safetensors
    """
    kind = format_of(out, format)
    if kind == "onnx":
        require("onnx")
        if check:
            require("onnxruntime")
    found = load(checkpoint, model)
    require_free(out, found.path)
    spec, dtype, notes = found.model_spec, found.model_spec["dtype"], []
    network = spec["variant"] if spec["model"] == "resnet9" else spec["model"]
    if kind == "safetensors":
        content = to_safetensors(found)
        notes.append(
            "tensors are those of the checkpoint to the bit; load_state_dict takes them with strict=True"
        )
    else:
        from onnx import checker

        made = build(found)
        checker.check_model(made, full_check=True)
        if check or (check is None and importlib.util.find_spec("onnxruntime")):
            notes.append(check_onnx(made, found, data, limit_test))
        elif check is None:
            notes.append(
                "note: not checked against our own logits: onnxruntime is missing:"
                " pip install 'distrib[report]'"
            )
        if dtype != "float32":
            notes.append(f"note: the checkpoint is in {dtype}, the graph in float32")
        content, dtype = made.SerializeToString(), f"opset {OPSET}, float32"
    write(out, content)
    print(
        f"{shown(str(found.path))} → {shown(str(out))}: {kind}, {len(content) / 1e6:.2f} MB,"
        f" {shown(network)}, width {spec['width']}, {shown(found.loss)},"
        f" step {found.step}, {dtype}"
    )
    for note in notes:
        print(note)
