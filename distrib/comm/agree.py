"""Compares what the ranks are about to do, and words the error where they differ."""

from __future__ import annotations

from typing import NamedTuple

from distrib.comm.base import first_error
from distrib.errors import UserError

SHOWN_RANKS = 8
"""So many ranks an error names; of more, it says how many."""


class Ends(NamedTuple):
    """One rank's part in an exchange: ranks, and types with shapes in words."""

    to: int | None
    sent: str
    source: int | None
    received: str

    def shown(self) -> str:
        send = "send nothing" if self.to is None else f"send {self.sent} to {self.to}"
        receive = "receive nothing" if self.source is None else f"receive {self.received} from {self.source}"
        return f"{send}, {receive}"


def named(ranks: list[int]) -> str:
    """ "rank 3", "ranks 0, 1, 2"."""
    some = ", ".join(map(str, ranks[:SHOWN_RANKS]))
    more = f" and {len(ranks) - SHOWN_RANKS} more" if len(ranks) > SHOWN_RANKS else ""
    return f"rank{'s' * (len(ranks) > 1)} {some}{more}"


def agree(everyone: list[tuple[str, str | None, Ends | None]]) -> None:
    """UserError, the same on all ranks, unless all can make the same call.

    `everyone` has of each rank the call, why the rank refuses it, and its ends of an exchange.
    """
    if text := first_error([refused for _, refused, _ in everyone]):
        raise UserError(text)
    callers: dict[str, list[int]] = {}
    for rank, (call, _, _) in enumerate(everyone):
        callers.setdefault(call, []).append(rank)
    if len(callers) > 1:
        differing = "; ".join(f"{named(ranks)} called {call}" for call, ranks in callers.items())
        raise UserError(
            f"the ranks made different calls: {differing}: make the same calls, in the same order, with"
            " arrays of the same type and shape on all ranks"
        )
    _match([ends for _, _, ends in everyone if ends is not None])


def _match(everyone: list[Ends]) -> None:
    """UserError unless whatever is sent is received, in its type and shape."""
    for rank, ends in enumerate(everyone):
        if ends.to is not None:
            other = everyone[ends.to]
            if (other.source, other.received) != (rank, ends.sent):
                raise _unmatched(everyone, rank, ends.to)
        if ends.source is not None and everyone[ends.source].to != rank:
            raise _unmatched(everyone, rank, ends.source)


def _unmatched(everyone: list[Ends], rank: int, other: int) -> UserError:
    first, second = sorted((rank, other))
    return UserError(
        f"the ends of an exchange do not fit: rank {first} is to {everyone[first].shown()}; rank {second} is"
        f" to {everyone[second].shown()}: give sender and receiver each other's rank and arrays of the same"
        " type and shape"
    )
