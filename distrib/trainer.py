"""One rank's part of a run: the model, its optimizer, the progress of the run, and one training step."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from distrib import models
from distrib.averages import Averages
from distrib.comm.base import Handle
from distrib.comm.reducer import Reducer
from distrib.comm.world import World
from distrib.config import Config
from distrib.data import sampler
from distrib.data.dataset import Dataset
from distrib.errors import UserError
from distrib.evaluate import Run, evaluate, in_turn
from distrib.graph import Graphs
from distrib.results import StepResults
from distrib.run import checkpoint as ckpt
from distrib.run.machine import blas_threads, environment
from distrib.run.model_spec import describe_model, network_arguments
from distrib.shards import Shards
from distrib.state import Progress
from distrib.timing import StepTimer
from nn.layer import OnGrad, StepContext
from nn.network import Model, Network
from nn.ops.batch import LABELS, Source, gather_batch, gather_keys
from nn.ops.loss import loss_and_gradient
from nn.ops.norm import AllReduce
from nn.ops.update import StepRecord, average
from nn.optim import OPTIMIZERS


class Trainer:
    """One rank's part of a run."""

    def __init__(self, config: Config, world: World, data: Dataset, model: Model | None = None) -> None:
        """Build what `config` says; `model` makes the layers where --model names no file that can be run."""
        self.config, self.world, self.data_digest = config, world, data.digest()
        backend = world.backend
        self.images, self.test_images = (
            backend.asarray(images) for images in (data.train_images, data.test_images)
        )
        self.labels, self.test_labels = (
            backend.asarray(labels.astype(LABELS)) for labels in (data.train_labels, data.test_labels)
        )
        self.validation: tuple[Any, Any] | None = None
        if data.validation_images is not None and data.validation_labels is not None:
            labels = backend.asarray(data.validation_labels.astype(LABELS))
            self.validation = backend.asarray(data.validation_images), labels
        self.model_spec, self.function = describe_model(config, data), model or models.find(config.model)
        try:
            with models.building(config.model):
                self.model = self._network()
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"--data {data.name}: {error}") from None
        except MemoryError as error:
            raise UserError(f"--width {config.width}: the network needs too much memory ({error})") from None
        self.params = self.model.params
        self.shards: Shards | None = None
        optimizer = OPTIMIZERS[config.optimizer]
        options = {name: getattr(config, name) for name in optimizer.options}
        self.optimizer = optimizer(self.params, **options)
        # what steps read and count on the device; see `begin_epoch`
        xp, dtype = backend.xp, self.params.dtype
        self.stop_flag, self.local_loss = xp.zeros(1, dtype), xp.zeros(1, dtype)
        self.step_in_epoch = xp.zeros(1, np.int64)
        self.order = xp.zeros(len(data.train_images), np.int32)
        changes = any(config.augmentation)
        self.warps = xp.zeros((len(data.train_images), 8), np.float32) if changes else None
        self.keys = xp.zeros(len(data.train_images), np.uint32) if self.model.is_random() else None
        # (average, values) of parameters and running statistics, if weights are averaged; see `averaged`
        averaged = (self.params.values, self.model.statistics) if config.average else ()
        self.averages = Averages((xp.zeros_like(values), values) for values in averaged)
        self.progress = Progress(images_per_rank=[0] * world.started)  # by the rank at the start
        self.steps_per_epoch = sampler.steps_per_epoch(len(data.train_images), config.batch_size)
        self.steps = self.steps_per_epoch * config.epochs
        self.last_step = min(self.steps, config.max_steps or self.steps)
        self.stop_requested = 0  # the signal that asked for it
        self.rates, self.epoch = xp.zeros((self.steps_per_epoch, 2), np.float64), -1
        self.results = StepResults(world, self.progress, self.steps_per_epoch, config.lr, dtype)
        results = self.results.history, self.local_loss, self.params.step_metrics
        self.record = StepRecord(*results, xp.zeros(1, np.uint32))
        self.saver = ckpt.Saver()
        self.best: ckpt.Tensors | None = None  # the best epoch's model, if there is no folder to keep it in
        self.has_best = False  # instead of the last step's
        self.folder: Path | None = None  # the run's
        self.writer = world.members[0].number  # who writes there
        self.unlogged: dict[str, Any] | None = None  # the line of a step that may not be in metrics.jsonl
        self.epoch_line: dict[str, Any] | None = None  # of the last epoch, which `on_epoch` is told once
        self.span: Callable[..., Any] = nullcontext  # puts what happens in it into the trace; see `tracing`
        self.traced = False  # whether all ranks have told what they traced
        self.told = 0  # epochs of which it was told
        self.earlier_images: list[int] = []  # of each rank in earlier processes; `progress` has this one's
        self.timer = StepTimer()
        self.join()
        self.started: float | None = None  # when training began
        self.logits: list[np.ndarray] | None = None  # of this rank's test images, after the last step
        self.evaluated: float | None = None  # when the evaluation after the current step ended

    def join(self) -> None:
        """Make what depends on who the ranks are: at the start, and again when some have died."""
        config, world, backend = self.config, self.world, self.world.backend
        alone = world.size == 1
        if config.gradients == "bf16" and not alone and not world.transport.sums_bf16:
            raise UserError(
                f"--gradients bf16: needs NCCL, and this run has {world.transport.name}: leave it out"
            )
        self.updates_early = alone and not config.reproducible and backend.side_stream is not None
        then = self._update if self.updates_early else None
        gradients = "float32" if alone else config.gradients
        self.reducer = Reducer(self.params, world.transport, gradients, then=then)
        self.batch_norm_sum = None if alone else self.sum_over_ranks
        self.graphs: Graphs | None = None
        if config.cuda_graph and backend.cuda is not None and world.transport.graph_safe:
            self.graphs = Graphs(backend.cuda, self.generation, self.capturable, alone)
        if self.shards:
            self.shards.close()
            self.shards = None
        self.threads = blas_threads() if backend.on_host else 1  # on a device shards queue their work in turn
        if config.reproducible or (alone and self.threads > 1):
            self.shards = Shards(self, self._network, self.threads)

    def _network(self, **more: Any) -> Network:
        """The network of the configuration; `more` are arguments of `Network`."""
        config = self.config
        return Network(
            *network_arguments(self.model_spec, self.function),
            seed=config.seed,
            backend=self.world.backend,
            dtype=config.dtype,
            activations="uint16" if config.precision == "bf16" else None,
            **more,
        )

    def sum_over_ranks(self, x: Any) -> None:
        """Sum `x` (of batch norm) over ranks, in place."""
        begin = time.perf_counter()
        self.world.transport.all_reduce(x).wait()
        self.timer.add_sums(begin)

    def begin_epoch(self, epoch: int, order: np.ndarray | None = None) -> None:
        """Put the order of images and the learning rates of `epoch` (from 0) on the device.

        Tests give an `order` instead of the sampler's.
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
            shape = self.images.shape[:3]
            warps = sampler.warps(self.config.seed, epoch, shape, self.config.augmentation)
            self.warps[...] = backend.asarray(warps)
        if self.keys is not None:
            keys = sampler.image_keys(self.config.seed, epoch, len(self.images))
            self.keys[...] = backend.asarray(keys)
        self.step_in_epoch.fill(self.progress.step - first)
        self.epoch = epoch

    def step(self, times: int = 1) -> None:
        """Do the next training steps, with all ranks: forward and backward of this rank's shard, update.

        All are of one epoch and of as many images.
        """
        epoch, s = divmod(self.progress.step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.begin_epoch(epoch)
        batch = self.config.batch_size
        count = min(batch, len(self.images) - s * batch)
        parts = self.parts(count)
        part = parts[self.world.rank]
        if self.stop_requested:
            self.stop_flag.fill(1)
        tracked = self.model.batches_tracked
        self._queue((part.start, part.stop - part.start, count), times)
        self.model.batches_tracked = tracked + times  # a graph's replay runs no Python
        self.evaluated = None
        self.results.unread += [count] * times
        self.progress.step += times
        self.optimizer.steps += times
        for member, each in zip(self.world.members, parts, strict=True):
            self.progress.images_per_rank[member.number] += times * (each.stop - each.start)

    def parts(self, count: int) -> list[slice]:
        """Which images of a global batch of `count` each rank computes."""
        ranks = range(self.world.size)
        if self.shards:
            return [self.shards.images(count, rank) for rank in ranks]
        return [sampler.shard(count, rank, len(ranks)) for rank in ranks]

    def _queue(self, batch_shape: tuple[int, int, int], times: int) -> None:
        """`compute`, as a graph if possible. Waits if the device's queue is full."""
        with self.waiting("the queueing of a step"):
            if self.graphs:
                self.graphs.run(batch_shape, partial(self.compute, *batch_shape), times)
            else:
                for _ in range(times):
                    self.compute(*batch_shape)

    def waiting(self, what: str) -> Any:
        """Context that bounds a wait for the device, which never ends if another rank failed."""
        return nullcontext() if self.world.backend.on_host else self.world.watchdog.waiting(what)

    def compute(self, start: int, n: int, count: int) -> None:
        """Queue the work of a step: images start … start + n of a global batch of `count`.

        All that changes from step to step is read from the device's memory, so that a CUDA graph can hold it.
        """
        config, timer = self.config, self.timer
        timer.start()
        if self.shards:
            self.shards.step(count)
        else:
            # of local statistics, a rank without images must not compute 0/0
            over = (count, self.batch_norm_sum) if config.batch_norm == "sync" else (max(1, n), None)
            self.forward_backward(self.model, start, n, count, *over, self.reducer.ready)
            timer.lap("backward")
            self.reducer.wait()
            timer.lap("gradients")
        if self.shards:
            self.shards.update()
        elif not self.updates_early:
            self.optimizer.update(self.rates, self.step_in_epoch, record=self.record)
        for mean, values in self.averages:
            average(mean, values, self.optimizer.scratch(), decay=config.average)
        timer.lap("optimizer")

    def forward_backward(
        self,
        model: Network,
        start: int,
        n: int,
        count: int,
        statistics_of: int,
        all_reduce: AllReduce | None,
        on_grad: OnGrad = lambda _: None,
    ) -> None:
        """Gradient and step metrics of images start … start + n of a global batch of `count`.

        Batch norm takes its statistics over `statistics_of` images, of which `all_reduce` adds up the parts.
        """
        config, buffers = self.config, model.buffers
        keys = None if self.keys is None else buffers.persistent("keys", (n,), "uint32")
        context = StepContext(True, statistics_of, all_reduce, keys)
        x, labels = buffers.image("input", (n, *model.shape)), buffers.persistent("labels", (n,), LABELS)
        source = Source(self.images, self.labels, self.order, self.warps, config.cutout)
        gather_batch(x, labels, source, self.step_in_epoch, config.batch_size, start)
        if keys is not None:
            gather_keys(keys, self.keys, self.order, self.step_in_epoch, config.batch_size, start)
        whole = model is self.model
        timed = whole or (self.shards is not None and model is self.shards.timed)
        if timed:
            self.timer.lap("data")
        logits = model.forward(x, context)
        dlogits = buffers.persistent("dlogits", logits.shape, str(model.dtype))
        loss_and_gradient(
            logits,
            labels,
            self.stop_flag,
            dlogits,
            self.local_loss if whole else buffers.persistent("loss", (1,), str(model.dtype)),
            model.params.step_metrics,
            loss=config.loss,
            count=count,
            smoothing=config.label_smoothing,
        )
        if timed:
            self.timer.lap("forward")
        model.backward(dlogits, context, on_grad)

    def _update(self, bucket: slice, total: Handle) -> None:
        """Update a bucket's parameters beside the backward, which does not read them any more."""
        side_stream = self.world.backend.side_stream
        assert side_stream is not None
        with side_stream.fork():
            total.wait()
            part = slice(bucket.start, min(bucket.stop, self.params.values.size))
            record = None if bucket.start else self.record  # the last bucket
            self.optimizer.update(self.rates, self.step_in_epoch, part, record)

    def close(self) -> None:
        """Release the graphs: NCCL's close waits for those that hold its calls."""
        self.saver.close()
        self.graphs = None
        if self.shards:
            self.shards.close()

    def averaged(self, share: float | None = None) -> AbstractContextManager[None]:
        """Context in which the model has the averaged weights, if the run averages them.

        The average starts at 0, which after t steps still has the weight decay^t. So it is divided by
        `share`, by default 1 − decay^t.
        """
        share = share or 1 - self.config.average**self.optimizer.steps or 1.0
        return self.averages.in_place(share, self.optimizer.steps > 0, self.params.refresh)

    def capturable(self) -> bool:
        """Whether a graph can hold the last step: all its convolutions ran on the device."""
        return self.shards.capturable() if self.shards else self.model.capturable()

    def generation(self) -> int:
        """Goes up whenever a buffer that steps use moves."""
        return self.shards.generation if self.shards else self.model.buffers.generation

    def state_dict(self) -> dict[str, np.ndarray]:
        """The model as it is evaluated and saved: with averaged weights, if the run averages them."""
        with self.averaged():
            return self.model.state_dict()

    def share_statistics(self) -> None:
        """Give all ranks rank 0's running statistics. Only local batch norm makes them differ."""
        if self.config.batch_norm == "local":
            for value in (self.model.statistics, *(mean for mean, _ in self.averages[1:])):
                self.world.transport.broadcast(value)

    def environment(self) -> dict[str, Any]:
        """What must not change if a resumed run is to agree to the bit."""
        file = models.digest(self.config.model)
        own = {models.DIGEST: file} if file else {}
        threads = 1 if self.config.reproducible else self.threads  # that the bits depend on
        return {**environment(threads, self.world.backend), **self.world.comm_version, **own}

    def test(self) -> dict[str, float]:
        """Evaluate: test_loss and test_accuracy (percent). After the last step, also keep the logits."""
        self.logits = [] if self.progress.step >= self.last_step or self.out_of_patience() else None
        return self._evaluate("test", self.test_images, self.test_labels, self.logits)

    def validate(self) -> dict[str, float]:
        """Evaluate on the images held back: validation_loss and validation_accuracy."""
        assert self.validation is not None
        return self._evaluate("validation", *self.validation)

    def evaluators(self) -> tuple[list[Network], Run]:
        """Networks to evaluate with, the same on all, and what runs the work of each, maybe side by side."""
        return self.shards.evaluators() if self.shards else ([self.model], in_turn)

    def _evaluate(
        self, what: str, images: Any, labels: Any, logits: list[np.ndarray] | None = None
    ) -> dict[str, float]:
        self.share_statistics()
        with self.span("evaluation"), self.waiting("the evaluation"), self.averaged():
            networks, run = self.evaluators()
            given = images, labels, self.config.loss, self.world.transport
            loss, accuracy = evaluate(networks, *given, logits, self.config.reproducible, run)
        self.evaluated = time.perf_counter()
        if not np.isfinite(loss):
            raise UserError(
                f"the {what} loss is {loss} after step {self.progress.step}: nothing of it was saved;"
                f" try a lower --lr than {self.config.lr}"
            )
        return {f"{what}_loss": loss, f"{what}_accuracy": accuracy}

    def epoch_is_open(self) -> bool:
        """Whether an epoch's steps are all done, but not what follows them."""
        return self.progress.images > 0 and self.progress.step % self.steps_per_epoch == 0

    def out_of_patience(self) -> bool:
        """Whether as many epochs as --patience allows have ended since the best one."""
        patience, best = self.config.patience, self.progress.last_epoch.get("best_epoch")
        if patience is None or best is None:
            return False
        return self.progress.step // self.steps_per_epoch - best >= patience

    def is_finished(self) -> bool:
        """Whether the run has come to its end."""
        return self.progress.step >= self.steps or self.out_of_patience()
