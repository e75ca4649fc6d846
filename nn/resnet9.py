"""ResNet-9 and its four variants.

    stem    conv 1→64
    stage1  conv 64→128, max-pool 2    28×28 → 14×14
    res1    two convs 128→128, residual
    stage2  conv 128→256, max-pool 2   14×14 → 7×7
    res3    two convs 256→256, residual (variant `three-blocks` only)
    stage3  conv 256→256, max-pool 2   7×7 → 3×3
    res2    two convs 256→256, residual
    head    global max-pool (`avgpool`: average)
    fc      linear 256→10

for images of 28×28 pixels, one channel and 10 classes. Every convolution is 3×3, padding 1, without bias,
followed by batch norm and ReLU; a residual is added before the ReLU. In `conv-shortcut` and `three-blocks`
each residual's shortcut goes through a 1×1 convolution and batch norm.
"""

from __future__ import annotations

from dataclasses import dataclass

from nn.layer import Shape, named
from nn.layers import ConvBN, GlobalAvgPool, GlobalMaxPool, Linear, Residual, Sequential


@dataclass(frozen=True)
class Variant:
    """In what a variant differs from the baseline."""

    average: bool = False  # at the end, instead of the maximum
    project: bool = False  # the shortcuts
    third: bool = False  # a third residual


VARIANTS = {
    "baseline": Variant(),
    "avgpool": Variant(average=True),
    "conv-shortcut": Variant(project=True),
    "three-blocks": Variant(project=True, third=True),
}


def channels(width: float) -> tuple[int, int, int]:
    """Channel counts of the three resolutions; every count is scaled by `width`, at least 1."""
    return tuple(max(1, round(count * width)) for count in (64, 128, 256))  # type: ignore[return-value]


def ResNet9(shape: Shape, classes: int, variant: str = "baseline", width: float = 1.0) -> Sequential:
    """The layers for images of `shape` (H, W, C); `width` multiplies all channel counts."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    if min(shape[:2]) < 8:
        raise ValueError(
            f"images of {shape[0]}×{shape[1]}: ResNet9 halves them three times: give 8×8 or more"
        )
    of, (c1, c2, c3) = VARIANTS[variant], channels(width)

    def residual(number: int, c: int) -> Residual:
        shortcut = named(f"shortcut{number}", ConvBN(c, kernel=1, relu=False)) if of.project else None
        return Residual(ConvBN(c), ConvBN(c, relu=False), shortcut=shortcut)

    third = {"res3": residual(3, c3)} if of.third else {}
    return Sequential(
        stem=ConvBN(c1),
        stage1=ConvBN(c2, pool=2),
        res1=residual(1, c2),
        stage2=ConvBN(c3, pool=2),
        **third,
        stage3=ConvBN(c3, pool=2),
        res2=residual(2, c3),
        head=GlobalAvgPool() if of.average else GlobalMaxPool(),
        fc=Linear(classes),
    )
