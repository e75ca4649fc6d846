"""Saves a trainer's state to a checkpoint, and restores it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np

from distrib import models
from distrib.averages import Averages
from distrib.comm.start import SLOW_IO_FACTOR
from distrib.errors import UserError
from distrib.run import checkpoint as ckpt
from distrib.run.folder import Run

if TYPE_CHECKING:
    from distrib.trainer import Trainer


@dataclass
class Progress:
    """How far a run has come. A checkpoint holds its fields, so their names are fixed."""

    step: int = 0  # steps done, over all epochs
    loss_sum: float = 0.0  # of this epoch so far: Σ loss · images
    correct: float = 0.0
    images: int = 0
    images_per_rank: list[int] = field(default_factory=list)
    wall_seconds: float = 0.0
    train_seconds: float = 0.0
    last_epoch: dict[str, float] = field(default_factory=dict)  # what it reported, and which was the best

    def train_metrics(self) -> dict[str, float]:
        """train_loss and train_accuracy (percent) of the epoch so far."""
        return {
            "train_loss": self.loss_sum / self.images,
            "train_accuracy": 100 * self.correct / self.images,
        }


def save(trainer: Trainer, run: Run | None) -> None:
    """Start saving a checkpoint, once the one before is written. Every rank calls this; rank 0 writes."""
    with trainer.span("save"):
        _save(trainer, run)


def _save(trainer: Trainer, run: Run | None) -> None:
    assert trainer.results.all_read, "a checkpoint needs the results of all steps"
    world, config = trainer.world, trainer.config
    position = {
        **asdict(trainer.progress),
        "wall_seconds": wall_seconds(trainer),
        "images_per_rank": images_per_rank(trainer),
        "optimizer_steps": trainer.optimizer.steps,
        "world_size": world.size,
        "environment": trainer.environment(),
        "config": asdict(config),
        "data": trainer.data_digest,
    }
    trainer.share_statistics()
    # meet here within one timeout: only the wait for rank 0's disk may take longer
    world.allgather(None, "the beginning of a checkpoint")
    with world.fail_together(SLOW_IO_FACTOR):
        trainer.saver.wait()
        if run:
            trainer.saver.start(
                run.checkpoints,
                trainer.progress.step,
                trainer.state_dict(),
                trainer.model_spec,
                _moments(trainer),
                position,
                config.keep,
            )


def images_per_rank(trainer: Trainer) -> list[int]:
    """Training images that each rank computed, by its number at the start, with those before a resume."""
    new = trainer.progress.images_per_rank
    return [sum(pair) for pair in zip_longest(new, trainer.earlier_images, fillvalue=0)]


def wall_seconds(trainer: Trainer, end: float | None = None) -> float:
    """Seconds of training and evaluation up to `end` (default: now), including before a resume."""
    now = time.perf_counter() if end is None else end
    return trainer.progress.wall_seconds + now - (now if trainer.started is None else trainer.started)


def keep_best(trainer: Trainer, run: Run | None) -> None:
    """Write the model as checkpoints/best.safetensors, in the place of the one before.

    Without a run's folder rank 0 remembers it.
    """
    model, spec = trainer.state_dict(), {**trainer.model_spec, "step": trainer.progress.step}
    with trainer.world.fail_together(SLOW_IO_FACTOR):
        if run:
            ckpt.save_model(run.checkpoints / ckpt.BEST, model, spec)
        elif trainer.world.rank == 0 or trainer.config.elastic:
            trainer.best = model


def find_best(trainer: Trainer, run: Run | None, saved: ckpt.Checkpoint | None) -> str | None:
    """Bring the best epoch's model, of the resumed run, into this one's folder; a note if it is not there.

    Then which epoch was the best is forgotten, too.
    """
    known, note = trainer.progress.last_epoch, None
    if saved is None or not trainer.config.keep_best or "best_epoch" not in known:
        return None
    step = round(known["best_epoch"]) * trainer.steps_per_epoch
    with trainer.world.fail_together(SLOW_IO_FACTOR):
        if run:
            try:
                model, spec = ckpt.load_model(saved.path.parent / ckpt.BEST)
                if spec.get("step") == step:
                    ckpt.save_model(run.checkpoints / ckpt.BEST, model, spec)
                else:
                    note = "is of another epoch"
            except UserError:
                note = "is not there"
    note = trainer.world.broadcast(note, "the best epoch's model")
    if note is None:
        return None
    for name in [name for name in known if name.startswith("best_")]:
        del known[name]
    return f"the model of the best epoch so far {note}: that of an epoch to come is kept"


def take_best(trainer: Trainer, run: Run | None) -> None:
    """Give all ranks the model of the best epoch, which may have been averaged already."""
    wait_for_save(trainer, run)  # of the weights that the best ones replace
    model: ckpt.Tensors | None = trainer.best
    with trainer.world.fail_together(SLOW_IO_FACTOR):
        if run:
            model, _ = ckpt.load_model(run.checkpoints / ckpt.BEST)
    model = trainer.world.broadcast(model, "the best epoch's model")
    assert model is not None
    trainer.model.load_state_dict(model)
    trainer.averages, trainer.has_best = Averages(), True


def _moments(trainer: Trainer) -> ckpt.Tensors:
    """The optimizer's moments as "moment/name"; with averaged weights also "last/name" and "average/name"."""
    found = {
        f"{moment}/{name}": tensor
        for moment, flat in trainer.optimizer.state.items()
        for name, tensor in trainer.params.to_checkpoint(flat).items()
    }
    if trainer.averages:  # the model's file has the corrected average
        found |= {f"last/{name}": tensor for name, tensor in trainer.model.state_dict().items()}
        with trainer.averaged(share=1.0):
            found |= {f"average/{name}": tensor for name, tensor in trainer.model.state_dict().items()}
    return found


def wait_for_save(trainer: Trainer, run: Run | None) -> None:
    """Wait for the last checkpoint to be on disk, then read and verify it. Every rank calls this."""
    with trainer.world.fail_together(SLOW_IO_FACTOR):
        trainer.saver.wait()
        if run and trainer.saver.used:
            ckpt.load_checkpoint(ckpt.model_path(run.checkpoints, trainer.progress.step))


def restore(trainer: Trainer, saved: ckpt.Checkpoint) -> list[str]:
    """Restore a trainer from a checkpoint; returns what changed in its environment since then."""
    c, path, position = trainer.config, saved.path, dict(saved.position)
    environment = position.pop("environment")
    for name, ours in trainer.model_spec.items():
        held = saved.model_spec.get(name)
        is_model = name == "model"
        same = models.same(ours, str(held), environment) if is_model else held == ours
        if not same and name != "class_names":
            said = models.before(ours, str(held)) if is_model else held
            raise UserError(f"{path}: has {name} {said}, this run {ours}: use a matching checkpoint")
    different = c.differences({**position.pop("config"), "environment": environment})
    if position.pop("data") != trainer.data_digest:
        different.append("other data")
    if different:
        raise UserError(f"{path}: was saved with other settings: {'; '.join(different)}: give the same ones")
    before = {**environment, "world_size": position.pop("world_size")}
    size = trainer.world.size
    if c.batch_norm == "local" and before["world_size"] != size:
        raise UserError(
            f"--batch-norm local pins the number of ranks: {path} has {before['world_size']}, not {size}"
        )
    try:
        _load_weights(trainer, saved)
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: does not fit this run ({error}): use a matching checkpoint") from None
    trainer.optimizer.steps = position.pop("optimizer_steps")
    vars(trainer.progress).update(position, images_per_rank=[0] * trainer.world.started)
    trainer.earlier_images = position["images_per_rank"]
    now = {**trainer.environment(), "world_size": before["world_size"] if c.reproducible else size}
    return [
        f"{name}: {before.get(name, 'none')} → {now.get(name, 'none')}"
        for name in {**now, **before}
        if before.get(name) != now.get(name)
    ]


def _load_weights(trainer: Trainer, saved: ckpt.Checkpoint) -> None:
    """Load the weights, their averages and the optimizer's moments from a checkpoint."""
    model, averages = trainer.model, trainer.averages
    model.load_state_dict(_named(saved.optimizer, "average") if averages else saved.model)
    for mean, values in averages:
        mean[...] = values
    if averages:
        model.load_state_dict(_named(saved.optimizer, "last"))
    for moment, flat in trainer.optimizer.state.items():
        trainer.params.from_checkpoint(_named(saved.optimizer, moment), flat)


def _named(tensors: ckpt.Tensors, group: str) -> dict[str, np.ndarray]:
    """The tensors named "group/…", without that prefix."""
    return {name.split("/", 1)[1]: tensor for name, tensor in tensors.items() if name.startswith(f"{group}/")}
