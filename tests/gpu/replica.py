"""Run the GPU path's tests that need no GPU in the replica of a GPU machine's software: `make replica`.

    gpu-kit/first.sh --run python tests/gpu/replica.py results/gpu/replica.md

Prints one line of versions and one of results, and writes both, with what was not run, to the file given.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

from versions import versions

TESTS = (
    "tests/nn/test_kernels.py",
    "tests/nn/test_cudnn.py",
    "tests/nn/test_compile.py",
    "tests/nn/test_conv.py",
    "tests/nn/test_batch.py",
    "tests/nn/test_optim.py",
    "tests/doubles",
    "tests/distrib/test_graph.py",
    "tests/distrib/test_nccl.py",
    "tests/distrib/test_collectives.py",
    "tests/distrib/test_strict.py",
    "tests/launch/test_bench_allreduce.py",
    "tests/launch/test_gpu_report.py",
)


def main() -> int:
    target, more = Path(sys.argv[1]), sys.argv[2:]
    about = versions()
    print(about, flush=True)
    begin = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "--durations=10", *(more or TESTS)]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as tests:
        for line in tests.stdout or ():
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    result = re.sub(r"^=+ | =+$", "", lines[-1] if lines else "pytest printed nothing")
    broken = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    left_out = [line for line in lines if line.startswith("not run: ")]
    target.write_text(page(about, result, time.monotonic() - begin, broken + left_out, more))
    print(result)
    return tests.returncode


def page(about: str, result: str, seconds: float, lines: list[str], more: list[str]) -> str:
    """The record of a run, in Markdown."""
    what = f" of {' '.join(more)}" if more else ""
    text = "# The GPU path's tests on the first GPU machine's software, without a GPU\n\n"
    text += f"`make replica`{what}, {time.strftime('%d %B %Y')}, {seconds:.0f} s.\n\n"
    text += f"- {about}\n- **{result}**\n"
    return text + "".join(f"- {line}\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
