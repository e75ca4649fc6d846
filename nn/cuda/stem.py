"""The first layer's convolution of images with one channel, on the kernels of stem.cu."""

from __future__ import annotations

from typing import Any

from nn.array import Array
from nn.buffers import Buffers
from nn.cuda.kernels import ELEMENT_OF, RUN, Kernels
from nn.cuda.ops import tiling


class Stem:
    """An algorithm of convolution (see `nn.ops.conv`): 3×3 on one channel, nine neighbours in registers."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    @staticmethod
    def supports(
        x_shape: tuple[int, ...], w_shape: tuple[int, ...], geometry: Any, need_dx: bool = True
    ) -> bool:
        """Only where the input's gradient is not wanted: as the first layer of images with one channel."""
        return not need_dx and tuple(w_shape[:3]) == (3, 3, 1) and tuple(geometry) == (1, 1, 1)

    def forward(self, x: Array, w: Array, g: Any, y: Array, buffers: Buffers, keep: bool) -> Array | None:
        n, h, width, c = y.shape
        if n:
            tiles = tiling(n * h * width, c, 8)
            arguments = x, w.transpose(3, 0, 1, 2), y, n, h, width, c
            self.kernels.launch(ELEMENT_OF[str(x.dtype)], "stem_forward", *tiles, *arguments)
        return buffers.save(x) if keep else None

    def backward(
        self, dy: Array, x: Array, w: Array, g: Any, dw: Array, dx: Array | None, buffers: Buffers
    ) -> None:
        assert dx is None, "the first layer's input has no gradient"
        n, h, width, c = dy.shape
        grid, block = tiling(n * h * width, c, RUN)
        partial = buffers.temporary("stem.partial", (grid[0], 9, c), "float64")
        arrived = buffers.zeros("stem.arrived", grid[1], "uint32")
        arguments = x, dy, partial, arrived, dw.transpose(3, 0, 1, 2), n, h, width, c
        self.kernels.launch(ELEMENT_OF[str(x.dtype)], "stem_weight_gradient", grid, block, *arguments)
