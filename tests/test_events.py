"""TensorBoard's files, read back by TensorBoard's own reader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import metrics, train
from test_resume import BASE, OPTIMIZERS

from distrib import events

OPTIONS = (*BASE, *OPTIMIZERS["adam"])


def read(folder: Path) -> dict[tuple[str, int], tuple[float, float]]:
    """(tag, step) → (time, value) of all event files in a folder, in the order in which TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    found = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        first, *rest = LegacyEventFileLoader(str(path)).Load()
        assert first.file_version == "brain.Event:2"
        for event in rest:
            for value in event.summary.value:
                assert (value.tag, event.step) not in found, "said twice"
                found[value.tag, event.step] = event.wall_time, value.simple_value
    return found


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
@pytest.mark.filterwarnings("ignore")  # TensorBoard's own imports
def test_events_say_what_the_metrics_say_after_resumes_too(tmp_path: Path) -> None:
    for step in (3, 8, 14):
        train(tmp_path / "run", *OPTIONS, "--max-steps", step, ranks=1 + step % 2)
    found = read(tmp_path / "run")
    assert found == expected(tmp_path / "run")
    assert ("epoch/test_accuracy", 14) in found
    assert ("train/lr", 2) in found
    times = [time for time, _ in found.values()]
    assert times == sorted(times)


def test_the_check_value_of_crc32c() -> None:
    crc = (events.masked_crc(b"123456789") - 0xA282EAD8) & 0xFFFFFFFF
    assert (
        crc << 15 | crc >> 17
    ) & 0xFFFFFFFF == 0xE3069283  # RFC 3720, appendix B.4, of the same polynomial


@pytest.mark.needs("tensorboard")
def test_a_loss_beyond_float32_is_infinite(tmp_path: Path) -> None:
    path = tmp_path / "events.out.tfevents.1.here"
    path.write_bytes(events.head(1.0) + events.scalars({"time": 1.0, "step": 1, "loss": -1e300}))
    assert read(tmp_path) == {("train/loss", 1): (1.0, -np.inf)}


@pytest.mark.needs("tensorboard")
def test_null_is_left_out_and_large_steps_fit(tmp_path: Path) -> None:
    path = tmp_path / "events.out.tfevents.1.here"
    line = {"time": 1.5, "step": 1 << 40, "loss": float(np.float32(0.1)), "compute_seconds": None}
    path.write_bytes(events.head(1.0) + events.scalars(line))
    assert read(tmp_path) == {("train/loss", 1 << 40): (1.5, line["loss"])}
