"""What `distrib accept` measures on every rank: its own training, sums over the ranks, its host's disk."""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distrib.comm.base import SingleCommunicator, SingleControl
from distrib.comm.world import Member, World
from distrib.config import build
from distrib.data import formats
from distrib.errors import UserError
from distrib.faults.heartbeat import Heartbeats
from distrib.files import create, read_bytes, reason
from distrib.loop import train_epoch
from distrib.run import checkpoint as ckpt
from distrib.run.console import Screen
from distrib.trainer import Trainer
from distrib.warmup import warm_up
from launch.bench.meter import Meter, NoMemory, WrongSum

HOST = {"width": 0.25, "batch_size": 64, "shards": 8, "images": 512}
DEVICE = {"width": 1.0, "batch_size": 512, "shards": 1, "images": 8192}
"""One round of the training. On a host, shards make its bits independent of the number of threads."""

LEAST_ROUNDS = 3
SMALL, LARGE = 8, 1 << 24
"""Bytes of the all-reduces whose latency and bandwidth count."""
DISK_BYTES, DISK_REPEATS = 32 << 20, 3
"""A checkpoint of the whole network with Adam takes 30 MB."""


@dataclass
class Rank:
    """What one rank found."""

    rank: int
    host: str
    threads: int
    environment: dict[str, Any]  # what the bits depend on
    on_core: float | None = None  # share of the time in which its threads had a core; of GPUs unknown
    rates: list[float] = field(default_factory=list)  # images/s of each round
    digests: dict[str, int] = field(default_factory=dict)  # of the trained parameters: rounds that had it
    disk: dict[str, Any] = field(default_factory=dict)  # of the first rank of each host

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"

    @property
    def rate(self) -> float:
        """Images/s of the middle round."""
        return statistics.median(self.rates)

    def json(self) -> dict[str, Any]:
        return {**asdict(self), "images_per_second": self.rate}


class Training:
    """The same training on every rank, each on its own, from the same start in every round."""

    def __init__(self, world: World, settings: dict[str, Any]) -> None:
        member = Member(0, 1, socket.gethostname(), os.getpid())
        alone = World(SingleCommunicator(), SingleControl(), world.backend, "", world.watchdog, [member])
        options = {name: value for name, value in settings.items() if name != "images"}
        self.images = settings["images"]
        data = formats.load(f"synthetic:{self.images}x28x28x1:10")
        config = build({**options, "reproducible": True, "epochs": 1}).resolve(1, data)
        self.trainer = Trainer(config, alone, data)
        warm_up(self.trainer, None)
        self.begin = self.trainer.state_dict()

    def round(self) -> tuple[float, str]:
        """(images/s, digest of the parameters at the end)."""
        trainer = self.trainer
        trainer.model.load_state_dict(self.begin)
        for moment in trainer.optimizer.state.values():
            moment.fill(0)
        trainer.optimizer.steps = trainer.progress.step = trainer.progress.images = 0
        trainer.epoch = -1
        begin = time.perf_counter()
        try:
            train_epoch(trainer, 0, None, Screen(active=False))
        except UserError:  # a loss that is not finite: these bits are nobody else's
            trainer.results.forget_unread()
        seconds = time.perf_counter() - begin
        with trainer.waiting("the parameters"):
            return self.images / seconds, ckpt.digest(trainer.state_dict())

    def rounds(self, seconds: float, found: Rank) -> None:
        """Train for so long, and put down what came out."""
        digests = Counter[str]()
        begin, used = time.perf_counter(), time.process_time()
        while len(found.rates) < LEAST_ROUNDS or time.perf_counter() < begin + seconds:
            rate, digest = self.round()
            found.rates.append(rate)
            digests[digest] += 1
        found.digests = dict(digests)
        if self.trainer.world.backend.on_host:
            passed = time.perf_counter() - begin
            found.on_core = (time.process_time() - used) / passed / found.threads


def measure(
    world: World, settings: dict[str, Any], seconds: float, run_dir: Path, progress: Callable[[str], None]
) -> tuple[list[Rank], dict[str, Any]]:
    """(what each rank found, what all found together)."""
    with shared_folder(world, run_dir) as folder:
        with world.fail_together():
            training = Training(world, settings)
        trainer = training.trainer
        found = Rank(world.rank, world.hosts[world.rank], trainer.threads, trainer.environment())
        progress("the first round of the training")
        training.round()
        world.allgather(None, "the first round of all ranks")
        progress(f"the same training on every rank, for {seconds:g} s")
        training.rounds(seconds, found)
        training.trainer.close()
        world.allgather(None, "the training of the other ranks")
        progress("all-reduces")
        sums = all_reduces(world, min(1.0, seconds)) if world.size > 1 else {}
        progress("the disk")
        if world.hosts.index(found.host) == world.rank:
            with world.watchdog.waiting(f"the disk of {folder}"):
                found.disk = disk(folder)
        return world.allgather(found, "the disks of the other hosts", 2), sums


@contextmanager
def shared_folder(world: World, run_dir: Path) -> Iterator[Path]:
    """A new folder on the disk of `run_dir`, which also keeps the heartbeats that name a rank that hangs.

    Where the job is killed it stays.
    """
    made = ""
    with world.fail_together():
        if world.rank == 0:
            place = run_dir.absolute()
            try:
                place = next(path for path in (place, *place.parents) if path.exists())
                made = tempfile.mkdtemp(prefix="accept-", dir=place)
            except OSError as error:
                raise UserError(f"--run-dir {run_dir}: cannot be written {reason(error, place)}") from None
    folder, watchdog = Path(world.broadcast(made, "the folder")), world.watchdog
    watchdog.heartbeats = Heartbeats(folder, world.rank, world.size)
    try:
        yield folder
    except UserError:  # of all ranks
        _remove(world, folder)
        raise
    _remove(world, folder)


def _remove(world: World, folder: Path) -> None:
    watchdog = world.watchdog
    watchdog.ask_heartbeats(lambda _: setattr(watchdog, "heartbeats", None))  # the thread that writes them
    world.allgather(None, "the end of the heartbeats")
    if world.hosts.index(world.hosts[world.rank]) == world.rank:
        shutil.rmtree(folder, ignore_errors=True)


def all_reduces(world: World, seconds: float) -> dict[str, Any]:
    """Latency and bandwidth of checked all-reduces over all ranks, so long each; or why there are none."""
    meter = Meter(world, "float32", repeats=5, seconds=seconds)
    try:
        small, large = meter.measure(SMALL), meter.measure(LARGE)
    except NoMemory as missing:
        return {"error": str(missing)}
    except WrongSum as wrong:
        return {"error": f"{wrong} (host {world.hosts[wrong.found['rank']]})"}
    return {"latency": 1e6 * statistics.median(small["seconds"]), "bandwidth": large["busbw_gb_s"]}


def disk(folder: Path) -> dict[str, Any]:
    """MB/s to write a file, until the disk says it has it, and to read it; or what is wrong."""
    path = folder / f"disk-{socket.gethostname()}"
    written, data = [], np.random.default_rng(0).bytes(DISK_BYTES)  # nothing that a disk can compress
    read = []
    try:
        folder.mkdir(exist_ok=True)  # of a host that does not share it
        for _ in range(DISK_REPEATS):
            begin = time.perf_counter()
            create(path, data, sync=True)
            written.append(DISK_BYTES / 1e6 / (time.perf_counter() - begin))
            with open(path, "rb") as file:  # what memory still has of it is no reading
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            begin = time.perf_counter()
            found = read_bytes(path, DISK_BYTES)
            read.append(DISK_BYTES / 1e6 / (time.perf_counter() - begin))
            if found != data:
                return {"error": f"{path}: other bytes were read than written"}
            path.unlink()
    except (OSError, ValueError) as error:
        return {"error": f"{path}: cannot be used {reason(error, path)}"}
    return {"write": statistics.median(written), "read": statistics.median(read)}
