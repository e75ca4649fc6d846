"""The plans that cuDNN has for a convolution: listed and filtered. `nn.cuda.cudnn` times and runs them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any, NamedTuple

from nn.ops.conv import Geometry

WORKSPACE_LIMIT = 2 << 30
"""Bytes; plans that need more are not considered. On an H100, float32 without tensor cores needs 294 MiB at
batch 512 and 1,176 MiB at 2048: below, the generic engine alone is left."""

CANDIDATES = 24
"""Plans that are timed. cuDNN lists 34 to 43, what it deems faster first; the fastest is not always among the
first eight."""

BORROWED = 3
"""Plans of each engine that is not listed; see `Planner.borrow`."""

NOTES = {
    "float32": ("NONDETERMINISTIC", "REDUCED_PRECISION_REDUCTION", "DOWN_CONVERT_INPUTS", "TENSOR_CORE"),
    "tf32": ("NONDETERMINISTIC", "REDUCED_PRECISION_REDUCTION", "DOWN_CONVERT_INPUTS"),
    "bf16": ("NONDETERMINISTIC", "REDUCED_PRECISION_REDUCTION"),
}
"""By precision: cuDNN's notes on engines that must not be used. Tensor cores round float32 inputs to TF32."""

KINDS = {
    "forward": ("conv_fprop", {"image": "x", "weight": "w"}, "y"),
    "input gradient": ("conv_dgrad", {"loss": "y", "filter": "w"}, "x"),
    "weight gradient": ("conv_wgrad", {"image": "x", "loss": "y"}, "w"),
}
"""By operation: cuDNN's node, its arguments and its output by the tensor whose shape they have."""


class NoPlan(RuntimeError):
    """cuDNN cannot do the operation under the conditions that NOTES and WORKSPACE_LIMIT set."""


class Operation(NamedTuple):
    """One of KINDS for input (N, H, W, C) and weights (kh, kw, C, O)."""

    kind: str
    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    geometry: Geometry

    def __str__(self) -> str:
        x, w = ("x".join(map(str, shape)) for shape in (self.x_shape, self.w_shape))
        g = self.geometry
        return f"{self.kind} {x} {w} s{g.stride}p{g.padding}d{g.dilation}"

    def layouts(self) -> dict[str, tuple[list[int], list[int]]]:
        """Dimensions and strides of x, w and y: cuDNN names axes N, C, H, W however they lie."""
        y_shape = self.geometry.out_shape(self.x_shape, self.w_shape)
        kh, kw, c_in, c_out = self.w_shape
        shapes = {"x": self.x_shape, "w": (c_out, kh, kw, c_in), "y": y_shape}
        return {name: ([n, c, h, w], [h * w * c, 1, w * c, c]) for name, (n, h, w, c) in shapes.items()}


class Planner:
    """Lists and builds plans with the module `cudnn` in one precision, for the device that `target` gives."""

    def __init__(self, cudnn: Any, precision: str, target: Callable[[], dict[str, Any]]) -> None:
        if precision not in NOTES:
            raise ValueError(f"precision {precision!r} is none of {', '.join(NOTES)}")
        self.cudnn, self.precision, self._target = cudnn, precision, target
        self.version: str = cudnn.backend_version_string()
        self._type = cudnn.data_type.BFLOAT16 if precision == "bf16" else cudnn.data_type.FLOAT
        self.refusals = (cudnn.cudnnGraphNotSupportedError, RuntimeError, ValueError)

    def graph(self, operation: Operation) -> Any:
        """The operation as a graph with its list of plans, none of them built."""
        cudnn, layouts, g = self.cudnn, operation.layouts(), operation.geometry
        node, inputs, output = KINDS[operation.kind]
        float32 = cudnn.data_type.FLOAT
        try:
            types = {"intermediate_data_type": float32, "compute_data_type": float32}
            graph, tensors = cudnn.pygraph(io_data_type=self._type, **types, **self._target()), {}
            for uid, (name, like) in enumerate(inputs.items(), 1):
                dim, stride = layouts[like]
                tensors[name] = graph.tensor(name=name, dim=dim, stride=stride, data_type=self._type, uid=uid)
            window = {"padding": [g.padding] * 2, "stride": [g.stride] * 2, "dilation": [g.dilation] * 2}
            result = getattr(graph, node)(**tensors, **window, compute_data_type=float32)
            dim, stride = layouts[output]
            result.set_output(True).set_data_type(self._type).set_dim(dim).set_stride(stride).set_uid(3)
            graph.validate()
            graph.build_operation_graph()
            # Under "float32" mode A often lists nothing but tensor cores: the fallbacks behind it are what is
            # left.
            graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
            self._deselect(graph)
        except cudnn.cudnnGraphNotSupportedError as error:
            raise NoPlan(
                f"cuDNN {self.version} has no plan for {operation} {self.precision}: {first_line(error)}"
            ) from error
        except (RuntimeError, ValueError) as error:
            raise RuntimeError(
                f"cuDNN {self.version}, {operation} {self.precision}: {first_line(error)}"
            ) from error
        return graph

    def _deselect(self, graph: Any) -> None:
        """Bar the plans that NOTES and WORKSPACE_LIMIT forbid."""
        notes = self.cudnn.numerical_note
        graph.deselect_numeric_notes([getattr(notes, note) for note in NOTES[self.precision]])
        graph.deselect_workspace_greater_than(WORKSPACE_LIMIT)

    def borrow(self, graph: Any, operation: Operation) -> None:
        """Append to the plans of `graph` some of engines that cuDNN does not list for this operation.

        With as many channels out as in it leaves out engines that it lists for twice as many out, and that
        work here too when they are asked for.
        """
        kh, kw, c_in, c_out = operation.w_shape
        try:
            wider = self.graph(operation._replace(w_shape=(kh, kw, c_in, 2 * c_out)))
        except self.refusals:
            return
        own, borrowed = {engine for engine, _ in engines(graph)}, Counter[int]()
        for engine, knobs in engines(wider):
            if engine not in own and borrowed[engine] < BORROWED:
                borrowed[engine] += 1
                with contextlib.suppress(*self.refusals):
                    graph.create_execution_plan(engine, knobs)
        self._deselect(graph)

    def buildable(self, graph: Any, numbers: range) -> Iterator[str]:
        """Yields the names of the plans that can be built, each while it is the one that `graph` executes."""
        for index in numbers:
            try:
                graph.build_plan_at_index(index)
            except self.refusals:
                continue  # deselected, too large, or in need of a compiler that is missing
            yield graph.get_plan_name_at_index(index)

    def candidates(self, operation: Operation) -> tuple[Any, Iterator[str]]:
        """The operation's graph, and the names of the plans to be timed, as `buildable` yields them.

        They are the first CANDIDATES of the listed plans that build, and those that are borrowed.
        """
        graph = self.graph(operation)
        listed = places(graph)
        self.borrow(graph, operation)
        borrowed = places(graph)[len(listed) :]
        first = islice(self.buildable(graph, listed), CANDIDATES)
        return graph, chain(first, self.buildable(graph, borrowed))


def engines(graph: Any) -> list[tuple[int, Any]]:
    """(engine, knobs) of each plan of the list."""
    return [graph.get_engine_and_knobs_at_index(index) for index in places(graph)]


def places(graph: Any) -> range:
    """The numbers of the plans of the list."""
    return range(graph.get_execution_plan_count())


def first_line(error: Exception) -> str:
    """The first line of cuDNN's message: the rest dumps whole descriptors."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
