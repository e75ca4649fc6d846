"""Makes files for other programs: an ONNX graph, or tensors for PyTorch. ONNX needs the extra `report`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distrib import __version__
from distrib.errors import UserError
from distrib.evaluate import HOST_BATCH
from distrib.files import require, require_place, shown
from distrib.predict import Loaded, logits
from distrib.run import checkpoint as ckpt
from nn.layer import Layer
from nn.layers import (
    AvgPool,
    BatchNorm,
    Conv,
    ConvBN,
    Dropout,
    Flatten,
    GlobalAvgPool,
    GlobalMaxPool,
    GlobalPool,
    LeakyReLU,
    Linear,
    MaxPool,
    Pool,
    ReLU,
    Residual,
    Sequential,
)
from nn.ops.norm import EPS

if TYPE_CHECKING:
    from onnx import ModelProto

FORMATS = ("onnx", "safetensors")
OPSET, IR = 17, 8
"""Of ONNX 1.12 (2022): all that the network needs, and what runtimes of these years read."""

TOLERANCE = 1e-5
"""Of logits, relative to the largest: ten times what float32 sums in another order were seen to make."""


class Graph:
    """The nodes of an ONNX graph in order, and its constants by their names in the `state_dict`."""

    def __init__(self, state: dict[str, np.ndarray]) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._state = state

    def constant(self, name: str) -> str:
        """The tensor `name`, in float32."""
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(self._state[name].astype(np.float32), name))
        return name

    def add(self, kind: str, inputs: list[str], y: str, **attributes: Any) -> str:
        """y = kind(*inputs); returns y."""
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [y], y, **attributes))
        return y

    def layer(self, layer: Layer, x: str) -> str:
        """The nodes of `layer`, with the running statistics, on N×C×H×W; returns what comes out."""
        if type(layer) not in NODES:
            kind = type(layer).__name__
            raise UserError(f"{layer.name}: no ONNX nodes are known for {kind}: export to .safetensors")
        return NODES[type(layer)](self, layer, x)


def sequential(graph: Graph, layer: Sequential, x: str) -> str:
    for child in layer.children():
        x = graph.layer(child, x)
    return x


def conv(graph: Graph, layer: Conv, x: str) -> str:
    stride, padding, dilation = layer.geometry
    sizes = {"kernel_shape": [layer.kernel] * 2, "strides": [stride] * 2, "dilations": [dilation] * 2}
    weights = [graph.constant(spec.name) for spec in layer.specs()]
    return graph.add("Conv", [x, *weights], f"{layer.name}.conv", pads=[padding] * 4, **sizes)


def batch_norm(graph: Graph, layer: BatchNorm, x: str) -> str:
    parts = ("weight", "bias", "running_mean", "running_var")
    norm = [graph.constant(f"{layer.name}.{part}") for part in parts]
    return graph.add("BatchNormalization", [x, *norm], f"{layer.name}.norm", epsilon=EPS)


def relu(graph: Graph, layer: ReLU, x: str) -> str:
    return graph.add("Relu", [x], f"{layer.name}.relu")


def leaky_relu(graph: Graph, layer: LeakyReLU, x: str) -> str:
    return graph.add("LeakyRelu", [x], f"{layer.name}.relu", alpha=layer.slope)


def pool(graph: Graph, layer: Pool, x: str) -> str:
    size, stride, padding = layer.over
    sizes = {"kernel_shape": list(size), "strides": [stride] * 2, "pads": [padding] * 4}
    if layer.average:
        return graph.add("AveragePool", [x], f"{layer.name}.pool", count_include_pad=1, **sizes)
    return graph.add("MaxPool", [x], f"{layer.name}.pool", **sizes)


def flatten(graph: Graph, layer: Flatten, x: str) -> str:
    return graph.add("Flatten", [x], f"{layer.name}.flat")


def dropout(_: Graph, __: Dropout, x: str) -> str:
    return x  # nothing happens in evaluation


def residual(graph: Graph, layer: Residual, x: str) -> str:
    y, added = x, graph.layer(layer.shortcut, x) if layer.shortcut else x
    for child in layer.body:
        y = graph.layer(child, y)
    return graph.add("Relu", [graph.add("Add", [y, added], f"{layer.name}.sum")], f"{layer.name}.relu")


def global_pool(graph: Graph, layer: GlobalPool, x: str) -> str:
    kind = "GlobalAveragePool" if layer.average else "GlobalMaxPool"
    return graph.add("Flatten", [graph.add(kind, [x], f"{layer.name}.pool")], f"{layer.name}.flat")


def linear(graph: Graph, layer: Linear, x: str) -> str:
    weights = [graph.constant(f"{layer.name}.{part}") for part in ("weight", "bias")]
    return graph.add("Gemm", [x, *weights], f"{layer.name}.out", transB=1)


NODES: dict[type[Layer], Callable[[Graph, Any, str], str]] = {
    Sequential: sequential,
    ConvBN: sequential,
    Conv: conv,
    BatchNorm: batch_norm,
    ReLU: relu,
    LeakyReLU: leaky_relu,
    MaxPool: pool,
    AvgPool: pool,
    Flatten: flatten,
    Dropout: dropout,
    Residual: residual,
    GlobalMaxPool: global_pool,
    GlobalAvgPool: global_pool,
    Linear: linear,
}


def build(loaded: Loaded) -> ModelProto:
    """The network as an ONNX model: images float32 (N, C, H, W) in [0, 1] → logits (N, classes), N free."""
    from onnx import TensorProto, helper

    model = loaded.model
    graph = Graph(model.state_dict())
    graph.add("Identity", [graph.layer(model.layers, "images")], "logits")
    (h, w, c), classes = model.shape, model.classes
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", c, h, w])
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes])
    after = "sigmoid" if loaded.loss == "bce" else "softmax"
    made = helper.make_model(
        helper.make_graph(
            graph.nodes, shown(loaded.model_spec["model"], 200), [images], [output], graph.constants
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR,
        producer_name="distrib",
        producer_version=__version__,
        doc_string=f"images: float32 N×{c}×{h}×{w}{', white on black' * loaded.digits}, scaled to [0, 1]."
        f" logits: N×{classes}, one for each class; probabilities are their {after}, which is left to the"
        f" caller. Classes: {', '.join(loaded.class_names)}.",
    )
    helper.set_model_props(made, description(loaded))
    return made


def description(loaded: Loaded) -> dict[str, str]:
    """What a file's metadata say of the model; `step` is the training steps that it has had."""
    return {
        **{name: str(value) for name, value in loaded.model_spec.items()},
        "step": str(loaded.step),
        "version": __version__,
    }


def compare(data: bytes, loaded: Loaded, images: np.ndarray) -> tuple[float, int]:
    """How far onnxruntime's logits of the ONNX model `data` are from ours on `images` (uint8).

    max |theirs − ours| / max |ours|, infinite where one is not finite, and the images whose class differs.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; it warns of machines without a GPU
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    largest = difference = 0.0
    others = 0
    for start in range(0, len(images), HOST_BATCH):
        stop = min(start + HOST_BATCH, len(images))
        ours = logits(loaded.model, images, start, stop)
        scaled = (
            images[start:stop].reshape(-1, *loaded.model.shape).transpose(0, 3, 1, 2).astype(np.float32) / 255
        )
        theirs = session.run(["logits"], {"images": scaled})[0]
        if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
            return np.inf, len(images)
        largest = max(largest, float(np.abs(ours).max()))
        difference = max(difference, float(np.abs(theirs - ours).max()))
        others += int((theirs.argmax(1) != ours.argmax(1)).sum())
    return difference / largest if difference else 0.0, others


def onnx_bytes(loaded: Loaded) -> bytes:
    """The network as an ONNX file, checked on random images where onnxruntime is installed."""
    require("onnx")
    from onnx import checker

    made = build(loaded)
    checker.check_model(made, full_check=True)
    data = bytes(made.SerializeToString())
    if importlib.util.find_spec("onnxruntime"):
        images = np.random.default_rng(0).integers(0, 256, (64, *loaded.model.shape), np.uint8)
        require_equal(compare(data, loaded, images)[0], loaded)
    return data


def require_equal(difference: float, loaded: Loaded) -> None:
    """UserError where a graph's logits differ from ours by more than TOLERANCE."""
    if difference > TOLERANCE:
        raise UserError(
            f"the exported graph's logits differ from the checkpoint's by {difference:.1e} of the largest,"
            f" above {TOLERANCE:.0e}: nothing was written; export to .safetensors, or report it with"
            f" {loaded.path}"
        )


def to_safetensors(loaded: Loaded) -> bytes:
    """The model's tensors by PyTorch's names, to the bit those of the checkpoint."""
    from safetensors.numpy import load as read
    from safetensors.numpy import save

    state = loaded.model.state_dict()
    data = save(state, {"format": "pt", **description(loaded)})
    assert ckpt.digest(read(data)) == ckpt.digest(state), "safetensors changed a tensor"
    return data


def format_of(out: Path, asked: str | None) -> str:
    """The format by name or by the ending of `out`; UserError where it is none of FORMATS."""
    found = asked or out.suffix.removeprefix(".").lower()
    if found not in FORMATS:
        given = f"--format {asked}" if asked else f"{out}: an unknown ending"
        raise UserError(
            f"{given}: {'choose' if asked else 'give .onnx or .safetensors, or --format'} onnx or safetensors"
        )
    return found


def require_free(out: Path, checkpoint: Path) -> None:
    """UserError where `out` cannot be a file, or is a checkpoint."""
    require_place(out)
    if out.exists() and (out.samefile(checkpoint) or ckpt.state_path(out).exists()):
        raise UserError(f"{out}: is a checkpoint: give another place")
