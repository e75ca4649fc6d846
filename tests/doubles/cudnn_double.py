"""Doubles of the module `cudnn` (NVIDIA's Python frontend, 1.32 with cuDNN 9.28) and of what it needs of
`cupy.cuda`, for tests without a GPU: a "device pointer" is the address of host memory, and NumPy convolves
there.

The double is stricter than the frontend where the frontend helps out: it wants every step in its documented
order. What plans there are is up to the test: `Cudnn.offers` lists them, with notes, workspace and a
pretended time. `Cudnn.log` records what is built and executed. SIGNATURES holds the parameters of the real
functions.
"""

from __future__ import annotations

import ctypes
import enum
import zlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import nccl_double
import numpy as np

SIGNATURES = """
create_handle
set_stream handle stream
destroy_handle handle
backend_version_string
pygraph name io_data_type intermediate_data_type compute_data_type handle
pygraph.tensor dim stride data_type is_virtual is_pass_by_value name uid
pygraph.conv_fprop image weight padding stride dilation compute_data_type name
pygraph.conv_dgrad loss filter padding stride dilation compute_data_type name
pygraph.conv_wgrad image loss padding stride dilation compute_data_type name
pygraph.validate
pygraph.build_operation_graph
pygraph.create_execution_plans heuristics
pygraph.deselect_numeric_notes notes
pygraph.deselect_workspace_greater_than workspace_limit
pygraph.get_execution_plan_count
pygraph.get_plan_name_at_index index
pygraph.get_engine_and_knobs_at_index index
pygraph.create_execution_plan engine_id knobs
pygraph.build_plan_at_index index
pygraph.get_workspace_size
pygraph.execute tensor_dict workspace handle
Tensor.set_output value
Tensor.set_data_type dtype
Tensor.set_dim dim
Tensor.set_stride stride
Tensor.set_uid uid
"""
"""A function a line: its name and those of its parameters that the double has, in the real order."""

data_type = enum.Enum("data_type", ["FLOAT", "HALF", "BFLOAT16", "NOT_SET"])
heur_mode = enum.Enum("heur_mode", ["A", "B", "FALLBACK"])
numerical_note = enum.Enum(
    "numerical_note",
    [
        "TENSOR_CORE",
        "DOWN_CONVERT_INPUTS",
        "REDUCED_PRECISION_REDUCTION",
        "FFT",
        "NONDETERMINISTIC",
        "WINOGRAD",
    ],
)

CODES = {data_type.FLOAT: np.float32, data_type.BFLOAT16: np.uint16}


class NotSupported(Exception):
    """As cuDNN's `cudnnGraphNotSupportedError`, which is no RuntimeError."""


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Bits of the bfloat16 nearest to each float32, ties to even; x must be finite."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """The float32 of each bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def memory(pointer: int, dim: list[int], stride: list[int], kind: data_type) -> np.ndarray:
    """The host memory at `pointer` as a writable array of the tensor's dimensions and strides (in
    elements)."""
    dtype: Any = np.dtype(CODES[kind])
    span = sum((d - 1) * s for d, s in zip(dim, stride, strict=True)) + 1
    flat: Any = np.frombuffer((ctypes.c_uint8 * (span * dtype.itemsize)).from_address(pointer), dtype)
    return np.lib.stride_tricks.as_strided(flat, dim, [s * dtype.itemsize for s in stride])


@dataclass
class Offer:
    """A plan that the double lists: where, what speaks against it, what it costs."""

    name: str
    notes: tuple[str, ...] = ()
    workspace: int = 0
    milliseconds: float = 1.0
    mode: str = "A"
    builds: bool = True
    nodes: tuple[str, ...] = ("conv_fprop", "conv_dgrad", "conv_wgrad")
    for_wider: bool = False  # listed only where more channels come out than went in


class Handle:
    """A cuDNN handle: it has a stream, until it is destroyed."""

    stream: int | None = 0


class Tensor:
    """A tensor's description; the setters return it."""

    def __init__(self, graph: Any, **given: Any) -> None:
        self.graph, self.output = graph, False
        self.dim, self.stride, self.data_type, self.uid = (
            given.get(k) for k in ("dim", "stride", "data_type", "uid")
        )

    def _set(self, **values: Any) -> Tensor:
        self.graph.require("described")
        vars(self).update(values)
        return self

    def set_output(self, value: bool) -> Tensor:
        return self._set(output=value)

    def set_data_type(self, dtype: data_type) -> Tensor:
        return self._set(data_type=dtype)

    def set_dim(self, dim: list[int]) -> Tensor:
        return self._set(dim=dim)

    def set_stride(self, stride: list[int]) -> Tensor:
        return self._set(stride=stride)

    def set_uid(self, uid: int) -> Tensor:
        return self._set(uid=uid)


class _pygraph:
    """`cudnn.pygraph`, for one convolution."""

    cudnn: Cudnn

    def __init__(
        self,
        name="test_graph",
        io_data_type=None,
        intermediate_data_type=None,
        compute_data_type=None,
        handle=None,
    ) -> None:
        self.cudnn.check(handle)
        if compute_data_type is not data_type.FLOAT or intermediate_data_type is not data_type.FLOAT:
            raise NotSupported("sums and intermediate values are float32")
        self.stage, self.io, self.node, self.barred, self.built = "described", io_data_type, "", set(), -1
        self.tensors: list[Tensor] = []
        self.offers: list[Offer] = []

    def require(self, stage: str) -> None:
        if self.stage != stage:
            raise RuntimeError(f"the graph is {self.stage}, not {stage}")

    def tensor(
        self, dim, stride=None, data_type=None, is_virtual=False, is_pass_by_value=False, name="", uid=None
    ) -> Tensor:
        self.require("described")
        if len(dim) != 4 or len(stride) != 4 or min(dim) < 1:
            raise ValueError(f"tensor {name!r}: dim {dim}, stride {stride}")
        self.tensors.append(Tensor(self, dim=dim, stride=stride, data_type=data_type or self.io, uid=uid))
        return self.tensors[-1]

    def _convolution(self, node, a, b, padding, stride, dilation) -> Tensor:
        self.require("described")
        if self.node:
            raise NotSupported("one convolution a graph")
        if [a, b] != self.tensors or not len(padding) == len(stride) == len(dilation) == 2:
            raise RuntimeError("CUDNN_STATUS_BAD_PARAM")
        self.node, self.window = node, (padding, stride, dilation)
        self.tensors.append(Tensor(self))
        return self.tensors[-1]

    def conv_fprop(
        self, image, weight, padding=(), stride=(), dilation=(), compute_data_type=None, name=""
    ) -> Tensor:
        return self._convolution("conv_fprop", image, weight, padding, stride, dilation)

    def conv_dgrad(
        self, loss, filter, padding=(), stride=(), dilation=(), compute_data_type=None, name=""
    ) -> Tensor:
        return self._convolution("conv_dgrad", loss, filter, padding, stride, dilation)

    def conv_wgrad(
        self, image, loss, padding=(), stride=(), dilation=(), compute_data_type=None, name=""
    ) -> Tensor:
        return self._convolution("conv_wgrad", image, loss, padding, stride, dilation)

    def roles(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors that stand for x, w and y."""
        a, b, c = self.tensors
        return {"conv_fprop": (a, b, c), "conv_dgrad": (c, b, a), "conv_wgrad": (a, c, b)}[self.node]

    def validate(self) -> None:
        self.require("described")
        result = self.tensors[-1]
        if not result.output or any(t.dim is None or t.stride is None or t.uid is None for t in self.tensors):
            raise ValueError("an output, dimensions, strides or uids are not set")
        if len({t.uid for t in self.tensors}) < 3:
            raise ValueError("a uid is given twice")
        self.stage = "validated"

    def build_operation_graph(self) -> None:
        self.require("validated")
        x, w, y = (t.dim for t in self.roles())
        fits = (x[0], w[0], x[1]) == (y[0], y[1], w[1])
        for axis, padding, stride, dilation in zip((2, 3), *self.window, strict=True):
            fits = fits and y[axis] == (x[axis] + 2 * padding - dilation * (w[axis] - 1) - 1) // stride + 1
        if not fits:
            raise RuntimeError(f"is_valid_spatial_dim, and code: CUDNN_STATUS_BAD_PARAM\n{x} {w} {y}")
        self.stage = "lowered"

    def create_execution_plans(self, heuristics) -> None:
        self.require("lowered")
        if len({t.data_type for t in self.tensors}) > 1:
            raise NotSupported("No valid engine configs: inputs and output differ in type\n{…}")
        self.offers = [
            o
            for mode in heuristics
            for o in self.cudnn.offers
            if o.mode == mode.name and self.node in o.nodes
            if not o.for_wider or self.roles()[1].dim[0] > self.roles()[1].dim[1]
        ]
        if not self.offers:
            raise NotSupported("No valid engine configs\n{…}")
        self.stage = "planned"

    def deselect_numeric_notes(self, notes) -> None:
        self.require("planned")
        names = {note.name for note in notes}
        self.barred |= {i for i, offer in enumerate(self.offers) if names & set(offer.notes)}

    def deselect_workspace_greater_than(self, workspace_limit: int) -> None:
        self.require("planned")
        self.barred |= {i for i, offer in enumerate(self.offers) if offer.workspace > workspace_limit}

    def get_execution_plan_count(self) -> int:
        self.require("planned")
        return len(self.offers)

    def _offer(self, index: int) -> Offer:
        self.require("planned")
        if not 0 <= index < len(self.offers):
            raise IndexError(f"plan index {index} out of range for {len(self.offers)} plan(s)")
        return self.offers[index]

    def get_engine_and_knobs_at_index(self, index: int) -> tuple[int, dict[str, Offer]]:
        offer = self._offer(index)
        return zlib.crc32(offer.name.split("_")[0].encode()), {"double": offer}

    def create_execution_plan(self, engine_id: int, knobs: dict[str, Offer]) -> None:
        """Append a plan that another graph listed."""
        self.require("planned")
        self.offers.append(knobs["double"])

    def get_plan_name_at_index(self, index: int) -> str:
        return self._offer(index).name

    def build_plan_at_index(self, index: int) -> None:
        """Build the plan and select it."""
        offer = self._offer(index)
        if index in self.barred:
            raise NotSupported("Deselecting execution plan")
        if not offer.builds:
            raise RuntimeError("CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED")
        self.built = index
        self.cudnn.log.append(("build", self.node, offer.name))

    def get_workspace_size(self) -> int:
        if self.built < 0:
            raise RuntimeError("Call build() first")
        return self.offers[self.built].workspace

    def execute(self, tensor_dict, workspace=None, handle=None) -> None:
        self.cudnn.check(handle)
        offer_bytes = self.get_workspace_size()
        for tensor in self.tensors:
            if not tensor_dict.get(tensor.uid):
                raise ValueError(f"the variant pack is missing a buffer for tensor uid {tensor.uid}")
            if tensor_dict[tensor.uid] % 16:
                raise RuntimeError("CUDNN_STATUS_BAD_PARAM_MISALIGNED_POINTER")
        if offer_bytes and not workspace:
            raise ValueError(f"Plan requires a {offer_bytes}-byte workspace but received null.")
        if offer_bytes:
            memory(workspace, [offer_bytes // 4], [1], data_type.FLOAT)[:] = np.nan  # it must really be there
        offer = self.offers[self.built]
        self.cudnn.cuda.clock += offer.milliseconds
        self.cudnn.log.append(("execute", self.node, offer.name, handle.stream))
        views = [memory(tensor_dict[t.uid], t.dim, t.stride, t.data_type) for t in self.roles()]
        bf16 = self.io is data_type.BFLOAT16
        with np.errstate(invalid="ignore"):  # the output may hold signalling NaNs as yet
            x, w, y = (from_bf16(v).astype(np.float64) if bf16 else v.astype(np.float64) for v in views)
        with np.errstate(
            invalid="ignore", over="ignore"
        ):  # as a device: plans are chosen on whatever memory holds
            result, place = self._convolve(x, w, y)
            views[place][...] = to_bf16(result.astype(np.float32)) if bf16 else result

    def _convolve(self, x, w, y) -> tuple[np.ndarray, int]:
        """The node's result from the other two of x (N, C, H, W), w (O, C, kh, kw), y (N, O, P, Q), and which
        it is."""
        (pad_h, pad_w), (step_h, step_w), (dil_h, dil_w) = self.window
        padded = np.pad(x, ((0, 0), (0, 0), (pad_h, pad_h), (pad_w, pad_w)))
        out = np.zeros_like(y)
        dx, dw = np.zeros_like(padded), np.zeros_like(w)
        for i in range(w.shape[2]):
            for j in range(w.shape[3]):
                rows = slice(i * dil_h, i * dil_h + step_h * (y.shape[2] - 1) + 1, step_h)
                cols = slice(j * dil_w, j * dil_w + step_w * (y.shape[3] - 1) + 1, step_w)
                if self.node == "conv_fprop":
                    out += np.tensordot(padded[:, :, rows, cols], w[:, :, i, j], (1, 1)).transpose(0, 3, 1, 2)
                elif self.node == "conv_dgrad":
                    dx[:, :, rows, cols] += np.tensordot(y, w[:, :, i, j], (1, 0)).transpose(0, 3, 1, 2)
                else:
                    dw[:, :, i, j] = np.tensordot(y, padded[:, :, rows, cols], ((0, 2, 3),) * 2)
        dx = dx[:, :, pad_h : pad_h + x.shape[2], pad_w : pad_w + x.shape[3]]
        return {"conv_fprop": (out, 2), "conv_dgrad": (dx, 0), "conv_wgrad": (dw, 1)}[self.node]


class Cudnn:
    """Stands for the module `cudnn`. `offers` are the plans of every graph made from then on."""

    data_type, heur_mode, numerical_note = data_type, heur_mode, numerical_note
    cudnnGraphNotSupportedError = NotSupported
    Tensor = Tensor

    def __init__(self, cuda: Cuda, offers: list[Offer] | None = None) -> None:
        self.cuda, self.log = cuda, []  # type: ignore[var-annotated]
        self.offers = [Offer("eng0")] if offers is None else offers
        self.pygraph = type("pygraph", (_pygraph,), {"cudnn": self})

    def check(self, handle: Any) -> None:
        """A handle must be one of cuDNN's and run on the current stream, which is what the caller means by
        it."""
        if not isinstance(handle, Handle):
            raise TypeError(f"expected a cudnn.Handle, got {type(handle).__name__}")
        if handle.stream != self.cuda.current.ptr:
            raise nccl_double.OrderError(
                f"a handle of stream {handle.stream} on stream {self.cuda.current.ptr}"
            )

    def backend_version_string(self) -> str:
        return "9.28.0"

    def create_handle(self) -> Handle:
        self.log.append(("create_handle",))
        return Handle()

    def set_stream(self, handle: Handle, stream: int) -> None:
        handle.stream = stream

    def destroy_handle(self, handle: Handle) -> None:
        handle.stream = None


class _Event(nccl_double._Event):
    """An event that notes the pretended time."""

    cuda: Cuda

    def record(self, stream: Any = None) -> None:
        super().record(stream)
        self.time = self.cuda.clock


class Cuda(nccl_double.Cuda):
    """`nccl_double.Cuda` with memory and a clock (milliseconds), which executing a plan moves on."""

    def __init__(self) -> None:
        super().__init__([])
        self.clock, self.allocations = 0.0, []  # type: ignore[var-annotated]
        self.Event = nccl_double._bound(_Event, cuda=self)

    def get_elapsed_time(self, start: Any, stop: Any) -> float:
        return stop.time - start.time

    def alloc(self, size: int) -> Any:
        array = np.zeros(-(-size // 4), np.float32)
        self.allocations.append(size)
        return SimpleNamespace(ptr=array.ctypes.data, array=array)

    def memsetAsync(self, ptr: int, value: int, size: int, stream: int) -> None:
        ctypes.memset(ptr, value, size)


def parameters(table: str = SIGNATURES) -> dict[str, list[str]]:
    """SIGNATURES as {name: parameters}."""
    return {name: words for name, *words in map(str.split, table.strip().splitlines())}
