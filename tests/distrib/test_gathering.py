"""Ranks that die while objects are gathered: whoever is left hears of it, and never gets other objects."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import LIMIT, ROOT, environment

PROGRAM = """
import os, signal, threading, time
from distrib.comm.meeting import Meeting, require_support
from distrib.comm.mpi import is_loss
from distrib.comm.start import import_mpi
from distrib.faults.watchdog import Watchdog

require_support()
world = import_mpi().COMM_WORLD
number, deaths = world.Get_rank(), 0
meeting = Meeting(world, Watchdog(number, 60, True))
while deaths < 3:
    control, i, deaths = meeting.control, 0, deaths + 1
    if control.rank == deaths % control.size:  # from a thread, in the middle of a call
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGKILL)).start()
    try:
        numbers = control.allgather(number)
        while True:
            assert control.allgather((number, i)) == [(each, i) for each in numbers]
            i += 1
    except Exception as error:
        if not is_loss(error):
            print(f"rank {number}: {error!r}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    meeting = meeting.again()
print("left:", meeting.control.allgather(number), flush=True)
"""


def test_what_is_gathered_is_whole(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    mpirun = Path(sys.executable).with_name("mpirun")
    start = [str(mpirun) if mpirun.exists() else "mpirun", "--with-ft", "ulfm", "-n", "5"]
    done = subprocess.run(
        [*start, sys.executable, str(tmp_path / "program.py")],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.stdout.splitlines() == ["left: [2, 4]"] * 2, done.stdout + done.stderr
