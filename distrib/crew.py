"""Runs work in threads that meet: all give an array, and all get the sum.

So the passes of several virtual shards run side by side, as if each were a process, and no layer knows of it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
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

    Pieces whose numbers are equal modulo `at_once` never run at the same time.
    A thread works inside the context that `inside` gives.
    """

    def __init__(self, size: int, at_once: int, inside: Callable[[], Any] = nullcontext) -> None:
        self._at_once, self._inside = at_once, inside
        self._turns = [threading.Semaphore(0) for _ in range(size)]
        self._works: list[Callable[[Meet], None] | None] = [None] * size
        self._given: list[Array | None] = [None] * size
        self._news: queue.SimpleQueue[tuple[int, BaseException | None]] = queue.SimpleQueue()
        self._failed = False
        self._threads = [
            threading.Thread(target=self._serve, args=(number,), daemon=True, name=f"shard {number}")
            for number in range(size)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, works: Sequence[Callable[[Meet], None]], add: Callable[[list[Array]], Array]) -> None:
        """Run all `works`. Where they meet, `add` makes one array of theirs, in their order, in this thread.

        What a piece of work raises is raised here, once the others have ended.
        """
        for number, work in enumerate(works):
            self._works[number] = work
        ready, running, met, error = list(range(len(works))), set[int](), list[int](), None
        while ready or running or met:
            if not ready and not running:  # all have met
                ready, met = sorted(met), []
                if error is None:
                    error = self._share([self._given[number] for number in ready], add)
                    self._failed = error is not None
            for number in list(ready):
                if number % self._at_once not in running:
                    self._turns[number].release()
                    ready.remove(number)
                    running.add(number % self._at_once)
            if running:
                number, raised = self._news.get()
                running.remove(number % self._at_once)
                if self._given[number] is not None:
                    met.append(number)
                if raised is not None and not isinstance(raised, Abandoned):
                    error, self._failed = error or raised, True
        self._failed = False
        if error is not None:
            raise error

    def _share(self, given: list, add: Callable[[list[Array]], Array]) -> BaseException | None:
        try:
            total = add(given)
        except BaseException as raised:
            return raised
        for x in given:
            copy(total, x)
        return None

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
                work, raised = self._works[number], None
                if work is None:
                    return
                try:
                    work(partial(self._meet, number))
                except BaseException as error:
                    raised = error
                self._works[number] = None
                self._news.put((number, raised))

    def _meet(self, number: int, x: Array) -> None:
        self._given[number] = x
        self._news.put((number, None))
        self._turns[number].acquire()
        self._given[number] = None
        if self._failed:
            raise Abandoned
