"""What `distrib doctor` checks on all ranks together: their number, hosts, threads, GPUs, an all-reduce."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections import Counter

from distrib import launched_ranks
from distrib.comm.choice import MULTI_RANK_NCCL
from distrib.comm.world import World
from launch.bench.sums import Values
from launch.checks import FAILURE, OK, WARNING, Facts, Finding

ELEMENTS, REPEATS = 1 << 14, 20


def ranks(facts: list[Facts]) -> Finding:
    """Whether MPI sees all ranks that were started."""
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
        world.transport.barrier()
        begin = time.perf_counter()
        world.transport.all_reduce(x).wait()
        if world.backend.stream:
            world.backend.stream.synchronize()
        seconds.append(time.perf_counter() - begin)
    everyone = world.allgather(
        (values.compare(x, 1)[0], statistics.median(seconds)), "the results of the all-reduce"
    )
    how = f"{world.backend.name} and communicator {world.transport.name}"
    if bad := [f"{wrong} on rank {rank}" for rank, (wrong, _) in enumerate(everyone) if wrong]:
        return Finding(
            FAILURE,
            f"of {ELEMENTS} sums are wrong: {', '.join(bad)} ({how})",
            "find the broken link or library; until then --comm mpi",
        )
    slowest = max(seconds for _, seconds in everyone)
    return Finding(OK, f"{ELEMENTS} sums over {world.size} rank(s) right, {slowest * 1e6:.0f} µs, with {how}")
