"""Wrong data, options and folders: one line with name, value and remedy, exit code 2, nothing saved is harmed."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import run, train, write_idx

from distrib import mnist
from distrib.command import main
from distrib.errors import EXIT_USAGE, UserError

SMALL = ("--width", 0.0625, "--batch-size", 16, "--epochs", 1, "--backend", "numpy")
IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte"  # as small_data has them
Call = Callable[..., tuple[int, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """The command line within this process: (exit code, stderr)."""
    monkeypatch.setattr("distrib.train.listen", lambda trainer: None)

    def command(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["distrib", *map(str, arguments)])
        capsys.readouterr()
        return main(), capsys.readouterr().err

    return command


def assert_one_line(code: int, err: str, *named: object) -> None:
    assert code == EXIT_USAGE, err
    assert len(err.splitlines()) == 1, err
    assert err.startswith("distrib: error: ")
    for text in named:
        assert str(text) in err


def snapshot(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in `folder`."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}  # fmt: skip


def content(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def put(path: Path, data: bytes) -> None:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: p.unlink(), "no such file.*expected here"),
    "folder": (lambda p: (p.unlink(), p.mkdir()), "cannot be read.*copy the file again"),
    "empty": (lambda p: p.write_bytes(b""), "starts with nothing.*give an IDX file"),
    "one byte": (lambda p: put(p, content(p)[:1]), "starts with 00.*give an IDX file"),
    "half a header": (lambda p: put(p, content(p)[:6]), "give an IDX file"),
    "header alone": (lambda p: put(p, content(p)[: 4 + 4 * content(p)[3]]), "truncated.*header says.*copy it again"),
    "last byte missing": (lambda p: put(p, content(p)[:-1]), "truncated.*header says.*copy it again"),
    "over-long": (lambda p: put(p, content(p) + b"\0"), "over-long.*header says.*copy it again"),
    "magic": (lambda p: put(p, b"\0\0\x0d" + content(p)[3:]), "starts with 00000d0.*give an IDX file"),
    "huge header": (lambda p: put(p, content(p)[:4] + b"\xff" * 4 + content(p)[8:]), "truncated.*copy it again"),
    "no gzip": (lambda p: p.write_bytes(b"\x1f\x8b" + b"junk" * 9), "cannot be read as gzip.*copy the file again"),
}


@pytest.mark.parametrize("name", [IMAGES, LABELS, IMAGES.replace("train", "t10k"), LABELS.replace("train", "t10k")])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_data_file(damage: str, name: str, small_data: Path) -> None:
    apply, remedy = DAMAGE[damage]
    apply(small_data / name)
    with pytest.raises(UserError) as caught:
        mnist.load(str(small_data))
    assert str(small_data / name) in str(caught.value)
    assert re.search(remedy, str(caught.value))
    assert "\n" not in str(caught.value)


def test_gzip_cut_or_changed_anywhere(small_data: Path) -> None:
    path = small_data / IMAGES
    whole, images = path.read_bytes(), mnist.read_idx(path, mnist.IMAGES)
    for length in (*range(24), len(whole) // 2, len(whole) - 8, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=re.escape(str(path))):
            mnist.read_idx(path, mnist.IMAGES)
    for at in np.random.default_rng(1).integers(10, len(whole), 30):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(UserError, match=re.escape(str(path))):
            mnist.read_idx(path, mnist.IMAGES)
    path.write_bytes(whole)
    np.testing.assert_array_equal(mnist.read_idx(path, mnist.IMAGES), images)


@pytest.mark.parametrize("name", mnist.SHA256)
def test_changed_file_of_the_package(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray((mnist.SHIPPED / name).read_bytes())
    data[4] ^= 1  # the time in gzip's header: the contents stay, the checksum does not
    (tmp_path / name).write_bytes(data)
    monkeypatch.setattr(mnist, "SHIPPED", tmp_path)
    with pytest.raises(UserError, match=f"{name}: SHA-256 differs.*install the package again"):
        mnist.read_idx(tmp_path / name, mnist.IMAGES if "images" in name else mnist.LABELS)


def test_unpacked_file_in_the_package(small_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mnist, "SHIPPED", small_data)
    with pytest.raises(UserError, match=f"{LABELS}: SHA-256 differs.*install the package again"):
        mnist.read_idx(small_data / LABELS, mnist.LABELS)


@pytest.mark.parametrize(("name", "array", "message"), [
    (LABELS, np.zeros(63), "64 images, train-labels-idx1-ubyte 63 labels"),
    (LABELS, np.arange(64) % 11, "label 10 at index 10: labels go from 0 to 9"),
    (LABELS, np.full(64, 255), "label 255 at index 0: labels go from 0 to 9"),
    (LABELS, np.zeros((64, 28, 28)), "IDX labels start with 00000801"),
    (IMAGES, np.zeros((64, 28, 27)), "images of 28×27, the network takes 28×28"),
    (IMAGES, np.zeros(64), "IDX images start with 00000803"),
])  # fmt: skip
def test_well_formed_but_wrong_data(name: str, array: np.ndarray, message: str, small_data: Path) -> None:
    write_idx(small_data / name, array)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        mnist.load(str(small_data))
    assert str(small_data) in str(caught.value)


def test_no_images(small_data: Path) -> None:
    write_idx(small_data / IMAGES, np.zeros((0, 28, 28)))
    write_idx(small_data / LABELS, np.zeros(0))
    with pytest.raises(UserError, match=f"{IMAGES}: holds no images"):
        mnist.load(str(small_data))


OPTIONS = [
    ("--lr", -1), ("--lr", 0), ("--lr", "nan"), ("--lr", "inf"), ("--lr", "abc"), ("--epochs", 1.5),
    ("--limit-train", 0), ("--limit-train", 65), ("--limit-test", 0), ("--limit-test", 33), ("--batch-size", 0),
    ("--variant", "nosuch"), ("--recipe", "nosuch"), ("--optimizer", "nosuch"), ("--loss", "nosuch"),
    ("--schedule", "nosuch"), ("--precision", "nosuch"), ("--backend", "nosuch"), ("--comm", "nosuch"),
    ("--batch-norm", "nosuch"), ("--seed", -1), ("--seed", "x"), ("--nosuch", 3), ("--data", "/no/such"),
    ("--precision", "tf32"), ("--comm", "nccl"), ("--limit-train", ""),
]  # fmt: skip


@pytest.mark.parametrize(("option", "value"), OPTIONS)
def test_bad_option(option: str, value: object, call: Call, small_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, err = call("--run-dir", folder, "--data", small_data, *SMALL, option, value)
    named = value if option != "--nosuch" else ""
    assert_one_line(code, err, option, named)
    assert not folder.exists(), "nothing was begun"


def test_stray_argument_and_missing_value(call: Call) -> None:
    assert_one_line(*call("stray"), "stray", "--help")
    assert_one_line(*call("--lr"), "--lr", "--help")


@pytest.fixture
def finished(call: Call, small_data: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    code, err = call("--run-dir", folder, "--data", small_data, *SMALL)
    assert code == 0, err
    return folder


CHANGED = ("--lr 0.5", "--seed 3", "--variant avgpool", "--loss bce", "--width 0.125", "--batch-size 8",
           "--optimizer sgd", "--limit-train 20", "--precision float64")  # fmt: skip


def test_folder_that_holds_a_run(finished: Path, call: Call, small_data: Path) -> None:
    before = snapshot(finished)
    again = ("--run-dir", finished, "--data", small_data, *SMALL)
    assert_one_line(*call(*again), f"--run-dir {finished}", "finished run", "new folder, or more --epochs")
    assert_one_line(*call(*again, "--resume", "none"), f"--run-dir {finished}", "--resume auto", "new folder")
    for option in CHANGED:
        code, err = call(*again, "--epochs", 2, *option.split())
        assert_one_line(code, err, f"--run-dir {finished}", f"{option} (the run has ", "new folder")
    assert snapshot(finished) == before


def test_settings_of_config_json_must_match(finished: Path, call: Call, small_data: Path) -> None:
    path = finished / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lr": 0.25}))
    before = snapshot(finished)
    code, err = call("--run-dir", finished, "--data", small_data, *SMALL, "--epochs", 2)
    assert_one_line(code, err, "--lr 0.001 (the run has 0.25)")
    for text in ("{", "[1]", ""):
        path.write_text(text)
        assert_one_line(*call("--run-dir", finished, "--data", small_data, *SMALL), path, "--run-dir", "restore")
        path.write_text("")
    assert {k: v for k, v in snapshot(finished).items() if k != "config.json"} == {
        k: v for k, v in before.items() if k != "config.json"}  # fmt: skip


def test_undecodable_metrics(call: Call, small_data: Path, tmp_path: Path) -> None:
    """A line that a crash left damaged is dropped, whatever its bytes are."""
    arguments = ("--run-dir", tmp_path / "run", "--data", small_data, *SMALL)
    assert call(*arguments, "--max-steps", 2)[0] == 0
    with open(tmp_path / "run" / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 1, \xff\xfe')
    code, err = call(*arguments)
    assert code == 0, err
    assert b"\xff" not in (tmp_path / "run" / "metrics.jsonl").read_bytes()


def test_in_a_process_of_its_own(finished: Path, small_data: Path) -> None:
    before = snapshot(finished)
    done = train(finished, "--data", small_data, *SMALL, check=False)
    assert_one_line(done.returncode, done.stderr, finished, "finished run")
    (small_data / IMAGES).write_bytes(b"")
    done = train(finished, "--data", small_data, *SMALL, check=False)
    assert_one_line(done.returncode, done.stderr, small_data / IMAGES)
    assert snapshot(finished) == before
    done = run("-m", "distrib.train", "--lr", "abc", check=False)
    assert_one_line(done.returncode, done.stderr, "--lr")


@pytest.mark.parametrize("option", ["--batch-size 1", "--lr nan"])  # found with, and before, MPI
def test_two_ranks_say_it_once(option: str, small_data: Path, tmp_path: Path) -> None:
    done = train(tmp_path / "run", "--data", small_data, *SMALL, *option.split(), ranks=2, check=False)
    assert done.returncode == EXIT_USAGE
    assert done.stderr.count("distrib:") == 1, done.stderr
    assert f"distrib: error: {option}: " in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()
