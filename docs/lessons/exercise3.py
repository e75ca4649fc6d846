"""Exercise 3: how much of the communication does the backward hide?

python -m pytest docs/lessons/check3.py
"""


def hidden(backward, buckets):
    """Of the time in which at least one bucket is under way, the share that lies within the backward.

    `backward` is (begin, end), `buckets` a list of such pairs, in any order, in microseconds. Buckets may be
    under way at the same time: such a moment counts once. Without a bucket the share is 1.
    """
    raise NotImplementedError(
        "write the share: join the buckets that overlap, then cut them with the backward"
    )
