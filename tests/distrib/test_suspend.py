"""A job that is suspended and continued goes on as if nothing had been, however long it stood still.

Slurm's gang scheduling and `scontrol suspend`, Ctrl-Z and fg, a laptop's lid: all stop the ranks of a job,
and often mpirun too, longer than --timeout. SUSPEND_ROUNDS in the environment asks for a campaign of many
(`make soak`).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import LIMIT, ROOT, environment, run, summary, train

from distrib.faults.heartbeat import read_heartbeats

ROUNDS = int(os.environ.get("SUSPEND_ROUNDS", "0"))
TIMEOUT = 6
OPTIONS = [
    "--epochs",
    "2",
    "--batch-size",
    "16",
    "--limit-train",
    "640",
    "--limit-test",
    "200",
    "--width",
    "0.0625",
    "--checkpoint-every",
    "7",
]


@contextmanager
def started(folder: Path, ranks: int, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """A training job on `ranks` ranks, under mpirun where there are several."""
    python = [
        sys.executable,
        "-m",
        "distrib.train",
        "--run-dir",
        str(folder),
        "--timeout",
        str(TIMEOUT),
        *OPTIONS,
        *more,
    ]
    launcher = [str(Path(sys.executable).with_name("mpirun")), "-n", str(ranks)] if ranks > 1 else []
    with open(f"{folder}.log", "wb") as log:
        job = subprocess.Popen([*launcher, *python], cwd=ROOT, env=environment(), stdout=log, stderr=log)
    try:
        yield job
    finally:
        job.kill()
        job.wait()


def until(holds: Callable[[], object], job: subprocess.Popen[bytes]) -> None:
    """Return when `holds` does; AssertionError where the job ends before."""
    deadline = time.monotonic() + LIMIT
    while not holds():
        assert job.poll() is None, "the job ended"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def suspend(folder: Path, ranks: int, moment: int, seconds: float, launcher_too: bool) -> int:
    """Stop a job's processes in step `moment` for `seconds`, and let them go on; its exit code."""
    with started(folder, ranks) as job:
        until(
            lambda: len(beats := read_heartbeats(folder)) == ranks and max(b.step for b in beats) >= moment,
            job,
        )
        pids = [beat.pid for beat in read_heartbeats(folder)] + [job.pid] * launcher_too
        for sent in (signal.SIGSTOP, signal.SIGCONT):
            for pid in random.Random(moment).sample(pids, len(pids)):
                os.kill(pid, sent)
            time.sleep(seconds * (sent == signal.SIGSTOP))
        return job.wait(LIMIT)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """The digest of the same run without a stop, by the number of ranks."""
    digests: dict[int, str] = {}

    def digest(ranks: int) -> str:
        if ranks not in digests:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            train(folder, *OPTIONS, ranks=ranks)
            digests[ranks] = summary(folder)["parameter_digest"]
        return digests[ranks]

    return digest


CASES = [(1, 20, 1.5, False), (2, 30, 2.0, True), (2, 20, 1.5, False)]
DICE = random.Random(0)
CASES += [
    (ranks, DICE.randrange(1, 80), timeouts, DICE.random() < 0.5 and ranks > 1)
    for _ in range(ROUNDS)
    for ranks in (1, 2, 4)
    for timeouts in (0.5, 1.0, 3.0)
]


@pytest.mark.parametrize(("ranks", "moment", "timeouts", "launcher_too"), CASES)
def test_the_run_ends_as_if_it_had_not_been_suspended(
    tmp_path: Path,
    undisturbed: Callable[[int], str],
    ranks: int,
    moment: int,
    timeouts: float,
    launcher_too: bool,
) -> None:
    folder = tmp_path / "run"
    code = suspend(folder, ranks, moment, timeouts * TIMEOUT, launcher_too)
    assert code == 0, Path(f"{folder}.log").read_text()
    assert summary(folder)["parameter_digest"] == undisturbed(ranks)
    assert not (folder / "failure.json").exists()


def test_a_suspended_run_is_not_said_to_have_failed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with started(folder, 1, "--epochs", "10000") as job:
        until(lambda: any(beat.step > 5 for beat in read_heartbeats(folder)), job)
        os.kill(job.pid, signal.SIGSTOP)
        verdict = run("-m", "launch.cli", "verdict", folder).stdout
        watched = run("-m", "launch.cli", "watch", folder, "--once", "--timeout", 1, check=False)
        os.kill(job.pid, signal.SIGCONT)
        os.kill(job.pid, signal.SIGTERM)
        assert job.wait(LIMIT) == 85
    assert "may be suspended" in verdict
    assert watched.returncode == 0, watched.stdout
    assert not (folder / "failure.json").exists()


WAITS = {  # name: the block that the process is suspended in
    "watchdog": "failure.Watchdog(0, 2).waiting('a test')",
    "kill_after": "failure.kill_after(2, 'a test')",
}


@pytest.mark.parametrize("what", WAITS)
def test_time_in_which_nothing_ran_is_no_waiting_time(what: str) -> None:
    code = f"""
import os, signal
from distrib.faults import watchdog as failure
with {WAITS[what]}:
    os.kill(os.getpid(), signal.SIGSTOP)
print("alive")
"""
    job = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment(), stdout=subprocess.PIPE)
    _, status = os.waitpid(job.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    time.sleep(5)
    os.kill(job.pid, signal.SIGCONT)
    assert job.communicate(timeout=LIMIT)[0] == b"alive\n"


@pytest.mark.parametrize("what", WAITS)
def test_a_wait_without_end_is_ended(what: str) -> None:
    code = f"""
import time
from distrib.faults import watchdog as failure
with {WAITS[what]}:
    time.sleep(3600)
"""
    done = run("-c", code, check=False)
    assert done.returncode in (1, -signal.SIGKILL)
    assert "a test" in done.stderr
