"""Networks beside ResNet-9: those that ship and those in a file of one's own, from the command line on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import losses, metrics, run, summary, train
from test_torch_parity import difference, import_torch

from distrib import models
from distrib.errors import UserError
from launch import evaluate as evaluating
from launch import export as exporting
from nn.layer import StepContext
from nn.models import MODELS
from nn.network import Network
from nn.ops.loss import softmax_cross_entropy
from nn.optim import SGD

OWN = '''
from layers_beside import wide
from nn.layers import *

def net(shape, classes, width=1.0):
    """Every kind of layer there is."""
    return Sequential(
        Conv(6, kernel=4, stride=2, padding=1), LeakyReLU(0.1), MaxPool(3, stride=2, padding=1),
        Residual(BatchNorm(), ReLU(), Conv(6, bias=False), BatchNorm()),
        Residual(ConvBN(6), Conv(6, dilation=2)), AvgPool(2, stride=1), Dropout(0.25),
        ConvBN(wide(width), pool=2), Flatten(), Linear(12), BatchNorm(), ReLU(), Dropout(), Linear(classes))

def few(shape, classes):
    return Sequential(GlobalAvgPool(), Linear(classes))

def small(shape, classes):
    return Sequential(*(ConvBN(4, pool=2) for _ in range(5)), GlobalAvgPool(), Linear(classes))

def number(shape, classes):
    return 3

def fails(shape, classes):
    return Sequential(Linear(undefined))

def leaves(shape, classes):
    raise SystemExit(0)

def floaty(shape, classes, width=1.0):
    return Sequential(Flatten(), Linear(8 * width), Linear(classes))

def broken(shape, classes):
    class Broken(ReLU):
        def infer(self, shape): return undefined
    return Sequential(Broken(), Flatten(), Linear(classes))

def open_ended(shape, classes, **options):
    return Sequential(Flatten(), Linear(round(8 * options["width"])), Linear(classes))

def strange(shape):
    return few(shape, 5)

not_one = 3
'''
DATA = ("--data", "synthetic:130x20x18x3:5")
OPTIONS = (
    *("--epochs", 2, "--batch-size", 24, "--lr", 0.01, "--log-every", 1, "--precision", "float64", *DATA),
    *("--optimizer", "sgd"),
)


@pytest.fixture
def own(tmp_path: Path) -> str:
    """FILE.py of several functions, which imports from beside it."""
    (tmp_path / "layers_beside.py").write_text("def wide(width): return round(7 * width)\n")
    (tmp_path / "nets.py").write_text(OWN)
    return str(tmp_path / "nets.py")


def test_ranks_do_not_matter(own: str, tmp_path: Path) -> None:
    """Dropout draws by image; every layer sums over the global batch."""
    name = f"{own}:net"
    for ranks in (1, 2, 3):
        train(tmp_path / str(ranks), *OPTIONS, "--model", name, ranks=ranks)
    one = tmp_path / "1"
    for ranks in ("2", "3"):
        np.testing.assert_allclose(losses(tmp_path / ranks), losses(one), rtol=1e-9)
        for field in ("test_loss", "train_loss", "train_accuracy", "test_accuracy"):
            assert summary(tmp_path / ranks)[field] == pytest.approx(summary(one)[field], rel=1e-9)
        assert len(set(summary(tmp_path / ranks)["rank_digests"])) == 1
    assert metrics(one)[-1]["train_loss"] < metrics(one)[0]["loss"]


def test_resume_to_the_bit_and_the_files_change_is_said(own: str, tmp_path: Path) -> None:
    options = (*OPTIONS, "--model", f"{own}:net")
    train(tmp_path / "whole", *options)
    train(tmp_path / "parts", *options, "--max-steps", 4)
    refused = train(tmp_path / "parts", *OPTIONS, check=False)
    assert refused.returncode == 2
    assert "--model resnet9 (the run has " in refused.stderr
    train(tmp_path / "parts", *options, "--max-steps", 9)
    Path(own).write_text(OWN + "# a remark\n")
    done = train(tmp_path / "parts", *options)
    assert "results agree only within rounding: model file: " in done.stdout
    assert summary(tmp_path / "parts")["parameter_digest"] == summary(tmp_path / "whole")["parameter_digest"]


def test_resume_with_a_file_that_was_renamed(own: str, tmp_path: Path) -> None:
    """It is the same network as long as the file and the function are; the message says what to do."""
    train(tmp_path / "whole", *OPTIONS, "--model", f"{own}:net")
    for name in ("parts", "other"):
        train(tmp_path / name, *OPTIONS, "--model", f"{own}:net", "--max-steps", 4)
    new = Path(own).rename(tmp_path / "renamed.py")
    done = train(tmp_path / "parts", *OPTIONS, "--model", f"{new}:net", "--max-steps", 7)
    assert "results agree only within rounding" not in done.stdout
    refused = train(tmp_path / "parts", *OPTIONS, "--model", f"{new}:few", check=False)
    assert f"--model {new}:few (the run has renamed.py:net): give" in refused.stderr
    train(tmp_path / "parts", *OPTIONS, "--model", f"{new}:net")
    digests = [summary(tmp_path / name)["parameter_digest"] for name in ("parts", "whole")]
    assert digests[0] == digests[1]
    new.write_text(OWN + "# a remark\n")
    for command in (
        (tmp_path / "other", *OPTIONS),
        (tmp_path / "fresh", *OPTIONS, "--resume", tmp_path / "other" / "checkpoints"),
    ):
        refused = train(*command, "--model", f"{new}:net", check=False)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert "nets.py:net" in refused.stderr
        assert "; its file was renamed and changed: undo one of both" in refused.stderr


def test_a_stored_run_runs_no_file(own: str, tmp_path: Path, command_line: Any) -> None:
    """Only a file that is named on the command line is run."""
    name, folder = f"{own}:net", tmp_path / "run"
    train(folder, *OPTIONS, "--epochs", 1, "--model", name)
    mark = tmp_path / "ran"
    Path(own).write_text(f"import pathlib; pathlib.Path({str(mark)!r}).touch()\n{OWN}")
    commands = {
        "evaluate": (evaluating.evaluate, folder),
        "export": (exporting.export, folder, tmp_path / "net.safetensors"),
    }
    for command in commands.values():
        code, _, err = command_line(*command)
        assert code == 2
        assert err.count("\n") == 1
        assert f"its network is {name}: give that with --model, if you trust it" in err
    run("-m", "launch.cli", "report", folder)
    assert not mark.exists()
    for command in commands.values():
        code, _, err = command_line(*command, "--model", name)
        assert code == 0, err
    assert mark.exists()
    assert summary(folder)["test_accuracy"] == pytest.approx(
        float(command_line(*commands["evaluate"], "--model", name)[1].split("accuracy ")[1].split(" %")[0]),
        abs=0.005,
    )


BAD_NETWORKS = [
    ("FILE:number", "returns int, no layer: return Sequential(…)"),
    ("FILE:fails", "line 23: NameError: name 'undefined' is not defined: mend the file"),
    ("FILE:leaves", "line 26: SystemExit: 0: mend the file"),
    ("FILE:strange", "TypeError: strange() takes 1 positional argument but 2 were given: mend the file"),
    ("FILE:floaty", "1: Linear(8.0): give a whole number, 1 or more"),
    ("FILE:broken", "NameError: name 'undefined' is not defined: mend the file"),
    ("FILE:absent", "nets.py has no function absent: define it"),
    ("FILE:not_one", "nets.py has no function not_one: define it"),
    ("FILE", "give resnet9, mlp, lenet, resnet20 or FILE.py:FUNCTION"),
    ("FILE:", "give resnet9, mlp, lenet, resnet20 or FILE.py:FUNCTION"),
    ("alexnet", "give resnet9, mlp, lenet, resnet20 or FILE.py:FUNCTION"),
    ("absent.py:net", "there is no file"),
    (
        "FILE:small",
        "4.3: MaxPool gets 1×1×4, smaller than its window",
    ),
]
"""What --model may be given, and words of the message."""


def test_bad_networks(own: str, tmp_path: Path) -> None:
    """One line each, and nothing is written."""
    code = """
import json, sys
from distrib.train import main
for sys.argv[1:] in json.loads(sys.argv[1]):
    assert main() == 2
"""
    names = [name.replace("FILE", own) for name, _ in BAD_NETWORKS]
    options = ("--run-dir", tmp_path / "run", *OPTIONS, "--model")
    done = run("-c", code, json.dumps([[*map(str, options), name] for name in names]))
    for line, name, (_, words) in zip(done.stderr.splitlines(), names, BAD_NETWORKS, strict=True):
        assert line.startswith(f"distrib: error: --model {name}: ")
        assert words in line
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def net(:\n", "line 1: invalid syntax"),
        ("x = 1\nimport nothing_like_it\n", "line 2: ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("1 / 0\n", "line 1: ZeroDivisionError: division by zero: mend the file"),
        ("open('absent')\n", "line 1: FileNotFoundError"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "net.py").write_text(text)
    with pytest.raises(UserError) as found:
        models.find(f"{tmp_path / 'net.py'}:net")
    assert words in str(found.value)
    assert str(found.value).count("\n") == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--model", "mlp", "--variant", "avgpool"), "--variant avgpool: mlp has no variant: leave it out"),
        (("--model", "OWN:few", "--width", 2), "--width 2.0: "),
        (
            ("--model", "lenet", "--data", "synthetic:40x9x20x1:3"),
            "images of 9×20: lenet needs 12×12",
        ),
    ],
)
def test_options_that_a_network_does_not_take(
    own: str, tmp_path: Path, options: tuple[Any, ...], words: str
) -> None:
    given = [str(each).replace("OWN", own) for each in options]
    done = train(tmp_path / "run", "--epochs", 1, "--limit-train", 40, *given, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert words in done.stderr


def test_a_recipe_and_open_options(own: str, tmp_path: Path) -> None:
    """A recipe's width is for ResNet-9; a function that takes any option is given those there are."""
    few = ("--limit-train", 32, "--limit-test", 20)
    train(tmp_path / "lenet", "--recipe", "demo", "--model", "lenet", *few)
    assert summary(tmp_path / "lenet")["parameters"] == 61_706
    train(tmp_path / "own", "--model", f"{own}:open_ended", "--width", 0.5, "--epochs", 1, *few)
    assert summary(tmp_path / "own")["parameters"] == 784 * 4 + 4 + 4 * 10 + 10


@pytest.mark.quick
def test_a_fifo_is_not_read(tmp_path: Path) -> None:
    """It would block until somebody writes."""
    os.mkfifo(tmp_path / "net.py")
    name = f"{tmp_path / 'net.py'}:net"
    assert models.digest(name) == ""
    with pytest.raises(UserError, match="there is no file"):
        models.find(name)


def test_ranks_with_different_files(own: str, tmp_path: Path) -> None:
    script = """
import os, sys
if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
    from distrib import models
    models.digest = lambda name: "another"
from distrib.train import main
sys.exit(main())
"""
    name = f"{own}:few"
    done = run("-c", script, "--run-dir", tmp_path / "run", *OPTIONS, "--model", name, ranks=2, check=False)
    assert done.returncode == 2
    assert f"has another {name} than rank 0: give all ranks the same file" in done.stderr


@pytest.mark.parametrize("name", [name for name in MODELS if name != "resnet9"])
@pytest.mark.quick
def test_pytorch_ten_steps(name: str) -> None:
    """On 3×32×32, float64, from the same weights: parameters and running statistics after ten steps."""
    torch = import_torch()
    from launch.torch_peer.network import TorchNetwork

    shape, classes, n, width = (32, 32, 3), 10, 6, 0.25
    rng = np.random.default_rng(4)
    ours = Network(MODELS[name], shape, classes, {"width": width}, seed=2, dtype="float64")
    theirs = TorchNetwork(MODELS[name], shape, classes, width=width).double()
    theirs.load_state_dict(
        {key: torch.tensor(value) for key, value in ours.state_dict().items()}, strict=True
    )
    optimizer, other = SGD(ours.params, momentum=0.9), torch.optim.SGD(theirs.parameters(), 0.01, 0.9)
    for _ in range(10):
        x, labels = ours.buffers.image("input", (n, *shape)), rng.integers(0, classes, n)
        x[...] = rng.random(x.shape)
        _, dlogits = softmax_cross_entropy(ours.forward(x, StepContext(True, n)), labels, n)
        ours.backward(dlogits, StepContext(True, n))
        optimizer.step(0.01)
        other.zero_grad()
        logits = theirs(torch.tensor(np.array(x.transpose(0, 3, 1, 2), order="C")))
        torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).backward()
        other.step()
    after = {key: value.numpy() for key, value in theirs.state_dict().items()}
    assert difference(ours.state_dict(), after) <= (1e-9,)


@pytest.mark.quick
def test_sizes() -> None:
    """As the papers have them: LeNet-5 with a full second convolution, ResNet-20 with projections."""
    counts = {
        name: Network(MODELS[name], shape, 10).params.count
        for name, shape in (("mlp", (28, 28, 1)), ("lenet", (28, 28, 1)), ("resnet20", (32, 32, 3)))
    }
    convolutions = 16 * 27 + 6 * 16 * 16 * 9 + 32 * 9 * (16 + 5 * 32) + 64 * 9 * (32 + 5 * 64)
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert counts == {
        "mlp": 784 * 512 + 512 + 512 * 256 + 256 + 2570,
        "lenet": 61_706,
        "resnet20": convolutions + norms + projections + 650,
    }
