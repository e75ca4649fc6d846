"""`distrib reproduce` in a short form: all parts, resumed, nothing twice; and the PyTorch side's own run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import LIMIT, ROOT, environment, metrics, run, summary, wait_for
from test_failures import left_running
from test_torch_parity import import_torch

from distrib.faults import heartbeat
from launch import cli
from launch.report import times
from launch.report.reference import ROWS, SECONDS, Settings, jobs
from launch.report.reference_page import spread
from launch.report.times import time_table

SHORT = ("--epochs", 2, "--limit-train", 80, "--limit-test", 40, "--width", 0.0625, "--ranks", 1)


QUICK = """
import sys
from distrib.train import run_app
from launch.report import times
plain = times.ways
short = ("--steps", "2", "--repeats", "2")  # of about a second's steps and five
times.ways = lambda settings: [way._replace(options=(*way.options, *short)) for way in plain(settings)]
from launch.cli import app
sys.exit(run_app(app))
"""


def call(out: Path, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run("-c", QUICK, "reproduce", "--out", out, *SHORT, *arguments, check=check)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All four parts."""
    import_torch()
    out = tmp_path_factory.mktemp("reproduce") / "out"
    call(out)
    return out


def test_the_report_holds_what_the_runs_hold(whole: Path) -> None:
    text = (whole / "report.md").read_text()
    found = {}
    for folder in sorted((whole / "runs").glob("*/")):
        result = summary(folder)
        assert result["finished"]
        assert result["steps"] == 20
        found[folder.name.rsplit("-seed", 1)[0]] = result
    assert set(found) == {row.name for rows in ROWS.values() for row in rows}
    adam, torch = found["baseline-adam"], found["torch-adam"]
    assert (
        f"| ours (Adam) | {adam['train_accuracy']:.2f} | {adam['test_accuracy']:.2f} | 99.65 | 99.43 |"
        in text
    )
    assert (
        f"| PyTorch (Adam) | {torch['train_accuracy']:.2f} | {torch['test_accuracy']:.2f} | 99.67 | 99.38 |"
        in text
    )
    assert (
        f"| variant 1: average pooling (SGD) | {found['avgpool-sgd']['test_accuracy']:.2f} | 99.46 |" in text
    )
    assert "48,994" in text
    assert (whole / "curves.png").stat().st_size > 10_000
    page = (whole / "report.html").read_text()
    assert page.count("<table") == 3
    assert page.count("<svg") == 1
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


def test_nothing_is_run_twice(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.glob("runs/*/summary.json")}
    times = next(whole.glob("time-*.json")).stat().st_mtime_ns
    done = call(whole)
    assert done.stdout.count("there already") == 6
    assert {path: path.stat().st_mtime_ns for path in whole.glob("runs/*/summary.json")} == before
    assert next(whole.glob("time-*.json")).stat().st_mtime_ns == times


def test_a_stop_and_another_start(tmp_path: Path) -> None:
    """Ctrl-C in a run: a checkpoint, exit 85, and the same command ends at the digest of an unbroken run."""
    options = ["--only", "ablation", "--epochs", "4", *map(str, SHORT[2:])]
    command = [sys.executable, "-m", "launch.cli", "reproduce", "--out", str(tmp_path / "out"), *options]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    every = jobs("ablation", Settings(4, 80, 40, 0.0625), tmp_path / "out")
    job = every[1]
    wait_for(
        lambda: (job.folder / "metrics.jsonl").exists() and heartbeat.read_heartbeats(job.folder),
        "a run",
        process,
    )
    pid = heartbeat.read_heartbeats(job.folder)[0].pid
    os.kill(pid, signal.SIGSTOP)  # it does not end before the signal comes
    process.send_signal(signal.SIGINT)
    os.kill(pid, signal.SIGCONT)
    assert process.wait(LIMIT) == 85
    assert run(*command[1:]).stdout.count("there already") >= 1
    assert all(job.finished() for job in every)
    subprocess.run(
        [*job.command, "--run-dir", str(tmp_path / "again")],
        cwd=ROOT,
        env=environment(),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    assert summary(job.folder)["parameter_digest"] == summary(tmp_path / "again")["parameter_digest"]


def test_a_run_that_fails_is_one_line(tmp_path: Path) -> None:
    job = jobs("ablation", Settings(2, 80, 40, 0.0625, 1, 2), tmp_path / "out")[0]
    job.folder.mkdir(parents=True)
    (job.folder / "config.json").write_text("{")
    done = call(tmp_path / "out", "--only", "ablation", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "config.json: cannot be read as JSON" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--only", "all"), "--only all: choose accuracy, ablation, curves or time"),
        (("--epochs", 0), "--epochs 0"),
        (("--limit-train", 60001), "--limit-train 60001"),
        (("--seeds", 0), "--seeds 0: give 1 or more"),
        (("--report",), "holds nothing yet"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: tuple[Any, ...], words: str, command_line) -> None:
    code, _, err = command_line(cli.app, "reproduce", "--out", tmp_path / "out", *arguments)
    assert (code, err.count("\n")) == (2, 1), err
    assert words in err
    assert not (tmp_path / "out").exists()


def test_settings_and_seeds_make_other_runs_and_ranks_do_not(tmp_path: Path) -> None:
    def names(**more: Any) -> set[str]:
        return {job.folder.name for job in jobs("accuracy", Settings(**more), tmp_path)}

    assert names() == names(ranks=2)
    assert not names() & names(epochs=1)
    assert not names() & names(limit_train=100)
    assert names() < names(seeds=3)
    assert len(names(seeds=3)) == 9


def test_a_report_alone_runs_nothing(whole: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(whole, tmp_path / "out")
    next(copy.glob("time-*.json")).unlink()
    next(copy.glob("runs/avgpool-sgd-*/summary.json")).unlink()
    call(copy, "--report")
    text = (copy / "report.md").read_text()
    assert "| variant 1: average pooling (SGD) | – | 99.46 |" in text
    assert "Seconds of training" not in text
    assert not list(copy.glob("time-*.json"))


def test_terminated_it_stops_its_run(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "launch.cli",
        "reproduce",
        "--out",
        str(tmp_path / "out"),
        "--only",
        "ablation",
        "--limit-train",
        "800",
        "--width",
        "0.0625",
        "--ranks",
        "2",
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: list((tmp_path / "out").glob("runs/*/metrics.jsonl")), "a run", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT) == 85
    assert not left_running(tmp_path)


def test_numbers() -> None:
    assert spread([99.5]) == "99.50"
    assert spread([99.0, 99.5, 99.1]) == "99.20 (99.00–99.50)"
    assert spread([]) == "–"
    measured = {
        "machine": "m",
        "commands": {"plain loop": "c"},
        "images_per_second": {"plain loop": [2.0, 4.0, 3.0], "PyTorch": [100.0]},
    }
    table = time_table(Settings(epochs=8), measured)
    assert table["rows"] == [
        ("NumPy, convolutions as plain loops", ["3", "160,000 (120,000–240,000)", "48,994"]),
        ("PyTorch", ["100", "4,800 (4,800–4,800)", "204"]),
    ]


def test_several_ranks_are_measured_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def finish(command: list[str], _: dict[str, str]) -> SimpleNamespace:
        called.append(" ".join(command))
        rates = {name: [float(len(called))] for name in ("distrib", "plain loop", "torch contiguous")}
        return SimpleNamespace(code=0, json=lambda: {"images_per_second": rates})

    monkeypatch.setattr(times, "finish", finish)
    settings = Settings(ranks=2)
    times.measure_times(settings, tmp_path, print)
    found = times.read_times(times.times_path(settings, tmp_path))["images_per_second"]
    assert found == {"plain loop": [1], "vectorised": [2], "PyTorch": [2], "vectorised, 2 ranks": [3]}
    assert ["mpirun" in command for command in called] == [False, False, True]
    assert "-n 2" in called[2]


def test_the_rows_are_the_reference_s() -> None:
    assert [row.test for row in ROWS["ablation"]] == [99.21, 99.46, 99.19, 99.20, 99.43]
    assert SECONDS["plain loop"] / SECONDS["cupy"] == pytest.approx(32.5, abs=0.1)


# ---- the PyTorch side

TORCH = (
    "--epochs",
    2,
    "--batch-size",
    10,
    "--limit-train",
    64,
    "--limit-test",
    30,
    "--width",
    0.0625,
    "--log-every",
    2,
)


def torch_run(folder: Path, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run("-m", "launch.cli", "torch-train", "--run-dir", folder, *TORCH, *arguments, check=check)


def test_pytorch_stopped_at_any_step_ends_alike(tmp_path: Path) -> None:
    """Signals after step 4 of 14, with the last batch of either epoch, and in the second."""
    import_torch()
    script = """
import os, signal, sys
from distrib.train import run_app
from launch.cli import app
from launch.torch_peer.side import TorchSide
plain, left = TorchSide.batch, 0
def batch(self, indices, train=True):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGUSR1)
    return plain(self, indices, train)
TorchSide.batch = batch
sys.argv.insert(1, "torch-train")
for left in (4, 3, 2, 5):
    assert run_app(app) == 85
"""
    run("-c", script, "--run-dir", tmp_path / "parts", *TORCH)
    others = f"""
import sys
from distrib.train import run_app
from launch.cli import app
options = sys.argv[1:]
def train(folder):
    sys.argv = ["distrib", "torch-train", "--run-dir", folder, *options]
    return run_app(app)
assert train({str(tmp_path / "parts")!r}) == 0
assert train({str(tmp_path / "parts")!r}) == 2, "a finished run is refused"
assert train({str(tmp_path / "whole")!r}) == 0
"""
    run("-c", others, *TORCH)
    found, expected = summary(tmp_path / "parts"), summary(tmp_path / "whole")
    assert found["steps"] == 14
    for name in ("test_accuracy", "test_loss", "train_accuracy", "train_loss"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    strip = [
        [
            {k: v for k, v in line.items() if k in ("step", "epoch", "accuracy", "test_accuracy")}
            for line in metrics(tmp_path / each)
        ]
        for each in ("parts", "whole")
    ]
    assert strip[0] == strip[1]


def test_pytorch_refuses_what_it_has_not(tmp_path: Path) -> None:
    done = torch_run(tmp_path / "run", "--shift", 2, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "distrib: error: --shift 2.0: the PyTorch side has 0.0 only\n",
    )


def test_both_sides_train_alike_from_the_same_weights(tmp_path: Path) -> None:
    """Ours loaded into PyTorch: the losses of the first steps agree, so both rows are of one network."""
    import_torch()
    script = """
import runpy, sys
import numpy as np, torch
from launch.torch_peer.side import TorchSide
from nn.network import Network
from nn.resnet9 import ResNet9
plain = TorchSide.__init__
def init(self, config, kind, threads):
    plain(self, config, kind, threads)
    options = {"variant": config.variant, "width": config.width}
    state = Network(ResNet9, self.data.shape, self.data.classes, options, seed=config.seed).state_dict()
    self.model.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
TorchSide.__init__ = init
sys.argv.insert(1, "torch-train")
runpy.run_module("launch.cli", run_name="__main__", alter_sys=False)
"""
    options = (*TORCH[:-2], "--log-every", 1, "--optimizer", "sgd")
    run("-c", script, "--run-dir", tmp_path / "torch", *options)
    run("-m", "distrib.train", "--run-dir", tmp_path / "ours", *options)
    ours, theirs = (
        [line["loss"] for line in metrics(tmp_path / each) if "loss" in line] for each in ("ours", "torch")
    )
    np.testing.assert_allclose(ours[:4], theirs[:4], rtol=1e-4)  # later a ReLU near 0 falls to either side
