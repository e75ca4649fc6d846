"""The training loop: data, model, step, epoch, evaluate, save. `python -m distrib.train`."""

from __future__ import annotations

import hashlib
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from distrib import checkpoint as ckpt
from distrib import mnist, sampler
from distrib.config import Config
from distrib.console import Screen
from distrib.errors import EXIT_REQUEUE, UserError
from distrib.evaluate import evaluate, load_batch
from distrib.reducer import Reducer
from distrib.run import Run, environment, new_folder
from distrib.world import World, connect
from nn.functional import LOSSES
from nn.layers import Pass
from nn.optim import SGD, Adam, Optimizer, learning_rate
from nn.resnet9 import ResNet9

HISTORY = 256
"""Steps whose results may stay on the device before they are read."""


@dataclass
class Position:
    """Where a run stands: everything besides parameters and optimizer that a checkpoint must hold."""

    step: int = 0  # steps done, over all epochs
    loss_sum: float = 0.0  # this epoch so far: Σ loss · images
    correct: float = 0.0
    images: int = 0
    images_per_rank: list[int] = field(default_factory=list)
    wall_seconds: float = 0.0
    train_seconds: float = 0.0
    last_epoch: dict[str, float] = field(default_factory=dict)  # train_loss, train_accuracy


class Trainer:
    """One rank's part of a run."""

    def __init__(self, config: Config, world: World, data: mnist.Dataset) -> None:
        self.config, self.world, self.data = config, world, data
        backend = world.backend
        self.images, self.labels = backend.asarray(data.train_images), backend.asarray(data.train_labels)
        self.test_images, self.test_labels = backend.asarray(data.test_images), backend.asarray(data.test_labels)
        self.model = ResNet9(config.variant, config.width, seed=config.seed, backend=backend, dtype=config.dtype)
        self.params = self.model.params
        self.optimizer: Optimizer = (
            Adam(self.params, config.weight_decay)
            if config.optimizer == "adam"
            else SGD(self.params, config.weight_decay, config.momentum, config.nesterov)
        )
        self.reducer = Reducer(self.params, world.comm)
        self.loss = LOSSES[config.loss]
        self.at = Position(images_per_rank=[0] * world.size)
        self.steps_per_epoch = sampler.steps_per_epoch(len(data.train_images), config.batch_size)
        self.steps = self.steps_per_epoch * config.epochs
        self.stop_requested = self.stopped = False
        # [this rank's part of the loss, then the summed TAIL] of steps whose results were not read yet
        self.history = backend.xp.zeros((HISTORY, 4), self.params.dtype)
        self.unread: list[int] = []  # global image counts of those steps
        self.results: dict[str, float] = {"loss": 0.0, "accuracy": 0.0}

    def sum_over_ranks(self, x: Any) -> None:
        """Batch norm's sums: in place, before the next operation."""
        self.world.comm.all_reduce(x).wait()

    def step(self, indices: Any, count: int) -> None:
        """One synchronised training step on this rank's `indices` of a global batch of `count` images."""
        sync = self.config.batch_norm == "sync"
        this = Pass(True, count if sync else len(indices), self.sum_over_ranks if sync else None)
        x, labels = load_batch(self.model, self.images, indices), self.labels[indices]
        self.data_seconds += time.perf_counter() - self.mark

        logits = self.model.forward(x, this)
        loss, dlogits = self.loss(logits, labels, count)
        row, tail = self.history[len(self.unread)], self.params.tail
        row[0] = tail[0] = loss
        tail[1] = (logits.argmax(1) == labels).sum()
        tail[2] = float(self.stop_requested)
        self.model.backward(dlogits, this, self.reducer.ready)
        self.reducer.wait()
        self.optimizer.step(self.lr())

        row[1:] = tail
        self.unread.append(count)
        self.at.step += 1
        self.at.images_per_rank[self.world.rank] += len(indices)

    def lr(self) -> float:
        """Learning rate of the coming step."""
        c = self.config
        warmup = round(c.warmup_epochs * self.steps_per_epoch)
        return learning_rate(c.schedule, c.lr, self.at.step, self.steps, warmup)

    def read_results(self) -> None:
        """Wait for the device and take in the results of the steps since the last call."""
        rows = self.model.backend.to_host(self.history[: len(self.unread)])
        for i, ((own, loss, correct, stop), count) in enumerate(zip(rows.tolist(), self.unread, strict=True)):
            if not np.isfinite(loss):
                self.stop_at_non_finite(self.at.step - len(self.unread) + i + 1, own, loss)
            self.at.loss_sum += loss * count
            self.at.correct += correct
            self.at.images += count
            self.results = {"loss": loss, "accuracy": 100 * correct / count}
            self.stopped = self.stopped or stop > 0
        self.unread.clear()

    def stop_at_non_finite(self, step: int, own: float, loss: float) -> None:
        """All ranks come here together: the loss they read is the same sum."""
        finite = self.world.allgather(bool(np.isfinite(own)), "the search for a non-finite loss")
        rank = finite.index(False) if False in finite else 0
        raise UserError(f"the loss is {loss} at step {step}, first on rank {rank}: nothing of it was saved;"
                        f" try a lower --lr than {self.config.lr}, --warmup-epochs, or --precision float64")  # fmt: skip

    def epoch(self, epoch: int, run: Run | None, screen: Screen) -> None:
        """The steps of `epoch` (from 0) that are not done yet."""
        config, world = self.config, self.world
        order = sampler.permutation(config.seed, epoch, len(self.data.train_images))
        limit = min(self.steps, config.max_steps or self.steps)
        begin, compute_start = time.perf_counter(), (self.at.step, world.comm.seconds)
        self.data_seconds = 0.0
        logged = time.perf_counter()
        for s in range(self.at.step - epoch * self.steps_per_epoch, self.steps_per_epoch):
            self.mark = time.perf_counter()
            own, count = sampler.batch_indices(order, s, config.batch_size, world.rank, world.size)
            world.watchdog.step = self.at.step + 1
            lr = self.lr()
            self.step(world.backend.asarray(own), count)
            step, last = self.at.step, s == self.steps_per_epoch - 1
            log = step % config.log_every == 0 or last
            save = step % config.checkpoint_every == 0 and not last
            end = step >= limit
            if world.backend.on_host or log or save or end or len(self.unread) == HISTORY:
                self.read_results()
            now = time.perf_counter()
            if screen.due():
                screen.progress(step, epoch, self.results["loss"], self._rate(begin, now, compute_start[0]))
            if log:
                self._log_step(run, epoch, lr, now - logged, compute_start[1])
                logged, self.data_seconds = now, 0.0
                compute_start = (compute_start[0], world.comm.seconds)
            if save and not (end or self.stopped):
                self.at.train_seconds += time.perf_counter() - begin
                self.save(run)
                begin, compute_start = time.perf_counter(), (step, compute_start[1])
            if end or self.stopped:
                break
        self.at.train_seconds += time.perf_counter() - begin

    def _rate(self, begin: float, now: float, first_step: int) -> float:
        return (self.at.step - first_step) * self.config.batch_size / max(now - begin, 1e-9)

    def _log_step(self, run: Run | None, epoch: int, lr: float, seconds: float, comm_before: float) -> None:
        """A line of metrics.jsonl. Where a device runs behind the host, parts of the time are unknown."""
        steps = (self.at.step - 1) % self.config.log_every + 1
        host, comm = self.world.backend.on_host, self.world.comm.seconds - comm_before
        line = {
            "step": self.at.step, "epoch": epoch + 1, **self.results, "lr": lr,
            "images_per_second": steps * self.config.batch_size / max(seconds, 1e-9),
            "compute_seconds": seconds - comm - self.data_seconds if host else None,
            "communication_seconds": comm if host else None,
            "data_seconds": self.data_seconds if host else None,
        }  # fmt: skip
        with self.world.agree():
            if run:
                run.log(line)

    def save(self, run: Run | None) -> None:
        """A checkpoint of this moment. Every rank comes here; rank 0 writes."""
        at = asdict(self.at)
        at["wall_seconds"] = self.wall_seconds()
        at["images_per_rank"] = self.images_per_rank()
        at["optimizer_steps"], at["world_size"] = self.optimizer.steps, self.world.size
        at["environment"] = self.environment()
        self.share_statistics()
        with self.world.agree():
            if run:
                c = self.config
                about = {"variant": c.variant, "width": c.width, "loss": c.loss, "dtype": c.dtype}
                moments = {
                    f"{moment}/{name}": tensor
                    for moment, flat in self.optimizer.state.items()
                    for name, tensor in self.params.to_checkpoint(flat).items()
                }
                ckpt.save_checkpoint(run.checkpoints, self.at.step, self.model.state_dict(), about, moments, at, c.keep)

    def share_statistics(self) -> None:
        """With local batch norm, rank 0's running statistics count; with sync they are equal anyway."""
        if self.config.batch_norm == "local":
            for value in self.model.buffers.values():
                self.world.comm.broadcast(value)

    def restore(self, saved: ckpt.Checkpoint) -> list[str]:
        """Take up the run of a checkpoint; returns what has changed since it was saved."""
        c, path = self.config, saved.path
        for name, own in (("variant", c.variant), ("width", c.width), ("loss", c.loss), ("dtype", c.dtype)):
            if saved.about[name] != own:
                raise UserError(f"{path}: has {name} {saved.about[name]}, this run {own}: use a matching checkpoint")
        at = dict(saved.position)
        before = {**at.pop("environment"), "world_size": at.pop("world_size")}
        if c.batch_norm == "local" and before["world_size"] != self.world.size:
            raise UserError(f"--batch-norm local pins the number of ranks: {path} has {before['world_size']},"
                            f" not {self.world.size}")  # fmt: skip
        try:
            self.model.load_state_dict(saved.model)
            for moment, flat in self.optimizer.state.items():
                tensors = {name.split("/", 1)[1]: tensor for name, tensor in saved.optimizer.items()
                           if name.startswith(f"{moment}/")}  # fmt: skip
                self.params.from_checkpoint(tensors, flat)
        except (ValueError, KeyError) as error:
            raise UserError(f"{path}: does not fit this run ({error}): use a matching checkpoint") from None
        self.optimizer.steps = at.pop("optimizer_steps")
        self.at = Position(**at)
        done = self.at.images_per_rank + [0] * (self.world.size - len(self.at.images_per_rank))
        self._earlier = done  # by rank; each rank counts only its own from here
        self.at.images_per_rank = [0] * self.world.size
        now = {**self.environment(), "world_size": self.world.size}
        return [f"{name}: {before[name]} → {now[name]}" for name in now if before.get(name) != now[name]]

    def environment(self) -> dict[str, Any]:
        threads = _threads()
        values = environment(threads, self.world.backend.name)
        values.pop("pid")
        return values

    def images_per_rank(self) -> list[int]:
        """Training images that each rank computed, earlier parts of the run included. Collective."""
        mine = self.at.images_per_rank[self.world.rank]
        new = self.world.allgather(mine, "the count of images")
        earlier = getattr(self, "_earlier", [0] * self.world.size)
        return [old + (new[rank] if rank < len(new) else 0) for rank, old in enumerate(earlier)]

    def wall_seconds(self) -> float:
        return self.at.wall_seconds + time.perf_counter() - self.started

    def test(self) -> tuple[float, float]:
        """Loss and accuracy on the test set."""
        self.share_statistics()
        return evaluate(self.model, self.test_images, self.test_labels, self.config.loss, self.world.comm)

    def close_epoch(self, epoch: int, run: Run | None, screen: Screen) -> dict[str, float]:
        """Evaluate, write the epoch's line, reset the running sums."""
        at = self.at
        at.last_epoch = {"train_loss": at.loss_sum / at.images, "train_accuracy": 100 * at.correct / at.images}
        at.loss_sum, at.correct, at.images = 0.0, 0.0, 0
        test_loss, test_accuracy = self.test()
        result = {**at.last_epoch, "test_loss": test_loss, "test_accuracy": test_accuracy}
        with self.world.agree():
            if run:
                run.log({"step": at.step, "epoch": epoch + 1, **result})
        screen.say(
            f"epoch {epoch + 1}/{self.config.epochs}: train loss {result['train_loss']:.4f}, accuracy"
            f" {result['train_accuracy']:.2f} %; test loss {test_loss:.4f}, accuracy {test_accuracy:.2f} %"
        )
        return result

    def fit(self, run: Run | None, screen: Screen) -> dict[str, Any]:
        """Train to the end (or to --max-steps, or to a signal); returns the summary."""
        self.started = time.perf_counter()
        limit = min(self.steps, self.config.max_steps or self.steps)
        screen.start(self.steps, self.at.step, self.config.epochs)
        result: dict[str, float] | None = None
        try:
            while self.at.step < limit and not self.stopped:
                epoch = self.at.step // self.steps_per_epoch
                self.epoch(epoch, run, screen)
                whole = self.at.step % self.steps_per_epoch == 0
                result = self.close_epoch(epoch, run, screen) if whole else None
                self.save(run)
        finally:
            screen.close()
        if result is None and not self.stopped:
            loss, accuracy = self.test()
            result = {**self.at.last_epoch, "test_loss": loss, "test_accuracy": accuracy}
        return self.summary(result or {})

    def summary(self, result: dict[str, float]) -> dict[str, Any]:
        """The contents of summary.json. Collective."""
        at, world = self.at, self.world
        if at.images:  # stopped in the middle of an epoch: its running figures
            result = {**result, "train_loss": at.loss_sum / at.images, "train_accuracy": 100 * at.correct / at.images}
        digest = ckpt.digest(self.model.state_dict())
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
            "wall_seconds": self.wall_seconds(),
            "parameter_digest": digest,
            "rank_digests": world.allgather(digest, "the comparison of digests"),
        }


def _threads() -> int:
    from threadpoolctl import threadpool_info

    return max((int(pool["num_threads"]) for pool in threadpool_info() if pool["user_api"] == "blas"), default=1)


def guard(world: World, config: Config, data: mnist.Dataset) -> None:
    """UserError where the ranks were started with different options or read different data."""
    mine = {"options": asdict(config), "data": data.digest()}
    everyone = world.allgather(mine, "the comparison of configurations")
    for rank, other in enumerate(everyone):
        for name, value in other["options"].items():
            if value != everyone[0]["options"][name]:
                raise UserError(f"rank {rank} was started with --{name.replace('_', '-')} {value}, rank 0 with"
                                f" {everyone[0]['options'][name]}: start all ranks alike")  # fmt: skip
        if other["data"] != everyone[0]["data"]:
            raise UserError(f"rank {rank} on {world.hosts[rank]} reads other data than rank 0: give all the same files")


def start_table(screen: Screen, config: Config, trainer: Trainer, run_dir: Path) -> None:
    """The resolved configuration, world, backend and data."""
    world, data = trainer.world, trainer.data
    shown = {name: value for name, value in asdict(config).items() if value is not None and name != "run_dir"}
    hosts = sorted(set(world.hosts))
    screen.table("distrib train", {
        **{name.replace("_", "-"): value for name, value in shown.items()},
        "run folder": run_dir,
        "world": f"{world.size} rank(s) on {', '.join(hosts)}, {_threads()} BLAS thread(s) each",
        "chosen": world.reason,
        "data": f"{data.name}: {len(data.train_images)} training, {len(data.test_images)} test images",
        "model": f"{trainer.params.count:,} parameters, {trainer.steps} steps",
    })  # fmt: skip


def train(config: Config) -> int:
    """Run one configuration on this rank; returns the exit code."""
    world = connect(config.comm, config.backend, config.precision, config.timeout)
    screen = Screen(active=world.rank == 0)
    with world.agree():
        data = mnist.load(config.data, config.limit_train, config.limit_test)
        config = config.resolve(world.size, len(data.train_images), len(data.test_images))
    guard(world, config, data)
    run: Run | None = None
    saved: ckpt.Checkpoint | None = None
    with world.agree():
        if world.rank == 0:
            run = Run(Path(config.run_dir) if config.run_dir else new_folder(config))
            saved = run.open(config)
    saved = world.control.bcast(saved, root=0)
    trainer = Trainer(config, world, data)
    changed: list[str] = []
    with world.agree():
        if saved:
            changed = trainer.restore(saved)
    if run:
        start_table(screen, config, trainer, run.path)
        for note in run.notes:
            screen.say(f"note: {note}")
        if saved:
            screen.say(f"going on from {saved.path.name}, step {trainer.at.step} of {trainer.steps}")
        if changed:
            screen.say(f"changed since then, so equal within rounding only: {'; '.join(changed)}")
    listen(trainer)
    summary = trainer.fit(run, screen)
    with world.agree():
        if run:
            run.finish(summary)
    report(screen, summary, run)
    world.comm.close()
    return EXIT_REQUEUE if trainer.stopped and not summary["finished"] else 0


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


def listen(trainer: Trainer) -> None:
    """SIGUSR1, SIGTERM and Ctrl-C end the run after the step at hand, with a checkpoint, on all ranks alike."""

    def handler(number: int, frame: object) -> None:
        trainer.stop_requested = True

    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


if __name__ == "__main__":
    from distrib.command import main

    sys.exit(main())
