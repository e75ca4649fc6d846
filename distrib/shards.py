"""Virtual shards: a step whose bits do not depend on the number of ranks.

The global batch is cut into shards, whatever the number of ranks. Each has a network of its own shapes, so
that no matrix product depends on who computes it. All sums over images are taken along one tree over the
shards (`distrib.comm.tree`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from threadpoolctl import threadpool_limits

from distrib.comm.tree import Stack, TreeSums
from distrib.crew import Crew, Meet
from distrib.data.sampler import shard
from nn.network import Network

if TYPE_CHECKING:
    from distrib.trainer import Trainer


class Shards:
    """This rank's virtual shards, `threads` of which run at a time, each with one BLAS thread.

    `twin()` makes a network that shares the parameters' values.

    With batch norm over the global batch, all shards of a rank are in memory at once and meet at each of its
    sums. With `--batch-norm shard` each has its own statistics, and `--shards-at-once` of them are in memory.
    """

    def __init__(self, trainer: Trainer, twin: Callable[[], Network], threads: int) -> None:
        config, world = trainer.config, trainer.world
        assert config.shards is not None
        self._trainer, self.count = trainer, config.shards
        self.sums = TreeSums(self.count, world.transport, world.watchdog)
        self._alone = config.batch_norm == "shard"
        most = max(1, len(self.sums.own(self.count)))
        held = min(most, config.shards_at_once or most)
        self.networks = [twin() for _ in range(held)]
        self._crew = Crew(held, threads)
        self._limits = threadpool_limits(1, "blas")  # other numbers of threads add up in another order
        grads = trainer.params.comm_buffer
        self._spare = [np.empty_like(grads) for _ in range(0 if held == most else most.bit_length() + 1)]

    def images(self, count: int, rank: int) -> slice:
        """Which images of a global batch a rank computes."""
        own = self.sums.own(min(count, self.count), rank)
        if not own:
            return slice(0, 0)
        return slice(self._part(count, own[0]).start, self._part(count, own[-1]).stop)

    def step(self, count: int) -> None:
        """Forward and backward of this rank's shards of a global batch of `count` images.

        Then the trainer's gradient, step metrics and running statistics are those of the global batch.
        """
        trainer, present = self._trainer, min(count, self.count)
        own: list[int | None] = list(self.sums.own(present))
        works = own if own or self._alone else [None]  # without an image it still takes part in the sums
        stack, held, loss = Stack(), len(self.networks), 0.0
        spare, moved = list(self._spare), list[np.ndarray]()
        for first in range(0, len(works), held):
            group = works[first : first + held]
            passes = [
                partial(self._pass, network, count, each) for network, each in zip(self.networks, group)
            ]
            self._crew.run(passes, partial(self._meet, present))
            for network, each in zip(self.networks, group):
                if each is not None:
                    loss += float(network.params.step_metrics[0])
                    stack.push(each, self._leaf(network, spare, stack))
                    moved.append(self._statistics(network, count, each))
        trainer.timer.lap("backward")
        trainer.local_loss[0] = loss
        self.sums.large(stack.nodes, present, trainer.params.comm_buffer)
        if self._alone:
            trainer.model.statistics[...] = self.sums.small(moved, present, trainer.model.statistics)
        else:
            trainer.model.statistics[...] = self.networks[0].statistics
        trainer.timer.lap("gradients")

    def _part(self, count: int, each: int) -> slice:
        return shard(count, each, self.count)

    def _pass(self, network: Network, count: int, each: int | None, meet: Meet) -> None:
        """Forward and backward of one shard; None: of no image."""
        part = slice(0, 0) if each is None else self._part(count, each)
        n = part.stop - part.start
        network.statistics[...] = self._trainer.model.statistics
        over = (n, None) if self._alone else (count, meet)
        self._trainer.forward_backward(network, part.start, n, count, *over)

    def _meet(self, present: int, given: list[np.ndarray]) -> np.ndarray:
        begin = time.perf_counter()
        leaves = given[: len(self.sums.own(present))]
        total = self.sums.small(leaves, present, given[0])
        self._trainer.timer.add_sums(begin)
        return total

    def _leaf(self, network: Network, spare: list[np.ndarray], stack: Stack) -> np.ndarray:
        """The gradient of a shard: the network's own, or a copy where the next shard needs the network."""
        found = network.params.comm_buffer
        if not spare:
            return found
        used = {id(vector) for _, vector in stack.nodes}
        free = next(vector for vector in spare if id(vector) not in used)
        free[...] = found
        return free

    def _statistics(self, network: Network, count: int, each: int) -> np.ndarray:
        """A shard's running statistics, by its share of the images."""
        part = self._part(count, each)
        return network.statistics * network.dtype.type((part.stop - part.start) / count)

    def close(self) -> None:
        """End the threads, and give BLAS its own back."""
        self._crew.close()
        self._limits.restore_original_limits()
