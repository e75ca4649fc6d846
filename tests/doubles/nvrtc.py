"""Compile CUDA C++ for an architecture with NVRTC, which needs no GPU, and say what each kernel takes."""

from __future__ import annotations

import re
from typing import NamedTuple

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")  # A100, H100, B200; the last needs NVRTC 12.8


class Usage(NamedTuple):
    """Of one kernel, or of a function that was not inlined into its kernels (whose registers are 0)."""

    registers: int = 0  # a thread
    shared: int = 0  # bytes a block
    stack: int = 0  # bytes a thread: arrays in local memory, and spills
    spill_stores: int = 0  # bytes a thread
    spill_loads: int = 0


def compile_cuda(code: str, architecture: str) -> dict[str, Usage]:
    """Usage of each kernel of a CUDA text; RuntimeError with the compiler's log where it fails."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(code, "kernels.cu", (), ())
    try:
        nvrtc.compileProgram(
            program, (f"--gpu-architecture={architecture}", "--std=c++17", "--ptxas-options=-v")
        )
        log = nvrtc.getProgramLog(program)
        if not nvrtc.getCUBIN(program):
            raise RuntimeError(f"{architecture}: no cubin\n{log}")
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"{architecture}: {error}\n{nvrtc.getProgramLog(program)}") from None
    finally:
        nvrtc.destroyProgram(program)
    return parse(log)


def parse(log: str) -> dict[str, Usage]:
    """Usage by name, from what `ptxas -v` prints."""
    found: dict[str, Usage] = {}
    entry = function = ""
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            entry = match[1]
        elif match := re.search(r"Function properties for (\w+)", line):
            function = match[1]
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            stack, stores, loads = map(int, match.groups())
            usage = found.get(function, Usage())
            found[function] = usage._replace(stack=stack, spill_stores=stores, spill_loads=loads)
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+)(?:\+\d+)? bytes smem", line)
            found[entry] = found.get(entry, Usage())._replace(
                registers=int(match[1]), shared=int(shared[1]) if shared else 0
            )
    return found
