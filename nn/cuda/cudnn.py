"""Convolution by cuDNN: one more algorithm beside those in `nn/ops/conv.py`, for arrays on a GPU.

    y[n,p,q,o]  = Σ_{i,j,c} x[n, p·stride + i·dilation − padding, q·stride + j·dilation − padding, c] ·
    w[i,j,c,o] dx, dw      = the gradients of Σ y·dy with respect to x and w

Shapes: x, dx (N, H, W, C) and y, dy (N, P, Q, O), dense in this order; w, dw (kh, kw, C, O), views whose
memory is dense (O, kh, kw, C). All are float32; in bf16 they are uint16 arrays of bfloat16 bits, except that
dw is float32.

cuDNN answers each operation with a list of *plans*. Which is taken decides the last bits of the result, so
the choice is a value that can be stored, sent to other ranks and given back: see `Convolutions.plans`.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

from nn.array import Array
from nn.buffers import Buffers
from nn.cuda.plans import KINDS, WORKSPACE_LIMIT, NoPlan, Operation, Planner, first_line, places
from nn.device import SideStream, capture
from nn.ops.conv import Geometry

WARM_UP_SECONDS = 0.2
"""Of work before the first plan is timed: an idle chip runs at a fraction of its clock."""

ROUNDS, LAUNCHES = 5, 8
"""A plan's time is the median of ROUNDS measurements of LAUNCHES executions each."""


class Lane(NamedTuple):
    """A stream's handle, and its workspaces (bytes, memory): the last, largest one is in use.

    The outgrown ones are kept, since a captured graph may still write into them.
    """

    handle: Any
    workspaces: list[tuple[int, Any]]


class Convolutions:
    """An algorithm of convolution: `forward` and `backward` as in `nn/ops/conv.py`.

    `cudnn` is the module of that name, `cuda` is `cupy.cuda`. `precision` is one of

    - "float32": no tensor cores, no inputs or sums in fewer bits;
    - "tf32": tensor cores that round the inputs to 10 bits of mantissa;
    - "bf16": bfloat16 inputs and outputs, sums in float32. cuDNN cannot write a float32 dw then, so it writes
      a temporary, and `from_bf16(bits, dw)` must turn that into float32 on the current stream.

    The first call for a shape chooses and builds its plan, and may wait for the device; later ones only
    launch it on the current stream, and allocate nothing, so that they may be captured into a CUDA graph.
    RuntimeError where cuDNN fails; NoPlan where it has no plan.

    `plans` maps an operation to the name of its plan. It grows as plans are chosen; what is in it before is
    used as it is, and a name that cuDNN no longer offers is a ValueError.
    """

    def __init__(
        self,
        cudnn: Any,
        cuda: Any,
        precision: str = "float32",
        from_bf16: Callable[[Array, Array], Any] | None = None,
        side_stream: SideStream | None = None,
    ) -> None:
        self.planner = Planner(cudnn, precision, self._target)
        if precision == "bf16" and from_bf16 is None:
            raise ValueError("bf16 needs `from_bf16`, which turns bfloat16 bits into float32")
        self.cudnn, self.cuda, self.precision, self.side_stream = cudnn, cuda, precision, side_stream
        self.from_bf16 = from_bf16 if precision == "bf16" else None
        self.version = self.planner.version
        self.plans: dict[str, str] = {}
        self._dtype = "uint16" if precision == "bf16" else "float32"
        self._lanes: dict[int, Lane] = {}
        self._built: dict[Operation, tuple[Any, int]] = {}
        self._supported: dict[Operation, bool] = {}
        self._cold, self._by_time = True, True

    def forward(
        self, x: Array, w: Array, g: Geometry, y: Array, buffers: Buffers, keep: bool
    ) -> Array | None:
        """Write the convolution of x with w into y; returns x, where `keep`, in a buffer that outlives it."""
        if len(x):
            operation = Operation("forward", x.shape, w.shape, g)
            self._run(operation, self._pointer(x), self._kernel(w), self._pointer(y))
        return buffers.save(x) if keep else None

    def backward(
        self, dy: Array, x: Array, w: Array, g: Geometry, dw: Array, dx: Array | None, buffers: Buffers
    ) -> None:
        """Write the gradients of x, unless dx is None, and of w: that one on the side stream, where there is
        one.

        Nobody waits for a weight gradient before the end of the backward, and a small batch leaves much of a
        GPU idle.
        """
        with self.side_stream.fork() if self.side_stream else contextlib.nullcontext():
            self.weight_gradient(dy, x, g, dw, buffers)
        if dx is not None:
            self.input_gradient(dy, w, g, dx)

    def input_gradient(self, dy: Array, w: Array, g: Geometry, dx: Array) -> None:
        """dx[n, p·stride + i·dilation − padding, …, c] = Σ_{i,j,o} dy[n,p,q,o] · w[i,j,c,o]"""
        if len(dy):
            operation = Operation("input gradient", dx.shape, w.shape, g)
            self._run(operation, self._pointer(dy), self._kernel(w), self._pointer(dx))

    def weight_gradient(self, dy: Array, x: Array, g: Geometry, dw: Array, buffers: Buffers) -> None:
        """dw[i,j,c,o] = Σ_{n,p,q} x[n, p·stride + i·dilation − padding, …, c] · dy[n,p,q,o]

        May run on a stream of its own beside `input_gradient`; then always on the same one, as its scratch is
        shared.
        """
        memory = dw.transpose(3, 0, 1, 2)
        assert (memory.flags.c_contiguous, dw.dtype) == (True, "float32"), (
            "dw must be float32, dense as (O, kh, kw, C)"
        )
        if not len(x):
            stream = self.cuda.get_current_stream()
            self.cuda.runtime.memsetAsync(dw.data.ptr, 0, dw.nbytes, stream.ptr)
            return
        out = buffers.temporary("cudnn.dw", memory.shape, "uint16") if self.from_bf16 else memory
        operation = Operation("weight gradient", x.shape, dw.shape, g)
        self._run(operation, self._pointer(x), self._pointer(dy), self._pointer(out))
        if self.from_bf16:
            self.from_bf16(out, memory)

    def choose(self, by_time: bool) -> None:
        """Choose from now on the fastest plan, or the first of cuDNN's list that runs: no clock decides then.

        Earlier choices are forgotten.
        """
        self._by_time, self.plans, self._built = by_time, {}, {}

    def supports(
        self, x_shape: tuple[int, ...], w_shape: tuple[int, ...], geometry: Geometry, need_dx: bool = True
    ) -> bool:
        """Whether cuDNN has a plan for each of the operations that are needed."""
        kinds = [kind for kind in KINDS if need_dx or kind != "input gradient"]
        operations = (Operation(kind, tuple(x_shape), tuple(w_shape), geometry) for kind in kinds)
        return not x_shape[0] or all(map(self._has_plan, operations))

    def _has_plan(self, operation: Operation) -> bool:
        if operation not in self._supported:
            try:
                graph = self.planner.graph(operation)
                self._supported[operation] = any(self.planner.buildable(graph, places(graph)))
            except NoPlan:
                self._supported[operation] = False
        return self._supported[operation]

    def _pointer(self, a: Array) -> int:
        """Address of a dense array; cuDNN's graphs take for granted that it is a multiple of 16."""
        pointer = a.data.ptr
        assert a.flags.c_contiguous, f"shape {a.shape} with strides {a.strides} is not dense"
        assert (a.dtype, pointer % 16) == (self._dtype, 0), f"{a.dtype} at {pointer:#x} in {self.precision}"
        return pointer

    def _kernel(self, w: Array) -> int:
        """Address of weights (kh, kw, C, O) whose memory is (O, kh, kw, C)."""
        return self._pointer(w.transpose(3, 0, 1, 2))

    def _run(self, operation: Operation, *pointers: int) -> None:
        """Launch the operation on the current stream; `pointers` are its two inputs and its output."""
        built = self._built.get(operation)
        if built is None:
            built = self._built[operation] = self._build(operation, pointers)
        self._launch(*built, pointers)

    def _launch(self, graph: Any, size: int, pointers: tuple[int, ...]) -> None:
        """Execute the plan selected in `graph`, which needs `size` bytes of workspace."""
        workspaces = self._lane().workspaces
        if size and (not workspaces or size > workspaces[-1][0]):
            workspaces.append((size, self.cuda.alloc(size)))
        self._execute(graph, workspaces[-1][1].ptr if size else 0, pointers)

    def _execute(self, graph: Any, workspace: int, pointers: tuple[int, ...]) -> None:
        graph.execute(dict(enumerate(pointers, 1)), workspace, handle=self._lane().handle)

    def _lane(self) -> Lane:
        """Handle and workspaces of the current stream. A handle of its own, as setting a handle's stream is
        slow.
        """
        stream = self.cuda.get_current_stream().ptr
        lane = self._lanes.get(stream)
        if lane is None:
            handle = self.cudnn.create_handle()
            self.cudnn.set_stream(handle=handle, stream=stream)
            lane = self._lanes[stream] = Lane(handle, [])
        return lane

    def _build(self, operation: Operation, pointers: tuple[int, ...]) -> tuple[Any, int]:
        """The operation's graph with the plan of `plans` built, chosen now if need be, and its workspace in
        bytes.
        """
        key = f"{operation} {self.precision}"
        if key not in self.plans:
            self.plans[key] = self._fastest(operation, pointers)
        # A graph keeps every plan that was built in it: the one that served to choose is dropped.
        graph, why = self.planner.graph(operation), "not offered"
        self.planner.borrow(graph, operation)
        for index in places(graph):
            if graph.get_plan_name_at_index(index) == self.plans[key]:
                try:
                    graph.build_plan_at_index(index)
                    return graph, graph.get_workspace_size()
                except self.planner.refusals as error:
                    why = first_line(error)
        raise ValueError(
            f"cuDNN {self.version} cannot use the plan {self.plans[key]!r} stored for {key!r} ({why}):"
            " remove plans.json"
        )

    def _target(self) -> dict[str, Any]:
        """What a graph is planned for: the device of the current stream's handle."""
        return {"handle": self._lane().handle}

    def _fastest(self, operation: Operation, pointers: tuple[int, ...]) -> str:
        """The fastest of the first CANDIDATES plans that can be built, and of those that are borrowed.

        The output is overwritten. See `choose`.
        """
        graph, names = self.planner.candidates(operation)
        times: dict[str, float] = {}
        for name in names:
            with contextlib.suppress(RuntimeError):  # a plan that cannot run, or not in a CUDA graph, is none
                times[name] = min(self._time(graph, pointers), times.get(name, float("inf")))
                if not self._by_time:
                    break
        if not times:
            raise NoPlan(
                f"cuDNN {self.version} has no plan for {operation} {self.precision} that is deterministic "
                f"and needs at most {WORKSPACE_LIMIT >> 20} MiB"
            )
        return min(times, key=times.__getitem__)

    def _time(self, graph: Any, pointers: tuple[int, ...]) -> float:
        """Milliseconds of LAUNCHES executions of the plan selected in `graph`, median of ROUNDS.

        As a CUDA graph, which is how they will run: Python takes longer to queue a small convolution than a
        GPU to run it.
        """
        size, stream, times = graph.get_workspace_size(), self.cuda.get_current_stream(), []
        memory = self.cuda.alloc(size) if size else None  # not a lane's: most plans are not taken
        workspace = memory.ptr if memory else 0
        self._execute(graph, workspace, pointers)  # loads the kernels
        executions = capture(self.cuda, lambda: self._execute(graph, workspace, pointers), LAUNCHES)

        def milliseconds() -> float:
            start, stop = self.cuda.Event(), self.cuda.Event()
            start.record(stream)
            executions.launch(stream)
            stop.record(stream)
            stop.synchronize()
            return float(self.cuda.get_elapsed_time(start, stop))

        warm = time.perf_counter() + WARM_UP_SECONDS
        while self._cold and time.perf_counter() < warm:
            milliseconds()
        self._cold = False
        for _ in range(ROUNDS):
            times.append(milliseconds())
        return median(times)


def load(
    cuda: Any,
    precision: str,
    from_bf16: Callable[[Array, Array], Any] | None = None,
    side_stream: SideStream | None = None,
) -> Convolutions:
    """`Convolutions` on the current device, with `cupy.cuda`; RuntimeError, in one line, where cuDNN is
    missing.
    """
    remedy = "pip install nvidia-cudnn-frontend nvidia-cudnn-cu12 (or -cu13)"
    try:
        # the frontend opens the CUDA runtime by its bare name, which finds one of pip's only if it is loaded
        # already
        importlib.import_module("cuda.pathfinder").load_nvidia_dynamic_lib("cudart")
        cudnn = importlib.import_module("cudnn")
    except (ImportError, OSError, RuntimeError) as error:
        raise RuntimeError(
            f"cuDNN's Python frontend cannot be imported ({first_line(error)}): {remedy}"
        ) from None
    try:
        convolutions = Convolutions(cudnn, cuda, precision, from_bf16, side_stream)
        convolutions._lane()
    except RuntimeError as error:
        raise RuntimeError(f"cuDNN cannot be used ({first_line(error)}): {remedy}") from None
    return convolutions
