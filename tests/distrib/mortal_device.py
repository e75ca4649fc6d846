"""The mortal program on the double of a GPU, one per rank.

MORTAL_FORGETS in the environment names what it leaves out, which must change the result.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import mortal
import nccl_double
import numpy as np
from device_double import CapturedNccl, device
from strict_array import strict, synchronisation

from distrib.comm import choice, world
from distrib.faults.watchdog import Watchdog
from distrib.graph import Graphs
from distrib.snapshots import Snapshots


def install(backend: Any) -> None:
    """Let the trainer find the double, and one of NCCL over whoever lives."""
    strict.cuda, plain, ranks = backend.cuda, choice.device_transport, list[Any]()

    def device_transport(name: str, control_comm: Any, *more: Any) -> Any:
        ranks[:] = [control_comm]
        return plain(name, control_comm, *more)

    world.device_transport = device_transport
    choice.backends.cupy_backend = lambda *_: backend
    choice.import_nccl = lambda: CapturedNccl(ranks[0], backend.cuda, [])
    choice._devices = lambda *_: (0, [])


def restore_nothing(self: Snapshots) -> None:
    """`restore` that leaves the arrays as they are, and says how many of them are not what they were."""
    self._wait()
    copies, standing = self._whole
    with synchronisation():
        differ = [not np.array_equal(a.get(), b.get()) for a, b in zip(copies, self._arrays, strict=True)]
    print(f"{sum(differ)} of {len(differ)} arrays differ", flush=True)
    standing.apply(self._trainer)
    self._trainer.results.forget_unread()


def forget(what: str) -> None:
    """Leave out what makes the survivors' results right."""
    if what == "the arrays":
        Snapshots.restore = restore_nothing
    if what == "the loss":
        Watchdog.lost = property(lambda _: False, lambda *_: None)


if __name__ == "__main__":
    with device("float32") as backend:
        install(backend)
        mortal.mortal(nccl_double._NcclCommunicator, "run")
        mortal.mortal(Graphs, "capture")
        mortal.mortal(Snapshots, "take")
        forget(os.environ.get("MORTAL_FORGETS", ""))
        sys.exit(mortal.main())
