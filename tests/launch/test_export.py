"""`distrib export`: other programs get the same logits, and what would be wrong is never written."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import train_each
from networks import NETWORKS
from safetensors import safe_open

from distrib import __version__
from distrib.data import formats
from distrib.export import NODES, TOLERANCE, build, compare
from distrib.predict import Loaded, load, logits
from distrib.run import checkpoint as ckpt
from distrib.run.model_spec import network_arguments
from launch import export as module
from launch.export import export
from nn.layer import StepContext
from nn.layers import Residual
from nn.network import Model, Network
from nn.resnet9 import VARIANTS

pytestmark = pytest.mark.needs("onnx")

STEPS, IMAGES = 12, 200
RUNS = {
    **{name: ("--variant", name) for name in VARIANTS},
    "bce": ("--loss", "bce", "--width", 0.1),
    "float64": ("--precision", "float64"),
    "lenet": ("--model", "lenet"),
    "mlp": ("--model", "mlp"),
    "resnet20": ("--model", "resnet20", "--width", 0.25),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a short run, by its name in RUNS."""
    folder = tmp_path_factory.mktemp("trained")
    short = ("--epochs", 1, "--limit-train", 32 * STEPS, "--limit-test", 20, "--batch-size", 32, "--lr", 0.01)
    train_each(*(("--run-dir", folder / name, *short, "--width", 0.0625, *RUNS[name]) for name in RUNS))
    return folder.joinpath


@pytest.fixture
def call(command_line):
    return partial(command_line, export)


def pixels() -> np.ndarray:
    return formats.load(limit_train=1, limit_test=IMAGES).test_images


def ours(loaded: Loaded) -> np.ndarray:
    """Logits of the test images, in batches as they come."""
    images = pixels()
    return np.concatenate([logits(loaded.model, images, start, start + 50) for start in range(0, IMAGES, 50)])


def assert_near(theirs: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(theirs - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("model", NETWORKS.values(), ids=NETWORKS)
def test_every_layer_has_its_nodes(model: Model) -> None:
    """Of networks that a person may write, with running statistics of a few steps."""
    shape, classes = (17, 22, 2), 7
    rng, network = np.random.default_rng(3), Network(model, shape, classes, seed=1)
    x = network.buffers.image("input", (20, *shape))
    for _ in range(3):
        x[...] = rng.random(x.shape)
        network.forward(x, StepContext(True, 20))
    spec = {"model": "own", "loss": "ce", "class_names": list("abcdefg")}
    loaded = Loaded(Path("own"), network, spec)
    images = rng.integers(0, 256, (30, *shape), np.uint8)
    difference, others = compare(build(loaded).SerializeToString(), loaded, images)
    assert difference <= TOLERANCE
    assert others == 0


@pytest.mark.parametrize("name", RUNS)
def test_onnxruntime_gives_our_logits(name: str, trained, call, tmp_path: Path) -> None:
    import onnxruntime

    out = tmp_path / "model.onnx"
    code, said, err = call(trained(name), out, "--limit-test", IMAGES)
    assert code == 0, err
    assert f"checked with onnxruntime on {IMAGES} images of MNIST" in said
    assert ("note: the checkpoint is in float64, the graph in float32" in said) == (name == "float64")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    loaded = load(trained(name))
    means = [value for name, value in loaded.model.running.items() if name.endswith("mean")]
    assert all(np.abs(mean).max() > 1e-3 for mean in means)  # nothing trivial is compared
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    (images,), (output,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(float)", ["N", 1, 28, 28])
    assert (output.name, output.type, output.shape) == ("logits", "tensor(float)", ["N", 10])
    x, expected = pixels().transpose(0, 3, 1, 2).astype(np.float32) / 255, ours(loaded)
    assert_near(session.run(None, {"images": x})[0], expected)
    assert_near(session.run(None, {"images": x[:1]})[0], expected[:1])


def test_metadata(trained, call, tmp_path: Path) -> None:
    """Both formats tell variant, width, loss, step, version; the ONNX file what to do with the logits."""
    expected = {
        "model": "resnet9",
        "shape": "[28, 28, 1]",
        "class_names": str([str(digit) for digit in range(10)]),
        "variant": "baseline",
        "width": "0.1",
        "loss": "bce",
        "dtype": "float32",
        "step": str(STEPS),
        "version": __version__,
    }
    for ending in ("onnx", "safetensors"):
        assert call(trained("bce"), tmp_path / f"model.{ending}", "--no-check")[0] == 0
    import onnx

    model = onnx.load(tmp_path / "model.onnx")
    assert {entry.key: entry.value for entry in model.metadata_props} == expected
    assert "probabilities are their sigmoid" in model.doc_string
    assert model.opset_import[0].version == 17
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt", **expected}


@pytest.mark.needs("torch")
@pytest.mark.parametrize("name", RUNS)
def test_pytorch_takes_the_tensors(name: str, trained, call, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from launch.torch_peer.network import TorchNetwork

    out = tmp_path / "model.safetensors"
    code, _, err = call(trained(name), out)
    assert code == 0, err
    loaded = load(trained(name))
    with safe_open(out, framework="numpy") as file:
        held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert ckpt.digest(held) == ckpt.digest(ckpt.load_model(loaded.path)[0])
    *given, options = network_arguments(loaded.model_spec)
    model = TorchNetwork(*given, **options).eval().to(getattr(torch, loaded.model_spec["dtype"]))
    model.load_state_dict(load_file(out), strict=True)
    with torch.no_grad():
        x = torch.from_numpy(pixels().transpose(0, 3, 1, 2) / 255).to(
            getattr(torch, loaded.model_spec["dtype"])
        )
        assert_near(model(x).numpy(), ours(loaded))


def swap(model) -> None:
    """Exchange the weights of two layers."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    tensors["res1.0.0.weight"].raw_data, tensors["res1.1.0.weight"].raw_data = (
        tensors["res1.1.0.weight"].raw_data,
        tensors["res1.0.0.weight"].raw_data,
    )


def node(model, name: str):
    return next(node for node in model.graph.node if node.name == name)


def short_cut(model) -> None:
    """Leave the first residual's addition out."""
    node(model, "res1.relu").input[0] = "res1.1.1.norm"


def average(model) -> None:
    node(model, "head.pool").op_type = "GlobalAveragePool"


def epsilon(model) -> None:
    node(model, "stem.1.norm").attribute[0].f = 1e-3


def no_relu(model) -> None:
    node(model, "stage2.3.pool").input[0] = "stage2.1.norm"


def constant(model) -> None:
    """A batch norm that gives no number."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    tensors["stem.1.running_var"].raw_data = np.full(4, np.nan, np.float32).tobytes()


def test_a_layer_without_onnx_nodes_is_named(
    trained, call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(NODES, Residual)
    code, _, err = call(trained("baseline"), tmp_path / "model.onnx")
    assert code == 2
    assert err == "distrib: error: res1: no ONNX nodes are known for Residual: export to .safetensors\n"


@pytest.mark.parametrize("fault", [swap, short_cut, average, epsilon, no_relu, constant])
def test_a_wrong_graph_is_found_and_not_written(
    fault, trained, call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = module.build

    def wrong(loaded: Loaded):
        model = plain(loaded)
        fault(model)
        return model

    monkeypatch.setattr(module, "build", wrong)
    out = tmp_path / "model.onnx"
    for before in (None, b"an earlier one"):
        if before:
            out.write_bytes(before)
        code, _, err = call(trained("baseline"), out, "--limit-test", IMAGES)
        assert code == 2
        assert "differ from the checkpoint's" in err
        assert len(err.splitlines()) == 1
        assert (out.read_bytes() if out.exists() else None) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("RUN", "OUT/model.bin"), "model.bin: an unknown ending: give .onnx or .safetensors"),
        (("RUN", "OUT/model"), "model: an unknown ending"),
        (("RUN", "OUT/model.onnx", "--format", "pt"), "--format pt: choose onnx or safetensors"),
        (("RUN", "OUT/no/model.onnx"), "no/model.onnx: there is no folder"),
        (("RUN", "OUT/folder.onnx"), "folder.onnx: is a folder"),
        (("RUN", "OUT/model.onnx", "--limit-test", 0), "--limit-test 0: give 1 or more"),
        (("RUN", "OUT/model.onnx", "--data", "nowhere"), "--data nowhere: no such folder"),
        (
            ("OUT/damaged.safetensors", "OUT/model.onnx"),
            "damaged.safetensors: damaged: its checksum does not match",
        ),
        (("OUT/damaged.safetensors", "OUT/model.safetensors"), "damaged.safetensors: damaged"),
        (("OUT/copy.safetensors", "OUT/copy.safetensors"), "copy.safetensors: is a checkpoint"),
        (("RUN", "RUN/checkpoints/step-00000012.safetensors"), "step-00000012.safetensors: is a checkpoint"),
        (
            ("OUT/copy.safetensors", "RUN/checkpoints/step-00000012.safetensors"),
            "step-00000012.safetensors: is a checkpoint",
        ),
        (("nowhere", "OUT/model.onnx"), "nowhere: no such file"),
        (("RUN", "/proc/model.safetensors"), "/proc/model.safetensors: cannot be written"),
    ],
)
def test_mistakes(arguments: tuple, words: str, trained, call, tmp_path: Path) -> None:
    run = trained("baseline")
    whole = load(run).path.read_bytes()
    (tmp_path / "copy.safetensors").write_bytes(whole)
    (tmp_path / "damaged.safetensors").write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    (tmp_path / "folder.onnx").mkdir()
    before = sorted(tmp_path.iterdir())
    code, out, err = call(
        *(str(word).replace("RUN", str(run)).replace("OUT", str(tmp_path)) for word in arguments)
    )
    assert code == 2
    assert err.startswith("distrib: error: ")
    assert words in err
    assert len(err.splitlines()) == 1
    assert out == ""
    assert sorted(tmp_path.iterdir()) == before


def test_without_the_libraries(trained, call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without onnxruntime a note, unless the check is asked for; without onnx one line with the remedy."""
    find, missing = importlib.util.find_spec, {"onnxruntime"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name in missing else find(name, *more)
    )
    out = tmp_path / "model.onnx"
    code, said, _ = call(trained("baseline"), out)
    assert code == 0
    assert "note: not checked" in said
    out.unlink()
    code, _, err = call(trained("baseline"), out, "--check")
    assert (code, err) == (2, "distrib: error: onnxruntime is not installed: pip install 'distrib[report]'\n")
    missing.add("onnx")
    code, _, err = call(trained("baseline"), out)
    assert (code, err) == (2, "distrib: error: onnx is not installed: pip install 'distrib[report]'\n")
    assert not out.exists()
    assert call(trained("baseline"), tmp_path / "plain", "--format", "safetensors")[0] == 0
