"""Scaling: the model's limits, what a fit finds again, and `distrib scale` on one and two real ranks."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import LIMIT, ROOT, environment, run, wait_for
from networks import resnet9

import launch.scale
from distrib.errors import UserError
from launch.scale import child
from launch.scale_model import Level, Model, Point, fit, greatest, least_squares, left_out, levels, predict
from nn.layer import StepContext
from nn.resnet9 import VARIANTS

HOST, NET = Level(2e-6, 1e-10), Level(5e-6, 2e-10)
BARE = Model(HOST, NET, ranks_per_host=8, full=8, sums=24, sum_bytes=49152, buckets=7, gradient_bytes=9756456)
KNOWN = replace(BARE, fixed=4e-3, image=7e-3, backward=0.6, exposed=0.35, shared=0.3, wait=0.08)
SETTINGS = (
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
)

pages = pytest.mark.needs("report")


def made(model: Model, ranks: int, batch: int, hidden: bool = False) -> Point:
    """The point that the model gives; its waits are in the sums, as a rank measures them."""
    bare = Point(ranks, batch, 0.0)
    parts = model.at(bare).parts(ranks, bare.images)
    phases = (parts["sums"] + parts["waiting"], parts["gradients"], model.backward * parts["compute"])
    return Point(ranks, batch, sum(parts.values()), *((None,) * 3 if hidden else phases))


def grid(model: Model = KNOWN, hidden: bool = False) -> list[Point]:
    return [
        made(model, p, b, hidden)
        for p, b in ((1, 64), (2, 64), (4, 64), (8, 64), (1, 32), (2, 16), (4, 128), (8, 256))
    ]


@pytest.mark.parametrize(
    "model",
    [
        KNOWN,
        replace(KNOWN, fixed=0.0),
        replace(KNOWN, wait=0.0),
        replace(KNOWN, shared=0.0),
        replace(KNOWN, exposed=0.0),
        replace(KNOWN, exposed=1.0),
    ],
)
def test_a_fit_finds_the_parameters_again(model: Model) -> None:
    found = fit(grid(model), BARE)
    for name in ("fixed", "image", "backward", "exposed", "shared", "wait"):
        assert getattr(found, name) == pytest.approx(getattr(model, name), rel=1e-6, abs=1e-9), name
    assert found.step(512, 3) == pytest.approx(model.step(512, 3), rel=1e-6)


def test_a_fit_to_noise_is_no_worse_than_the_truth() -> None:
    rng = np.random.default_rng(2)
    points = [
        q._replace(step=q.step * s, sums=q.sums * s, gradients=q.gradients * s, backward=q.backward * s)
        for q, s in zip(grid(), rng.normal(1, 0.02, 8), strict=True)
    ]
    found = fit(points, BARE)
    error = [[abs(m.at(q).step(q.ranks, q.images) / q.step - 1) for q in points] for m in (found, KNOWN)]
    assert 0 < max(error[0]) < 0.1
    assert np.mean(error[0]) < 1.2 * np.mean(error[1])


def test_points_of_a_device_are_fitted_by_their_whole_steps() -> None:
    """Without phases e, κ and the wait cannot all be known; with no wait, and κ as 0, all is found again."""
    found = fit(grid(replace(KNOWN, wait=0.0, shared=0.0), hidden=True), BARE)
    assert (found.fixed, found.image) == pytest.approx((KNOWN.fixed, KNOWN.image), rel=1e-6)
    assert found.exposed == pytest.approx(KNOWN.exposed, rel=1e-6)
    assert found.wait == pytest.approx(0, abs=1e-9)


def test_crowded_points_are_left_out_of_the_fit() -> None:
    slow = [made(KNOWN, 16, 64)._replace(step=1.0, sums=0.9, crowded=True)]
    assert fit([*grid(), *slow], BARE) == fit(grid(), BARE)


def test_a_point_left_out() -> None:
    points = grid()
    assert left_out(points, points[1], BARE) == pytest.approx(0, abs=1e-6)
    odd = points[1]._replace(step=2 * points[1].step, sums=points[1].sums + points[1].step)
    assert left_out([odd, *points[2:], points[0]], odd, BARE) == pytest.approx(-0.5, abs=0.02), (
        "the others do not bend to it"
    )
    few = [made(KNOWN, 1, 64), made(KNOWN, 1, 32), made(KNOWN, 2, 64)]
    assert left_out(few, few[2], BARE) is None, "no other point has several ranks"
    assert left_out(few, few[0], BARE) is None, "all rests on the points of one rank"


def test_levels_are_found_again() -> None:
    model = replace(BARE, ranks_per_host=4)

    def measured(ranks: int, hosts: int) -> dict[str, Any]:
        at = replace(model, ranks_per_host=ranks // hosts)
        return {
            "ranks": ranks,
            "hosts": hosts,
            "sizes": [
                {"bytes": n, "seconds": [at.all_reduce(ranks, 1, n)]} for n in (8, 4096, 1 << 20, 1 << 24)
            ],
        }

    host, net, source = levels([measured(2, 1), measured(4, 1)], NET)
    assert (host.latency, host.per_byte) == pytest.approx((HOST.latency, HOST.per_byte), rel=1e-6)
    assert (net, source["net"]) == (NET, "assumed, not measured")
    host, net, source = levels([measured(2, 1), measured(4, 1), measured(8, 2), measured(16, 4)], Level(1, 1))
    assert (host.latency, host.per_byte) == pytest.approx((HOST.latency, HOST.per_byte), rel=1e-6)
    assert (net.latency, net.per_byte) == pytest.approx((NET.latency, NET.per_byte), rel=1e-6)
    assert "assumed" not in source["net"]
    assert levels([], NET)[0] == NET


def test_least_squares_gives_nothing_negative() -> None:
    x = [[1.0, n] for n in (1, 2, 3, 4)]
    assert least_squares(x, [3, 5, 7, 9], [1] * 4) == pytest.approx([1, 2])
    assert least_squares(x, [1, 3, 5, 7], [1] * 4) == pytest.approx([0, (1 + 6 + 15 + 28) / 30]), (
        "not −1 and 2"
    )
    assert least_squares(x, [-1, -2, -3, -4], [1] * 4) == [0, 0]


def test_the_greatest_of_normals() -> None:
    """Against the mean over samples; 0.564 for two is exact."""
    draws = np.random.default_rng(1).normal(size=(4000, 1024))
    assert greatest(1) == 0
    assert greatest(2) == pytest.approx(np.pi**-0.5, abs=0.03)
    for p in (8, 64, 1024):
        assert greatest(p) == pytest.approx(draws[:, :p].max(1).mean(), rel=0.02)


def test_an_all_reduce_by_hand() -> None:
    assert BARE.all_reduce(1, 24, 1e6) == 0
    assert BARE.all_reduce(4, 3, 1e6) == pytest.approx(3 * 2 * 2e-6 + 1.5 * 1e6 * 1e-10)
    assert BARE.all_reduce(32, 3, 1e6) == pytest.approx(
        3 * (3 * 2e-6 + 2 * 5e-6) + 2 * 31 / 32 * 1e6 * 2e-10
    ), "the slower level"
    fast = replace(BARE, net=Level(0, 0))
    assert fast.all_reduce(32, 1, 1e9) == pytest.approx(3 * 2e-6 + 2 * 31 / 32 * 0.1), (
        "never faster than within a host"
    )
    assert replace(BARE, ranks_per_host=1).all_reduce(2, 1, 1e6) == pytest.approx(5e-6 + 2e-4), (
        "no host level where nothing shares one"
    )


def test_gradients_hide_no_longer_than_the_backward_lasts() -> None:
    hidden = replace(KNOWN, exposed=0.0)
    assert hidden.parts(64, 32)["gradients"] == 0
    slow = replace(hidden, net=Level(0, 1e-6))
    ring = slow.all_reduce(64, slow.buckets, slow.gradient_bytes)
    assert slow.parts(64, 32)["gradients"] == pytest.approx(ring - 0.6 * slow.parts(64, 32)["compute"])


def test_ranks_of_a_host_slow_each_other() -> None:
    alone = KNOWN.parts(1, 32)["compute"]
    assert alone == pytest.approx(4e-3 + 32 * 7e-3)
    assert [KNOWN.parts(p, 32)["compute"] - alone for p in (4, 8, 4096)] == pytest.approx(
        [0.3 * 32 * 7e-3 * share for share in (3 / 7, 1, 1)]
    )
    assert replace(KNOWN, ranks_per_host=1).parts(4096, 32)["compute"] == alone, (
        "one rank a host has it for itself"
    )
    assert replace(KNOWN, full=1, ranks_per_host=1).parts(2, 32)["compute"] == alone


@pytest.mark.parametrize("model", [KNOWN, replace(KNOWN, ranks_per_host=1), replace(KNOWN, ranks_per_host=6)])
def test_limits_of_the_prediction(model: Model) -> None:
    strong, weak = list(predict(model, 100, False)), list(predict(model, 32, True))
    assert strong[0]["efficiency"] == weak[0]["efficiency"] == 1
    assert strong[0]["communication"] == weak[0]["communication"] == 0
    assert [row["ranks"] for row in strong] == [1 << i for i in range(7)], (
        "128 ranks have no image each of 100"
    )
    assert [row["ranks"] for row in weak] == [1 << i for i in range(13)]
    assert all(row["efficiency"] <= 1 for row in strong)
    falling = [row["efficiency"] for row in weak]
    assert all(b < a for a, b in itertools.pairwise(falling))
    assert (strong[-1]["batch_size"], weak[-1]["batch_size"]) == (100, 4096 * 32)
    for row in (*strong, *weak):
        assert sum(row["parts_ms"].values()) == pytest.approx(row["step_ms"])
        assert row["images_per_second"] == pytest.approx(1e3 * row["batch_size"] / row["step_ms"])


def test_a_free_network_scales_perfectly_in_the_weak_sense() -> None:
    free = replace(KNOWN, host=Level(0, 0), net=Level(0, 0), shared=0.0, wait=0.0)
    assert [row["efficiency"] for row in predict(free, 32, True)] == pytest.approx([1] * 13)
    assert list(predict(replace(free, fixed=0.0), 4096, False))[-1]["efficiency"] == pytest.approx(1)
    amdahl = list(predict(free, 64, False))[-1]
    assert amdahl["efficiency"] == pytest.approx((4e-3 + 64 * 7e-3) / (64 * (4e-3 + 7e-3)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_sums_of_a_real_step_are_as_many_as_the_model_counts(variant: str) -> None:
    """`scale` counts three a layer, of four float64 a channel in all."""
    network, sent = resnet9(variant, 1 / 16), []
    this = StepContext(True, 2, lambda x: sent.append(x.nbytes))
    network.backward(network.forward(np.ones((2, 28, 28, 1), np.float32), this), this)
    assert len(sent) == 3 * len(network.convs())
    assert sum(sent) == 4 * 8 * sum(conv.out for conv in network.convs())


COMMAND = """
import sys, typer, distrib
from distrib.train import run_app
from launch.scale import scale
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
        assert not Path(f"/proc/{launcher}").exists(), "the launcher it started is ended"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a measurement that was broken off after the first point, and taken up again."""
    out = tmp_path_factory.mktemp("scale") / "out"
    interrupt(out)
    lines = (out / "points.jsonl").read_text()
    assert lines.count('"kind": "step"') == 1, "what was measured is kept"
    (out / "points.jsonl").write_text(
        lines + '\n{"key": {"kind": "st'
    )  # as a kill in the middle of writing leaves it
    done = scale(*SETTINGS, "--ranks", 2, "--out", out, "--png")
    assert done.stderr.count("measured before") == 1
    assert done.stderr.count("bench ") == 5, "steps of strong and weak scaling, and one all-reduce"
    (out / "text").write_text(done.stdout)
    return out


@pages
def test_measured_on_two_ranks(folder: Path) -> None:
    result = json.loads((folder / "scale.json").read_text())
    cores = len(os.sched_getaffinity(0))
    assert [
        (row["series"], row["ranks"], row["batch_size"], row["crowded"]) for row in result["measured"]
    ] == [
        ("strong", 1, 6, False),
        ("strong", 2, 6, cores < 2),
        ("weak", 1, 2, False),
        ("weak", 2, 4, cores < 2),
    ]
    one, two, *_ = result["measured"]
    assert one["efficiency"] == 1
    assert one["step_ms"] == pytest.approx(6e3 / one["rates"][0])
    assert two["efficiency"] == pytest.approx(two["images_per_second"] / one["images_per_second"] / 2)
    assert one["communication"] < 0.05 < two["communication"] < 1
    for row in result["measured"]:
        assert row["error"] == pytest.approx(row["model_ms"] / row["step_ms"] - 1)
        (point,) = [
            line["result"]
            for line in result["points"]
            if line["key"]["kind"] == "step"
            and (line["key"]["ranks"], line["key"]["batch_size"]) == (row["ranks"], row["batch_size"])
        ]
        assert point["threads"] == row["ranks"], "one BLAS thread a rank"
        if row["ranks"] == 2:
            assert row["communication"] == pytest.approx(
                (point["phases_ms"]["sums"] + point["phases_ms"]["gradients"]) / row["step_ms"]
            )
    assert result["predicted"]["strong"][-1]["ranks"] == 4
    assert "Strong scaling ends at 4 ranks" in (folder / "text").read_text()
    assert result["model"]["host"]["latency"] > 0
    assert result["model"]["net"] == {"latency": 5e-6, "per_byte": 1e-10}


@pages
def test_the_page_is_whole_and_needs_nothing_else(folder: Path) -> None:
    page, text = (folder / "scale.html").read_text(), (folder / "text").read_text()
    assert not re.findall(
        r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//|@import|url\(\s*["']?http|<script"""
        r"""|<link(?! rel="icon" href="data:,")""",
        page,
    )
    assert page.count("<svg") == page.count("</svg>") == 4
    shown = re.sub(r"<(svg|style).*?</\1>|<[^>]*>", " ", page, flags=re.S)
    table = [line.split() for line in text.splitlines() if re.match(r" *\d+\*? +\d", line)]
    assert len(table) == 4 + 3 + 13
    words = shown.split()
    for row in table:
        at = "\0".join(row)
        assert at in "\0".join(words), row
    for needed in (
        "Assumptions",
        "MNIST has 60,000",
        "assumed, not measured",
        "10 GB/s",
        "distrib",
        "AMD" if "AMD" in text else text.split(",")[0],
    ):
        assert needed in shown, needed
    assert {path.name for path in folder.glob("*.png")} == {
        "efficiency.png",
        "images_per_second.png",
        "strong.png",
        "weak.png",
    }


@pages
def test_nothing_is_measured_twice(folder: Path) -> None:
    """Nor is anything of other settings mistaken for it."""
    before = (folder / "points.jsonl").read_bytes()
    done = scale(
        *SETTINGS,
        "--ranks",
        2,
        "--out",
        folder,
        "--json",
        "--ranks-per-host",
        4,
        "--net-latency",
        20,
        "--net-bandwidth",
        2,
    )
    assert (folder / "points.jsonl").read_bytes() == before
    result = json.loads(done.stdout)
    assert (result["model"]["net"], result["model"]["ranks_per_host"]) == (
        {"latency": pytest.approx(2e-5), "per_byte": pytest.approx(5e-10)},
        4,
    )
    assert result["source"]["net"] == "given"
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
        (("--ranks-per-host", 0), "--ranks-per-host 0: give 1 to 4096"),
        (("--net-latency", -1), "--net-latency -1: give 0 to 1e+06"),
        (("--net-bandwidth", 0), "--net-bandwidth 0: give 0.001 to 1e+06"),
        (("--net-bandwidth", "nan"), "--net-bandwidth nan: give 0.001"),
        (("--timeout", 0), "--timeout 0: give 1 to"),
        (("--launch", "mpirun -n 4"), "--launch mpirun -n 4: put {ranks} where"),
        (("--launch", "no-such-launcher {ranks}"), "no-such-launcher is not on PATH"),
        (("--launch", "false {ranks}"), "try it alone, or give another --launch"),
        (("--launch", "true {ranks}"), "no figures, code 0"),
        (("--variant", "huge"), "--variant huge: choose one of"),
        (("--width", -1), "--width -1.0: give a finite number above 0"),
        (("--out", "/dev/null/x"), "--out /dev/null/x: Not a directory: give a folder"),
    ],
)
def test_wrong_use(arguments: tuple[object, ...], message: str, tmp_path: Path, command_line) -> None:
    folder = () if "--out" in arguments else ("--out", tmp_path / "out")
    code, out, err = command_line(launch.scale.scale, *arguments, *folder)
    errors = [line for line in err.splitlines() if not re.match(r"\d+/\d+  bench", line)]
    assert (code, out, len(errors)) == (2, "", 1), err
    assert message in errors[0]


@pages
def test_one_process_only(tmp_path: Path) -> None:
    done = scale("--out", tmp_path / "out", ranks=2, check=False)
    assert "start it without mpirun or srun" in done.stderr
    assert done.returncode == 2


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
