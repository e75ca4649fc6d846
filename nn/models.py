"""The networks that ship beside ResNet-9: functions of (shape, classes, **options)."""

from __future__ import annotations

from collections.abc import Callable

from nn.layer import Layer, Shape, text
from nn.layers import (
    Conv,
    ConvBN,
    Flatten,
    GlobalAvgPool,
    Linear,
    MaxPool,
    ReLU,
    Residual,
    Sequential,
)
from nn.resnet9 import ResNet9


def scaled(width: float, *counts: int) -> list[int]:
    """Each of `counts` times `width`, at least 1."""
    return [max(1, round(count * width)) for count in counts]


def mlp(_: Shape, classes: int, width: float = 1.0) -> Sequential:
    """Two hidden layers, of 512 and 256 units, on the pixels."""
    first, second = scaled(width, 512, 256)
    return Sequential(
        flat=Flatten(),
        fc1=Linear(first),
        relu1=ReLU(),
        fc2=Linear(second),
        relu2=ReLU(),
        fc3=Linear(classes),
    )


def lenet(shape: Shape, classes: int, width: float = 1.0) -> Sequential:
    """LeNet-5 (LeCun et al. 1998) with ReLU, max-pooling and a full second convolution."""
    if min(shape[:2]) < 12:
        raise ValueError(f"images of {text(shape[:2])}: lenet needs 12×12 or more")
    c1, c2, first, second = scaled(width, 6, 16, 120, 84)
    return Sequential(
        conv1=Conv(c1, kernel=5),
        relu1=ReLU(),
        pool1=MaxPool(2),
        conv2=Conv(c2, kernel=5, padding=0),
        relu2=ReLU(),
        pool2=MaxPool(2),
        flat=Flatten(),
        fc1=Linear(first),
        relu3=ReLU(),
        fc2=Linear(second),
        relu4=ReLU(),
        fc3=Linear(classes),
    )


def resnet20(_: Shape, classes: int, width: float = 1.0) -> Sequential:
    """The 20 layers for small pictures of He et al. (2015, section 4.2), shortcuts by 1×1 convolutions."""

    def stage(c: int, stride: int) -> Sequential:
        shortcut = ConvBN(c, kernel=1, stride=stride, relu=False) if stride > 1 else None
        first = Residual(ConvBN(c, stride=stride), ConvBN(c, relu=False), shortcut=shortcut)
        return Sequential(first, *(Residual(ConvBN(c), ConvBN(c, relu=False)) for _ in range(2)))

    c1, c2, c3 = scaled(width, 16, 32, 64)
    return Sequential(
        stem=ConvBN(c1),
        stage1=stage(c1, 1),
        stage2=stage(c2, 2),
        stage3=stage(c3, 2),
        head=GlobalAvgPool(),
        fc=Linear(classes),
    )


MODELS: dict[str, Callable[..., Layer]] = {
    "resnet9": ResNet9,
    "mlp": mlp,
    "lenet": lenet,
    "resnet20": resnet20,
}
"""The networks that ship, by name."""
