"""The operations of `nn.ops` on the CUDA kernels of this folder.

Each has its plain version's arguments and effects, up to rounding, and launches one or two kernels; nothing
here allocates after a shape's first call or waits for the device, so that a CUDA graph may hold all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from nn.array import Array
from nn.buffers import Buffers
from nn.cuda.kernels import ELEMENT_OF, KEEP, PACK, SMALL_LANES, SMALL_ROWS, THREADS, Kernels
from nn.ops.batch import Source
from nn.ops.dropout import threshold
from nn.ops.norm import After, Count, Norm
from nn.ops.pool import Windows
from nn.ops.update import StepRecord

BLOCKS = 1024
"""Most blocks of a launch: several for each multiprocessor of the largest GPU."""

LOSS_NUMBERS = {"ce": 0, "bce": 1}
"""How loss.cu knows the losses of `nn.ops.loss.LOSSES`."""

Tiles = tuple[tuple[int, ...], tuple[int, ...]]
"""(grid, block) of a launch."""


def tiling(rows: int, c: int, rows_per_thread: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(grid, block) over rows × channels: channels along x in powers of two up to a warp, rows along y."""
    lanes = min(32, 1 << max(0, c - 1).bit_length())
    groups = -(-c // lanes)
    block = (lanes, THREADS // lanes)
    chunks = -(-rows // (block[1] * rows_per_thread))
    return (max(1, min(chunks, BLOCKS // groups)), groups), block


def packed(x: Array) -> int:
    """How many neighbouring channels of `x` a thread takes at once: `over_channels` of common.cu."""
    pack = PACK[ELEMENT_OF[str(x.dtype)]]
    return pack if x.shape[-1] % pack == 0 else 1


def tiling_of(x: Array, rows: int, values: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """`tiling` over rows of the channels of `x`, with so many of its values for a thread."""
    pack = packed(x)
    return tiling(rows, x.shape[-1] // pack, values // pack)


def small_tiling(z: Array) -> Tiles:
    """(grid, block) of the kernels of norm_small.cu."""
    pack = packed(z)
    return (-(-z.shape[3] // SMALL_LANES),), (SMALL_LANES // pack, SMALL_ROWS * pack)


def flat(size: int, pack: int = 1) -> Tiles:
    """(grid, block) over a vector, of which a thread takes `pack` elements at once."""
    return (max(1, min(-(-size // (THREADS * pack)), BLOCKS)),), (THREADS,)


def flat_over(x: Array) -> Tiles:
    """(grid, block) over all elements of `x`: `over_vector` of common.cu."""
    return flat(x.size, PACK[ELEMENT_OF[str(x.dtype)]])


def one_each(count: int) -> Tiles:
    """(grid, block) of a block each for `count` images or the like."""
    return (count,), (THREADS,)


def rows_of(z: Array, pool: bool) -> int:
    """What a thread of a kernel takes one after another: pixels, with pooling 2×2 windows."""
    n, h, w, _ = z.shape
    return n * -(-h // 2) * -(-w // 2) if pool else n * h * w


def ending(record: StepRecord | None) -> tuple[Any, ...]:
    """The last arguments of an update's kernel."""
    return (*record, len(record.history)) if record else (None, None, None, None, 0)


class SavedNorm(NamedTuple):
    """What `norm_forward` leaves: masks and maxima are computed again from z, and with a residual from y."""

    z: Array
    statistics: Array  # (2, C): mean and 1/σ
    y: Array | None
    after: After

    def shape(self) -> tuple[int, ...]:
        """n, h, w, c and whether there is pooling, as the kernels take them."""
        return (*self.z.shape, self.after.pool)


class CudaOps:
    """The operations by name; `kernels` compiles and launches."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def by_name(self) -> dict[str, Callable[..., Any]]:
        """Name of each operation (see `nn.array.OPS`) → its version here."""
        names = [name for name in vars(CudaOps) if not name.startswith("_") and name != "by_name"]
        return {name: getattr(self, name) for name in names}

    def _launch(self, like: Array, name: str, tiles: Tiles, *arguments: Any) -> None:
        """Launch the kernel for activations of the dtype of `like`."""
        self.kernels.launch(ELEMENT_OF[str(like.dtype)], name, *tiles, *arguments)

    # batch norm and what follows it

    def _is_small(self, z: Array, pool: bool, count: Count) -> bool:
        """Whether norm_small.cu takes it: few rows, and no sum over ranks between its two halves."""
        keep = KEEP[ELEMENT_OF[str(z.dtype)]] // (4 if pool else 1)
        return count.all_reduce is None and 0 < rows_of(z, pool) <= SMALL_ROWS * keep

    def norm_forward(
        self, z: Array, norm: Norm, y: Array, after: After, count: Count, buffers: Buffers
    ) -> SavedNorm:
        n, h, w, c = z.shape
        relu, pool, residual = after
        statistics = buffers.persistent("norm", (2, c), str(norm.gamma.dtype))
        running, shape = (norm.running_mean, norm.running_var, statistics, y), (n, h, w, c, pool, relu)
        if self._is_small(z, pool, count):
            arguments = z, residual, norm.gamma, norm.beta, *running, *shape
            self._launch(z, "norm_small_forward", small_tiling(z), *arguments)
        else:
            moments = self._statistics(z, count, buffers)
            tiles = tiling_of(z, rows_of(z, pool), 4)
            known = residual, moments, norm.gamma, norm.beta
            self._launch(z, "norm_apply", tiles, z, *known, *running, count.values, *shape)
        return SavedNorm(z, statistics, y if residual is not None and relu else None, after)

    def _statistics(self, z: Array, count: Count, buffers: Buffers) -> Array:
        """moments (3, C) as norm.cu has them, summed over ranks."""
        c = z.shape[3]
        rows = rows_of(z, pool=False)
        tiles = grid, _ = tiling_of(z, rows, 8)
        moments = buffers.persistent("norm.moments", (3, c), "float64")
        partial = buffers.temporary("norm.partial", (grid[0], c, 3), "float64")
        arrived = buffers.zeros("arrived", grid[1], "uint32")
        self._launch(z, "norm_statistics", tiles, z, partial, arrived, moments, rows, c)
        if count.all_reduce:
            count.all_reduce(moments[1])
            self._launch(z, "norm_recentre", flat(c), moments, rows, count.values, c)
            count.all_reduce(moments[2])
        return moments

    def norm_backward(
        self,
        dy: Array,
        saved: SavedNorm,
        norm: Norm,
        d_gamma: Array,
        d_beta: Array,
        count: Count,
        buffers: Buffers,
        part: Array | None = None,
    ) -> tuple[Array, Array | None]:
        z, statistics, y, (relu, pool, residual) = saved
        c, rows, d_residual = z.shape[3], rows_of(z, pool), None if residual is None else dy
        known = statistics, norm.gamma, norm.beta
        if self._is_small(z, pool, count):
            arguments = dy, part, z, y, *known, d_gamma, d_beta, *saved.shape(), relu
            self._launch(z, "norm_small_backward", small_tiling(z), *arguments)
            return z, d_residual
        tiles = grid, _ = tiling_of(z, rows, 8)
        sums = buffers.persistent("norm.moments", (2, c), "float64")
        partial = buffers.temporary("norm.partial", (grid[0], c, 2), "float64")
        into = partial, buffers.zeros("arrived", grid[1], "uint32"), sums, d_gamma, d_beta
        self._launch(z, "norm_gradient_sums", tiles, dy, part, z, y, *known, *into, *saved.shape(), relu)
        if count.all_reduce:
            count.all_reduce(sums.reshape(-1))
        arguments = dy, z, *known, sums, count.values, *saved.shape(), relu and y is None
        self._launch(z, "norm_input_gradient", tiling_of(z, rows, 4), *arguments)
        return z, d_residual

    def norm_inference(self, z: Array, norm: Norm, y: Array, after: After, buffers: Buffers) -> None:
        relu, pool, residual = after
        tiles = tiling_of(z, rows_of(z, pool), 4)
        known = norm.gamma, norm.beta, norm.running_mean, norm.running_var
        self._launch(z, "norm_apply", tiles, z, residual, None, *known, None, y, 1, *z.shape, pool, relu)

    # activations and residuals

    def activation_forward(
        self, x: Array, b: Array | None, y: Array, slope: float, buffers: Buffers, keep: bool = True
    ) -> Array | None:
        if x.size:
            self._launch(x, "activation_forward", flat_over(x), x, b, y, slope, x.shape[-1], x.size)
        return y if keep and slope < 1 else None

    def activation_backward(
        self, dy: Array, saved: Array | None, db: Array | None, slope: float, buffers: Buffers
    ) -> None:
        c = dy.shape[-1]
        rows = dy.size // c
        tiles = grid, _ = tiling_of(dy, rows, 8)
        partial = buffers.temporary("activation.partial", (grid[0], c), "float64")
        into = partial, buffers.zeros("arrived", grid[1], "uint32"), db
        self._launch(dy, "activation_backward", tiles, dy, saved, *into, slope, rows, c)

    def copy(self, x: Array, y: Array) -> None:
        if x.size:
            self._launch(x, "copy", flat_over(x), x, y, x.size)

    def add_relu_forward(self, x: Array, residual: Array, y: Array, buffers: Buffers) -> Array:
        self._launch(x, "add_relu_forward", flat_over(x), x, residual, y, x.size)
        return y

    def add_relu_backward(self, dy: Array, saved: Array, d_residual: Array) -> None:
        self._launch(dy, "add_relu_backward", flat_over(dy), dy, saved, d_residual, dy.size)

    def add(self, x: Array, y: Array) -> None:
        self._launch(x, "add", flat_over(x), x, y, x.size)

    # pooling, vectors

    def pool_forward(
        self, x: Array, y: Array, over: Windows, average: bool, buffers: Buffers, keep: bool = True
    ) -> Array | None:
        winners = buffers.image("winners", y.shape, "int32") if keep and not average else None
        if y.size:
            shape = *x.shape[1:3], *y.shape[1:3], *over.size, over.stride, over.padding, average
            self._launch(x, "pool_forward", flat(y.size), x, y, winners, *shape, x.shape[3], y.size)
        return winners

    def pool_backward(self, dy: Array, winners: Array | None, over: Windows, dx: Array) -> None:
        if dx.size:
            shape = *dx.shape[1:3], *dy.shape[1:3], *over.size, over.stride, over.padding, winners is None
            self._launch(dy, "pool_backward", flat(dx.size), dy, winners, dx, *shape, dx.shape[3], dx.size)

    def flatten(self, x: Array, y: Array) -> None:
        if x.size:
            pixels = x.shape[1] * x.shape[2]
            self._launch(x, "flatten", flat(x.size), x, y, pixels, x.shape[3], x.size)

    def unflatten(self, dy: Array, dx: Array) -> None:
        if dx.size:
            pixels = dx.shape[1] * dx.shape[2]
            self._launch(dx, "unflatten", flat(dx.size), dy, dx, pixels, dx.shape[3], dx.size)

    def dropout(self, x: Array, y: Array, keys: Array, salt: int, rate: float, buffers: Buffers) -> None:
        if x.size:
            numbers = salt, threshold(rate), rate, x.size // len(x), x.size
            self._launch(x, "dropout", flat_over(x), x, y, keys, *numbers)

    def gather_keys(
        self, keys: Array, source: Array, order: Array, at: Array, batch: int, start: int
    ) -> None:
        n = len(keys)
        if n:
            arguments = keys, source, order, at, batch, start, n
            self.kernels.launch("float32", "gather_keys", *flat(n), *arguments)

    # the network's end

    def global_pool_forward(self, x: Array, y: Array, average: bool) -> None:
        n, h, w, c = x.shape
        if n:
            self._launch(x, "global_pool_forward", one_each(n), x, y, h * w, c, average)

    def global_pool_backward(
        self, dy: Array, x: Array, y: Array, dx: Array, buffers: Buffers, average: bool
    ) -> None:
        n, h, w, c = x.shape
        if n:
            self._launch(x, "global_pool_backward", one_each(n), dy, x, y, dx, h * w, c, average)

    def linear_forward(self, x: Array, w: Array, b: Array, y: Array) -> None:
        if len(x):
            self._launch(x, "linear_forward", one_each(len(x)), x, w, b, y, x.shape[1], len(w))

    def linear_backward(self, dy: Array, x: Array, w: Array, dw: Array, db: Array, dx: Array) -> None:
        n, c = x.shape
        self._launch(x, "linear_backward", one_each(n + len(w)), dy, x, w, dw, db, dx, n, c, len(w))

    def loss_and_gradient(
        self,
        logits: Array,
        labels: Array,
        stop: Array,
        dlogits: Array,
        local_loss: Array,
        step_metrics: Array,
        *,
        loss: str,
        count: int,
        smoothing: float = 0.0,
    ) -> None:
        arrays = logits, labels, stop, dlogits, local_loss, step_metrics
        numbers = count, smoothing, *logits.shape, LOSS_NUMBERS[loss]
        self._launch(logits, "loss_and_gradient", ((1,), (1, THREADS)), *arrays, *numbers)

    # a step's two ends

    def gather_batch(self, x: Array, y: Array, source: Source, at: Array, batch: int, start: int) -> None:
        if len(x):
            arrays = source.images, source.labels, source.order, at
            arguments = *arrays, batch, start, x, y, source.warps, source.cutout, *x.shape[1:]
            self._launch(x, "gather_batch", one_each(len(x)), *arguments)

    def adam(
        self,
        values: Array,
        grads: Array,
        m: Array,
        v: Array,
        rates: Array,
        at: Array,
        compute: Array | None,
        scratch: Array,
        *,
        weight_decay: float,
        record: StepRecord | None = None,
    ) -> None:
        arguments = values, grads, m, v, rates, at, compute, weight_decay, values.size, *ending(record)
        self._launch(values if compute is None else compute, "adam", flat(values.size), *arguments)

    def sgd(
        self,
        values: Array,
        grads: Array,
        velocity: Array | None,
        rates: Array,
        at: Array,
        compute: Array | None,
        scratch: Array,
        *,
        weight_decay: float,
        momentum: float,
        nesterov: bool,
        record: StepRecord | None = None,
    ) -> None:
        numbers = momentum, nesterov, weight_decay, values.size
        arguments = values, grads, velocity, rates, at, compute, *numbers, *ending(record)
        self._launch(values if compute is None else compute, "sgd", flat(values.size), *arguments)

    def average(self, mean: Array, values: Array, scratch: Array, *, decay: float) -> None:
        self._launch(values, "average", flat(values.size), mean, values, decay, values.size)

    def to_bf16(self, x: Array, y: Array) -> None:
        self._launch(y, "to_bf16", flat_over(y), x, y, x.size)

    def from_bf16(self, x: Array, y: Array) -> None:
        self._launch(x, "from_bf16", flat_over(x), x, y, x.size)

    def put_leaf(self, x: Array, leaf: Array, share: float = 1.0) -> None:
        if x.size:
            self._launch(x, "put_leaf", flat(x.size), x, leaf, share, x.size)

    def add_leaves(self, rows: Array, places: Array, total: Array) -> None:
        self._launch(rows, "add_leaves", flat(total.size), rows, places, total, len(places), total.size)
