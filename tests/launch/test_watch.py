"""`distrib watch`: what it says of runs that go on, end, are stopped, fail or fall silent."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import LIMIT, ROOT, environment

from distrib.faults import heartbeat
from distrib.faults.heartbeat import Heartbeat
from launch import watch as module
from launch.report import follow, runs
from launch.report.follow import Follower
from launch.watch import epoch_line, sparkline, view, watch

TRAINING = (
    "--epochs",
    "2",
    "--batch-size",
    "8",
    "--limit-train",
    "960",
    "--limit-test",
    "100",
    "--width",
    "0.0625",
    "--log-every",
    "5",
)
ENDLESS = (*TRAINING, "--epochs", "10000")
PROGRAM = (
    "import sys, typer\nfrom distrib.train import run_app\nfrom launch.watch import watch\n"
    "app = typer.Typer()\napp.command()(watch)\nsys.exit(run_app(app))"
)


@pytest.fixture
def call(command_line):
    """`watch` by `command_line`; never a control character."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code, out, err = command_line(watch, *arguments)
        assert all(letter.isprintable() or letter == "\n" for letter in out + err)
        return code, out, err

    return run


@pytest.fixture
def start(tmp_path: Path):
    """Start a training in the background, in tmp_path / "run"; what is left of it is killed."""
    started: list[subprocess.Popen[bytes]] = []

    def run(*options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "distrib.train", "--run-dir", str(tmp_path / "run"), *options]
        with open(tmp_path / "log", "wb") as log:
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def written(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder with its size and time of change."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in (folder, *folder.rglob("*"))
    }


def wait_until(condition) -> None:
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < LIMIT
        time.sleep(0.05)


def logged(folder: Path) -> bool:
    """Whether a step is logged and the rank has written a heartbeat."""
    metrics = folder / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0 and bool(heartbeat.read_heartbeats(folder))


def make(folder: Path, *beats: Heartbeat, steps: int = 7, **config: object) -> Path:
    """A run's folder with some logged steps of 10 of two epochs, and the last heartbeats of its ranks."""
    (folder / "ranks").mkdir(parents=True)
    whole = {"epochs": 2, "batch_size": 8, "limit_train": 80, "data": None, "max_steps": None, **config}
    (folder / "config.json").write_text(json.dumps(whole))
    lines = [
        {"step": step, "epoch": 1, "lr": 0.1, "loss": 2 / step, "accuracy": 50.0, "images_per_second": 4.0}
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for beat in beats:
        (folder / "ranks" / f"{beat.rank:05}.json").write_text(json.dumps(vars(beat)))
    return folder


def test_a_run_to_its_end_in_a_file(call, start, tmp_path: Path) -> None:
    start(*TRAINING)
    code, out, _ = call(tmp_path / "run", "--interval", 0.1)
    assert code == 0, out
    lines = out.splitlines()
    assert lines[0] == f"waiting up to 60 s for {tmp_path / 'run'}"
    assert "/240" in lines[1]
    assert [line[:10] for line in lines[-3:]] == ["epoch 1/2:", "epoch 2/2:", "finished a"]
    assert all(line in (tmp_path / "log").read_text() for line in lines[-3:-1])  # as the run itself says it
    wait_until(lambda: all(beat.state == "finished" for beat in heartbeat.read_heartbeats(tmp_path / "run")))
    before = written(tmp_path / "run")
    code, out, _ = call(tmp_path / "run", "--once")
    assert code == 0
    for text in ("epoch 2/2", "240/240", "loss", "images/s", "0     ", "finished at step 240: test accuracy"):
        assert text in out
    assert written(tmp_path / "run") == before


def test_a_run_to_its_end_on_a_terminal(start, tmp_path: Path) -> None:
    start(*TRAINING)
    wait_until(lambda: logged(tmp_path / "run"))
    ours, theirs = pty.openpty()
    env = environment({"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"})
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "run"), "--interval", "0.2"],
        cwd=ROOT,
        env=env,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        said = b""
        try:
            while part := os.read(ours, 65536):
                said += part
        except OSError:  # Linux's way to say that nobody writes any more
            pass
    os.close(ours)
    out = said.decode()
    assert process.returncode == 0, out
    for text in (
        "\x1b[",
        "━",
        "/240",
        "images/s",
        socket.gethostname(),
        "epoch 2/2: train loss",
        "finished at step 240",
    ):
        assert text in out
    assert any(f"  {doing}" in out for doing in ("computing", "waiting in", "finished"))
    assert out.rindex("\x1b[?25h") > out.rindex("\x1b[?25l")  # the cursor is there again


def test_ctrl_c_leaves_the_run_alone_and_a_stop_is_told(call, start, tmp_path: Path) -> None:
    training = start(*ENDLESS)
    wait_until(lambda: logged(tmp_path / "run"))
    watching = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "run")],
        cwd=ROOT,
        env=environment({"PYTHONUNBUFFERED": "1"}),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        first = watching.stdout.readline()  # how many epochs the run has had by now, the machine decides
        watching.send_signal(signal.SIGINT)
        rest, _ = watching.communicate(timeout=120)
    finally:
        watching.kill()
        watching.wait()
    assert re.match(r"epoch \d+/10000", first)
    assert rest.endswith("no longer watching; the run continues\n")
    assert watching.returncode == 130
    assert call(tmp_path / "run", "--once")[0] == 0
    assert training.poll() is None
    training.send_signal(signal.SIGUSR1)
    code, out, _ = call(tmp_path / "run", "--interval", 0.1)
    assert code == 85
    assert "stopped, with a checkpoint to resume from, at step" in out.splitlines()[-1]


def test_a_killed_run_is_told_soon(call, start, tmp_path: Path) -> None:
    """Before --timeout: after that, the verdict would begin with the silence of all ranks."""
    training = start(*ENDLESS)
    wait_until(lambda: logged(tmp_path / "run"))
    training.kill()
    before = sorted(written(tmp_path / "run"))
    code, out, _ = call(tmp_path / "run", "--interval", 0.2)
    assert code == 1
    assert out.splitlines()[-1].startswith(f"rank 0 on {socket.gethostname()} failed at step ")
    assert out.endswith("its process is gone: killed, or out of memory\n")
    assert sorted(written(tmp_path / "run")) == before


def test_failed(call, tmp_path: Path) -> None:
    beat = Heartbeat(3, "h", 1, step=7, time=time.time())
    heartbeat.record_failure(make(tmp_path / "run", beat), beat, "ZeroDivisionError: planted")
    for more in ((), ("--once",)):
        code, out, _ = call(tmp_path / "run", *more)
        assert code == 1
        assert out.splitlines()[-1] == "rank 3 on h failed at step 7: ZeroDivisionError: planted"


@pytest.mark.parametrize(
    ("beats", "verdict"),
    [
        (
            [Heartbeat(rank, "elsewhere", 1, step=5 + rank, time=time.time() - 100) for rank in range(2)],
            r"no heartbeat of any rank for \d+ s: rank 0 on elsewhere failed at step 5: no heartbeat for",
        ),
        ([], r"no heartbeat of any rank for \d+ s: it did not start"),
        (
            [Heartbeat(0, "elsewhere", 1, step=5, state=heartbeat.USER_ERROR, time=time.time())],
            "ended with a message .* step 5",
        ),
        (
            [Heartbeat(0, "elsewhere", 1, step=5, state=f"{heartbeat.FAILED}cause", time=time.time())],
            "rank 0 .* at step 5: cause",
        ),
    ],
    ids=["silent", "nobody", "refused", "failed"],
)
def test_ends_without_a_last_file(call, tmp_path: Path, beats: list[Heartbeat], verdict: str) -> None:
    code, out, _ = call(make(tmp_path / "run", *beats), "--timeout", 1, "--interval", 0.1)
    assert code == 1
    assert re.search(verdict, out.splitlines()[-1])


def test_new_heartbeats_count_whatever_the_clock(
    call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank's clock an hour late: its heartbeats are new all the same."""
    beat, told = Heartbeat(0, "elsewhere", 1, step=5, time=time.time() - 3600), 0

    def read_heartbeats(folder: Path) -> list[Heartbeat]:
        nonlocal told
        told += 1
        if told == 30:
            (folder / "summary.json").write_text(json.dumps({"finished": True, "steps": 20, "world_size": 1}))
        return [Heartbeat(**{**vars(beat), "time": beat.time + told})]

    monkeypatch.setattr(follow, "read_heartbeats", read_heartbeats)
    code, out, _ = call(make(tmp_path / "run"), "--timeout", 0.5, "--interval", 0.1)
    assert code == 0, out


def test_a_reader_that_leaves_ends_nothing(tmp_path: Path) -> None:
    """As with `| head -1`: the exit code is the run's all the same."""
    beat = Heartbeat(0, "elsewhere", 1, step=5, time=time.time())
    folder = make(tmp_path / "run", beat)
    watching = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), "--interval", "0.1"],
        cwd=ROOT,
        env=environment({"PYTHONUNBUFFERED": "1"}),
        stdout=subprocess.PIPE,
    )
    try:
        assert watching.stdout.readline().startswith(b"epoch 1/2")
        watching.stdout.close()
        epoch = {
            "step": 10,
            "epoch": 1,
            "train_loss": 1,
            "train_accuracy": 1,
            "test_loss": 1,
            "test_accuracy": 1,
        }
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(epoch) + "\n")  # a line that nobody reads
        (folder / "half").write_text(json.dumps({"finished": False, "steps": 10, "world_size": 1}))
        (folder / "half").replace(folder / "summary.json")
        assert watching.wait(120) == 85
    finally:
        watching.kill()
        watching.wait()


def test_max_steps_is_no_stop(call, tmp_path: Path) -> None:
    folder = make(tmp_path / "run", max_steps=7)
    (folder / "summary.json").write_text(json.dumps({"finished": False, "steps": 7, "world_size": 1}))
    code, out, _ = call(folder)
    assert code == 0
    assert "7/7" in out
    assert "ended as --max-steps asked at step 7" in out


def test_nothing_to_watch(call, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, words in (("empty", "empty: holds no run"), ("nowhere", "nowhere: no such folder")):
        for more in (("--timeout", 0.3), ("--once",)):
            code, _, err = call(tmp_path / name, *more)
            assert code == 2
            assert words in err
            assert len(err.splitlines()) == 1
    assert not (tmp_path / "nowhere").exists()
    for option in ("--interval", "--timeout"):
        assert call(tmp_path / "empty", option, 0)[0] == 2


def test_a_damaged_run_is_not_waited_for(call, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    code, out, err = call(tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "config.json: cannot be read as JSON" in err


def test_half_written_and_rewritten_lines(tmp_path: Path) -> None:
    """A line counts when it is whole; what is no line of a run is skipped; a rewritten file is read anew."""
    folder = make(tmp_path / "run")
    metrics, run = folder / "metrics.jsonl", Follower(folder, 60)
    line = json.dumps(
        {"step": 8, "loss": 0.5, "epoch": 1, "accuracy": 1.0, "note": "ü"}, ensure_ascii=False
    ).encode()
    with open(metrics, "ab") as file:
        for part in (b"[1]\nnull\n{bad}\n", line[:-3], line[-3:]):  # the second ends within a letter
            file.write(part)
            file.flush()
            run.look()
            assert run.steps[-1]["step"] == 7
        file.write(b"\n")
    run.look()
    assert [line["step"] for line in run.steps] == list(range(1, 9))
    other = tmp_path / "other"
    other.write_text(metrics.read_text().splitlines(True)[0])
    other.replace(metrics)
    run.look()
    assert [line["step"] for line in run.steps] == [1]


def test_progress_and_many_ranks(tmp_path: Path) -> None:
    now = time.time()
    beats = [Heartbeat(rank, f"h{rank // 8}", 1, step=9, doing="computing", time=now) for rank in range(40)]
    beats[33].step = 8  # the one behind is among those shown
    run = Follower(make(tmp_path / "run", *beats), 60)
    run.look()
    assert run.progress() == (7 / 20, "epoch 1/2", "7/20  left 0:00:26")
    console = module.Console(force_terminal=False, width=120)
    with console.capture() as captured:
        console.print(view(run, console))
    out = captured.get().splitlines()
    assert sum("computing" in line for line in out) == 16
    assert any(line.startswith("33    h4    8 ") for line in out)
    assert out[-1].startswith("and 24 more at steps 9 to 9")


def test_training_images(small_data: Path, tmp_path: Path) -> None:
    assert runs.training_images(None) == 60000
    assert runs.training_images(str(small_data)) == 64
    assert runs.training_images(str(tmp_path / "nowhere")) is None
    run = Follower(make(tmp_path / "run", limit_train=None, data=str(tmp_path / "nowhere")), 60)
    run.look()
    assert run.progress() == (0.0, "epoch ?/2", "7/?")


def test_sparkline() -> None:
    assert sparkline([1, 10, 100]) == "▁▅█"  # of logarithms
    assert sparkline([0, 1, 2]) == "▁▅█"
    assert sparkline([3.0, float("nan"), 3.0]) == "▁▁"
    assert sparkline([]) == ""


def test_an_epoch_says_what_it_was_tried_on() -> None:
    line = {"epoch": 1, "train_loss": 1.0, "train_accuracy": 50.0}
    for held in ("test", "validation"):
        said = epoch_line({**line, f"{held}_loss": 0.5, f"{held}_accuracy": 75.0}, 3)
        assert said.endswith(f"{held} loss 0.5000, accuracy 75.00 %")
