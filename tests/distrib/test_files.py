"""Files that somebody else wrote or planted: bounded reading, and writing that follows no link."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from distrib import files
from distrib.errors import UserError
from distrib.run import checkpoint


def test_a_planted_temporary_is_never_written_through(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "result.json"
    victim.write_text("precious")
    files.temporary(path).symlink_to(victim)
    files.write_atomically(path, b"new")
    assert (victim.read_text(), path.read_text()) == ("precious", "new")
    assert not path.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["result.json", "victim"]


def test_a_temporary_planted_while_it_is_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the removal of a leftover and the opening of the new one."""
    victim, path = tmp_path / "victim", tmp_path / "result.json"
    victim.write_text("precious")
    plain = Path.unlink

    def planted(self: Path, missing_ok: bool = False) -> None:
        plain(self, missing_ok)
        if not self.is_symlink():
            self.symlink_to(victim)

    monkeypatch.setattr(Path, "unlink", planted)
    with pytest.raises(UserError, match=r"result\.json: cannot be written .*something else is in its place"):
        files.write_atomically(path, b"new")
    assert victim.read_text() == "precious"
    assert not path.exists()


def test_a_link_at_the_name_itself_is_replaced(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "result.json"
    victim.write_text("precious")
    path.symlink_to(victim)
    files.write_atomically(path, b"new")
    assert (victim.read_text(), path.read_text(), path.is_symlink()) == ("precious", "new", False)


def test_a_linked_folder_is_a_person_s_own_affair(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    files.write_atomically(tmp_path / "link" / "a", b"x")
    files.append(tmp_path / "link" / "a", b"y")
    assert (tmp_path / "real" / "a").read_bytes() == b"xy"


def test_create_and_append_follow_no_link(tmp_path: Path) -> None:
    victim, link = tmp_path / "victim", tmp_path / "link"
    link.symlink_to(victim)
    for write in (files.create, files.append):
        with pytest.raises(OSError):
            write(link, b"x")
        assert not victim.exists()
    files.create(tmp_path / "new", b"x")
    with pytest.raises(FileExistsError):
        files.create(tmp_path / "new", b"y")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError):
        files.append(tmp_path / "fifo", b"x")


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_the_mask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        files.write_atomically(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~mask


def test_the_old_name_is_still_importable() -> None:
    assert checkpoint.write_atomically is files.write_atomically


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda _: None, "No such file"),
    "folder": (lambda p: p.mkdir(), "not a regular file|Is a directory"),
    "FIFO": (lambda p: os.mkfifo(p), "not a regular file"),
    "device": (lambda p: p.symlink_to("/dev/zero"), "not a regular file"),
    "loop": (lambda p: p.symlink_to(p), "symbolic links"),
    "empty": (lambda p: p.write_bytes(b""), "Expecting value"),
    "list": (lambda p: p.write_text("[1]"), "no JSON object"),
    "deep": (lambda p: p.write_text('{"a":' * 100_000 + "1" + "}" * 100_000), "nested too deep"),
    "deep list": (lambda p: p.write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"), "nested too deep"),
    "bytes": (lambda p: p.write_bytes(b'{"a": "\xff\xfe"}'), "codec can't decode"),
    "digits": (lambda p: p.write_text(f'{{"a": {"9" * 10_000}}}'), "limit"),
    "large": (lambda p: (p.touch(), os.truncate(p, 1 << 40)), "larger than 16777216 bytes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_json_of_somebody_else(case: str, tmp_path: Path) -> None:
    make, message = WRONG[case]
    path = tmp_path / "config.json"
    make(path)
    with pytest.raises(UserError, match=message) as caught:
        files.read_json(path, remedy="leave it out")
    text = str(caught.value)
    assert text.startswith(f"{path}: cannot be read")
    assert text.endswith(": leave it out")
    assert "\n" not in text


def test_json_that_is_well(tmp_path: Path) -> None:
    value = {"a": [1, {"ü": None}], "b": 1e300}
    (tmp_path / "real").write_text(json.dumps(value), encoding="utf-8")
    (tmp_path / "link").symlink_to("real")
    assert files.read_json(tmp_path / "link", most=(tmp_path / "real").stat().st_size) == value


@pytest.mark.parametrize(
    "code", ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "ENAMETOOLONG", "EIO", "ESTALE", "ENOENT", "EFBIG"]
)
def test_each_refusal_has_its_own_remedy(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = getattr(errno, code)

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refuse)
    path = tmp_path / "a"
    with pytest.raises(UserError) as caught:
        files.write_atomically(path, b"x", ", then run again")
    text = str(caught.value)
    remedy = files.REMEDIES[number]
    assert text.startswith(f"{path}: cannot be written ({os.strerror(number)}): {remedy}")
    assert text.endswith(", then run again") == (code != "ENOENT")
    assert not list(tmp_path.iterdir())


def test_a_name_with_a_nul() -> None:
    with pytest.raises(UserError, match=r"cannot be written .*null.*give another name"):
        files.write_atomically(Path("a\0b"), b"x")


def test_printable() -> None:
    assert files.printable("Zürich 5 µs") == "Zürich 5 µs"
    assert files.printable("a\x1b[2J\nb\u202e\ud800") == "a?[2J?b??"
    assert files.printable("x" * 30, 10) == "x" * 9 + "…"
    assert len(files.printable("\x1b" * 10_000_000)) == 500


@pytest.mark.parametrize(
    "value", [None, True, "1", [], {}, float("nan"), float("inf"), 10**400, -(10**400), "9" * 9]
)
def test_no_number(value: object) -> None:
    assert files.number(value) is None


@pytest.mark.parametrize("value", [0, -3, 1.5, 10**300])
def test_a_number(value: float) -> None:
    assert files.number(value) == value
