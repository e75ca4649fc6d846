"""Goes on after the death of ranks: from the last whole step, with the same global batches."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from distrib import state
from distrib.comm.world import World
from distrib.errors import OnAllRanks, UserError
from distrib.faults import survived
from distrib.faults.heartbeat import read_failure
from distrib.faults.watchdog import RankFailure
from distrib.run.folder import Run
from distrib.snapshots import Snapshots, Standing, lasting
from distrib.trainer import Trainer

if TYPE_CHECKING:
    from distrib.loop import Caller


class Position(NamedTuple):
    """How far a rank has come. Of two ranks, the later one has the state that counts."""

    checked: bool = False  # the run's folder was found to be fit for this run
    begun: bool = False  # training has begun, here or in an earlier process
    step: int = 0  # whole steps done
    closed: bool = False  # and after an epoch's last step, the evaluation is done, too


@dataclass
class Job:
    """A run on this rank."""

    trainer: Trainer
    caller: Caller
    run: Run | None  # rank 0's
    owned: ExitStack  # closes it


def must_regroup(world: World, error: BaseException) -> bool:
    """Whether this rank must meet the others again after `error`, because one of them has died.

    An error that all ranks have ends the run only if none of them died while it was told.
    """
    if isinstance(error, UserError | OnAllRanks):
        return not world.ended()
    return world.has_lost(error)


def was_checked(world: World) -> bool:
    """Whether a rank knows that the run's folder was found to be fit: then what it holds is of this run."""
    return any(member.position is not None and member.position.checked for member in world.members)


def may_recover(job: Job) -> None:
    """Training begins: from now on, keep what `recover` goes back to."""
    trainer = job.trainer
    if trainer.config.elastic:
        trainer.results.snapshots = Snapshots(trainer)
    trainer.world.position = Position(True, True)


def recover(job: Job) -> bool:
    """Go on with the survivors; False if one of them has not begun to train: then the run starts again.

    Every survivor takes part. Should more die meanwhile, the rest does it again.
    """
    trainer, world = job.trainer, job.trainer.world
    while True:
        _roll_back(trainer)
        progress = trainer.progress
        world.position = Position(True, True, progress.step, progress.images == 0)
        try:
            world.regroup()
            if not all(member.position and member.position.begun for member in world.members):
                return False
            _share_state(trainer)
            with world.fail_together():
                trainer.join()
            record_deaths(job)
            _take_over(job)
            return True
        except Exception as error:
            if not must_regroup(world, error):
                raise


def _roll_back(trainer: Trainer) -> None:
    """Undo what a step or an evaluation did before a death cut it short."""
    assert trainer.results.snapshots is not None
    trainer.world.abandon()
    trainer.graphs = None  # NCCL's abort waits for those that hold its calls
    trainer.results.snapshots.restore()
    trainer.logits = None


def _share_state(trainer: Trainer) -> None:
    """Give all ranks the state of one that has come furthest."""
    world = trainer.world
    positions = [member.position for member in world.members]
    source = positions.index(max(positions))
    with world.watchdog.waiting("the state of the run"):
        standing, unlogged = world.control_comm.bcast((Standing.of(trainer), trainer.unlogged), root=source)
        if len(set(positions)) > 1:
            _take_arrays(trainer, source)
    standing.apply(trainer)
    trainer.unlogged, trainer.epoch = unlogged, -1
    trainer.params.refresh()
    trainer.results.keep()


def _take_arrays(trainer: Trainer, source: int) -> None:
    """Overwrite all that lasts by what rank `source` has, once all of it is here: the source may die, too."""
    world, arrays = trainer.world, lasting(trainer)
    taken = arrays if world.rank == source else [world.backend.xp.empty_like(array) for array in arrays]
    for array in taken:
        world.transport.broadcast(array, source)
    if world.rank != source:
        for array, values in zip(arrays, taken, strict=True):
            array[...] = values


def record_deaths(job: Job) -> None:
    """Note who has died: on every rank, as each may be the next rank 0."""
    trainer, world = job.trainer, job.trainer.world
    if world.rank == 0 and trainer.folder and (failure := read_failure(trainer.folder)):
        raise RankFailure(failure["rank"], failure["cause"])  # the others ended: this rank was suspended
    known = {entry["rank"] for entry in world.survived} | {member.number for member in world.members}
    hosts = {member.number: member.host for member in world.dead}
    found = [
        survived.entry(
            trainer.folder, number, hosts.get(number, "an unknown host"), trainer.progress.step, world.heard
        )
        for number in range(world.started)
        if number not in known
    ]
    world.survived, found = world.broadcast((world.survived + found, found), "who has died")
    world.heard = 0.0
    for entry in found:
        job.caller.screen(world).say(f"{survived.line(entry)}; {world.size} rank(s) go on")
    if world.rank == 0 and trainer.folder:
        survived.keep(trainer.folder, world.survived)


def _take_over(job: Job) -> None:
    """Make the run's folder agree with the state, by a new rank 0 if the old one has died.

    A new rank 0 saves at once. So does the old one where a save may have been cut short that must be there.
    """
    trainer, world, config = job.trainer, job.trainer.world, job.trainer.config
    step, closed = trainer.progress.step, trainer.progress.images == 0
    with world.fail_together():
        if world.rank == 0 and trainer.folder:
            if job.run is None:
                job.run = job.owned.enter_context(Run(trainer.folder))
                job.run.take_over(step)
            job.run.cut(step, closed)
            if trainer.unlogged and not job.run.has_step(step):
                job.run.log(trainer.unlogged)
            job.run.note_ranks(step, world.size)
    trainer.unlogged = None
    too_few, writer = world.size < config.min_ranks, world.members[0].number
    if (closed or too_few or writer != trainer.writer) and not trainer.has_best:  # its weights are others
        state.save(trainer, job.run)
    trainer.writer = writer
    trainer.results.stopped = trainer.results.stopped or too_few
