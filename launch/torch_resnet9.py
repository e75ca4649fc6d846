"""The same network in PyTorch: the other side of parity tests and benchmarks. PyTorch is optional."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import max_pool2d

from nn.resnet9 import CLASSES, channels


def conv_bn(c_in: int, c_out: int, kernel: int = 3, relu: bool = True, pool: bool = False) -> nn.Sequential:
    layers = [nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(c_out)]
    layers += [nn.ReLU()] if relu else []
    layers += [nn.MaxPool2d(2)] if pool else []
    return nn.Sequential(*layers)


class TorchResNet9(nn.Module):
    """`nn.resnet9.ResNet9` as a PyTorch module, with the same names in its `state_dict`."""

    def __init__(self, variant: str = "baseline", width: float = 1.0) -> None:
        super().__init__()
        c1, c2, c3 = channels(width)
        self.average, self.three = variant == "avgpool", variant == "three-blocks"
        self.project = variant in ("conv-shortcut", "three-blocks")
        self.stem = conv_bn(1, c1)
        self.stage1 = conv_bn(c1, c2, pool=True)
        self.stage2 = conv_bn(c2, c3, pool=True)
        self.stage3 = conv_bn(c3, c3, pool=True)
        self._residual("1", c2)
        self._residual("2", c3)
        if self.three:
            self._residual("3", c3)
        self.fc = nn.Linear(c3, CLASSES)

    def _residual(self, number: str, c: int) -> None:
        self.add_module(f"res{number}", nn.Sequential(conv_bn(c, c), conv_bn(c, c, relu=False)))
        if self.project:
            self.add_module(f"shortcut{number}", conv_bn(c, c, kernel=1, relu=False))

    def _add(self, number: str, x: torch.Tensor) -> torch.Tensor:
        shortcut = getattr(self, f"shortcut{number}")(x) if self.project else x
        return torch.relu(getattr(self, f"res{number}")(x) + shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, 10) for images (N, 1, 28, 28)."""
        x = self._add("1", self.stage1(self.stem(x)))
        x = self.stage2(x)
        if self.three:
            x = self._add("3", x)
        x = self._add("2", self.stage3(x))
        return self.fc(x.mean((2, 3)) if self.average else max_pool2d(x, x.shape[-1]).flatten(1))
