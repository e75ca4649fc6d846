"""`distrib train --ranks N` starts the ranks by itself, passes on what it is asked, and ends as they do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import LIMIT, MPI_ENVIRONMENT, ROOT, environment, run, summary, wait_for

from distrib.config import build
from distrib.faults.heartbeat import read_heartbeats
from distrib.train import parse
from launch import cli, machine
from launch.train import arguments, without_banner

SMALL = ("--batch-size", "16", "--limit-train", "640", "--limit-test", "100", "--width", "0.0625")
PLAIN = {name: value for name, value in environment().items() if name not in MPI_ENVIRONMENT}
"""Without what mpirun needs here: as a person's shell is."""


@contextmanager
def started(folder: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """A long run on two ranks, once both train."""
    command = [sys.executable, "-m", "launch.cli", "train", "--ranks", "2", "--run-dir", str(folder), *SMALL]
    pipe = subprocess.PIPE
    job = subprocess.Popen(
        [*command, "--epochs", "10000", *more], cwd=ROOT, env=PLAIN, text=True, stdout=pipe, stderr=pipe
    )
    try:
        before = {beat.pid for beat in read_heartbeats(folder)}
        wait_for(lambda: len([beat for beat in fresh(folder, before) if beat.step > 1]) == 2, "steps", job)
        yield job
    finally:
        job.kill()
        job.communicate()


def fresh(folder: Path, before: set[int]) -> list:
    return [beat for beat in read_heartbeats(folder) if beat.pid not in before]


def state(pid: int) -> str:
    """A letter: T of a stopped process, Z or nothing of one that has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return ""


def test_it_trains_on_its_ranks_and_says_a_mistake_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ("--run-dir", folder, *SMALL, "--epochs", 1)
    done = run("-m", "launch.cli", "train", "--ranks", 2, *options, env=PLAIN)
    assert "2 rank(s)" in done.stdout
    assert summary(folder)["world_size"] == 2
    again = run("-m", "launch.cli", "train", "--ranks", 2, *options, env=PLAIN, check=False)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == (
        f"distrib: error: --run-dir {folder}: holds a finished run: give a new folder, or more --epochs\n"
    )


def test_signals_stop_it_with_a_checkpoint(tmp_path: Path) -> None:
    """Ctrl-C too, at which a plain mpirun kills its ranks; Ctrl-Z stops all, and fg continues them."""
    folder = tmp_path / "run"
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        with started(folder) as job:
            if number == signal.SIGTERM:
                pids = [job.pid, *(beat.pid for beat in read_heartbeats(folder))]
                job.send_signal(signal.SIGTSTP)
                wait_for(lambda pids=pids: {state(pid) for pid in pids} == {"T"}, "all are stopped")
                job.send_signal(signal.SIGCONT)
                wait_for(lambda pids=pids: "T" not in {state(pid) for pid in pids}, "all go on")
            job.send_signal(number)
            _, err = job.communicate(timeout=LIMIT)
            assert (job.returncode, err) == (85, ""), number
        done = summary(folder)
        assert not done["finished"]
        assert (folder / "checkpoints" / f"step-{done['steps']:08}.safetensors").exists()


def test_what_ends_it_at_once(tmp_path: Path) -> None:
    """No rank is left behind: at a second Ctrl-C, and when only the command itself is killed."""
    for number in (signal.SIGINT, signal.SIGKILL):
        folder = tmp_path / number.name
        with started(folder) as job:
            pids = [beat.pid for beat in read_heartbeats(folder)]
            for pid in pids if number == signal.SIGINT else ():
                os.kill(pid, signal.SIGSTOP)  # else they would stop by themselves
            wait_for(lambda job=job, number=number: job.send_signal(number) or job.poll() is not None, "end")
            assert job.returncode not in (0, 2, 85)
            wait_for(lambda pids=pids: {state(pid) for pid in pids} <= {"", "Z"}, "all ranks end")


def test_ranks_may_die(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with started(folder, "--elastic") as job:
        os.kill(read_heartbeats(folder)[0].pid, signal.SIGKILL)
        wait_for(lambda: "survived" in read(folder / "failure.json"), "the other goes on", job)
        job.send_signal(signal.SIGTERM)
        job.communicate(timeout=LIMIT)
        assert job.returncode == 85
    assert summary(folder)["world_size"] == 1


def read(path: Path) -> dict:
    with suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return {}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--ranks", "0"), "--ranks 0: give 1 or more"),
        (("--ranks", "x"), "--ranks x: give a whole number"),
        (("--ranks", "2", "--lr", "0"), "--lr 0.0: give a finite number above 0"),
        (
            ("--ranks", "2"),
            "--ranks above 1: no mpirun is installed: pip install 'distrib[mpi]', or --ranks 1",
        ),
    ],
)
def test_mistakes_are_told_before_a_rank_starts(
    options: tuple[str, ...], words: str, command_line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda *_, **__: None)
    code, out, err = command_line(cli.app, "train", *options)
    assert (code, out, err) == (2, "", f"distrib: error: {words}\n")


@pytest.mark.quick
def test_a_launcher_that_started_ranks_already(command_line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    code, out, err = command_line(cli.app, "train", "--ranks", "4")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--ranks 4: mpirun or srun has started 4 rank(s) already" in err


@pytest.mark.quick
def test_all_options_are_passed_on() -> None:
    given = {"epochs": 3, "lr": 1e-05, "elastic": True, "cuda_graph": False, "run_dir": "-a b", "data": None}
    passed = list(arguments(given))
    assert passed == ["--epochs=3", "--lr=1e-05", "--elastic", "--no-cuda-graph", "--run-dir=-a b"]
    assert parse(passed) == build(given)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("cores", "ranks", "given", "threads"), [(8, 2, None, 4), (2, 8, None, 1), (8, 2, "3", 3)]
)
def test_threads_of_a_rank(
    cores: int, ranks: int, given: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert machine.threads_each(ranks) == threads


@pytest.mark.quick
def test_mpiruns_own_words_about_an_exit_code_of_ours_are_left_out() -> None:
    rule = b"-" * 74 + b"\n"
    said = [b"prterun detected that\n", b"   Exit code:    85\n"]
    killed = [b"prterun noticed that process rank 1\n", b"signal 9 (Killed).\n"]
    lines = [b"before\n", rule, *said, rule, b"between\n", rule, *killed, rule, b"after\n", rule, b"cut\n"]
    kept = [b"before\n", b"between\n", rule, *killed, rule, b"after\n", rule, b"cut\n"]
    assert b"".join(without_banner(lines)) == b"".join(kept)
    crash = [rule, b"   Exit code:    1\n", rule]
    assert b"".join(without_banner(crash)) == b"".join(crash)
