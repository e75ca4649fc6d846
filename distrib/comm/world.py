"""Joins the ranks: starts MPI where nobody has, and connects them by what all of them can use."""

from __future__ import annotations

import atexit
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from distrib import launched_ranks
from distrib.comm.base import SingleCommunicator, SingleControl, Transport, first_error
from distrib.comm.choice import choose_backend, device_transport
from distrib.comm.library import Comm
from distrib.comm.mpi import MpiCommunicator, free
from distrib.config import CHOICES
from distrib.errors import OnAllRanks, UserError
from distrib.faults.watchdog import Watchdog, abort_on_crash, kill_after
from nn.device import Backend

SLOW_IO_FACTOR = 10
"""Timeouts that the ranks wait for work of rank 0 alone, such as writing to a slow shared disk."""


@dataclass
class World:
    """This rank's place among all ranks, and how it reaches them; `connect` makes it.

    `comm` is for your own arrays, NumPy's or CuPy's; `transport` moves the trainer's, unchecked.
    `control_comm` (mpi4py's, or `SingleControl`) exchanges small Python objects. `hosts` has the host of each
    rank. `choice_explanation` says why backend and communicator were chosen. `host` is the transport of NumPy
    arrays where `transport` is a device's. `resources` releases all of them.

        with connect() as world:
            world.comm.all_reduce(x).wait()

    An error that all ranks have (UserError, OnAllRanks) closes the world. With another one, of this rank
    alone, it stays open, so that the crash of this rank ends the others.
    """

    transport: Transport
    control_comm: Any
    backend: Backend
    choice_explanation: str
    watchdog: Watchdog
    hosts: list[str]
    host: Transport | None = None
    resources: ExitStack = field(default_factory=ExitStack, repr=False)

    @cached_property
    def comm(self) -> Comm:
        """Collectives on your own arrays. Nothing is sent by reading it."""
        device = None if self.backend.on_host else self.transport
        host = self.transport if self.backend.on_host else self.host
        return Comm(self.control_comm, host, device, self.backend, self.watchdog)

    def close(self) -> None:
        """Wait for what is pending in `comm`, then release all that `connect` made. Every rank calls it.

        A second call does nothing. MPI itself stays up, for the next `connect`.
        """
        self.comm.close()
        self.resources.close()

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or self.size == 1 or issubclass(kind, (UserError, OnAllRanks)):
            self.close()

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
        if text := first_error(found, name_rank_0=False):
            raise UserError(text)

    def broadcast(self, value: Any, what: str) -> Any:
        """Rank 0's `value`, on every rank."""
        with self.watchdog.waiting(what):
            return self.control_comm.bcast(value, root=0)

    def allgather(self, value: Any, what: str, timeouts: float = 1) -> list[Any]:
        """`value` of every rank, by rank. The ranks wait up to `timeouts` timeouts for each other."""
        with self.watchdog.waiting(what, timeouts):
            return list(self.control_comm.allgather(value))


LEAST_MPI_INIT, MPI_INIT_TIMEOUTS = 60, 5
"""MPI_Init is considered hung after so many seconds and so many timeouts: in a large job it takes long."""

_mpi_is_ours = False  # whether this module started MPI, not the program before


def import_mpi(timeout: float = 60.0) -> Any:
    """Import `mpi4py.MPI`, which calls MPI_Init. RuntimeError in one line if it cannot be imported."""
    global _mpi_is_ours
    os.environ.setdefault("OMPI_MCA_btl", "^ofi,uct")  # saves a second in MPI_Init
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")  # more ranks than cores must not starve
    if "mpi4py.MPI" in sys.modules:
        return sys.modules["mpi4py.MPI"]
    try:
        with kill_after(max(LEAST_MPI_INIT, MPI_INIT_TIMEOUTS * timeout), "MPI_Init"):
            from mpi4py import MPI
    except ImportError as error:
        raise RuntimeError(f"mpi4py is not installed ({error}): pip install mpi4py") from None
    except RuntimeError as error:  # mpi4py reports a missing library in many lines
        first = str(error).strip().splitlines()[0]
        raise RuntimeError(f"no MPI library ({first}): install your system's, or 'distrib[mpi]'") from None
    _mpi_is_ours = True
    return MPI


def end_mpi(mpi: Any, seconds: float) -> None:
    """Call MPI_Finalize, which waits for all ranks; kill this process if it takes longer than `seconds`."""
    if not mpi.Is_finalized():
        with kill_after(seconds, "MPI_Finalize"):
            mpi.Finalize()


def _started_ranks() -> int:
    """Number of ranks that a launcher started, as its variables say or an MPI that is already up."""
    mpi = sys.modules.get("mpi4py.MPI")
    up = mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized()
    return max(launched_ranks(), mpi.COMM_WORLD.Get_size() if mpi and up else 1)


def _given(comm: Any) -> tuple[Any, str]:
    """`_join` on a caller's mpi4py communicator."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not isinstance(comm, mpi.Comm):
        raise UserError(f"comm {comm!r}: give {', '.join(CHOICES['comm'])}, or an mpi4py communicator")
    _require_mpi_up(mpi)
    if comm == mpi.COMM_NULL:
        raise UserError("comm MPI.COMM_NULL: only the ranks of a communicator can connect on it")
    if comm.Is_inter():
        raise UserError("comm: an intercommunicator has no ranks of its own: give its Merge()")
    return comm, f"{comm.Get_size()} ranks of the given communicator"


def _require_mpi_up(mpi: Any) -> None:
    if mpi.Is_finalized():
        raise UserError("MPI has been finalized, and cannot start again: connect before MPI.Finalize()")
    if not mpi.Is_initialized():
        raise UserError("mpi4py was told not to start MPI: call MPI.Init() before you connect")


def _join(comm: Any, timeout: float) -> tuple[Any, str]:
    """(communicator, explanation): MPI_COMM_WORLD if there is more than this process, or the given one."""
    if not isinstance(comm, str):
        return _given(comm)
    launched = _started_ranks()
    if comm == "none" and launched > 1:  # a shell inside srun -n 4 --pty, say
        return (
            SingleControl(),
            f"one process, as --comm none asks, though the launcher counts {launched} ranks",
        )
    if comm in ("auto", "none") and launched == 1:
        return SingleControl(), "one process: no mpirun or srun started more"
    try:
        mpi = import_mpi(timeout)
    except RuntimeError as error:
        raise UserError(f"--comm {comm} with {launched} ranks: {error}") from None
    _require_mpi_up(mpi)
    world = mpi.COMM_WORLD
    if world.Get_size() == 1 and launched > 1:
        raise UserError(
            f"{launched} ranks were started but MPI sees 1 in each: launcher and MPI library do not match;"
            " use the mpirun of this MPI library, or srun --mpi=pmix; for one process alone give --comm none"
        )
    return world, f"{world.Get_size()} ranks over MPI"


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


def _check_names(**options: str) -> None:
    for option, value in options.items():
        if value not in CHOICES[option]:
            raise UserError(f"--{option} {value}: give one of {', '.join(CHOICES[option])}")


def _leave_stream(backend: Backend) -> None:
    """Make the caller's stream the current one again."""
    current = backend.cuda.get_current_stream()
    current.synchronize()
    if current == backend.stream:
        current.__exit__(None, None, None)


def _own(joined: Any, watchdog: Watchdog, resources: ExitStack) -> Any:
    """A duplicate of an mpi4py communicator: what a program sends there never meets what we send."""
    with watchdog.waiting("the meeting of all ranks"):
        control_comm = joined.Dup()
    resources.callback(free, control_comm)
    if _mpi_is_ours:
        resources.callback(abort_on_crash(watchdog, lambda: control_comm.Abort(1)))
        atexit.unregister(end_mpi)
        # while rank 0 may still write a checkpoint
        atexit.register(end_mpi, import_mpi(), SLOW_IO_FACTOR * watchdog.timeout)
    return control_comm


def connect(
    comm: Any = "auto", backend: str = "auto", precision: str = "float32", timeout: float = 60.0
) -> World:
    """Join the other ranks and choose backend and communicator, given the options of the command line.

    `comm` may also be an mpi4py communicator, of any subset of ranks: the world then is a duplicate of it.
    A program that imported `mpi4py.MPI` before keeps its own excepthook and end of MPI. Otherwise MPI is
    started here, and until `World.close` an uncaught exception of one rank ends the job.

    No wait for other ranks is longer than `timeout` seconds; for the start of MPI it is a minute or five
    timeouts. Then the rank prints what it waited for, and the job ends.

    Raises the same UserError on every rank if an option asks for something that is not available, if the
    ranks were started with different options, or if the set-up fails on one of them.
    """
    _check_names(backend=backend, precision=precision, **({"comm": comm} if isinstance(comm, str) else {}))
    if not timeout > 0:
        raise UserError(f"--timeout {timeout}: must be a number of seconds above 0")
    joined, ranks = _join(comm, timeout)
    rank = 0 if isinstance(joined, SingleControl) else int(joined.Get_rank())
    watchdog = Watchdog(rank, timeout)
    resources = ExitStack()
    resources.callback(watchdog.stop)
    try:
        control_comm = joined if isinstance(joined, SingleControl) else _own(joined, watchdog, resources)
        with watchdog.waiting("the choice of backend and communicator"):
            return _choose(comm, backend, precision, control_comm, ranks, watchdog, resources)
    except UserError:  # all ranks have it; after any other the crash of this rank must end the others
        resources.close()
        raise


def _choose(
    comm: Any,
    backend: str,
    precision: str,
    control_comm: Any,
    ranks: str,
    watchdog: Watchdog,
    resources: ExitStack,
) -> World:
    """`connect` on joined ranks."""
    name = comm if isinstance(comm, str) else "auto"
    _check_same_options(control_comm, {"comm": name, "backend": backend, "precision": precision})
    chosen, why = choose_backend(backend, precision, control_comm)
    if chosen.stream is not None:
        chosen.cuda.runtime.deviceSynchronize()  # what the caller has queued on another stream
        resources.callback(_leave_stream, chosen)
    if chosen.on_host and name == "nccl":
        raise UserError(
            f"--comm nccl needs a GPU: {why}" if why != "asked for" else "--comm nccl needs --backend cupy"
        )
    transport: Transport
    host: Transport | None = None
    if isinstance(control_comm, SingleControl):
        transport = host = SingleCommunicator()
    elif chosen.on_host:
        transport = MpiCommunicator(control_comm, watchdog)
    else:
        transport, note = device_transport(name, control_comm, chosen, watchdog)
        ranks += note
        host = MpiCommunicator(control_comm, watchdog)
        resources.callback(host.close)
    resources.callback(transport.close)
    hosts = control_comm.allgather(socket.gethostname())
    explanation = f"backend {chosen.name} ({why}), communicator {transport.name} ({ranks})"
    return World(transport, control_comm, chosen, explanation, watchdog, hosts, host, resources)
