"""ResNet-9 and its four variants.

    stem    conv 1→64
    stage1  conv 64→128, max-pool 2    28×28 → 14×14
    res1    two convs 128→128, residual
    stage2  conv 128→256, max-pool 2   14×14 → 7×7
    res3    two convs 256→256, residual (variant `three-blocks` only)
    stage3  conv 256→256, max-pool 2   7×7 → 3×3
    res2    two convs 256→256, residual
    head    global max-pool (`avgpool`: average), linear 256→10

Every convolution is 3×3, padding 1, without bias, followed by batch norm and ReLU. In `conv-shortcut`
and `three-blocks` each residual's shortcut goes through a 1×1 convolution and batch norm.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nn.backend import NUMPY, Array, Backend
from nn.conv import choose_form, conv_backward, conv_forward
from nn.layers import ConvBN, Head, OnGrad, Pass, Residual
from nn.params import Parameters, Spec
from nn.workspace import Workspace

VARIANTS = ("baseline", "avgpool", "conv-shortcut", "three-blocks")
CLASSES = 10


def channels(width: float) -> tuple[int, int, int]:
    """Channel counts of the three resolutions; every count is scaled by `width`, at least 1."""
    return tuple(max(1, round(count * width)) for count in (64, 128, 256))  # type: ignore[return-value]


class ResNet9:
    """The network: parameters, running statistics (views, by name in `buffers`, of one vector), forward and backward.

    `variant` is one of VARIANTS, `width` multiplies all channel counts; weights come from `seed` alone.
    `activations` is their dtype where it is not the parameters': uint16, which holds the bits of bfloat16.
    """

    def __init__(
        self,
        variant: str = "baseline",
        width: float = 1.0,
        *,
        seed: int = 0,
        backend: Backend = NUMPY,
        dtype: str = "float32",
        activations: str | None = None,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant {variant!r}: choose one of {', '.join(VARIANTS)}")
        c1, c2, c3 = channels(width)
        shortcut = variant in ("conv-shortcut", "three-blocks")
        three = variant == "three-blocks"
        self.backend, self.dtype = backend, np.dtype(dtype)
        self.stages: list[ConvBN | Residual] = [
            ConvBN("stem", 1, c1),
            ConvBN("stage1", c1, c2, pool=True),
            Residual("res1", c2, "shortcut1" if shortcut else None),
            ConvBN("stage2", c2, c3, pool=True),
            *([Residual("res3", c3, "shortcut3")] if three else []),
            ConvBN("stage3", c3, c3, pool=True),
            Residual("res2", c3, "shortcut2" if shortcut else None),
        ]
        self.head = Head(c3, CLASSES, average=variant == "avgpool")
        self.ws = Workspace(backend, activations or dtype)
        self.params = Parameters(self._specs(), backend, dtype, narrow=activations)
        self.statistics = backend.xp.zeros(2 * sum(conv.c_out for conv in self.convs()), self.dtype)
        self.buffers: dict[str, Array] = {}
        self.batches_tracked, at = 0, 0
        for conv in self.convs():
            conv.bind(self.params, self.ws, self.statistics[at : at + 2 * conv.c_out].reshape(2, -1))
            self.buffers |= {
                f"{conv.name}.1.running_mean": conv.running_mean,
                f"{conv.name}.1.running_var": conv.running_var,
            }
            at += 2 * conv.c_out
        self.head.bind(self.params, self.ws)
        self.params.initialise(np.random.default_rng(seed))

    def convs(self) -> list[ConvBN]:
        """All convolutions, in the order of their parameters."""
        return [conv for conv, _ in self.sides()]

    def _specs(self) -> list[Spec]:
        return [spec for conv in self.convs() for spec in conv.specs()] + self.head.specs()

    def forward(self, x: Array, step: Pass) -> Array:
        """Logits (N, 10) for images x (N, 28, 28, 1) scaled to [0, 1]."""
        self.ws.rewind()
        for stage in self.stages:
            x = stage.forward(x, step)
        if step.train:
            self.batches_tracked += 1
        return self.head.forward(x, step)

    def backward(self, dy: Array, step: Pass, on_grad: OnGrad = lambda _: None) -> None:
        """Fill the flat gradient for dy = dL/dlogits; `on_grad` hears of each parameter as its gradient is queued.

        On a GPU gradients of weights come from `backend.branch`, which is joined at the end.
        """
        dx = self.head.backward(dy, on_grad)
        for stage in reversed(self.stages[1:]):
            dx = stage.backward(dx, step, on_grad)
        stem = self.stages[0]
        assert isinstance(stem, ConvBN)
        stem.backward(dx, step, on_grad, need_dx=False)
        if self.backend.branch:
            self.backend.branch.close()

    def rehearse(self, n: int, train: bool) -> None:
        """Run each convolution once for a batch of n, on whatever memory holds: plans are chosen by it.

        Gradients are overwritten, and with `train` the buffers of a step's activations.
        """
        for conv, side in self.sides():
            x = self.ws.ring((n, side, side, conv.c_in))
            y, form = (
                self.ws.ring((n, side, side, conv.c_out)),
                choose_form(x.shape, conv.w.value.shape, conv.geometry, self.backend),
            )
            saved = conv_forward(x, conv.w.compute, conv.geometry, y, self.ws, form, keep=train)
            if train:
                dx = self.ws.ring(x.shape) if conv is not self.stages[0] else None
                conv_backward(y, saved, conv.w.compute, conv.geometry, conv.w.grad, dx, self.ws, form)
        if self.backend.branch:
            self.backend.branch.close()

    def sides(self) -> Iterator[tuple[ConvBN, int]]:
        """All convolutions with the side of their input, in the order of their parameters."""
        side = 28
        for stage in self.stages:
            for conv in stage.convs() if isinstance(stage, Residual) else [stage]:
                yield conv, side
            if isinstance(stage, ConvBN) and stage.pool:
                side //= 2

    def flops(self, train: bool = True) -> float:
        """Floating-point operations for one image: two a product, convolutions done directly.

        Forward, and to `train` input gradient and weight gradient; the first layer has no input gradient. Batch
        norm, pooling and the like, below 2 % at full width, are not counted.
        """
        passes = 3 if train else 1
        total = 2.0 * passes * self.head.channels * CLASSES
        for conv, side in self.sides():
            first = train and conv is self.stages[0]
            total += 2 * (passes - first) * side**2 * conv.kernel**2 * conv.c_in * conv.c_out
        return total

    def state_dict(self) -> dict[str, np.ndarray]:
        """Host copies of parameters and running statistics, as a PyTorch `state_dict` of this network."""
        state = self.params.to_checkpoint(self.params.values)
        for name, value in self.buffers.items():
            state[name] = np.array(self.backend.to_host(value))
        for conv in self.convs():
            state[f"{conv.name}.1.num_batches_tracked"] = np.array(self.batches_tracked, np.int64)
        return {name: state[name] for name in sorted(state)}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """The reverse of `state_dict`; ValueError names the first tensor that is missing, extra or misshapen."""
        own = {name: array.shape for name, array in self.state_dict().items()}
        for name in sorted(own.keys() | state.keys()):
            if name not in state:
                raise ValueError(f"tensor {name} is missing")
            if name not in own:
                raise ValueError(f"tensor {name} is not of this network")
            if state[name].shape != own[name]:
                raise ValueError(
                    f"tensor {name} has shape {state[name].shape}, this network's is {own[name]}"
                )
        self.params.from_checkpoint(state, self.params.values)
        for name, value in self.buffers.items():
            value[...] = self.backend.asarray(state[name].astype(self.dtype))
        self.batches_tracked = int(state["stem.1.num_batches_tracked"])
