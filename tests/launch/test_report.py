"""The report of runs: what it says is what the runs hold, and a real browser shows it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import LIMIT, run, train
from needs import chromium
from PIL import Image
from safetensors.numpy import load_file

from distrib.data import formats
from distrib.files import short
from launch.report.page import answers, headline, label_of, page, points_of, report
from launch.report.records import line_of
from launch.report.runs import (
    POINTS,
    Curve,
    Log,
    RunData,
    all_test_images,
    logits_of_test_images,
    read_run,
    smooth,
)

OPTIONS = (
    "--epochs",
    2,
    "--batch-size",
    50,
    "--limit-train",
    1000,
    "--limit-test",
    500,
    "--width",
    0.0625,
    "--lr",
    3e-3,
    "--log-every",
    2,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two finished runs, and one that was stopped."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "adam", *OPTIONS, ranks=2)
    train(folder / "sgd", *OPTIONS, "--optimizer", "sgd", "--lr", 0.1, "--loss", "bce")
    train(folder / "short", *OPTIONS, "--max-steps", 25)
    (folder / "short" / "logits.safetensors").unlink()  # as after a signal
    return [folder / name for name in ("adam", "sgd", "short")]


class Tables(HTMLParser):
    """The text of all cells, the pictures, and every address that a page holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.addresses: list[str] = []
        self.scripts = 0
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        self.scripts += tag == "script"
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.inside = True

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.tables[-1][-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")


def test_what_the_tables_say(runs: list[Path]) -> None:
    found = Tables(page([read_run(path) for path in runs]))
    assert found.scripts == 0
    assert all(address.startswith(("data:", "#")) for address in found.addresses), (
        "the page needs nothing else"
    )
    results = {row[0]: row[1:] for row in found.tables[0]}
    summaries = [json.loads((path / "summary.json").read_text()) for path in runs]
    assert results[""] == ["adam", "sgd", "short"]
    assert results["state"] == ["finished", "finished", "stopped"]
    assert results["test accuracy"] == [f"{each['test_accuracy']:.2f} %" for each in summaries]
    assert results["ranks"] == ["2", "1", "1"]
    differences = {row[0]: row[1:] for row in found.tables[2]}
    assert differences == {
        "option": ["adam", "sgd", "short"],
        "optimizer": ["adam", "sgd", "adam"],
        "lr": ["0.003", "0.1", "0.003"],
        "loss": ["ce", "bce", "ce"],
        "max_steps": ["–", "–", "25"],
    }


def test_the_page_of_one_run_opens_with_its_answer(runs: list[Path]) -> None:
    adam, _, short = map(read_run, runs)
    assert re.fullmatch(
        r"of the test images named right after epoch (\d+) of \1, by resnet9, [\d,]+ parameters,"
        r" trained in \d+ s on 2 rank\(s\); finished",
        headline(adam),
    )
    assert headline(short).endswith("; stopped")
    going_on = replace(adam, summary={}, log=Log())
    assert headline(going_on) == "the test accuracy is not known yet: unfinished"
    text = page([adam])
    assert 0 < text.index(headline(adam)) < text.index("<svg") < text.index("<h2>Results")


@pytest.mark.parametrize("which", [0, 1, 2])
def test_digits_agree_with_the_summary(runs: list[Path], which: int) -> None:
    data = read_run(runs[which])
    found = answers(data)
    assert not isinstance(found, str)
    assert found.step == data.summary["steps"]
    assert found.confusion.sum() == 500
    assert 100 * found.confusion.trace() / 500 == pytest.approx(data.summary["test_accuracy"], abs=1e-9)
    assert sum(images for _, images, _, _ in found.per_class) == 500
    sure = [each["probability"] for each in found.worst]
    assert sure == sorted(sure, reverse=True)
    assert all(0 < each <= 100 for each in sure)
    assert len(found.worst) == min(24, 500 - found.confusion.trace())
    assert all(each["label"] != each["said"] for each in found.worst)


def test_kept_logits_are_those_of_the_last_checkpoint(runs: list[Path], tmp_path: Path) -> None:
    """On two ranks, gathered: what one process computes from the checkpoint."""
    copy = shutil.copytree(runs[0], tmp_path / "copy")
    kept = load_file(copy / "logits.safetensors")["logits"]
    (copy / "logits.safetensors").unlink()
    again = logits_of_test_images(read_run(copy))
    np.testing.assert_allclose(again[0], kept, atol=1e-5 * np.abs(kept).max())


def test_a_run_that_goes_on(runs: list[Path], tmp_path: Path) -> None:
    copy = shutil.copytree(runs[0], tmp_path / "copy")
    (copy / "summary.json").unlink()
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "ep')  # half a line
    done = run("-m", "launch.cli", "report", copy)
    text = (copy / "report.html").read_text()
    assert "unfinished" in text
    assert done.stdout.startswith(f"{copy / 'report.html'}: 1 run(s)")
    results = {row[0]: row[1] for row in Tables(text).tables[0]}
    assert (results["epochs"], results["steps"]) == ("2", "40")


def test_png(runs: list[Path], tmp_path: Path) -> None:
    run("-m", "launch.cli", "report", *runs, "--png", "--out", tmp_path / "plots")
    names = {path.stem for path in (tmp_path / "plots").glob("*.png")}
    assert names == {"loss", "accuracy", "rate", "throughput", "time"}
    for path in (tmp_path / "plots").glob("*.png"):
        pixels = np.array(Image.open(path).convert("RGB")).astype(int)
        coloured = np.ptp(pixels, axis=2) > 60  # axes and text are grey
        assert coloured.mean() > 0.002, f"{path.name} has no curve"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda _: None, "holds no run"),
        (lambda folder: (folder / "config.json").write_text("{}"), "nothing was logged yet"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: cannot be read"),
    ],
)
def test_what_is_no_run(tmp_path: Path, make, words: str) -> None:
    make(tmp_path)
    done = run("-m", "launch.cli", "report", tmp_path, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert words in done.stderr
    assert not (tmp_path / "report.html").exists()


def test_many_runs(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No bound in time: the data is read once, no model is run, and curves are thinned as they get many."""
    names = [f"run {i} <&> $\\frac$ {chr(27)}" for i in range(30)]
    copies = [shutil.copytree(runs[0], tmp_path / name) for name in names]
    for copy in copies:
        shutil.rmtree(copy / "checkpoints")
    (copies[3] / "logits.safetensors").unlink()
    loads, plain = [], formats.load
    monkeypatch.setattr(formats, "load", lambda *given, **more: loads.append(given) or plain(*given, **more))
    all_test_images.cache_clear()
    found = [read_run(copy) for copy in copies]
    text = page(found)
    assert len(loads) == 1
    assert text.count("<svg") == 5
    assert "run 3 &lt;&amp;&gt; $\\frac$ ?" in text
    assert "not computed here, as many runs are compared: distrib report" in text
    assert "<&>" not in text
    table = Tables(text).tables[0]
    assert table[0][:3] == ["run", "state", "test accuracy"]  # a line for each run
    assert [row[0] for row in table[1:]] == [run.name for run in found]
    assert len(table[1]) == len(table[0])
    assert points_of(found) == 21 * 600 // 30
    assert points_of(found[:1]) == 1200


def test_long_names_are_shortened_and_told_in_full(runs: list[Path], tmp_path: Path) -> None:
    names = [f"{'a' * 40}-{i}-{'b' * 60}-{i}" for i in range(2)]
    text = page([read_run(shutil.copytree(runs[0], tmp_path / name)) for name in names])
    heads = Tables(text).tables[0][0][1:]
    assert all(len(head) == 60 and "…" in head for head in heads)
    assert len(set(heads)) == 2
    for name in names:
        assert f'title="{name}"' in text
        assert f">{short(name, 34)}<" in text  # in a legend
    alike = [read_run(runs[0]) for _ in range(3)]
    for i, each in enumerate(alike):
        each.name = f"{'a' * 40}{i}{'b' * 40}"
    assert [label_of(each, alike)[:4] for each in alike] == ["1: a", "2: a", "3: a"]
    assert label_of(alike[0], alike[:1]) == short(alike[0].name, 34)
    assert short("abcdefghij", 10) == "abcdefghij"
    assert short("abcdefghijk", 10) == "abcde…hijk"


def test_a_log_of_any_length_is_kept_in_bounded_memory(runs: list[Path], tmp_path: Path) -> None:
    copy = shutil.copytree(runs[0], tmp_path / "copy")
    line = {"loss": 1.0, "epoch": 1, "lr": 0.1, "images_per_second": 10.0}
    with open(copy / "metrics.jsonl", "w") as file:
        for step in range(1, 20_001):
            file.write(json.dumps({"step": step, **line}) + "\n")
        file.write('{"step": 20001, "loss": "' + "x" * 200_000 + '", "epoch": 1}\n')  # longer than any line
        file.write(json.dumps({"step": 20_002, **line}) + "\n")
        file.write(json.dumps({"step": 20_003, **line}))  # half written
    log = read_run(copy).log
    assert (log.steps, log.last_step) == (20_001, 20_002)
    assert all(len(curve._bins) <= 2 * POINTS for curve in log.of_steps.values())


def test_data_that_is_gone_is_said_on_the_page(runs: list[Path], tmp_path: Path) -> None:
    copy = shutil.copytree(runs[0], tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "data": "/no/such/folder"}))
    assert "--data /no/such/folder: no such folder" in page([read_run(copy)])


def test_a_run_of_an_older_version(runs: list[Path], tmp_path: Path) -> None:
    """Options that came later have their defaults, and are no difference."""
    copy = shutil.copytree(runs[0], tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    for name in ("shift", "rotate", "average"):
        del config[name]
    (copy / "config.json").write_text(json.dumps(config))
    assert "All options are the same." in page([read_run(copy), read_run(runs[0])])


def test_a_page_that_cannot_be_written(runs: list[Path], tmp_path: Path, command_line) -> None:
    """A folder that is missing, a folder in its place, a FIFO: one line, and the FIFO is one afterwards."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for out, words in (
        (
            "no/page.html",
            f"no/page.html: there is no folder {tmp_path / 'no'}: make it, or give another place",
        ),
        ("folder", "folder: is a folder: give a file's name"),
        ("fifo", "fifo: is no file: give a file's name"),
        (f"{'x' * 300}/page.html", "cannot be used (File name too long): give a shorter name"),
    ):
        code, said, err = command_line(report, runs[0], "--out", tmp_path / out)
        assert (code, said, err.count("\n")) == (2, "", 1)
        assert words in err
    assert (tmp_path / "fifo").is_fifo()


def log_of(steps: list[dict]) -> Log:
    log = Log()
    for step in steps:
        line = line_of(json.dumps({"epoch": 1, **step}).encode())
        assert line
        log.add(line)
    return log


def test_time_of_the_steps_that_were_timed() -> None:
    """A thousand steps of a GPU, whose parts are unknown, then a hundred of 100 ms on a host."""
    null = {"compute_seconds": None, "communication_seconds": None, "data_seconds": None}
    steps = [{"step": 100 * (i + 1), "loss": 1.0, **null} for i in range(10)]
    timed = {"compute_seconds": 7.0, "communication_seconds": 2.0, "data_seconds": 1.0}
    data = RunData(Path(), "x", {}, {}, {}, log_of([*steps, {"step": 1100, "loss": 1.0, **timed}]), {})
    assert data.parts_ms() == pytest.approx({"compute": 70, "communication": 20, "data": 10})
    data.log = log_of(steps)
    assert data.parts_ms() is None


def test_smooth_keeps_means_and_lengths() -> None:
    assert smooth(np.empty(0)).size == 0
    np.testing.assert_allclose(smooth(np.full(100, 3.0)), 3)
    np.testing.assert_allclose(smooth(np.arange(90.0))[3:-3], np.arange(90.0)[3:-3])


@pytest.mark.parametrize("count", [1, 600, 1200, 1201, 6000, 100_001])
def test_curves_are_thinned_by_averaging(count: int) -> None:
    """Of as many points as there may be, 600 to 1,200 are kept: each a mean of 2^n points but the last."""
    curve = Curve()
    for i in range(count):
        curve.add(i + 1, float(i))
    steps, values = curve.points()
    each = 1
    while count > 1200 * each:
        each *= 2
    expected = [np.arange(count)[i : i + each].mean() for i in range(0, count, each)]
    np.testing.assert_allclose(values, expected)
    np.testing.assert_allclose(steps, values + 1)
    few, means = curve.points(100)
    assert len(few) <= 100
    assert means[0] == np.arange(min(count, each * -(-len(values) // 100))).mean()
    data = RunData(
        Path(), "x", {"batch_size": 10, "limit_train": 10000}, {}, {}, Log(of_steps={"loss": curve}), {}
    )
    np.testing.assert_allclose(data.curve("loss")[0], steps / 1000)


@pytest.mark.needs("chromium")
@pytest.mark.parametrize(("width", "name"), [(1280, "wide"), (400, "phone")])
def test_in_a_real_browser(runs: list[Path], tmp_path: Path, width: int, name: str) -> None:
    """Chromium loads it without a complaint on its console, and it does not overflow sideways."""
    path = tmp_path / "page.html"
    probe = (
        "<script>document.title = [document.documentElement.scrollWidth, innerWidth, document.images.length,"
    )
    probe += " [...document.images].every(i => i.naturalWidth == 28)].join()</script>"
    path.write_text(page([read_run(each) for each in runs]).replace("</body>", f"{probe}</body>"))
    command = [
        str(chromium()),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        "--v=0",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},3000",
        "--virtual-time-budget=3000",
    ]
    done = subprocess.run(
        [*command, f"--screenshot={tmp_path / 'shot.png'}", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title, f"no page: {done.stderr[-500:]}"
    scroll, inner, images, loaded = title[1].split(",")
    assert int(scroll) <= int(inner), "the page is wider than the window"
    assert int(images) > 24
    assert loaded == "true"
