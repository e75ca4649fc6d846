"""Sums the gradient over ranks in buckets, while the backward still runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from distrib.comm.base import BF16, Handle, Sums
from nn.ops.bf16 import from_bf16, to_bf16
from nn.params import Parameter, Parameters

BUCKET_BYTES = 1 << 20
"""Large enough to hide latency, small enough that batch norm's sums never wait long behind a bucket."""


class Reducer:
    """Sums the flat gradient over ranks, bucket by bucket.

    Buckets are slices of `params.comm_buffer` in backward order, from the end of the vector to its start. The
    first includes the STEP_METRICS scalars. Every rank sends them in this order.

    With `dtype` "bf16", gradients are sent and summed as bfloat16, half as many bytes, and the scalars
    separately. `then` is called with each bucket once its sum has been started, and with the sum's handle.
    """

    def __init__(
        self,
        params: Parameters,
        comm: Sums,
        dtype: str = "float32",
        bucket_bytes: int = BUCKET_BYTES,
        then: Callable[[slice, Handle], None] | None = None,
    ) -> None:
        self._then = then
        self._buffer, self._metrics, self._comm = params.comm_buffer, params.step_metrics, comm
        self._side_stream = params.backend.side_stream
        self._bf16 = params.backend.xp.zeros(params.grads.size, "uint16") if dtype == "bf16" else None
        self.buckets: list[slice] = []
        self._bucket_of: dict[str, int] = {}
        self._members: list[int] = []  # parameters of each bucket
        stop, members = params.comm_buffer.size, 0
        for parameter in reversed(list(params)):
            self._bucket_of[parameter.name] = len(self.buckets)
            members += 1
            if (stop - parameter.start) * params.dtype.itemsize >= bucket_bytes or parameter.start == 0:
                self.buckets.append(slice(parameter.start, stop))
                self._members.append(members)
                stop, members = parameter.start, 0
        self._pending = self._members.copy()
        self._handles: list[Handle] = []

    def ready(self, parameter: Parameter) -> None:
        """Note that the gradient of `parameter` is complete; send the buckets that now are, in order."""
        self._pending[self._bucket_of[parameter.name]] -= 1
        while len(self._handles) < len(self.buckets) and self._pending[len(self._handles)] == 0:
            bucket = self.buckets[len(self._handles)]
            self._handles.append(self._send(bucket))
            if self._then:
                self._then(bucket, self._handles[-1])

    def _send(self, bucket: slice) -> Handle:
        """Start the sum of a bucket."""
        if self._bf16 is None:
            return self._comm.all_reduce(self._buffer[bucket], overlap=True)
        part = slice(bucket.start, min(bucket.stop, self._bf16.size))
        # convert on the stream that computes the gradients of weights
        with self._side_stream.fork() if self._side_stream else nullcontext():
            to_bf16(self._buffer[part], self._bf16[part])
        return self._comm.all_reduce(self._bf16[part], overlap=True, op=BF16)

    def wait(self) -> None:
        """Return when the whole gradient is the sum over ranks."""
        assert len(self._handles) == len(self.buckets), "a gradient was not announced"
        for handle in self._handles:
            handle.wait()
        if self._bf16 is not None:
            self._comm.all_reduce(self._metrics, overlap=True).wait()
            from_bf16(self._bf16, self._buffer[: self._bf16.size])
        self._pending, self._handles = self._members.copy(), []
