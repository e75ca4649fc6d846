"""Scaling: the arithmetic of its tables, and `distrib scale` on one and two real ranks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import LIMIT, ROOT, environment, run, wait_for

import launch.bench.scale
from distrib.errors import UserError
from launch.bench.scale import child, points, report, table_of
from launch.machine import machine

SETTINGS = [
    "--width",
    "0.0625",
    "--batch-size",
    "6",
    "--batch-size-per-rank",
    "2",
    "--repeats",
    "1",
    "--backend",
    "numpy",
]

pages = pytest.mark.needs("report")


def line(ranks: int, batch: int, rates: list[float], **more: Any) -> dict[str, Any]:
    """A line of points.jsonl."""
    result = {"ranks": ranks, "threads": ranks, "hosts": 1, "batch_size": batch, "backend": "numpy"}
    result |= {"machine": machine(), "images_per_second": {"distrib": rates}, "phases_ms": {}}
    return {"key": {"ranks": ranks, "batch_size": batch}, "load": 0.0, "result": result | more}


def test_the_points() -> None:
    assert points(3, 2, 8) == [
        ("strong", 1, 2),
        ("strong", 2, 2),  # a third rank would have no image of it
        ("weak", 1, 8),
        ("weak", 2, 16),
        ("weak", 3, 24),
    ]
    assert points(1, 2, 8) == [("strong", 1, 2), ("weak", 1, 8)]


def test_the_figures_by_hand() -> None:
    """One rank 100 images/s; two 150 in the median, of which a quarter of the time is communication."""
    phases = {"sums": 10.0, "gradients": 30.0, "backward": 60.0}
    lines = [
        line(1, 24, [100.0]),
        line(2, 24, [140.0, 160.0, 150.0], phases_ms=phases),
        line(1, 8, [80.0]),
        line(2, 16, [160.0], machine="another"),
    ]
    series = points(2, 24, 8)
    one, two, _, weak = report({}, series, lines, places=1)["measured"]
    assert (one["efficiency"], one["step_ms"], one["communication"]) == (1.0, 240.0, None)
    assert (two["efficiency"], two["step_ms"], two["communication"]) == (0.75, 160.0, 0.25)
    assert weak["efficiency"] == 1.0
    assert (one["crowded"], two["crowded"], weak["crowded"]) == (False, True, False)
    result = report({}, series, lines, places=1)
    assert table_of("strong", result)["rows"] == [
        ("1", ["24", "100 (100–100)", "240", "100.0 %", "–"]),
        ("2*", ["24", "150 (140–160)", "160", "75.0 %", "25.0 %"]),
    ]
    assert "more ranks than the 1 core(s)" in " ".join(result["notes"])
    assert report({}, series, lines, places=2)["notes"] == []
    busy = [each | {"load": 3.0} for each in lines]
    assert "load 3.0" in " ".join(report({}, series, busy, places=2)["notes"])


def test_threads_that_the_launcher_did_not_pass_on() -> None:
    lines = [line(1, 2, [1.0]), line(2, 2, [1.0], threads=8), line(1, 4, [1.0]), line(2, 8, [1.0])]
    with pytest.raises(UserError, match=r"2 rank\(s\) had 8 BLAS threads: have --launch pass on OMP_NUM"):
        report({}, points(2, 2, 4), lines, places=2)


COMMAND = """
import sys, typer, distrib
from distrib.train import run_app
from launch.bench.scale import scale
app = typer.Typer()
app.command("scale")(scale)
app.callback()(lambda: None)
sys.exit(run_app(app))
"""


def scale(*arguments: object, check: bool = True, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    return run("-c", COMMAND, "scale", *arguments, check=check, ranks=ranks)


def children(pid: int) -> dict[int, str]:
    """The command lines of the children of a process, by their numbers."""
    numbers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    lines = {}
    for number in map(int, numbers):
        with contextlib.suppress(OSError):  # it may have ended
            lines[number] = Path(f"/proc/{number}/cmdline").read_text().replace("\0", " ")
    return lines


def interrupt(out: Path) -> None:
    """Start a measurement and break it off, as Ctrl-C does, while two ranks run."""
    command = [sys.executable, "-c", COMMAND, "scale", *SETTINGS, "--ranks", "2", "--out", str(out)]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for(
            lambda: any(" -n 2 " in line for line in children(process.pid).values()), "two ranks", process
        )
        (launcher,) = children(process.pid)
        os.kill(launcher, signal.SIGSTOP)  # it does not end before the signal comes
        process.send_signal(signal.SIGINT)
        os.kill(launcher, signal.SIGCONT)
        process.communicate(timeout=LIMIT)
        assert process.returncode not in (0, 1)
        deadline = time.monotonic() + LIMIT
        while Path(f"/proc/{launcher}").exists():
            assert time.monotonic() < deadline, "the launcher it started is not ended"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a measurement that was broken off after the first point, and taken up again."""
    out = tmp_path_factory.mktemp("scale") / "out"
    interrupt(out)
    lines = (out / "points.jsonl").read_text()
    assert lines.count('"key"') == 1, "what was measured is kept"
    (out / "points.jsonl").write_text(
        lines + '\n{"key": {"ranks": 1, "ba'
    )  # as a kill in the middle of writing leaves it
    done = scale(*SETTINGS, "--ranks", 2, "--out", out, "--png")
    assert done.stderr.count("measured before") == 1
    assert done.stderr.count("rank(s), batch") == 4, "one and two ranks, strong and weak"
    (out / "text").write_text(done.stdout)
    return out


@pages
def test_measured_on_two_ranks(folder: Path) -> None:
    result = json.loads((folder / "scale.json").read_text())
    crowded = len(os.sched_getaffinity(0)) < 2
    at = [(row["series"], row["ranks"], row["batch_size"], row["crowded"]) for row in result["measured"]]
    assert at == [
        ("strong", 1, 6, False),
        ("strong", 2, 6, crowded),
        ("weak", 1, 2, False),
        ("weak", 2, 4, crowded),
    ]
    one, two, *_ = result["measured"]
    assert one["efficiency"] == 1
    assert one["step_ms"] == pytest.approx(6e3 / one["rates"][0])
    assert two["efficiency"] == pytest.approx(two["images_per_second"] / one["images_per_second"] / 2)
    assert one["communication"] < 0.05 < two["communication"] < 1
    for line in result["points"]:
        assert line["result"]["threads"] == line["key"]["ranks"], "one BLAS thread a rank"


@pages
def test_the_page_is_whole_and_needs_nothing_else(folder: Path) -> None:
    page, text = (folder / "scale.html").read_text(), (folder / "text").read_text()
    assert not re.findall(
        r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//|@import|url\(\s*["']?http|<script"""
        r"""|<link(?! rel="icon" href="data:,")""",
        page,
    )
    assert page.count("<svg") == page.count("</svg>") == 2
    shown = re.sub(r"<(svg|style).*?</\1>|<[^>]*>", " ", page, flags=re.S)
    table = [line.split() for line in text.splitlines() if re.match(r" *\d+\*? +\d", line)]
    assert len(table) == 4
    words = shown.split()
    for row in table:
        at = "\0".join(row)
        assert at in "\0".join(words), row
    assert text.split(",")[0] in shown
    assert {path.name for path in folder.glob("*.png")} == {"efficiency.png", "images_per_second.png"}


@pages
def test_nothing_is_measured_twice(folder: Path) -> None:
    """Nor is anything of other settings mistaken for it."""
    before = (folder / "points.jsonl").read_bytes()
    done = scale(*SETTINGS, "--ranks", 2, "--out", folder, "--json")
    assert (folder / "points.jsonl").read_bytes() == before
    assert len(json.loads(done.stdout)["measured"]) == 4
    other = scale(*SETTINGS, "--ranks", 1, "--out", folder, "--variant", "avgpool")
    assert "measured before" not in other.stderr
    assert (folder / "points.jsonl").read_bytes().startswith(before)


@pages
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ranks", 0), "--ranks 0: give 1 to 4096"),
        (("--batch-size", 70000), "--batch-size 70000: give 1 to 60000"),
        (("--ranks", 4, "--batch-size-per-rank", 20000), "--batch-size-per-rank 20000: give 1 to 15000"),
        (("--repeats", 0), "--repeats 0: give 1 to 1000"),
        (("--batch-size-per-rank", 0), "--batch-size-per-rank 0: give 1 or more"),
        (("--timeout", 0), "--timeout 0: give a finite number above 0"),
        (("--timeout", "nan"), "--timeout nan: give a finite number above 0"),
        (("--launch", "mpirun -n 4"), "--launch mpirun -n 4: put {ranks} where"),
        (("--launch", "no-such-launcher {ranks}"), "no-such-launcher is not on PATH"),
        (("--launch", "false {ranks}"), "try it alone, or give another --launch"),
        (("--launch", "true {ranks}"), "no figures, code 0"),
        (("--variant", "huge"), "--variant huge: choose baseline, avgpool"),
        (("--width", -1), "--width -1: give a finite number above 0"),
        (("--out", "/dev/null/x"), "/dev/null/x: cannot be made (Not a directory)"),
    ],
)
def test_wrong_use(arguments: tuple[object, ...], message: str, tmp_path: Path, command_line) -> None:
    folder = () if "--out" in arguments else ("--out", tmp_path / "out")
    code, out, err = command_line(launch.bench.scale.scale, *arguments, *folder)
    errors = [line for line in err.splitlines() if not re.match(r"\d+/\d+  ", line)]
    assert (code, out, len(errors)) == (2, "", 1), err
    assert message in errors[0]


def test_a_measurement_is_bounded_in_time(tmp_path: Path) -> None:
    """And what it started is ended, the launcher's own children too."""
    with pytest.raises(UserError, match=r"not done after 4 s: .*: give a longer --timeout"):
        child(["sh", "-c", f"sleep 3600 & echo $! > {tmp_path}/pid; wait"], 4)
    pid = int((tmp_path / "pid").read_text())
    state = Path(f"/proc/{pid}/stat")
    wait_for(lambda: not state.exists() or state.read_text().split()[2] == "Z", "its child is ended")


def test_a_child_s_own_words_are_passed_on() -> None:
    with pytest.raises(UserError, match=r"^so and so: do this$"):
        child(
            [
                sys.executable,
                "-c",
                "import sys; print('distrib: error: so and so: do this', file=sys.stderr); sys.exit(2)",
            ],
            60,
        )
    assert child([sys.executable, "-c", "print('a launcher speaks'); print('{\"a\": 1}')"], 60) == {"a": 1}
    assert child(
        [sys.executable, "-c", "import os; print('{\"a\":', os.environ['OMP_NUM_THREADS'], '}')"], 60
    ) == {"a": 1}
