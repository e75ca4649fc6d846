"""Run pytest without CuPy's memory pool, so that compute-sanitizer knows where each array ends.

python tests/gpu/unpooled.py tests/nn/test_kernels.py -k test_loss
"""

from __future__ import annotations

import sys

import cupy
import pytest

if __name__ == "__main__":
    cupy.cuda.set_allocator(None)
    sys.exit(pytest.main(sys.argv[1:]))
