"""Output that nobody can read, and signals at any time, never change how a run ends."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import LIMIT, ROOT, environment, run, summary

from distrib.faults.heartbeat import read_heartbeats

TRAIN = [
    sys.executable,
    "-m",
    "distrib.train",
    "--batch-size",
    "16",
    "--width",
    "0.0625",
    "--limit-test",
    "20",
]
SHORT = [*TRAIN, "--epochs", "1", "--limit-train", "160"]
LONG = [*TRAIN, "--epochs", "10000", "--limit-train", "320"]


def started(folder: Path) -> subprocess.Popen[bytes]:
    """A long run, once it trains."""
    job = subprocess.Popen(
        [*LONG, "--run-dir", folder], cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + LIMIT
    while not any(beat.step > 3 for beat in read_heartbeats(folder)):
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return job


@pytest.mark.parametrize(
    "how", [">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", ">/dev/full 2>&1", "| head -n 1 | cat >/dev/null"]
)
def test_a_run_goes_on_in_silence(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "run"
    command = " ".join(map(str, [*SHORT, "--run-dir", folder, how]))
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    assert summary(folder)["finished"]
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        assert line.startswith("{"), "nothing was printed into a file that took a closed stream's number"


def test_a_mistake_keeps_its_exit_code_without_output(tmp_path: Path) -> None:
    command = " ".join([*SHORT, "--lr", "-1", ">/dev/full", "2>/dev/full"])
    assert subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment(), timeout=LIMIT).returncode == 2


@pytest.mark.parametrize(("ignored", "code"), [(True, 0), (False, 85)])
def test_the_terminal_goes_away(tmp_path: Path, ignored: bool, code: int) -> None:
    """As nohup starts it, a run goes on; else it is told to stop, as by SIGTERM."""
    folder = tmp_path / "run"
    limit = ["--max-steps", "200"] if ignored else []
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        os.chdir(ROOT)
        os.execve(sys.executable, [*LONG, *limit, "--run-dir", str(folder)], environment())
    deadline = time.monotonic() + LIMIT
    while not any(beat.step > 3 for beat in read_heartbeats(folder)):
        assert time.monotonic() < deadline
        if select.select([terminal], [], [], 0.02)[0]:
            os.read(terminal, 65536)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == code
    assert summary(folder)["steps"] == 200 if ignored else not summary(folder)["finished"]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1])
def test_signals_that_come_late_change_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """Told to stop again and again until it is gone, it ends with its own code."""
    job = started(tmp_path / "run")
    deadline = time.monotonic() + LIMIT
    while job.poll() is None:
        assert time.monotonic() < deadline
        os.kill(job.pid, number)
        time.sleep(0.002)
    assert job.returncode == 85
    assert not summary(tmp_path / "run")["finished"]


def test_a_log_file_gets_no_bars_from_one_rank_under_mpirun(tmp_path: Path) -> None:
    """mpirun gives its rank a terminal of its own, into a file too."""
    mpirun = Path(sys.executable).with_name("mpirun")
    with open(tmp_path / "log", "wb") as log:
        command = [str(mpirun), "-n", "1", *SHORT, "--run-dir", str(tmp_path / "run")]
        assert subprocess.run(command, cwd=ROOT, env=environment(), stdout=log, timeout=LIMIT).returncode == 0
    text = (tmp_path / "log").read_text()
    assert "\x1b" not in text
    assert "finished: test accuracy" in text


def test_progress_right_after_a_logged_step_has_a_speed(tmp_path: Path) -> None:
    code = (
        "from distrib.run import console; console.PLAIN_SECONDS = 0\nfrom distrib.train import main; main()"
    )
    done = run("-c", code, *SHORT[3:], "--log-every", 1, "--run-dir", tmp_path / "run")
    progress = [line for line in done.stdout.splitlines() if "images/s  left" in line]
    assert len(progress) == 10
    assert not [line for line in progress if " 0 images/s" in line]


def test_unbuffered_output_is_written_at_once() -> None:
    """A rank that is killed loses nothing of what it printed; slurm/train.sh asks for that."""
    code = """
import os, sys
from distrib.run.console import secure_output
secure_output()
print("out")
print("err", file=sys.stderr)
os._exit(0)
"""
    done = run("-c", code, env={"PYTHONUNBUFFERED": "1"})
    assert (done.stdout, done.stderr) == ("out\n", "err\n")
    assert run("-c", code, env={"PYTHONUNBUFFERED": ""}).stderr == "err\n"


def test_a_slow_reader_of_a_pipe_that_does_not_block_gets_all() -> None:
    code = """
import os
from distrib.run.console import secure_output
secure_output()
os.set_blocking(1, False)
for line in range(20000):
    print(line)
"""
    job = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment(), stdout=subprocess.PIPE)
    assert job.stdout
    time.sleep(0.5)  # the pipe is full by now, or it is not: all must come
    text = job.stdout.read()
    job.stdout.close()
    assert job.wait(LIMIT) == 0
    assert text.split() == [str(line).encode() for line in range(20000)]


def test_signals_are_handled_as_before_after_a_run() -> None:
    code = """
import signal
from types import SimpleNamespace
from distrib.faults.signals import STOP_SIGNALS, stop_on_signals
before = [signal.getsignal(number) for number in STOP_SIGNALS]
with stop_on_signals(SimpleNamespace(stop_requested=False)): pass
after = [signal.getsignal(number) for number in STOP_SIGNALS]
assert after == before
with stop_on_signals(SimpleNamespace(stop_requested=False), exiting=True): pass
assert {signal.getsignal(number) for number in STOP_SIGNALS} == {signal.SIG_IGN}
with stop_on_signals(SimpleNamespace(stop_requested=False), exiting=True):  # a run that starts again
    assert signal.SIG_IGN not in map(signal.getsignal, STOP_SIGNALS)
"""
    run("-c", code)


def test_one_process_inside_a_step_of_several_tasks(tmp_path: Path) -> None:
    """`srun -n 4 --pty bash`: Slurm counts four tasks, and one process is wanted."""
    command = [*SHORT[1:], "--comm", "none", "--run-dir", tmp_path / "run"]
    done = run(*command, env={"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"})
    assert summary(tmp_path / "run")["world_size"] == 1
    assert "the launcher counts 4 ranks" in " ".join(done.stdout.split())
