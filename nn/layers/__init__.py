"""The layers: each holds its parameters and remembers what its backward needs, nothing else.

A layer says only what comes out; what goes in is inferred when a network of layers is built:

    Sequential(
        stem=ConvBN(32),
        res1=Residual(ConvBN(32), ConvBN(32, relu=False)),
        head=GlobalMaxPool(),
        fc=Linear(10),
    )
"""

from nn.layers.activation import LeakyReLU, ReLU
from nn.layers.containers import ConvBN, Residual, Sequential
from nn.layers.convolution import Conv
from nn.layers.normalisation import BatchNorm
from nn.layers.pooling import AvgPool, GlobalAvgPool, GlobalMaxPool, GlobalPool, MaxPool, Pool
from nn.layers.vector import Dropout, Flatten, Linear

__all__ = [
    "AvgPool",
    "BatchNorm",
    "Conv",
    "ConvBN",
    "Dropout",
    "Flatten",
    "GlobalAvgPool",
    "GlobalMaxPool",
    "GlobalPool",
    "LeakyReLU",
    "Linear",
    "MaxPool",
    "Pool",
    "ReLU",
    "Residual",
    "Sequential",
]
