"""slurm/train.sh on a real Slurm: two nodes on this machine, brought up by slurm_cluster.sh.

It needs root and Debian's packages (needs.py), which `slurm_cluster.sh install` brings.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import LIMIT, ROOT, environment, metrics, summary, train
from test_accept import BOTH, QUICK, require_both_named

from distrib.run.checkpoint import newest_valid

pytestmark = pytest.mark.needs("slurm")

CLUSTER = Path(__file__).with_name("slurm_cluster.sh")
FOLDER = Path("/tmp/distrib-slurm")
SCRIPT = ROOT / "slurm" / "train.sh"
CONTROL = [chr(code) for code in range(32) if chr(code) not in "\n\0"]  # mpirun itself leaves some NULs
OMPI_CRASH = "mca_pml_ob1_recv_frag_callback_match"
"""In the traceback where a message comes to a rank that is still in MPI_Init: open-mpi/ompi issue 12495."""
WITHIN = 300  # seconds for a job to come where a test wants it
DEAD_WITHIN = 45  # seconds from the death of a rank to the end of its job: less than --timeout

SMALL = [
    "--backend",
    "numpy",
    "--width",
    "0.125",
    "--limit-train",
    "6400",
    "--limit-test",
    "100",
    "--log-every",
    "1",
    "--batch-size-per-rank",
    "16",
]
NODES = {
    1: ["--nodes=1", "--gpus-per-node=2", "--ntasks-per-node=2", "--cpus-per-task=1"],
    2: ["--nodes=2", "--gpus-per-node=1", "--ntasks-per-node=1", "--cpus-per-task=1"],
}
"""Two ranks on one node and on two, with one BLAS thread each: both train alike."""


@pytest.fixture(scope="module", autouse=True)
def slurm() -> Iterator[None]:
    """A real Slurm of two nodes with four pretend GPUs each."""
    env = {**os.environ, "SLURM_CLUSTER_DIR": str(FOLDER)}
    subprocess.run([CLUSTER, "down"], env=env, capture_output=True)
    try:
        up = subprocess.run([CLUSTER, "up", "2"], env=env, capture_output=True, text=True, timeout=LIMIT)
        if up.returncode:
            reason = (up.stderr.strip() or "no reason given").splitlines()[-1]
            pytest.fail(f"NO SLURM, so nothing of slurm/train.sh was tested: {reason}", pytrace=False)
        yield
    finally:
        subprocess.run([CLUSTER, "down"], env=env, capture_output=True)


class Job:
    """A job that was submitted with `options` of sbatch and `arguments` of the program, from `folder`."""

    def __init__(self, folder: Path, options: list[str], *arguments: object, **variables: str) -> None:
        self.folder = folder
        self._env = {"SLURM_CONF": str(FOLDER / "slurm.conf"), "PYTHON": sys.executable, **variables}
        self._command = ["sbatch", "--parsable", *options, str(SCRIPT), *map(str, arguments)]
        self._crashes = 0
        self.submit()

    def submit(self) -> None:
        self.number = self.call(*self._command)
        self.run_dir = self.folder / "runs" / f"slurm-{self.number}"

    def submit_again_after_a_crash(self) -> None:
        """Where Open MPI crashed before the ranks had started, which it does now and then."""
        if OMPI_CRASH in self.log and self._crashes < 2 and self.about("JobState") == "FAILED":
            self._crashes += 1
            self.submit()

    def call(self, *command: str) -> str:
        return subprocess.run(
            command,
            cwd=self.folder,
            env=environment(self._env),
            check=True,
            capture_output=True,
            text=True,
            timeout=WITHIN,
        ).stdout.strip()

    def about(self, name: str) -> str:
        """A field of `scontrol show job`."""
        found = re.search(rf"\b{name}=(\S+)", self.call("scontrol", "show", "job", self.number))
        return found[1] if found else ""

    @property
    def log(self) -> str:
        path = self.folder / f"slurm-{self.number}.log"
        return path.read_text().replace("\0", "") if path.exists() else ""  # mpirun leaves some NULs

    def wait(self, condition: Callable[[], object], what: str, within: float = WITHIN) -> None:
        end = time.monotonic() + within
        while self.submit_again_after_a_crash() or not condition():
            assert time.monotonic() < end, (
                f"no {what} of job {self.number} in {within} s, {self.about('JobState')}:\n{self.log}"
            )
            time.sleep(0.05)

    def end(self, within: float = WITHIN) -> tuple[str, str]:
        """(state, exit code) of the job once it has ended."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait(lambda: self.about("JobState") in ended, "end", within)
        return self.about("JobState"), self.about("ExitCode")

    def steps(self) -> int:
        """Lines of metrics so far."""
        path = self.run_dir / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def train_some(self, steps: int = 5) -> None:
        """Come back after some steps."""
        self.wait(lambda: self.steps() >= steps, f"step {steps}")

    def rank(self, number: int) -> int:
        """The process of one rank; with --elastic that which trains, not its parent."""
        marks = {f"SLURM_JOB_ID={self.number}".encode(), f"PMIX_RANK={number}".encode()}
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                given = (process / "environ").read_bytes().split(b"\0")
                if marks <= set(given) and (process / "cmdline").read_bytes().split(b"\0")[1:3] == [
                    b"-m",
                    b"distrib.train",
                ]:
                    stat = (process / "stat").read_text().rsplit(")", 1)[1].split()
                    found[int(process.name)] = int(stat[1])  # its parent
            except OSError:
                continue
        last = [pid for pid in found if pid not in found.values()]
        assert len(last) == 1, f"no rank {number} of job {self.number}"
        return last[0]


RESULT = 'echo "$RANDOM $SLURM_PROCID" >"${@: -1}/summary.json"'
"""What a stand-in does at the end of a good run; the run's folder is its last argument."""


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], str]:
    """A stand-in for Python, in shell: what `python -m distrib.train` does instead of training."""

    def write(text: str) -> str:
        path = tmp_path / "program"
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
        return str(path)

    return write


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, slurm: None) -> Job:
    """An uninterrupted run on two nodes."""
    job = Job(tmp_path_factory.mktemp("whole"), NODES[2], *SMALL)
    assert job.end() == ("COMPLETED", "0:0"), job.log
    return job


def test_two_nodes(whole: Job) -> None:
    result = summary(whole.run_dir)
    assert result["finished"]
    assert (result["world_size"], result["steps"]) == (2, 200)
    assert "2 rank(s) on node1, node2, 1 thread(s) each" in whole.log
    assert (whole.run_dir / f"slurm-{whole.number}.log").read_text() == whole.log
    assert not set(whole.log) & set(CONTROL), "a log file is no terminal"


def test_one_node_as_it_is(tmp_path: Path) -> None:
    job = Job(
        tmp_path, [], "--backend", "numpy", "--width", "0.125", "--limit-train", "320", "--limit-test", "100"
    )
    assert job.end() == ("COMPLETED", "0:0"), job.log
    config = json.loads((job.run_dir / "config.json").read_text())
    assert (config["recipe"], config["batch_size_per_rank"], config["optimizer"]) == ("fast99", 64, "sgd")
    assert summary(job.run_dir)["finished"]


def test_one_node_trains_as_two_do(whole: Job, tmp_path: Path) -> None:
    job = Job(tmp_path, NODES[1], *SMALL)
    assert job.end() == ("COMPLETED", "0:0"), job.log
    assert summary(job.run_dir)["parameter_digest"] == summary(whole.run_dir)["parameter_digest"]


@pytest.mark.parametrize("launcher", ["pmix", "mpirun"])
def test_usr1_requeue_resume_ends_at_the_same_digest(whole: Job, tmp_path: Path, launcher: str) -> None:
    job = Job(tmp_path, NODES[2], *SMALL, LAUNCHER=launcher)
    job.train_some()
    job.call("scancel", "--signal=USR1", "--batch", job.number)  # what --signal=B:USR1@120 does
    job.wait(lambda: job.about("Restarts") == "1", "requeue")
    state = json.loads((job.run_dir / "summary.json").read_text())
    assert not state["finished"]
    assert 5 <= state["steps"] < 200
    assert job.end() == ("COMPLETED", "0:0"), job.log
    assert f"resuming from step-{state['steps']:08d}" in job.log
    assert not set(job.log) & set(CONTROL)
    assert summary(job.run_dir)["parameter_digest"] == summary(whole.run_dir)["parameter_digest"]
    assert [line["step"] for line in metrics(job.run_dir) if "loss" in line] == list(range(1, 201))


@pytest.mark.parametrize("timeouts", [1.5, *([0.5, 1.0, 3.0] if os.environ.get("DISTRIB_SOAK") else [])])
@pytest.mark.parametrize(("nodes", "launcher"), [(2, "pmix"), (1, "mpirun")])
def test_a_suspended_job_goes_on(
    whole: Job, tmp_path: Path, nodes: int, launcher: str, timeouts: float
) -> None:
    """As Slurm's gang scheduling does it: all processes of the job stand still for longer than --timeout."""
    job = Job(tmp_path, NODES[nodes], *SMALL, "--timeout", "6", LAUNCHER=launcher)
    job.train_some()
    job.call("scontrol", "suspend", job.number)
    job.wait(lambda: job.about("JobState") == "SUSPENDED", "suspension")
    steps = job.steps()
    time.sleep(timeouts * 6)
    assert job.steps() <= steps + 1, "it did not stand still"
    job.call("scontrol", "resume", job.number)
    assert job.end() == ("COMPLETED", "0:0"), job.log
    assert job.about("Restarts") == "0"
    assert summary(job.run_dir)["parameter_digest"] == summary(whole.run_dir)["parameter_digest"]


def test_usr1_before_the_ranks_listen_is_not_lost(tmp_path: Path, program: Callable[[str], str]) -> None:
    late = program(f'sleep 1\nexec {sys.executable} "$@"')
    job = Job(tmp_path, NODES[2], *SMALL, "--epochs", "20", PYTHON=late)
    job.wait(lambda: job.about("JobState") == "RUNNING" and (job.run_dir / "restarts").exists(), "start")
    job.call("scancel", "--signal=USR1", "--batch", job.number)
    job.wait(lambda: job.about("Restarts") == "1", "requeue")
    job.call("scancel", job.number)
    assert "stopped at step" in job.log


@pytest.mark.parametrize(("launcher", "code"), [("pmix", "85:0"), ("mpirun", "1:0")])
def test_scancel_saves_and_does_not_requeue(tmp_path: Path, launcher: str, code: str) -> None:
    job = Job(tmp_path, NODES[2], *SMALL, "--epochs", "20", "--checkpoint-every", "2", LAUNCHER=launcher)
    job.train_some()
    job.call("scancel", job.number)
    assert job.end(DEAD_WITHIN) == ("CANCELLED", code), job.log
    found, problems = newest_valid(job.run_dir / "checkpoints")
    assert found is not None
    assert not problems
    assert job.about("Restarts") == "0"
    assert f"cancelled, stopped at step {found.position['step']}" in job.log.splitlines()[-1]


@pytest.mark.parametrize("launcher", ["pmix", "mpirun"])
def test_a_killed_rank_ends_the_job(tmp_path: Path, launcher: str) -> None:
    job = Job(tmp_path, NODES[2], *SMALL, "--epochs", "20", LAUNCHER=launcher)
    job.train_some()
    killed = job.rank(1)
    os.kill(killed, signal.SIGKILL)
    state, code = job.end(DEAD_WITHIN)
    assert state == "FAILED"
    assert code.split(":")[0] not in ("0", "85")
    verdict = json.loads((job.run_dir / "failure.json").read_text())
    assert (verdict["rank"], verdict["host"], verdict["pid"], verdict["cause"]) == (
        1,
        "node2",
        killed,
        "killed by signal 9",
    )
    assert job.log.splitlines()[-1] == (
        f"train.sh: job {job.number}: failed with exit code {code.split(':')[0]}: rank 1 on"
        f" node2 failed at step {verdict['step']}: killed by signal 9"
    )


def test_requeueing_stops_without_progress(tmp_path: Path, program: Callable[[str], str]) -> None:
    job = Job(tmp_path, NODES[1], PYTHON=program("exit 85"), STALLS="2")
    assert job.end() == ("FAILED", "1:0"), job.log
    assert job.about("Restarts") == "1"
    assert "given up: 2 starts ended without a step beyond 0" in job.log.splitlines()[-1]


def test_a_step_a_start_is_progress(tmp_path: Path, program: Callable[[str], str]) -> None:
    step = (
        "folder=${@: -1}/checkpoints; mkdir -p $folder;"
        " touch $folder/step-0000010$SLURM_RESTART_COUNT.safetensors"
    )
    job = Job(
        tmp_path,
        NODES[1],
        PYTHON=program(f'{step}; {RESULT}\n[ "$SLURM_RESTART_COUNT" = 2 ] || exit 85'),
        STALLS="1",
    )
    assert job.end() == ("COMPLETED", "0:0"), job.log
    assert job.about("Restarts") == "2"


def test_a_launcher_that_lost_its_ranks_is_no_success(tmp_path: Path, program: Callable[[str], str]) -> None:
    """As when a node goes down under mpirun, which then ends with 0; and as when srun could not start a
    rank."""
    job = Job(tmp_path, NODES[1], PYTHON=program("exit 0"), STALLS="2")
    assert job.end() == ("FAILED", "1:0"), job.log
    assert "a node or a launch was lost: the launcher ended without a result of the run" in job.log
    assert job.about("Restarts") == "1"
    srun = program("echo 'srun: error: Node failure on node2' >&2; exit 1")
    job = Job(tmp_path, NODES[1], PYTHON=srun, STALLS="1")
    assert job.end() == ("FAILED", "1:0"), job.log
    assert "a node or a launch was lost: srun: error: Node failure on node2" in job.log


def test_a_finished_run_is_a_success(whole: Job) -> None:
    again = Job(whole.folder, NODES[2], *SMALL, "--run-dir", whole.run_dir)
    assert again.end() == ("COMPLETED", "0:0"), again.log
    assert again.log.splitlines()[-1].endswith("holds a finished run: nothing to do")


def test_a_mistake_over_a_finished_run_is_no_success(whole: Job) -> None:
    again = Job(whole.folder, NODES[2], *SMALL, "--run-dir", whole.run_dir, "--lr", "0")
    assert again.end() == ("FAILED", "2:0"), again.log
    assert "--lr 0.0: give a finite number above 0" in again.log.splitlines()[-1]


def test_a_mistake_ends_with_its_line(tmp_path: Path) -> None:
    job = Job(tmp_path, NODES[2], "--limit-train", "70000")
    assert job.end() == ("FAILED", "2:0"), job.log
    assert "--limit-train 70000: the data has only 60000 images" in job.log.splitlines()[-1]


SHOW = (
    f'{RESULT}; echo "$SLURM_PROCID $SLURM_NODEID $SLURM_LOCALID $OMP_NUM_THREADS [$CUDA_VISIBLE_DEVICES] $*"'
)
ALL = "--recipe fast99 --batch-size-per-rank 64"


@pytest.mark.parametrize(
    ("options", "more", "threads", "visible"),
    [
        (["--gpus-per-node=2", "--ntasks-per-node=2", "--cpus-per-task=2"], "", 2, ["0,1", "0,1"]),
        (["--gpus-per-node=2", "--ntasks-per-node=2"], "--gpu-bind=single:1", 2, ["0", "1"]),
        (["--gpus-per-node=2"], "", 1, ["0,1", "0,1"]),  # CPUs for one task a node, shared
        (["--gpus-per-node=0", "--ntasks-per-node=2"], "", 2, ["", ""]),
    ],
)
def test_a_rank_per_gpu_or_task(
    tmp_path: Path,
    program: Callable[[str], str],
    options: list[str],
    more: str,
    threads: int,
    visible: list[str],
) -> None:
    job = Job(tmp_path, ["--nodes=2", *options], PYTHON=program(SHOW), LAUNCHER_OPTIONS=more)
    assert job.end() == ("COMPLETED", "0:0"), job.log
    end = f"-m distrib.train {ALL} --run-dir runs/slurm-{job.number}"
    want = {f"{2 * node + i} {node} {i} {threads} [{visible[i]}] {end}" for node in (0, 1) for i in (0, 1)}
    assert want <= set(job.log.splitlines())


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        (["--lr", "0.1"], f"{ALL} --lr 0.1 --run-dir runs/slurm-JOB"),
        (["--batch-size=32", "--run-dir=a"], "--recipe fast99 --batch-size=32 --run-dir=a --run-dir a"),
        (["--recipe", "demo", "--run-dir", "b c"], "--recipe demo --run-dir b c --run-dir b c"),
    ],
)
def test_what_follows_the_script_wins(
    tmp_path: Path, program: Callable[[str], str], given: list[str], passed: str
) -> None:
    job = Job(tmp_path, NODES[1], *given, PYTHON=program(SHOW))
    assert job.end() == ("COMPLETED", "0:0"), job.log
    assert job.log.count(f"] -m distrib.train {passed.replace('JOB', job.number)}\n") == 2


def test_the_tasks_of_an_array_train_with_seeds_of_their_own(
    tmp_path: Path, program: Callable[[str], str]
) -> None:
    job = Job(tmp_path, ["--array=0-1", "--gpus-per-node=0"], PYTHON=program(SHOW))
    job.wait(lambda: job.call("squeue", "-h", "--job", job.number) == "", "end")
    logs = "".join(path.read_text() for path in tmp_path.glob("slurm-*.log"))
    for task in (0, 1):
        assert f"{ALL} --seed {task} --run-dir runs/slurm-{job.number}_{task}\n" in logs


def test_an_unknown_launcher_is_one_line(tmp_path: Path) -> None:
    job = Job(tmp_path, NODES[1], LAUNCHER="pmi9")
    assert job.end() == ("FAILED", "2:0"), job.log
    assert re.fullmatch(
        r"train\.sh: srun has no --mpi=pmi9: set LAUNCHER to mpirun or to one of [\w ]*\bpmix\b[\w ]*\n",
        job.log,
    )


@pytest.mark.parametrize("launcher", ["pmix", *(["mpirun"] if os.environ.get("DISTRIB_SOAK") else [])])
def test_a_node_that_crashes(whole: Job, tmp_path: Path, launcher: str) -> None:
    """The job is requeued, waits for the node, and ends at the right digest."""
    job = Job(tmp_path, NODES[2], *SMALL, "--checkpoint-every", "10", LAUNCHER=launcher)
    job.train_some(25)
    env = {**os.environ, "SLURM_CLUSTER_DIR": str(FOLDER)}
    subprocess.run([CLUSTER, "crash", "2"], env=env, check=True, timeout=WITHIN)
    assert job.end() == ("COMPLETED", "0:0"), job.log
    assert "a node or a launch was lost: " in job.log
    assert int(job.about("Restarts")) >= 1
    assert summary(job.run_dir)["parameter_digest"] == summary(whole.run_dir)["parameter_digest"]


ELASTIC = [*SMALL[:-2], "--limit-train", "3200", "--batch-size", "32", "--reproducible", "--elastic"]
FOUR = ["--nodes=2", "--gpus-per-node=2", "--ntasks-per-node=2", "--cpus-per-task=1"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the elastic runs below, by one process: with --reproducible it is that of any ranks."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(folder, *ELASTIC[:-1], "--recipe", "fast99")
    return summary(folder)["parameter_digest"]


def survived(job: Job) -> list[int]:
    return [entry["rank"] for entry in json.loads((job.run_dir / "failure.json").read_text())["survived"]]


def test_elastic_survives_rank_0_and_all_ranks_of_a_node(tmp_path: Path, undisturbed: str) -> None:
    job = Job(tmp_path, FOUR, *ELASTIC)
    for steps, number in ((5, 3), (15, 0), (25, 2)):
        job.train_some(steps)
        os.kill(job.rank(number), signal.SIGKILL)
    assert job.end() == ("COMPLETED", "0:0"), job.log
    assert survived(job) == [3, 0, 2]
    result = summary(job.run_dir)
    assert (result["world_size"], result["parameter_digest"]) == (1, undisturbed)
    assert "rank 3 on node2 died after step " in job.log


def test_elastic_is_stopped_and_requeued_after_a_death(tmp_path: Path, undisturbed: str) -> None:
    """All ranks take part again, and who died before is remembered."""
    job = Job(tmp_path, FOUR, *ELASTIC)
    job.train_some()
    os.kill(job.rank(1), signal.SIGKILL)
    job.train_some(15)
    job.call("scancel", "--signal=USR1", "--batch", job.number)
    job.wait(lambda: job.about("Restarts") == "1", "requeue")
    assert job.end() == ("COMPLETED", "0:0"), job.log
    result = summary(job.run_dir)
    assert (result["world_size"], result["parameter_digest"]) == (4, undisturbed)
    assert survived(job) == [1]


def test_elastic_names_a_rank_that_hangs_alone_on_its_node(tmp_path: Path) -> None:
    job = Job(tmp_path, NODES[2], *ELASTIC, "--timeout", "6")
    job.train_some()
    os.kill(job.rank(1), signal.SIGSTOP)
    state, code = job.end(DEAD_WITHIN)
    assert state == "FAILED", job.log
    assert code.split(":")[0] not in ("0", "2", "85")
    assert re.search(r"rank 1 on node2 failed at step \d+: no heartbeat for \d+ s", job.log.splitlines()[-1])


def test_elastic_does_not_survive_a_node_that_crashes(tmp_path: Path, undisturbed: str) -> None:
    """mpirun then ends the job, which is requeued and ends at the right digest."""
    job = Job(tmp_path, FOUR, *ELASTIC, "--checkpoint-every", "10")
    job.train_some(15)
    env = {**os.environ, "SLURM_CLUSTER_DIR": str(FOLDER)}
    subprocess.run([CLUSTER, "crash", "2"], env=env, check=True, timeout=WITHIN)
    assert job.end() == ("COMPLETED", "0:0"), job.log
    assert int(job.about("Restarts")) >= 1
    result = summary(job.run_dir)
    assert (result["world_size"], result["parameter_digest"]) == (4, undisturbed)


def test_elastic_is_refused_under_srun(tmp_path: Path) -> None:
    """Whatever the environment says."""
    variables = {"SLURM_CONF": str(FOLDER / "slurm.conf"), "OMPI_MCA_mpi_ft_enable": "1"}
    done = subprocess.run(
        ["srun", "--mpi=pmix", "-n2", sys.executable, "-m", "distrib.train", *ELASTIC, "--run-dir", "run"],
        cwd=tmp_path,
        env=environment(variables),
        capture_output=True,
        text=True,
        timeout=WITHIN,
    )
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("distrib: ")]
    assert len(said) == 1, done.stderr
    assert said[0].startswith("distrib: error: --elastic: this launcher ends all ranks when one dies")
    assert not (tmp_path / "run").exists()


if os.environ.get("DISTRIB_SOAK") == "1":  # as long as Slurm's clock wants it: its limits are whole minutes

    def test_a_real_time_limit(tmp_path: Path) -> None:
        arguments = [*SMALL[:4], "--limit-test", "100", "--batch-size-per-rank", "16", "--epochs", "6"]
        limit = ["--time=1", "--signal=B:USR1@20"]
        job = Job(tmp_path, [*NODES[2], *limit], *arguments)
        assert job.end(600) == ("COMPLETED", "0:0"), job.log
        assert int(job.about("Restarts")) >= 1
        other = Job(tmp_path, NODES[2], *arguments)
        assert other.end(600) == ("COMPLETED", "0:0"), other.log
        assert summary(job.run_dir)["parameter_digest"] == summary(other.run_dir)["parameter_digest"]


def test_accept_names_rank_and_host(tmp_path: Path) -> None:
    """`distrib accept` on two nodes, with a rank that is slow and one that has a wrong bit."""
    srun = ["srun", "--mpi=pmix", "--nodes=2", "--ntasks=3", "--distribution=block", "--ntasks-per-node=2"]
    env = environment({"SLURM_CONF": str(FOLDER / "slurm.conf")})
    arguments = ["accept", *QUICK, "--run-dir", str(tmp_path), "--json"]
    done = subprocess.run(
        [*srun, sys.executable, "-c", BOTH, *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=WITHIN,
    )
    require_both_named(done, "node2")
