"""Buffers: who shares them, when they move, and when a list of calls is made anew."""

from __future__ import annotations

import numpy as np
import pytest

from nn.buffers import SLAB, Buffers
from nn.device import Backend


def test_the_same_request_gets_the_same_object() -> None:
    buffers = Buffers()
    a = buffers.temporary("a", (2, 3))
    assert buffers.temporary("a", (2, 3)) is a
    assert buffers.image("b", (2, 3, 4, 5)) is buffers.image("b", (2, 3, 4, 5))
    assert not np.shares_memory(buffers.scope("x").persistent("a", (2, 3)), a)


def test_smaller_requests_are_parts_of_the_same_buffer() -> None:
    buffers = Buffers()
    large, small = buffers.temporary("a", (4, 5)), buffers.temporary("a", (3, 2))
    large[...] = np.arange(20).reshape(4, 5)
    assert np.array_equal(small.ravel(), np.arange(6))
    held = buffers.nbytes()
    assert np.shares_memory(buffers.temporary("a", (20,)), large)
    assert buffers.nbytes() == held


def test_a_buffer_that_grows_or_changes_type_is_another() -> None:
    buffers = Buffers()
    old = buffers.image("a", (1, 2, 2, 3))
    grown = buffers.image("a", (2, 2, 2, 3))
    assert not np.shares_memory(old, grown)
    again = buffers.image("a", (1, 2, 2, 3))
    assert again is not old, "a view of the old buffer would be another buffer's memory"
    assert np.shares_memory(again, grown)
    assert buffers.temporary("a", (1, 2, 2, 3), "bool").dtype == bool


def test_buffers_do_not_overlap() -> None:
    """Small ones cut from slabs, and ones too large for that."""
    buffers, rng = Buffers(dtype="float64"), np.random.default_rng(0)
    sizes = [*rng.integers(1, 5000, 400).tolist(), SLAB // 16, SLAB // 8, 7]
    made = [buffers.temporary(str(i), (size,)) for i, size in enumerate(sizes)]
    for i, buffer in enumerate(made):
        buffer.fill(i)
    for i, buffer in enumerate(made):
        assert (buffer == i).all()
        assert buffer.ctypes.data % 64 == 0 or buffer.nbytes >= SLAB // 2


def test_nobody_gets_what_somebody_holds() -> None:
    buffers, shape = Buffers(), (1, 2, 2, 1)
    a, b = buffers.activation(shape), buffers.activation(shape)
    assert not np.shares_memory(a, b)
    buffers.retain(a)
    buffers.release(a)
    c = buffers.activation(shape)
    assert not np.shares_memory(a, c)
    assert buffers.held() == 3
    buffers.release(a)
    assert buffers.activation(shape) is a, "the same request gets the same object"
    buffers.release(np.ones(3))  # not from the pool: nothing to do
    buffers.release(buffers.persistent("own", shape))
    assert buffers.held() == 3


def test_every_pass_gets_the_same_buffers() -> None:
    buffers, shapes = Buffers(), [(4, 2, 2, 3), (4, 1, 1, 9), (4, 2, 2, 3), (1, 2, 2, 3)]

    def a_pass() -> list[np.ndarray]:
        buffers.release_all()
        taken = [buffers.activation(shape) for shape in shapes]
        buffers.release(taken[1])
        return [*taken, buffers.activation((4, 2, 2, 2))]

    a_pass()
    first, generation = a_pass(), buffers.generation
    assert all(a is b for a, b in zip(first, a_pass(), strict=True))
    assert buffers.generation == generation


def test_what_is_released_is_spoiled() -> None:
    for dtype, spoiled in (("float32", np.nan), ("uint16", 0xFFFF)):
        buffers = Buffers(dtype=dtype, poison=True)
        x = buffers.activation((1, 2, 2, 1))
        x[...] = 1
        buffers.retain(x)
        buffers.release(x)
        assert (x == 1).all()
        buffers.release(x)
        np.testing.assert_array_equal(x, spoiled)
        assert not np.shares_memory(buffers.activation(x.shape), x)


def test_misuse_is_refused() -> None:
    buffers = Buffers()
    x = buffers.activation((1, 2, 2, 1))
    buffers.release(x)
    with pytest.raises(AssertionError, match="released twice"):
        buffers.release(x)
    with pytest.raises(AssertionError, match="retained after they were released"):
        buffers.retain(x)
    buffers.release_all()
    with pytest.raises(AssertionError, match="released twice"):
        buffers.release(x)


def test_a_device_keeps_no_pooled_input_by_reference() -> None:
    buffers = Buffers(Backend("device", np))
    own = buffers.output((1, 2, 2, 1))
    assert buffers.save(own) is own
    with pytest.raises(AssertionError, match="by reference"):
        buffers.save(buffers.activation((1, 2, 2, 1)))
    host = Buffers()
    x = host.activation((1, 2, 2, 1))
    assert not np.shares_memory(host.save(x), x)


def test_run_cached_makes_its_list_once_for_the_same_arrays() -> None:
    buffers, built = Buffers(), []

    def build(x: np.ndarray):
        built.append(x)
        return [lambda: x.__iadd__(1)], "result"

    a, b = np.zeros(2), np.zeros(2)
    for _ in range(3):
        assert buffers.run_cached("plan", (a,), lambda: build(a)) == "result"
    assert (len(built), a[0]) == (1, 3)
    buffers.run_cached("plan", (b,), lambda: build(b))
    assert (len(built), b[0]) == (2, 1)
    buffers.temporary("new", (3,))  # a buffer moved: lists may hold the old one
    buffers.run_cached("plan", (b,), lambda: build(b))
    assert (len(built), b[0]) == (3, 2)
    buffers.scope("other").run_cached("plan", (b,), lambda: build(b))
    assert len(built) == 4


def test_those_that_take_turns_share_temporaries_and_nothing_else() -> None:
    first = Buffers()
    second, shape = Buffers(turns_with=first), (1, 2, 2, 3)
    for name in ("temporary", "shared", "constant"):
        given = (np.ones(shape),) if name == "constant" else (shape,)
        made = [getattr(buffers.scope("layer"), name)(name, *given) for buffers in (first, second)]
        assert np.shares_memory(*made), name
    for name in ("persistent", "image"):
        assert not np.shares_memory(*(getattr(buffers, name)(name, shape) for buffers in (first, second)))
    taken = [buffers.activation(shape) for buffers in (first, second)]
    assert not np.shares_memory(*taken)
    assert first.held() == second.held() == 1
    first.release_all()
    assert second.held() == 1


def test_a_temporary_that_moves_voids_the_lists_of_all_that_take_turns() -> None:
    first = Buffers()
    second, x = Buffers(turns_with=first), np.zeros(2)

    def run() -> np.ndarray:
        return first.run_cached("plan", (x,), lambda: ([], first.temporary("a", (2,))))

    old, generation = run(), first.generation
    assert run() is old
    second.temporary("a", (20,))
    assert first.generation > generation
    assert not np.shares_memory(run(), old)


def test_what_follows_from_the_weights_is_made_once_a_step() -> None:
    first = Buffers()
    second, made = Buffers(turns_with=first), []

    def run() -> list[str]:
        made.clear()
        for number, buffers in enumerate((first, second)):
            for layer in "ab":
                buffers.scope(layer).once("u", lambda at=f"{layer}{number}": made.append(at))()
        return made

    assert run() == ["a0", "b0", "a1", "b1"], "without steps, the weights may change at any time"
    for _ in range(2):
        first.begin_step()
        assert run() == ["a0", "b0"]
    assert run() == []
