"""A validation set held back from training: what epochs report, which model a run ends with, when it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import before_each_step, metrics, run, summary, train, train_each

from distrib.data.dataset import Dataset, make
from distrib.errors import UserError
from distrib.loop import best_of
from distrib.predict import load
from distrib.run import checkpoint as ckpt
from launch import evaluate as evaluating

DATA = ("--data", "synthetic:170x12x12x1:3", "--limit-train", 150)
OPTIONS = ("--model", "mlp", "--width", 0.1, "--batch-size", 25, *DATA, "--validation", 0.2)
HELD = 30


def epochs(folder: Path) -> list[dict[str, Any]]:
    return [line for line in metrics(folder) if "train_loss" in line]


def a_set(counts: dict[int, int]) -> Dataset:
    labels = np.repeat(list(counts), list(counts.values()))
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    return make("set", (images, labels), (images[:1], labels[:1]), tuple("abc"))


@pytest.mark.quick
def test_held_back_by_class_and_seed() -> None:
    whole = a_set({0: 40, 1: 20, 2: 60})
    part = whole.hold_back(0.25, seed=1)
    assert part.validation_images is not None
    assert part.validation_labels is not None
    assert np.bincount(part.validation_labels).tolist() == [10, 5, 15]
    assert np.bincount(part.train_labels).tolist() == [30, 15, 45]
    both = np.concatenate([part.train_images, part.validation_images])[:, 0, 0, 0]
    assert sorted(both) == list(range(120)), "each image is in one of them"
    assert (np.diff(part.train_images[:, 0, 0, 0].astype(int)) > 0).all(), "in their old order"
    assert part.digest() == whole.hold_back(0.25, seed=1).digest()
    digests = {whole.hold_back(share, seed).digest() for share in (0.25, 0.5) for seed in (1, 2)}
    assert len({*digests, whole.digest()}) == 5
    with pytest.raises(UserError, match=r"--validation 0\.001: holds back none of 120 training images"):
        whole.hold_back(0.001, 0)
    with pytest.raises(UserError, match=r"--validation 0\.999: holds back all of 120 training images"):
        whole.hold_back(0.999, 0)


@pytest.mark.quick
def test_which_epoch_is_the_best() -> None:
    """The most accurate; of equals the one of the lower loss; of those the first."""
    known: dict[str, float] = {}
    best = []
    for epoch, (accuracy, loss) in enumerate([(50, 2), (60, 3), (60, 3), (60, 2.5), (55, 0.1), (70, 9)], 1):
        known = best_of(known, {"validation_accuracy": accuracy, "validation_loss": loss}, epoch)
        assert (known["validation_accuracy"], known["validation_loss"]) == (accuracy, loss)
        best.append(known["best_epoch"])
    assert best == [1, 2, 2, 4, 4, 6]
    assert (known["best_validation_accuracy"], known["best_validation_loss"]) == (70, 9)


def test_epochs_report_on_it_and_the_test_set_comes_last(tmp_path: Path) -> None:
    """Alike on two ranks; a stop says nothing of the test set."""
    options = (*OPTIONS, "--epochs", 3, "--precision", "float64")
    train(tmp_path / "one", *options)
    train(tmp_path / "two", *options, "--max-steps", 8, ranks=2)
    assert summary(tmp_path / "two")["test_accuracy"] is None
    train(tmp_path / "two", *options, ranks=2)
    for folder in (tmp_path / "one", tmp_path / "two"):
        lines, found = epochs(folder), summary(folder)
        assert [line["step"] for line in lines] == [5, 10, 15], "120 images are left to train on"
        assert all({"validation_loss", "validation_accuracy", "best_epoch"} <= line.keys() for line in lines)
        assert not any("test_loss" in line for line in metrics(folder))
        assert found["test_loss"] is not None
        assert found["validation_accuracy"] == lines[-1]["validation_accuracy"]
        assert found["validation_accuracy"] * HELD / 100 == pytest.approx(
            round(found["validation_accuracy"] * HELD / 100)
        )
        config = json.loads((folder / "config.json").read_text())
        assert config["dataset"]["validation_images"] == HELD
        assert not (folder / "checkpoints" / ckpt.BEST).exists()
    one, two = summary(tmp_path / "one"), summary(tmp_path / "two")
    for name in ("validation_loss", "test_loss", "train_loss", "best_validation_loss"):
        assert two[name] == pytest.approx(one[name], rel=1e-9)


def worse_from(epoch: int) -> str:
    """A program that trains, and from the end of `epoch` on has weights that answer one class."""
    return before_each_step(f"self.params.values.fill(0) if self.progress.step >= {5 * epoch} else None")


@pytest.mark.parametrize("more", [(), ("--average", 0.5)], ids=["plain", "averaged"])
def test_the_best_epochs_model_is_what_a_run_ends_with(
    tmp_path: Path, command_line: Any, more: tuple[Any, ...]
) -> None:
    options = (*OPTIONS, *more)
    folder = tmp_path / "run"
    run("-c", worse_from(2), "--run-dir", folder, *options, "--epochs", 4, "--keep-best", "--keep", 1)
    found, lines = summary(folder), epochs(folder)
    best = int(found["best_epoch"])
    assert best in (1, 2)
    assert lines[-1]["validation_accuracy"] < found["best_validation_accuracy"]
    assert found["best_validation_accuracy"] == lines[best - 1]["validation_accuracy"]
    loaded = load(folder)
    assert (loaded.path, loaded.step) == (folder / "checkpoints" / ckpt.BEST, 5 * best)
    assert ckpt.digest(loaded.model.state_dict()) == found["parameter_digest"]
    code, said, _ = command_line(evaluating.evaluate, folder, "--json")
    assert code == 0
    assert json.loads(said)["test_accuracy"] == pytest.approx(found["test_accuracy"])
    assert json.loads(said)["test_loss"] == pytest.approx(found["test_loss"], rel=1e-6)
    assert [path.name for path in ckpt.list_checkpoints(folder / "checkpoints")] == [
        "step-00000020.safetensors"
    ]


def test_resume_ends_alike(tmp_path: Path) -> None:
    """Best epoch, its model and patience are taken up, on two ranks too."""
    options = (*OPTIONS, "--epochs", 4, "--keep-best", "--patience", 2)
    parts = ("--run-dir", tmp_path / "parts", *options)
    stopped = ((*parts, "--max-steps", steps) for steps in (3, 7, 10, 14))
    train_each(("--run-dir", tmp_path / "whole", *options), *stopped, parts)
    expected, found = summary(tmp_path / "whole"), summary(tmp_path / "parts")
    for name in ("parameter_digest", "test_loss", "best_epoch", "best_validation_loss", "finished", "steps"):
        assert found[name] == expected[name]
    train(tmp_path / "two", *options, ranks=2)
    two = summary(tmp_path / "two")
    assert len(set(two["rank_digests"])) == 1
    assert two["best_validation_loss"] == pytest.approx(expected["best_validation_loss"], rel=1e-3)


def step(folder: Path, number: int) -> Path:
    return ckpt.model_path(folder / "checkpoints", number)


def test_a_resume_from_elsewhere(tmp_path: Path) -> None:
    """The best model comes along; where it is not there, it is not taken for the best."""
    options = (*OPTIONS, "--keep-best", "--epochs", 3)
    train(tmp_path / "run", *options, "--keep", 9)
    train(tmp_path / "moved", *options, "--resume", step(tmp_path / "run", 10))
    one, other = summary(tmp_path / "run"), summary(tmp_path / "moved")
    for name in ("parameter_digest", "best_epoch", "test_loss"):
        assert one[name] == other[name]
    (tmp_path / "run" / "checkpoints" / ckpt.BEST).unlink()
    done = train(tmp_path / "again", *options, "--resume", step(tmp_path / "run", 10))
    said = " ".join(done.stdout.split())
    assert "the model of the best epoch so far is not there: that of an epoch to come is kept" in said
    assert summary(tmp_path / "again")["best_epoch"] == 3
    assert load(tmp_path / "again").step == 15


def test_patience(tmp_path: Path) -> None:
    """It ends two epochs after the best one, finished, and is not resumed."""
    folder = tmp_path / "run"
    options = (*OPTIONS, "--epochs", 9, "--patience", 2)
    run("-c", worse_from(2), "--run-dir", folder, *options)
    found = summary(folder)
    assert found["finished"]
    assert found["epochs"] == found["best_epoch"] + 2 < 9
    assert found["test_loss"] is not None
    assert (folder / "logits.safetensors").exists()
    again = train(folder, *options, check=False)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "holds a finished run" in again.stderr
    run("-m", "launch.cli", "report", folder)
    assert "validation" in (folder / "report.html").read_text()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"keep_best": True}, "--keep-best True: needs --validation above 0"),
        ({"patience": 3}, "--patience 3: needs --validation above 0"),
        ({"patience": 0, "validation": 0.1}, "--patience 0: give 1 or more"),
        ({"validation": 1.0}, "--validation 1.0: give less than 1"),
    ],
)
def test_options_that_do_not_fit(given: dict[str, Any], words: str) -> None:
    from distrib.config import build

    with pytest.raises(UserError, match=words):
        build(given)
