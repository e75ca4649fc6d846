"""`world.comm`: collectives on a caller's own NumPy and CuPy arrays, of any shape and layout."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

from distrib.comm import wire
from distrib.comm.agree import Ends, agree
from distrib.comm.base import BF16, DONE, Handle, SingleControl, Transport
from distrib.comm.mpi import free, split
from distrib.data.sampler import shard
from distrib.errors import UserError
from distrib.faults.watchdog import Watchdog
from nn.array import Array
from nn.device import Backend


class Pending:
    """A collective under way. It keeps its arrays alive."""

    def __init__(
        self,
        comm: Comm,
        what: str,
        transport: Transport,
        started: Handle,
        finish: Callable[[], Any],
        kept: tuple[Any, ...],
    ) -> None:
        self._comm, self._what, self._transport = comm, what, transport
        self._started, self._kept = started, kept
        self._finish: Callable[[], Any] | None = finish
        self._result: Any = None

    def wait(self) -> Any:
        """Return the result once it is in place.

        On a GPU with `Comm.checked` off: once work queued from now on sees it, as of any work on a stream.
        """
        if self._finish:
            finish, self._finish = self._finish, None
            self._comm._forget(self)
            with self._comm._watchdog.waiting(self._what):
                self._started.wait()
                self._result = finish()
                if self._comm.checked:
                    self._transport.synchronize()
            self._kept = ()
        return self._result


class Comm:
    """Collectives over `size` ranks, of which this is number `rank`.

    Arrays are NumPy's, which go over MPI, or in a world with backend cupy also CuPy's, which go over NCCL or
    through the host. They may have any shape and layout; what does not lie in C order is copied. Types: bool,
    integers, float16, 32 and 64, complex64 and 128. Every rank makes the same calls in the same order, with
    arrays of the same type and shape. A call returns a handle at once; leave its arrays alone until
    `handle.wait()`, which returns the result. `barrier` and `close` wait for what you did not.

    No wait is longer than the timeout given to `connect`: then the rank says what it waited for, by the name
    `what` if you gave one, and the job ends.

    `checked`, which is on: before each call the ranks exchange what they are about to do, and raise the same
    UserError where they differ; and on a GPU, `wait` holds the host until the result is there. Both cost some
    microseconds. Set it to False on all ranks, for a loop that is known to be right: then differing calls may
    hang until the timeout or mix up arrays, and on a GPU a lost rank shows only in the next bounded wait.
    """

    def __init__(
        self,
        control_comm: Any,
        host: Transport | None,
        device: Transport | None,
        backend: Backend,
        watchdog: Watchdog,
    ) -> None:
        self._control, self._host, self._device = control_comm, host, device
        self._backend, self._watchdog = backend, watchdog
        some = host or device
        assert some is not None
        self._some, self.rank, self.size = some, some.rank, some.size
        self.checked = True
        self._pending: dict[Pending, None] = {}  # in the order of their calls
        self._resources = ExitStack()
        self._closed = False

    def all_reduce(self, x: Array, op: str = "sum", overlap: bool = False, what: str = "") -> Pending:
        """x ← x_0 ∘ x_1 ∘ … over ranks, in place; ∘ is the `op`: sum, max, min or mean.

        With `overlap` on a GPU, it runs on a stream of its own, beside what you queue before the wait.
        float16 is added up as float32 and rounded once; integers wrap around. With NaN, max and min are
        undefined. UserError: sum or mean of bool, mean of integers, max or min of complex numbers.
        """

        def check() -> None:
            wire.check_reduction(x, op)
            _check_writable(x)
            if op == BF16 and not self._transport(x).sums_bf16:
                raise UserError(f"{op} needs NCCL")

        call = f"all_reduce({self._shown(x)}, {op})"
        self._agree(call, what, check, x)
        if x.size == 0:
            return self._begun(what or call, x, DONE, lambda: x)
        sent = wire.flat(x) if op == BF16 else wire.to_reduce(x)
        started = self._transport(x).start_reduce(sent, _sum_for_mean(op), overlap)

        def finish() -> Array:
            self._divide(sent, op)
            return wire.put_reduced(sent, x)

        return self._begun(what or call, x, started, finish, sent)

    def broadcast(self, x: Array, root: int = 0, what: str = "") -> Pending:
        """x ← x of rank `root`, in place."""

        def check() -> None:
            self._check_rank("root", root)
            if self.rank != root:
                _check_writable(x)

        call = f"broadcast({self._shown(x)}, root {root})"
        self._agree(call, what, check, x)
        if x.size == 0:
            return self._begun(what or call, x, DONE, lambda: x)
        sent = wire.to_move(x if _writable(x) else x.copy())
        started = self._transport(x).start_broadcast(sent, root)
        return self._begun(
            what or call, x, started, lambda: x if self.rank == root else wire.put(sent, x), sent
        )

    def all_gather(self, x: Array, what: str = "") -> Pending:
        """A new array (size, *x.shape) with the arrays of all ranks, by rank."""
        call = f"all_gather({self._shown(x)})"
        self._agree(call, what, lambda: None, x)
        gathered = self._empty(x, (self.size, *x.shape))
        if x.size == 0:
            return self._begun(what or call, x, DONE, lambda: gathered)
        sent = wire.to_move(x)
        started = self._transport(x).start_gather(sent, wire.to_move(gathered))
        return self._begun(what or call, x, started, lambda: gathered, sent)

    def reduce_scatter(self, x: Array, op: str = "sum", what: str = "") -> Pending:
        """This rank's part, along axis 0, of what `all_reduce` would give; a new array. `x` stays as it is.

        The parts are contiguous and nearly equal: with n = len(x), the first n mod size ranks have one row
        more than the others, as `distrib.data.sampler.shard(n, rank, size)` says.
        """

        def check() -> None:
            wire.check_reduction(x, op)
            if op == BF16:
                raise UserError(f"{op} cannot be scattered: use all_reduce")
            if x.ndim == 0:
                raise UserError("an array of no dimension has no axis to be cut along: use all_reduce")

        call = f"reduce_scatter({self._shown(x)}, {op})"
        self._agree(call, what, check, x)
        part = shard(len(x), self.rank, self.size)
        shape = (part.stop - part.start, *x.shape[1:])
        if x.size == 0:
            return self._begun(what or call, x, DONE, lambda: self._empty(x, shape))
        sent = self._equal_parts(wire.to_reduce(x).reshape(len(x), -1))
        received = self._empty(sent, (sent.size // self.size,))
        started = self._transport(x).start_scatter(sent.reshape(-1), received, _sum_for_mean(op))

        def finish() -> Array:
            mine = received[: shape[0] * sent.shape[-1]]
            self._divide(mine, op)
            return wire.back(mine, x.dtype, shape)

        return self._begun(what or call, x, started, finish, sent, received)

    def _equal_parts(self, rows: Array) -> Array:
        """Rows cut into `size` parts, each filled up with zeros to the length of the longest."""
        count = len(rows)
        longest = -(-count // self.size)
        if count == longest * self.size:
            return rows
        parts = (np if isinstance(rows, np.ndarray) else self._backend.xp).zeros(
            (self.size, longest, rows.shape[1]), rows.dtype
        )
        for rank in range(self.size):
            part = rows[shard(count, rank, self.size)]
            parts[rank, : len(part)] = part
        return parts

    def exchange(
        self,
        send: Array | None,
        to: int | None,
        receive: Array | None,
        source: int | None,
        what: str = "",
    ) -> Pending:
        """Send an array to a neighbour and receive one, in place, from another; `wait` returns `receive`.

        Every rank calls it; None for both array and rank is nothing. It cannot deadlock, whatever the order
        of ranks. The receiver's array has the sender's type and shape. A rank may send to itself.
        """

        def check() -> None:
            for array, rank, name in ((send, to, "to"), (receive, source, "source")):
                if (array is None) != (rank is None):
                    raise UserError(f"{name} {rank}: give an array and a rank, or None for both")
                if rank is not None:
                    self._check_rank(name, rank)
            if receive is not None:
                _check_writable(receive)
            if len({isinstance(x, np.ndarray) for x in arrays}) > 1:
                raise UserError("give two NumPy arrays, or two CuPy arrays")

        arrays = [array for array in (send, receive) if array is not None]
        ends = Ends(to, self._shown(send), source, self._shown(receive))
        what = what or f"exchange({ends.shown()})"
        self._agree("exchange", what, check, *arrays, ends=ends)
        out, into = (wire.to_move(x) if x is not None and x.size else None for x in (send, receive))
        if out is None and into is None:
            return self._begun(what, receive, DONE, lambda: receive)
        started = self._transport(arrays[0]).start_exchange(out, to, into, source)
        return self._begun(
            what,
            arrays[0],
            started,
            lambda: receive if into is None else wire.put(into, receive),
            receive,
            out,
            into,
        )

    def split(self, color: int | None, key: int = 0) -> Comm | None:
        """A communicator of all ranks with the same `color`, ordered by (`key`, rank); None for color None.

        Every rank calls it. It has the same methods, itself `split`, and is closed with this one.
        """

        def check() -> None:
            if not (color is None or (isinstance(color, (int, np.integer)) and color >= 0)):
                raise UserError(f"color {color!r}: give an integer from 0, or None")

        self._agree("split", "", check)
        with self._watchdog.waiting("the split into groups"):
            if isinstance(self._control, SingleControl):
                control = None if color is None else self._control
            else:
                control = split(self._control, color, key)
        if control is None:
            return None
        host, device = (each and each.over(control) for each in (self._host, self._device))
        group = Comm(control, host, device, self._backend, self._watchdog)
        group.checked = self.checked
        if not isinstance(control, SingleControl):
            group._resources.callback(free, control)
        for transport in {id(each): each for each in (host, device) if each}.values():
            group._resources.callback(transport.close)
        self._resources.callback(group.close)
        return group

    def barrier(self) -> None:
        """Return when every rank has called it, and all that this rank has begun is complete."""
        self._agree("barrier()", "", lambda: None)
        for pending in list(self._pending):
            pending.wait()
        self._synchronize()
        self._some.barrier()

    def close(self) -> None:
        """Wait for what was begun, close the groups split off, and free what `split` made. Every rank calls
        it; a second call does nothing."""
        if not self._closed:
            for pending in list(self._pending):
                pending.wait()
            self._closed = True
            self._resources.close()

    def _agree(
        self, call: str, what: str, check: Callable[[], None], *arrays: Any, ends: Ends | None = None
    ) -> None:
        """Check this call's arguments and, if `checked`, that all ranks make the same."""
        if self._closed:
            raise UserError(f"{call}: the communicator is closed")
        refused = None
        try:
            for x in arrays:
                self._transport(x)
                wire.check_type(x)
            check()
        except UserError as error:
            refused = f"{call}: {error}"
        if self.checked and self.size > 1:
            with self._watchdog.waiting(f"the agreement on {what or call}"):
                everyone = self._control.allgather((call, refused, ends))
            agree(everyone)
        elif refused:
            raise UserError(refused)

    def _transport(self, x: Any) -> Transport:
        """What moves `x`; UserError if nothing here does."""
        if isinstance(x, np.ndarray) and not isinstance(x, np.ma.MaskedArray) and self._host:
            return self._host
        if self._device and isinstance(x, self._backend.xp.ndarray):
            return self._device
        kind = f"{type(x).__module__.split('.')[0]}.{type(x).__name__}"
        if kind == "cupy.ndarray":
            raise UserError(
                "a CuPy array in a world with backend numpy: connect(backend='cupy'), or give x.get()"
            )
        raise UserError(f"{kind}: give a NumPy or CuPy array, such as numpy.array(x)")

    def _shown(self, x: Any) -> str:
        """Type and shape of an array, as errors and the agreement have it."""
        if x is None:
            return "nothing"
        if not hasattr(x, "dtype") or not hasattr(x, "shape"):
            return type(x).__name__
        where = "" if isinstance(x, (np.ndarray, np.generic)) else "GPU's "
        return f"{where}{x.dtype.name}{list(x.shape)}"

    def _check_rank(self, name: str, rank: Any) -> None:
        if not (isinstance(rank, (int, np.integer)) and 0 <= rank < self.size):
            raise UserError(f"{name} {rank!r}: give a rank from 0 to {self.size - 1}")

    def _empty(self, like: Array, shape: tuple[int, ...]) -> Array:
        xp = np if isinstance(like, np.ndarray) else self._backend.xp
        return xp.empty(shape, like.dtype.newbyteorder("="))

    def _divide(self, sums: Array, op: str) -> None:
        if op == "mean":
            sums /= self.size

    def _begun(self, what: str, x: Array, started: Handle, finish: Callable[[], Any], *kept: Any) -> Pending:
        transport = self._some if x is None else self._transport(x)
        pending = Pending(self, what, transport, started, finish, (x, *kept))
        self._pending[pending] = None
        return pending

    def _forget(self, pending: Pending) -> None:
        del self._pending[pending]

    def _synchronize(self) -> None:
        if self._device:
            self._device.synchronize()


def _sum_for_mean(op: str) -> str:
    return "sum" if op == "mean" else op


def _writable(x: Array) -> bool:
    return bool(getattr(x.flags, "writeable", True))  # CuPy's always are


def _check_writable(x: Array) -> None:
    if not _writable(x):
        raise UserError("the array is read-only: give a copy")
