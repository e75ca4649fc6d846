"""How an option is declared: its help, its choices, and the rules of its number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import field
from typing import Any, NamedTuple

from distrib.files import alternatives
from nn.optim import OPTIMIZERS


class Cap(int):
    """A recipe's limit, which may exceed the number of images in the data."""


class Rule(NamedTuple):
    """What a number must be."""

    holds: Callable[[Any], bool]
    remedy: str


ONE_OR_MORE = Rule(lambda value: value >= 1, "give 1 or more")
ABOVE_ZERO = Rule(lambda value: 0 < value < math.inf, "give a finite number above 0")
ZERO_OR_MORE = Rule(lambda value: 0 <= value < math.inf, "give a finite number, 0 or more")
BELOW_ONE = Rule(lambda value: value < 1, "give less than 1")


def at_most(bound: float) -> Rule:
    return Rule(lambda value: value <= bound, f"give {bound} or less")


MOST_TRACED = 100
"""Steps of a trace: each rank keeps them in memory."""


def steps_between(text: str | None) -> tuple[int, int] | None:
    """(first, last) of steps given as "10:14"; None for anything else."""
    parts = (text or "").split(":")
    if len(parts) != 2 or not all(part.isascii() and part.isdecimal() and len(part) < 19 for part in parts):
        return None
    first, last = map(int, parts)
    return (first, last) if 1 <= first <= last < first + MOST_TRACED else None


LARGEST_BATCH, LARGEST_SEED = 1_000_000, (1 << 128) - 1


def owners(name: str) -> str:
    """The optimizers that have the option `name`, as "--optimizer sgd or another"."""
    of = [key for key, optimizer in OPTIMIZERS.items() if name in optimizer.options]
    return f"--optimizer {alternatives(of)}"


def option(
    default: Any, text: str, *rules: Rule, choices: Iterable[str] = (), may_change: bool = False
) -> Any:
    """A field that is an option, with its help, the rules of its numbers, or its choices.

    One that `may_change` does not affect the result, so a resumed run may have another value.
    """
    names = tuple(choices)
    text = text.replace("{}", alternatives(names))
    more = {"help": text, "rules": rules, "choices": names, "may_change": may_change}
    return field(default=default, metadata=more)
