"""Which slices of the flat gradient travel when."""

from __future__ import annotations

from distrib.comm import Communicator, Handle
from nn.params import Parameter, Parameters

BUCKET_BYTES = 1 << 20
"""Large enough that latency does not count, small enough that batch norm's sums never wait long behind one."""


class Reducer:
    """Sums the flat gradient over ranks, bucket by bucket, while the backward still runs.

    Buckets are slices of `params.wire` in the order in which the backward completes them, from the end of
    the vector; the first takes the TAIL scalars along. They are issued in that order on every rank.
    """

    def __init__(self, params: Parameters, comm: Communicator, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._wire, self._comm = params.wire, comm
        self.buckets: list[slice] = []
        self._bucket_of: dict[str, int] = {}
        self._members: list[int] = []
        stop, members = params.wire.size, 0
        for parameter in reversed(list(params)):
            self._bucket_of[parameter.name] = len(self.buckets)
            members += 1
            if (stop - parameter.start) * params.dtype.itemsize >= bucket_bytes or parameter.start == 0:
                self.buckets.append(slice(parameter.start, stop))
                self._members.append(members)
                stop, members = parameter.start, 0
        self._missing = self._members.copy()
        self._handles: list[Handle] = []

    def ready(self, parameter: Parameter) -> None:
        """The gradient of `parameter` is complete; buckets that now are, and whose turn it is, set off."""
        self._missing[self._bucket_of[parameter.name]] -= 1
        while len(self._handles) < len(self.buckets) and self._missing[len(self._handles)] == 0:
            bucket = self.buckets[len(self._handles)]
            self._handles.append(self._comm.all_reduce(self._wire[bucket], overlap=True))

    def wait(self) -> None:
        """Return when the whole gradient is the sum over ranks."""
        assert len(self._handles) == len(self.buckets), "a gradient was not announced"
        for handle in self._handles:
            handle.wait()
        self._missing, self._handles = self._members.copy(), []
