"""Our networks in PyTorch: the other side of parity tests and benchmarks. PyTorch is optional."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from distrib.errors import UserError
from nn.layer import Layer, Shape
from nn.layers import (
    AvgPool,
    BatchNorm,
    Conv,
    ConvBN,
    Dropout,
    Flatten,
    GlobalAvgPool,
    GlobalMaxPool,
    LeakyReLU,
    Linear,
    MaxPool,
    Pool,
    ReLU,
    Residual,
    Sequential,
)
from nn.resnet9 import ResNet9

Function = Callable[[torch.Tensor], torch.Tensor]


class TorchNetwork(nn.Module):
    """The layers that `model(shape, classes, **options)` makes, with the same names in its `state_dict`."""

    def __init__(self, model: Callable[..., Layer], shape: Shape, classes: int, **options: Any) -> None:
        super().__init__()
        layers = model(shape, classes, **options)
        layers.build("", shape)
        self._function = self.convert(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, classes) for images (N, C, H, W)."""
        return self._function(x)

    def convert(self, layer: Layer) -> Function:
        """`layer` as a function of images (N, C, H, W); its modules become this one's."""
        if type(layer) not in CONVERTERS:
            raise UserError(
                f"{layer.name}: {type(layer).__name__} has no counterpart in PyTorch here: use our layers"
            )
        return CONVERTERS[type(layer)](self, layer)

    def place(self, name: str, module: nn.Module) -> nn.Module:
        """Register `module` under a path of names; returns it."""
        parent: nn.Module = self
        *path, last = name.split(".")
        for key in path:
            if key not in parent._modules:
                parent.add_module(key, nn.Module())
            parent = parent.get_submodule(key)
        parent.add_module(last, module)
        return module


def TorchResNet9(
    variant: str = "baseline", width: float = 1.0, shape: Shape = (28, 28, 1), classes: int = 10
) -> TorchNetwork:
    """ResNet-9, for MNIST where nothing else is given."""
    return TorchNetwork(ResNet9, shape, classes, variant=variant, width=width)


def _sequential(network: TorchNetwork, layer: Sequential) -> Function:
    functions = [network.convert(child) for child in layer.children()]

    def run(x: torch.Tensor) -> torch.Tensor:
        for function in functions:
            x = function(x)
        return x

    return run


def _conv(network: TorchNetwork, layer: Conv) -> Function:
    sizes = layer.kernel, *layer.geometry
    return network.place(layer.name, nn.Conv2d(layer.c_in, layer.out, *sizes, bias=layer.bias))


def _batch_norm(network: TorchNetwork, layer: BatchNorm) -> Function:
    kind = nn.BatchNorm2d if len(layer.in_shape) == 3 else nn.BatchNorm1d
    return network.place(layer.name, kind(layer.in_shape[-1]))


def _relu(_: TorchNetwork, __: ReLU) -> Function:
    return torch.relu


def _leaky_relu(_: TorchNetwork, layer: LeakyReLU) -> Function:
    return lambda x: functional.leaky_relu(x, layer.slope)


def _pool(_: TorchNetwork, layer: Pool) -> Function:
    pool = functional.avg_pool2d if layer.average else functional.max_pool2d
    return lambda x: pool(x, *layer.over)


def _flatten(_: TorchNetwork, __: Flatten) -> Function:
    return lambda x: x.flatten(1)


def _dropout(network: TorchNetwork, layer: Dropout) -> Function:
    return network.place(layer.name, nn.Dropout(layer.rate))


def _residual(network: TorchNetwork, layer: Residual) -> Function:
    shortcut = network.convert(layer.shortcut) if layer.shortcut else nn.Identity()
    body = [network.convert(child) for child in layer.body]

    def run(x: torch.Tensor) -> torch.Tensor:
        y = x
        for function in body:
            y = function(y)
        return torch.relu(y + shortcut(x))

    return run


def _max(_: TorchNetwork, __: GlobalMaxPool) -> Function:
    return lambda x: functional.max_pool2d(x, x.shape[2:]).flatten(
        1
    )  # the first of equal maxima gets the gradient


def _mean(_: TorchNetwork, __: GlobalAvgPool) -> Function:
    return lambda x: x.mean((2, 3))


def _linear(network: TorchNetwork, layer: Linear) -> Function:
    return network.place(layer.name, nn.Linear(layer.in_shape[0], layer.out))


CONVERTERS: dict[type[Layer], Callable[[TorchNetwork, Any], Function]] = {
    Sequential: _sequential,
    ConvBN: _sequential,
    Conv: _conv,
    BatchNorm: _batch_norm,
    ReLU: _relu,
    LeakyReLU: _leaky_relu,
    MaxPool: _pool,
    AvgPool: _pool,
    Flatten: _flatten,
    Dropout: _dropout,
    Residual: _residual,
    GlobalMaxPool: _max,
    GlobalAvgPool: _mean,
    Linear: _linear,
}
