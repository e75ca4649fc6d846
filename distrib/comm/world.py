"""Joins the ranks, and chooses a backend and a communicator that all of them can use."""

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
    """This rank's place among all ranks, and how it reaches them.

    `transport` moves the trainer's arrays; `control_comm` (mpi4py's, or `SingleControl`) exchanges small
    Python objects. `hosts`
    has the host of each rank. `choice_explanation` says why backend and communicator were chosen.
    """

    transport: Communicator
    control_comm: Any
    backend: Backend
    choice_explanation: str
    watchdog: Watchdog
    hosts: list[str]

    @property
    def comm(self) -> Communicator:
        return self.transport

    @property
    def comm_version(self) -> dict[str, str]:
        """{library: version} of the communicator, if it may change the order of a sum."""
        return {self.transport.name: self.transport.version} if self.transport.version else {}

    @property
    def rank(self) -> int:
        return self.transport.rank

    @property
    def size(self) -> int:
        return self.transport.size

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.transport.close()

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
            return self.control_comm.bcast(value, root=0)

    def allgather(self, value: Any, what: str, timeouts: float = 1) -> list[Any]:
        """`value` of every rank, by rank. The ranks wait up to `timeouts` timeouts for each other."""
        with self.watchdog.waiting(what, timeouts):
            return list(self.control_comm.allgather(value))


MPI_INIT_SECONDS = 300
"""MPI_Init of a large job may take minutes. After this long it is considered hung."""


def import_mpi() -> Any:
    """Import `mpi4py.MPI`, which calls MPI_Init. RuntimeError in one line if it cannot be imported."""
    os.environ.setdefault("OMPI_MCA_btl", "^ofi,uct")  # saves a second in MPI_Init
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")  # more ranks than cores must not starve
    if "mpi4py.MPI" in sys.modules:
        return sys.modules["mpi4py.MPI"]
    try:
        with kill_after(MPI_INIT_SECONDS, "MPI_Init"):
            from mpi4py import MPI
    except ImportError as error:
        raise RuntimeError(f"mpi4py is not installed ({error}): pip install mpi4py") from None
    except RuntimeError as error:  # mpi4py reports a missing library in many lines
        first = str(error).strip().splitlines()[0]
        raise RuntimeError(f"no MPI library ({first}): install your system's, or 'distrib[mpi]'") from None
    return MPI


def end_mpi(mpi: Any, seconds: float) -> None:
    """Call MPI_Finalize, which waits for all ranks; kill this process if it takes longer than `seconds`."""
    if not mpi.Is_finalized():
        with kill_after(seconds, "MPI_Finalize"):
            mpi.Finalize()


def _join(comm: str) -> tuple[Any, str]:
    """(control communicator, explanation): MPI_COMM_WORLD if there is more than this process."""
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


def _local_rank(control_comm: Any) -> int:
    """Number of lower ranks on this host."""
    hosts = control_comm.allgather(socket.gethostname())
    return int(hosts[: control_comm.rank].count(hosts[control_comm.rank]))


def _choose_backend(name: str, precision: str, control_comm: Any) -> tuple[Backend, str]:
    """(backend, explanation): one that all ranks can use. UserError if it is not the one asked for."""
    missing, local_rank = None, _local_rank(control_comm)
    if name != "numpy":
        try:
            cupy = backends.cupy_backend(precision, local_rank)
        except RuntimeError as error:
            missing = str(error)
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
        chosen, why = cupy, "every rank has a GPU" if name == "auto" else "asked for"
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


def _devices(control_comm: Any, backend: Backend) -> tuple[int, int]:
    """(this rank's device, the largest number of ranks on one GPU)."""
    runtime = backend.xp.cuda.runtime
    device = int(runtime.getDevice())
    # both: CuPy cuts the UUID at a zero byte, and the parts of a divided GPU share the bus id
    identity = f"{runtime.deviceGetPCIBusId(device)} {runtime.getDeviceProperties(device)['uuid']!r}"
    places = control_comm.allgather((socket.gethostname(), identity))
    return device, max(places.count(place) for place in places)


def _device_communicator(
    name: str, control_comm: Any, backend: Backend, watchdog: Watchdog
) -> tuple[Communicator, str]:
    """(communicator, explanation): NCCL if all ranks can use it, else MPI through the host."""
    from distrib.comm.mpi import StagedCommunicator

    device, sharing = _devices(control_comm, backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy's warning has many lines, ours one
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
    missing = next((why for why in control_comm.allgather(missing) if why), None)
    if name == "mpi" or (name == "auto" and missing):
        return StagedCommunicator(control_comm, watchdog, backend), f"; no NCCL: {missing}" if missing else ""
    if missing:
        raise UserError(f"--comm nccl: {missing}")
    from distrib.comm.nccl import NcclCommunicator

    return NcclCommunicator(
        control_comm,
        backend.xp.cuda,
        nccl,
        device,
        watchdog,
        lambda: backend.xp.zeros(1, "float32"),
        backend.side_stream,
    ), ""


def _check_same_options(control_comm: Any, options: dict[str, str]) -> None:
    """UserError if a rank was started with other `options` than rank 0."""
    everyone = control_comm.allgather(options)
    for rank, theirs in enumerate(everyone):
        for option, value in theirs.items():
            if value != everyone[0][option]:
                raise UserError(
                    f"rank {rank} was started with --{option} {value}, rank 0 with {everyone[0][option]}:"
                    " start all ranks with the same options"
                )


def connect(
    comm: str = "auto", backend: str = "auto", precision: str = "float32", timeout: float = 60.0
) -> World:
    """Join the other ranks and choose backend and communicator, given the options of the command line.

    Raises the same UserError on every rank if an option asks for something that is not available, or if the
    ranks were started with different options.
    """
    control_comm, ranks = _join(comm)
    single = isinstance(control_comm, SingleControl)
    rank = 0 if single else int(control_comm.Get_rank())
    watchdog = Watchdog(rank, timeout)
    if not single:
        abort_on_crash(watchdog, lambda: control_comm.Abort(1))
        atexit.register(
            end_mpi, import_mpi(), SLOW_IO_FACTOR * timeout
        )  # while rank 0 may still write a checkpoint
    with watchdog.waiting("the choice of backend and communicator"):
        _check_same_options(control_comm, {"comm": comm, "backend": backend, "precision": precision})
        chosen, why = _choose_backend(backend, precision, control_comm)
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

            communicator = MpiCommunicator(control_comm, watchdog)
        else:
            communicator, note = _device_communicator(comm, control_comm, chosen, watchdog)
            ranks += note
        hosts = control_comm.allgather(socket.gethostname())
    explanation = f"backend {chosen.name} ({why}), communicator {communicator.name} ({ranks})"
    return World(communicator, control_comm, chosen, explanation, watchdog, hosts)
