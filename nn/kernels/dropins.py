"""Drop-ins for the replaceable operations of `nn.functional` and `nn.optim`, on the kernels of this folder.

Each has its plain version's arguments and effects, up to rounding, and launches one or two kernels; nothing here
allocates after a shape's first call or waits for the device, so that all of it may be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nn.backend import Array
from nn.functional import SumOverRanks
from nn.kernels import ELEMENT_OF, KEEP, SMALL_LANES, SMALL_ROWS, THREADS, Kernels
from nn.workspace import Workspace

BLOCKS = 1024
"""Most blocks of a launch: several for each multiprocessor of the largest GPU."""


def tiling(rows: int, c: int, rows_per_thread: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(grid, block) over rows × channels: channels along x in powers of two up to a warp, rows along y."""
    lanes = min(32, 1 << max(0, c - 1).bit_length())
    groups = -(-c // lanes)
    block = (lanes, THREADS // lanes)
    chunks = -(-rows // (block[1] * rows_per_thread))
    return (max(1, min(chunks, BLOCKS // groups)), groups), block


def small_tiling(c: int) -> tuple[tuple[int], tuple[int, int]]:
    """(grid, block) of the kernels of norm_small.cu."""
    return (-(-c // SMALL_LANES),), (SMALL_LANES, SMALL_ROWS)


def flat(size: int) -> tuple[tuple[int], tuple[int]]:
    """(grid, block) over a vector."""
    return (max(1, min(-(-size // THREADS), BLOCKS)),), (THREADS,)


def rows_of(z: Array, pool: bool) -> int:
    """What a thread of a kernel takes one after another: pixels, with pooling 2×2 windows."""
    n, h, w, _ = z.shape
    return n * -(-h // 2) * -(-w // 2) if pool else n * h * w


class DropIns:
    """The operations by name; `kernels` compiles and launches."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def operations(self) -> dict[str, Callable[..., Any]]:
        """Name of each replaced operation → its drop-in."""
        return {
            name: getattr(self, name)
            for name in (
                "norm_forward",
                "norm_backward",
                "norm_inference",
                "head_forward",
                "head_backward",
                "add",
                "loss_and_gradient",
                "take_batch",
                "end_step",
                "adam",
                "sgd",
                "average",
                "narrow",
                "widen",
            )
        }

    def _launch(
        self, like: Array, name: str, tiles: tuple[tuple[int, ...], tuple[int, ...]], *arguments: Any
    ) -> None:
        """Launch the kernel for activations of the dtype of `like`."""
        self.kernels.launch(ELEMENT_OF[str(like.dtype)], name, *tiles, *arguments)

    def _is_small(self, z: Array, pool: bool, sum_over_ranks: SumOverRanks | None) -> bool:
        """Whether norm_small.cu takes it: few rows, and no sum over ranks between its two halves."""
        keep = KEEP[ELEMENT_OF[str(z.dtype)]] // (4 if pool else 1)
        return sum_over_ranks is None and 0 < rows_of(z, pool) <= SMALL_ROWS * keep

    def norm_forward(
        self,
        z: Array,
        gamma: Array,
        beta: Array,
        running_mean: Array,
        running_var: Array,
        y: Array,
        ws: Workspace,
        *,
        count: int,
        sum_over_ranks: SumOverRanks | None,
        residual: Array | None = None,
        relu: bool = True,
        pool: bool = False,
    ) -> Any:
        n, h, w, c = z.shape
        saved = ws.keep("norm", (2, c), str(gamma.dtype))
        running = running_mean, running_var, saved, y
        if self._is_small(z, pool, sum_over_ranks):
            self._launch(
                z,
                "norm_small_forward",
                small_tiling(c),
                z,
                residual,
                gamma,
                beta,
                *running,
                n,
                h,
                w,
                c,
                pool,
                relu,
            )
        else:
            tiles = grid, _ = tiling(n * h * w, c, 8)
            moments = ws.scratch("norm.moments", (3, c), "float64")
            partial = ws.scratch("norm.partial", (grid[0], c, 3), "float64")
            self._launch(
                z,
                "norm_statistics",
                tiles,
                z,
                partial,
                ws.zeros("arrived", grid[1], "uint32"),
                moments,
                n * h * w,
                c,
            )
            if sum_over_ranks:
                sum_over_ranks(moments[1])
                self._launch(z, "norm_recentre", flat(c), moments, n * h * w, count, c)
                sum_over_ranks(moments[2])
            self._launch(
                z,
                "norm_apply",
                tiling(rows_of(z, pool), c, 4),
                z,
                residual,
                moments,
                gamma,
                beta,
                *running,
                count,
                n,
                h,
                w,
                c,
                pool,
                relu,
            )
        return z, saved, y if residual is not None and relu else None, residual is not None, relu, pool

    def norm_backward(
        self,
        dy: Array,
        saved: Any,
        gamma: Array,
        beta: Array,
        d_gamma: Array,
        d_beta: Array,
        ws: Workspace,
        *,
        count: int,
        sum_over_ranks: SumOverRanks | None,
    ) -> Array:
        z, statistics, y, _, relu, pool = saved
        n, h, w, c = z.shape
        shape = n, h, w, c, pool
        if self._is_small(z, pool, sum_over_ranks):
            self._launch(
                z,
                "norm_small_backward",
                small_tiling(c),
                dy,
                z,
                y,
                statistics,
                gamma,
                beta,
                d_gamma,
                d_beta,
                *shape,
                relu,
            )
            return z
        tiles = grid, _ = tiling(rows_of(z, pool), c, 8)
        sums = ws.scratch("norm.moments", (2, c), "float64")
        partial = ws.scratch("norm.partial", (grid[0], c, 2), "float64")
        self._launch(
            z,
            "norm_gradient_sums",
            tiles,
            dy,
            z,
            y,
            statistics,
            gamma,
            beta,
            partial,
            ws.zeros("arrived", grid[1], "uint32"),
            sums,
            d_gamma,
            d_beta,
            *shape,
            relu,
        )
        if sum_over_ranks:
            sum_over_ranks(sums.reshape(-1))
        self._launch(
            z,
            "norm_input_gradient",
            tiling(rows_of(z, pool), c, 4),
            dy,
            z,
            statistics,
            gamma,
            beta,
            sums,
            count,
            *shape,
            relu and y is None,
        )
        return z

    def norm_inference(
        self,
        z: Array,
        gamma: Array,
        beta: Array,
        running_mean: Array,
        running_var: Array,
        y: Array,
        ws: Workspace,
        *,
        residual: Array | None = None,
        relu: bool = True,
        pool: bool = False,
    ) -> None:
        n, h, w, c = z.shape
        self._launch(
            z,
            "norm_apply",
            tiling(rows_of(z, pool), c, 4),
            z,
            residual,
            None,
            gamma,
            beta,
            running_mean,
            running_var,
            None,
            y,
            1,
            n,
            h,
            w,
            c,
            pool,
            relu,
        )

    def head_forward(self, x: Array, w: Array, b: Array, pooled: Array, logits: Array, average: bool) -> None:
        n, h, width, c = x.shape
        if n:
            self._launch(
                x, "head_forward", ((n,), (THREADS,)), x, w, b, pooled, logits, h * width, c, len(w), average
            )

    def head_backward(
        self,
        dlogits: Array,
        x: Array,
        pooled: Array,
        w: Array,
        dw: Array,
        db: Array,
        dx: Array,
        ws: Workspace,
        average: bool,
    ) -> None:
        n, h, width, c = x.shape
        self._launch(
            x,
            "head_backward",
            ((n + len(w),), (THREADS,)),
            dlogits,
            x,
            pooled,
            w,
            dw,
            db,
            dx,
            n,
            h * width,
            c,
            len(w),
            average,
        )

    def add(self, x: Array, y: Array) -> None:
        self._launch(x, "add", flat(x.size), x, y, x.size)

    def loss_and_gradient(
        self,
        logits: Array,
        labels: Array,
        stop: Array,
        dlogits: Array,
        own: Array,
        tail: Array,
        *,
        loss: str,
        count: int,
        smoothing: float = 0.0,
    ) -> None:
        self._launch(
            logits,
            "loss_and_gradient",
            ((1,), (1, THREADS)),
            logits,
            labels,
            stop,
            dlogits,
            own,
            tail,
            count,
            smoothing,
            *logits.shape,
            loss == "bce",
        )

    def take_batch(
        self,
        images: Array,
        labels: Array,
        order: Array,
        at: Array,
        batch: int,
        start: int,
        x: Array,
        y: Array,
        warps: Array | None = None,
    ) -> None:
        if len(x):
            self._launch(
                x,
                "take_batch",
                ((len(x),), (THREADS,)),
                images,
                labels,
                order,
                at,
                batch,
                start,
                x,
                y,
                warps,
                *x.shape[1:3],
            )

    def end_step(self, history: Array, own: Array, tail: Array, at: Array) -> None:
        self._launch(history, "end_step", ((1,), (1,)), history, own, tail, at, len(history))

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
    ) -> None:
        self._launch(
            values if compute is None else compute,
            "adam",
            flat(values.size),
            values,
            grads,
            m,
            v,
            rates,
            at,
            compute,
            weight_decay,
            values.size,
        )

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
    ) -> None:
        self._launch(
            values if compute is None else compute,
            "sgd",
            flat(values.size),
            values,
            grads,
            velocity,
            rates,
            at,
            compute,
            momentum,
            nesterov,
            weight_decay,
            values.size,
        )

    def average(self, mean: Array, values: Array, scratch: Array, *, decay: float) -> None:
        self._launch(values, "average", flat(values.size), mean, values, decay, values.size)

    def narrow(self, x: Array, y: Array) -> None:
        self._launch(y, "narrow", flat(x.size), x, y, x.size)

    def widen(self, x: Array, y: Array) -> None:
        self._launch(x, "widen", flat(x.size), x, y, x.size)


class Stem:
    """A form of convolution (see `nn.conv`): 3×3 on one input channel, each pixel's nine neighbours in registers."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def supports(self, x_shape: tuple[int, ...], w_shape: tuple[int, ...], geometry: Any) -> bool:
        """With fewer than 4 outputs a network has a second layer with one input, whose gradient is wanted."""
        return tuple(w_shape[:3]) == (3, 3, 1) and w_shape[3] >= 4 and tuple(geometry) == (1, 1, 1)

    def forward(self, x: Array, w: Array, g: Any, y: Array, ws: Workspace, keep: bool) -> Array | None:
        n, h, width, c = y.shape
        if n:
            self.kernels.launch(
                ELEMENT_OF[str(x.dtype)],
                "stem_forward",
                *tiling(n * h * width, c, 8),
                x,
                w.transpose(3, 0, 1, 2),
                y,
                n,
                h,
                width,
                c,
            )
        return ws.hold(x) if keep else None

    def backward(
        self, dy: Array, x: Array, w: Array, g: Any, dw: Array, dx: Array | None, ws: Workspace
    ) -> None:
        assert dx is None, "the first layer's input has no gradient"
        n, h, width, c = dy.shape
        grid, block = tiling(n * h * width, c, 32)
        partial = ws.scratch("stem.partial", (grid[0], 9, c), "float64")
        self.kernels.launch(
            ELEMENT_OF[str(x.dtype)],
            "stem_weight_gradient",
            grid,
            block,
            x,
            dy,
            partial,
            ws.zeros("stem.arrived", grid[1], "uint32"),
            dw.transpose(3, 0, 1, 2),
            n,
            h,
            width,
            c,
        )
