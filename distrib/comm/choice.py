"""Chooses a backend and a transport that all ranks can use."""

from __future__ import annotations

import os
import socket
import warnings
from typing import Any

from distrib.comm.agree import named
from distrib.comm.base import Transport, first_error
from distrib.comm.mpi import StagedCommunicator
from distrib.comm.nccl import NcclCommunicator
from distrib.errors import UserError
from distrib.faults.watchdog import Watchdog
from nn.cuda import backend as backends
from nn.device import NUMPY, Backend

HOST_NAMES, DEVICE_NAMES = ("auto", "none", "mpi"), ("auto", "mpi", "nccl")
"""Of --comm, by where the arrays lie: another name is refused there."""

MULTI_RANK_NCCL = 23000  # from NCCL 2.30 on, several ranks may share a GPU


def _local_rank(control_comm: Any) -> int:
    """Number of lower ranks on this host."""
    hosts = control_comm.allgather(socket.gethostname())
    return int(hosts[: control_comm.rank].count(hosts[control_comm.rank]))


def choose_backend(
    name: str, precision: str, control_comm: Any, held: Backend | None = None
) -> tuple[Backend, str]:
    """(backend, explanation): one that all ranks can use. UserError if it is not the one asked for.

    A rank that has `held` one keeps it, and so do all.
    """
    missing, local_rank = None, _local_rank(control_comm)
    if name != "numpy":
        try:
            gpu = held or backends.cupy_backend(precision, local_rank)
            missing = "the ranks began without" if gpu.on_host else None
        except RuntimeError as error:
            missing = str(error)
        except Exception as error:  # of this rank alone, perhaps: the others must hear of it
            missing = f"{type(error).__name__}: {error}"
    everyone = control_comm.allgather(missing)
    absent = next(
        (f"rank {rank}: {why}" if len(everyone) > 1 else why for rank, why in enumerate(everyone) if why),
        None,
    )
    if name == "cupy" and absent:
        raise UserError(f"--backend cupy: {absent}")
    if name == "numpy":
        chosen, why = NUMPY, "asked for"
    elif absent:
        chosen, why = NUMPY, absent
    else:
        chosen, why = gpu, "every rank has a GPU" if name == "auto" else "asked for"
    if chosen is NUMPY and precision in ("tf32", "bf16"):
        raise UserError(f"--precision {precision} needs a GPU ({why}): use float32 or float64")
    algorithms = control_comm.allgather(sorted(chosen.algorithms))
    if algorithms != algorithms[:1] * len(algorithms):
        odd = next(rank for rank, other in enumerate(algorithms) if other != algorithms[0])
        raise UserError(
            f"rank {odd} has the convolutions {', '.join(algorithms[odd])}, rank 0"
            f" {', '.join(algorithms[0])}: install the same libraries for all ranks"
        )
    if precision == "bf16" and "cudnn" not in chosen.algorithms:
        raise UserError(f"--precision bf16 needs cuDNN: {' '.join(chosen.notes)}")
    return chosen, why


def _devices(control_comm: Any, backend: Backend) -> tuple[int, list[int]]:
    """(this rank's device, the ranks that share one GPU: most of them first, or none)."""
    runtime = backend.xp.cuda.runtime
    device = int(runtime.getDevice())
    # both: CuPy cuts the UUID at a zero byte, and the parts of a divided GPU share the bus id
    identity = f"{runtime.deviceGetPCIBusId(device)} {runtime.getDeviceProperties(device)['uuid']!r}"
    places = control_comm.allgather((socket.gethostname(), identity))
    most = max(places, key=places.count)
    sharing = [rank for rank, place in enumerate(places) if place == most]
    return device, sharing if len(sharing) > 1 else []


def import_nccl() -> Any:
    """CuPy's module of NCCL; its `available` says whether the library was found."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy's warning has many lines, ours one
        from cupy.cuda import nccl
    return nccl


def _nccl(sharing: list[int]) -> tuple[Any, str | None]:
    """(CuPy's module of NCCL, why it cannot be used here)."""
    try:
        nccl = import_nccl()
        if not nccl.available:
            return None, "CuPy finds no NCCL library: pip install nvidia-nccl-cu12 (or -cu13)"
        version: int = nccl.get_version()
    except Exception as error:  # of this rank alone, perhaps: the others must hear of it
        return None, f"CuPy cannot load NCCL ({type(error).__name__}: {error})"
    may_share = version >= MULTI_RANK_NCCL and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"
    if sharing and not may_share:
        return nccl, (
            f"{named(sharing)} share one GPU, which takes NCCL 2.30 (found {version}) and"
            " NCCL_MULTI_RANK_GPU_ENABLE=1: start one rank per GPU, or use --comm mpi"
        )
    return nccl, None


def device_transport(
    name: str, control_comm: Any, backend: Backend, watchdog: Watchdog
) -> tuple[Transport, str]:
    """(transport, explanation): NCCL if all ranks can use it, else MPI through the host."""
    device, sharing = _devices(control_comm, backend)
    nccl, here = _nccl(sharing)
    missing = first_error(control_comm.allgather(here))
    if name not in DEVICE_NAMES:
        raise UserError(f"--comm {name} is for hosts: add --backend numpy")
    if name == "mpi" or (name == "auto" and missing):
        return StagedCommunicator(
            control_comm, watchdog, backend, duplicate=not watchdog.elastic
        ), f"; no NCCL: {missing}" if missing else ""
    if missing:
        raise UserError(f"--comm nccl: {missing}")
    return NcclCommunicator(
        control_comm,
        backend.xp.cuda,
        nccl,
        device,
        watchdog,
        lambda: backend.xp.zeros(1, "float32"),
        backend.side_stream,
    ), ""
