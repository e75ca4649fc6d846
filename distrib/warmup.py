"""Prepares a GPU before the clock starts: chooses plans, compiles kernels, captures graphs."""

from __future__ import annotations

from functools import partial
from typing import Any

from distrib.comm.base import SingleCommunicator
from distrib.comm.start import SLOW_IO_FACTOR
from distrib.data import sampler
from distrib.errors import UserError
from distrib.evaluate import batch_size, evaluate, evaluated_part
from distrib.run.folder import Run
from distrib.trainer import Trainer
from nn.ops.conv import NoAlgorithm


def global_batches(trainer: Trainer) -> list[int]:
    """Sizes of a step's global batch: the full one, and the last of an epoch if it is smaller."""
    batch, images = trainer.config.batch_size, len(trainer.images)
    return sorted({min(batch, images), images % batch or min(batch, images)}, reverse=True)


def training_batches(trainer: Trainer) -> set[int]:
    """Sizes of the batches that are computed at once, on any rank."""
    found, size = set[int](), trainer.world.size
    for count in global_batches(trainer):
        if trainer.shards:
            found |= trainer.shards.sizes(count)
        else:
            parts = (sampler.shard(count, rank, size) for rank in range(size))
            found |= {part.stop - part.start for part in parts}
    return found


def evaluation_batches(trainer: Trainer, rank: int) -> list[int]:
    """Sizes of a rank's evaluation batches."""
    size, found = batch_size(trainer.model), {0}
    for images, _ in evaluated(trainer):
        ranks, in_blocks = trainer.world.size, trainer.config.reproducible
        part = evaluated_part(len(images), size, rank, ranks, in_blocks)
        n = max(0, part.stop - part.start)
        found |= {min(size, n), n % size}
    return sorted(found - {0}, reverse=True)


def evaluated(trainer: Trainer) -> list[tuple[Any, Any]]:
    """Images and labels that a run evaluates, the larger set first."""
    sets = [(trainer.test_images, trainer.test_labels), *([trainer.validation] if trainer.validation else [])]
    return sorted(sets, key=lambda each: -len(each[0]))


def choose_plans(trainer: Trainer, run: Run | None) -> None:
    """Choose a plan for each convolution, timed on rank 0, for all ranks; keep them in the run's folder.

    Of virtual shards nothing is timed, and nothing comes from the folder.
    """
    world, model, shards = trainer.world, trainer.model, trainer.shards
    convolutions = world.backend.algorithms.get("cudnn")
    if convolutions is None:
        return
    with world.fail_together(SLOW_IO_FACTOR):
        if world.rank == 0:
            device, ranks = world.backend.describe(), range(world.size)
            run = None if shards else run
            convolutions.plans.update(run.plans(device) if run else {})
            try:
                for n in sorted(training_batches(trainer) - {0}, reverse=True):
                    (shards.networks[0] if shards else model).tune_convolutions(n, training=True)
                for n in sorted(
                    {n for rank in ranks for n in evaluation_batches(trainer, rank)}, reverse=True
                ):
                    model.tune_convolutions(n, training=False)
            except NoAlgorithm as error:
                config = trainer.config
                raise UserError(f"--precision {config.precision}, {config.network}: {error}") from None
            except ValueError as error:  # a stored plan that no longer exists
                raise UserError(f"{run.path if run else 'plans'}: {error}") from None
            if run:
                run.keep_plans(device, convolutions.plans)
    convolutions.plans.update(world.broadcast(convolutions.plans, "the choice of convolution plans"))


def warm_up(trainer: Trainer, run: Run | None) -> None:
    """Run a step and an evaluation of each batch size, then restore the state they changed.

    So the first real step is as fast as the last. Every rank calls this; on the host it does nothing.
    Afterwards either all ranks have graphs or none has.
    """
    if trainer.world.backend.on_host:
        return
    choose_plans(trainer, run)
    model, rank = trainer.model, trainer.world.rank
    arrays = [trainer.params.values, *trainer.optimizer.state.values(), model.statistics]
    arrays += [mean for mean, _ in trainer.averages]
    before = [array.copy() for array in arrays]
    tracked = model.batches_tracked
    images, labels = evaluated(trainer)[0]
    for n in evaluation_batches(trainer, rank):
        evaluate([model], images[:n], labels[:n], trainer.config.loss, SingleCommunicator())
    trainer.begin_epoch(trainer.progress.step // trainer.steps_per_epoch)
    steps = []
    for count in global_batches(trainer):
        part = trainer.parts(count)[rank]
        steps.append((part.start, part.stop - part.start, count))
    moved = capturable = True
    while moved:  # on any rank, as all must queue the same work and a graph holds addresses
        generation = trainer.generation()
        for step in steps:
            trainer.step_in_epoch.fill(0)  # the first images of an epoch exist for every batch size
            trainer.compute(*step)
            capturable = capturable and trainer.capturable()
        moved = any(
            trainer.world.allgather(trainer.generation() != generation, "the first steps", SLOW_IO_FACTOR)
        )
    if not all(trainer.world.allgather(capturable, "the choice of CUDA graphs")):
        trainer.graphs = None
    for step in steps:
        if trainer.graphs:
            whole = step[-1] == trainer.config.batch_size
            times = len(trainer.images) // trainer.config.batch_size if whole else 1
            trainer.graphs.capture(step, partial(trainer.compute, *step), times)
    for array, values in zip(arrays, before, strict=True):
        array[...] = values
    trainer.params.refresh()
    model.batches_tracked, trainer.epoch = tracked, -1
