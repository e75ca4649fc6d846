"""Checks exercise 3 on timelines that were drawn by hand."""

import exercise3
import numpy as np
import pytest

BACKWARD = (100, 200)


@pytest.mark.parametrize(
    ("buckets", "share"),
    [
        ([(200, 300)], 0),  # all after the backward: nothing is hidden
        ([(120, 180)], 1),
        ([(150, 250)], 0.5),
        ([(120, 140), (150, 180), (200, 250)], 0.5),
        ([(180, 220), (120, 140)], 40 / 60),  # in any order
        ([(120, 160), (140, 180)], 1),  # two at once count once
        ([(110, 190), (120, 130), (190, 240)], 90 / 130),
        ([], 1),
    ],
)
def test_the_share_of_a_drawn_timeline(buckets, share):
    assert exercise3.hidden(BACKWARD, buckets) == pytest.approx(share)


def test_the_share_of_many_timelines():
    rng = np.random.default_rng(5)
    for _ in range(20):
        buckets = [(int(b), int(b + d)) for b, d in zip(rng.integers(100, 220, 5), rng.integers(1, 60, 5))]
        busy = {moment for begin, end in buckets for moment in range(begin, end)}
        share = len([moment for moment in busy if moment < BACKWARD[1]]) / len(busy)
        assert exercise3.hidden(BACKWARD, list(buckets)) == pytest.approx(share), buckets
