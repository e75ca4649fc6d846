"""Ranks with a GPU each die, on the double: what hangs is aborted, and nothing that ran behind it remains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, metrics, summary
from device_double import double_only, needs_device
from test_elastic import finished, logged, require_alike, require_each_image_once, told

pytestmark = [needs_device, double_only]

IMAGES = 45
TRAINING = (
    f"--limit-train {IMAGES} --limit-test 40 --batch-size 9 --epochs 2 --schedule onecycle --log-every 2"
)
MORE = "--checkpoint-every 2 --average 0.9 --elastic --backend cupy --timeout 60"
NETWORK = f"{ROOT / 'tests' / 'networks.py'}:block_of_one"
OPTIONS = (*TRAINING.split(), *MORE.split(), "--model", NETWORK)
REPRODUCIBLE, EAGER, STAGED = "--reproducible --shards 4", "--no-cuda-graph", "--comm mpi"


def train(
    folder: Path, plan: str, options: str = "", forgets: str = "", ranks: int = 3
) -> subprocess.CompletedProcess[str]:
    mpirun = Path(sys.executable).with_name("mpirun")
    start = [str(mpirun) if mpirun.exists() else "mpirun", "--with-ft", "ulfm", "-n", str(ranks)]
    program = [sys.executable, str(Path(__file__).with_name("mortal_device.py"))]
    command = [*start, *program, "--run-dir", str(folder), *OPTIONS, *options.split()]
    return finished(command, {**told(folder, plan), "MORTAL_FORGETS": forgets})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs without a death, by the options that change the result; made when they are asked for."""

    class Made(dict):
        def __missing__(self, options: str) -> Path:
            self[options] = folder = tmp_path_factory.mktemp("undisturbed") / "run"
            done = train(folder, "", options, ranks=2)
            assert done.returncode == 0, done.stdout + done.stderr
            return folder

    return Made()


def numbers(plan: str) -> set[int]:
    """Of the ranks that die."""
    return {int(each.split(":")[0]) for each in plan.split() if not each.endswith(":late")}


DEATHS = {
    "within a step's sums, and in a step": ("", "0:3:run:SIGSEGV 2:6:step:SIGKILL"),
    "a checkpoint and an evaluation": ("", "2:4:take:late 1:4:save:SIGKILL 0:5:test:SIGKILL"),
    "the start and a recovery": ("", "0:-1:begin:SIGKILL 1:3:run:SIGKILL 2:2:_share_state:SIGKILL"),
    "two at once, eager": (EAGER, "0:4:run:SIGKILL 2:4:run:SIGKILL"),
    "staged": (STAGED, "0:3:start_gather:SIGSEGV 2:5:all_reduce:SIGKILL"),
}


@pytest.mark.parametrize("name", DEATHS)
def test_a_death_changes_nothing(name: str, tmp_path: Path, undisturbed: dict[str, Path]) -> None:
    way, plan = DEATHS[name]
    died = numbers(plan)
    done = train(tmp_path / "run", plan, f"{REPRODUCIBLE} {way}", ranks=len(died) + 1)
    assert done.returncode == 0, done.stdout + done.stderr
    require_alike(tmp_path / "run", undisturbed[REPRODUCIBLE], died, done, IMAGES, device=True)


def test_without_reproducible_the_result_agrees_up_to_rounding(
    tmp_path: Path, undisturbed: dict[str, Path]
) -> None:
    plan = "0:-1:capture:SIGKILL 2:7:run:SIGKILL"
    done = train(tmp_path / "run", plan)
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = logged(tmp_path / "run"), logged(undisturbed[""])
    assert [line[0] for line in ours] == [line[0] for line in theirs]
    for line, wanted in zip(metrics(tmp_path / "run"), metrics(undisturbed[""]), strict=True):
        for name in ("loss", "train_loss", "test_loss"):
            # float32 on other shares: what rounding changes grows from step to step
            assert name not in wanted or line[name] == pytest.approx(wanted[name], rel=1e-3)
    assert {entry["rank"] for entry in summary(tmp_path / "run")["survived"]} == numbers(plan)
    require_each_image_once(tmp_path / "run", IMAGES, device=True)


@pytest.mark.parametrize("what", ["the arrays", "the loss"])
def test_what_runs_behind_an_abort_is_garbage(
    what: str, tmp_path: Path, undisturbed: dict[str, Path]
) -> None:
    """Where the arrays are not put back, or a read that an abort ended counts, the result is another.

    Before this death nothing was queued since the last snapshot, so that only garbage makes a difference.
    """
    plan = "1:4:run:SIGKILL"
    done = train(tmp_path / "run", plan, REPRODUCIBLE, what, ranks=2)
    output = done.stdout + done.stderr
    assert "died after step" in output
    assert what != "the arrays" or "6 of 6 arrays differ" in output
    assert not done.returncode or "loss is" in output
    wanted = summary(undisturbed[REPRODUCIBLE])["parameter_digest"]
    assert done.returncode or summary(tmp_path / "run")["parameter_digest"] != wanted
