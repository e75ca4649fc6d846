"""What a checkpoint holds of a run: taken from a trainer, and given back to one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from distrib.comm.world import SLOW_IO_FACTOR
from distrib.errors import UserError
from distrib.run import checkpoint as ckpt
from distrib.run.folder import Run

if TYPE_CHECKING:
    from distrib.trainer import Trainer


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


def save(trainer: Trainer, run: Run | None) -> None:
    """Begin a checkpoint of this moment, once the one before is written. Every rank comes here; rank 0
    writes."""
    assert trainer.results.all_read, "a checkpoint needs the results of all steps"
    world, config = trainer.world, trainer.config
    at = {
        **asdict(trainer.at),
        "wall_seconds": trainer.wall_seconds(),
        "images_per_rank": trainer.images_per_rank(),
        "optimizer_steps": trainer.optimizer.steps,
        "world_size": world.size,
        "environment": trainer.environment(),
        "config": asdict(config),
        "data": trainer.data_digest,
    }
    trainer.share_statistics()
    world.allgather(
        None, "the beginning of a checkpoint"
    )  # the wait for rank 0's disk alone is a patient one
    with world.fail_together(SLOW_IO_FACTOR):
        trainer.saver.wait()
        if run:
            trainer.saver.start(
                run.checkpoints,
                trainer.at.step,
                trainer.state_dict(),
                trainer.spec,
                _moments(trainer),
                at,
                config.keep,
            )


def _moments(trainer: Trainer) -> ckpt.Tensors:
    """The optimizer's moments by "moment/name"; with averaged weights also "last/name" and "average/name"."""
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
    """Return when the last checkpoint is on disk and, read again, verifies. Every rank comes here."""
    with trainer.world.fail_together(SLOW_IO_FACTOR):
        trainer.saver.wait()
        if run and trainer.saver.used:
            ckpt.load_checkpoint(ckpt.model_path(run.checkpoints, trainer.at.step))


def restore(trainer: Trainer, saved: ckpt.Checkpoint) -> list[str]:
    """Resume the run of a checkpoint; returns what has changed since it was saved."""
    c, path = trainer.config, saved.path
    for name, own in trainer.spec.items():
        held = saved.about.get(name)
        if held != own and name != "class_names":
            raise UserError(f"{path}: has {name} {held}, this run {own}: use a matching checkpoint")
    at = dict(saved.position)
    different = c.differences(at.pop("config"))
    if at.pop("data") != trainer.data_digest:
        different.append("other data")
    if different:
        raise UserError(
            f"{path}: is of a run with other settings: {'; '.join(different)}: give the same ones"
        )
    before = {**at.pop("environment"), "world_size": at.pop("world_size")}
    size = trainer.world.size
    if c.batch_norm == "local" and before["world_size"] != size:
        raise UserError(
            f"--batch-norm local pins the number of ranks: {path} has {before['world_size']}, not {size}"
        )
    try:
        _load_weights(trainer, saved)
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: does not fit this run ({error}): use a matching checkpoint") from None
    trainer.optimizer.steps = at.pop("optimizer_steps")
    vars(trainer.at).update(at, images_per_rank=[0] * size)
    trainer.earlier_images = at["images_per_rank"]
    now = {**trainer.environment(), "world_size": size}
    return [
        f"{name}: {before.get(name, 'none')} → {now.get(name, 'none')}"
        for name in {**now, **before}
        if before.get(name) != now.get(name)
    ]


def _load_weights(trainer: Trainer, saved: ckpt.Checkpoint) -> None:
    """Give the model, its averages and the optimizer what a checkpoint holds."""
    model, averages = trainer.model, trainer.averages
    model.load_state_dict(_named(saved.optimizer, "average") if averages else saved.model)
    for mean, values in averages:
        mean[...] = values
    if averages:
        model.load_state_dict(_named(saved.optimizer, "last"))
    for moment, flat in trainer.optimizer.state.items():
        trainer.params.from_checkpoint(_named(saved.optimizer, moment), flat)


def _named(tensors: ckpt.Tensors, group: str) -> dict[str, np.ndarray]:
    """Those named "group/…", by the rest of their names."""
    return {name.split("/", 1)[1]: tensor for name, tensor in tensors.items() if name.startswith(f"{group}/")}
