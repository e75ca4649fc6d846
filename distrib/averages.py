"""Averages of the weights over steps (exponential), with which a model may be evaluated and saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Averages(list[tuple[Any, Any]]):
    """(average, values) of the parameters and of the running statistics; empty if the run averages none."""

    @contextmanager
    def in_place(self, share: float, begun: bool, refresh: Callable[[], None]) -> Iterator[None]:
        """Context in which the values are average / `share`; as they are, if the averages have not `begun`.

        `refresh` is called after each change of the values.
        """
        if not self:
            yield
            return
        kept = [values.copy() for _, values in self]
        for mean, values in self if begun else ():
            values[...] = mean
            values /= share
        refresh()
        try:
            yield
        finally:
            for old, (_, values) in zip(kept, self, strict=True):
                values[...] = old
            refresh()
