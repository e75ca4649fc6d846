"""Virtual shards: parts of a global batch that threads compute side by side, each with a network of its own.

With --reproducible there are as many, whatever the number of ranks: no matrix product depends on who computes
it, nor do the bits of a step. All sums over images are taken along one tree over the shards
(`distrib.comm.tree`). Else a process that trains alone has a shard a thread: so all it does uses its cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from threadpoolctl import threadpool_limits

from distrib.comm.tree import Stack, TreeSums
from distrib.crew import Crew, Meet
from distrib.data.sampler import shard
from distrib.evaluate import Run, in_turn
from nn.array import HOST_BLOCK, Array
from nn.network import Network
from nn.ops.activation import copy
from nn.ops.residual import add
from nn.ops.tree import put_leaf

if TYPE_CHECKING:
    from distrib.trainer import Trainer


class Shards:
    """This rank's part of the virtual shards: `threads` run at a time, each with one BLAS thread.

    `network` makes one network, with arguments of `Network`. Those of a thread take turns, and share scratch.

    With batch norm over the global batch, all shards of a rank are in memory at once and meet at each of its
    sums. With `--batch-norm shard` each has its own statistics, and `--shards-at-once` of them are in memory,
    by default as many as run.
    """

    def __init__(self, trainer: Trainer, network: Callable[..., Network], threads: int) -> None:
        config, world = trainer.config, trainer.world
        self._trainer, self.count = trainer, config.shards or min(threads, config.batch_size)
        self.sums = TreeSums(self.count, world.transport, world.watchdog, world.backend)
        self._alone = config.batch_norm == "shard"
        most = max(1, len(self.sums.own(self.count)))
        held = min(most, config.shards_at_once or (threads if self._alone else most))
        self.networks: list[Network] = []
        for number in range(held):
            other = self.networks[number - threads] if number >= threads and world.backend.on_host else None
            params = trainer.params.twin() if number else trainer.params
            self.networks.append(network(params=params, turns_with=other))
        # its phases are those of all, where all run at once
        self.timed = self.networks[0] if most == held <= threads else None
        self._first = self.networks[:threads] if world.backend.on_host else []  # of those that take turns
        self._ran: list[Network] = []  # in the last step
        self._crew = Crew(held, threads, world.backend.place())
        self._limits = threadpool_limits(1, "blas")  # other numbers of threads add up in another order
        grads = trainer.params.comm_buffer
        spare = 0 if held == most else most.bit_length() + 1
        self._spare = [world.backend.xp.empty_like(grads) for _ in range(spare)]
        self._convolutions = world.backend.algorithms.get("cudnn")
        if self._convolutions:
            self._convolutions.choose(by_time=False)

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
        stack, held = Stack(self._plus), len(self.networks)
        self._ran = self.networks[: len(works)]
        for network in self._first:
            network.buffers.begin_step()
        moved = iter(self.sums.rows("statistics", trainer.model.statistics))
        for first in range(0, len(works), held):
            group = works[first : first + held]
            passes = [
                partial(self._pass, network, count, each) for network, each in zip(self.networks, group)
            ]
            self._crew.run(passes, partial(self._meet, present))
            for network, each in zip(self.networks, group):
                if each is not None:
                    self._push(network, each, stack)
                    if self._alone:
                        put_leaf(network.statistics, next(moved), self._share(count, each))
        trainer.timer.lap("backward")
        at = trainer.params.grads.size  # of the loss
        for number, (_, vector) in enumerate(stack.nodes):
            if number:
                add(trainer.local_loss, vector[at : at + 1])
            else:
                copy(vector[at : at + 1], trainer.local_loss)
        self.sums.large(stack.nodes, present, trainer.params.comm_buffer)
        statistics = self.networks[0].statistics
        if self._alone:
            statistics = self.sums.small(self.sums.rows("statistics", statistics), present)
        copy(statistics, trainer.model.statistics)
        trainer.timer.lap("gradients")

    def update(self) -> None:
        """The optimizer's update, after `step`."""
        trainer = self._trainer
        update = partial(trainer.optimizer.update, trainer.rates, trainer.step_in_epoch)
        if self._spread(lambda part, lane: update(part, lane=lane), trainer.params.values.size):
            trainer.record.end_step(trainer.step_in_epoch)
        else:
            update(record=trainer.record)

    def _plus(self, total: Array, part: Array) -> None:
        if not self._spread(lambda some, _: add(total[some], part[some]), total.size):
            add(total, part)

    def _spread(self, work: Callable[[slice, int], None], size: int) -> bool:
        """Do element-wise `work` on vectors of `size`, a part in each thread; False: too little to share."""
        lanes = len(self._first)
        if lanes < 2 or size < HOST_BLOCK:
            return False
        self._side_by_side([partial(work, shard(size, lane, lanes), lane) for lane in range(lanes)])
        return True

    def evaluators(self) -> tuple[list[Network], Run]:
        """Networks with the model's weights and running statistics, and what runs their work side by side."""
        if not self._first:
            return [self._trainer.model], in_turn
        for network in self._first:
            network.buffers.begin_step()
            copy(self._trainer.model.statistics, network.statistics)
        return self._first, self._side_by_side

    def _side_by_side(self, works: Sequence[Callable[[], None]]) -> None:
        def alone(work: Callable[[], None], _: Meet) -> None:
            work()

        self._crew.run([partial(alone, work) for work in works], lambda given: given[0])

    def _part(self, count: int, each: int) -> slice:
        return shard(count, each, self.count)

    def _pass(self, network: Network, count: int, each: int | None, meet: Meet) -> None:
        """Forward and backward of one shard; None: of no image."""
        part = slice(0, 0) if each is None else self._part(count, each)
        n = part.stop - part.start
        copy(self._trainer.model.statistics, network.statistics)
        over = (n, None) if self._alone else (count, meet)
        self._trainer.forward_backward(network, part.start, n, count, *over)

    def _meet(self, present: int, given: list[Array]) -> Array:
        begin = time.perf_counter()
        rows = self.sums.rows("leaves", given[0])
        for row, leaf in zip(rows, given[: len(self.sums.own(present))]):
            put_leaf(leaf.reshape(-1), row)
        total = self.sums.small(rows, present).reshape(given[0].shape)
        self._trainer.timer.add_sums(begin)
        return total

    def _push(self, network: Network, each: int, stack: Stack) -> None:
        """Add a shard's gradient; a copy stays on the stack where the next shard needs the network."""
        found = network.params.comm_buffer
        stack.push(each, found)
        node, vector = stack.nodes[-1]
        if self._spare and vector is found:
            used = {id(kept) for _, kept in stack.nodes}
            free = next(spare for spare in self._spare if id(spare) not in used)
            copy(found, free)
            stack.nodes[-1] = node, free

    def _share(self, count: int, each: int) -> float:
        """Of the images."""
        part = self._part(count, each)
        return (part.stop - part.start) / count

    def sizes(self, count: int) -> set[int]:
        """Images of the shards of a global batch of `count`, on any rank."""
        parts = (self._part(count, each) for each in range(min(count, self.count)))
        return {part.stop - part.start for part in parts}

    @property
    def generation(self) -> int:
        """Goes up whenever a buffer moves."""
        return sum(network.buffers.generation for network in self.networks)

    def capturable(self) -> bool:
        """Whether a CUDA graph can hold the last step."""
        return all(network.capturable() for network in self._ran)

    def close(self) -> None:
        """End the threads, and give BLAS and cuDNN their own back."""
        self._crew.close()
        self._limits.restore_original_limits()
        if self._convolutions:
            self._convolutions.choose(by_time=True)
