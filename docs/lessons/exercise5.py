"""Exercise 5: what survivors agree on, and a file that is whole or absent.

python -m pytest docs/lessons/check5.py
"""


def plan(steps, count):
    """After a death: (the rank whose state counts, {rank: slice of the next batch}).

    `steps` is {rank: whole steps that it has done} of the survivors, by their ranks at the start, such as
    {0: 7, 2: 8}. Who has come furthest has the state that counts; of several, the one of the lowest rank. The
    next batch has `count` images. Each is in one slice, the slices follow each other by rank, and their
    lengths differ by one at most.
    """
    raise NotImplementedError("write the plan")


def save(path, data):
    """Write bytes to `path`, a pathlib.Path.

    A process that is killed at any moment leaves the whole old file there, or the whole new one.
    """
    raise NotImplementedError("write the file under another name first")
