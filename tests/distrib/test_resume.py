"""A run that was stopped and taken up again is the run that was never stopped."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LIMIT, ROOT, at, environment, metrics, pause, run, summary, train, train_each, wait_for

BASE = (
    "--epochs",
    2,
    "--batch-size",
    32,
    "--limit-train",
    200,
    "--limit-test",
    50,
    "--width",
    0.125,
    "--log-every",
    2,
    "--schedule",
    "cosine",
    "--warmup-epochs",
    0.5,
)
OPTIMIZERS = {
    "adam": ("--optimizer", "adam", "--weight-decay", 0.01),
    "sgd": (
        "--optimizer",
        "sgd",
        "--lr",
        0.05,
        "--momentum",
        0.9,
        "--nesterov",
        "--weight-decay",
        1e-4,
        "--shift",
        1.5,
        "--rotate",
        8,
        "--average",
        0.8,
    ),
}
STEPS = 14  # two epochs of 7, the last batch of each has 8 images
SAME_FIELDS = (
    "parameter_digest",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "steps",
    "epochs",
    "images_per_rank",
    "finished",
)


@pytest.fixture(scope="module", params=OPTIMIZERS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple]:
    """The run that was never stopped, and its options."""
    folder = tmp_path_factory.mktemp("whole")
    options = (*BASE, *OPTIMIZERS[request.param])
    train(folder, *options)
    return folder, options


def without_times(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if "second" not in k and k != "time"} for line in metrics(folder)]


def compare(folder: Path, whole: Path) -> None:
    found, expected = summary(folder), summary(whole)
    assert {name: found[name] for name in SAME_FIELDS} == {name: expected[name] for name in SAME_FIELDS}
    assert without_times(folder) == without_times(whole)


def test_stopped_after_any_step(whole: tuple[Path, tuple], tmp_path: Path) -> None:
    stops = (1, 6, 7, 8, 13)
    runs = {step: ("--run-dir", tmp_path / str(step), *whole[1]) for step in stops}
    train_each(*((*runs[step], "--max-steps", step) for step in stops))
    for step in stops:
        early = summary(tmp_path / str(step))
        assert not early["finished"]
        assert early["steps"] == step
        assert early["test_accuracy"] is not None
    train_each(*runs.values())
    for step in stops:
        compare(tmp_path / str(step), whole[0])


def test_stopped_after_every_step(whole: tuple[Path, tuple], tmp_path: Path) -> None:
    """Fourteen starts of one step each, in one folder."""
    script = f"""
import sys
from distrib.train import main
given = list(sys.argv)
for step in range(1, {STEPS} + 1):
    sys.argv[:] = [*given, "--max-steps", str(step)]
    assert main() == 0
"""
    run("-c", script, "--run-dir", tmp_path / "run", *whole[1])
    compare(tmp_path / "run", whole[0])


def test_two_ranks_resume_to_the_bit(tmp_path: Path) -> None:
    options = (*BASE, *OPTIMIZERS["adam"])
    train(tmp_path / "whole", *options, ranks=2)
    train(tmp_path / "parts", *options, "--max-steps", 9, ranks=2)
    train(tmp_path / "parts", *options, ranks=2)
    compare(tmp_path / "parts", tmp_path / "whole")


def test_another_number_of_ranks(tmp_path: Path) -> None:
    """Within rounding of the run that stayed on one rank, and a line says what changed."""
    options = (*BASE, *OPTIMIZERS["adam"], "--precision", "float64")
    train(tmp_path / "whole", *options)
    train(tmp_path / "parts", *options, "--max-steps", 9)
    done = train(tmp_path / "parts", *options, ranks=3)
    assert "world_size: 1 → 3" in done.stdout
    found, expected = summary(tmp_path / "parts"), summary(tmp_path / "whole")
    assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-9)
    assert found["world_size"] == 3
    assert sum(found["images_per_rank"]) == 400


def test_more_epochs_of_a_finished_run(tmp_path: Path) -> None:
    """With a constant rate, one epoch and then another equal two."""
    options = ("--batch-size", 32, "--limit-train", 100, "--limit-test", 20, "--width", 0.125)
    train(tmp_path / "whole", *options, "--epochs", 2)
    train(tmp_path / "parts", *options, "--epochs", 1)
    train(tmp_path / "parts", *options, "--epochs", 2)
    compare(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_stops_with_a_checkpoint_and_85(
    whole: tuple[Path, tuple], tmp_path: Path, number: int
) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "distrib.train", "--run-dir", str(folder), *map(str, whole[1])]
    heard = "any(self.stop_requested or time.sleep(0.02) for _ in iter(int, 1))"
    script = at(0, 4, f"open({str(tmp_path / 'ready')!r}, 'w'); {heard}")
    process = subprocess.Popen(
        [sys.executable, "-c", script, *command[3:]], cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL
    )
    wait_for((tmp_path / "ready").exists, "step 4", process)
    process.send_signal(number)
    assert process.wait(LIMIT) == 85
    stopped = summary(folder)
    assert not stopped["finished"]
    assert stopped["steps"] == 5
    train(folder, *whole[1])
    compare(folder, whole[0])


def test_killed_without_a_word(whole: tuple[Path, tuple], tmp_path: Path) -> None:
    """SIGKILL between checkpoints: the run goes on from the last one and ends alike."""
    script = at(0, 11, "os.kill(os.getpid(), signal.SIGKILL)")
    folder = tmp_path / "run"
    command = [
        sys.executable,
        "-c",
        script,
        "--run-dir",
        str(folder),
        *map(str, whole[1]),
        "--checkpoint-every",
        "3",
    ]
    assert (
        subprocess.run(
            command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, timeout=LIMIT
        ).returncode
        == -signal.SIGKILL
    )
    train(folder, *whole[1])
    compare(folder, whole[0])


def test_other_code_is_said(tmp_path: Path) -> None:
    options = (*BASE, *OPTIMIZERS["adam"])
    train(tmp_path / "run", *options, "--max-steps", 5)
    script = """
import sys
from distrib.run import machine as run
run.code_digest = lambda: "another version"
from distrib.train import main
sys.exit(main())
"""
    done = run("-c", script, "--run-dir", tmp_path / "run", *options)
    assert " → another vers" in done.stdout
    assert "results agree only within rounding: code: " in done.stdout


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    """Neither one that was given twice, nor the new one of two that start in the same second."""
    slow = at(0, 3, pause(tmp_path / "go on"))
    first = subprocess.Popen(
        [sys.executable, "-c", slow, "--run-dir", str(tmp_path / "run"), *map(str, BASE)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
    )
    wait_for((tmp_path / "run" / "metrics.jsonl").exists, "a run", first)
    second = train(tmp_path / "run", *BASE, check=False)
    assert (second.returncode, second.stderr) == (
        2,
        (
            f"distrib: error: --run-dir {tmp_path / 'run'}: another run is writing there:"
            " wait for its end, or give another folder\n"
        ),
    )
    (tmp_path / "go on").touch()
    assert first.wait(LIMIT) == 0
    command = [sys.executable, "-m", "distrib.train", *map(str, BASE)]
    for process in [
        subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL)
        for _ in range(3)
    ]:
        assert process.wait(LIMIT) == 0
    assert len(list((tmp_path / "runs").glob("*/summary.json"))) == 3


def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path: Path) -> None:
    train = f"-m distrib.train --run-dir {tmp_path / 'run'} {' '.join(map(str, BASE))}"
    command = f"{sys.executable} {train}; echo $? > {tmp_path / 'rc'}"
    subprocess.run(
        ["bash", "-c", f"({command}) | head -1"],
        cwd=ROOT,
        env=environment(),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    assert (tmp_path / "rc").read_text() == "0\n"
    assert summary(tmp_path / "run")["finished"]


def test_a_run_without_checkpoints_starts_over_and_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    short = (*BASE, "--max-steps", 2, "--log-every", 50)
    train(folder, *short)
    shutil.rmtree(folder / "checkpoints")
    again = train(folder, *short)
    assert f"{folder} holds a run without a checkpoint: starting over" in again.stdout + again.stderr
