"""Checks exercise 5: plans of survivors, and a process that is killed in the middle of a save."""

import os
import resource
import signal
import sys

import exercise5
import pytest

OLD, NEW = b"old" * 1000, b"new" * 2000


@pytest.mark.parametrize("steps", [{0: 4}, {0: 7, 2: 8}, {1: 3, 2: 3, 3: 2}, {3: 9, 1: 9}], ids=str)
@pytest.mark.parametrize("count", [2, 12, 13])
def test_survivors_share_the_batch_anew(steps, count):
    source, shares = exercise5.plan(dict(steps), count)
    assert source == min(rank for rank in steps if steps[rank] == max(steps.values()))
    assert sorted(shares) == sorted(steps), "each survivor has a share"
    images = [image for rank in sorted(shares) for image in range(count)[shares[rank]]]
    assert images == list(range(count)), "each image counts once, by rank"
    lengths = [len(range(count)[share]) for share in shares.values()]
    assert max(lengths) - min(lengths) <= 1


def saving(path, prepare):
    """Save in a process of its own; returns the signal that killed it, or 0."""
    path.write_bytes(OLD)
    child = os.fork()
    if child == 0:
        try:
            prepare()
            exercise5.save(path, NEW)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_save_that_ends_wrote_all(tmp_path):
    path = tmp_path / "checkpoint"
    assert saving(path, lambda: None) == 0, "save raised an error"
    assert path.read_bytes() == NEW
    assert os.listdir(tmp_path) == ["checkpoint"], "nothing else is left"


@pytest.mark.parametrize("written", [0, 1, len(NEW) - 1])
def test_killed_after_some_bytes(tmp_path, written):
    def prepare():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel kills who writes more than `written` bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (written, written))

    path = tmp_path / "checkpoint"
    assert saving(path, prepare) == -signal.SIGXFSZ
    assert path.read_bytes() == OLD, "the old file is damaged"


@pytest.mark.parametrize("event", ["os.rename", "os.remove"])
def test_killed_before_a_file_is_renamed_or_removed(tmp_path, event):
    def prepare():
        sys.addaudithook(lambda name, _: name == event and os.kill(os.getpid(), signal.SIGKILL))

    path = tmp_path / "checkpoint"
    killed = saving(path, prepare)
    assert killed in (0, -signal.SIGKILL), "save raised an error"
    assert path.exists(), "neither the old file nor the new one is there"
    assert path.read_bytes() == (OLD if killed else NEW)
