"""`distrib predict`: the line, the drawing in a file and on a terminal, JSON, and the two losses."""

from __future__ import annotations

import csv
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import write_idx
from networks import resnet9
from PIL import Image

from distrib.data import formats
from distrib.predict import DIGITS, probabilities
from distrib.run import checkpoint as ckpt
from launch import predict as module
from launch.predict import SHADES, bars, drawing, line, predict

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module", params=["ce", "bce"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of an untrained network whose logits differ."""
    network, about = (
        resnet9(width=0.0625, seed=3),
        {"variant": "baseline", "width": 0.0625, "loss": request.param, "dtype": "float32"},
    )
    network.params["fc.bias"].value[...] = np.arange(10)[::-1] / 3
    return ckpt.save_checkpoint(tmp_path_factory.mktemp("model"), 1, network.state_dict(), about, {}, {}, 1)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A picture with dark ink and an IDX file of 25 images."""
    images = formats.load(limit_train=1, limit_test=25).test_images
    Image.fromarray(255 - images[0, ..., 0]).save(tmp_path / "digit.png")
    write_idx(tmp_path / "images.gz", images)
    return tmp_path / "digit.png", tmp_path / "images.gz"


@pytest.fixture
def call(command_line):
    return partial(command_line, predict)


def plain(text: str) -> bool:
    return all(letter.isprintable() or letter == "\n" for letter in text)


def test_lines_and_json_agree(model: Path, files: tuple[Path, Path], call) -> None:
    found = json.loads(call(model, *files, "--json")[1])
    assert len(found) == 26
    assert all(len(result["probabilities"]) == 10 for result in found)
    lines = call(model, *files)[1].splitlines()
    assert [text.split(": ")[0] for text in lines] == [
        str(files[0]),
        *(f"{files[1]}[{i}]" for i in range(25)),
    ]
    for result, text in zip(found, lines, strict=True):
        p = result["probabilities"]
        order = sorted(range(10), key=lambda digit: -p[digit])
        assert result["digit"] == order[0]
        assert text.startswith(
            f"{result['image']}: {order[0]}  {100 * p[order[0]]:.1f} %"
            f"   {order[1]}  {100 * p[order[1]]:.1f} %"
        )
        assert text.count(" %") == 3
        assert ("(inverted: dark on bright)" in text) == result["inverted"]
    assert lines[0].endswith(" %  (inverted: dark on bright)")
    assert [text.count(" %") for text in call(model, files[0], "--top", 1)[1].splitlines()] == [1]
    assert call(model, files[0], "--top", 10)[1].count(" %") == 10


def test_a_folder_and_csv(model: Path, files: tuple[Path, Path], tmp_path: Path, call) -> None:
    """All files however deep, in order, hidden ones apart; the table says what JSON says."""
    deep = tmp_path / "set" / "b" / "c"
    deep.mkdir(parents=True)
    for place in (tmp_path / "set" / "z, 1.png", deep / "a.png", tmp_path / "set" / "b" / ".hidden"):
        shutil.copy(files[0], place)
    Image.new("L", (40, 40), 255).save(deep / "empty.png")
    found = json.loads(call(model, tmp_path / "set", files[0], "--json")[1])
    names = [
        str(each) for each in (deep / "a.png", deep / "empty.png", tmp_path / "set" / "z, 1.png", files[0])
    ]
    assert [result["image"] for result in found] == names
    table = list(csv.DictReader(call(model, tmp_path / "set", files[0], "--csv")[1].splitlines()))
    assert [row["image"] for row in table] == names
    for row, result in zip(table, found, strict=True):
        assert row["class"] == (result["class"] or "")
        assert float(row["probability"]) == pytest.approx(result["probability"], abs=1e-6)
    assert table[1]["class"] == ""
    (tmp_path / "none" / ".git").mkdir(parents=True)
    code, _, err = call(model, tmp_path / "none")
    assert (code, err.count("\n")) == (2, 1)
    assert "holds no files: give pictures, or a folder of pictures" in err


FORMULAS = ("=1+1", "+1", "-1", "@SUM(1)", " =1", "＝1")


def test_a_spreadsheet_takes_no_name_as_a_formula(
    files: tuple[Path, Path], tmp_path: Path, call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a file's nor a class's."""
    about = {"variant": "baseline", "width": 0.0625, "loss": "ce", "dtype": "float32"}
    about |= {"class_names": [f"=class {i}" for i in range(10)]}
    network = resnet9(width=0.0625, seed=3)
    (tmp_path / "model").mkdir()
    own = ckpt.save_checkpoint(tmp_path / "model", 1, network.state_dict(), about, {}, {}, 1)
    (tmp_path / "files").mkdir()
    monkeypatch.chdir(tmp_path / "files")
    names = [*FORMULAS, "a=1", "7 -1"]
    for name in names:
        shutil.copy(files[0], name)
    code, out, err = call(own, "--csv", "--", *names)
    assert code == 0, err
    table = list(csv.DictReader(out.splitlines()))
    assert [row["image"] for row in table] == [*(f"'{name}" for name in FORMULAS), "a=1", "7 -1"]
    assert {row["class"][:8] for row in table} == {"'=class "}


def test_sigmoids_need_not_sum_to_one(model: Path, files: tuple[Path, Path], call) -> None:
    total = sum(json.loads(call(model, files[0], "--json")[1])[0]["probabilities"])
    if ckpt.load_model(model)[1]["loss"] == "ce":
        assert total == pytest.approx(1)
    else:
        assert total > 1.5


def test_probabilities() -> None:
    z = np.array([[-2000.0, 0, 3], [40, 45, 2000]])
    sigmoid = probabilities(z, "bce")
    assert sigmoid[0] == pytest.approx([0, 0.5, 1 / (1 + np.exp(-3))])
    assert sigmoid[1].tolist() == [1, 1, 1]  # why the digit is taken from the logits
    assert probabilities(z, "ce")[0] == pytest.approx(np.array([0, 1, np.exp(3)]) / (1 + np.exp(3)))


def test_the_digit_is_of_the_largest_logit_where_sigmoids_are_equal(
    tmp_path: Path, files: tuple[Path, Path], call
) -> None:
    network, about = (
        resnet9(width=0.0625),
        {"variant": "baseline", "width": 0.0625, "loss": "bce", "dtype": "float32"},
    )
    network.params["fc.weight"].value[...] = 0
    network.params["fc.bias"].value[...] = 40 + np.arange(10)
    path = ckpt.save_checkpoint(tmp_path, 1, network.state_dict(), about, {}, {}, 1)
    assert call(path, files[0])[1].startswith(f"{files[0]}: 9  100.0 %   0  100.0 %")


def test_draw_in_a_file(model: Path, files: tuple[Path, Path], call) -> None:
    code, out, _ = call(model, *files, "--draw")
    assert code == 0
    assert plain(out)
    assert set(out) & set("▀█") == set()
    assert "the first 20 of 26 images; --limit N draws more" in out.splitlines()[-1]
    assert out.count(f"{files[1]}[") == 19
    assert "the first 3 of 26" in call(model, *files, "--draw", "--limit", 3)[1]
    first = call(model, files[0], "--draw")[1].splitlines()
    assert len(first) == 1 + 14 + 1
    assert "the first" not in first[-1]
    assert [text.split()[-1] for text in first if text.rstrip().endswith("%")] == ["%"] * 10


def test_draw_on_a_terminal(
    model: Path, files: tuple[Path, Path], call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "90")
    for name in ("NO_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    out = call(model, files[0], "--draw")[1]
    assert out.count("▀") == 14 * 28
    assert "48;5;16" in out
    assert "█" in out
    for name, value in (("TERM", "dumb"), ("TERM", "linux"), ("NO_COLOR", "1")):  # no shades of grey
        monkeypatch.setenv(name, value)
        out = call(model, files[0], "--draw")[1]
        assert "▀" not in out
        assert "@" in out


def test_the_drawing_is_the_image() -> None:
    pixels = np.zeros((28, 28), np.uint8)
    pixels[2:4, 5], pixels[4, 6] = 255, 128
    rows = drawing(pixels, shades=False).plain.split("\n")
    assert [len(row) for row in rows] == [28] * 14
    assert rows[1][5] == SHADES[-1]
    assert rows[2][6] == SHADES[2]
    assert "".join(rows).count(" ") == 14 * 28 - 2
    text = drawing(pixels, shades=True)
    assert text.plain.count("▀") == 14 * 28
    assert "rgb(128,128,128) on rgb(0,0,0)" in {str(span.style) for span in text.spans}


def test_bars_and_names() -> None:
    result = {
        "image": "a\x1b[2J\udc80.png",
        "class": "7",
        "inverted": False,
        "probabilities": [0.02] * 7 + [0.8, 0.05, 0.01],
    }
    lines = bars(result, DIGITS, 10, shades=False).plain.split("\n")
    assert lines[7] == "7  ########    80.0 %"
    assert len(lines) == 10
    assert line(result, DIGITS, 2) == "a?[2J?.png: 7  80.0 %   8  5.0 %"
    names = [f"{'a long name ' * 15}{i}" for i in range(10)]
    assert line({**result, "class": names[7]}, names, 2).endswith(
        ": a long nam…ng name 7  80.0 %   a long nam…ng name 8  5.0 %"
    )
    lines = bars({**result, "class": names[7]}, names, 10, shades=False).plain.split("\n")
    assert lines[7] == "a long nam…ng name 7  ########    80.0 %"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--top", 0), "--top 0: give 1 or more"),
        (("--limit", 0), "--limit 0: give 1 or more"),
        (("--draw", "--json"), "--draw and --json: give one of them"),
        (("--json", "--csv"), "--json and --csv: give one of them"),
        (("nothing.png",), "nothing.png: no such file"),
    ],
)
def test_mistakes(more: tuple, words: str, model: Path, files: tuple[Path, Path], call) -> None:
    code, out, err = call(model, files[0], *more)
    assert code == 2
    assert words in err
    assert len(err.splitlines()) == 1
    assert out == ""
