"""`distrib doctor`: what this machine offers the trainer, what is wrong with it, and the remedy.

MPI, CUDA and file systems may hang, and the first two may end the process that they are in. So a rank does
nothing but listen to a child of its own (`probe`), which tells before each check what it has found and what
comes next.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from threadpoolctl import threadpool_info

from distrib import __version__, launched_rank, launched_ranks
from distrib.comm.world import MULTI_RANK_NCCL, World, connect, import_mpi
from distrib.data import formats
from distrib.errors import EXIT_USAGE, UserError
from distrib.files import expanded, printable
from distrib.run.console import on_terminal
from launch.bench.sums import Values
from launch.machine import devices
from nn.cuda.backend import cupy_version, import_cupy

OK, WARNING, FAILURE = "ok", "warning", "failure"
STATES = {OK: "green", WARNING: "yellow", FAILURE: "bold red"}  # from good to bad
DIFFERING = dict.fromkeys(("Python", "BLAS", "CuPy", "NCCL", "cuDNN", "MPI library"), WARNING) | {
    "data": FAILURE
}
"""State of what the ranks should find alike and do not."""
ELEMENTS, REPEATS = 1 << 14, 20
LITTLE, TOO_LITTLE = 1 << 30, 100 << 20
"""Bytes of free disk. A checkpoint of the whole network with Adam takes 30 MB; to write it, as much again."""
ANSWER = 30.0
"""Seconds that `mpirun --version` may take: a busy machine is no broken one."""
MARK = "distrib-doctor "
LAST_WORDS = 5.0
"""Seconds to read on after the child's end: a process that it left behind may hold its output open for longer."""
MOST_SAID = 2000
"""Letters of a finding that are shown."""


class Finding(NamedTuple):
    """One line of the report; `look` fills in the name."""

    state: str
    found: str
    remedy: str = ""
    name: str = ""


class Facts(NamedTuple):
    """What a rank tells the others about its place."""

    host: str
    cores: list[int]
    threads: int
    mpi_size: int  # 0 without MPI
    gpus: list[str]
    nccl: int


def look(name: str, check: Callable[..., Finding], *args: Any) -> Finding:
    """What a check finds, whatever happens in it."""
    try:
        found = check(*args)
    except UserError as error:
        found = Finding(FAILURE, *parted(str(error)))
    except ImportError as error:
        found = Finding(FAILURE, str(error), "install the package again, with what it depends on")
    except Exception as error:
        found = Finding(FAILURE, f"{type(error).__name__}: {error}", "mend what the message names")
    return found._replace(name=name, remedy="" if found.state == OK else found.remedy)


def parted(message: str) -> tuple[str, str]:
    """(what is wrong, remedy) of an error message that ends in its remedy."""
    found, _, remedy = message.rpartition(": ")
    return (found, remedy) if found else (remedy, "see README.md")


def installed(*packages: str) -> str:
    """Name and version of the first of these packages that is there."""
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return f"{name} {metadata.version(name)}"
    return f"{packages[0]} not installed"


def version(text: str) -> str:
    """The first version number in a text."""
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return found[0] if found else "of unknown version"


def blas_pool() -> dict[str, Any]:
    """What threadpoolctl says of NumPy's BLAS; empty where it does not know it."""
    return next((pool for pool in threadpool_info() if pool["user_api"] == "blas"), {})


def blas() -> Finding:
    if pool := blas_pool():
        library = f"{pool['internal_api']} {pool.get('version')}"
        return Finding(OK, f"NumPy {np.__version__}, {library}, {pool['num_threads']} thread(s) a rank")
    return Finding(
        WARNING,
        f"NumPy {np.__version__}, its BLAS is not known",
        "install NumPy's wheel, which brings OpenBLAS",
    )


def data(folder: str | None) -> Finding:
    try:
        found = formats.load(folder)
    except UserError as error:
        return Finding(
            FAILURE,
            str(error),
            "copy the four files again, or leave --data out" if folder else "install the package again",
        )
    how = "not known to us" if folder else "as shipped"
    images = f"{len(found.train_images)} + {len(found.test_images)} images"
    return Finding(OK, f"{found.name}: {images}, SHA-256 {found.digest()[:12]}…, {how}")


def disk(run_dir: str) -> Finding:
    place = Path(run_dir).absolute()
    try:
        place = next(path for path in (place, *place.parents) if path.exists())
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(1 << 16))
        free = shutil.disk_usage(place).free
    except OSError as error:
        said = f"{place}: cannot be written ({error.strerror})"
        return Finding(FAILURE, said, "give --run-dir in a folder of yours on a disk with space")
    state = FAILURE if free < TOO_LITTLE else WARNING if free < LITTLE else OK
    return Finding(
        state, f"{free / 1e9:.1f} GB free at {place}", "free some, or give --run-dir on another disk"
    )


def driver() -> str:
    """Version of NVIDIA's driver; empty where there is none."""
    with contextlib.suppress(OSError):
        return version(Path("/proc/driver/nvidia/version").read_text())
    return ""


def cupy() -> Finding:
    try:
        runtime = import_cupy().cuda.runtime
    except RuntimeError as error:
        if not driver():
            return Finding(OK, f"{error}; nor is there a driver")
        remedy = "install distrib[cuda12] or distrib[cuda13], as the driver allows, or a newer driver"
        return Finding(WARNING, f"{error}, though there is a driver {driver()}", remedy)
    ours, drivers = (
        f"{number // 1000}.{number % 1000 // 10}"
        for number in (runtime.runtimeGetVersion(), runtime.driverGetVersion())
    )
    return Finding(OK, f"{cupy_version()} with CUDA {ours}; driver {driver()}, for CUDA {drivers}")


def gpus() -> Finding:
    found = (
        ", ".join(f"{name} {identity}" for name, identity in devices()) or "none visible, and none is needed"
    )
    limit = os.environ.get("CUDA_VISIBLE_DEVICES")
    return Finding(OK, found if limit is None else f"{found} (CUDA_VISIBLE_DEVICES={limit})")


@functools.cache
def nccl_number() -> int:
    """Version of the NCCL that CuPy finds, as NCCL writes it (23203); 0 without one, or without a GPU."""
    nccl = importlib.import_module("cupy.cuda.nccl") if devices() else None
    return int(nccl.get_version()) if nccl and nccl.available else 0


def nccl() -> Finding:
    number = nccl_number()
    if not devices():
        return Finding(OK, f"not needed without a GPU ({installed('nvidia-nccl-cu12', 'nvidia-nccl-cu13')})")
    if not number:
        return Finding(
            WARNING,
            "CuPy finds no NCCL library: ranks sum through the host",
            "pip install nvidia-nccl-cu12 (or -cu13)",
        )
    able = "can" if number >= MULTI_RANK_NCCL else "cannot"
    return Finding(
        OK,
        f"{number // 10000}.{number // 100 % 100}.{number % 100}, which {able} put several ranks on one GPU",
    )


def mpi_library() -> Finding:
    try:
        text = import_mpi().Get_library_version()
    except RuntimeError as error:
        return Finding(FAILURE if launched_ranks() > 1 else WARNING, *parted(str(error)))
    return Finding(OK, f"{family(text)} {version(text)}, {installed('mpi4py')}")


def family(text: str) -> str:
    """Whose MPI says this of itself; MPICH's descendants share its way of starting ranks."""
    words = {"Open MPI": r"Open ?MPI|OpenRTE|PRRTE|prte", "MPICH": r"MPICH|HYDRA|Intel|MVAPICH"}
    return next((name for name, word in words.items() if re.search(word, text)), "unknown MPI")


def launcher() -> Finding:
    found = f"{launched_ranks()} ranks were started" if launched_ranks() > 1 else "one process"
    mpirun, mpi = shutil.which("mpirun") or shutil.which("mpiexec"), sys.modules.get("mpi4py.MPI")
    if mpirun is None:
        state = OK if shutil.which("srun") or launched_ranks() > 1 else WARNING
        return Finding(
            state,
            f"{found}; no mpirun on the PATH",
            "put your MPI's bin folder there, or pip install 'distrib[mpi]'",
        )
    said = subprocess.run(
        [mpirun, "--version"], capture_output=True, text=True, timeout=ANSWER, errors="replace"
    ).stdout
    found += f"; {mpirun} is of {family(said)} {version(said)}"
    library = mpi.Get_library_version() if mpi else said
    same = family(library) == family(said) and (
        family(said) != "Open MPI" or version(library) == version(said)
    )
    found += "" if same else f", mpi4py's library of {family(library)} {version(library)}"
    return Finding(
        OK if same else WARNING, found, "put that library's mpirun first on the PATH, or use srun --mpi=pmix"
    )


def cudnn(world: World | None) -> Finding:
    frontend = installed("nvidia-cudnn-frontend")
    if not devices():
        return Finding(OK, f"not needed without a GPU ({frontend})")
    if form := world and world.backend.algorithms.get("cudnn"):
        return Finding(OK, f"{form.version}, {frontend}")
    why = (
        " ".join(world.backend.notes) or world.reason
        if world
        else "not looked at, as the ranks did not come together"
    )
    return Finding(
        WARNING, f"{why} ({frontend})", "pip install nvidia-cudnn-frontend nvidia-cudnn-cu12 (or -cu13)"
    )


def ranks(facts: list[Facts]) -> Finding:
    """This and what follows is found by all ranks together."""
    launched, size, tasks = launched_ranks(), facts[0].mpi_size, os.environ.get("SLURM_NTASKS", "")
    if launched > 1 and size < 2:
        remedy = (
            "use the mpirun of mpi4py's MPI library, or srun --mpi=pmix (srun --mpi=list tells what there is)"
        )
        return Finding(
            FAILURE,
            f"{launched} were started, and MPI sees {'1 in each' if size else 'none'}",
            remedy if size else "install MPI, as above",
        )
    if tasks.isdigit() and int(tasks) != len(facts):
        return Finding(
            WARNING,
            f"{len(facts)} rank(s), but SLURM_NTASKS={tasks}",
            f"start all: with srun, or mpirun -n {tasks}",
        )
    return Finding(OK, f"{len(facts)} rank(s)" + (f", as SLURM_NTASKS={tasks}" if tasks else ""))


def hosts(facts: list[Facts]) -> Finding:
    count = Counter(fact.host for fact in facts)
    found = ", ".join(f"{host} with {ranks} rank(s)" for host, ranks in count.items())
    state = OK if len(set(count.values())) == 1 else WARNING
    return Finding(
        state, found, "give each as many ranks (srun --ntasks-per-node): the fullest sets the pace"
    )


def threads(facts: list[Facts]) -> Finding:
    found, most = [], math.inf
    for host in dict.fromkeys(fact.host for fact in facts):
        own = [fact for fact in facts if fact.host == host]
        cores = len({core for fact in own for core in fact.cores})
        most_threads = max(fact.threads for fact in own)
        found.append(f"{len(own)} rank(s) × {most_threads} BLAS thread(s) on {cores} core(s) of {host}")
        if sum(fact.threads for fact in own) > cores or any(fact.threads > len(fact.cores) for fact in own):
            most = min(most, cores // len(own), *(len(fact.cores) for fact in own))
    remedy = f"set OMP_NUM_THREADS={most}" if most else "start a rank per core, or fewer"
    return Finding(OK if most == math.inf else WARNING, "; ".join(found), remedy)


def sharing(facts: list[Facts]) -> Finding:
    without = [str(rank) for rank, fact in enumerate(facts) if not fact.gpus]
    if without:
        state, found = (
            (OK, "no rank has a GPU")
            if len(without) == len(facts)
            else (WARNING, f"no GPU for rank {', '.join(without)}, so all take NumPy")
        )
        return Finding(state, found, "give each a GPU (srun --gpus-per-task=1)")
    local = [sum(other.host == fact.host for other in facts[:rank]) for rank, fact in enumerate(facts)]
    most = max(
        Counter((fact.host, fact.gpus[place % len(fact.gpus)]) for place, fact in zip(local, facts)).values()
    )
    able, allowed = (
        min(fact.nccl for fact in facts) >= MULTI_RANK_NCCL,
        os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1",
    )
    if most == 1 or (able and allowed):
        return Finding(
            OK,
            "every rank has its own"
            if most == 1
            else f"up to {most} ranks on one, as NCCL_MULTI_RANK_GPU_ENABLE=1 allows",
        )
    other = (
        "set NCCL_MULTI_RANK_GPU_ENABLE=1"
        if able
        else "install NCCL 2.30 or newer and set NCCL_MULTI_RANK_GPU_ENABLE=1"
    )
    return Finding(
        WARNING,
        f"up to {most} ranks on one, which sum through the host",
        f"start one rank per GPU, or {other}",
    )


def all_reduce(world: World) -> Finding:
    values, x, seconds = Values(world, "float32"), world.backend.xp.empty(ELEMENTS, "float32"), []
    for _ in range(REPEATS):
        values.fill(x)
        world.comm.barrier()
        begin = time.perf_counter()
        world.comm.all_reduce(x).wait()
        if world.backend.stream:
            world.backend.stream.synchronize()
        seconds.append(time.perf_counter() - begin)
    everyone = world.allgather(
        (values.compare(x, 1)[0], statistics.median(seconds)), "the results of the all-reduce"
    )
    how = f"{world.backend.name} and communicator {world.comm.name}"
    if bad := [f"{wrong} on rank {rank}" for rank, (wrong, _) in enumerate(everyone) if wrong]:
        return Finding(
            FAILURE,
            f"of {ELEMENTS} sums are wrong: {', '.join(bad)} ({how})",
            "find the broken link or library; until then --comm mpi",
        )
    slowest = max(seconds for _, seconds in everyone)
    return Finding(OK, f"{ELEMENTS} sums over {world.size} rank(s) right, {slowest * 1e6:.0f} µs, with {how}")


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

    os.environ |= {
        "MPI4PY_RC_INITIALIZE": "0",
        "MPI4PY_RC_FINALIZE": "1",
    }  # tell the library's name before it starts
    alone = {
        "Python": lambda: Finding(OK, f"{platform.python_version()}, distrib {__version__}"),
        "BLAS": blas,
        "data": lambda: data(folder),
        "disk": lambda: disk(run_dir),
        "CuPy": cupy,
        "GPUs": gpus,
        "NCCL": nccl,
        "MPI library": mpi_library,
        "launcher": launcher,
    }
    for name, check in alone.items():
        tell(f"the check of {name}")
        found.append(look(name, check))
    tell("the start of MPI")
    mpi, worlds = sys.modules.get("mpi4py.MPI"), list[World]()
    if mpi and launched_ranks() > 1:
        mpi.Init_thread()
    size = mpi.COMM_WORLD.Get_size() if mpi and mpi.Is_initialized() else 0
    own = Facts(
        socket.gethostname(),
        sorted(os.sched_getaffinity(0)),
        blas_pool().get("num_threads", 1),
        size,
        [gpu for _, gpu in devices()],
        nccl_number(),
    )

    def join() -> Finding:
        worlds.append(connect(timeout=timeout))
        return Finding(OK, "")

    tell("the choice of backend and communicator")
    joined, facts = look("all-reduce", join), [own]
    world = worlds[0] if worlds else None
    found.append(look("cuDNN", cudnn, world))
    if world:
        everyone = world.allgather((found, own), "the exchange of findings")
        found, facts = merge([lines for lines, _ in everyone]), [fact for _, fact in everyone]
    for name, together in {
        "ranks": ranks,
        "hosts": hosts,
        "threads": threads,
        "ranks on GPUs": sharing,
    }.items():
        found.append(look(name, together, facts))
    tell("the all-reduce")
    found.append(look("all-reduce", all_reduce, world) if world else joined)
    tell("the end of MPI")
    if world:
        world.comm.close()


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
    data: Annotated[str | None, typer.Option(help="Folder with the IDX files; without it, MNIST.")] = None,
    run_dir: Annotated[Path, typer.Option(help="Where a run would be kept.")] = Path("runs"),
    timeout: Annotated[
        float,
        typer.Option(
            help="Seconds to wait for another rank before giving up; all checks take at most twice as long."
        ),
    ] = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this machine for the trainer: alone, or on all ranks that mpirun or srun started.

    Exit code 2 if a check failed. Example: mpirun -n 2 distrib doctor
    """
    if not 0 < timeout < math.inf:
        raise UserError(f"--timeout {timeout:g}: give a finite number above 0")
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
