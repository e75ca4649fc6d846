"""Ranks die, for any cause and in any phase; the others go on, and the run ends as if nobody had died.

ELASTIC_ROUNDS in the environment asks for more deaths at random moments than a quick pass has (`make soak`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import HELPERS, LIMIT, NOT_STARTED, ROOT, environment, metrics, run, summary, wait_for
from safetensors.numpy import load_file

from distrib.run import checkpoint as ckpt

ROUNDS = int(os.environ.get("ELASTIC_ROUNDS", "4"))
MORTAL = ROOT / "tests" / "distrib" / "mortal.py"
TRAINING = "--width 0.0625 --limit-train 130 --limit-test 150 --batch-size 26 --epochs 2 --log-every 2"
MORE = "--checkpoint-every 2 --schedule onecycle --average 0.9 --elastic --backend numpy --timeout 60"
OPTIONS = (*TRAINING.split(), *MORE.split())
STEPS = 10


def command(folder: Path, ranks: int, *options: object) -> list[str]:
    mpirun = Path(sys.executable).with_name("mpirun")
    start = [str(mpirun) if mpirun.exists() else "mpirun", "--with-ft", "ulfm", "-n", str(ranks)]
    return [*start, sys.executable, str(MORTAL), "--run-dir", str(folder), *map(str, (*OPTIONS, *options))]


def told(folder: Path, plan: str = "") -> dict[str, str]:
    """The environment of a mortal program, whose notes lie beside the run's folder."""
    notes = folder.with_name(f"{folder.name}-notes")
    notes.mkdir(exist_ok=True)
    return environment({**HELPERS, "MORTAL_PLAN": plan, "MORTAL_NOTES": str(notes)})


def train(folder: Path, plan: str, *options: object, ranks: int = 4) -> subprocess.CompletedProcess[str]:
    return finished(command(folder, ranks, *options), told(folder, plan))


def finished(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run it to its end, again where MPI has not started."""
    for _ in range(3):
        done = subprocess.run(command, env=env, cwd=ROOT, text=True, capture_output=True, timeout=LIMIT)
        if NOT_STARTED not in done.stdout + done.stderr:
            break
    return done


def steps_of(folder: Path) -> list[dict]:
    """What the ranks noted after each step, all ranks together, in time."""
    found = []
    for path in folder.with_name(f"{folder.name}-notes").glob("steps-*.jsonl"):
        found += [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line[-1] == "\n"]
    return sorted(found, key=lambda note: note["time"])


def logged(folder: Path) -> list[tuple]:
    """All numbers of metrics.jsonl that do not depend on time."""
    names = "step", "epoch", "lr", "loss", "accuracy", "train_loss", "test_loss", "test_accuracy"
    return [tuple(line.get(name) for name in names) for line in metrics(folder)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs without a death, by the options that change the result; made when they are asked for."""
    made: dict[str, Path] = {}

    class Made(dict):
        def __missing__(self, options: str) -> Path:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            done = train(folder, "", *options.split(), ranks=2)
            assert done.returncode == 0, done.stdout + done.stderr
            made[options] = self[options] = folder
            return folder

    return Made()


def require_alike(
    folder: Path, plain: Path, died: set[int], done: object = None, images: int = 130, device: bool = False
) -> None:
    """A run ended as the undisturbed one did, each image counted once, and the history names who died."""
    result, wanted = summary(folder), summary(plain)
    assert result["finished"], done
    assert result["parameter_digest"] == wanted["parameter_digest"]
    assert set(result["rank_digests"]) == {wanted["parameter_digest"]}
    assert logged(folder) == logged(plain)
    assert sum(result["images_per_rank"]) == sum(wanted["images_per_rank"])
    ours, theirs = (load_file(each / "logits.safetensors")["logits"] for each in (folder, plain))
    assert np.array_equal(ours, theirs)
    history = json.loads((folder / "failure.json").read_text())["survived"] if died else []
    assert {entry["rank"] for entry in history} == died
    assert result["survived"] == history
    assert result["world_size"] == len(result["images_per_rank"]) - len(died)
    require_each_image_once(folder, images, device)
    saved, problems = ckpt.newest_valid(folder / "checkpoints")
    assert saved is not None
    assert saved.position["step"] == STEPS
    assert not problems


def require_each_image_once(folder: Path, images: int = 130, device: bool = False) -> None:
    """All ranks know the same shares of a step. Only a step that nobody left had done is done again; on a
    device, any since the last snapshot, and the last time counts."""
    by_step: dict[int, dict] = {}
    by_whom: dict[int, set[int]] = {}
    computed = np.zeros(len(summary(folder)["images_per_rank"]), int)
    died = {entry["rank"] for entry in summary(folder)["survived"]}
    for note in steps_of(folder):
        step, whom = note["step"], by_whom.setdefault(note["step"], set())
        assert by_step.get(step, note["images"]) == note["images"] or whom <= died or device
        by_step[step] = note["images"]
        whom.add(note["by"])
    assert sorted(by_step) == list(range(1, STEPS + 1))
    for epoch in range(2):
        parts = [by_step[step] for step in range(epoch * 5 + 1, epoch * 5 + 6)]
        assert sorted(i for part in parts for share in part.values() for i in share) == list(range(images))
    for part in by_step.values():
        for number, share in part.items():
            computed[int(number)] += len(share)
    assert summary(folder)["images_per_rank"] == computed.tolist()


REPRODUCIBLE = "--reproducible"
DEATHS = {  # several in one run where one says nothing of another: each has its own step, and its own rank
    "the start; rank 0 in a step; an exit": "2:-1:build:SIGKILL 0:3:step:SIGSEGV 1:6:start_gather:exit",
    "rank 0 at the start; within sums; a line of the log": (
        "0:-1:begin:SIGKILL 2:4:start_gather:SIGABRT 1:6:log:SIGKILL"
    ),
    "the start without one; an exception": ("1:-1:begin:SIGKILL 2:-1:record_deaths:SIGKILL 0:2:step:raise"),
    "the first step; the next; no memory": ("0:0:step:SIGKILL 1:1:step:leave 2:7:start_gather:memory"),
    "a step; a checkpoint": "3:2:step:SIGKILL 1:4:save:SIGKILL 0:8:state_dict:SIGKILL",
    "an evaluation; the end": "0:5:test:SIGKILL 2:10:test:SIGKILL 1:10:finish:SIGKILL",
    "a death that MPI has no name for; two at once": (
        "3:3:step:SIGKILL 1:3:start_gather:error 0:6:step:SIGKILL 2:6:step:SIGKILL"
    ),
    "two exceptions at a death": "0:3:step:raise 1:3:step:raise 2:3:step:SIGKILL",
    "a recovery": "1:3:step:SIGKILL 2:3:again:SIGKILL 0:3:_share_state:SIGKILL",
    "taking over; an exception": "0:3:step:SIGKILL 1:3:_take_over:SIGKILL 2:7:step:raise",
}


@pytest.mark.parametrize("name", DEATHS)
def test_a_death_changes_nothing(name: str, tmp_path: Path, undisturbed: dict[str, Path]) -> None:
    plan = DEATHS[name]
    done = train(tmp_path / "run", plan, REPRODUCIBLE)
    assert done.returncode == 0, done.stdout + done.stderr
    died = {int(each.split(":")[0]) for each in plan.split() if not each.endswith(":error")}
    require_alike(tmp_path / "run", undisturbed[REPRODUCIBLE], died, done)


def test_without_reproducible_the_result_agrees_up_to_rounding(
    tmp_path: Path, undisturbed: dict[str, Path]
) -> None:
    """Within the backward the forward has moved the running statistics already, which the test loss shows."""
    options = "--precision float64"
    plan = "0:3:ready:SIGKILL 1:5:sum_over_ranks:SIGKILL 2:7:step:SIGKILL"
    done = train(tmp_path / "run", plan, *options.split())
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = metrics(tmp_path / "run"), metrics(undisturbed[options])
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for line, wanted in zip(ours, theirs, strict=True):
        for name in ("loss", "train_loss", "test_loss"):
            if name in wanted:
                assert line[name] == pytest.approx(wanted[name], rel=1e-9)
    require_each_image_once(tmp_path / "run")


def test_a_rank_that_hangs_is_killed(tmp_path: Path, undisturbed: dict[str, Path]) -> None:
    done = train(tmp_path / "run", "1:3:step:SIGSTOP", REPRODUCIBLE, "--timeout", 15)
    assert done.returncode == 0, done.stdout + done.stderr
    require_alike(tmp_path / "run", undisturbed[REPRODUCIBLE], {1}, done)
    assert "hung" in summary(tmp_path / "run")["survived"][0]["cause"]


def test_below_min_ranks_it_stops_with_a_checkpoint(tmp_path: Path, undisturbed: dict[str, Path]) -> None:
    plan = "1:3:step:SIGKILL 2:5:test:SIGKILL"
    done = train(tmp_path / "run", plan, REPRODUCIBLE, "--min-ranks", 3)
    assert done.returncode == 85, done.stdout + done.stderr
    assert not summary(tmp_path / "run")["finished"]
    saved, _ = ckpt.newest_valid(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert saved.position["step"] == 5
    done = train(tmp_path / "run", "", REPRODUCIBLE, ranks=3)  # and can be resumed
    assert done.returncode == 0, done.stdout + done.stderr
    result, wanted = summary(tmp_path / "run"), summary(undisturbed[REPRODUCIBLE])
    assert result["parameter_digest"] == wanted["parameter_digest"]
    assert logged(tmp_path / "run") == logged(undisturbed[REPRODUCIBLE])


@pytest.mark.parametrize("others", ["raise", "SIGKILL"])
def test_when_no_rank_can_go_on_the_job_fails(tmp_path: Path, others: str) -> None:
    plan = f"0:3:step:raise 1:3:step:{others} 2:3:step:{others} 3:3:step:{others}"
    done = train(tmp_path / "run", plan)
    assert done.returncode not in (0, 2, 85), done.stdout + done.stderr
    failure = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert failure["cause"] == "RuntimeError: planted"
    assert failure["step"] == 4


def test_an_error_of_mpi_that_stays_fails_the_job(tmp_path: Path) -> None:
    done = train(tmp_path / "run", "1:3:start_gather:errors", REPRODUCIBLE)
    assert done.returncode not in (0, 2, 85), done.stdout + done.stderr
    assert "MPI fails again and again, though no rank has died" in done.stderr


def test_who_wakes_after_the_job_has_failed_does_not_go_on(tmp_path: Path) -> None:
    done = train(tmp_path / "run", "1:3:step:verdict")
    assert done.returncode not in (0, 2, 85), done.stdout + done.stderr
    failure = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert (failure["host"], failure["cause"]) == ("elsewhere", "suspended")
    assert "on elsewhere failed at step 3: suspended" in done.stderr


def test_when_all_ranks_are_killed_mpirun_does_not_end_well(tmp_path: Path) -> None:
    done = train(tmp_path / "run", " ".join(f"{rank}:3:step:SIGKILL" for rank in range(4)))
    assert done.returncode not in (0, 2, 85), done.stdout + done.stderr
    assert not (tmp_path / "run" / "summary.json").exists()


def test_bad_input(tmp_path: Path) -> None:
    def told_in_one_line(done: subprocess.CompletedProcess[str], words: str) -> None:
        assert done.returncode == 2, done.stdout + done.stderr
        assert [line for line in done.stderr.splitlines() if words in line], done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "run").exists()

    plain = "-m", "distrib.train", "--run-dir", tmp_path / "run", *OPTIONS
    told_in_one_line(run(*plain, check=False), "mpirun --with-ft ulfm")
    told_in_one_line(run(*plain, ranks=2, check=False), "mpirun --with-ft ulfm")
    done = train(tmp_path / "run", "", "--min-ranks", 3, ranks=2)
    told_in_one_line(done, "--min-ranks 3: is above the number of ranks, 2")
    done = train(tmp_path / "run", "", "--batch-norm", "local", ranks=2)
    told_in_one_line(done, "--batch-norm local: depends on the ranks")


CRASHED = "ompi_comm_set_rank_failed"
"""In the stack of a rank that Open MPI 5.0.11 crashes: it hears of a death as it makes a communicator."""

SIGNALS = ("SIGKILL", "SIGSEGV", "SIGABRT", "SIGBUS", "SIGUSR2")


def test_deaths_at_random_moments(tmp_path: Path, undisturbed: dict[str, Path]) -> None:
    """In each run of four ranks one to three die at random moments."""
    lost, causes, crashed = [], dict.fromkeys(SIGNALS, 0), 0
    seed = int(os.environ.get("ELASTIC_SEED", time.time_ns()))
    chance = random.Random(seed)
    print(f"seed {seed}")
    for count in itertools.count():
        if sum(causes.values()) >= ROUNDS:
            break
        folder = tmp_path / f"run-{count}"
        deaths = run_and_kill(folder, chance)
        output = (folder.with_name(f"{folder.name}-notes") / "output").read_text(errors="replace")
        killed = {number for number, _, _ in deaths}
        if CRASHED in output:
            crashed += 1
            require_right_after_a_crash(folder, undisturbed[REPRODUCIBLE], killed)
        else:
            require_alike(folder, undisturbed[REPRODUCIBLE], killed)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        for number, cause, moment in deaths:
            causes[cause] += 1
            after = [
                note["time"]
                for note in steps_of(folder)
                if note["time"] > moment and str(number) not in note["images"]
            ]
            before = [note for note in steps_of(folder) if note["time"] < moment]
            if before and after and cause != "SIGUSR2":
                lost.append(after[0] - moment)
    print(f"deaths: {causes}; {crashed} runs in which Open MPI crashed another rank")
    if lost:
        print(
            f"{len(lost)} deaths between the first and the last step: seconds to the next whole step: median"
            f" {statistics.median(lost):.3f}, worst {max(lost):.3f}"
        )


def require_right_after_a_crash(folder: Path, plain: Path, killed: set[int]) -> None:
    """Who is left has gone on. If nobody was, the job has failed, and goes on from its last checkpoint."""
    if not (folder / "summary.json").exists():
        done = train(folder, "", REPRODUCIBLE, ranks=2)
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        assert {entry["rank"] for entry in summary(folder)["survived"]} >= killed
    result, wanted = summary(folder), summary(plain)
    assert result["finished"]
    assert result["parameter_digest"] == wanted["parameter_digest"]
    assert logged(folder) == logged(plain)


def has_begun(notes: Path, process: subprocess.Popen) -> bool:
    """Whether all ranks have started MPI, or mpirun could not start them."""
    return len(list(notes.glob("pid-*"))) == 4 or process.poll() is not None


def run_and_kill(folder: Path, chance: random.Random) -> list[tuple[int, str, float]]:
    """A run of which ranks die; (number, cause, time) of each that died by our hand."""
    env, deaths = told(folder), list[tuple[int, str, float]]()
    notes = Path(env["MORTAL_NOTES"])
    with open(notes / "output", "w") as output:
        process = subprocess.Popen(
            command(folder, 4, REPRODUCIBLE), env=env, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )
        wait_for(lambda: has_begun(notes, process), "the start of MPI")
        pids = {int(path.name.split("-")[1]): int(path.read_text()) for path in notes.glob("pid-*")}
        for _ in range(chance.randint(1, 3) if pids else 0):
            time.sleep(chance.uniform(0, 1.2) ** 2)
            number, cause = chance.choice(sorted(pids)), chance.choice(SIGNALS)
            if process.poll() is not None or (folder / "summary.json").exists():
                break
            moment = time.time()
            with contextlib.suppress(ProcessLookupError):  # it has just come to the end
                os.kill(pids.pop(number), getattr(signal, cause))
                deaths.append((number, cause, moment))
        process.wait(LIMIT)
    text = (notes / "output").read_text(errors="replace")
    if NOT_STARTED in text:
        return run_and_kill(folder, chance)
    if CRASHED in text and process.returncode == 1:
        return deaths
    assert process.returncode == 0, text
    # who was asked to die may have come to the end before, and who finished is not missed
    died = {entry["rank"] for entry in summary(folder)["survived"]}
    return [each for each in deaths if each[0] in died]
