"""Which slices of the flat gradient travel when."""

from __future__ import annotations

from contextlib import nullcontext

from distrib.comm.base import Communicator, Handle
from nn.array import Array
from nn.ops.bf16 import from_bf16, to_bf16
from nn.params import Parameter, Parameters

BUCKET_BYTES = 1 << 20
"""Large enough that latency does not count, small enough that batch norm's sums never wait long behind
one."""


class Reducer:
    """Sums the flat gradient over ranks, bucket by bucket, while the backward still runs.

    Buckets are slices of `params.comm_buffer` in the order in which the backward completes them, from the end
    of the vector; the first takes the STEP_METRICS scalars along. They are issued in that order on every
    rank.

    With `kind` "bf16" gradients travel and are summed as bfloat16, half as many bytes, and the scalars on
    their own.
    """

    def __init__(
        self, params: Parameters, comm: Communicator, kind: str = "float32", bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        self._wire, self._tail, self._comm = params.comm_buffer, params.step_metrics, comm
        self._branch = params.backend.side_stream
        self._narrow = params.backend.xp.zeros(params.grads.size, "uint16") if kind == "bf16" else None
        self.buckets: list[slice] = []
        self._bucket_of: dict[str, int] = {}
        self._members: list[int] = []
        stop, members = params.comm_buffer.size, 0
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
            self._handles.append(
                self._comm.all_reduce(self._sent(self.buckets[len(self._handles)]), overlap=True)
            )

    def _sent(self, bucket: slice) -> Array:
        """What travels for a bucket."""
        if self._narrow is None:
            return self._wire[bucket]
        part = slice(bucket.start, min(bucket.stop, self._narrow.size))
        with (
            self._branch.fork() if self._branch else nullcontext()
        ):  # where the gradients of weights come from
            to_bf16(self._wire[part], self._narrow[part])
        return self._narrow[part]

    def wait(self) -> None:
        """Return when the whole gradient is the sum over ranks."""
        assert len(self._handles) == len(self.buckets), "a gradient was not announced"
        for handle in self._handles:
            handle.wait()
        if self._narrow is not None:
            self._comm.all_reduce(self._tail, overlap=True).wait()
            from_bf16(self._narrow, self._wire[: self._narrow.size])
        self._missing, self._handles = self._members.copy(), []
