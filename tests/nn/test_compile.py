"""Every CUDA kernel compiles for every architecture, and none spills registers. Needs NVRTC, but no GPU."""

from __future__ import annotations

import pytest
from cuda_double import signatures
from nvrtc import ARCHITECTURES, compile_cuda

from nn.cuda import kernels

pytestmark = pytest.mark.needs("nvrtc")

ELEMENTS = ("float32", "float64", "bfloat16")
PRESSED = r"""
extern "C" __global__ void easy(float* x) {
    __shared__ float s[32];
    s[threadIdx.x] = x[0];
    __syncthreads();
    x[1] = s[0];
}
extern "C" __global__ void __launch_bounds__(1024) pressed(float* x, int n) {
    float a[200];
    #pragma unroll
    for (int i = 0; i < 200; i++) a[i] = x[i * n];
    for (int j = 0; j < n; j++)
        #pragma unroll
        for (int i = 0; i < 200; i++) a[i] = a[i] * a[(i + 7) % 200] + x[j];
    #pragma unroll
    for (int i = 0; i < 200; i++) x[i * n] = a[i];
}
"""


@pytest.mark.needs("g++")
@pytest.mark.parametrize(
    ("version", "architecture"), [*((12, each) for each in ARCHITECTURES), (13, "sm_90"), (13, "sm_100")]
)
@pytest.mark.parametrize("element", ELEMENTS)
def test_kernels_compile_without_spills(element: str, version: int, architecture: str) -> None:
    code = kernels.source(element)
    usage = compile_cuda(code, architecture, version)
    assert set(signatures(code)) <= set(usage)
    spilling = {name: taken for name, taken in usage.items() if taken.spill_stores or taken.spill_loads}
    assert not spilling


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_spilling_kernel_is_recognised(architecture: str) -> None:
    usage = compile_cuda(PRESSED, architecture)
    assert usage["pressed"].spill_stores > 0
    assert usage["pressed"].spill_loads > 0
    assert usage["easy"].spill_stores == usage["easy"].spill_loads == 0
    assert usage["easy"].shared == 128
    assert 0 < usage["easy"].registers <= 32


def test_what_does_not_compile_says_so() -> None:
    with pytest.raises(
        RuntimeError, match=r"sm_90: .*\n.*kernels.cu\(2\): error: identifier .undefined_name."
    ):
        compile_cuda('extern "C" __global__ void k(int* y) {\n  *y = undefined_name; }', "sm_90")
