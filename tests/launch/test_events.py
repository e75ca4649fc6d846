"""TensorBoard's files, read back by TensorBoard's own reader."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import at, metrics, run, train
from test_resume import BASE, OPTIMIZERS

from distrib.run import events

pytestmark = pytest.mark.filterwarnings("ignore")  # TensorBoard's own imports
OPTIONS = (*BASE, *OPTIMIZERS["adam"])


class Reader:
    """TensorBoard's own reader of a folder, as with --load_fast false; it may stay open over a resume."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.backend.event_processing import plugin_event_accumulator

        everything = {plugin_event_accumulator.TENSORS: 0}
        self._events = plugin_event_accumulator.EventAccumulator(str(folder), everything)

    def read(self) -> dict[tuple[str, int], tuple[float, float]]:
        """(tag, step) → (time, value), as it would be drawn."""
        self._events.Reload()
        found = {}
        for tag in self._events.Tags()["tensors"]:
            for event in self._events.Tensors(tag):
                assert (tag, event.step) not in found, "said twice"
                found[tag, event.step] = event.wall_time, event.tensor_proto.float_val[0]
        return found


def read(folder: Path) -> dict[tuple[str, int], tuple[float, float]]:
    return Reader(folder).read()


def expected(folder: Path) -> dict[tuple[str, int], tuple[float, float]]:
    return {
        (f"{'train' if 'loss' in line else 'epoch'}/{name}", line["step"]): (
            line["time"],
            pytest.approx(value, rel=1e-6),
        )
        for line in metrics(folder)
        for name, value in line.items()
        if name not in ("time", "step")
    }


@pytest.mark.needs("tensorboard")
def test_events_say_what_the_metrics_say_after_resumes_too(tmp_path: Path) -> None:
    for step in (3, 8, 14):
        train(tmp_path / "run", *OPTIONS, "--max-steps", step, ranks=1 + step % 2)
    found = read(tmp_path / "run")
    assert found == expected(tmp_path / "run")
    assert ("epoch/test_accuracy", 14) in found
    assert ("train/lr", 2) in found


@pytest.mark.needs("tensorboard")
def test_a_tensorboard_that_is_open_follows_a_resume(tmp_path: Path) -> None:
    """Of a run that was killed at step 12 and whose newest checkpoint is that of step 7."""
    folder = tmp_path / "run"
    killed = at(0, 12, "os.kill(os.getpid(), signal.SIGKILL)")
    options = ("--run-dir", folder, *OPTIONS, "--log-every", 1)
    assert run("-c", killed, *options, check=False).returncode == -signal.SIGKILL
    reader = Reader(folder)
    before = reader.read()
    assert before == expected(folder)
    assert max(step for _, step in before) == 12
    first = sorted(folder.glob("events*"))
    train(folder, *OPTIONS, "--log-every", 1, "--max-steps", 9)
    assert set(first) < set(folder.glob("events*")), "an open file was removed"
    after = reader.read()
    assert max(step for _, step in after) == 9, "what came after the checkpoint is void"
    assert after == read(folder) == expected(folder)
    train(folder, *OPTIONS, "--log-every", 1)
    assert reader.read() == read(folder) == expected(folder)


@pytest.mark.needs("tensorboard")
def test_a_file_torn_by_a_kill_is_passed_over(tmp_path: Path) -> None:
    lines = [{"time": float(step), "step": step, "loss": step / 4} for step in range(1, 6)]
    first = events.head(1.0) + events.start(1.0, 1) + b"".join(map(events.scalars, lines))
    (tmp_path / "events.out.tfevents.0000000001.a").write_bytes(first[:-7])
    reader = Reader(tmp_path)
    assert [step for _, step in reader.read()] == [1, 2, 3, 4]
    second = events.head(9.0) + events.start(9.0, 3) + events.scalars(lines[2])
    (tmp_path / "events.out.tfevents.0000000002.a").write_bytes(second)
    assert [step for _, step in reader.read()] == [1, 2, 3]
    assert read(tmp_path) == reader.read()


@pytest.mark.needs("tensorboard")
def test_a_new_start_voids_all(tmp_path: Path) -> None:
    line = {"time": 1.0, "step": 1, "loss": 1.0}
    for number, loss in ((1, 1.0), (2, 2.0)):
        data = events.head(1.0) + events.start(1.0, 1) + events.scalars({**line, "loss": loss})
        (tmp_path / f"events.out.tfevents.000000000{number}.a").write_bytes(data)
    assert read(tmp_path) == {("train/loss", 1): (1.0, 2.0)}


def test_names_ascend_whatever_the_clock_says(tmp_path: Path) -> None:
    names = []
    for now, host in ((1700000000.9, "b"), (1700000000.95, "a"), (1600000000.0, "a"), (1700000009.0, "a")):
        names.append(events.name(tmp_path, host, now))
        (tmp_path / names[-1]).touch()
    assert names == sorted(set(names))
    assert names[0] == "events.out.tfevents.1700000000.b"
    (tmp_path / "events.out.tfevents.oddity").touch()
    assert events.name(tmp_path, "a", 0.0) > names[-1]
    for _ in range(3):  # planted: no clock says so; each start has a new name all the same
        (tmp_path / "events.out.tfevents.9999999999.x").touch()
        path = tmp_path / events.name(tmp_path, "a", 0.0)
        assert not path.exists()
        path.touch()


def test_the_check_value_of_crc32c() -> None:
    crc = (events.masked_crc(b"123456789") - 0xA282EAD8) & 0xFFFFFFFF
    assert (
        crc << 15 | crc >> 17
    ) & 0xFFFFFFFF == 0xE3069283  # RFC 3720, appendix B.4, of the same polynomial


@pytest.mark.needs("tensorboard")
def test_a_loss_beyond_float32_is_infinite(tmp_path: Path) -> None:
    path = tmp_path / "events.out.tfevents.0000000001.here"
    path.write_bytes(events.head(1.0) + events.scalars({"time": 1.0, "step": 1, "loss": -1e300}))
    assert read(tmp_path) == {("train/loss", 1): (1.0, -np.inf)}


@pytest.mark.needs("tensorboard")
def test_null_is_left_out_and_large_steps_fit(tmp_path: Path) -> None:
    path = tmp_path / "events.out.tfevents.0000000001.here"
    line = {"time": 1.5, "step": 1 << 40, "loss": float(np.float32(0.1)), "compute_seconds": None}
    path.write_bytes(events.head(1.0) + events.scalars(line))
    assert read(tmp_path) == {("train/loss", 1 << 40): (1.5, line["loss"])}
