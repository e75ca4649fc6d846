"""What all commands of one process share: one rank works, impossible paths, files that strangers wrote.

STRANGE_ROUNDS in the environment asks for more of those files than a quick pass has (`make soak`).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import run, train
from safetensors.numpy import save

from distrib.errors import UserError
from distrib.run import checkpoint as ckpt
from launch import cli
from launch.bench.scale import scale
from launch.entry import one_process
from launch.evaluate import evaluate
from launch.export import export
from launch.report.page import report
from launch.report.reproduce import reproduce
from launch.submit import submit
from launch.watch import watch

ROUNDS = int(os.environ.get("STRANGE_ROUNDS", "12"))
SMALL = ("--epochs", 2, "--batch-size", 32, "--limit-train", 320, "--limit-test", 40, "--width", 0.0625)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(folder, *SMALL, "--log-every", 2)
    return folder


# ---- one rank works


@pytest.mark.parametrize("command", ["evaluate", "report", "export", "watch", "predict", "nothing"])
def test_two_ranks_speak_once(trained: Path, tmp_path: Path, command: str, command_line) -> None:
    """Real mpirun: one rank's output, files and exit code; of a mistake one message."""
    arguments: dict[str, tuple[object, ...]] = {
        "evaluate": (trained, "--limit-test", 20),
        "report": (trained, "--out", tmp_path / "page.html"),
        "export": (trained, tmp_path / "model.safetensors"),
        "watch": (trained, "--once"),
        "predict": (trained, "tests/data/none.png"),
    }
    mistake = command in ("predict", "nothing")
    name = "evaluate" if command == "nothing" else command
    given = arguments.get(command, (tmp_path / "nothing",))
    done = run("-m", "launch.cli", name, *given, ranks=2, check=False)
    code, alone, _ = command_line(cli.app, name, *given)
    assert done.returncode == code == (2 if mistake else 0), done.stderr
    assert done.stderr.count("distrib: error: ") == mistake
    assert len(done.stdout.splitlines()) == len(alone.splitlines())


@pytest.mark.parametrize("command", [evaluate, report, export, watch, reproduce, scale, submit])
def test_other_ranks_are_silent(
    command: Callable[..., None], command_line, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.chdir(tmp_path)
    given = {submit: (), reproduce: (), scale: (), export: ("run", "m.onnx")}.get(command, ("run",))
    assert command_line(command, *given) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_training_starts_without_typer(tmp_path: Path) -> None:
    code = "import sys; from distrib.train import main; assert main() == 0 and 'typer' not in sys.modules"
    run("-c", code, "--run-dir", tmp_path / "run", *SMALL, "--max-steps", 1)


def test_a_shell_of_srun_can_run_it(trained: Path) -> None:
    """`srun -n 4 --pty bash`: four tasks, of which one has the terminal."""
    env = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
    assert "test accuracy" in run("-m", "launch.cli", "evaluate", trained, "--limit-test", 20, env=env).stdout


# ---- paths


LONG = "x" * 300
ODD = "a\nb\x1b[31m"
NO_PLACE = (LONG, f"{LONG}/run", "/dev/null/run", "FILE/run")
NO_RUN = (*NO_PLACE, "FILE", ODD)
PATHS: list[tuple[Callable[..., None], tuple, tuple, tuple]] = [
    (evaluate, (), (), NO_RUN),
    (report, (), (), NO_RUN),
    (watch, (), ("--timeout", 0.2), NO_RUN),
    (watch, (), ("--once",), NO_RUN),
    (export, (), ("OUT.onnx",), NO_RUN),
    (evaluate, ("RUN", "--data"), (), NO_RUN),
    (export, ("RUN", "OUT.onnx", "--check", "--data"), (), NO_RUN),
    (reproduce, ("--report", "--out"), (), NO_RUN),
    (export, ("RUN",), ("--format", "onnx", "--no-check"), NO_PLACE),  # the other names could be written
    (report, ("RUN", "--out"), (), NO_PLACE),
    (report, ("RUN", "--png", "--out"), (), (*NO_PLACE, "FILE")),
    (reproduce, ("--only", "ablation", "--out"), (), (*NO_PLACE, "FILE")),
]
"""Command, what stands before the path and after it, and paths that cannot be there."""


@pytest.mark.parametrize(
    ("command", "before", "after", "name"),
    [(command, before, after, name) for command, before, after, names in PATHS for name in names],
)
def test_paths_that_cannot_be(
    trained: Path, tmp_path: Path, command_line, command, before: tuple, after: tuple, name: str
) -> None:
    """One line that names it, exit code 2, and no control character."""
    (tmp_path / "file").write_text("x")
    name = name.replace("FILE", str(tmp_path / "file"))
    places = {"RUN": str(trained), "OUT.onnx": str(tmp_path / "out.onnx")}
    code, out, err = command_line(command, *(places.get(str(each), each) for each in (*before, name, *after)))
    assert (code, err.count("\n")) == (2, 1), out + err
    assert all(letter.isprintable() or letter == "\n" for letter in out + err)
    assert name[:40].replace("\n", "?").replace("\x1b", "?") in err


def test_a_folder_that_may_not_be_entered(command_line, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user other than root sees it."""

    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", refuse)
    for command, more in ((evaluate, ()), (report, ()), (watch, ()), (export, ("out.onnx",))):
        code, _, err = command_line(command, "closed", *more)
        assert (code, err.count("\n")) == (2, 1)
        assert "closed" in err
        assert "Permission denied): permissions are missing" in err


def test_home(trained: Path, command_line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(trained.parent))
    for command, more in ((evaluate, ()), (report, ("--out", "~/page.html")), (export, ("~/m.safetensors",))):
        code, _, err = command_line(command, "~/run", *more)
        assert code == 0, err
    assert (trained.parent / "page.html").exists()
    assert (trained.parent / "m.safetensors").exists()
    code, _, err = command_line(evaluate, "~nobody-of-that-name/run")
    assert (code, err.count("\n")) == (2, 1)


def test_an_error_of_no_path_is_no_mistake_of_a_person() -> None:
    @one_process
    def command() -> None:
        raise OSError(5, "Input/output error")

    @one_process
    def mistake() -> None:
        raise UserError("\x1b[31m")

    with pytest.raises(OSError, match="Input/output"):
        command()
    with pytest.raises(UserError, match=r"^\?\[31m$"):
        mistake()


# ---- files that strangers wrote

ESCAPES = "\x1b[31mred\x1b]0;title\x07"
DEEP = "[" * 900 + "]" * 900
VALUES = [
    None,
    True,
    "text",
    ESCAPES,
    "",
    -1,
    0,
    1,
    -5.5,
    1e300,
    10**30,
    2**63,
    float("nan"),
    float("inf"),
    1e-320,
    [],
    {},
    [1, 2],
    {"a": ESCAPES},
    "x" * 100_000,
    "/nowhere",
    "\ud800",
    "\0",
    "9" * 5000,
    json.loads(DEEP),
]
TEXTS = [
    "",
    "null",
    "[]",
    "{}",
    "[" * 100_000,
    '{"a":' * 2000,
    "1e999",
    "NaN",
    f'"{"x" * 20_000_000}"',
    f'{{"epochs": {"9" * 10_000}}}',
    ESCAPES,
    f'{{"epochs": 1, "batch_size": {DEEP}}}',
]
VERDICT = json.dumps({"rank": 0, "host": "h", "pid": 1, "step": 3, "cause": "planted", "time": 1.0})


def mutated(rng: random.Random, text: str) -> str:
    """A JSON text with a value replaced, left out or added; cut off; or something else altogether."""
    way = rng.random()
    if way < 0.2:
        return text[: rng.randrange(len(text) + 1)]
    if way < 0.35:
        return rng.choice(TEXTS)
    if way < 0.45:
        at = rng.randrange(len(text) + 1)
        return text[:at] + rng.choice(["\x1b", "\0", "}", '"', "\n"]) + text[at + 1 :]
    values = json.loads(text)
    for _ in range(rng.choice([1, 1, 3])):
        where = values.get("environment", values) if rng.random() < 0.2 else values
        name = rng.choice([*where, "new", ESCAPES])
        if isinstance(where, dict) and rng.random() < 0.2:
            where.pop(name, None)
        else:
            where[name] = rng.choice(VALUES)
    return json.dumps(values)


def put_something_else(rng: random.Random, path: Path) -> None:
    """A FIFO, a folder, a link to what never ends or to itself, bytes, or 200 MB in the place of `path`."""
    path.unlink()
    way = rng.randrange(6)
    if way == 0:
        os.mkfifo(path)
    elif way == 1:
        path.mkdir()
    elif way in (2, 3):
        path.symlink_to("/dev/zero" if way == 2 else path.name)
    else:
        path.write_bytes(rng.randbytes(2000) if way == 4 else b"")
        os.truncate(path, 2000 if way == 4 else 200 << 20)


def spoil(rng: random.Random, folder: Path) -> None:
    """Change some of the files of a run's folder that hold JSON, its checkpoints' descriptions too."""
    if rng.random() < 0.5:
        (folder / "summary.json").unlink()
    (folder / "failure.json").write_text(VERDICT)
    names = ["config.json", "summary.json", "metrics.jsonl", "ranks/00000.json", "failure.json"]
    kept = rng.sample([name for name in names if (folder / name).exists()], rng.choice([1, 2, 3]))
    for path in (folder / name for name in kept):
        if rng.random() < 0.15:
            put_something_else(rng, path)
        elif path.name == "metrics.jsonl":
            lines = path.read_text().splitlines()
            spoiled = [mutated(rng, line) if rng.random() < 0.3 else line for line in lines]
            path.write_bytes("\n".join(spoiled).encode(errors="surrogatepass"))
        else:
            path.write_bytes(mutated(rng, path.read_text()).encode(errors="surrogatepass"))
    if "failure.json" not in kept:
        (folder / "failure.json").unlink()
    if rng.random() < 0.4:
        for path in ckpt.list_checkpoints(folder / "checkpoints"):
            tensors, about = ckpt.load_model(path)
            text = mutated(rng, json.dumps(about)).encode(errors="replace").decode()[:1_000_000]
            checksum = ckpt._checksum(tensors, text)
            path.write_bytes(save(tensors, {"format": "pt", "about": text, "checksum": checksum}))


@contextlib.contextmanager
def bounded(seconds: int):
    """TimeoutError in the main thread after so many seconds: what hangs is a failure."""

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_files_that_strangers_wrote(trained: Path, tmp_path: Path, command_line, seed: int) -> None:
    """Whatever they hold: a result, or one line; never a traceback, a wait or a control character."""
    rng = random.Random(seed)
    folder = shutil.copytree(trained, tmp_path / "run")
    spoil(rng, folder)
    page = tmp_path / "page.html"
    for command, given in (
        (watch, ("--once",)),
        (report, ("--out", page)),
        (evaluate, ("--limit-test", 20)),
        (export, (tmp_path / "model.safetensors",)),
    ):
        with bounded(120):
            code, out, err = command_line(command, folder, *given)
        assert code in (0, 1, 2, 85), out + err
        assert err.count("\n") == (code == 2), err
        assert all(letter.isprintable() or letter == "\n" for letter in out + err)
    if page.exists():
        assert "\x1b" not in page.read_text()


@pytest.mark.parametrize("name", ["config.json", "summary.json", "metrics.jsonl", "ranks/00000.json"])
def test_a_fifo_is_not_waited_for(trained: Path, tmp_path: Path, command_line, name: str) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with bounded(120):
        code, _, err = command_line(report, folder, "--out", tmp_path / "page.html")
        assert code == (0 if name.startswith("ranks") else 2), err
        assert name.startswith("ranks") or f"{name}: cannot be read" in err
        code, _, err = command_line(watch, folder, "--once")
        assert code == (2 if name == "config.json" else 0), err


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.json", '{"epochs": "two"}', '"epochs" is "two", which is no int'),
        ("config.json", '{"lr": NaN}', '"lr" is NaN, which is no float'),
        ("config.json", '{"batch_size": 0}', '"batch_size" is 0, which is below 1'),
        ("config.json", "[]", "no JSON object"),
        ("config.json", "[" * 100_000, "nested too deep"),
        ("config.json", f'{{"variant": "{"x" * (17 << 20)}"}}', "larger than 16777216 bytes"),
        ("summary.json", '{"steps": [1]}', '"steps" is a list, which is no int | None'),
        ("summary.json", '{"finished": true, "test_accuracy": true}', '"test_accuracy" is true'),
    ],
)
def test_the_file_and_the_value_are_named(
    trained: Path, tmp_path: Path, command_line, name: str, text: str, words: str
) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    (folder / name).write_text(text)
    code, out, err = command_line(report, folder)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{folder / name}: " in err
    assert words in err
    assert err.endswith(": restore it, or leave this run out\n")
