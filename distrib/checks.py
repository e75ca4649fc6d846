"""Checks that all ranks agree: on options, code, data and buckets at the start, then on parameters."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import asdict

from distrib import models
from distrib.comm.world import World
from distrib.config import Config
from distrib.data.dataset import Dataset
from distrib.errors import UserError
from distrib.faults.watchdog import RankFailure
from distrib.sources import code_digest
from distrib.trainer import Trainer


def check_same_config(world: World, config: Config, data: Dataset) -> None:
    """UserError if a rank was started with other options, runs other code or reads other data than rank 0."""
    mine = {"options": asdict(config), "data": data.digest(), "code": code_digest()}
    mine["model"] = models.digest(config.model)
    everyone = world.allgather(mine, "the comparison of configurations")
    first = everyone[0]
    for rank, theirs in enumerate(everyone):
        for name, value in theirs["options"].items():
            if value != first["options"][name]:
                raise UserError(
                    f"rank {rank} was started with --{name.replace('_', '-')} {value}, rank 0 with"
                    f" {first['options'][name]}: start all ranks with the same options"
                )
        if theirs["code"] != first["code"]:
            raise UserError(
                f"rank {rank} on {world.hosts[rank]} runs other code than rank 0: install the same version"
                " everywhere"
            )
        if theirs["model"] != first["model"]:
            raise UserError(
                f"rank {rank} on {world.hosts[rank]} has another {config.model} than rank 0: give all ranks"
                " the same file"
            )
        if theirs["data"] != first["data"]:
            raise UserError(
                f"rank {rank} on {world.hosts[rank]} reads other data than rank 0: give all ranks the same"
                " files"
            )


def check_same_buckets(trainer: Trainer) -> None:
    """UserError if a rank would send other buckets or dtypes than rank 0, or take another number of steps."""
    params, buckets = trainer.params, trainer.reducer.buckets
    mine = (
        str(params.dtype),
        params.comm_buffer.size,
        tuple((b.start, b.stop) for b in buckets),
        trainer.steps,
        trainer.last_step,
    )
    everyone = trainer.world.allgather(mine, "the comparison of buckets")
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            raise UserError(
                f"rank {rank} on {trainer.world.hosts[rank]} would send {theirs[0]} in {len(theirs[2])}"
                f" buckets for {theirs[3]} steps, rank 0 {everyone[0][0]} in {len(everyone[0][2])} for"
                f" {everyone[0][3]}: start all ranks with the same options"
            )


def check_replicas_equal(trainer: Trainer) -> None:
    """RankFailure if a rank's parameters differ from most: its memory, link or GPU corrupts data."""
    if trainer.world.size == 1:
        return
    with trainer.waiting("the comparison of parameters"):
        values = trainer.world.backend.to_host(trainer.params.values)
    mine = hashlib.blake2b(values.data.cast("B"), digest_size=16).hexdigest()
    everyone = trainer.world.allgather(mine, "the comparison of parameters")
    common, count = Counter(everyone).most_common(1)[0]
    if count == len(everyone):
        return
    rank = next(rank for rank, theirs in enumerate(everyone) if theirs != common)
    also = "" if count > len(everyone) / 2 else ", or rank 0's, as there is no majority"
    raise RankFailure(
        trainer.world.members[rank].number,
        f"its parameters{also} differ from the other ranks' after step {trainer.progress.step}: memory, a"
        f" link or a GPU of {trainer.world.hosts[rank]} corrupts data; run again without it to resume from"
        " the last checkpoint, at which all ranks were equal",
    )
