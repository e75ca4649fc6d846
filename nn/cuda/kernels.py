"""The loader of the CUDA kernels, faster versions of the operations of `nn.ops`.

The sources are the .cu files beside this one. They include nothing, so NVRTC compiles them with no toolkit
around, and a C++ compiler can run their logic on the CPU. `nn.cuda.ops` launches them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nn.ops.dropout import GOLDEN
from nn.ops.norm import EPS, MOMENTUM
from nn.ops.update import BETA1, BETA2, EPS_HAT

FILES = (
    *(
        "common",
        "norm_parts",
        "norm",
        "norm_small",
        "activation",
        "batch",
        "stem",
        "pool",
        "flatten",
        "linear",
    ),
    *("dropout", "loss", "residual", "update", "tree"),
)
THREADS = 256
"""Of a block, unless said otherwise."""

SMALL_LANES, SMALL_ROWS = 8, 64
"""Channels of a block of norm_small.cu, 32 bytes of float32, a sector of memory; and its threads for each.
"""

RUN = 8
"""Pixels that a thread of the first layer's weight gradient takes in a row."""

KEEP = {"float32": 28, "float64": 16, "bfloat16": 28}
"""Values that a thread of norm_small.cu holds in registers."""

PACK = {"float32": 1, "float64": 1, "bfloat16": 2}
"""Neighbours that a thread loads at once where it can: see common.cu."""

ELEMENTS = {  # ELEM, REAL, ACC of common.cu
    "float32": ("float", "float", "float"),
    "float64": ("double", "double", "double"),
    "bfloat16": ("bf16", "float", "float"),
}
ELEMENT_OF = {"float32": "float32", "float64": "float64", "uint16": "bfloat16"}
"""Element type by the dtype of activations. NumPy has no bfloat16: its bits travel as uint16."""

SCALARS = {"int": np.int32, "double": np.float64, "Step": np.int64}
POINTERS = {
    "float": "float32",
    "double": "float64",
    "int": "int32",
    "Step": "int64",
    "unsigned": "uint32",
    "unsigned char": "uint8",
    "bf16": "uint16",
}
NULL = np.uint64(0)

Launchable = Callable[[tuple[int, ...], tuple[int, ...], tuple[Any, ...]], None]


def source(element: str) -> str:
    """The CUDA C++ text of all kernels for activations of `element`, a key of ELEMENTS."""
    elem, real, acc = ELEMENTS[element]
    constants = {
        "ELEM": elem,
        "REAL": real,
        "ACC": acc,
        "EPS": EPS,
        "MOMENTUM": MOMENTUM,
        "BETA1": BETA1,
        "BETA2": BETA2,
        "EPS_HAT": EPS_HAT,
        "THREADS": THREADS,
        "SMALL_LANES": SMALL_LANES,
        "SMALL_ROWS": SMALL_ROWS,
        "KEEP": KEEP[element],
        "PACK": PACK[element],
        "RUN": RUN,
        "GOLDEN": f"{GOLDEN}u",
    }
    if element == "bfloat16":
        constants["BFLOAT16"] = 1
    head = "".join(f"#define {name} {value}\n" for name, value in constants.items())
    return head + "".join((Path(__file__).parent / f"{name}.cu").read_text("utf-8") for name in FILES)


@functools.cache
def signatures(element: str) -> dict[str, tuple[tuple[str, bool], ...]]:
    """For each kernel of `source(element)`: its parameters as (C type without ELEM, REAL, ACC; pointer?)."""
    names = dict(zip(("ELEM", "REAL", "ACC"), ELEMENTS[element], strict=True))
    found = {}
    for name, parameters in re.findall(
        r"__global__ void (?:__launch_bounds__\(.*?\) )?(\w+)\(([^)]*)\)", source(element)
    ):
        types = []
        for parameter in parameters.split(","):
            words = re.sub(r"const|volatile|__restrict__", "", parameter).rsplit(maxsplit=1)[0].split("*")
            kind = " ".join(words[0].split())
            types.append((names.get(kind, kind), len(words) > 1 or "*" in parameter))
        found[name] = tuple(types)
    return found


class Kernels:
    """The compiled kernels by element type; `compile` makes of a text what has `get_function(name)`."""

    def __init__(self, compile: Callable[[str], Any]) -> None:
        self._compile = compile
        self._modules: dict[str, Any] = {}
        self._functions: dict[tuple[str, str], tuple[Launchable, tuple[tuple[str, bool], ...]]] = {}

    def launch(
        self, element: str, name: str, grid: tuple[int, ...], block: tuple[int, ...], *arguments: Any
    ) -> None:
        """Queue a kernel on the current stream. Arrays must be of the parameter's type; None is null."""
        found = self._functions.get((element, name))
        if found is None:
            if element not in self._modules:
                self._modules[element] = self._compile(source(element))
            found = self._modules[element].get_function(name), signatures(element)[name]
            self._functions[element, name] = found
        function, types = found
        assert len(arguments) == len(types), f"{name} takes {len(types)} arguments, not {len(arguments)}"
        function(grid, block, tuple(map(argument, arguments, types)))


def argument(value: Any, parameter: tuple[str, bool]) -> Any:
    """`value` as a parameter of `signatures` takes it; one of another type is refused."""
    kind, pointer = parameter
    if not pointer:
        return SCALARS[kind](value)
    if value is None:
        return NULL
    assert value.dtype == POINTERS[kind], f"an array of {value.dtype} for a pointer to {kind}"
    assert value.flags.c_contiguous, "kernels take contiguous arrays"
    return value
