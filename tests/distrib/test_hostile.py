"""Files of a run's folder that a stranger wrote: each is refused in a line, no planted link is followed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import test_bad_input
from safetensors.numpy import save
from test_bad_input import SMALL, assert_one_line, newest, snapshot

from distrib.errors import UserError
from distrib.run import checkpoint as ckpt
from distrib.run.folder import Run
from distrib.state import Progress

Call = Callable[..., tuple[int, str]]
call, stopped = test_bad_input.call, test_bad_input.stopped


def forge(path: Path, change: Callable[[ckpt.Checkpoint], object]) -> None:
    """Rewrite both files of a checkpoint after `change`, with the right checksums, as anybody can."""
    found = ckpt.load_checkpoint(path)
    change(found)
    about, position = json.dumps(found.model_spec), json.dumps(found.position)
    model = save(found.model, {"about": about, "checksum": ckpt._checksum(found.model, about)})
    sha = hashlib.sha256(model).hexdigest()
    checksum = ckpt._checksum(found.optimizer, position + sha)
    state = save(found.optimizer, {"position": position, "model_sha256": sha, "checksum": checksum})
    path.write_bytes(model)
    ckpt.state_path(path).write_bytes(state)


def nested(depth: int = 100_000) -> str:
    return "[" * depth + "]" * depth


def misshapen(found: ckpt.Checkpoint) -> None:
    name = next(name for name in found.optimizer if name.endswith("/fc.weight"))
    found.optimizer[name] = np.ones((1, 1), np.float32)


FORGED: dict[str, tuple[Callable[[ckpt.Checkpoint], object], str]] = {
    "nan weight": (lambda c: c.model["fc.weight"].fill(np.nan), "tensor fc.weight is not finite"),
    "inf moment": (
        lambda c: c.optimizer["m/fc.bias"].__setitem__(2, np.inf),
        "tensor m/fc.bias is not finite",
    ),
    "moment of another shape": (misshapen, "/fc.weight does not fit the model"),
    "moment of nothing": (lambda c: c.optimizer.update(x=np.ones(1)), "tensor x does not fit the model"),
    "width of terabytes": (
        lambda c: c.model_spec.update(width=64.0),
        "does not hold the model that it describes",
    ),
    "width without bounds": (
        lambda c: c.model_spec.update(width=1e300),
        "does not hold the model that it describes",
    ),
    "width below 0": (lambda c: c.model_spec.update(width=-1), "does not hold the model that it describes"),
    "width as text": (lambda c: c.model_spec.update(width="wide"), "has width wide, not float"),
    "a strange variant": (lambda c: c.model_spec.update(variant="\x1b[2J"), "has variant ?[2J"),
    "variant as a list": (lambda c: c.model_spec.update(variant=["x"]), "has variant ['x'], not str"),
    "a strange type": (lambda c: c.model_spec.update(dtype="object"), "has dtype object"),
    "step as text": (lambda c: c.position.update(step="1"), "has step 1, not int"),
    "step below 0": (lambda c: c.position.update(step=-5), "its position has step -5"),
    "step without bounds": (lambda c: c.position.update(step=10**40), "has step 1000000"),
    "step is true": (lambda c: c.position.update(step=True), "has step True, not int"),
    "loss as null": (lambda c: c.position.update(loss_sum=None), "has loss_sum None, not float"),
    "loss not finite": (lambda c: c.position.update(loss_sum=float("nan")), "has loss_sum nan, not float"),
    "images of text": (lambda c: c.position.update(images_per_rank=[1, "2"]), "has images_per_rank [1, '2']"),
    "config as a list": (lambda c: c.position.update(config=[]), "has config [], not dict"),
    "environment nested": (lambda c: c.position.update(environment={"a": {}}), "has environment {'a': {}}"),
    "last epoch of text": (lambda c: c.position.update(last_epoch={"train_loss": "x"}), "has last_epoch"),
    "much text": (lambda c: c.position.update(step="x" * 10_000_000), "has step xxx"),
    "nothing": (lambda c: c.position.clear(), "its position lacks config, correct, data"),
    "no moments": (lambda c: c.optimizer.clear(), "does not fit this run"),
    "something new": (lambda c: c.position.update(later=1), "has an unknown later"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_checkpoint(case: str, stopped: Path, call: Call, small_data: Path) -> None:
    """Checksums that are right say nothing of who wrote them."""
    change, message = FORGED[case]
    forge(newest(stopped), change)
    before = snapshot(stopped)
    options = ("--run-dir", stopped, "--data", small_data, *SMALL, "--resume", newest(stopped))
    code, err = call(*options)
    assert_one_line(code, err, message, "use a")
    assert len(err) < 1000
    assert err.strip().isprintable()
    assert snapshot(stopped) == before


@pytest.mark.parametrize("part", ["about", "position"])
@pytest.mark.parametrize("text", [nested(), '{"a":' * 9999 + "1" + "}" * 9999, "[1]", "{", "☃", "9" * 9999])
def test_metadata_that_is_no_object(part: str, text: str, stopped: Path) -> None:
    path = newest(stopped)
    found = ckpt.load_checkpoint(path)
    about, position = json.dumps(found.model_spec), json.dumps(found.position)
    about, position = (text, position) if part == "about" else (about, text)
    model = save(found.model, {"about": about, "checksum": ckpt._checksum(found.model, about)})
    sha = hashlib.sha256(model).hexdigest()
    checksum = ckpt._checksum(found.optimizer, position + sha)
    path.write_bytes(model)
    state = save(found.optimizer, {"position": position, "model_sha256": sha, "checksum": checksum})
    ckpt.state_path(path).write_bytes(state)
    with pytest.raises(UserError, match=r"its (description|position) cannot be read .*: use another"):
        ckpt.load_checkpoint(path)


def test_the_table_of_positions_is_the_trainer_s() -> None:
    beside = {"optimizer_steps", "world_size", "environment", "config", "data"}
    assert ckpt.POSITION_TYPES.keys() == {each.name for each in fields(Progress)} | beside


HOSTILE = {
    "deep": '{"a": ' * 100_000 + "1" + "}" * 100_000,
    "deep list": nested(),
    "list": "[]",
    "bytes": "\udcff",
    "open": '{"epochs": ',
    "text": '{"epochs": "many", "finished": true, "about": {}, "plans": 3}',
    "null": '{"epochs": null, "finished": true}',
    "nan": '{"lr": NaN}',
}


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_a_hostile_file_in_the_folder(
    name: str, text: str, stopped: Path, call: Call, small_data: Path
) -> None:
    (stopped / name).write_bytes(HOSTILE[text].encode(errors="surrogateescape"))
    code, err = call("--run-dir", stopped, "--data", small_data, *SMALL)
    if name == "summary.json" and text in ("text", "null", "nan"):  # "finished" alone is read of it
        assert code in (0, 2), err
    else:
        assert_one_line(code, err, stopped / name, "restore the file")


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
@pytest.mark.parametrize("kind", ["huge", "FIFO", "folder", "device"])
def test_what_is_no_small_file(name: str, kind: str, stopped: Path, call: Call, small_data: Path) -> None:
    path = stopped / name
    path.unlink()
    if kind == "huge":
        path.touch()
        os.truncate(path, 1 << 40)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(path) if kind == "FIFO" else path.mkdir()
    code, err = call("--run-dir", stopped, "--data", small_data, *SMALL)
    assert_one_line(code, err, path, "restore the file")


@pytest.mark.parametrize("plans", [3, None, {"a": 1}, ["x"]])
def test_plans_that_are_none(plans: object, tmp_path: Path) -> None:
    run = Run(tmp_path)
    (tmp_path / "plans.json").write_text(json.dumps({"about": {"gpu": "x"}, "plans": plans}))
    assert run.plans({"gpu": "y"}) == {}
    with pytest.raises(UserError, match=r"plans\.json: holds no plans: remove the file"):
        run.plans({"gpu": "x"})


def test_hostile_metrics_are_dropped(stopped: Path, call: Call, small_data: Path) -> None:
    path = stopped / "metrics.jsonl"
    good = b'{"time": 1.0, "step": 1, "epoch": 1, "lr": 0.001, "loss": 2.5, "accuracy": 10.0}\n'
    bad = (nested(), '{"step": "1"}', '{"step": null}', '{"step": true}', '{"step": NaN}', "[1]", "\0", "3")
    huge = b'{"step": 1, "x": "' + b"x" * 3_000_000 + b'"}'
    path.write_bytes(b"\n".join([*(line.encode() for line in bad), huge, b'{"step": 1e400}', good]))
    assert call("--run-dir", stopped, "--data", small_data, *SMALL)[0] == 0
    assert path.read_bytes().startswith(good)
    assert all(len(line) < 1000 for line in path.read_bytes().splitlines())


@pytest.mark.parametrize("kind", ["FIFO", "folder", "device"])
def test_metrics_that_are_no_file(kind: str, stopped: Path, call: Call, small_data: Path) -> None:
    path = stopped / "metrics.jsonl"
    if kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(path) if kind == "FIFO" else path.mkdir()
    code, err = call("--run-dir", stopped, "--data", small_data, *SMALL)
    assert_one_line(code, err, path, "remove it")


LINKS = (
    ".config.json.tmp",
    ".metrics.jsonl.tmp",
    ".summary.json.tmp",
    ".logits.safetensors.tmp",
    "checkpoints/.step-00000004.safetensors.tmp",
    "checkpoints/.step-00000004.state.safetensors.tmp",
    "metrics.jsonl",
    "config.json",
    "logits.safetensors",
    "failure.json",
)


@pytest.mark.parametrize("name", LINKS)
def test_a_planted_link_is_not_written_through(
    name: str, call: Call, small_data: Path, tmp_path: Path
) -> None:
    folder, victim, dangling = tmp_path / "run", tmp_path / "victim", tmp_path / "new"
    for target in (victim, dangling):
        victim.write_text("{}")
        (folder / "checkpoints").mkdir(parents=True)
        (folder / name).symlink_to(target)
        if name == ".metrics.jsonl.tmp":
            (folder / "metrics.jsonl").touch()  # which is written anew
        code, err = call("--run-dir", folder, "--data", small_data, *SMALL)
        assert code == 0, err
        assert victim.read_text() == "{}"
        assert not dangling.exists()
        assert not any(path.is_symlink() for path in folder.rglob("*"))
        shutil.rmtree(folder)


def test_a_linked_lock_is_refused_and_linked_ranks_are_replaced(
    call: Call, small_data: Path, tmp_path: Path
) -> None:
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "ranks").symlink_to(elsewhere)
    (folder / "lock").symlink_to(tmp_path / "new")
    options = ("--run-dir", folder, "--data", small_data, *SMALL)
    assert_one_line(*call(*options), folder / "lock", "remove it")
    assert not (tmp_path / "new").exists()
    (folder / "lock").unlink()
    assert call(*options)[0] == 0
    assert not list(elsewhere.iterdir())


def test_a_person_s_own_links_go_on_working(call: Call, small_data: Path, tmp_path: Path) -> None:
    for name in ("real", "large"):
        (tmp_path / name).mkdir()
    (tmp_path / "run").symlink_to("real")
    (tmp_path / "data-link").symlink_to(small_data)
    (tmp_path / "real" / "checkpoints").symlink_to(tmp_path / "large")
    options = ("--run-dir", tmp_path / "run", "--data", tmp_path / "data-link", *SMALL)
    assert call(*options, "--max-steps", 2)[0] == 0
    assert call(*options)[0] == 0
    assert (tmp_path / "real" / "summary.json").is_file()
    assert ckpt.list_checkpoints(tmp_path / "large")
