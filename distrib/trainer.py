"""One rank's part of a run: the model, its optimizer, the position in the run, and one training step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

from distrib.comm.reducer import Reducer
from distrib.comm.world import World
from distrib.config import Config
from distrib.data import sampler
from distrib.data.dataset import Dataset
from distrib.errors import UserError
from distrib.evaluate import evaluate
from distrib.graph import Graphs
from distrib.results import StepResults
from distrib.run import checkpoint as ckpt
from distrib.run.folder import environment
from distrib.state import Position
from distrib.timing import Laps
from nn.layer import StepContext
from nn.network import Network
from nn.ops.batch import LABELS, Source, gather_batch
from nn.ops.loss import loss_and_gradient
from nn.ops.update import average, record_step
from nn.optim import OPTIMIZERS
from nn.resnet9 import MODELS


class Trainer:
    """One rank's part of a run."""

    def __init__(self, config: Config, world: World, data: Dataset) -> None:
        self.config, self.world, self.data_digest = config, world, data.digest()
        backend = world.backend
        self.images, self.test_images = (
            backend.asarray(images) for images in (data.train_images, data.test_images)
        )
        self.labels, self.test_labels = (
            backend.asarray(labels.astype(LABELS)) for labels in (data.train_labels, data.test_labels)
        )
        self.spec = ckpt.model_spec(config, data)
        try:
            self.model = Network(
                MODELS["resnet9"],
                data.shape,
                data.classes,
                {"variant": config.variant, "width": config.width},
                seed=config.seed,
                backend=backend,
                dtype=config.dtype,
                activations="uint16" if config.precision == "bf16" else None,
            )
        except ValueError as error:
            raise UserError(f"--data {data.name}: {error}") from None
        self.params = self.model.params
        optimizer = OPTIMIZERS[config.optimizer]
        options = {name: getattr(config, name) for name in optimizer.options}
        self.optimizer = optimizer(self.params, **options)
        if config.gradients == "bf16" and world.size > 1 and not world.comm.sums_bf16:
            raise UserError(f"--gradients bf16: needs NCCL, and this run has {world.comm.name}: leave it out")
        self.reducer = Reducer(self.params, world.comm, config.gradients if world.size > 1 else "float32")
        # what a step reads and counts on the device; see `begin_epoch`
        xp, dtype = backend.xp, self.params.dtype
        self.stop, self.own, self.cursor = xp.zeros(1, dtype), xp.zeros(1, dtype), xp.zeros(1, np.int64)
        self.order = xp.zeros(len(data.train_images), np.int32)
        self.warps = (
            xp.zeros((len(data.train_images), 4), np.float32) if config.shift or config.rotate else None
        )
        # (average, what it is of), where weights are averaged: parameters and running statistics; from 0, see
        # `averaged`
        averaged = (self.params.values, self.model.statistics) if config.average else ()
        self.averages = [(xp.zeros_like(values), values) for values in averaged]
        self.at = Position(images_per_rank=[0] * world.size)
        self.steps_per_epoch = sampler.steps_per_epoch(len(data.train_images), config.batch_size)
        self.steps = self.steps_per_epoch * config.epochs
        self.limit = min(self.steps, config.max_steps or self.steps)
        self.stop_requested = False
        self.rates, self.epoch = xp.zeros((self.steps_per_epoch, 2), np.float64), -1
        self.results = StepResults(world, self.at, self.steps_per_epoch, config.lr, dtype)
        self.sums = self.sum_over_ranks if world.size > 1 else None
        graph = config.cuda_graph and backend.cuda is not None and world.comm.graph_safe
        self.saver = ckpt.Saver()
        self.graphs: Graphs | None = None
        if graph:
            self.graphs = Graphs(
                backend.cuda, lambda: self.model.buffers.generation, self.capturable, world.size == 1
            )
        self.earlier_images: list[int] = []  # by rank, before this process; `at` counts this one's own
        self.laps = Laps()
        self.started = time.perf_counter()
        self.logits: list[np.ndarray] | None = None  # of this rank's test images, after the last step
        self.evaluated: float | None = None  # when the evaluation of this very step ended

    def sum_over_ranks(self, x: Any) -> None:
        """Batch norm's sums: in place, before the next operation."""
        begin = time.perf_counter()
        self.world.comm.all_reduce(x).wait()
        self.laps.sums(begin)

    def begin_epoch(self, epoch: int, order: np.ndarray | None = None) -> None:
        """Put what the steps of `epoch` (from 0) read on the device: the order of images, the learning rates.

        `order` instead of the sampler's is for tests.
        """
        if self.results.unread:
            self.results.read()
        backend, first = self.world.backend, epoch * self.steps_per_epoch
        if order is None:
            order = sampler.permutation(self.config.seed, epoch, len(self.images))
        lrs = [self.config.rate(first + s, self.steps_per_epoch) for s in range(self.steps_per_epoch)]
        self.order[...] = backend.asarray(order.astype(np.int32))
        self.rates[...] = backend.asarray(self.optimizer.rates(lrs, first))
        if self.warps is not None:
            warps = sampler.warps(
                self.config.seed, epoch, len(self.images), self.config.shift, self.config.rotate
            )
            self.warps[...] = backend.asarray(warps)
        self.cursor.fill(self.at.step - first)
        self.epoch = epoch

    def step(self) -> None:
        """The next synchronised training step: this rank's part of the batch, forward, backward, update."""
        epoch, s = divmod(self.at.step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.begin_epoch(epoch)
        batch = self.config.batch_size
        count = min(batch, len(self.images) - s * batch)
        part = sampler.share(count, self.world.rank, self.world.size)
        if self.stop_requested:
            self.stop.fill(1)
        tracked = self.model.batches_tracked
        self.queue(part.start, part.stop - part.start, count)
        self.model.batches_tracked = tracked + 1  # a replay runs no Python
        self.evaluated = None
        self.results.unread.append(count)
        self.at.step += 1
        self.optimizer.steps += 1
        self.at.images_per_rank[self.world.rank] += part.stop - part.start

    def queue(self, *kind: int) -> None:
        """`compute`, as a graph where that can be. A full queue of a device may make this wait."""
        with self.waiting("the queueing of a step"):
            if self.graphs:
                self.graphs.run(kind, partial(self.compute, *kind))
            else:
                self.compute(*kind)

    def waiting(self, what: str) -> Any:
        """Context of a wait for a device, which another rank's failure may make endless; on the host
        nothing."""
        return nullcontext() if self.world.backend.on_host else self.world.watchdog.waiting(what)

    def compute(self, start: int, n: int, count: int) -> None:
        """The work of a step: images start … start + n of a global batch of `count`.

        All that changes from step to step is read from the device's memory, so that a CUDA graph can hold it.
        """
        config, model, buffers, laps = self.config, self.model, self.model.buffers, self.laps
        # a rank without an image has sums of zero, not 0/0
        this = (
            StepContext(True, count, self.sums)
            if config.batch_norm == "sync"
            else StepContext(True, max(1, n))
        )
        laps.start()
        x, labels = buffers.image("input", (n, *model.shape)), buffers.persistent("labels", (n,), LABELS)
        source = Source(self.images, self.labels, self.order, self.warps)
        gather_batch(x, labels, source, self.cursor, config.batch_size, start)
        laps.lap("data")
        logits = model.forward(x, this)
        dlogits = buffers.persistent("dlogits", logits.shape, str(model.dtype))
        loss_and_gradient(
            logits,
            labels,
            self.stop,
            dlogits,
            self.own,
            self.params.step_metrics,
            loss=config.loss,
            count=count,
            smoothing=config.label_smoothing,
        )
        laps.lap("forward")
        model.backward(dlogits, this, self.reducer.ready)
        laps.lap("backward")
        self.reducer.wait()
        laps.lap("gradients")
        self.optimizer.update(self.rates, self.cursor)
        for mean, values in self.averages:
            average(mean, values, self.optimizer.scratch, decay=config.average)
        record_step(self.results.history, self.own, self.params.step_metrics, self.cursor)
        laps.lap("optimizer")

    def close(self) -> None:
        """Let go of the graphs, then of the communicator: NCCL waits for graphs that hold its calls."""
        self.saver.close()
        self.graphs = None
        self.world.comm.close()

    @contextmanager
    def averaged(self, share: float | None = None) -> Iterator[None]:
        """Context in which the model has the averaged weights, where the run averages them.

        The average of t steps began with 0, which has the share decay^t of it: it is divided by the rest, or
        by `share`.
        """
        if not self.averages:
            yield
            return
        share = share or 1 - self.config.average**self.optimizer.steps or 1.0
        kept = [values.copy() for _, values in self.averages]
        for mean, values in self.averages if self.optimizer.steps else ():
            values[...] = mean
            values /= share
        self.params.refresh()
        try:
            yield
        finally:
            for old, (_, values) in zip(kept, self.averages, strict=True):
                values[...] = old
            self.params.refresh()

    def capturable(self) -> bool:
        """Whether all convolutions of the last step were forms of the device's own, which a graph can
        hold."""
        return self.model.capturable()

    def lr(self) -> float:
        """Learning rate of the coming step."""
        return self.config.rate(self.at.step, self.steps_per_epoch)

    def state_dict(self) -> dict[str, np.ndarray]:
        """The model as it is evaluated and saved: with averaged weights, where the run averages them."""
        with self.averaged():
            return self.model.state_dict()

    def share_statistics(self) -> None:
        """With local batch norm, rank 0's running statistics count; with sync they are equal anyway."""
        if self.config.batch_norm == "local":
            for value in (self.model.statistics, *(mean for mean, _ in self.averages[1:])):
                self.world.comm.broadcast(value)

    def environment(self) -> dict[str, Any]:
        """What must be the same for a resumed run to agree to the bit."""
        return {**environment(blas_threads(), self.world.backend), **self.world.comm_version}

    def images_per_rank(self) -> list[int]:
        """Training images that each rank computed, earlier parts of the run included. Collective."""
        mine = self.at.images_per_rank[self.world.rank]
        new = self.world.allgather(mine, "the count of images")
        return [sum(pair) for pair in zip_longest(new, self.earlier_images, fillvalue=0)]

    def wall_seconds(self, end: float | None = None) -> float:
        """Seconds of training and evaluation, over resumes, up to `end` (default: now)."""
        return self.at.wall_seconds + (time.perf_counter() if end is None else end) - self.started

    def test(self) -> dict[str, float]:
        """test_loss and test_accuracy (percent). After the run's last step the logits are kept, too."""
        self.share_statistics()
        with self.waiting("the evaluation"), self.averaged():
            self.logits = [] if self.at.step >= self.limit else None
            loss, accuracy = evaluate(
                self.model, self.test_images, self.test_labels, self.config.loss, self.world.comm, self.logits
            )
        self.evaluated = time.perf_counter()
        if not np.isfinite(loss):
            raise UserError(
                f"the test loss is {loss} after step {self.at.step}: nothing of it was saved;"
                f" try a lower --lr than {self.config.lr}"
            )
        return {"test_loss": loss, "test_accuracy": accuracy}

    def running(self) -> dict[str, float]:
        """train_loss and train_accuracy (percent) of the epoch so far."""
        return {
            "train_loss": self.at.loss_sum / self.at.images,
            "train_accuracy": 100 * self.at.correct / self.at.images,
        }

    def summary(self, result: dict[str, float]) -> dict[str, Any]:
        """The contents of summary.json. Collective."""
        at, world = self.at, self.world
        if at.images:  # stopped in the middle of an epoch: its running figures
            result = {**result, **self.running()}
        digest = ckpt.digest(self.state_dict())
        images = self.images_per_rank()
        return {
            "finished": at.step >= self.steps,
            "test_accuracy": result.get("test_accuracy"),
            "test_loss": result.get("test_loss"),
            "train_accuracy": result.get("train_accuracy"),
            "train_loss": result.get("train_loss"),
            "epochs": at.step // self.steps_per_epoch,
            "steps": at.step,
            "world_size": world.size,
            "backend": world.backend.name,
            "communicator": world.comm.name,
            "parameters": self.params.count,
            "images_per_second": sum(images) / at.train_seconds if at.train_seconds else None,
            "images_per_rank": images,
            "wall_seconds": self.wall_seconds(self.evaluated),
            "parameter_digest": digest,
            "rank_digests": world.allgather(digest, "the comparison of digests"),
        }


def blas_threads() -> int:
    """Threads of the matrix products."""
    return max(
        (int(pool["num_threads"]) for pool in threadpool_info() if pool["user_api"] == "blas"), default=1
    )
