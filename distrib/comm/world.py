"""Joins the ranks: starts MPI where nobody has, and connects them by what all of them can use."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from distrib.comm.base import SingleCommunicator, SingleControl, Transport, first_error
from distrib.comm.choice import HOST_NAMES, choose_backend, device_transport
from distrib.comm.library import Comm
from distrib.comm.meeting import Meeting, require_support
from distrib.comm.mpi import MpiCommunicator, is_loss
from distrib.comm.start import end_with_process, join, leave_mpi, may_leave_mpi, own, own_base
from distrib.config import CHOICES
from distrib.errors import OnAllRanks, UserError
from distrib.faults.hang import end_hanging
from distrib.faults.watchdog import Watchdog, die
from distrib.run.machine import limit_threads
from nn.device import Backend


@dataclass(frozen=True)
class Member:
    """A rank as it tells the others at a meeting."""

    number: int  # its rank at the start, which it keeps
    started: int  # the number of ranks then
    host: str
    pid: int
    position: Any = None  # how far it has come; None before its run has begun


@dataclass
class World:
    """This rank's place among all ranks, and how it reaches them; `connect` makes it.

    `comm` is for your own arrays, NumPy's or CuPy's; `transport` moves the trainer's, unchecked.
    `control_comm` (mpi4py's, or `SingleControl`) exchanges small Python objects. `members` are all ranks.
    `choice_explanation` says why backend and communicator were chosen. `host` is the transport of NumPy
    arrays where `transport` is a device's. `resources` releases all of them. `meet_again` is there if ranks
    may die.

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
    members: list[Member]
    host: Transport | None = None
    resources: ExitStack = field(default_factory=ExitStack, repr=False)
    meeting: Meeting | None = None
    meet_again: Callable[[World], World] | None = None
    position: Any = None  # how far this rank has come, which it tells the others when they `regroup`
    dead: list[Member] = field(default_factory=list)
    survived: list[dict[str, Any]] = field(default_factory=list)  # what is known of their deaths
    heard: float = 0.0  # when this rank heard of a death (time.perf_counter)

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
        with self.watchdog.waiting("the end of the communicators"):
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

    @property
    def started(self) -> int:
        """The number of ranks at the start."""
        return self.members[self.rank].started

    @property
    def hosts(self) -> list[str]:
        """The host of each rank."""
        return [member.host for member in self.members]

    @property
    def number(self) -> int:
        """This rank's number at the start, which it keeps when others die."""
        return self.members[self.rank].number

    def has_lost(self, error: BaseException) -> bool:
        """Whether `error` says that a rank has died, and the others may go on."""
        return self.meet_again is not None and is_loss(error)

    def ended(self) -> bool:
        """Whether all ranks have come here; False if one died before, and the others must `regroup`."""
        return self.meeting is None or self.meeting.ended()

    def abandon(self) -> None:
        """After a death, end what is under way; a second call does nothing."""
        self.watchdog.forget_loss()
        for each in (self.transport, self.host):
            if each:
                each.abandon()

    def others_go_on(self) -> bool:
        """Whether a rank is left that can do without this one, which has failed."""
        assert self.meeting is not None
        return self.size > 1 and not self.meeting.all_fail()

    def regroup(self) -> None:
        """After a death, become the world of the survivors. Every survivor calls it.

        What was under way is lost.
        """
        assert self.meet_again is not None
        self.heard = self.heard or time.perf_counter()
        self.__dict__.pop("comm", None)
        before = self.members
        found = self.meet_again(self)
        for name in ("transport", "control_comm", "backend", "members", "host", "meeting"):
            setattr(self, name, getattr(found, name))
        leave_mpi()
        living = {member.number for member in self.members}
        self.dead += [member for member in before if member.number not in living]

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


def connect(
    comm: Any = "auto",
    backend: str = "auto",
    precision: str = "float32",
    timeout: float = 60.0,
    elastic: bool = False,
) -> World:
    """Join the other ranks and choose backend and communicator, given the options of the command line.

    `comm` may also be an mpi4py communicator, of any subset of ranks: the world then is a duplicate of it.
    Each of several ranks then has one BLAS thread, or as many as OMP_NUM_THREADS says, until `World.close`.
    A program that imported `mpi4py.MPI` before keeps its own excepthook and end of MPI. Otherwise MPI is
    started here, and until `World.close` an uncaught exception of one rank ends the job.

    No wait for other ranks is longer than `timeout` seconds; for the start of MPI it is a minute or five
    timeouts. Then the rank prints what it waited for, and the job ends. `elastic`, a rank that fails ends
    alone, and the others can `World.regroup`.

    Raises the same UserError on every rank if an option asks for something that is not available, if the
    ranks were started with different options, or if the set-up fails on one of them.
    """
    _check_names(backend=backend, precision=precision, **({"comm": comm} if isinstance(comm, str) else {}))
    if not timeout > 0:
        raise UserError(f"--timeout {timeout}: must be a number of seconds above 0")
    if elastic:
        require_support()
        may_leave_mpi()
    joined, ranks = join(comm, timeout)
    alone = isinstance(joined, SingleControl)
    rank, size = (0, 1) if alone else (int(joined.Get_rank()), int(joined.Get_size()))
    watchdog = Watchdog(rank, timeout, elastic)
    resources = ExitStack()
    resources.callback(watchdog.stop)
    resources.enter_context(limit_threads())
    choose = partial(_choose, comm, backend, precision, ranks, rank, size, watchdog, resources)
    try:
        if elastic and not alone:
            end_with_process(die, watchdog, resources)
            return _gather(choose, Meeting(own_base(joined), watchdog))
        control_comm = joined if alone else own(joined, watchdog, resources)
        return choose(control_comm)
    except UserError:  # all ranks have it; after any other the crash of this rank must end the others
        resources.close()
        raise


def _gather(choose: Callable[..., World], meeting: Meeting, before: World | None = None) -> World:
    """The world of those who come to a meeting. Whoever dies on the way, the others meet again."""
    while True:
        try:
            world = choose(meeting.control, before)
        except UserError:
            if meeting.ended():
                raise
        except Exception as error:
            if not is_loss(error):
                raise
        else:
            world.meeting = meeting
            world.meet_again = partial(_survive, choose)
            if world.watchdog.end_hanging is None:
                world.watchdog.end_hanging = partial(end_hanging, world)
                world.watchdog.others_go_on = world.others_go_on
            return world
        meeting = meeting.again()


def _survive(choose: Callable[..., World], world: World) -> World:
    """The world of the survivors."""
    assert world.meeting is not None
    world.abandon()
    world.meeting = world.meeting.again()
    return _gather(choose, world.meeting, world)


def _choose(
    comm: Any,
    backend: str,
    precision: str,
    ranks: str,
    number: int,
    started: int,
    watchdog: Watchdog,
    resources: ExitStack,
    control_comm: Any,
    before: World | None = None,
) -> World:
    """`connect` on joined ranks, of which this was `number` of those `started`; `before` a death they had."""
    position = before.position if before else None
    with watchdog.waiting("the choice of backend and communicator"):
        name = comm if isinstance(comm, str) else "auto"
        _check_same_options(control_comm, {"comm": name, "backend": backend, "precision": precision})
        chosen, why = choose_backend(backend, precision, control_comm, before.backend if before else None)
        if chosen.stream is not None:
            chosen.cuda.runtime.deviceSynchronize()  # what the caller has queued on another stream
            resources.callback(_leave_stream, chosen)
        if chosen.on_host and name not in HOST_NAMES:
            raise UserError(
                f"--comm {name} needs a GPU: {why}"
                if why != "asked for"
                else f"--comm {name} needs --backend cupy"
            )
        members = control_comm.allgather(Member(number, started, socket.gethostname(), os.getpid(), position))
        transport: Transport  # made last: if a rank dies before, nothing of it is left
        host: Transport | None = None
        if isinstance(control_comm, SingleControl):
            transport = host = SingleCommunicator()
        elif chosen.on_host:
            transport = MpiCommunicator(control_comm, watchdog, duplicate=not watchdog.elastic)
        else:
            transport, note = device_transport(name, control_comm, chosen, watchdog)
            ranks += note
            host = MpiCommunicator(control_comm, watchdog, duplicate=not watchdog.elastic)
            resources.callback(host.close)
        resources.callback(transport.close)
    explanation = f"backend {chosen.name} ({why}), communicator {transport.name} ({ranks})"
    return World(transport, control_comm, chosen, explanation, watchdog, members, host, resources)
