"""What a run came to: the contents of summary.json."""

from __future__ import annotations

from typing import Any

from distrib.run import checkpoint as ckpt
from distrib.state import images_per_rank, wall_seconds
from distrib.trainer import Trainer


def summary(trainer: Trainer, result: dict[str, float]) -> dict[str, Any]:
    """The contents of summary.json. Collective."""
    progress, world = trainer.progress, trainer.world
    if progress.images:  # stopped within an epoch: the figures so far
        result = {**result, **trainer.progress.train_metrics()}
    digest = ckpt.digest(trainer.state_dict())
    images = images_per_rank(trainer)
    return {
        "finished": trainer.is_finished(),
        "test_accuracy": result.get("test_accuracy"),
        "test_loss": result.get("test_loss"),
        "train_accuracy": result.get("train_accuracy"),
        "train_loss": result.get("train_loss"),
        **{name: value for name, value in result.items() if name.startswith(("validation_", "best_"))},
        "epochs": progress.step // trainer.steps_per_epoch,
        "steps": progress.step,
        "world_size": world.size,
        "shards": trainer.config.shards,  # with --reproducible: the same bits on any number of ranks
        "backend": world.backend.name,
        "communicator": world.transport.name,
        "parameters": trainer.params.count,
        "images_per_second": sum(images) / progress.train_seconds if progress.train_seconds else None,
        "images_per_rank": images,
        "wall_seconds": wall_seconds(trainer, trainer.evaluated),
        "parameter_digest": digest,
        "survived": trainer.world.survived,  # ranks that died while the others went on
        "rank_digests": world.allgather(digest, "the comparison of digests"),
    }
