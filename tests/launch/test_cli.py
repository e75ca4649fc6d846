"""The `distrib` command, what it says where something is missing, and the wheel."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, environment, run, summary, train
from PIL import Image

from distrib.data import formats
from distrib.data import idx as mnist
from launch import cli
from launch.bench import app as bench
from launch.lazy import Lazy, Place
from nn.cuda.backend import cupy_version, has_driver

SMALL = (
    "--epochs",
    1,
    "--batch-size",
    32,
    "--limit-train",
    640,
    "--limit-test",
    100,
    "--width",
    0.125,
    "--schedule",
    "onecycle",
    "--lr",
    0.02,
)


def distrib(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    return run("-m", "launch.cli", *arguments, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    distrib("train", "--run-dir", folder, *SMALL)
    return folder


def test_both_commands_are_the_same(trained: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", *SMALL)
    assert summary(tmp_path / "run")["parameter_digest"] == summary(trained)["parameter_digest"]


def test_evaluate(trained: Path) -> None:
    """The checkpoint alone gives the accuracy of the run's summary."""
    expected = summary(trained)
    done = json.loads(distrib("evaluate", trained, "--limit-test", 100, "--json").stdout)
    assert done["test_accuracy"] == expected["test_accuracy"]
    assert done["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-12)
    assert done["images"] == 100
    file = next((trained / "checkpoints").glob("step-00000020.safetensors"))
    assert f"{expected['test_accuracy']:.2f} %" in distrib("evaluate", file, "--limit-test", 100).stdout


def test_predict(trained: Path, tmp_path: Path) -> None:
    """PNG, ink on paper in another size, and IDX; what it says is what the model says."""
    images = formats.load(limit_test=20).test_images[..., 0]
    Image.fromarray(images[0]).save(tmp_path / "white.png")
    Image.fromarray(255 - images[0]).save(tmp_path / "black.png")
    Image.fromarray(255 - images[0]).convert("RGBA").resize((112, 112)).save(tmp_path / "large.png")
    idx = mnist.SHIPPED / "t10k-images-idx3-ubyte.gz"
    files = [tmp_path / f"{name}.png" for name in ("white", "black", "large")]
    found = json.loads(distrib("predict", trained, *files, idx, "--json").stdout)
    assert len(found) == 10003
    white, black, large, first = found[:4]
    assert white["probabilities"] == pytest.approx(first["probabilities"], abs=1e-5)
    assert black["probabilities"] == white["probabilities"]
    assert [entry["inverted"] for entry in found[:4]] == [False, True, True, False]
    assert large["digit"] == white["digit"]
    assert sum(white["probabilities"]) == pytest.approx(1)
    accuracy = np.mean([entry["digit"] for entry in found[3:103]] == formats.load(limit_test=100).test_labels)
    assert 100 * accuracy == pytest.approx(summary(trained)["test_accuracy"])
    assert f"white.png: {white['digit']}" in distrib("predict", trained, *files).stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("evaluate", "nowhere"), "nowhere: no such file"),
        (("predict", "RUN", "nothing.png"), "nothing.png: no such file"),
        (("predict", "RUN", "pyproject.toml"), "pyproject.toml: is a text file"),
        (("evaluate", "RUN", "--limit-test", 0), "--limit-test 0"),
        (("evaluate", "tests"), "tests: holds no checkpoint"),
        (("nonsense",), "No such command 'nonsense'"),
    ],
)
def test_mistakes(trained: Path, arguments: tuple, words: str, command_line) -> None:
    code, _, err = command_line(cli.app, *(trained if word == "RUN" else word for word in arguments))
    assert code == 2
    assert len(err.splitlines()) == 1
    assert err.startswith("distrib: error: ")
    assert words in err


def test_a_mistake_in_a_process_of_its_own() -> None:
    done = distrib("evaluate", "nowhere", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("distrib: error: nowhere: no such file")


def test_help_teaches() -> None:
    done = distrib("--help").stdout
    for word in ("train", "evaluate", "predict", "distrib train --ranks 2 --recipe demo"):
        assert word in done
    from distrib.config import options

    shown = distrib("train", "--help", env={"COLUMNS": "200"}).stdout
    for name, *_ in options():
        assert f"--{name.replace('_', '-')}" in shown


def test_help_imports_only_what_it_shows() -> None:
    """Nor does the list of commands import them: their texts stand with it."""
    code = (
        "from distrib.command import run_app; from launch import cli; import sys; sys.argv[1:] = ['--help']"
    )
    shown = run("-c", f"{code}; run_app(cli.app); print(*sys.modules, sep=chr(10))").stdout.splitlines()
    assert {"typer", "launch.cli"} <= {*shown}
    assert not {"numpy", "mpi4py", "distrib.config", "launch.evaluate"} & {*shown}


@pytest.mark.quick
@pytest.mark.parametrize("commands", [cli.COMMANDS, bench.COMMANDS], ids=["distrib", "bench"])
def test_a_list_says_of_a_command_what_the_command_says(commands: dict[str, Place]) -> None:
    for name, place in commands.items():
        command = Lazy(name, place).real()
        assert (command.name or name) == name  # a group has none
        assert place.text == command.help.split("\n\n")[0].replace("\n", " ").strip()


def blocked(tmp_path: Path, name: str, error: str) -> dict[str, str]:
    """An environment in which importing `name` raises `error`."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(error)
    return {"PYTHONPATH": f"{tmp_path}:{ROOT}"}


NO_MPI4PY = "raise ImportError('No module named mpi4py')"
NO_LIBRARY = (
    "def __getattr__(name):\n    raise RuntimeError('cannot load MPI library\\nlibmpi.so: not found')"
)
ABSENT = {"mpi4py": NO_MPI4PY, "library": NO_LIBRARY}


@pytest.mark.parametrize("missing", ABSENT)
def test_without_mpi_one_process_still_trains(tmp_path: Path, missing: str) -> None:
    env = blocked(tmp_path, "mpi4py", ABSENT[missing])
    done = train(tmp_path / "run", *SMALL, "--max-steps", 1, env=env)
    assert "communicator none (one process" in done.stdout
    done = train(tmp_path / "more", *SMALL, "--comm", "mpi", env=env, check=False)
    assert done.returncode == 2
    assert "--comm mpi" in done.stderr
    assert ("mpi4py is not installed" if missing == "mpi4py" else "no MPI library") in done.stderr


def test_ranks_that_do_not_find_each_other(tmp_path: Path) -> None:
    """A launcher of another MPI starts N single processes: said, not trained N times."""
    done = train(tmp_path / "run", *SMALL, env={"PMI_SIZE": "4", "PMI_RANK": "0"}, check=False)
    assert done.returncode == 2
    assert "4 ranks were started but MPI sees 1" in done.stderr
    assert not (tmp_path / "run").exists()


def test_what_is_asked_for_by_name(tmp_path: Path) -> None:
    env = blocked(tmp_path, "cupy", "raise ImportError('No module named cupy')")
    missing = "CuPy is not installed" if has_driver() else f"CuPy {cupy_version()} sees no GPU (there is no"
    for options, words in (
        (("--backend", "cupy"), f"--backend cupy: {missing}"),
        (("--comm", "nccl"), f"--comm nccl needs a GPU: {missing}"),
        (("--precision", "tf32"), "--precision tf32 needs a GPU"),
    ):
        done = train(tmp_path / "run", *SMALL, *options, env=env, check=False)
        assert done.returncode == 2
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_batch_per_rank_is_resolved_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = (
        "--epochs",
        1,
        "--limit-train",
        64,
        "--limit-test",
        8,
        "--width",
        0.0625,
        "--batch-size-per-rank",
        8,
    )
    train(folder, *options, "--max-steps", 2, ranks=2)
    train(folder, *options)
    assert summary(folder)["steps"] == 4
    assert json.loads((folder / "config.json").read_text())["batch_size"] == 16


@pytest.mark.needs("build")
def test_the_wheel_holds_the_packages_and_works_anywhere(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT],
        check=True,
        capture_output=True,
        timeout=300,
    )
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"distrib", "nn", "launch"}
    assert sum(name.endswith(".gz") for name in names) == 4
    assert not [name for name in names if "test" in name]
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel],
        check=True,
        timeout=300,
    )
    command = [sys.executable, "-m", "distrib.train", *map(str, SMALL), "--max-steps", "1"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment({"PYTHONPATH": str(site)}),
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "ended early at step 1" in done.stdout
    assert (tmp_path / "runs").is_dir()
