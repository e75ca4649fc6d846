"""Two hosts, as network namespaces of this machine, under mpirun: a run to its end, and one whose link goes
down.

Needs root and iproute2 (needs.py).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import LIMIT, ROOT, environment, summary, train, wait_for
from test_failures import left_running

pytestmark = pytest.mark.needs("hosts")

HOSTS = Path(__file__).with_name("two_hosts.sh")
OPTIONS = (
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
    "--seed",
    3,
)


@pytest.fixture(scope="module", autouse=True)
def hosts() -> Iterator[None]:
    done = subprocess.run([str(HOSTS), "up"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"the two hosts cannot be made: {done.stderr.strip()}"
    yield
    subprocess.run([str(HOSTS), "down"], check=True)


def on_two_hosts(*arguments: object, output: Path) -> subprocess.Popen[bytes]:
    """mpirun on h1 with two ranks there and two on h2."""
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    command = (
        f"hostname h1; exec {mpirun} --prtemca plm_ssh_agent {HOSTS} --host h1:2,h2:2"
        " --map-by ppr:2:node:oversubscribe"
        f" -n 4 -x PYTHONPATH -x OMP_NUM_THREADS {sys.executable} {' '.join(map(str, arguments))}"
    )
    with open(output, "wb") as file:
        return subprocess.Popen(
            ["ip", "netns", "exec", "h1", "unshare", "--uts", "sh", "-c", command],
            cwd=ROOT,
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def test_a_run_over_two_hosts(tmp_path: Path) -> None:
    process = on_two_hosts(
        "-m", "distrib.train", "--run-dir", tmp_path / "two", *OPTIONS, "--epochs", 1, output=tmp_path / "log"
    )
    assert process.wait(LIMIT) == 0, (tmp_path / "log").read_text()
    train(tmp_path / "one", *OPTIONS, "--epochs", 1, ranks=4)
    two, one = summary(tmp_path / "two"), summary(tmp_path / "one")
    assert two["finished"]
    assert two["world_size"] == 4
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-3)
    spoke = [
        json.loads(path.read_text())["host"]
        for path in sorted((tmp_path / "two" / "ranks").glob("?????.json"))
    ]
    assert spoke == ["h1", "h1", "h2", "h2"]


def test_a_link_that_goes_down(tmp_path: Path) -> None:
    """Ends within the bound, non-zero, with a line that says who waited for what, and nothing is left
    running."""
    folder = tmp_path / "run"
    process = on_two_hosts(
        "-m",
        "distrib.train",
        "--run-dir",
        folder,
        *OPTIONS,
        "--epochs",
        500,
        "--timeout",
        10,
        "--checkpoint-every",
        20,
        output=tmp_path / "log",
    )
    wait_for(lambda: list(folder.glob("checkpoints/step-*0.safetensors")), "a checkpoint", process)
    try:
        subprocess.run([str(HOSTS), "cut", "h2"], check=True)
        assert process.wait(LIMIT) not in (0, 2, 85)
    finally:
        process.kill()
        subprocess.run([str(HOSTS), "up"], check=True)
    text = (tmp_path / "log").read_text(errors="replace")
    assert "waited 10 s in all_reduce" in text or "failed at step" in text, text
    verdict = json.loads((folder / "failure.json").read_text())
    # nobody is silent: the folder is on a disk that both hosts still reach; so it is who waits first, and for
    # what
    assert verdict["cause"].startswith(("waited 10 s in ", "behind the others, waiting in ")), verdict
    wait_for(lambda: not left_running(folder), f"nothing of {folder} is left running")
