"""Runs work in threads that meet: all give an array, and all get the sum.

So the passes of several virtual shards run side by side, as if each were a process, and no layer knows of it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np

from nn.array import Array
from nn.ops.activation import copy

Meet = Callable[[Array], None]
"""Called by each piece of work at the same points; returns once its array holds the sum of all."""


class Abandoned(BaseException):
    """Ends a piece of work because another one has failed."""


class Crew:
    """As many threads as there may be pieces of work. `at_once` of them run, the others wait their turn.

    Pieces whose numbers are equal modulo `at_once` never run at the same time: one hands over to the next. A
    thread works inside the context that `inside` gives.
    """

    def __init__(self, size: int, at_once: int, inside: Callable[[], Any] = nullcontext) -> None:
        self._at_once, self._inside = at_once, inside
        self._turns = [threading.Lock() for _ in range(size)]  # held, but while it is a thread's turn
        self._next: list[int | None] = [None] * size  # whose turn follows, in this round
        self._works: list[Callable[[Meet], None] | None] = [None] * size
        self._given: list[Array | None] = [None] * size
        self._raised: list[BaseException] = []
        self._rounds: queue.SimpleQueue[None] = queue.SimpleQueue()  # that have come to their end
        self._threads = [
            threading.Thread(target=self._serve, args=(number,), daemon=True, name=f"shard {number}")
            for number in range(size)
        ]
        for turn, thread in zip(self._turns, self._threads):
            turn.acquire()
            thread.start()

    def run(self, works: Sequence[Callable[[Meet], None]], add: Callable[[list[Array]], Array]) -> None:
        """Run all `works`. Where they meet, `add` makes one array of theirs, in their order, in this thread.

        What a piece of work raises is raised here, once the others have ended.
        """
        self._works[: len(works)] = works
        at_work = list(range(len(works)))
        while at_work:
            self._round(at_work)
            at_work = [number for number in at_work if self._given[number] is not None]
            if at_work and not self._raised:
                self._share([self._given[number] for number in at_work], add)
        if self._raised:
            first = self._raised[0]
            self._raised.clear()
            raise first

    def _round(self, numbers: list[int]) -> None:
        """Let these go on until each has met or ended."""
        step = self._at_once
        rows = [[number for number in numbers if number % step == i] for i in range(step)]
        rows = [row for row in rows if row]
        for row in rows:
            for number, following in zip_longest(row, row[1:]):
                self._next[number] = following
        for row in rows:
            self._turns[row[0]].release()
        for _ in rows:
            self._rounds.get()

    def _hand_over(self, number: int) -> None:
        following = self._next[number]
        if following is None:
            self._rounds.put(None)
        else:
            self._turns[following].release()

    def _share(self, given: list, add: Callable[[list[Array]], Array]) -> None:
        try:
            total = add(given)
            for x in given:
                copy(total, x)
        except BaseException as error:
            self._raised.append(error)

    def close(self) -> None:
        """End the threads."""
        self._works = [None] * len(self._works)
        for turn, thread in zip(self._turns, self._threads):
            turn.release()
            thread.join()

    def _serve(self, number: int) -> None:
        with self._inside(), np.errstate(all="ignore"):
            while True:
                self._turns[number].acquire()
                work = self._works[number]
                if work is None:
                    return
                try:
                    work(partial(self._meet, number))
                except Abandoned:
                    pass
                except BaseException as error:
                    self._raised.append(error)
                self._works[number] = None
                self._hand_over(number)

    def _meet(self, number: int, x: Array) -> None:
        self._given[number] = x
        self._hand_over(number)
        self._turns[number].acquire()
        self._given[number] = None
        if self._raised:
            raise Abandoned
