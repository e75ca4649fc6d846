"""Paths that are none, folders that one may not enter, that vanish or that lie at home."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import test_bad_input
from conftest import at, run, summary
from test_bad_input import SMALL, assert_one_line, newest

from distrib import files
from distrib.errors import UserError
from distrib.run.folder import Run
from nn.cuda.backend import place_cupy_cache

Call = Callable[..., tuple[int, str]]
call, stopped = test_bad_input.call, test_bad_input.stopped


def test_resume_from_a_run_s_folder(stopped: Path, call: Call, small_data: Path, tmp_path: Path) -> None:
    for number, given in enumerate((stopped, stopped / "checkpoints", newest(stopped))):
        options = ("--run-dir", tmp_path / f"other{number}", "--data", small_data, *SMALL)
        assert call(*options, "--resume", given)[0] == 0
    digests = {summary(tmp_path / f"other{number}")["parameter_digest"] for number in range(3)}
    assert len(digests) == 1
    os.truncate(newest(stopped), 99)
    (tmp_path / "x").mkdir()
    code, err = call("--run-dir", tmp_path / "x", "--data", small_data, *SMALL, "--resume", stopped)
    assert_one_line(code, err, stopped, "no valid checkpoint")


LONG = "x" * 300


@pytest.mark.parametrize("option", ["--data", "--run-dir", "--resume"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (LONG, "File name too long"),
        ("file", ""),
        ("file/x", ""),
        ("~nobodyatall/x", "there is no user nobodyatall"),
        ("", "give a name"),
        ("a\0b", "give a name"),
    ],
)
def test_a_path_that_is_none(
    option: str,
    name: str,
    message: str,
    call: Call,
    small_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    paths = {"--run-dir": "run", "--data": small_data, "--resume": "auto", option: name}
    code, err = call(*(part for pair in paths.items() for part in pair), *SMALL)
    assert_one_line(code, err, name.split("/")[0].replace("\0", "?"), message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--data", "--run-dir", "--resume"])
def test_a_folder_that_one_may_not_enter(
    option: str, stopped: Path, call: Call, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may enter any: the system's answer is planted."""
    locked = {"--data": small_data, "--run-dir": stopped, "--resume": stopped}[option]

    def refusing(plain: Callable[..., object]) -> Callable[..., object]:
        def call(path: object = ".", *rest: object, **more: object) -> object:
            if not isinstance(path, int) and Path(os.fsdecode(path)).is_relative_to(locked):
                raise PermissionError(13, "Permission denied", str(path))
            return plain(path, *rest, **more)

        return call

    for name in ("stat", "open", "listdir", "scandir", "mkdir"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    paths = {"--run-dir": stopped, "--data": small_data, "--resume": "auto", option: locked}
    code, err = call(*(part for pair in paths.items() for part in pair), *SMALL)
    assert_one_line(code, err, locked, "Permission denied", "permissions are missing")


def test_a_home_folder(call: Call, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert call("--run-dir=~/run", "--data=~/data", *SMALL, "--max-steps", 2)[0] == 0
    assert call("--run-dir=~/other", "--data=~/data", *SMALL, "--resume=~/run")[0] == 0
    assert not (tmp_path / "~").exists()
    assert summary(tmp_path / "other")["finished"]


def test_a_run_s_folder_that_is_removed(small_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code = at(0, 2, f"__import__('shutil').rmtree({str(folder)!r})")
    done = run("-c", code, "--run-dir", folder, "--data", small_data, *SMALL, "--log-every", 1, check=False)
    assert_one_line(done.returncode, done.stderr, folder / "metrics.jsonl", f"its folder {folder} is gone")
    assert "checkpoint" not in done.stderr


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EROFS", "EIO", "ESTALE", "EACCES"])
def test_a_line_that_cannot_be_logged(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = getattr(errno, code)

    def refuse(path: Path, data: bytes) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("distrib.run.folder.append", refuse)
    with pytest.raises(UserError) as caught:
        Run(tmp_path).log({"step": 1})
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'metrics.jsonl'}: cannot be written ({os.strerror(number)}): ")
    assert files.REMEDIES[number] in text
    assert text.endswith("run again with the same --run-dir to resume")
    assert "unharmed" not in text


def test_a_home_that_cannot_be_written(small_data: Path, tmp_path: Path) -> None:
    env = {"HOME": "/proc/nope", "TMPDIR": str(tmp_path)}
    options = ("--run-dir", tmp_path / "run", "--data", small_data, *SMALL[:-2])
    run("-m", "distrib.train", *options, env=env)
    assert summary(tmp_path / "run")["finished"]


def planted_folder(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)


PLANTED: dict[str, Callable[[Path], object]] = {
    "a link": lambda path: path.symlink_to(path.parent),
    "a file": lambda path: path.touch(),
    "a folder for all": planted_folder,
}


@pytest.mark.parametrize("planted", ["nothing", *PLANTED])
def test_where_cupy_s_cache_goes(planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / f"cupy-{os.getuid()}"
    if planted != "nothing":
        PLANTED[planted](own)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("CUPY_CACHE_DIR", "/proc/nope/cache")
    place_cupy_cache()
    chosen = Path(os.environ["CUPY_CACHE_DIR"])
    assert (chosen == own) == (planted == "nothing")
    assert chosen.parent == tmp_path
    assert stat.S_ISDIR(chosen.lstat().st_mode)
    assert chosen.lstat().st_mode & 0o777 == 0o700
    place_cupy_cache()
    assert Path(os.environ["CUPY_CACHE_DIR"]) == chosen
