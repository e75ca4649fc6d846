"""The double that runs CUDA C++ on the CPU: what it computes, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import strict_array
from conftest import LIMIT, environment
from cuda_double import ORDERS, HostModule, build, signatures

pytestmark = pytest.mark.needs("g++")

TOYS = r"""
#define ELEM float      // macros, typedefs and structs name types
typedef ELEM REAL;
struct bf16 { unsigned short bits; };
constexpr int THREADS = 256;
/* extern "C" __global__ void commented(int n) {} */
static __device__ unsigned calls;

template <int WARPS, class T>
static __device__ __forceinline__ T block_sum(T v) {
    __shared__ T part[WARPS];
    for (int m = warpSize / 2; m; m /= 2) v += __shfl_xor_sync(0xffffffff, v, m);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0;
    for (int i = 0; i < WARPS; i++) v += part[i];
    __syncthreads();  // part is written again by the next call
    return v;
}

extern "C" __global__ void __launch_bounds__(THREADS)
total(const REAL* __restrict__ x, int n, double* partial, unsigned* arrived, double* y) {
    double v = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) v += x[i];
    v = block_sum<THREADS / 32>(v);
    __shared__ unsigned last, again;
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = v;
        __threadfence();
        last = atomicAdd(arrived, 1u) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    if (!last) return;
    v = block_sum<THREADS / 32>(threadIdx.x < gridDim.x ? partial[threadIdx.x] : 0.0);
    if (threadIdx.x == 0) *y = v, *arrived = 0;
}

extern "C" __launch_bounds__(128, 2) __global__ void rotate(const float* x, float* y, int barrier) {
    __shared__ float row[128];
    row[threadIdx.x] = x[threadIdx.x];
    if (barrier) __syncthreads();
    y[threadIdx.x] = row[(threadIdx.x + 1) % blockDim.x];
}

extern "C" __global__ void
types(ELEM* e, const bf16* b, unsigned char* u, long long big, double wide, unsigned bits) {
    e[0] = b ? b->bits : -1, e[1] = u[0], e[2] = big >> 32, e[3] = wide, e[4] = bits;
}

extern "C" __global__ void where(int* y) {
    int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    y[block * blockDim.x * blockDim.y * blockDim.z + thread] =
        blockIdx.z * 1000 + threadIdx.z * 100 + threadIdx.y * 10 + threadIdx.x;
}

extern "C" __global__ void leftover(float* y, int write) {
    __shared__ float s[2];
    y[blockIdx.x] = s[1];
    if (write) s[1] = 7;
}

extern "C" __global__ void shuffles(int* y) {
    int t = threadIdx.x;
    y[t] = __shfl_xor_sync(0xffffffff, t, 5);
    y[32 + t] = __shfl_down_sync(0xffffffff, t, 3);
    y[64 + t] = __shfl_up_sync(0xffffffff, t, 3, 8);
    y[96 + t] = __shfl_sync(0xffffffff, t, 2, 16);
    y[128 + t] = (int)__ballot_sync(0xffffffff, t % 3 == 0);
    y[160 + t] = __any_sync(0xffffffff, t == 9) + 2 * __all_sync(0xffffffff, t == 9);
}

extern "C" __global__ void votes(int* y, int limit, int absent) {
    if (threadIdx.x < absent) return;  // counts as arrived
    bool below = (int)threadIdx.x < limit;
    int any = __syncthreads_or(below), all = __syncthreads_and(below), count = __syncthreads_count(below);
    y[threadIdx.x] = any + 2 * all + 4 * count;
}

extern "C" __global__ void half_absent(float* y) {
    if (threadIdx.x % 2) return;
    y[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1.f, threadIdx.x < 16 ? 2 : 1);
}

extern "C" __global__ void count_calls(unsigned* y) { *y = ++calls; }

extern "C" __global__ void wrong(int* y, int how) {
    __shared__ int s[8];
    int t = threadIdx.x;
    if (how == 0 && t < 32) __syncthreads();
    if (how == 0 && t >= 32) __syncwarp(), __syncthreads();
    if (how == 1) { if (t % 2) __syncwarp(); else __syncthreads(); }
    if (how == 2) __syncwarp(0xff);
    if (how == 3) s[t] = 1;
    if (how == 4) y[0] = t / (t - 5);
    if (how == 5) y[0] = 2147483647 + t;
    if (how == 6) y[0] = *(int*)((char*)y + t + 1);
    if (how == 7) y[0] = *(int*)(y - y + (long long)0);
    if (how == 8) { if (t == 3) __trap(); __syncthreads(); }
    if (how == 9) y[t] = t;
}
"""


@pytest.fixture(scope="module")
def toys() -> HostModule:
    return HostModule(TOYS)


def test_signatures() -> None:
    found = signatures(TOYS)
    assert list(found) == [
        "total",
        "rotate",
        "types",
        "where",
        "leftover",
        "shuffles",
        "votes",
        "half_absent",
        "count_calls",
        "wrong",
    ]
    assert found["total"] == [
        ("const REAL* __restrict__", "x"),
        ("int", "n"),
        ("double*", "partial"),
        ("unsigned*", "arrived"),
        ("double*", "y"),
    ]
    assert found["types"][:2] == [("float*", "e"), ("const bf16*", "b")]
    with pytest.raises(ValueError, match="nameless"):
        signatures("__global__ void nameless(int n) {}")


@pytest.mark.parametrize("order", ORDERS)
def test_reduction_by_shuffles_shared_memory_and_the_last_block(toys: HostModule, order: str) -> None:
    toys.order = order
    x = np.random.default_rng(0).standard_normal(5000, dtype=np.float32)
    partial, arrived, y = np.full(7, np.nan), np.zeros(1, np.uint32), np.zeros(1)
    for _ in range(2):  # the counter is back at zero
        toys.get_function("total")((7,), (256,), (x, np.int32(x.size), partial, arrived, y))
        assert y[0] == pytest.approx(x.sum(dtype=float), rel=1e-12)
        assert arrived[0] == 0


def _rotated(toys: HostModule, order: str, barrier: int) -> np.ndarray:
    toys.order = order
    x, y = np.arange(128, dtype=np.float32), np.empty(128, np.float32)
    toys.get_function("rotate")((1,), (128,), (x, y, np.int32(barrier)))
    return y


def test_a_missing_barrier_shows(toys: HostModule) -> None:
    for order in ORDERS:
        np.testing.assert_array_equal(_rotated(toys, order, 1), np.roll(np.arange(128), -1))
    forward, reverse, shuffled = (_rotated(toys, order, 0) for order in ORDERS)
    assert np.isnan(forward[:127]).all()
    assert forward[127] == 0
    assert np.isnan(reverse[127])
    np.testing.assert_array_equal(reverse[:127], np.arange(1, 128))
    assert 0 < np.isnan(shuffled).sum() < 127


def test_shared_memory_is_neither_zero_nor_left_over(toys: HostModule) -> None:
    y = np.zeros(6, np.float32)
    toys.get_function("leftover")((6,), (1,), (y, np.int32(1)))
    assert np.isnan(y).all()


@pytest.mark.parametrize("order", ORDERS)
def test_indices(toys: HostModule, order: str) -> None:
    toys.order = order
    y = np.full((5, 2, 3, 2, 3, 4), -1, np.int32)
    toys.get_function("where")((3, 2, 5), (4, 3, 2), (y,))
    block, _, _, z, line, x = np.indices(y.shape)
    np.testing.assert_array_equal(y, block * 1000 + z * 100 + line * 10 + x)


def test_warp_primitives(toys: HostModule) -> None:
    y, lane = np.zeros((6, 32), np.int32), np.arange(32)
    toys.get_function("shuffles")((1,), (32,), (y,))
    np.testing.assert_array_equal(y[0], lane ^ 5)
    np.testing.assert_array_equal(y[1], np.where(lane + 3 < 32, lane + 3, lane))
    np.testing.assert_array_equal(y[2], np.where(lane % 8 >= 3, lane - 3, lane))
    np.testing.assert_array_equal(y[3], lane // 16 * 16 + 2)
    assert set(y[4].view(np.uint32)) == {sum(1 << i for i in range(0, 32, 3))}
    assert set(y[5]) == {1}


@pytest.mark.parametrize(
    ("limit", "absent", "value"), [(0, 0, 0), (40, 0, 161), (100, 0, 403), (100, 60, 163)]
)
def test_votes_count_the_threads_that_are_left(toys: HostModule, limit: int, absent: int, value: int) -> None:
    y = np.full(100, -1, np.int32)
    toys.get_function("votes")((1,), (100,), (y, np.int32(limit), np.int32(absent)))
    assert set(y[absent:]) == {value}
    assert set(y[:absent]) <= {-1}


def test_a_shuffle_from_an_exited_lane_gives_nan(toys: HostModule) -> None:
    y = np.zeros(32, np.float32)
    toys.get_function("half_absent")((1,), (32,), (y,))
    assert set(y[:16:2]) == {1}
    assert np.isnan(y[16::2]).all()


WRONG = [
    "wait at different barriers",
    "divergent barrier.*__syncwarp on line.*__syncthreads on line|"
    "divergent barrier.*__syncthreads on line.*__syncwarp on line",
    "not in its mask",
    "index outside an array",
    "division by zero",
    "integer overflow",
    "misaligned or null",
    "misaligned or null",
    r"__trap, .*thread \(3, 0, 0\)",
]


@pytest.mark.parametrize("how", range(len(WRONG)))
def test_kernels_that_cannot_go_on(toys: HostModule, how: int) -> None:
    y, wrong = np.zeros(64, np.int32), toys.get_function("wrong")
    toys.order = "forward"
    with pytest.raises(RuntimeError, match=f"^wrong: .*({WRONG[how]})"):
        wrong((2,), (64,), (y, np.int32(how)))
    wrong((2,), (64,), (y, np.int32(9)))  # and the module still works
    np.testing.assert_array_equal(y, np.arange(64))


def test_argument_types(toys: HostModule) -> None:
    y, types = np.zeros(5, np.float32), toys.get_function("types")
    good = (
        y,
        np.array([3], np.uint16),
        np.array([4], np.uint8),
        np.int64(5 << 32),
        np.float64(6),
        np.uint32(7),
    )
    types((1,), (1,), good)
    np.testing.assert_array_equal(y, [3, 4, 5, 6, 7])
    types((1,), (1,), (y, np.uint64(0), *good[2:]))
    assert y[0] == -1
    frozen = np.zeros(5, np.float32)
    frozen.flags.writeable = False
    for number, name, bad in [
        (0, "e", np.zeros(5)),
        (0, "e", frozen),
        (0, "e", np.uint64(8)),
        (0, "e", None),
        (1, "b", np.zeros(1, np.int16)),
        (2, "u", np.zeros(1, bool)),
        (3, "big", np.int32(1)),
        (3, "big", 1),
        (4, "wide", np.float32(1)),
        (4, "wide", 1.0),
        (5, "bits", np.int32(1)),
        (5, "bits", np.zeros((), np.uint32)),
    ]:
        with pytest.raises(TypeError, match=rf"^types: parameter {name} is .* got "):
            types((1,), (1,), (*good[:number], bad, *good[number + 1 :]))
    for count in (5, 7):
        with pytest.raises(TypeError, match=f"types takes a tuple of 6 arguments, got {count}"):
            types((1,), (1,), (*good, np.int32(0))[:count])
    with pytest.raises(TypeError, match=r"got builtins\.list"):
        types((1,), (1,), list(good))


@pytest.mark.parametrize(
    ("grid", "block", "error"),
    [
        ((0,), (1,), ValueError),
        ((1,), (0,), ValueError),
        ((1, 65536), (1,), ValueError),
        ((1,), (1025,), ValueError),
        ((1,), (1, 1, 65), ValueError),
        ((1,), (33, 32), ValueError),
        ((1,), (129,), ValueError),
        ((), (1,), TypeError),
        ((1, 1, 1, 1), (1,), TypeError),
        (1, (1,), TypeError),
        ((1.0,), (1,), TypeError),
        ([1], (1,), TypeError),
    ],
)
def test_shapes_that_cuda_refuses(toys: HostModule, grid: tuple, block: tuple, error: type) -> None:
    x = np.zeros(128, np.float32)
    with pytest.raises(error):
        toys.get_function("rotate")(grid, block, (x, x.copy(), np.int32(1)))


def test_memory_written_beside_a_restrict_pointer(toys: HostModule) -> None:
    memory, arrived, total = np.zeros(8), np.zeros(1, np.uint32), toys.get_function("total")
    with pytest.raises(ValueError, match="total: x and y overlap"):
        total((1,), (256,), (memory.view(np.float32), np.int32(1), np.zeros(1), arrived, memory[7:]))
    total((1,), (256,), (memory[1:].view(np.float32), np.int32(1), np.zeros(1), arrived, memory[:1]))


def test_device_arrays_that_are_not_numpys(toys: HostModule) -> None:
    x, y = map(strict_array.asarray, np.array([np.arange(128), np.zeros(128)], np.float32))
    toys.get_function("rotate")((1,), (128,), (x, y, np.int32(1)))
    with strict_array.synchronisation():
        np.testing.assert_array_equal(strict_array.asnumpy(y), np.roll(np.arange(128), -1))


def test_libraries_share_no_variable_and_launches_are_listed() -> None:
    first, second, y = HostModule(TOYS), HostModule(TOYS + "static int other;"), np.zeros(1, np.uint32)
    for module, calls in ((first, 2), (second, 1)):
        for _ in range(calls):
            module.get_function("count_calls")((1,), (1,), (y,))
        assert module.launches == ["count_calls"] * calls
    assert y[0] == 1
    with pytest.raises(KeyError, match="no kernel 'absent'"):
        first.get_function("absent")
    first.order = "sideways"
    with pytest.raises(ValueError, match="sideways"):
        first.get_function("count_calls")((1,), (1,), (y,))


@pytest.mark.parametrize("declaration", ["extern __shared__ float s[];", "__shared__ struct { int a; } s;"])
def test_shared_memory_of_other_forms_is_refused(declaration: str) -> None:
    with pytest.raises(ValueError, match="__shared__"):
        build(f'extern "C" __global__ void k(float* y) {{ {declaration} }}')


def test_what_does_not_compile_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"kernels:2:.*undefined_name"):
        build('extern "C" __global__ void k(int* y) {\n  *y = undefined_name; }')


def test_processes_that_build_at_once_share_the_library(tmp_path: Path) -> None:
    program = "import cuda_double as c; print(c.build('extern \"C\" __global__ void k(int* y) { *y = 1; }'))"
    env = environment({"TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent)})
    running = [
        subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    paths = {process.communicate(timeout=LIMIT)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0] * 3
    assert paths == {str(path) for path in tmp_path.glob("cuda_on_cpu-*/*.so")}
    assert len(paths) == 1
