"""Buffers: who shares them, when they move, and when a list of calls is made anew."""

from __future__ import annotations

import numpy as np
import pytest

from nn.workspace import RING, SLAB, Workspace

pytestmark = pytest.mark.quick


def test_the_same_request_gets_the_same_object() -> None:
    ws = Workspace()
    a = ws.scratch("a", (2, 3))
    assert ws.scratch("a", (2, 3)) is a
    assert ws.image("b", (2, 3, 4, 5)) is ws.image("b", (2, 3, 4, 5))
    assert not np.shares_memory(ws.scope("x").keep("a", (2, 3)), a)


def test_smaller_requests_are_parts_of_the_same_buffer() -> None:
    ws = Workspace()
    large, small = ws.scratch("a", (4, 5)), ws.scratch("a", (3, 2))
    large[...] = np.arange(20).reshape(4, 5)
    assert np.array_equal(small.ravel(), np.arange(6))
    held = ws.nbytes()
    assert np.shares_memory(ws.scratch("a", (20,)), large)
    assert ws.nbytes() == held


def test_a_buffer_that_grows_or_changes_type_is_another() -> None:
    ws = Workspace()
    old = ws.image("a", (1, 2, 2, 3))
    grown = ws.image("a", (2, 2, 2, 3))
    assert not np.shares_memory(old, grown)
    again = ws.image("a", (1, 2, 2, 3))
    assert again is not old, "a view of the old buffer would be another buffer's memory"
    assert np.shares_memory(again, grown)
    assert ws.scratch("a", (1, 2, 2, 3), "bool").dtype == bool


def test_buffers_do_not_overlap() -> None:
    """Small ones cut from slabs, and ones too large for that."""
    ws, rng = Workspace(dtype="float64"), np.random.default_rng(0)
    sizes = [*rng.integers(1, 5000, 400).tolist(), SLAB // 16, SLAB // 8, 7]
    made = [ws.scratch(str(i), (size,)) for i, size in enumerate(sizes)]
    for i, buffer in enumerate(made):
        buffer.fill(i)
    for i, buffer in enumerate(made):
        assert (buffer == i).all()
        assert buffer.ctypes.data % 64 == 0 or buffer.nbytes >= SLAB // 2


def test_the_ring_begins_anew_with_each_pass() -> None:
    ws = Workspace()
    ws.rewind()
    first = [ws.ring((1, 2, 2, 1)) for _ in range(RING)]
    assert len({id(buffer) for buffer in first}) == RING
    ws.rewind()
    assert ws.ring((1, 2, 2, 1)) is first[0]


def test_replay_makes_its_list_once_for_the_same_arrays() -> None:
    ws, built = Workspace(), []

    def build(x: np.ndarray):
        built.append(x)
        return [lambda: x.__iadd__(1)], "result"

    a, b = np.zeros(2), np.zeros(2)
    for _ in range(3):
        assert ws.replay("plan", (a,), lambda: build(a)) == "result"
    assert (len(built), a[0]) == (1, 3)
    ws.replay("plan", (b,), lambda: build(b))
    assert (len(built), b[0]) == (2, 1)
    ws.scratch("new", (3,))  # a buffer moved: lists may hold the old one
    ws.replay("plan", (b,), lambda: build(b))
    assert (len(built), b[0]) == (3, 2)
    ws.scope("other").replay("plan", (b,), lambda: build(b))
    assert len(built) == 4
