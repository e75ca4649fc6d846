"""cuDNN's convolution on a double of the library: results, choice of plans, streams, refusals.

The double cannot tell whether the real library behaves as it does: the last test compares names and
parameters with the real package, and the tests on a GPU compare results.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from typing import Any

import numpy as np
import pytest
from cudnn_double import Cuda as BareCuda
from cudnn_double import Cudnn, Offer, _pygraph, from_bf16, parameters, to_bf16
from device_double import CapturedCudnn, Cuda
from strict_array import StrictArray, strict

import nn.cuda.cudnn
import nn.cuda.plans
from nn.array import register
from nn.buffers import Buffers
from nn.cuda.cudnn import Convolutions, load
from nn.cuda.plans import KINDS, NoPlan
from nn.device import Backend
from nn.ops.conv import Geometry, conv_backward, conv_forward

pytestmark = pytest.mark.quick

register(StrictArray, strict)
DEVICE = Backend("strict", strict, "NHWC")

SHAPES = [  # x (N, H, W, C), w (kh, kw, C, O), stride, padding, dilation
    ((3, 7, 5, 4), (3, 3, 4, 6), (1, 1, 1)),
    ((2, 6, 6, 1), (3, 3, 1, 8), (1, 1, 1)),
    ((1, 3, 3, 8), (3, 3, 8, 5), (1, 1, 1)),
    ((2, 9, 8, 3), (3, 2, 3, 4), (2, 1, 1)),
    ((2, 9, 9, 2), (3, 3, 2, 3), (1, 2, 2)),
    ((4, 5, 5, 8), (1, 1, 8, 4), (1, 0, 1)),
    ((2, 8, 7, 3), (4, 4, 3, 2), (3, 0, 1)),
]
X, W, G = (2, 6, 5, 4), (3, 3, 4, 8), Geometry(1, 1, 1)
BOUND = {"float32": 1e-6, "tf32": 1e-6, "bf16": 2**-8}  # the double rounds once, at the end


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of memory that begins at a multiple of 16, filled with NaN or 0x7FC0, which is bfloat16's."""
    itemsize = np.dtype(dtype).itemsize
    size = int(np.prod(shape)) * itemsize
    raw = np.empty(size + 16, np.uint8)
    start = -raw.ctypes.data % 16
    array = raw[start : start + size].view(dtype).reshape(shape)
    array[...] = 0x7FC0 if dtype == "uint16" else np.nan
    return array


def widen(bits: StrictArray, out: StrictArray) -> None:
    """bfloat16 bits to float32, as a kernel does it on a device."""
    out._a[...] = from_bf16(bits._a)


class Case:
    """Arrays of one convolution on the "device", with the float64 values of the inputs."""

    def __init__(
        self, x: tuple[int, ...], w: tuple[int, ...], g: Geometry, precision: str, seed: int = 0
    ) -> None:
        rng = np.random.default_rng(seed)
        self.g, self.bf16 = g, precision == "bf16"
        self.dtype = "uint16" if self.bf16 else "float32"
        self.buffers = Buffers(DEVICE, "float32")
        y = g.out_shape(x, w)
        self.x, self.dy = self.put(rng.standard_normal(x)), self.put(rng.standard_normal(y))
        self.w = self.put(rng.standard_normal((w[3], *w[:3]))).transpose(1, 2, 3, 0)
        self.y, self.dx = StrictArray(aligned(y, self.dtype)), StrictArray(aligned(x, self.dtype))
        self.dw = StrictArray(aligned((w[3], *w[:3]), "float32")).transpose(1, 2, 3, 0)

    def put(self, values: np.ndarray) -> StrictArray:
        array = aligned(values.shape, self.dtype)
        array[...] = to_bf16(values.astype(np.float32)) if self.bf16 else values
        return StrictArray(array)

    def values(self, array: StrictArray) -> np.ndarray:
        host = array._a
        return (from_bf16(host) if host.dtype == np.uint16 else host).astype(np.float64)

    def run(self, algorithm: Convolutions) -> list[np.ndarray]:
        """y, dx and dw."""
        saved = algorithm.forward(self.x, self.w, self.g, self.y, self.buffers, True)
        algorithm.backward(self.dy, saved, self.w, self.g, self.dw, self.dx, self.buffers)
        return [self.values(a) for a in (self.y, self.dx, self.dw)]

    def reference(self) -> list[np.ndarray]:
        """The same from patches, in float64."""
        buffers = Buffers(Backend("numpy", np, "NHWC"), "float64")
        x, w, dy = (np.ascontiguousarray(self.values(a)) for a in (self.x, self.w, self.dy))
        y, dx, dw = np.empty(self.y.shape), np.empty(x.shape), np.empty(w.shape)
        conv_backward(
            dy, conv_forward(x, w, self.g, y, buffers, "patches"), w, self.g, dw, dx, buffers, "patches"
        )
        return [y, dx, dw]


def a_form(*offers: Offer, precision: str = "float32") -> tuple[Convolutions, Cudnn, Cuda]:
    cuda = Cuda()
    cudnn = CapturedCudnn(cuda, list(offers) or None)
    return Convolutions(cudnn, cuda, precision, widen if precision == "bf16" else None), cudnn, cuda


def builds(cudnn: Cudnn) -> list[str]:
    return [entry[2] for entry in cudnn.log if entry[0] == "build"]


def executed(cudnn: Cudnn) -> list[tuple]:
    return [entry for entry in cudnn.log if entry[0] == "execute"]


@pytest.mark.parametrize("precision", BOUND)
@pytest.mark.parametrize(("x", "w", "g"), SHAPES, ids=str)
def test_agrees_with_patches(x: tuple, w: tuple, g: tuple, precision: str) -> None:
    algorithm, _, _ = a_form(Offer("eng1", workspace=64), precision=precision)
    case = Case(x, w, Geometry(*g), precision)
    for name, ours, theirs in zip(("y", "dx", "dw"), case.run(algorithm), case.reference(), strict=True):
        assert np.abs(ours - theirs).max() <= BOUND[precision] * np.abs(theirs).max(), name


def test_interface_of_a_form() -> None:
    algorithm, cudnn, _ = a_form()
    case = Case(X, W, G, "float32")
    assert algorithm.forward(case.x, case.w, G, case.y, case.buffers, keep=False) is None
    assert algorithm.forward(case.x, case.w, G, case.y, case.buffers, keep=True) is case.x
    algorithm.backward(case.dy, case.x, case.w, G, case.dw, None, case.buffers)
    assert {entry[1] for entry in executed(cudnn)} == {"conv_fprop", "conv_wgrad"}, "dx is not wanted"


@pytest.mark.parametrize("precision", BOUND)
def test_rank_without_images(precision: str) -> None:
    algorithm, cudnn, _ = a_form(precision=precision)
    case = Case((0, *X[1:]), W, G, precision)
    y, dx, dw = case.run(algorithm)
    assert (len(y), len(dx)) == (0, 0)
    assert not dw.any()
    assert not executed(cudnn)
    assert algorithm.supports((0, *X[1:]), W, G)


def test_fastest_plan_is_taken_and_named() -> None:
    algorithm, cudnn, cuda = a_form(
        Offer("slow", milliseconds=3),
        Offer("fast", milliseconds=1, workspace=1024),
        Offer("middling", milliseconds=2),
    )
    case = Case(X, W, G, "float32")
    case.run(algorithm)
    assert algorithm.plans == {f"{kind} 2x6x5x4 3x3x4x8 s1p1d1 float32": "fast" for kind in KINDS}
    log = len(cudnn.log)
    before = cuda.clock
    case.run(algorithm)
    assert {entry[:3] for entry in cudnn.log[log:]} == {
        ("execute", node, "fast") for node, _, _ in KINDS.values()
    }
    assert len(cudnn.log) == log + 3
    assert cuda.clock == before + 3, "nothing else runs, nothing is built after the first call"
    assert lanes(algorithm) == {cuda.stream.ptr: [1024]}, "one workspace for all operations of a stream"


def test_without_a_clock_the_first_plan_that_runs_is_taken() -> None:
    """Then no choice depends on a measurement, nor on one before."""
    offers = [Offer("broken", builds=False), Offer("first", milliseconds=3), Offer("fast", milliseconds=1)]
    algorithm, _, _ = a_form(*offers)
    case = Case(X, W, G, "float32")
    for by_time, wanted in ((True, "fast"), (False, "first"), (True, "fast")):
        algorithm.choose(by_time)
        case.run(algorithm)
        assert set(algorithm.plans.values()) == {wanted}


def test_only_the_first_plans_that_build_are_timed() -> None:
    last = 2 * nn.cuda.plans.CANDIDATES - 2
    many = [Offer(f"eng{i}", milliseconds=99 - i, builds=i % 2 == 0) for i in range(last + 4)]
    algorithm, cudnn, _ = a_form(*many)
    case = Case(X, W, G, "float32")
    algorithm.forward(case.x, case.w, G, case.y, case.buffers, False)
    assert builds(cudnn) == [f"eng{i}" for i in range(0, last + 1, 2)] + [f"eng{last}"]


SQUARE = (3, 3, 4, 4)


def test_engines_that_are_listed_for_more_channels_out_are_borrowed() -> None:
    """Three plans of each, also beyond CANDIDATES; and found again by name when a run resumes."""
    own = [Offer(f"eng{i}", milliseconds=9) for i in range(nn.cuda.plans.CANDIDATES + 5)]
    native = [Offer(f"eng68_k={i}", milliseconds=5 - i, for_wider=True) for i in range(5)]
    fast: dict[str, Any] = {"milliseconds": 0, "for_wider": True}
    unfit = [
        Offer("eng40", builds=False, **fast),
        Offer("eng3_k=1", **fast),
        Offer("eng41", ("TENSOR_CORE",), **fast),
        Offer("eng42", workspace=nn.cuda.plans.WORKSPACE_LIMIT + 1, **fast),
    ]
    algorithm, cudnn, _ = a_form(*own, *native, *unfit)
    case = Case((2, 6, 5, 4), SQUARE, G, "float32")
    case.run(algorithm)
    assert set(algorithm.plans.values()) == {"eng68_k=2"}, "eng3 is its own; of eng68 three are tried"
    again, cudnn, _ = a_form(*own, *native)
    again.plans.update(algorithm.plans)
    case.run(again)
    assert builds(cudnn) == ["eng68_k=2"] * 3


def test_an_idle_chip_is_warmed_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.cuda.cudnn, "WARM_UP_SECONDS", 0.05)
    algorithm, cudnn, _ = a_form(Offer("one"), Offer("two"))
    counts = []
    for n in (2, 3):
        before = len(executed(cudnn))
        Case((n, *X[1:]), W, G, "float32").run(algorithm)
        counts.append(len(executed(cudnn)) - before)
    timed = 2 * len(KINDS) * (1 + nn.cuda.cudnn.LAUNCHES * nn.cuda.cudnn.ROUNDS) + len(KINDS)
    assert counts[1] == timed < counts[0]


def lanes(algorithm: Convolutions) -> dict[Any, list[int]]:
    """The workspaces of each stream, by size."""
    return {stream: [size for size, _ in lane.workspaces] for stream, lane in algorithm._lanes.items()}


def test_stored_plan_is_built_without_timing() -> None:
    offers = [Offer("slow", milliseconds=3), Offer("fast", milliseconds=1)]
    algorithm, cudnn, cuda = a_form(*offers)
    algorithm.plans.update({f"{kind} 2x6x5x4 3x3x4x8 s1p1d1 float32": "slow" for kind in KINDS})
    stored = dict(algorithm.plans)
    Case(X, W, G, "float32").run(algorithm)
    assert (builds(cudnn), algorithm.plans, cuda.clock) == (["slow"] * 3, stored, 9)


@pytest.mark.parametrize(
    ("offer", "why"),
    [
        (Offer("eng1"), "not offered"),
        (Offer("old", notes=("NONDETERMINISTIC",)), "Deselecting execution plan"),
        (Offer("old", builds=False), "CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED"),
    ],
)
def test_stored_plan_that_cannot_be_had(offer: Offer, why: str) -> None:
    algorithm, _, _ = a_form(offer)
    algorithm.plans["forward 2x6x5x4 3x3x4x8 s1p1d1 float32"] = "old"
    case = Case(X, W, G, "float32")
    message = (
        "cuDNN 9.28.0 cannot use the plan 'old' stored for 'forward 2x6x5x4 3x3x4x8 s1p1d1 float32'"
        f" ({why}): "
        "remove plans.json"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        algorithm.forward(case.x, case.w, G, case.y, case.buffers, False)


@pytest.mark.parametrize(
    ("precision", "chosen"),
    [("float32", "plain"), ("tf32", "tensor"), ("bf16", "converting")],
)
def test_what_each_precision_excludes(precision: str, chosen: str) -> None:
    algorithm, cudnn, _ = a_form(
        Offer("atomics", ("NONDETERMINISTIC", "TENSOR_CORE"), milliseconds=1),
        Offer("sloppy", ("TENSOR_CORE", "REDUCED_PRECISION_REDUCTION"), milliseconds=2),
        Offer("converting", ("TENSOR_CORE", "DOWN_CONVERT_INPUTS"), milliseconds=3),
        Offer("tensor", ("TENSOR_CORE",), milliseconds=4),
        Offer("plain", milliseconds=5),
        precision=precision,
    )
    Case(X, W, G, precision).run(algorithm)
    assert set(algorithm.plans.values()) == {chosen}
    assert not {"atomics", "sloppy"} & set(builds(cudnn))


def test_fallbacks_and_large_workspaces() -> None:
    algorithm, _, _ = a_form(
        Offer("tensor", ("TENSOR_CORE",)),
        Offer("huge", workspace=nn.cuda.plans.WORKSPACE_LIMIT + 1),
        Offer("fallback", milliseconds=9, mode="FALLBACK"),
    )
    Case(X, W, G, "float32").run(algorithm)
    assert set(algorithm.plans.values()) == {"fallback"}


def test_supports() -> None:
    algorithm, cudnn, _ = a_form(Offer("eng0"))
    assert algorithm.supports(X, W, G)
    log = len(cudnn.log)
    assert algorithm.supports(X, W, G)
    assert len(cudnn.log) == log, "asked once"
    assert not algorithm.plans
    assert not executed(cudnn)
    for offer in (Offer("eng0", nodes=("conv_fprop", "conv_dgrad")), Offer("eng0", ("NONDETERMINISTIC",))):
        assert not a_form(offer)[0].supports(X, W, G)


@pytest.mark.parametrize("offers", [[Offer("eng0", mode="B")], [Offer("eng0", builds=False)]])
def test_no_plan(offers: list[Offer]) -> None:
    algorithm, _, _ = a_form(*offers)
    case = Case(X, W, G, "float32")
    with pytest.raises(
        NoPlan, match=r"^cuDNN 9\.28\.0 has no plan for forward 2x6x5x4 3x3x4x8 s1p1d1 float32.*$"
    ):
        algorithm.forward(case.x, case.w, G, case.y, case.buffers, False)


def test_error_of_the_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm, cudnn, _ = a_form()

    def fail(self: Any) -> None:
        raise RuntimeError("CUDNN_STATUS_INTERNAL_ERROR\n{a dump}")

    monkeypatch.setattr(cudnn.pygraph, "build_operation_graph", fail)
    message = r"^cuDNN 9\.28\.0, forward 2x6x5x4 3x3x4x8 s1p1d1 float32: CUDNN_STATUS_INTERNAL_ERROR$"
    with pytest.raises(RuntimeError, match=message):
        algorithm.supports(X, W, G)


def test_each_stream_has_its_handle_and_workspace() -> None:
    algorithm, cudnn, cuda = a_form(Offer("eng0", workspace=256))
    beside = cuda.Stream(non_blocking=True)
    case = Case(X, W, G, "float32")
    for _ in range(2):
        algorithm.forward(case.x, case.w, G, case.y, case.buffers, False)
        algorithm.input_gradient(case.dy, case.w, G, case.dx)
        with beside:
            algorithm.weight_gradient(case.dy, case.x, G, case.dw, case.buffers)
    beside.synchronize()
    streams = {
        node: {entry[3] for entry in executed(cudnn) if entry[1] == node} for node, _, _ in KINDS.values()
    }
    assert streams == {
        "conv_fprop": {cuda.stream.ptr},
        "conv_dgrad": {cuda.stream.ptr},
        "conv_wgrad": {beside.ptr},
    }
    assert cudnn.log.count(("create_handle",)) == 2
    assert lanes(algorithm) == {cuda.stream.ptr: [256], beside.ptr: [256]}
    for ours, theirs in zip((case.y, case.dx, case.dw), case.reference(), strict=True):
        assert np.abs(case.values(ours) - theirs).max() <= 1e-6 * np.abs(theirs).max()


def test_outgrown_workspace_is_kept() -> None:
    """A graph captured for one batch size still writes into it."""
    algorithm, cudnn, cuda = a_form(Offer("eng0", workspace=256))
    Case(X, W, G, "float32").run(algorithm)
    cudnn.offers = [Offer("eng0", workspace=512)]
    Case((1, *X[1:]), W, G, "float32").run(algorithm)
    cudnn.offers = [Offer("eng0", workspace=128)]
    Case((3, *X[1:]), W, G, "float32").run(algorithm)
    assert lanes(algorithm) == {cuda.stream.ptr: [256, 512]}


def test_arrays_in_another_layout_or_type_are_refused() -> None:
    algorithm, _, _ = a_form()
    case = Case(X, W, G, "float32")
    c_order = StrictArray(aligned(W, "float32"))
    with pytest.raises(AssertionError, match="not dense"):
        algorithm.forward(case.x, c_order, G, case.y, case.buffers, False)
    with pytest.raises(AssertionError, match="dense as"):
        algorithm.weight_gradient(case.dy, case.x, G, c_order, case.buffers)
    with pytest.raises(AssertionError, match="uint16 at"):
        algorithm.forward(StrictArray(aligned(X, "uint16")), case.w, G, case.y, case.buffers, False)
    off = StrictArray(aligned((int(np.prod(X)) + 1,), "float32")[1:].reshape(X))
    with pytest.raises(AssertionError, match="float32 at"):
        algorithm.forward(off, case.w, G, case.y, case.buffers, False)


def test_wrong_precision() -> None:
    cuda = Cuda()
    with pytest.raises(ValueError, match="'half' is none of float32, tf32, bf16"):
        Convolutions(Cudnn(cuda), cuda, "half")
    with pytest.raises(ValueError, match="from_bf16"):
        Convolutions(Cudnn(cuda), cuda, "bf16")


@pytest.mark.needs("cupy")
def test_load(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    cudnn: Any = Cudnn(cuda)
    monkeypatch.setitem(sys.modules, "cudnn", None)
    with pytest.raises(
        RuntimeError, match=r"^cuDNN's Python frontend cannot be imported .*pip install nvidia-cudnn-frontend"
    ):
        load(cuda, "float32")
    monkeypatch.setitem(sys.modules, "cudnn", cudnn)
    assert load(cuda, "tf32").precision == "tf32"

    def fail() -> None:
        raise RuntimeError("cudnnHandle Create failed\nand more")

    monkeypatch.setattr(cudnn, "create_handle", fail)
    with pytest.raises(
        RuntimeError, match=r"^cuDNN cannot be used \(cudnnHandle Create failed\): pip install .*$"
    ):
        load(cuda, "float32")


def a_graph(cudnn: Cudnn, cuda: BareCuda) -> Any:
    """A described graph of the double, one step at a time from there."""
    kinds, handle = cudnn.data_type, cudnn.create_handle()
    graph = cudnn.pygraph(
        io_data_type=kinds.FLOAT,
        intermediate_data_type=kinds.FLOAT,
        compute_data_type=kinds.FLOAT,
        handle=handle,
    )
    x = graph.tensor(name="x", dim=[1, 1, 3, 3], stride=[9, 1, 3, 1], data_type=kinds.FLOAT, uid=1)
    w = graph.tensor(name="w", dim=[1, 1, 3, 3], stride=[9, 1, 3, 1], data_type=kinds.FLOAT, uid=2)
    y = graph.conv_fprop(image=x, weight=w, padding=[1, 1], stride=[1, 1], dilation=[1, 1])
    y.set_output(True).set_dim([1, 1, 3, 3]).set_stride([9, 1, 3, 1]).set_uid(3).set_data_type(kinds.FLOAT)
    return graph, handle, y


def test_double_refuses_what_cudnn_refuses() -> None:
    cuda = BareCuda()
    cudnn = Cudnn(cuda, [Offer("eng0", workspace=16), Offer("eng1", ("NONDETERMINISTIC",))])
    graph, handle, y = a_graph(cudnn, cuda)
    with pytest.raises(RuntimeError, match="not validated"):
        graph.build_operation_graph()
    graph.validate()
    with pytest.raises(RuntimeError, match="not described"):
        y.set_dim([1, 1, 3, 2])
    with pytest.raises(RuntimeError, match="not lowered"):
        graph.create_execution_plans([cudnn.heur_mode.A])
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    with pytest.raises(RuntimeError, match="not lowered"):
        graph.create_execution_plans([cudnn.heur_mode.A])
    graph.deselect_numeric_notes([cudnn.numerical_note.NONDETERMINISTIC])
    with pytest.raises(RuntimeError, match="build"):
        graph.execute({1: 16, 2: 16, 3: 16}, 16, handle=handle)
    with pytest.raises(IndexError):
        graph.build_plan_at_index(2)
    with pytest.raises(cudnn.cudnnGraphNotSupportedError):
        graph.build_plan_at_index(1)
    graph.build_plan_at_index(0)
    with pytest.raises(ValueError, match="uid 3"):
        graph.execute({1: 16, 2: 16}, 16, handle=handle)
    with pytest.raises(ValueError, match="workspace"):
        graph.execute({1: 16, 2: 16, 3: 16}, 0, handle=handle)
    with pytest.raises(TypeError):
        graph.execute({1: 16, 2: 16, 3: 16}, 16, handle=7)
    wrong, _, y = a_graph(cudnn, cuda)
    y.set_dim([1, 1, 3, 2])
    wrong.validate()
    with pytest.raises(RuntimeError, match="BAD_PARAM"):
        wrong.build_operation_graph()
    mixed, _, y = a_graph(cudnn, cuda)
    y.set_data_type(cudnn.data_type.BFLOAT16)
    mixed.validate()
    mixed.build_operation_graph()
    with pytest.raises(cudnn.cudnnGraphNotSupportedError):
        mixed.create_execution_plans([cudnn.heur_mode.A])


def resolve(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module


def test_double_has_the_listed_parameters() -> None:
    cudnn = Cudnn(Cuda())
    for name, expected in parameters().items():
        function = resolve(cudnn, name)
        found = [p for p in inspect.signature(function).parameters if p != "self"]
        assert found == expected, name
    public = {name for name in vars(_pygraph) if not name.startswith("_")} - {"cudnn", "require", "roles"}
    assert public == {name.split(".")[1] for name in parameters() if name.startswith("pygraph.")}


@pytest.mark.needs("cudnn")
def test_listed_parameters_are_the_real_ones() -> None:
    """Needs the package nvidia-cudnn-frontend, but no GPU and no cuDNN."""
    cudnn = importlib.import_module("cudnn")
    compiled = importlib.import_module("cudnn._compiled_module").backend_graph
    for name, expected in parameters().items():
        function: Any = resolve(cudnn, name)
        found = list(inspect.signature(function).parameters) if inspect.isfunction(function) else []
        if isinstance(function, type):
            found = list(inspect.signature(function.__init__).parameters)
        if (
            "args" in found
        ):  # the builders of nodes: their parameters are in the text of the compiled function
            text = getattr(compiled, name.split(".")[1]).__doc__
            found = re.findall(r"(\w+): ", text.split("\n")[0])
        assert [p for p in found if p in expected] == expected, f"{name}({', '.join(found)})"
    for enum, members in {
        "data_type": ("FLOAT", "BFLOAT16"),
        "heur_mode": ("A", "FALLBACK"),
        "numerical_note": sorted(set().union(*nn.cuda.plans.NOTES.values())),
    }.items():
        assert all(hasattr(getattr(cudnn, enum), member) for member in members), enum
    assert issubclass(cudnn.cudnnGraphNotSupportedError, Exception)
