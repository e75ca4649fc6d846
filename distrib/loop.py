"""The training loop: data, model, step, epoch, evaluate, save."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from distrib import state
from distrib.checks import check_replicas_equal, check_same_buckets, check_same_config
from distrib.comm.world import World, connect
from distrib.config import Config
from distrib.data import formats
from distrib.data.dataset import Dataset
from distrib.errors import EXIT_REQUEUE, UserError
from distrib.faults.heartbeat import USER_ERROR, Heartbeats
from distrib.faults.signals import stop_on_signals
from distrib.faults.watchdog import abort_job
from distrib.run.console import Screen
from distrib.run.folder import Run
from distrib.trainer import Trainer, blas_threads
from distrib.warmup import warm_up
from nn.layer import text

READ_EVERY = 32
"""Steps that a device may be ahead before its results are asked for, between logged steps too."""

FEWEST_IMAGES = 4
"""Images of a step that are worth a rank of their own on a host: the fewest in docs/benchmarks.md."""


def fit(trainer: Trainer, run: Run | None, screen: Screen) -> dict[str, Any]:
    """Train to the end (or to --max-steps, or to a signal); returns the summary."""
    trainer.started = time.perf_counter()
    np.seterr(over="ignore", invalid="ignore", divide="ignore")  # non-finite losses are looked for
    screen.start(trainer.steps, trainer.at.step, trainer.config.epochs)
    result: dict[str, float] = {}
    try:
        while trainer.at.step < trainer.limit and not trainer.results.stopped:
            epoch = trainer.at.step // trainer.steps_per_epoch
            train_epoch(trainer, epoch, run, screen)
            whole = trainer.at.step % trainer.steps_per_epoch == 0
            result = close_epoch(trainer, epoch, run, screen) if whole else {}
            state.save(trainer, run)
    finally:
        screen.close()
    if not result and not trainer.results.stopped:
        result = {**trainer.at.last_epoch, **trainer.test()}
    return trainer.summary(result)


def train_epoch(trainer: Trainer, epoch: int, run: Run | None, screen: Screen) -> None:
    """The steps of `epoch` (from 0) that are not done yet."""
    config, world, at = trainer.config, trainer.world, trainer.at
    meter = Meter(trainer)
    for s in range(at.step - epoch * trainer.steps_per_epoch, trainer.steps_per_epoch):
        world.watchdog.step = at.step + 1
        lr = trainer.lr()
        trainer.step()
        meter.count(trainer.results.unread[-1])

        last, end = s == trainer.steps_per_epoch - 1, at.step >= trainer.limit
        log = at.step % config.log_every == 0 or last
        save = at.step % config.checkpoint_every == 0 and not (last or end)
        now = world.backend.on_host or last or save or end  # else a device is not waited for
        if log:
            line = {"step": at.step, "epoch": epoch + 1, "lr": lr}
            trainer.results.read(now, partial(log_step, run, world, line, meter, meter.take()))
        elif now or len(trainer.results.unread) == READ_EVERY:
            trainer.results.read(now)
        if screen.due():
            screen.progress(at.step, epoch, trainer.results.last["loss"], meter.rate())
        if config.check_every and (
            at.step % config.check_every == 0 or save or last or end or trainer.results.stopped
        ):
            check_replicas_equal(trainer)
        if save and not trainer.results.stopped:
            meter.pause()
            state.save(trainer, run)
            meter.resume()
        if end or trainer.results.stopped:
            break
    trainer.results.read()  # a stop is heard with steps on their way
    meter.pause()


def log_step(
    run: Run | None, world: World, line: dict[str, Any], meter: Meter, images: int, results: dict[str, float]
) -> None:
    """The line of a logged step, when its results are there."""
    log_line(run, world, {**line, **meter.read(images)}, results)


class Meter:
    """Images and seconds of training, without the time of checkpoints, since the last reading."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._images, self._seconds, self._rate = trainer, 0, 0.0, 0.0
        self._laps = trainer.laps.seconds.copy()
        self.resume()

    def count(self, images: int) -> None:
        self._images += images

    def resume(self) -> None:
        self._begin = time.perf_counter()

    def pause(self) -> None:
        """Stop the clock; adds to the run's training time."""
        now = time.perf_counter()
        self._seconds += now - self._begin
        self._trainer.at.train_seconds += now - self._begin
        self._begin = now

    def rate(self) -> float:
        """Images per second since the last reading, or right after one of what was read."""
        if not self._images:
            return self._rate
        return self._images / max(self._seconds + time.perf_counter() - self._begin, 1e-9)

    def take(self) -> int:
        """Images counted since the last call."""
        images, self._images = self._images, 0
        return images

    def read(self, images: int) -> dict[str, float | None]:
        """The times of metrics.jsonl for these images. Where a device runs behind the host, their parts are
        unknown."""
        self.pause()
        laps = self._trainer.laps.seconds
        passed = {phase: seconds - self._laps[phase] for phase, seconds in laps.items()}
        waited = passed["sums"] + passed["gradients"]
        parts = {
            "compute_seconds": self._seconds - waited - passed["data"],
            "communication_seconds": waited,
            "data_seconds": passed["data"],
        }
        self._rate = images / max(self._seconds, 1e-9)
        self._seconds, self._laps = 0.0, laps.copy()
        on_host = self._trainer.world.backend.on_host
        return {
            "images_per_second": self._rate,
            **{name: value if on_host else None for name, value in parts.items()},
        }


def log_line(run: Run | None, world: World, values: dict[str, Any], results: dict[str, float]) -> None:
    """A line of metrics.jsonl, written by rank 0; all ranks learn whether that worked."""
    with world.fail_together():
        if run:
            run.log({**values, **results})


def close_epoch(trainer: Trainer, epoch: int, run: Run | None, screen: Screen) -> dict[str, float]:
    """Evaluate, write the epoch's line, reset the running sums."""
    at = trainer.at
    at.last_epoch = trainer.running()
    at.loss_sum, at.correct, at.images = 0.0, 0.0, 0
    result = {**at.last_epoch, **trainer.test()}
    log_line(run, trainer.world, {"step": at.step, "epoch": epoch + 1}, result)
    screen.say(
        f"epoch {epoch + 1}/{trainer.config.epochs}: train loss {result['train_loss']:.4f}, accuracy"
        f" {result['train_accuracy']:.2f} %; test loss {result['test_loss']:.4f}, accuracy"
        f" {result['test_accuracy']:.2f} %"
    )
    return result


def advice(world: World, config: Config) -> str | None:
    """A line for a person whose cores stand idle: how many ranks to start."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    best = min(cores, config.batch_size // FEWEST_IMAGES)
    several_hosts = len(set(world.hosts)) > 1
    if not world.backend.on_host or several_hosts or best <= world.size:
        return None
    if world.size > 1 and world.size * blas_threads() >= cores:
        return None
    return (
        f"{cores} cores, {world.size} rank(s): BLAS threads speed up matrix products alone; ranks may be"
        f" faster: mpirun -n {best} python -m distrib.train …"
    )


def start_table(screen: Screen, config: Config, data: Dataset, trainer: Trainer, run_dir: Path) -> None:
    """The resolved configuration, world, backend and data."""
    world = trainer.world
    shown = {name: value for name, value in asdict(config).items() if value is not None and name != "run_dir"}
    hosts = sorted(set(world.hosts))
    screen.table(
        "distrib train",
        {
            **{name.replace("_", "-"): value for name, value in shown.items()},
            "run folder": run_dir,
            "world": f"{world.size} rank(s) on {', '.join(hosts)}, {blas_threads()} BLAS thread(s) each",
            "chosen": world.choice_explanation,
            "data": f"{data.name}: {len(data.train_images)} training, {len(data.test_images)} test images of"
            f" {text(data.shape)} pixels, {data.classes} classes",
            "model": f"{trainer.params.count:,} parameters, {trainer.steps} steps",
        },
    )


def train(config: Config, last: bool = False) -> int:
    """Run one configuration on this rank; returns the exit code. `last`: only the exit comes after it."""
    world = connect(config.comm, config.backend, config.precision, config.timeout)
    with (
        Run(Path(config.run_dir) if config.run_dir else None, config)
        if world.rank == 0
        else nullcontext() as run
    ):
        return train_on(world, config, run, last)


def train_on(world: World, config: Config, run: Run | None, last: bool = False) -> int:
    """`train`, with the ranks joined; rank 0 has the run's folder."""
    screen = Screen(active=world.rank == 0)
    stored, saved = None, None
    with world.fail_together():
        data = formats.load(config.data, config.limit_train, config.limit_test)
        stored = run.stored() if run else None
    stored = world.broadcast(stored, "the stored configuration")
    with world.fail_together():
        config = config.resolve(world.size, data, stored)
    check_same_config(world, config, data)
    with world.fail_together():
        saved = run.open(config) if run else None
    saved = world.broadcast(saved, "the checkpoint")
    with world.fail_together():
        trainer = Trainer(config, world, data)
    changed: list[str] = []
    with world.fail_together():
        if saved:
            changed = state.restore(trainer, saved)
    with world.fail_together():
        if run:
            run.prepare(config, saved, {**trainer.environment(), "world_size": world.size}, data.about())
    if run:
        start_table(screen, config, data, trainer, run.path)
        for note in [*run.notes, *data.notes(), *world.backend.notes, advice(world, config)]:
            if note:
                screen.say(f"note: {note}")
        if saved:
            screen.say(f"resuming from {saved.path.name}, step {trainer.at.step} of {trainer.steps}")
        if changed:
            screen.say(f"changed since then, so equal within rounding only: {'; '.join(changed)}")
    check_same_buckets(trainer)
    world.watchdog.step = trainer.at.step
    world.watchdog.heartbeats = Heartbeats(
        Path(world.broadcast(str(run.path) if run else "", "the run's folder")),
        world.rank,
        world.size,
        trainer.at.step,
    )
    with stop_on_signals(trainer, last), verdict_of(world):
        warm_up(trainer, run)
        summary = fit(trainer, run, screen)
        state.wait_for_save(trainer, run)  # and verified before anyone counts on it
        logits = world.allgather(trainer.logits, "the logits of the test images")
        with world.fail_together():
            if run:
                run.keep_logits([batch for part in logits for batch in part or []], summary["steps"])
                run.finish(summary)
        report(screen, summary, run)
        world.watchdog.ask_heartbeats(
            lambda beats: beats.publish(now=True, step=trainer.at.step, state="finished")
        )
        trainer.close()
    world.watchdog.heartbeats = None
    return EXIT_REQUEUE if trainer.results.stopped and not summary["finished"] else 0


@contextmanager
def verdict_of(world: World) -> Iterator[None]:
    """What ends this rank otherwise than as a mistake that all ranks know of is said to the others, and ends
    the job."""
    try:
        yield
    except UserError:  # all ranks have it
        world.watchdog.ask_heartbeats(lambda beats: beats.publish(now=True, state=USER_ERROR))
        raise
    except BaseException as error:
        if world.size > 1:
            traceback.print_exc()
            abort_job(world.watchdog, error, world.comm.abort)
        cause = f"{type(error).__name__}: {error}"
        world.watchdog.ask_heartbeats(lambda beats: beats.report_failure(cause, 0, world.watchdog.step))
        raise


def report(screen: Screen, summary: dict[str, Any], run: Run | None) -> None:
    """The result, at the end."""
    state = "finished" if summary["finished"] else f"ended early at step {summary['steps']}"
    accuracy = summary["test_accuracy"]
    rate, path = summary["images_per_second"], run.path if run else ""
    test = "" if accuracy is None else f"test accuracy {accuracy:.2f} %, "
    screen.say(
        f"{state}: {test}{summary['wall_seconds']:.1f} s, {rate or 0:.0f} images/s on"
        f" {summary['world_size']} rank(s); results in {path}"
    )
