"""Generates images to benchmark machines and try networks: synthetic:NxHxWxC:K."""

from __future__ import annotations

import re
from math import prod

import numpy as np

from distrib.data.dataset import Dataset, make
from distrib.data.sniff import memory
from distrib.errors import UserError

FORM = re.compile("synthetic:{0}x{0}x{0}x{0}:{0}".format(r"([1-9]\d{0,9})"))


def recognises(name: str) -> bool:
    """Whether --data asks for synthetic images."""
    return name.startswith("synthetic:")


LABEL_BYTES = 40
"""Of memory for one image's label, its permutations and its class's name."""


def read(name: str) -> Dataset:
    """Generate N training images H×W×C of K classes, and a fifth as many test images; always the same ones.

    Each class has its own pattern under noise, so a network can learn them.
    """
    found = FORM.fullmatch(name)
    if not found:
        raise UserError(f"--data {name}: give synthetic:NxHxWxC:K, as synthetic:5000x32x32x3:100")
    n, h, w, c, k = map(int, found.groups())
    if n * (LABEL_BYTES + 8 * prod((h, w, c))) > memory() or k > n:
        what = "more classes than images" if k > n else "more than this machine's memory"
        raise UserError(f"--data {name}: {what}: give other numbers")
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, (k, h, w, c), np.uint8)

    def part(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.permutation(np.arange(count) % k)
        noise = rng.integers(0, 256, (count, h, w, c), np.uint8)
        return (patterns[labels] // 2 + noise // 2).astype(np.uint8), labels

    return make(name, part(n), part(max(k, n // 5)), tuple(map(str, range(k))))
