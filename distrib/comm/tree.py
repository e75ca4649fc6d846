"""Sums over virtual shards along one fixed tree, so that their bits do not depend on which rank has which.

The leaves are the shards' parts, numbered from 0. Neighbours are added pairwise, level by level: (0+1),
(2+3), then (0+1)+(2+3), and so on; who has no neighbour moves up as it is. A node is (first leaf, number of
leaves).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distrib.comm.base import Transport
from distrib.data.sampler import shard
from distrib.faults.watchdog import Watchdog

Node = tuple[int, int]
"""(first leaf, leaves): a power of two of leaves, the first at a multiple of it."""


class Stack:
    """Adds leaves that come in order: holds the nodes that still lack their neighbour, a few at most."""

    def __init__(self) -> None:
        self.nodes: list[tuple[Node, np.ndarray]] = []

    def push(self, leaf: int, part: np.ndarray) -> None:
        """Take over `part`, and overwrite it as the sum of a node that starts with it."""
        self.nodes.append(((leaf, 1), part))
        while len(self.nodes) > 1:
            (first, size), left = self.nodes[-2]
            (_, same), right = self.nodes[-1]
            if size != same or first % (2 * size):
                return
            left += right
            self.nodes[-2:] = [((first, 2 * size), left)]


def nodes_of(leaves: Sequence[int]) -> list[Node]:
    """The nodes that a rank with these leaves makes of them alone."""
    stack = Stack()
    for leaf in leaves:
        stack.push(leaf, np.zeros(0))
    return [node for node, _ in stack.nodes]


def add_up(known: dict[Node, np.ndarray]) -> np.ndarray:
    """The sum of all leaves, from the sums of nodes that hold each of them once; overwrites them."""

    def total(first: int, size: int) -> np.ndarray | None:
        if (first, size) in known or size == 1:
            return known.get((first, size))
        left, right = total(first, size // 2), total(first + size // 2, size // 2)
        if left is None or right is None:
            return right if left is None else left
        left += right
        return left

    whole = 1
    while any(first + size > whole for first, size in known):
        whole *= 2
    found = total(0, whole)
    assert found is not None
    return found


class TreeSums:
    """Sums over `shards` virtual shards, dealt to the ranks of `transport` in contiguous runs.

    `present` is the number of shards that have images in this step: the first ones. What travels is moved,
    never added up on the way.
    """

    def __init__(self, shards: int, transport: Transport, watchdog: Watchdog) -> None:
        self.shards, self._transport, self._watchdog = shards, transport, watchdog
        self.rank, self.size = transport.rank, transport.size
        self._arrays: dict[tuple[str, int, int, str], np.ndarray] = {}

    def own(self, present: int, rank: int | None = None) -> range:
        """The shards with images that a rank (this one) computes."""
        part = shard(self.shards, self.rank if rank is None else rank, self.size)
        return range(min(part.start, present), min(part.stop, present))

    def small(self, leaves: Sequence[np.ndarray], present: int, like: np.ndarray) -> np.ndarray:
        """The sum of all ranks' leaves, arrays as `like`, which are all sent to all: for small ones.

        The result lasts until the next call.
        """
        if self.size == 1:
            return add_up({(v, 1): leaf.copy() for v, leaf in enumerate(leaves)})
        longest = -(-self.shards // self.size)
        sent = self._array("leaves", 0, longest * like.size, like.dtype)
        gathered = self._array("gathered", 0, self.size * longest * like.size, like.dtype)
        assert sent is not None
        assert gathered is not None
        sent, gathered = sent.reshape(longest, -1), gathered.reshape(self.size, longest, -1)
        for row, leaf in zip(sent, leaves):
            row[:] = leaf.reshape(-1)
        with self._watchdog.waiting("the sums of all shards"):
            self._transport.start_gather(sent.reshape(-1), gathered.reshape(-1)).wait()
        ranks = range(self.size)
        rows = [gathered[rank, i] for rank in ranks for i in range(len(self.own(present, rank)))]
        return add_up({(v, 1): row for v, row in enumerate(rows)}).reshape(like.shape)

    def large(self, nodes: list[tuple[Node, np.ndarray]], present: int, out: np.ndarray) -> None:
        """Write the sum of all ranks' `nodes`, vectors as long as `out`, to `out`.

        Each rank adds up one slice of the vector, of which the others send it the sums of their nodes. Then
        the slices are gathered. For 2, 4 or 8 ranks, as many bytes travel as in a ring.
        """
        if self.size == 1:
            out[:] = add_up(dict(nodes))
            return
        length = -(-out.size // self.size)
        length += -length % 16
        slices = [slice(rank * length, min((rank + 1) * length, out.size)) for rank in range(self.size)]
        mine = slices[self.rank]
        width = max(0, mine.stop - mine.start)
        known = {node: vector[mine] for node, vector in nodes}
        waits = []
        for step in range(1, self.size):
            to, source = (self.rank + step) % self.size, (self.rank - step) % self.size
            parts = [vector[slices[to]] for _, vector in nodes]
            sent = self._array("sent", to, sum(part.size for part in parts), out.dtype)
            if sent is not None:
                np.concatenate(parts, out=sent)
            theirs = nodes_of(self.own(present, source))
            received = self._array("received", source, len(theirs) * width, out.dtype)
            waits.append(self._transport.start_exchange(sent, to, received, source))
            if received is not None:
                known |= dict(zip(theirs, received.reshape(len(theirs), width), strict=True))
        total = self._array("total", 0, length, out.dtype)
        whole = self._array("whole", 0, length * self.size, out.dtype)
        assert total is not None
        assert whole is not None
        with self._watchdog.waiting("the gradients of all shards"):
            for wait in waits:
                wait.wait()
            if width:
                total[:width] = add_up(known)
            self._transport.start_gather(total, whole).wait()
        out[:] = whole[: out.size]

    def _array(self, name: str, rank: int, size: int, dtype: np.dtype) -> np.ndarray | None:
        """Memory that outlives a step; None for nothing."""
        key = name, rank, size, dtype.str
        if key not in self._arrays:
            self._arrays[key] = np.zeros(size, dtype)
        return self._arrays[key] if size else None
