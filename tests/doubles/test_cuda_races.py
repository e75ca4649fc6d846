"""The detector of races and of accesses out of bounds: it finds what is planted, in toys and in our kernels.

That our kernels as they are have none is shown by `tests/nn/test_kernels.py`, whose cases run under it.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
from cuda_double import HostModule
from test_cuda_double import TOYS

from nn.cuda import kernels

pytestmark = pytest.mark.needs("g++")


def changed(code: str, old: str, new: str) -> str:
    assert code.count(old) >= 1, old
    return code.replace(old, new, 1)


FENCE = "        __threadfence();\n"
COUNT = "        last = atomicAdd(arrived, 1u) == gridDim.x - 1;\n"


FAULTS = [
    (FENCE + COUNT, COUNT, "read after write of partial"),
    (COUNT + FENCE, COUNT, "read after write of partial"),
    (
        "        partial[blockIdx.x] = v;\n" + FENCE,
        FENCE + "        partial[blockIdx.x] = v;\n",
        "of partial",
    ),
    ("atomicAdd(arrived, 1u)", "(*arrived)++", "read after write of arrived"),
    ("    __syncthreads();\n    v = 0;", "    v = 0;", "race: .* of shared memory"),
    ("if (threadIdx.x == 0) *y = v", "if (threadIdx.x < 2) *y = v", "write after write of y"),
    ("i < n; i +=", "i <= n; i +=", "read of 4 bytes outside every argument; the nearest is x"),
    ("v += x[i]", "v += x[i - 1]", "the nearest is x, which it is 4 bytes before"),
    (
        "*y = v, *arrived",
        "y[1] = v, *arrived",
        "write of 8 bytes outside every argument; the nearest is y",
    ),
]
START = TOYS.index("template <int WARPS, class T>")
SUM = TOYS[START : TOYS.index('extern "C" __launch_bounds__(128, 2)')]
VARIANTS = [SUM, *(changed(SUM, old, new) for old, new, _ in FAULTS)]
TOTALS = TOYS[:START] + "".join(
    re.sub(r"\b(block_sum|total)\b", rf"\1_{number}", text) for number, text in enumerate(VARIANTS)
)
"""The kernel `total` as it is and with each of the faults, in one text: total_0, total_1, …"""


def total(number: int) -> float:
    """The sum of 1,000 ones by four blocks, of which the last adds up what the others left."""
    found, partial, arrived = np.zeros(1), np.zeros(4), np.zeros(1, np.uint32)
    function = HostModule(TOTALS, races=True).get_function(f"total_{number}")
    function((4,), (256,), (np.ones(1000, np.float32), np.int32(1000), partial, arrived, found))
    return found[0]


@pytest.mark.parametrize("number", range(1, len(VARIANTS)))
def test_what_is_planted_is_found(number: int) -> None:
    with pytest.raises(RuntimeError, match=rf"^total_{number}: .*{FAULTS[number - 1][2]}"):
        total(number)


def test_a_sum_over_blocks_is_clean_and_looked_at() -> None:
    assert total(0) == 1000
    module = HostModule(TOYS, races=True)
    x, y = np.arange(128, dtype=np.float32), np.zeros(128, np.float32)
    module.get_function("rotate")((1,), (128,), (x, y, np.int32(1)))
    assert (y == np.roll(x, -1)).all()
    assert module.accesses >= 4 * 128, "x, y, and shared memory twice"


CELLS = """
extern "C" __global__ void cells(unsigned short* bytes, void* memory, int what) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    float* narrow = (float*)memory;
    if (what == 0) bytes[i] = i;                                  // neighbours, each its own
    if (what == 1) { ((float4*)memory)[i] = {1, 1, 1, 1}; if (i == 3) narrow[4] = 2; }
    if (what == 2) narrow[threadIdx.x] = i;                       // of both blocks
    if (what == 3) { narrow[i] = 0; __syncwarp(); narrow[i ^ 1] = 1; }
    if (what == 4) { narrow[i] = 0; __syncthreads(); narrow[i ^ 1] = 1; }
    if (what == 5) atomicMax(narrow, 1.0f);
    if (what == 6) { atomicMax(narrow, 1.0f); if (narrow[0] < 0) bytes[i] = 1; }
}
"""


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (0, None),
        (1, "write after write of memory, element 4"),
        (2, "write after write of memory, element 0"),
        (3, "write after write of memory"),
        (4, None),
        (5, None),
        (6, "write after read of memory"),
    ],
)
def test_each_element_counts_whatever_reaches_it(what: int, words: str | None) -> None:
    """Of a wide access, each element that it covers counts; atomics are no race among themselves."""
    cells = HostModule(CELLS, races=True).get_function("cells")

    def run() -> None:
        cells((2,), (4,), (np.zeros(8, np.uint16), np.zeros(64, np.float32), np.int32(what)))

    if words is None:
        run()
    else:
        with pytest.raises(RuntimeError, match=f"^cells: race: {words}"):
            run()


def stem_weight_gradient(module: HostModule) -> np.ndarray:
    """On two images of 5×5 with six channels, by three blocks."""
    n, h, w, c, blocks = 2, 5, 5, 6, 3
    rng = np.random.default_rng(0)
    x, dz = (rng.normal(size=shape).astype(np.float32) for shape in ((n, h, w), (n, h, w, c)))
    partial, arrived, dw = np.zeros((blocks, 9, c)), np.zeros(1, np.uint32), np.zeros((c, 3, 3), np.float32)
    arrays = x, dz, partial, arrived, dw
    module.get_function("stem_weight_gradient")((blocks, 1), (8, 32), (*arrays, *map(np.int32, (n, h, w, c))))
    return dw


def norm_gradient_sums(module: HostModule) -> np.ndarray:
    n, h, w, c = 2, 8, 8, 16
    z, dy, ones = np.ones((n, h, w, c), np.float32), np.ones((n, h, w, c), np.float32), np.ones(c, np.float32)
    saved, partial, arrived = np.ones((2, c), np.float32), np.zeros((2, c, 2)), np.zeros(1, np.uint32)
    sums, d_gamma, d_beta = np.zeros((2, c)), np.zeros(c, np.float32), np.zeros(c, np.float32)
    arrays = dy, np.uint64(0), z, np.uint64(0), saved, ones, ones, partial, arrived, sums, d_gamma, d_beta
    numbers = map(np.int32, (n, h, w, c, 0, 0))
    module.get_function("norm_gradient_sums")((2, 1), (16, 16), (*arrays, *numbers))
    return sums


def adam(module: HostModule) -> np.ndarray:
    """By three blocks, the last of which ends the step."""
    values, grads, m, v, history = (np.ones(n, np.float32) for n in (700, 700, 700, 700, 8))
    rates, at, arrived, results = np.ones((1, 2)), np.zeros(1, np.int64), np.zeros(1, np.uint32), np.ones(3)
    loss, metrics = (results[:n].astype(np.float32) for n in (1, 3))
    update = values, grads, m, v, rates, at, np.uint64(0), np.float64(0), np.int64(700)
    ending = history, loss, metrics, arrived, np.int32(2)
    module.get_function("adam")((3,), (256,), (*update, *ending))
    assert (at, arrived) == (1, 0)
    return history


KERNELS = {"stem": stem_weight_gradient, "norm": norm_gradient_sums, "update": adam}


def faulty(name: str, old: str, new: str, order: str, monkeypatch: pytest.MonkeyPatch) -> HostModule:
    """Our kernels of one file with a fault."""
    monkeypatch.setattr(kernels, "FILES", ("common", "norm_parts", name))
    return HostModule(changed(kernels.source("float32"), old, new), order, races=True)


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        (
            "stem",
            "        __threadfence();\n        last =",
            "        last =",
            "race: read after write of partial",
        ),
        ("stem", "            __threadfence();\n", "", "race: "),
        ("stem", "arrived) {\n    __syncthreads();", "arrived) {", "race: read after write of partial"),
        ("stem", "at] = x[k];\n    __syncthreads();", "at] = x[k];", "race: .* of shared memory"),
        ("stem", "y < h && x >= 0", "y <= h && x >= 0", "read of 4 bytes outside .* nearest is x"),
        ("stem", "bool here = first + run < rows", "bool here = true", ".* outside every argument"),
        ("stem", "channel < c && threadIdx.y == 0) partial", "threadIdx.y == 0) partial", ".* partial"),
        ("stem", "shared[9 * THREADS]", "shared[8 * THREADS]", ".* outside .* nearest is shared memory"),
        ("norm", "shared[2 * THREADS]", "shared[THREADS]", ".* outside .* nearest is shared memory"),
        (
            "norm",
            "last = atomicAdd(arrived, 1u) ==",
            "atomicAdd(arrived, 1u), last = blockIdx.x ==",
            "race: ",
        ),
        (
            "update",
            "        __threadfence();\n        last =",
            "        last =",
            "race: write after read of at",
        ),
        ("update", "            __threadfence();\n", "", "race: write after read of at"),
        ("update", "arrived) {\n    __syncthreads();", "arrived) {", "race: write after read of at"),
        ("update", "!last_to_arrive(arrived)", "blockIdx.x > 0", "race: .* of at"),
    ],
)
def test_a_fault_planted_in_our_kernels_is_found(
    name: str, old: str, new: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one of two orders: a block that takes itself for the last is found out where it runs first."""
    found = []
    for order in ("forward", "reverse"):
        module = faulty(name, old, new, order, monkeypatch)
        try:
            KERNELS[name](module)
        except RuntimeError as error:
            found.append(str(error))
    assert found
    assert all(re.match(rf"\w+: {words}", each) for each in found), found


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("", "", None),
        ("? size / PACK", "? (size + 1) / PACK", "outside every argument; the nearest is x"),
        ("(aligned(arrays) && ...)", "true", "misaligned"),
    ],
)
def test_faults_of_two_elements_at_once_are_found(
    old: str, new: str, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16: an odd element that is left, and arrays that begin at an odd one."""
    monkeypatch.setattr(kernels, "FILES", ("common", "norm_parts", "update"))
    module = HostModule(changed(kernels.source("bfloat16"), old, new), races=True)
    function, x, y = module.get_function("to_bf16"), np.ones(8, np.float32), np.zeros(8, np.uint16)

    def run() -> None:
        for first in (0, 1):
            function((1,), (256,), (x[first : first + 7], y[first : first + 7], np.int64(7)))

    if words is None:
        run()
        assert (y == 0x3F80).all()
    else:
        with pytest.raises(RuntimeError, match=words):
            run()


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("name", KERNELS)
def test_our_kernels_as_they_are(name: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert np.isfinite(KERNELS[name](faulty(name, "", "", order, monkeypatch))).all()
