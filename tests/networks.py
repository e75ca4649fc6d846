"""Networks that several tests train."""

from __future__ import annotations

from typing import Any

from nn.layer import Shape
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
    ReLU,
    Residual,
    Sequential,
)
from nn.network import Network
from nn.resnet9 import ResNet9

SHAPE, CLASSES = (28, 28, 1), 10


def resnet9(variant: str = "baseline", width: float = 1.0, **more: Any) -> Network:
    """ResNet-9 as MNIST has it."""
    return Network(ResNet9, SHAPE, CLASSES, {"variant": variant, "width": width}, **more)


def block_of_one(shape: Shape, classes: int) -> Sequential:
    return Sequential(
        stem=ConvBN(4),
        stage=ConvBN(6, pool=2),
        res=Residual(ConvBN(6, relu=False)),
        head=GlobalMaxPool(),
        fc=Linear(classes),
    )


def block_of_three(shape: Shape, classes: int) -> Sequential:
    """A bottleneck, with 1×1 convolutions around the 3×3."""
    body = ConvBN(3, kernel=1), ConvBN(3), ConvBN(6, kernel=1, relu=False)
    return Sequential(
        stem=ConvBN(6, pool=2), res=Residual(*body), more=ConvBN(5), head=GlobalAvgPool(), fc=Linear(classes)
    )


def block_of_five(shape: Shape, classes: int) -> Sequential:
    """It ends with a ReLU of its own, so that the addition is a pass by itself; its shortcut has two
    layers."""
    body = ConvBN(4), ConvBN(5), ConvBN(7, pool=2), ConvBN(5), ConvBN(6)
    shortcut = Sequential(ConvBN(5, pool=2), ConvBN(6, kernel=1, relu=False))
    return Sequential(
        stem=ConvBN(4), res=Residual(*body, shortcut=shortcut), head=GlobalMaxPool(), fc=Linear(classes)
    )


def skip_around_two(shape: Shape, classes: int) -> Sequential:
    """Residuals inside a residual, and the network begins with one."""
    inner = [Residual(ConvBN(5), ConvBN(5, relu=False)) for _ in range(2)]
    return Sequential(
        first=Residual(ConvBN(5), shortcut=ConvBN(5, kernel=1, relu=False)),
        stage=ConvBN(5, pool=2),
        outer=Residual(*inner),
        last=Residual(Residual(ConvBN(5), ConvBN(5, relu=False)), ConvBN(5, relu=False)),
        head=GlobalMaxPool(),
        fc=Linear(classes),
    )


def no_residual(shape: Shape, classes: int) -> Sequential:
    """Strides, a kernel of five, and two linear layers."""
    return Sequential(
        ConvBN(5, kernel=5, stride=2),
        ConvBN(6, relu=False, pool=2),
        ConvBN(7, stride=2),
        GlobalAvgPool(),
        Linear(8),
        Linear(classes),
    )


def every_layer(shape: Shape, classes: int) -> Sequential:
    """Every layer there is, dropout apart, fused and not: strides, paddings and dilations of all kinds."""
    return Sequential(
        BatchNorm(),  # takes nothing over
        Conv(5, kernel=4, stride=2, padding=1),
        LeakyReLU(0.1),
        MaxPool(3, stride=2, padding=1),
        Residual(BatchNorm(), ReLU(), Conv(5, bias=False), BatchNorm()),
        Residual(Conv(5), Conv(5, dilation=2)),
        BatchNorm(),
        LeakyReLU(),
        AvgPool((2, 3), stride=1, padding=1),
        Conv(6, kernel=2, bias=False),
        BatchNorm(),
        ReLU(),
        MaxPool(2),
        Conv(4, kernel=1),
        ReLU(),
        Flatten(),
        Linear(12),
        ReLU(),
        Linear(classes),
    )


def pooled_first(shape: Shape, classes: int) -> Sequential:
    """Nothing before the pooling asks for a gradient."""
    return Sequential(AvgPool(2), ReLU(), MaxPool(2), Flatten(), Linear(9), LeakyReLU(0.2), Linear(classes))


def vectors(shape: Shape, classes: int) -> Sequential:
    """Batch norm and dropout on images and on vectors."""
    return Sequential(
        Conv(4, stride=3),
        BatchNorm(),
        ReLU(),
        Dropout(0.3),
        Flatten(),
        Linear(7),
        BatchNorm(),
        Dropout(),
        Linear(classes),
    )


NETWORKS = {
    function.__name__: function
    for function in (
        *(block_of_one, block_of_three, block_of_five, skip_around_two, no_residual),
        *(every_layer, pooled_first),
    )
}
"""Models beside ResNet-9 that draw nothing: functions of (shape, classes)."""
