"""Checks exercise 4 on 1 to 8 ranks, which are threads here."""

from functools import partial

import exercise4
import numpy as np
import pytest
from ranks import on_ranks


@pytest.mark.parametrize("parts", [[12], [6, 6], [7, 5], [10, 1, 1]], ids=str)
@pytest.mark.parametrize("mean", [0, 3000])
def test_moments_are_those_of_all_numbers(parts, mean):
    numbers = np.random.default_rng(6).normal(mean, 0.001 if mean else 1, sum(parts)).astype(np.float32)
    starts = np.cumsum([0, *parts])
    wide = numbers.astype(np.float64)

    def work(comm):
        return exercise4.moments(numbers[starts[comm.rank] : starts[comm.rank + 1]], comm)

    for found, _ in on_ranks(len(parts), work):
        np.testing.assert_allclose(found, (wide.mean(), wide.var()), rtol=1e-9, atol=1e-12)


def test_the_bits_of_a_sum_do_not_depend_on_the_ranks():
    shards = np.random.default_rng(7).normal(size=(8, 1000)).astype(np.float32)
    bits = set()
    for size in (1, 2, 4, 8):
        parts = shards.reshape(size, 8 // size, 1000)
        work = partial(lambda parts, comm: exercise4.sum_of_shards(parts[comm.rank].copy(), comm), parts)
        for total, _ in on_ranks(size, work):
            assert total.dtype == np.float32
            np.testing.assert_allclose(total, shards.sum(0, dtype=np.float64), atol=1e-5)
            bits.add(total.tobytes())
    assert len(bits) == 1, f"{len(bits)} different results: the order of the sum depends on the ranks"
