"""Sums along one fixed tree, whose bits depend on the leaves and their order alone."""

from __future__ import annotations

from nn.array import Array, namespace, op


@op
def put_leaf(x: Array, leaf: Array, share: float = 1.0) -> None:
    """leaf = x · share, both vectors."""
    namespace(x).multiply(x, share, out=leaf)


@op
def add_leaves(rows: Array, places: Array, total: Array) -> None:
    """total (n,) = the sum of rows[places] from `rows` (R, n), which is overwritten; places (L,), int32.

    Neighbours are added pairwise, level by level: (0+1), (2+3), then (0+1)+(2+3), and so on; who has no
    neighbour moves up as it is.
    """
    width, leaves = 1, len(places)
    while width < leaves:
        rows[places[: leaves - width : 2 * width]] += rows[places[width :: 2 * width]]
        width *= 2
    total[...] = rows[places[0]]
