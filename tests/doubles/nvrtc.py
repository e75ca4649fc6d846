"""Compile CUDA C++ for an architecture with NVRTC, which needs no GPU, and say what each kernel takes."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import re
from pathlib import Path
from typing import NamedTuple

from cuda_double import cached

PACKAGES = {12: "nvidia-cuda-nvrtc-cu12", 13: "nvidia-cuda-nvrtc"}
FLAGS = (
    b"--std=c++17",
    b"-ftz=true",
    b"--device-as-default-execution-space",
    b"--ptxas-options=-v",
)
"""What `cupy.RawModule` and `nn.cuda.backend` give, and a report of registers."""

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")  # A100, H100, B200; the last needs NVRTC 12.8


class Usage(NamedTuple):
    """Of one kernel, or of a function that was not inlined into its kernels (whose registers are 0)."""

    registers: int = 0  # a thread
    shared: int = 0  # bytes a block
    stack: int = 0  # bytes a thread: arrays in local memory, and spills
    spill_stores: int = 0  # bytes a thread
    spill_loads: int = 0


@functools.cache
def library(version: int) -> ctypes.CDLL:
    """NVRTC of CUDA `version`, as pip installs it."""
    package = importlib.metadata.distribution(PACKAGES[version])
    paths = [Path(str(file.locate())) for file in package.files or () if ".so" in file.name]
    for path in sorted(paths, key=lambda path: "builtins" not in path.name):  # NVRTC finds them loaded
        found = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL if "builtins" in path.name else ctypes.RTLD_LOCAL)
    return found


def compile_cuda(code: str, architecture: str, version: int = 12) -> dict[str, Usage]:
    """Usage of each kernel of a CUDA text, compiled as CuPy does; RuntimeError with the compiler's log.

    What the same compiler said of the same text is taken from the cache.
    """

    def make(made: Path, scratch: Path) -> None:
        made.write_text(_log(code, architecture, version))

    compiler = PACKAGES[version], importlib.metadata.version(PACKAGES[version])
    about = (architecture, *compiler, *(flag.decode() for flag in FLAGS))
    return parse(cached(".log", code, about, make).read_text())


def _log(code: str, architecture: str, version: int) -> str:
    """What the compiler says; RuntimeError where there is no cubin."""
    nvrtc, program = library(version), ctypes.c_void_p()
    flags = [f"-arch={architecture}".encode(), *FLAGS]
    arguments = code.encode(), b"kernels.cu", 0, None, None
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), *arguments) == 0
    try:
        failed = nvrtc.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        text = log.value.decode()
        if failed or nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)) or not size.value:
            raise RuntimeError(f"{architecture}: NVRTC {version} gives no cubin\n{text}")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return text


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
