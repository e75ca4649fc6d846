"""Sums over virtual shards along one fixed tree, so that their bits do not depend on which rank has which.

The leaves are the shards' parts, numbered from 0. Neighbours are added pairwise, level by level: (0+1),
(2+3), then (0+1)+(2+3), and so on; who has no neighbour moves up as it is. A node is (first leaf, number of
leaves).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distrib.comm.base import Transport
from distrib.data.sampler import shard
from distrib.faults.watchdog import Watchdog
from nn.array import Array
from nn.device import Backend
from nn.ops.activation import copy
from nn.ops.residual import add
from nn.ops.tree import add_leaves

Node = tuple[int, int]
"""(first leaf, leaves): a power of two of leaves, the first at a multiple of it."""


class Stack:
    """Adds leaves that come in order: holds the nodes that still lack their neighbour, a few at most.

    `plus(total, part)` adds a part to a total.
    """

    def __init__(self, plus: Callable[[Array, Array], None] = add) -> None:
        self.nodes: list[tuple[Node, Array]] = []
        self._plus = plus

    def push(self, leaf: int, part: Array) -> None:
        """Take over `part`, and overwrite it as the sum of a node that starts with it."""
        self.nodes.append(((leaf, 1), part))
        while len(self.nodes) > 1:
            (first, size), left = self.nodes[-2]
            (_, same), right = self.nodes[-1]
            if size != same or first % (2 * size):
                return
            self._plus(left, right)
            self.nodes[-2:] = [((first, 2 * size), left)]


def nodes_of(leaves: Sequence[int]) -> list[Node]:
    """The nodes that a rank with these leaves makes of them alone."""
    stack = Stack()
    for leaf in leaves:
        stack.push(leaf, np.zeros(0))
    return [node for node, _ in stack.nodes]


def add_up(known: dict[Node, Array]) -> Array:
    """The sum of all leaves, from the sums of nodes that hold each of them once; overwrites them."""

    def total(first: int, size: int) -> Array | None:
        if (first, size) in known or size == 1:
            return known.get((first, size))
        left, right = total(first, size // 2), total(first + size // 2, size // 2)
        if left is None or right is None:
            return right if left is None else left
        add(left, right)
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

    def __init__(self, shards: int, transport: Transport, watchdog: Watchdog, backend: Backend) -> None:
        self.shards, self._transport, self._watchdog = shards, transport, watchdog
        self.rank, self.size, self._backend = transport.rank, transport.size, backend
        self._arrays: dict[tuple[str, int, int, str], Array] = {}
        self._places: dict[int, Array] = {}  # by the shards present: their rows in what is gathered

    def own(self, present: int, rank: int | None = None) -> range:
        """The shards with images that a rank (this one) computes."""
        part = shard(self.shards, self.rank if rank is None else rank, self.size)
        return range(min(part.start, present), min(part.stop, present))

    def rows(self, name: str, like: Array) -> Array:
        """Memory for this rank's leaves of the sum `name`, each as long as `like`: a leaf a row."""
        longest = -(-self.shards // self.size)
        return self._array(name, 0, longest * like.size, like.dtype).reshape(longest, -1)

    def small(self, rows: Array, present: int) -> Array:
        """The sum of all ranks' leaves, which lie in `rows` and are all sent to all: for small ones.

        The result lasts until the next call; `rows` are overwritten.
        """
        longest, length = rows.shape
        if self.size > 1:
            gathered = self._array("gathered", 0, self.size * rows.size, rows.dtype)
            with self._watchdog.waiting("the sums of all shards"):
                self._transport.start_gather(rows.reshape(-1), gathered).wait()
            rows = gathered.reshape(self.size * longest, length)
        if present not in self._places:
            ranks = range(self.size)
            places = [rank * longest + i for rank in ranks for i in range(len(self.own(present, rank)))]
            self._places[present] = self._backend.asarray(np.array(places, np.int32))
        total = self._array("total", 0, length, rows.dtype)
        add_leaves(rows, self._places[present], total)
        return total

    def large(self, nodes: list[tuple[Node, Array]], present: int, out: Array) -> None:
        """Write the sum of all ranks' `nodes`, vectors as long as `out`, to `out`.

        Each rank adds up one slice of the vector, of which the others send it the sums of their nodes. Then
        the slices are gathered. For 2, 4 or 8 ranks, as many bytes travel as in a ring.
        """
        if self.size == 1:
            total = add_up(dict(nodes))
            if total is not out:
                copy(total, out)
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
            sent = self._pack([vector[slices[to]] for _, vector in nodes], to, out.dtype)
            theirs = nodes_of(self.own(present, source))
            received = self._array("received", source, len(theirs) * width, out.dtype)
            into = received if received.size else None
            waits.append(self._transport.start_exchange(sent, to, into, source))
            if received.size:
                known |= dict(zip(theirs, received.reshape(len(theirs), width), strict=True))
        part = self._array("part", 0, length, out.dtype)
        whole = self._array("whole", 0, length * self.size, out.dtype)
        with self._watchdog.waiting("the gradients of all shards"):
            for wait in waits:
                wait.wait()
            if width:
                copy(add_up(known), part[:width])
            self._transport.start_gather(part, whole).wait()
        copy(whole[: out.size], out)

    def _pack(self, parts: list[Array], to: int, dtype: Any) -> Array | None:
        """The parts behind each other, to be sent; None for nothing."""
        packed, start = self._array("sent", to, sum(part.size for part in parts), dtype), 0
        for part in parts:
            copy(part, packed[start : start + part.size])
            start += part.size
        return packed if start else None

    def _array(self, name: str, rank: int, size: int, dtype: Any) -> Array:
        """Memory that outlives a step."""
        key = name, rank, size, str(dtype)
        if key not in self._arrays:
            self._arrays[key] = self._backend.xp.zeros(size, dtype)
        return self._arrays[key]
