"""Double of `cupy.RawModule` for tests without a GPU: the CUDA C++ text is compiled by g++ and run on the
CPU.

    module = HostModule(nn.cuda.kernels.source("float32"))
    module.get_function("scale")((blocks,), (256,), (x, np.float32(2), np.int32(x.size)))

* Fibers stand for threads, one block runs after another (cuda_on_cpu.h says how barriers work). `order` is
  that of the blocks, warps and lanes: a kernel that lacks a barrier gives other results in another order.
* A launch refuses what CUDA refuses, and what it leaves undefined as far as that shows: argument types,
  shapes, divergent barriers, memory written through a `__restrict__` pointer and reached through another.
* Shared memory is NaN before each block. An index outside a shared or local array, a misaligned pointer, an
  integer overflow and a division by zero raise RuntimeError.
* With `races`, so do two accesses that nothing orders, and one outside every argument (cuda_races.cpp).

Not as on a GPU: blocks do not wait for each other (one that spins on another's write hangs), `a * b + c` is
not contracted to fma, functions round as the C library's. Inline PTX and dynamic shared memory do not
compile.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import math
import operator
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FOLDER = Path(__file__).parent
HEADER, RACES = FOLDER / "cuda_on_cpu.h", FOLDER / "cuda_races.cpp"
ORDERS = ("forward", "reverse", "shuffled")
GRID_LIMIT, BLOCK_LIMIT, MAX_THREADS = (2**31 - 1, 65535, 65535), (1024, 1024, 64), 1024
CXX = ("g++", "-std=c++17")
FLAGS = (
    "-O2",
    "-w",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fvisibility=hidden",
    "-fno-stack-protector",
    "-U_FORTIFY_SOURCE",  # else _longjmp refuses to change stacks
    "-fsanitize=bounds,alignment,null,integer-divide-by-zero,signed-integer-overflow",
    "-fno-sanitize-recover",
)
INSTRUMENTED = ("-DRACES", "-fsanitize=thread", "-fno-tree-vectorize")  # vectors would hide who reads what
BRACKETS = {"(": 1, "[": 1, "{": 1, "<": 1, ")": -1, "]": -1, "}": -1, ">": -1}


class Kernel(NamedTuple):
    """What the text says of a kernel: (type, name) of each parameter, first value of `__launch_bounds__`."""

    parameters: list[tuple[str, str]]
    bound: str


def _compile(*command: str | Path, text: str | None = None) -> str:
    done = subprocess.run([*CXX, *map(str, command)], input=text, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, CXX + command))}\n{done.stderr}")
    return done.stdout


@functools.cache
def preprocess(code: str) -> str:
    """The text with macros expanded and comments gone; its lines keep their numbers."""
    return _compile("-E", "-undef", "-x", "c++", "-", text=code).replace('"<stdin>"', '"kernels"')


def _split(text: str) -> list[str]:
    """The parts between the commas that are in no brackets, stripped of white space."""
    parts, depth = [""], 0
    for character in text:
        depth += BRACKETS.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [" ".join(part.split()) for part in parts if part.strip()]


def _parameter(text: str) -> tuple[str, str]:
    match = re.fullmatch(r"(.*[\s*&>])(\w+)", text)
    if not match or match[2] in ("__restrict__", "__restrict", "const"):
        return text, ""
    return match[1].strip(), match[2]


@functools.cache
def _kernels(code: str) -> dict[str, Kernel]:
    text = re.sub(r"^#.*$", "", preprocess(code), flags=re.M)
    block = re.search(r'extern\s*"C"\s*\{', text)
    found: dict[str, Kernel] = {}
    for declaration in re.findall(r"[^;{}]*\b__global__\b[^;{}]*", text):
        bounds = re.search(r"__launch_bounds__\s*(\((?:[^()]|\([^()]*\))*\))", declaration)
        plain = declaration.replace(bounds[0], " ") if bounds else declaration
        match = re.fullmatch(r"(.*)\bvoid\s+(\w+)\s*\((.*)\)\s*", plain, re.S)
        if not match or not (block or re.search(r'extern\s*"C"', match[1])):
            raise ValueError(f'not of the form extern "C" __global__ void name(…): {declaration.strip()}')
        parameters = [_parameter(part) for part in _split(match[3]) if part != "void"]
        found[match[2]] = Kernel(parameters, _split(bounds[1][1:-1])[0] if bounds else str(MAX_THREADS))
    return found


def signatures(code: str) -> dict[str, list[tuple[str, str]]]:
    """(type, name) of each parameter of each kernel of a CUDA text, macros expanded."""
    return {name: kernel.parameters for name, kernel in _kernels(code).items()}


def _shared(match: re.Match[str]) -> str:
    """A declaration of shared memory as references to memory that each block finds filled with NaN."""
    first, *more = _split(re.sub(r"\b(?:alignas|__align__)\s*\([^)]*\)", "", match[2]))
    declaration = re.fullmatch(r"(.*[\s*>])(\w+\s*(?:\[[^\]]*\]\s*)*)", first)
    if "extern" in (match[1] or "") or "{" in match[2] or not declaration:
        raise ValueError(f"only static arrays and scalars can be __shared__, not {match[0]}")
    result = ""
    for variable in (declaration[2], *more):
        name, bracket, sizes = variable.partition("[")
        kind, where = f"type_of_shared_{name.strip()}", f"place_of_shared_{name.strip()}"
        result += f"struct {where}; using {kind} = {declaration[1]}{bracket}{sizes}; "
        result += f"{kind}& {name} = ::cuda_on_cpu::Shared<{kind}, {where}>::get(); "
    return result


def host_source(code: str) -> str:
    """C++ for g++ of a CUDA text."""
    text = re.sub(r"\b(extern\s+|static\s+)?__shared__\s+(?:static\s+)?([^;]*);", _shared, preprocess(code))
    text = re.sub(r'extern\s*"C"\s*\{', "namespace {", text)
    text = re.sub(r'extern\s*"C"\s+', "", text)
    # The nameless namespace keeps libraries apart; the other one leaves names of the C library free.
    kernels = _kernels(code)
    bounds = "".join(f"constexpr int bound_of_{name} = {kernel.bound};\n" for name, kernel in kernels.items())
    table = ",\n".join(
        f"cuda_on_cpu::Launcher<cuda_text::{name}>::kernel(cuda_text::bound_of_{name})" for name in kernels
    )
    return f"namespace {{ namespace cuda_text {{\n{text}\n{bounds}}} }}\nKERNELS({table})\n"


def _flags() -> tuple[str, ...]:
    cpu = Path("/proc/cpuinfo")
    fma = cpu.exists() and re.search(r"^flags\b.*\bfma\b", cpu.read_text(), re.M)
    return (*FLAGS, "-mfma") if fma else FLAGS


def cached(suffix: str, source: str, about: tuple[str, ...], make: Callable[[Path, Path], None]) -> Path:
    """What `make(made, scratch)` makes of the source, from the cache where it is there.

    `about` is what else decides: flags, the compiler's version. Processes do not collide.
    """
    read = (FOLDER / "cuda_races.h").read_text()
    key = hashlib.sha256("\0".join([source, read, *about]).encode()).hexdigest()[:32]
    folder = Path(tempfile.gettempdir(), f"cuda_on_cpu-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    made = folder / f"{key}{suffix}"
    with open(folder / f"{key}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                make(Path(scratch, "made"), Path(scratch))
                Path(scratch, "made").replace(made)
    return made


@functools.cache
def _version() -> str:
    return _compile("--version")


def _detector() -> Path:
    """The object file of cuda_races.cpp, which itself is not instrumented."""
    flags = ("-O2", "-fPIC", "-fvisibility=hidden", "-DRACES")

    def make(made: Path, scratch: Path) -> None:
        _compile(*flags, "-c", RACES, "-o", made)

    return cached(".o", RACES.read_text(), (*flags, _version()), make)


def build(code: str, races: bool = False) -> Path:
    """The shared library of a CUDA text; with `races` its accesses are looked at."""
    source = f"{HEADER.read_text()}\n{host_source(code)}"
    flags = (*_flags(), *(INSTRUMENTED if races else ()))
    more = [_detector()] if races else []

    def make(made: Path, scratch: Path) -> None:
        kernels = scratch / "kernels.o"
        _compile(*flags, f"-I{FOLDER}", "-c", "-x", "c++", "-", "-o", kernels, text=source)
        # without the sanitizers' libraries
        _compile("-shared", "-Wl,-Bsymbolic", kernels, *more, "-o", made)

    return cached(".so", source + "".join(path.name for path in more), (*flags, _version()), make)


def _triple(what: str, sizes: Any, limits: tuple[int, ...]) -> list[int]:
    """A grid's or block's three sizes."""
    if not isinstance(sizes, tuple) or not 1 <= len(sizes) <= 3:
        raise TypeError(f"{what} must be a tuple of 1 to 3 ints, got {sizes!r}")
    three = [operator.index(size) for size in sizes] + [1] * (3 - len(sizes))
    if not all(1 <= size <= limit for size, limit in zip(three, limits)):
        raise ValueError(f"{what} {sizes} is outside 1…{limits}")
    return three


def _address(array: Any) -> int | None:
    """Of an array's first element; None for what is no array."""
    if isinstance(array, np.ndarray):
        return array.__array_interface__["data"][0]  # as .ctypes.data, sooner
    return getattr(getattr(array, "data", None), "ptr", None)


def _describe(argument: Any) -> str:
    if _address(argument) is not None:
        return f"an array of {argument.dtype}"
    return f"{type(argument).__module__}.{type(argument).__qualname__} {argument!r}"


def _span(array: Any) -> range:
    """The bytes of a dense array; empty for others, whose elements may interleave with another's."""
    bytes_, item = array.nbytes, array.dtype.itemsize
    steps = [(size - 1) * stride for size, stride in zip(array.shape, array.strides)]
    dense = bytes_ and min(steps, default=0) >= 0 and sum(steps) + item == bytes_
    start = _address(array) or 0
    return range(start, start + bytes_ if dense else start)


class _ArgumentSpan(ctypes.Structure):
    """`Span` of cuda_races.h."""

    _fields_ = (
        ("start", ctypes.c_size_t),
        ("stop", ctypes.c_size_t),
        ("item", ctypes.c_size_t),
        ("name", ctypes.c_char_p),
    )


class Function:
    """`cupy.cuda.Function` for one kernel."""

    def __init__(self, module: HostModule, number: int, name: str, kernel: Kernel) -> None:
        self.module, self.number, self.name = module, number, name
        self.bound: int = module.library.kernel_bound(number)
        types = module.library.kernel_types(number).decode().split(";")[:-1]
        assert len(types) == len(kernel.parameters), (name, types, kernel)
        self.parameters = [
            (written, parameter, kind) for (written, parameter), kind in zip(kernel.parameters, types)
        ]

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple,
        shared_mem: int = 0,
        stream: Any = None,
    ) -> None:
        shape = [
            *_triple(f"{self.name}: grid", grid, GRID_LIMIT),
            *_triple(f"{self.name}: block", block, BLOCK_LIMIT),
        ]
        if math.prod(shape[3:]) > min(self.bound, MAX_THREADS):
            raise ValueError(
                f"{self.name}: {math.prod(shape[3:])} threads a block {block}, at most {self.bound}"
            )
        if math.prod(shape[:3]) >= 2**31:
            raise ValueError(f"{self.name}: more blocks {grid} than the double can count")
        if shared_mem:
            raise ValueError(f"{self.name}: dynamic shared memory ({shared_mem} bytes)")
        if not isinstance(args, tuple) or len(args) != len(self.parameters):
            raise TypeError(
                f"{self.name} takes a tuple of {len(self.parameters)} arguments, got "
                f"{len(args) if isinstance(args, tuple) else _describe(args)}"
            )
        slots = b"".join(map(self._slot, self.parameters, args))
        self._check_restrict(args)
        self.module.run(self, shape, slots, self._spans(args))

    def _slot(self, parameter: tuple[str, str, str], argument: Any) -> bytes:
        """The 8 bytes from which the launcher reads an argument; TypeError if it is of another type."""
        written, name, kind = parameter
        address, fits, why = _address(argument), False, ""
        if not kind.endswith("*"):
            fits = isinstance(argument, np.generic) and argument.dtype.name == kind
        elif address is None:
            fits = isinstance(argument, (np.uint64, np.int64)) and argument == 0  # a null pointer
        else:
            fits = kind.removeprefix("const ") in ("void*", f"{argument.dtype.name}*")
            if isinstance(argument, np.ndarray) and not (
                argument.flags.writeable or kind.startswith("const ")
            ):
                fits, why = False, " that is read-only"
        if not fits:
            raise TypeError(
                f"{self.name}: parameter {name} is {written} ({kind}), got {_describe(argument)}{why}"
            )
        return argument.tobytes().ljust(8, b"\0") if address is None else address.to_bytes(8, "little")

    def _spans(self, args: tuple) -> list[_ArgumentSpan]:
        """Where the arrays among the arguments lie."""
        return [
            _ArgumentSpan(start, start + argument.nbytes, argument.dtype.itemsize, name.encode())
            for (_, name, _), argument in zip(self.parameters, args)
            if (start := _address(argument)) is not None
        ]

    def memory(self, args: tuple) -> tuple[list[range], list[range]]:
        """What a launch may read, and what it may write as far as the parameters' types say."""
        reads: list[range] = []
        writes: list[range] = []
        for (_, _, kind), argument in zip(self.parameters, args):
            if _address(argument) is not None:
                (reads if kind.startswith("const ") else writes).append(_span(argument))
        return reads, writes

    def _check_restrict(self, args: tuple) -> None:
        """ValueError where memory that may be written is reached through a `__restrict__` pointer and
        another."""
        arrays = [
            (*parameter, _span(argument))
            for parameter, argument in zip(self.parameters, args)
            if _address(argument) is not None
        ]
        for number, (written, name, kind, span) in enumerate(arrays):
            for other_written, other, other_kind, other_span in arrays[:number]:
                restrict = "__restrict" in written or "__restrict" in other_written
                written_to = not (kind.startswith("const ") and other_kind.startswith("const "))
                overlap = max(span.start, other_span.start) < min(span.stop, other_span.stop)
                if restrict and written_to and overlap:
                    raise ValueError(
                        f"{self.name}: {other} and {name} overlap, and one of them is __restrict__"
                    )


class HostModule:
    """`cupy.RawModule` of a CUDA text on the CPU.

    `order` is one of ORDERS, "shuffled" differs from launch to launch and depends on `seed`; `launches`
    lists the names of the kernels launched. Modules of the same text share its `__device__` variables.
    With `races`, accesses that nothing orders and accesses outside the arguments raise RuntimeError too, and
    `accesses` counts what was looked at, `bytes` what had to come from memory and go there.
    """

    def __init__(self, code: str, order: str = "forward", seed: int = 0, races: bool = False) -> None:
        self.library = ctypes.PyDLL(str(build(code, races)))  # keeps the GIL: one launch at a time
        self.races, self.accesses, self.bytes = races, 0, 0
        if races:
            self.library.races_accesses.restype = self.library.races_bytes.restype = ctypes.c_ulonglong
        self.library.kernel_types.restype = self.library.launch.restype = ctypes.c_char_p
        self.order, self.seed = order, seed
        self.launches: list[str] = []
        self._functions = {
            name: Function(self, number, name, kernel)
            for number, (name, kernel) in enumerate(_kernels(code).items())
        }

    def get_function(self, name: str) -> Function:
        if name not in self._functions:
            raise KeyError(f"no kernel {name!r} among {', '.join(self._functions)}")
        return self._functions[name]

    def run(self, function: Function, shape: list[int], slots: bytes, spans: list[_ArgumentSpan]) -> None:
        """Launch with arguments that were checked; RuntimeError with what went wrong in the kernel."""
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {ORDERS}, got {self.order!r}")
        seed = self.seed + len(self.launches)
        self.launches.append(function.name)
        arguments = ctypes.create_string_buffer(slots, max(len(slots), 8))
        if self.races:
            where = ctypes.c_size_t(ctypes.addressof(arguments)), ctypes.c_size_t(len(arguments))
            self.library.races_begin((_ArgumentSpan * len(spans))(*spans), len(spans), *where)
        error = self.library.launch(
            function.number,
            (ctypes.c_uint * 6)(*shape),
            arguments,
            ORDERS.index(self.order),
            ctypes.c_uint(seed),
        )
        if self.races:
            self.accesses += self.library.races_accesses()
            self.bytes += self.library.races_bytes()
        if error:
            raise RuntimeError(f"{function.name}: {error.decode()}")
