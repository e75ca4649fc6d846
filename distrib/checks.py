"""What all ranks must have alike, compared before the first step: options, data, code, the layout of what
travels."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import asdict

from distrib.comm.world import World
from distrib.config import Config
from distrib.data.dataset import Dataset
from distrib.errors import UserError
from distrib.faults.watchdog import RankFailure
from distrib.run.folder import code_digest
from distrib.trainer import Trainer


def check_same_config(world: World, config: Config, data: Dataset) -> None:
    """UserError where the ranks were started with different options, run different code or read different
    data."""
    mine = {"options": asdict(config), "data": data.digest(), "code": code_digest()}
    everyone = world.allgather(mine, "the comparison of configurations")
    for rank, other in enumerate(everyone):
        for name, value in other["options"].items():
            if value != everyone[0]["options"][name]:
                raise UserError(
                    f"rank {rank} was started with --{name.replace('_', '-')} {value}, rank 0 with"
                    f" {everyone[0]['options'][name]}: start all ranks alike"
                )
        if other["code"] != everyone[0]["code"]:
            raise UserError(
                f"rank {rank} on {world.hosts[rank]} runs other code than rank 0: install the same version"
                " everywhere"
            )
        if other["data"] != everyone[0]["data"]:
            raise UserError(
                f"rank {rank} on {world.hosts[rank]} reads other data than rank 0: give all the same files"
            )


def check_same_buckets(trainer: Trainer) -> None:
    """UserError where what the ranks will send differs: buckets, dtypes, the number of steps."""
    params, buckets = trainer.params, trainer.reducer.buckets
    mine = (
        str(params.dtype),
        params.comm_buffer.size,
        tuple((b.start, b.stop) for b in buckets),
        trainer.steps,
        trainer.limit,
    )
    everyone = trainer.world.allgather(mine, "the comparison of layouts")
    for rank, other in enumerate(everyone):
        if other != everyone[0]:
            raise UserError(
                f"rank {rank} on {trainer.world.hosts[rank]} would send {other[0]} in {len(other[2])} buckets"
                f" for {other[3]} steps, rank 0 {everyone[0][0]} in {len(everyone[0][2])} for"
                f" {everyone[0][3]}:"
                " start all ranks alike"
            )


def check_replicas_equal(trainer: Trainer) -> None:
    """RankFailure naming the rank whose parameters are not those of the most: its memory, a link or a kernel
    corrupts data."""
    if trainer.world.size == 1:
        return
    with trainer.waiting("the comparison of parameters"):
        values = trainer.world.backend.to_host(trainer.params.values)
    mine = hashlib.blake2b(values.data.cast("B"), digest_size=16).hexdigest()
    everyone = trainer.world.allgather(mine, "the comparison of parameters")
    common, count = Counter(everyone).most_common(1)[0]
    if count == len(everyone):
        return
    rank = next(rank for rank, other in enumerate(everyone) if other != common)
    also = "" if count > len(everyone) / 2 else ", or rank 0's, as there is no majority"
    raise RankFailure(
        rank,
        f"its parameters{also} differ from the other ranks' after step {trainer.at.step}: memory, a link or a"
        f" GPU of {trainer.world.hosts[rank]} corrupts data; run again without it to go on from the last"
        " checkpoint, which all ranks agreed on",
    )
