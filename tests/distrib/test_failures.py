"""Every way a rank can fail: the job ends within a bound, non-zero, nothing is left running, and the right
rank is named.

Faults are put into a random rank at a random step of a real run of several ranks; FAULT_ROUNDS in the
environment asks for more rounds than the few of a quick pass (`make soak`).
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import LIMIT, ROOT, at, environment, pause, run, summary, train, wait_for

from distrib.faults.heartbeat import (
    TOLD_TO_STOP,
    Heartbeat,
    Heartbeats,
    find_culprit,
    format_failure,
    read_heartbeats,
    record_failure,
)
from distrib.faults.watchdog import Watchdog
from distrib.run import checkpoint as ckpt

ROUNDS = int(os.environ.get("FAULT_ROUNDS", "1"))
TIMEOUT = 8
OPTIONS = (
    "--epochs",
    1,
    "--batch-size",
    16,
    "--limit-train",
    320,
    "--limit-test",
    20,
    "--width",
    0.0625,
    "--log-every",
    5,
    "--checkpoint-every",
    4,
    "--check-every",
    3,
    "--timeout",
    TIMEOUT,
)

FAULTS = {  # name: (what happens in the rank, part of the recorded cause)
    "raises": ("raise ZeroDivisionError('planted')", "ZeroDivisionError: planted"),
    "exits": ("sys.exit(3)", "it called sys.exit(3)"),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", "its process is gone without an error"),
    "dies": ("os._exit(0)", "without an error"),
    "stopped": ("os.kill(os.getpid(), signal.SIGSTOP)", "no heartbeat for"),
    "stalls": ("time.sleep(3600)", "behind the others, computing"),
    "memory": (
        "import resource; pages = int(open('/proc/self/statm').read().split()[0]);"
        " resource.setrlimit(resource.RLIMIT_AS, (pages * 4096,) * 2); bytearray(1 << 40)",
        "MemoryError",
    ),
    "threads": (
        "import threading; threading.Thread.start = None; raise MemoryError('planted')",
        "MemoryError: planted",
    ),
    "files": (
        "import resource; free = os.open(os.devnull, 0);"
        " resource.setrlimit(resource.RLIMIT_NOFILE, (free, free)); open(os.devnull)",
        "OSError: [Errno 24] Too many open files",
    ),
    "corrupted": ("self.params.values[7] += 1", "its parameters differ"),
}


def left_running(folder: Path) -> list[str]:
    """Processes whose command line holds the run's folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in command and int(entry.name) != os.getpid():
            found.append(entry.name)
    return found


@pytest.mark.parametrize("round_", range(ROUNDS))
@pytest.mark.parametrize("fault", FAULTS)
def test_the_right_rank_is_named(fault: str, round_: int, tmp_path: Path) -> None:
    what, words = FAULTS[fault]
    ranks, dice = 3, random.Random(f"{fault} {round_}")
    rank, step = dice.randrange(ranks), dice.randrange(6, 18)
    folder = tmp_path / "run"
    script = at(rank, step, what)
    done = run("-c", script, "--run-dir", folder, *OPTIONS, ranks=ranks, check=False)
    assert done.returncode not in (0, 2, 85), done.stderr
    if not (
        folder / "failure.json"
    ).exists():  # mpirun left nobody the time: what `slurm/train.sh` does afterwards
        run("-m", "launch.cli", "verdict", folder)
    verdict = json.loads((folder / "failure.json").read_text())
    assert (verdict["rank"], words in verdict["cause"]) == (rank, True), (verdict, done.stderr)
    assert verdict["host"] == os.uname().nodename
    # what a rank that was killed had said last may be a second old; a corrupted one is found out some steps
    # later
    assert verdict["step"] <= step + 3
    assert verdict["step"] >= step or fault in ("killed", "dies", "stopped")
    wait_for(lambda: not left_running(folder), f"nothing of {folder} is left running")
    newest, problems = ckpt.newest_valid(folder / "checkpoints")
    assert newest is not None
    assert not problems
    assert newest.position["step"] <= step
    if fault in ("stopped", "stalls"):  # a watchdog fired: its rank's last collectives are written down
        last = [json.loads(path.read_text()) for path in (folder / "ranks").glob("*-collectives.json")]
        assert last
        for each in last:
            numbers = [int(text.split(":")[0]) for text in each]
            assert len(numbers) == 64
            assert numbers == list(range(numbers[0], numbers[0] + 64)), "each collective, in order"
            assert each[-1].endswith(f", step {step + 1}")
    again = train(folder, *OPTIONS, ranks=ranks if fault in ("raises", "killed") else 1)
    assert "finished" in again.stdout
    assert not (folder / "failure.json").exists(), "a run that went on and ended well tells of no failure"


def test_the_verdict_is_the_last_line_of_the_program(tmp_path: Path) -> None:
    script = at(1, 7, "raise ValueError('planted')")
    done = run("-c", script, "--run-dir", tmp_path / "run", *OPTIONS, ranks=2, check=False)
    own = [text for text in done.stderr.splitlines() if text.startswith("distrib:")]
    assert own[-1].startswith(f"distrib: rank 1 on {os.uname().nodename} failed at step")
    assert own[-1].endswith(": ValueError: planted")


def test_checkpoints_need_no_new_thread(tmp_path: Path) -> None:
    script = at(0, 7, "import threading; threading.Thread.start = None")
    run("-c", script, "--run-dir", tmp_path / "run", *OPTIONS, ranks=2)
    assert summary(tmp_path / "run")["finished"]
    assert ckpt.newest_valid(tmp_path / "run" / "checkpoints")[0].position["step"] == 20


def test_a_resumed_run_that_fails_at_once_tells_its_step(tmp_path: Path) -> None:
    """Before its first step too, the verdict names the step of the checkpoint."""
    train(tmp_path / "run", *OPTIONS, "--max-steps", 8)
    code = """
import sys
from distrib import loop as train
def warm_up(*_): raise ValueError("planted")
train.warm_up = warm_up
from distrib.train import main
sys.exit(main())
"""
    run("-c", code, "--run-dir", tmp_path / "run", *OPTIONS, check=False)
    assert json.loads((tmp_path / "run" / "failure.json").read_text())["step"] == 8


def test_one_process_leaves_a_verdict_too(tmp_path: Path) -> None:
    script = at(0, 7, "raise ValueError('planted')")
    done = run("-c", script, "--run-dir", tmp_path / "run", *OPTIONS, check=False)
    assert "ValueError: planted" in done.stderr
    assert json.loads((tmp_path / "run" / "failure.json").read_text())["cause"] == "ValueError: planted"


UNLIKE = {  # what rank 1 has otherwise: (how, words of the message)
    "code": (
        "checks.code_digest = lambda: 'another'",
        "runs other code than rank 0: install the same version everywhere",
    ),
    "data": (
        "plain = formats.load; formats.load = lambda *given:"
        " replace(found := plain(*given), train_images=255 - found.train_images)",
        "reads other data than rank 0: give all ranks the same files",
    ),
    "steps": (
        "plain = Trainer.__init__;"
        " Trainer.__init__ = lambda self, *given: (plain(self, *given), setattr(self, 'steps', 7))[1]",
        "buckets for 7 steps, rank 0 float32",
    ),
    "buckets": (
        "from functools import partial; from distrib import trainer;"
        " trainer.Reducer = partial(reducer.Reducer, bucket_bytes=5000)",
        "start all ranks with the same options",
    ),
}


@pytest.mark.parametrize("what", UNLIKE)
def test_a_rank_that_is_unlike_is_refused(tmp_path: Path, what: str) -> None:
    how, words = UNLIKE[what]
    script = f"""
import os, sys
from dataclasses import replace
from distrib import checks
from distrib.data import formats
from distrib.comm import reducer
from distrib.trainer import Trainer
if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
    {how}
from distrib.train import main
sys.exit(main())
"""
    done = run("-c", script, "--run-dir", tmp_path / "run", *OPTIONS, ranks=2, check=False)
    assert done.returncode == 2, done.stderr
    own = [text for text in done.stderr.splitlines() if text.startswith("distrib: ")]
    assert len(own) == 1
    assert own[0].startswith(f"distrib: error: rank 1 on {os.uname().nodename} ")
    assert words in own[0]


def test_singletons_are_recognised(tmp_path: Path) -> None:
    """srun started two ranks, but MPI knows nothing of it: each would train alone, into one folder."""
    done = train(
        tmp_path / "run", *OPTIONS, check=False, env={"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "2 ranks were started but MPI sees 1 in each" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_signal_is_noticed_inside_a_collective(tmp_path: Path) -> None:
    """A signal to one rank that waits for another is heard while it waits, and all stop after the same
    step."""
    script = at(1, 9, pause(tmp_path / "go on"))
    folder = tmp_path / "run"
    mpirun = Path(sys.executable).with_name("mpirun")
    command = [str(mpirun), "-n", "2", sys.executable, "-c", script, "--run-dir", str(folder)]
    process = subprocess.Popen(
        [*command, *map(str, OPTIONS), "--timeout", str(LIMIT)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def rank_0() -> Heartbeat:
        return (read_heartbeats(folder) or [a_heartbeat(0, step=0)])[0]

    wait_for(lambda: rank_0().step == 10 and rank_0().doing.startswith("waiting in"), "rank 0 waits", process)
    os.kill(rank_0().pid, signal.SIGTERM)
    wait_for(lambda: rank_0().state == TOLD_TO_STOP, "it is heard while the collective waits", process)
    (tmp_path / "go on").touch()
    assert process.wait(LIMIT) == 85
    found = summary(folder)
    # the step at hand, number 10, was told before the signal came: the request travels with the next one's
    # gradient
    assert (found["steps"], found["finished"]) == (11, False)


def test_a_rank_that_hangs_after_its_last_line_ends_the_job(tmp_path: Path) -> None:
    """In MPI_Finalize no thread runs: what ends it is a timer in C."""
    script = """
import sys, os, signal
from distrib import loop as train
from distrib.comm import start
start.SLOW_IO_FACTOR = 1
plain = train.Trainer.close
def close(self):
    if self.world.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    plain(self)
train.Trainer.close = close
from distrib.train import main
sys.exit(main())
"""
    done = run("-c", script, "--run-dir", tmp_path / "run", *OPTIONS, "--timeout", 3, ranks=2, check=False)
    assert done.returncode not in (0, 2, 85)
    assert summary(tmp_path / "run")["finished"]


@pytest.mark.parametrize(
    "option", [("--comm", "mpi"), ("--backend", "numpy"), ("--precision", "float64"), ("--lr", "0.5")]
)
def test_a_rank_with_another_option_is_named(tmp_path: Path, option: tuple[str, str]) -> None:
    script = f"""
import os, sys
if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
    sys.argv += {list(option)!r}
from distrib.train import main
sys.exit(main())
"""
    done = run("-c", script, "--run-dir", tmp_path / "run", *OPTIONS, ranks=2, check=False)
    assert done.returncode == 2
    assert f"rank 1 was started with {option[0]} {option[1]}, rank 0 with" in done.stderr


def test_no_failure_of_a_running_and_of_a_refused_run(tmp_path: Path) -> None:
    """Neither is a failure, and none is written down."""
    folder = tmp_path / "run"
    slow = at(0, 8, pause(tmp_path / "go on"))
    process = subprocess.Popen(
        [sys.executable, "-c", slow, "--run-dir", str(folder), *map(str, OPTIONS)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
    )
    wait_for(lambda: read_heartbeats(folder), "the first heartbeat", process)
    assert (
        run("-m", "launch.cli", "verdict", folder).stdout == f"distrib: {folder}: the run is still running\n"
    )
    (tmp_path / "go on").touch()
    assert process.wait(LIMIT) == 0
    assert "no rank failed" in run("-m", "launch.cli", "verdict", folder).stdout
    assert train(tmp_path / "refused", *OPTIONS, "--lr", 1e30, check=False).returncode == 2
    assert "no rank failed" in run("-m", "launch.cli", "verdict", tmp_path / "refused").stdout
    assert not list(tmp_path.glob("*/failure.json"))


def test_a_rank_that_recorded_an_error_is_blamed(tmp_path: Path) -> None:
    for rank in range(3):
        Heartbeats(tmp_path, rank, 3).publish(
            now=True, **({"state": "failed: ValueError: planted"} if rank == 1 else {})
        )
    assert run("-m", "launch.cli", "verdict", tmp_path).stdout.startswith("distrib: rank 1 on ")
    assert json.loads((tmp_path / "failure.json").read_text())["cause"] == "ValueError: planted"


def test_a_late_signal_does_not_kill() -> None:
    """Slurm's USR1 may come again while MPI ends."""
    code = """
import os, signal
from types import SimpleNamespace
from distrib.faults.signals import stop_on_signals
with stop_on_signals(SimpleNamespace(stop_requested=0), exiting=True): pass
os.kill(os.getpid(), signal.SIGUSR1)
print("alive")
"""
    assert run("-c", code).stdout == "alive\n"


def test_a_shell_around_a_rank_is_not_its_launcher() -> None:
    code = "from distrib import parent; print(*parent())"
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -c '{code}'; true"],
        env=environment(),
        text=True,
        capture_output=True,
    )
    name = Path(f"/proc/{os.getpid()}/comm").read_text().strip()
    assert done.stdout == f"{os.getpid()} {name}\n"
    assert run("-c", code).stdout == done.stdout


# ---- heartbeats alone


def a_heartbeat(rank: int, **news: object) -> Heartbeat:
    return Heartbeat(
        **{
            "rank": rank,
            "host": f"h{rank}",
            "pid": 1,
            "step": 9,
            "doing": "waiting in x",
            "collectives": 50,
            "time": 0.0,
            **news,
        }
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("beats", "rank", "text"),
    [
        ([a_heartbeat(0), a_heartbeat(1, state="failed: boom"), a_heartbeat(2, time=-20)], 1, "boom"),
        ([a_heartbeat(0), a_heartbeat(1), a_heartbeat(2, time=-20)], 2, "no heartbeat for 20 s"),
        (
            [a_heartbeat(0), a_heartbeat(1, doing="computing", collectives=49), a_heartbeat(2)],
            1,
            "behind the others, computing",
        ),
        (
            [a_heartbeat(0), a_heartbeat(1, collectives=47), a_heartbeat(2)],
            1,
            "behind the others, waiting in x",
        ),
        (
            [a_heartbeat(0, state=TOLD_TO_STOP), a_heartbeat(1, state=TOLD_TO_STOP, time=-20)],
            1,
            "no heartbeat for 20 s",
        ),
        ([a_heartbeat(1), a_heartbeat(0, state="finished", time=-20), a_heartbeat(2)], 1, "otherwise"),
        ([a_heartbeat(0), a_heartbeat(2)], 1, "never wrote a heartbeat"),
        ([a_heartbeat(0, host="h"), a_heartbeat(2, host="h")], 0, "otherwise"),
        ([a_heartbeat(0), a_heartbeat(1), a_heartbeat(2)], 0, "otherwise"),
    ],
)
def test_who_is_suspected(beats: list[Heartbeat], rank: int, text: str) -> None:
    beats = [replace(beat, time=time.time() + beat.time) for beat in beats]
    stale = {beat.rank for beat in beats if time.time() - beat.time > 10}
    culprit, cause = find_culprit(beats, stale, 3, beats[0], "otherwise")
    assert culprit.rank == rank
    assert cause.startswith(text)


def test_the_first_recorded_failure_wins(tmp_path: Path) -> None:
    first = record_failure(tmp_path, a_heartbeat(2), "planted")
    assert first == "rank 2 on h2 failed at step 9: planted"
    assert record_failure(tmp_path, a_heartbeat(1), "another") == first
    assert format_failure(json.loads((tmp_path / "failure.json").read_text())) == first
    assert [path.name for path in tmp_path.iterdir()] == ["failure.json"]


def test_a_heartbeat_is_written_at_most_once_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    beats = Heartbeats(tmp_path, 3, 4)
    clock[0] += 0.9
    beats.publish(step=1)
    assert [beat.step for beat in read_heartbeats(tmp_path)] == [0], "one is written at once"
    beats.publish(now=True)
    assert [beat.step for beat in read_heartbeats(tmp_path)] == [1]
    clock[0] += 1.1
    beats.publish(step=2)
    assert [beat.step for beat in read_heartbeats(tmp_path)] == [2]
    assert read_heartbeats(tmp_path)[0].pid == os.getpid()


def test_the_watchdog_outlives_a_lack_of_memory() -> None:
    code = """
import os, time
from distrib.faults import watchdog
plain, planted = watchdog.Watchdog._check, [True]
def check(self):
    if planted: planted.pop(); raise MemoryError("planted")
    plain(self)
watchdog.Watchdog._check = check
with watchdog.Watchdog(0, 1).waiting("a test"):
    time.sleep(3600)
"""
    done = run("-c", code, check=False)
    assert done.returncode == 1
    assert "waited 1 s in a test" in done.stderr


def test_a_save_that_cannot_begin_is_not_waited_for() -> None:
    code = """
from distrib.run.checkpoint import Saver
saver = Saver()
class Full:
    def put(self, _): raise MemoryError("planted")
saver._work = Full()
try: saver.start(1)
except MemoryError: print("raised")
"""
    assert run("-c", code).stdout == "raised\n"


def test_a_living_process_is_not_dead_if_no_file_can_be_opened() -> None:
    code = """
import os, resource
from distrib.faults.heartbeat import is_dead
free = os.open(os.devnull, 0)
resource.setrlimit(resource.RLIMIT_NOFILE, (free, free))
print(is_dead(os.getpid()))
"""
    assert run("-c", code).stdout == "False\n"


def test_many_watchdogs_hold_one_reserve() -> None:
    Watchdog(0, 600)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        Watchdog(0, 600)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_watchdog_publishes(tmp_path: Path) -> None:
    watchdog = Watchdog(0, 600)
    watchdog.heartbeats = Heartbeats(tmp_path, 0, 1)
    watchdog.step = 41
    with watchdog.waiting("a collective of the test"):
        doing = "waiting in a collective of the test"
        wait_for(
            lambda: [beat.doing for beat in read_heartbeats(tmp_path)] == [doing], "the watchdog publishes"
        )
    assert read_heartbeats(tmp_path)[0].step == 41
    watchdog.heartbeats = None
