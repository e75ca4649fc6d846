"""The number of ranks changes the speed and nothing else: runs under real MPI."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import at, losses, run, summary, train, train_each
from safetensors.numpy import load_file

SAME = (
    "--epochs",
    2,
    "--batch-size",
    26,
    "--limit-train",
    262,
    "--limit-test",
    103,
    "--width",
    0.125,
    "--precision",
    "float64",
    "--lr",
    1e-3,
    "--log-every",
    1,
    "--seed",
    3,
    "--shift",
    2,
    "--rotate",
    10,
    "--average",
    0.9,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same run on 1, 2 and 3 ranks; the last batch of an epoch has 2 images."""
    folders = {}
    for ranks in (1, 2, 3):
        folders[ranks] = tmp_path_factory.mktemp("ranks") / str(ranks)
        train(folders[ranks], *SAME, ranks=ranks)
    return folders


@pytest.mark.parametrize("ranks", [2, 3])
def test_losses_and_parameters_equal_one_rank(runs: dict[int, Path], ranks: int) -> None:
    alone, together = losses(runs[1]), losses(runs[ranks])
    assert len(alone) == 2 * 11
    np.testing.assert_allclose(together, alone, rtol=1e-9)
    name = "checkpoints/step-00000022.safetensors"
    expected, found = load_file(runs[1] / name), load_file(runs[ranks] / name)
    for key, value in expected.items():
        scale = np.abs(value).max()
        assert np.abs(found[key] - value).max() <= 1e-8 * scale, key


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_rank_holds_the_same_model_and_every_image_counts_once(
    runs: dict[int, Path], ranks: int
) -> None:
    found = summary(runs[ranks])
    assert found["world_size"] == ranks
    assert found["rank_digests"] == [found["parameter_digest"]] * ranks
    assert sum(found["images_per_rank"]) == 2 * 262
    assert max(found["images_per_rank"]) - min(found["images_per_rank"]) <= 2 * 11
    assert found["test_accuracy"] == summary(runs[1])["test_accuracy"]
    # on 103 images, an accuracy is a whole number of images
    assert found["test_accuracy"] * 103 / 100 == pytest.approx(
        round(found["test_accuracy"] * 103 / 100), abs=1e-9
    )


UNSYNCHRONISED = """
import sys
from distrib.comm import base as comm, mpi
plain = mpi.MpiCommunicator.all_reduce
mpi.MpiCommunicator.all_reduce = lambda self, x, overlap=False: comm.DONE if overlap else plain(self, x)
from distrib.train import main
sys.exit(main())
"""


def test_without_reduction_the_ranks_differ(tmp_path: Path) -> None:
    """The negative check: gradients that stay on their rank give different models."""
    folder = tmp_path / "run"
    run("-c", UNSYNCHRONISED, "--run-dir", folder, *SAME, "--max-steps", 3, "--check-every", 0, ranks=2)
    first, second = summary(folder)["rank_digests"]
    assert first != second


SHORT = ("--epochs", 1, "--limit-test", 10, "--width", 0.125)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_same_command_gives_the_same_digest(tmp_path: Path, ranks: int) -> None:
    """float32, to the bit."""
    options = (*SHORT, "--batch-size", 32, "--limit-train", 320, "--optimizer")
    for attempt in "ab":
        runs = [("--run-dir", tmp_path / f"{each}-{attempt}", *options, each) for each in ("adam", "sgd")]
        train_each(*runs, ranks=ranks)
    for optimizer in ("adam", "sgd"):
        first, second = (summary(tmp_path / f"{optimizer}-{attempt}") for attempt in "ab")
        assert first["parameter_digest"] == second["parameter_digest"], optimizer


def test_local_batch_norm_differs_from_sync(tmp_path: Path) -> None:
    options = (*SHORT, "--batch-size", 8, "--limit-train", 64, "--batch-norm")
    train_each(*(("--run-dir", tmp_path / kind, *options, kind) for kind in ("sync", "local")), ranks=2)
    assert summary(tmp_path / "sync")["parameter_digest"] != summary(tmp_path / "local")["parameter_digest"]
    local = summary(tmp_path / "local")
    assert local["rank_digests"][0] == local["rank_digests"][1]


def test_local_batch_norm_with_a_rank_without_images(tmp_path: Path) -> None:
    """The last batch has one image: two of three ranks have none, and none spoils the sum."""
    train(
        tmp_path / "run",
        "--epochs",
        1,
        "--batch-size",
        8,
        "--limit-train",
        17,
        "--limit-test",
        10,
        "--width",
        0.0625,
        "--batch-norm",
        "local",
        ranks=3,
    )
    found = summary(tmp_path / "run")
    assert found["finished"]
    assert len(set(found["rank_digests"])) == 1


def test_a_crash_of_one_rank_ends_the_job(tmp_path: Path) -> None:
    script = at(1, 3, "raise ZeroDivisionError('planted')")
    done = run("-c", script, "--run-dir", tmp_path / "run", *SAME, ranks=2, check=False)
    assert done.returncode not in (0, 2, 85)
    assert "rank 1 on" in done.stderr
    assert "ZeroDivisionError: planted" in done.stderr


def test_a_silent_rank_ends_the_job(tmp_path: Path) -> None:
    script = at(1, 3, "time.sleep(3600)")
    done = run("-c", script, "--run-dir", tmp_path / "run", *SAME, "--timeout", 8, ranks=2, check=False)
    assert done.returncode not in (0, 2, 85)
    assert "rank 0 on" in done.stderr
    assert "at step 4" in done.stderr
