"""kill -9 of a whole job at random moments, some of them inside a save: the run always goes on, and ends
alike.

KILL_ROUNDS in the environment asks for more kills than a quick pass has (`make soak`).
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import LIMIT, ROOT, environment, summary, train

from distrib.faults.heartbeat import read_heartbeats
from distrib.run import checkpoint as ckpt

ROUNDS = int(os.environ.get("KILL_ROUNDS", "5"))
OPTIONS = (
    "--epochs",
    max(6, ROUNDS),
    "--batch-size",
    16,
    "--limit-train",
    320,
    "--limit-test",
    1,
    "--width",
    0.125,
    "--schedule",
    "onecycle",
    "--checkpoint-every",
    1,
    "--keep",
    2,
    "--log-every",
    100,
)


def start(folder: Path) -> subprocess.Popen[bytes]:
    mpirun = Path(sys.executable).with_name("mpirun")
    command = [
        str(mpirun) if mpirun.exists() else "mpirun",
        "-n",
        "2",
        sys.executable,
        "-m",
        "distrib.train",
        "--run-dir",
        str(folder),
    ]
    return subprocess.Popen(
        [*command, *map(str, OPTIONS)],
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def stop_inside_a_save(folder: Path, saver: int, deadline: float) -> None:
    """Stop rank 0 while a file of a checkpoint is half written."""
    while True:
        assert time.monotonic() < deadline, "no save was seen"
        if list((folder / "checkpoints").glob(".*.tmp")):
            os.kill(saver, signal.SIGSTOP)
            while not stopped(saver):
                assert time.monotonic() < deadline, "rank 0 did not stop"
                time.sleep(0.001)
            if list((folder / "checkpoints").glob(".*.tmp")):
                return
            os.kill(saver, signal.SIGCONT)


def stopped(pid: int) -> bool:
    """Whether each thread has stopped: one that is in the middle of a write does so after it."""
    states = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended
            states.append((task / "stat").read_text().rpartition(")")[2].split()[0])
    return set(states) == {"T"}


def test_killed_again_and_again(tmp_path: Path) -> None:
    train(tmp_path / "whole", *OPTIONS, ranks=2)
    folder, dice, steps, inside = tmp_path / "run", random.Random(0), [], 0
    for round_ in range(ROUNDS):
        process = start(folder)
        before, deadline = (steps[-1] if steps else 0), time.monotonic() + LIMIT
        # into the steps of this process, then a random moment, in every other round one inside a save
        while (found := ckpt.list_checkpoints(folder / "checkpoints")[:1]) == [] or int(
            found[0].stem.split("-")[1]
        ) <= before:
            assert time.monotonic() < deadline, "no step was saved"
            assert process.poll() is None, f"ended by itself with {process.returncode}: give it more epochs"
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 0.1))
        # of the ranks, which are not in the launcher's group
        pids = [beat.pid for beat in read_heartbeats(folder)]
        if round_ % 2:
            stop_inside_a_save(folder, pids[0], deadline)
        # mpirun last: the kernel continues stopped processes whose parent has gone
        for pid in (*pids, process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        inside += bool(list((folder / "checkpoints").glob(".*.tmp")))
        newest, problems = ckpt.newest_valid(folder / "checkpoints")
        assert newest is not None, "no valid checkpoint is left"
        assert not problems, "a checkpoint is whole or not there"
        steps.append(newest.position["step"])
    assert steps == sorted(steps)
    train(folder, *OPTIONS, ranks=2)
    found, expected = summary(folder), summary(tmp_path / "whole")
    assert found["finished"]
    assert found["parameter_digest"] == expected["parameter_digest"]
    assert inside >= ROUNDS // 2, "a kill that should have fallen into a save did not"
    print(f"{ROUNDS} kills, {inside} of them inside a save, at steps {steps}")
