"""`distrib doctor`: what this machine offers the trainer, what is wrong with it, and the remedy.

MPI, CUDA and file systems may hang, and the first two may end the process that they are in. So a rank does
nothing but listen to a child of its own (`probe`), which tells before each check what it has found and what
comes next.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distrib import __version__, launched_rank, launched_ranks
from distrib.comm.world import World, connect
from distrib.errors import EXIT_USAGE
from distrib.files import expanded, printable
from distrib.run.console import on_terminal
from launch import checks
from launch import checks_together as together
from launch.checks import FAILURE, OK, WARNING, Facts, Finding, look
from launch.entry import positive
from launch.machine import devices

STATES = {OK: "green", WARNING: "yellow", FAILURE: "bold red"}  # from good to bad
DIFFERING = dict.fromkeys(("Python", "BLAS", "CuPy", "NCCL", "cuDNN", "MPI library"), WARNING) | {
    "data": FAILURE
}
"""State of what the ranks should find alike and do not."""
MARK = "distrib-doctor "
LAST_WORDS = 5.0
"""Seconds to read on after the child's end: what it left behind may hold its output open for longer."""
MOST_SAID = 2000
"""Letters of a finding that are shown."""


def merge(everyone: list[list[Finding]]) -> list[Finding]:
    """One finding a check: the worst state of all ranks, and who found what where that differs."""
    merged = []
    for same in zip(*everyone):
        worst = max(same, key=lambda finding: list(STATES).index(finding.state))
        texts: dict[str, list[str]] = {}
        for rank, finding in enumerate(same):
            texts.setdefault(finding.found, []).append(str(rank))
        if len(texts) > 1:
            worst = worst._replace(
                found="; ".join(f"rank {', '.join(who)}: {text}" for text, who in texts.items())
            )
            if worst.state == OK and worst.name in DIFFERING:
                worst = worst._replace(
                    state=DIFFERING[worst.name], remedy=f"give all ranks the same {worst.name}"
                )
        merged.append(worst)
    return merged


def probe(timeout: float, folder: str | None, run_dir: str) -> None:
    """Run all checks; tell what was found before each of them and at the end."""
    found: list[Finding] = []

    def tell(doing: str) -> None:
        print(f"\n{MARK}{json.dumps([doing, found])}", flush=True)

    # so that the library's name is told before it starts
    os.environ |= {"MPI4PY_RC_INITIALIZE": "0", "MPI4PY_RC_FINALIZE": "1"}
    alone = {
        "Python": lambda: Finding(OK, f"{platform.python_version()}, distrib {__version__}"),
        "BLAS": checks.blas,
        "data": lambda: checks.data(folder),
        "disk": lambda: checks.disk(run_dir),
        "CuPy": checks.cupy,
        "GPUs": checks.gpus,
        "NCCL": checks.nccl,
        "MPI library": checks.mpi_library,
        "launcher": checks.launcher,
    }
    for name, check in alone.items():
        tell(f"the check of {name}")
        found.append(look(name, check))
    tell("the start of MPI")
    own, worlds = facts_here(), list[World]()

    def join() -> Finding:
        worlds.append(connect(timeout=timeout))
        return Finding(OK, "")

    tell("the choice of backend and communicator")
    joined, facts = look("all-reduce", join), [own]
    world = worlds[0] if worlds else None
    found.append(look("cuDNN", checks.cudnn, world))
    if world:
        everyone = world.allgather((found, own), "the exchange of findings")
        found, facts = merge([lines for lines, _ in everyone]), [fact for _, fact in everyone]
    for name, of_all in {
        "ranks": together.ranks,
        "hosts": together.hosts,
        "threads": together.threads,
        "ranks on GPUs": together.sharing,
    }.items():
        found.append(look(name, of_all, facts))
    tell("the all-reduce")
    found.append(look("all-reduce", together.all_reduce, world) if world else joined)
    tell("the end of MPI")
    if world:
        world.transport.close()


def facts_here() -> Facts:
    """What this rank tells the others of its place; it starts MPI where a launcher started several."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi and launched_ranks() > 1:
        mpi.Init_thread()
    return Facts(
        host=socket.gethostname(),
        cores=sorted(os.sched_getaffinity(0)),
        threads=checks.blas_pool().get("num_threads", 1),
        mpi_size=mpi.COMM_WORLD.Get_size() if mpi and mpi.Is_initialized() else 0,
        gpus=[gpu for _, gpu in devices()],
        nccl=checks.nccl_number(),
    )


def ask(timeout: float, folder: str | None, run_dir: str) -> list[Finding]:
    """What a child of this process finds, and whether it lived to say so."""
    arguments = f"{timeout!r}, {folder!r}, {run_dir!r}"
    code = f"import sys; sys.path[:] = {sys.path!r}; from launch.doctor import probe; probe({arguments})"
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        close_fds=False,  # a launcher may have left us an open socket
    )
    doing, found, said, why = "the start of Python", [], "", ""

    def listen() -> None:
        nonlocal doing, found, said
        with contextlib.closing(child.stdout or io.StringIO()) as lines:
            for line in lines:
                if line.startswith(MARK):
                    with contextlib.suppress(ValueError):  # cut off where the child died
                        doing, told = json.loads(line.removeprefix(MARK))
                        found = [Finding(*each) for each in told]
                else:
                    said = line.strip(" -=*\n") or said  # libraries frame their last words

    thread = threading.Thread(target=listen, daemon=True)
    try:
        thread.start()
        child.wait(2 * timeout)  # the child's own watchdog, which says more, comes first
        thread.join(LAST_WORDS)
        if child.returncode:
            dead = child.returncode < 0
            why = signal.Signals(-child.returncode).name if dead else f"exit code {child.returncode}"
    except subprocess.TimeoutExpired:
        why = f"no answer after {2 * timeout:g} s"
    except KeyboardInterrupt:
        why = "interrupted: the launcher ends a job in which a rank has failed"
    child.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # one that a dead disk holds
        child.wait(1)
    if not why:
        return found
    remedy = (
        "read what other ranks say; all need one MPI library; under srun --mpi=pmix is for Open MPI,"
        " --mpi=pmi2 for MPICH"
    )
    return [*found, Finding(FAILURE, f"{doing}: {why}" + (f": {said}" if said else ""), remedy, "outcome")]


def show(findings: list[Finding]) -> None:
    """The report as a table."""
    console = Console(
        highlight=False, force_terminal=on_terminal(), width=None if on_terminal() else 200
    )  # a log file has no width
    table = Table(show_header=False, box=None, pad_edge=False)
    for state, found, remedy, name in findings:
        said = printable(found, MOST_SAID) + (f"\n→ {printable(remedy)}" if remedy else "")
        table.add_row(Text(state, STATES[state]), name, Text(said))
    with console.capture() as text:
        console.print(table)
    print("\n".join(line.rstrip() for line in text.get().splitlines()), flush=True)


def doctor(
    data: Annotated[str | None, typer.Option(help="Data set, as for training; without it, MNIST.")] = None,
    run_dir: Annotated[Path, typer.Option(help="Where a run would be kept.")] = Path("runs"),
    timeout: Annotated[
        float,
        positive(
            "--timeout",
            "Seconds to wait for another rank before giving up; all checks take at most twice that.",
        ),
    ] = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this machine for the trainer: alone, or on all ranks that mpirun or srun started.

    Exit code 2 if a check failed. Example: mpirun -n 2 distrib doctor
    """
    # with SIGTERM mpirun ends the job; there is time for the report
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    findings = ask(timeout, data, str(expanded(str(run_dir), "--run-dir")))
    # rank 0 speaks for all, and its exit code is the job's: one of ours would end the job before it spoke
    if launched_rank() > 0:
        if findings[-1].state == FAILURE:
            said = printable(findings[-1].found, MOST_SAID)
            rank = f"rank {launched_rank()} on {socket.gethostname()}"
            print(f"distrib doctor: {rank}: {said}", file=sys.stderr, flush=True)
        return
    if as_json:
        print(
            json.dumps([{"name": finding.name} | finding._asdict() for finding in findings], indent=2),
            flush=True,
        )
    else:
        show(findings)
    raise typer.Exit(EXIT_USAGE if any(finding.state == FAILURE for finding in findings) else 0)
