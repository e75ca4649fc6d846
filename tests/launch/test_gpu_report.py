"""`make test-gpu` without a GPU says so; and every command that it would run exists."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import typer
from conftest import ROOT, run

from launch.bench import app as bench
from launch.bench import gpu_report


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run(
        "-m",
        "launch.cli",
        "gpu-report",
        "--out",
        tmp_path / "report.json",
        check=False,
        env={"CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("distrib: error: distrib gpu-report needs a GPU: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "report.json").exists()


def test_it_lists_its_parts() -> None:
    lines = run("-m", "launch.cli", "gpu-report", "--list").stdout.splitlines()
    *lines, total = lines
    assert [line.split()[0] for line in lines] == list(gpu_report.parts())
    assert total.split()[-2:] == [f"{sum(limit for *_, limit in gpu_report.parts().values()):.0f}", "s"]
    assert "python -m launch.cli bench step --backend cupy" in "\n".join(lines)


@pytest.mark.parametrize("name", gpu_report.parts())
def test_every_part_can_be_called(name: str) -> None:
    command, _, limit = gpu_report.parts()[name]
    assert 0 < limit <= 480
    if "pytest" in command:
        (file,) = (ROOT / part for part in command if part.endswith(".py"))
        words = command[command.index("-k") + 1].split(" or ") if "-k" in command else []
        assert all(word in file.read_text() for word in words)
        return
    start = command.index("bench") + 1
    assert command[command.index(sys.executable) :][1:4] == ("-m", "launch.cli", "bench")
    group = typer.main.get_command(bench.app)
    sub = group.commands[command[start]]  # type: ignore[attr-defined]
    context = sub.make_context(command[start], list(command[start + 1 :]))
    assert context.params["as_json"]
    if command[start] == "run":
        from distrib.train import parse  # what is left over are options of `distrib train`

        assert parse(context.args).backend == "cupy"


def test_a_part_that_fails_or_never_ends_is_reported() -> None:
    good = gpu_report.run((sys.executable, "-c", "print('{\"a\": 1}')"), {}, 60)
    assert (good["code"], good["result"]) == (0, {"a": 1})
    bad = gpu_report.run(
        (sys.executable, "-c", "import os; print(os.environ['X']); raise SystemExit(3)"), {"X": "y"}, 60
    )
    assert (bad["code"], bad["stdout"]) == (3, "y\n")
    slow = gpu_report.run((sys.executable, "-c", "import time; time.sleep(60)"), {}, 0.5)
    assert slow["code"] == -1
    assert "ended after" in slow["stderr"]
    assert gpu_report.run(("/no/such/program",), {}, 1)["code"] == -1
