"""The training loop: data, model, step, epoch, evaluate, save."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from distrib import state
from distrib.announce import print_result, print_start
from distrib.checks import check_replicas_equal, check_same_buckets, check_same_config
from distrib.comm.start import SLOW_IO_FACTOR
from distrib.comm.world import World, connect
from distrib.config import CHECKPOINT_SECONDS, CHECKPOINT_STEPS, Config
from distrib.data import formats
from distrib.data.dataset import Dataset
from distrib.elastic import Job, Position, may_recover, must_regroup, record_deaths, recover, was_checked
from distrib.errors import EXIT_REQUEUE, OnAllRanks, UserError
from distrib.faults.heartbeat import USER_ERROR, Heartbeats
from distrib.faults.signals import stop_on_signals
from distrib.faults.watchdog import abort_job
from distrib.graph import READ_EVERY, steps_ahead
from distrib.run.checkpoint import Checkpoint
from distrib.run.console import Screen
from distrib.run.folder import Run
from distrib.summary import summary as summarise
from distrib.timing import Throughput
from distrib.tracing.trace import require_writable, traced
from distrib.trainer import Trainer
from distrib.warmup import warm_up
from nn.network import Model

OnEpoch = Callable[[dict[str, Any]], Any]
"""Called on every rank with what an epoch's line of metrics.jsonl holds."""


@dataclass(frozen=True)
class Caller:
    """What Python code gives a run beside its configuration; a command gives nothing."""

    data: Dataset | None = None  # instead of what --data names
    model: Model | None = None  # instead of what --model names
    on_epoch: OnEpoch | None = None
    prints: bool = True
    writes: bool = True
    exiting: bool = False  # the process ends right after

    def screen(self, world: World) -> Screen:
        """Rank 0's terminal."""
        return Screen(active=world.rank == 0 and self.prints)


def fit(trainer: Trainer, run: Run | None, screen: Screen, on_epoch: OnEpoch | None = None) -> dict[str, Any]:
    """Train to the end, to --max-steps or to a signal; returns the summary."""
    trainer.started = trainer.started or time.perf_counter()
    progress = trainer.progress
    screen.start(trainer.steps, progress.step, trainer.config.epochs)
    result: dict[str, float] = {}
    try:
        if on_epoch:  # if a death came between
            call_back(trainer, on_epoch)
        while (
            (progress.step < trainer.last_step or trainer.epoch_is_open())
            and not trainer.results.stopped
            and not trainer.out_of_patience()
        ):
            epoch = (progress.step - trainer.epoch_is_open()) // trainer.steps_per_epoch
            train_epoch(trainer, epoch, run, screen)
            whole = progress.step % trainer.steps_per_epoch == 0
            result = close_epoch(trainer, epoch, run, screen) if whole else {}
            state.save(trainer, run)
            if whole and on_epoch:
                call_back(trainer, on_epoch)
    finally:
        screen.close()
    result = result or dict(progress.last_epoch)
    if trainer.validation and trainer.is_finished():
        if trainer.config.keep_best:
            state.take_best(trainer, run)
        result |= trainer.test()
    elif "test_loss" not in result and not trainer.validation and not trainer.results.stopped:
        result |= trainer.test()
    return summarise(trainer, result)


def train_epoch(trainer: Trainer, epoch: int, run: Run | None, screen: Screen) -> None:
    """Train the remaining steps of `epoch` (from 0)."""
    throughput = Throughput(trainer.timer, trainer.progress, trainer.world.backend.on_host)
    try:
        train_steps(trainer, epoch, run, screen, throughput)
        trainer.results.read()  # of steps that were still running on the device
    finally:
        throughput.pause()


def train_steps(
    trainer: Trainer, epoch: int, run: Run | None, screen: Screen, throughput: Throughput
) -> None:
    """Train, log and save until the epoch's end, or until the run stops."""
    config, world, progress, results = trainer.config, trainer.world, trainer.progress, trainer.results
    while progress.step < (epoch + 1) * trainer.steps_per_epoch:
        steps = steps_ahead(trainer)
        world.watchdog.step = progress.step + steps
        trainer.step(steps)
        throughput.count(steps * results.unread[-1])

        last, end = progress.step % trainer.steps_per_epoch == 0, progress.step >= trainer.last_step
        log = progress.step % config.log_every == 0 or last
        save = not (last or end) and checkpoint_due(trainer)
        now = world.backend.on_host or last or save or end  # else do not wait for the device
        if log:
            lr = config.rate(progress.step - 1, trainer.steps_per_epoch)
            line = {"step": progress.step, "epoch": epoch + 1, "lr": lr}
            results.read(now, partial(log_step, run, trainer, line, throughput, throughput.take()))
        elif now or len(results.unread) == READ_EVERY:
            results.read(now)
        if screen.due():
            screen.progress(progress.step, epoch, results.last["loss"], throughput.rate())
        if config.check_every and (
            progress.step % config.check_every == 0 or save or last or end or results.stopped
        ):
            check_replicas_equal(trainer)
        if save and not results.stopped:
            throughput.pause()
            state.save(trainer, run)
            throughput.resume()
        if end or results.stopped:
            break


def checkpoint_due(trainer: Trainer) -> bool:
    """Whether a checkpoint follows this step. Without --checkpoint-every, a GPU asks rank 0's clock too."""
    config, world = trainer.config, trainer.world
    if trainer.progress.step % (config.checkpoint_every or CHECKPOINT_STEPS):
        return False
    if config.checkpoint_every or world.backend.on_host:
        return True
    due = time.monotonic() - trainer.saver.begun >= CHECKPOINT_SECONDS
    return bool(world.broadcast(due, "the time of a checkpoint"))


def log_step(
    run: Run | None,
    trainer: Trainer,
    line: dict[str, Any],
    throughput: Throughput,
    images: int,
    results: dict[str, float],
) -> None:
    """Log a step, once its results are there."""
    trainer.unlogged = {**line, **throughput.read(images), **results}
    log_line(run, trainer.world, trainer.unlogged)
    trainer.unlogged = None


def log_line(run: Run | None, world: World, values: dict[str, Any]) -> None:
    """Write a line of metrics.jsonl on rank 0. All ranks fail if that fails."""
    with world.fail_together():
        if run:
            run.log(values)


def close_epoch(trainer: Trainer, epoch: int, run: Run | None, screen: Screen) -> dict[str, float]:
    """Evaluate, write the epoch's line, reset the running sums."""
    progress = trainer.progress
    found = progress.train_metrics()
    what = "validation" if trainer.validation else "test"
    if trainer.validation:
        found |= best_of(progress.last_epoch, trainer.validate(), epoch + 1)
        if trainer.config.keep_best and found["best_epoch"] == epoch + 1:
            state.keep_best(trainer, run)
    result = {**found, **({} if trainer.validation else trainer.test())}
    log_line(run, trainer.world, {"step": progress.step, "epoch": epoch + 1, **result})
    # only here, as until here a rank may die and the epoch is closed again
    trainer.epoch_line = {"step": progress.step, "epoch": epoch + 1, **result}
    progress.last_epoch, progress.loss_sum, progress.correct, progress.images = found, 0.0, 0.0, 0
    trainer.results.keep()
    best = "" if result.get("best_epoch") != epoch + 1 else ", the best so far"
    screen.say(
        f"epoch {epoch + 1}/{trainer.config.epochs}: train loss {result['train_loss']:.4f}, accuracy"
        f" {result['train_accuracy']:.2f} %; {what} loss {result[f'{what}_loss']:.4f}, accuracy"
        f" {result[f'{what}_accuracy']:.2f} %{best}"
    )
    return result


def call_back(trainer: Trainer, on_epoch: OnEpoch) -> None:
    """Tell `on_epoch` of the last epoch, once. What it raises on every rank is raised there; on one alone, it
    ends the job."""
    line, error = trainer.epoch_line, None
    if line is None:
        return
    try:
        if trainer.told < line["epoch"]:
            trainer.told = line["epoch"]
            on_epoch(dict(line))
    except Exception as raised:
        error = raised
    failed = trainer.world.allgather(error is not None, "the calls of on_epoch", SLOW_IO_FACTOR)
    if error:
        raise OnAllRanks if all(failed) else error from error


def best_of(before: dict[str, float], found: dict[str, float], epoch: int) -> dict[str, float]:
    """What an epoch found, and which is the best: the most accurate, of equals that of the lowest loss."""
    accuracy, loss = found["validation_accuracy"], found["validation_loss"]
    if "best_epoch" in before:
        known = before["best_validation_accuracy"], -before["best_validation_loss"]
        if (accuracy, -loss) <= known:
            return {**found, **{name: value for name, value in before.items() if name.startswith("best_")}}
    best = {"best_epoch": epoch, "best_validation_accuracy": accuracy, "best_validation_loss": loss}
    return {**found, **best}


def train(config: Config, exiting: bool = False) -> int:
    """Run one configuration on this rank; returns the exit code. `exiting`: the process ends right after."""
    world = connect(config.comm, config.backend, config.precision, config.timeout, config.elastic)
    trainer, summary = train_on(world, config, Caller(exiting=exiting))
    world.close()
    return EXIT_REQUEUE if trainer.results.stopped and not summary["finished"] else 0


def train_on(world: World, config: Config, caller: Caller) -> tuple[Trainer, dict[str, Any]]:
    """Train on joined ranks; returns the trainer and the summary.

    With --elastic, when ranks die the others go on: from the last whole step or, if one of them has not begun
    to train, from the start.
    """
    quiet = np.errstate(all="ignore")  # StepResults finds non-finite losses
    with report_failures(world), quiet:
        while True:
            with ExitStack() as owned:
                try:
                    job = start(world, config, caller, owned)
                except Exception as error:
                    if not must_regroup(world, error):
                        raise
                    world.regroup()
                    continue
                with stop_on_signals(job.trainer, caller.exiting):
                    summary = to_the_end(job)
                if summary:
                    return job.trainer, summary


def start(world: World, config: Config, caller: Caller, owned: ExitStack) -> Job:
    """Begin or resume the run; rank 0 opens its folder."""
    run = None
    if world.rank == 0 and caller.writes:
        run = owned.enter_context(Run(Path(config.run_dir) if config.run_dir else None, config))
    trainer, data, saved = build(world, config, run, caller)
    job = Job(trainer, caller, run, owned)
    try:
        begin(trainer, data, saved, run, caller.screen(world))
        if world.size < world.started:
            record_deaths(job)
        may_recover(job)  # last: whoever hears of a death before it starts again
    except Exception:
        trainer.close()
        raise
    return job


def to_the_end(job: Job) -> dict[str, Any] | None:
    """Train, evaluate and finish; returns the summary, or None if the run must start again."""
    trainer, world = job.trainer, job.trainer.world
    while True:
        try:
            screen = job.caller.screen(world)
            warm_up(trainer, job.run)
            with traced(trainer, screen.say):
                summary = fit(trainer, job.run, screen, job.caller.on_epoch)
            finish(trainer, job.run, summary)
            if world.ended():
                print_result(screen, summary, job.run)
                trainer.close()
                return summary
        except Exception as error:
            if not must_regroup(world, error):
                if isinstance(error, UserError | OnAllRanks):  # the process may go on
                    trainer.close()
                raise
        if not recover(job):
            trainer.close()
            return None


def finish(trainer: Trainer, run: Run | None, summary: dict[str, Any]) -> None:
    """Verify the last checkpoint, then write the result."""
    world = trainer.world
    state.wait_for_save(trainer, run)
    logits = world.allgather(trainer.logits, "the logits of the test images")
    with world.fail_together():
        if run:
            run.keep_logits([batch for part in logits for batch in part or []], summary["steps"])
            run.finish(summary)
    step = trainer.progress.step
    world.watchdog.ask_heartbeats(lambda beats: beats.publish(now=True, step=step, state="finished"))


def build(
    world: World, config: Config, run: Run | None, caller: Caller
) -> tuple[Trainer, Dataset, Checkpoint | None]:
    """Load the data, check the run's folder and build the trainer; returns what to resume from, too."""
    stored, saved = None, None
    with world.fail_together():
        limits = config.limit_train, config.limit_test
        data = (
            caller.data.first(*limits) if caller.data else formats.load(config.data, *limits, config.reading)
        )
        stored = run.stored() if run else None
    stored = world.broadcast(stored, "the stored configuration")
    with world.fail_together():
        config = config.resolve(world.size, data, stored)
        if config.validation:
            data = data.hold_back(config.validation, config.seed)
    check_same_config(world, config, data)
    ours = replace(config, resume="auto") if was_checked(world) and config.resume == "none" else config
    with world.fail_together():
        saved = run.open(ours) if run else None
        require_writable(config, world, run)
    saved = world.broadcast(saved, "the checkpoint")
    world.position = Position(checked=True)
    with world.fail_together():
        trainer = Trainer(config, world, data, caller.model)
    return trainer, data, saved


def begin(trainer: Trainer, data: Dataset, saved: Checkpoint | None, run: Run | None, screen: Screen) -> None:
    """Resume from the checkpoint, make the run's folder ready, and say what begins."""
    config, world, changed = trainer.config, trainer.world, list[str]()
    with world.fail_together():
        if saved:
            changed = state.restore(trainer, saved)
    with world.fail_together():
        if run:
            run.prepare(config, saved, {**trainer.environment(), "world_size": world.size}, data.describe())
    note = state.find_best(trainer, run, saved)
    if world.rank == 0:
        print_start(screen, trainer, data, run)
    if saved:
        exact = ", to the bit" if config.reproducible and not changed else ""
        done = f"step {trainer.progress.step} of {trainer.steps}"
        screen.say(f"resuming from {saved.path.name}, {done}{exact}")
    if note:
        screen.say(f"note: {note}")
    if changed:
        screen.say(f"changed since then, so results agree only within rounding: {'; '.join(changed)}")
    check_same_buckets(trainer)
    world.watchdog.step = trainer.progress.step
    folder = world.broadcast(str(run.path) if run else None, "the run's folder")
    if folder:
        trainer.folder = Path(folder)
        beats = Heartbeats(trainer.folder, world.number, world.size, trainer.progress.step)
        world.watchdog.heartbeats = beats


@contextmanager
def report_failures(world: World) -> Iterator[None]:
    """Report an unexpected exception to the other ranks and abort the job."""
    try:
        yield
    except (UserError, OnAllRanks):  # all ranks raise it
        world.watchdog.ask_heartbeats(lambda beats: beats.publish(now=True, state=USER_ERROR))
        raise
    except BaseException as error:
        if world.size > 1:
            traceback.print_exc()
            abort_job(world.watchdog, error, world.transport.abort)
        cause = f"{type(error).__name__}: {error}"
        world.watchdog.ask_heartbeats(lambda beats: beats.report_failure(cause, 0, world.watchdog.step))
        raise
