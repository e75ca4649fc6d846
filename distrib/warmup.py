"""What happens on a GPU before the clock starts: plans are chosen, kernels compiled, graphs captured."""

from __future__ import annotations

from functools import partial

from distrib.comm.base import SingleCommunicator
from distrib.comm.world import SLOW_IO_FACTOR
from distrib.data import sampler
from distrib.errors import UserError
from distrib.evaluate import batch_size, evaluate
from distrib.run.folder import Run
from distrib.trainer import Trainer


def counts(trainer: Trainer) -> list[int]:
    """Images of a step's global batch: the full one, and the last of an epoch where it is smaller."""
    batch, images = trainer.config.batch_size, len(trainer.images)
    return sorted({min(batch, images), images % batch or min(batch, images)}, reverse=True)


def evaluation_sizes(trainer: Trainer, rank: int) -> list[int]:
    """Images of a rank's evaluation batches."""
    part = sampler.share(len(trainer.test_images), rank, trainer.world.size)
    size, n = batch_size(trainer.model), part.stop - part.start
    return sorted({min(size, n), n % size} - {0}, reverse=True)


def choose_plans(trainer: Trainer, run: Run | None) -> None:
    """Make every rank compute each convolution in the same way, which rank 0 chooses by timing and the folder
    of `run` keeps."""
    world, model = trainer.world, trainer.model
    convolutions = world.backend.algorithms.get("cudnn")
    if convolutions is None:
        return
    with world.fail_together(SLOW_IO_FACTOR):
        if world.rank == 0:
            about, ranks = world.backend.describe(), range(world.size)
            convolutions.plans.update(run.plans(about) if run else {})
            parts = [sampler.share(count, rank, world.size) for count in counts(trainer) for rank in ranks]
            try:
                for n in sorted({part.stop - part.start for part in parts} - {0}, reverse=True):
                    model.tune_convolutions(n, training=True)
                for n in sorted({n for rank in ranks for n in evaluation_sizes(trainer, rank)}, reverse=True):
                    model.tune_convolutions(n, training=False)
            except ValueError as error:  # a stored plan that is gone
                raise UserError(f"{run.path if run else 'plans'}: {error}") from None
            if run:
                run.keep_plans(about, convolutions.plans)
    convolutions.plans.update(world.broadcast(convolutions.plans, "the choice of convolution plans"))


def warm_up(trainer: Trainer, run: Run | None) -> None:
    """Run each kind of step and of evaluation, then put everything back: the first real step is as fast as
    the last.

    Every rank comes here; on the host there is nothing to do. Either all ranks have graphs afterwards or none
    has.
    """
    if trainer.world.backend.on_host:
        return
    choose_plans(trainer, run)
    model, rank, size = trainer.model, trainer.world.rank, trainer.world.size
    arrays = [trainer.params.values, *trainer.optimizer.state.values(), model.statistics]
    arrays += [mean for mean, _ in trainer.averages]
    before = [array.copy() for array in arrays]
    tracked = model.batches_tracked
    for n in evaluation_sizes(trainer, rank):
        evaluate(
            model, trainer.test_images[:n], trainer.test_labels[:n], trainer.config.loss, SingleCommunicator()
        )
    trainer.begin_epoch(trainer.at.step // trainer.steps_per_epoch)
    steps = []
    for count in counts(trainer):
        part = sampler.share(count, rank, size)
        steps.append((part.start, part.stop - part.start, count))
    moved = capturable = True
    while moved:  # on any rank: all must queue the same, and a graph holds addresses
        generation = model.buffers.generation
        for step in steps:
            trainer.cursor.fill(0)  # an epoch's first images, whatever the batch: none are beyond its end
            trainer.compute(*step)
            capturable = capturable and trainer.capturable()
        moved = any(
            trainer.world.allgather(model.buffers.generation != generation, "the first steps", SLOW_IO_FACTOR)
        )
    if not all(trainer.world.allgather(capturable, "the agreement on CUDA graphs")):
        trainer.graphs = None
    for step in steps:
        if trainer.graphs:
            trainer.graphs.hold(step, partial(trainer.compute, *step))
    for array, values in zip(arrays, before, strict=True):
        array[...] = values
    trainer.params.refresh()
    model.batches_tracked, trainer.epoch = tracked, -1
