"""From what the machine offers to ranks, a backend and a communicator: agreed on by all ranks."""

from __future__ import annotations

import atexit
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from distrib import launched_ranks
from distrib.comm.base import Communicator, SingleCommunicator, SingleControl
from distrib.errors import UserError
from distrib.faults.watchdog import Watchdog, abort_on_crash, kill_after
from nn.cuda import backend as backends
from nn.device import NUMPY, Backend

SLOW_IO_FACTOR = 10
"""Timeouts that the ranks wait for work of rank 0 alone, such as writing to a slow shared disk."""

MULTI_RANK_NCCL = 23000  # from NCCL 2.30 on, several ranks may share a GPU


@dataclass
class World:
    """Everything that depends on who else is running. Nothing outside keeps a communicator or a rank."""

    comm: Communicator
    control: Any
    backend: Backend
    reason: str
    watchdog: Watchdog
    hosts: list[str]

    @property
    def comm_version(self) -> dict[str, str]:
        """The library that sums, where its version may change the order of a sum."""
        version = getattr(self.comm, "version", None)
        return {self.comm.name: str(version)} if version else {}

    @property
    def rank(self) -> int:
        return self.comm.rank

    @property
    def size(self) -> int:
        return self.comm.size

    @contextmanager
    def fail_together(self, timeouts: float = 1) -> Iterator[None]:
        """Turn a UserError of one rank into the same UserError on all ranks.

            with world.fail_together():
                ...  # may raise on any rank

        Every rank must enter it; none continues if another failed. The ranks wait up to `timeouts` timeouts
        for each other.
        """
        message: str | None = None
        try:
            yield
        except UserError as error:
            message = str(error)
        found = self.allgather(message, "the errors of all ranks", timeouts)
        for rank, text in enumerate(found):
            if text is not None:
                where = "" if rank == 0 or all(found) else f" (rank {rank})"
                raise UserError(f"{text}{where}")

    def broadcast(self, value: Any, what: str) -> Any:
        """Rank 0's `value`, on every rank."""
        with self.watchdog.waiting(what):
            return self.control.bcast(value, root=0)

    def allgather(self, value: Any, what: str, timeouts: float = 1) -> list[Any]:
        """`value` of every rank, by rank. The ranks wait up to `timeouts` timeouts for each other."""
        with self.watchdog.waiting(what, timeouts):
            return list(self.control.allgather(value))


MPI_INIT_SECONDS = 300
"""MPI_Init of a large job may take minutes; after these it hangs."""


def import_mpi() -> Any:
    """`mpi4py.MPI`; RuntimeError in one line where it or an MPI library is missing. The import calls
    MPI_Init."""
    os.environ.setdefault("OMPI_MCA_btl", "^ofi,uct")  # a second less in MPI_Init
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")  # more ranks than cores must not starve
    if "mpi4py.MPI" in sys.modules:
        return sys.modules["mpi4py.MPI"]
    try:
        with kill_after(MPI_INIT_SECONDS, "MPI_Init"):
            from mpi4py import MPI
    except ImportError as error:
        raise RuntimeError(f"mpi4py is not installed ({error}): pip install mpi4py") from None
    except RuntimeError as error:  # mpi4py without a library says so in many lines
        first = str(error).strip().splitlines()[0]
        raise RuntimeError(f"no MPI library ({first}): install your system's, or 'distrib[mpi]'") from None
    return MPI


def end_mpi(mpi: Any, seconds: float) -> None:
    """MPI_Finalize, which waits for all ranks: the process ends after `seconds` all the same."""
    if not mpi.Is_finalized():
        with kill_after(seconds, "MPI_Finalize"):
            mpi.Finalize()


def _control(comm: str) -> tuple[Any, str]:
    """The communicator for control traffic, and why: MPI_COMM_WORLD where there is more than this process."""
    launched = launched_ranks()
    if comm == "none" and launched > 1:  # a shell inside srun -n 4 --pty, say
        return (
            SingleControl(),
            f"one process, as --comm none asks, though the launcher counts {launched} ranks",
        )
    if comm in ("auto", "none") and launched == 1:
        return SingleControl(), "one process: no mpirun or srun started more"
    try:
        mpi = import_mpi()
    except RuntimeError as error:
        raise UserError(f"--comm {comm} with {launched} ranks: {error}") from None
    world = mpi.COMM_WORLD
    if world.Get_size() == 1 and launched > 1:
        raise UserError(
            f"{launched} ranks were started but MPI sees 1 in each: launcher and MPI library do not match;"
            " use the mpirun of this MPI library, or srun --mpi=pmix; for one process alone give --comm none"
        )
    return world, f"{world.Get_size()} ranks over MPI"


def _local_rank(control: Any) -> int:
    """How many lower ranks are on this host."""
    hosts = control.allgather(socket.gethostname())
    return int(hosts[: control.rank].count(hosts[control.rank]))


def _choose_backend(name: str, precision: str, control: Any) -> tuple[Backend, str]:
    """The backend that all ranks can have, and why."""
    missing, local_rank = None, _local_rank(control)
    if name != "numpy":
        try:
            cupy = backends.cupy_backend(precision, local_rank)
        except RuntimeError as error:
            missing = str(error)
    everyone = control.allgather(missing)
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
        chosen, why = cupy, "every rank has a GPU" if name == "auto" else "asked for"
    if chosen is NUMPY and precision in ("tf32", "bf16"):
        raise UserError(f"--precision {precision} needs a GPU ({why}): use float32 or float64")
    forms = control.allgather(sorted(chosen.algorithms))
    if forms != forms[:1] * len(forms):
        odd = next(rank for rank, other in enumerate(forms) if other != forms[0])
        raise UserError(
            f"rank {odd} has the convolutions {', '.join(forms[odd])}, rank 0 {', '.join(forms[0])}: install"
            " the same libraries for all ranks"
        )
    if precision == "bf16" and "cudnn" not in chosen.algorithms:
        raise UserError(f"--precision bf16 needs cuDNN: {' '.join(chosen.notes)}")
    return chosen, why


def _devices(control: Any, backend: Backend) -> tuple[int, int]:
    """(this rank's device, most ranks on any one GPU)."""
    runtime = backend.xp.cuda.runtime
    device = int(runtime.getDevice())
    # CuPy cuts the UUID at a zero byte; the bus alone is shared by the parts of a divided GPU
    identity = f"{runtime.deviceGetPCIBusId(device)} {runtime.getDeviceProperties(device)['uuid']!r}"
    places = control.allgather((socket.gethostname(), identity))
    return device, max(places.count(place) for place in places)


def _device_communicator(
    name: str, control: Any, backend: Backend, watchdog: Watchdog
) -> tuple[Communicator, str]:
    """NCCL where every rank has its own GPU or NCCL can share one, else MPI through the host; and why not
    NCCL."""
    from distrib.comm.mpi import StagedCommunicator

    device, sharing = _devices(control, backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy warns in many lines; ours is one
        from cupy.cuda import nccl
    version: int = 0
    missing: str | None = "CuPy finds no NCCL library: pip install nvidia-nccl-cu12 (or -cu13)"
    if nccl.available:
        version, missing = nccl.get_version(), None
    may_share = version >= MULTI_RANK_NCCL and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"
    if sharing > 1 and not missing and not may_share:
        missing = (
            f"{sharing} ranks share one GPU, which takes NCCL 2.30 (found {version}) and"
            " NCCL_MULTI_RANK_GPU_ENABLE=1: start one rank per GPU, or use --comm mpi"
        )
    missing = next((why for why in control.allgather(missing) if why), None)
    if name == "mpi" or (name == "auto" and missing):
        return StagedCommunicator(control, watchdog, backend), f"; no NCCL: {missing}" if missing else ""
    if missing:
        raise UserError(f"--comm nccl: {missing}")
    from distrib.comm.nccl import NcclCommunicator

    return NcclCommunicator(
        control,
        backend.xp.cuda,
        nccl,
        device,
        watchdog,
        lambda: backend.xp.zeros(1, "float32"),
        backend.side_stream,
    ), ""


def connect(
    comm: str = "auto", backend: str = "auto", precision: str = "float32", timeout: float = 60.0
) -> World:
    """Join the other ranks and choose backend and communicator.

    `comm` and `backend` as on the command line. UserError, the same on every rank, where what was asked
    for by name cannot be had.
    """
    control, ranks = _control(comm)
    single = isinstance(control, SingleControl)
    rank = 0 if single else int(control.Get_rank())
    watchdog = Watchdog(rank, timeout)
    if not single:
        abort_on_crash(watchdog, lambda: control.Abort(1))
        atexit.register(
            end_mpi, import_mpi(), SLOW_IO_FACTOR * timeout
        )  # rank 0 may still be writing a checkpoint
    with watchdog.waiting("the choice of backend and communicator"):
        everyone = control.allgather((comm, backend, precision))
        for other, asked in enumerate(everyone):
            for option, wanted, first in zip(
                ("comm", "backend", "precision"), asked, everyone[0], strict=True
            ):
                if wanted != first:
                    raise UserError(
                        f"rank {other} was started with --{option} {wanted}, rank 0 with {first}: start all"
                        " ranks alike"
                    )
        chosen, why = _choose_backend(backend, precision, control)
        communicator: Communicator
        if chosen.on_host and comm == "nccl":
            raise UserError(
                f"--comm nccl needs a GPU: {why}"
                if why != "asked for"
                else "--comm nccl needs --backend cupy"
            )
        if single:
            communicator = SingleCommunicator()
        elif chosen.on_host:
            from distrib.comm.mpi import MpiCommunicator

            communicator = MpiCommunicator(control, watchdog)
        else:
            communicator, note = _device_communicator(comm, control, chosen, watchdog)
            ranks += note
        hosts = control.allgather(socket.gethostname())
    reason = f"backend {chosen.name} ({why}), communicator {communicator.name} ({ranks})"
    return World(communicator, control, chosen, reason, watchdog, hosts)
