"""Ends ranks of this host that hang, where the others can go on without them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from distrib.faults.heartbeat import Heartbeats, is_dead
from distrib.faults.watchdog import print_error

if TYPE_CHECKING:
    from distrib.comm.world import Member, World


def end_hanging(world: World, still_waiting: Callable[[], bool]) -> None:
    """Kill the ranks of this host that keep the others waiting: those that are suspended.

    If none is, the one that its heartbeat blames, unless another rank has just killed one.
    """
    own = world.members[world.rank]
    here = [member for member in world.members if member.host == own.host and member != own]
    hanging = [member for member in here if is_suspended(member.pid)]
    if not hanging and not any(is_dead(member.pid) for member in here):
        hanging = _blamed(world, here)
    for member in hanging if still_waiting() else ():
        print_error(f"distrib: rank {member.number} on {member.host} hangs: killed, the others go on")
        with suppress(OSError):
            os.kill(member.pid, signal.SIGKILL)
        cause = f"it hung, and rank {own.number} killed it"
        world.watchdog.ask_heartbeats(partial(Heartbeats.fail_for, rank=member.number, cause=cause))


def is_suspended(pid: int) -> bool:
    """Whether a process of this host was stopped by a signal."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "Tt"
    return False


def _blamed(world: World, here: list[Member]) -> list[Member]:
    watchdog = world.watchdog
    number = watchdog.ask_heartbeats(lambda beats: beats.find_hanging(watchdog.publish))
    return [member for member in here if member.number == number]
