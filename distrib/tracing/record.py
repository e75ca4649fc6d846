"""`--trace`: records what a rank does in some steps, layer by layer and bucket by bucket.

Methods of the trainer, its layers and its transport are wrapped while steps are traced, and only then: a run
that traces nothing has none of this in its way. What is recorded are marks of a clock (`clocks`); what they
mean is worked out once the steps are over (`events`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from distrib.comm.base import DONE, Handle
from distrib.tracing import clocks
from nn.layer import Layer
from nn.params import Parameter

if TYPE_CHECKING:
    from distrib.trainer import Trainer

COMPUTE, WIRE, SIDE = "compute", "wire", "side stream"
"""Tracks: of the main thread, what travels, a device's second stream. Other threads have one each."""

PASSES = "forward", "forward_added", "backward", "backward_added"
COLLECTIVES = {"all_reduce": "sum", "start_gather": "gather", "start_exchange": "exchange"}
"""What is wrapped of a layer, and of a transport."""

MOST_SPANS = 200_000
"""Spans of a rank that are kept: more than 100 steps and an evaluation have."""


@dataclass
class Span:
    """Something that took from one mark to another."""

    track: str
    kind: str  # step, phase, layer, wait, wire, save or evaluation
    name: str
    begin: Any
    end: Any
    more: dict[str, Any] = field(default_factory=dict)
    ready: list[tuple[str, Any]] = field(default_factory=list)  # of a bucket: its gradients, and since when


class Wrappers:
    """Attributes put in the place of others for a while."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, dict[str, Any]]] = []

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Let `owner.name` be `value` until `remove`."""
        own = vars(owner)
        self._before.append((owner, name, {name: own[name]} if name in own else {}))
        setattr(owner, name, value)

    def remove(self) -> None:
        """Put back what was there; a second call does nothing."""
        while self._before:
            owner, name, before = self._before.pop()
            delattr(owner, name)
            vars(owner).update(before)


class Recorder(Wrappers):
    """Records spans of one rank from now until `remove`."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self._trainer, world = trainer, trainer.world
        self.clock: Any = clocks.HostClock()
        if world.backend.cuda is not None:
            self.clock = clocks.DeviceClock(world.backend.cuda, getattr(world.transport, "comm_stream", None))
        self.spans, self.dropped, self._thread = list[Span](), 0, threading.get_ident()
        self._busy = set[tuple[int, str]]()  # layers in a pass, which may be made of another one of their own
        self._in_ready = False  # is a gradient being announced?
        self._wrap()

    def _wrap(self) -> None:
        trainer, world = self._trainer, self._trainer.world
        for network in (trainer.model, *(trainer.shards.networks if trainer.shards else ())):
            for layer in network.layers.walk():
                for method in PASSES if layer.name and "forward" not in vars(layer) else ():
                    self.put(layer, method, self._passing(layer, method))
        self.put(trainer, "graphs", None)  # a replay runs no layer's Python: these steps run eagerly
        self.put(trainer, "span", self.span)
        self.put(trainer.saver, "write", self._writing(trainer.saver.write))
        self.put(trainer.timer, "lap", self._lapping(trainer.timer.lap))
        if side := world.backend.side_stream:
            self.put(side, "fork", self._aside(side.fork))
        if world.size > 1:
            self.put(trainer.reducer, "ready", self._noting(trainer.reducer.ready))
            for name, what in COLLECTIVES.items():
                self.put(world.transport, name, self._sending(what, getattr(world.transport, name)))

    def _keep(self, span: Span) -> None:
        if len(self.spans) < MOST_SPANS:
            self.spans.append(span)
        else:
            self.dropped += 1

    def _add(self, kind: str, name: str, begin: Any, track: str = "", **more: Any) -> None:
        """Record what began at a mark and ends now, on this thread's track."""
        if not track:
            own = threading.get_ident() == self._thread
            track = COMPUTE if own else threading.current_thread().name
        self._keep(Span(track, kind, name, begin, self.clock.mark(), more))

    @contextmanager
    def span(self, kind: str, name: str = "", track: str = "", **more: Any) -> Iterator[None]:
        """Record what happens in the context."""
        self.clock.push(name or kind)
        begin = self.clock.mark()
        try:
            yield
        finally:
            self._add(kind, name or kind, begin, track, **more)
            self.clock.pop()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Record a step."""
        self._sent, self._ready, self._apart = 0, list[tuple[Parameter, Any]](), False
        with self.span("step", f"step {number}", step=number):
            self._phase = self.clock.mark()  # when it began
            yield

    def _passing(self, layer: Layer, method: str) -> Callable[..., Any]:
        """A layer's pass."""
        call, which, busy = getattr(layer, method), method.removesuffix("_added"), self._busy
        name, key, what = f"{layer.name} {which}", (id(layer), which), type(layer).__name__

        def recorded(*given: Any) -> Any:
            if key in busy:
                return call(*given)
            busy.add(key)
            self.clock.push(name)
            begin = self.clock.mark()
            try:
                return call(*given)
            finally:
                self._add("layer", name, begin, layer=what)
                self.clock.pop()
                busy.discard(key)

        return recorded

    def _writing(self, call: Callable[..., Any]) -> Callable[..., None]:
        """The writing of a checkpoint, in its own thread, by the host's clock."""

        def recorded(*given: Any) -> None:
            begin, track = time.perf_counter(), threading.current_thread().name
            call(*given)
            self._keep(Span(track, "save", "write checkpoint", begin, time.perf_counter()))

        return recorded

    def _aside(self, fork: Callable[[], Any]) -> Callable[[], Any]:
        """A context of a device's second stream, recorded there."""

        @contextmanager
        def recorded() -> Iterator[Any]:
            with fork() as stream, self.span("side", "beside the backward", SIDE):
                yield stream

        return recorded

    def _lapping(self, lap: Callable[[str], None]) -> Callable[[str], None]:
        """`StepTimer.lap`: the phases of a step."""

        def recorded(phase: str) -> None:
            lap(phase)
            self._apart = self._apart or phase == "forward"
            name = phase if self._apart or phase != "backward" else "forward and backward"
            begin, self._phase = self._phase, self.clock.mark()
            self._keep(Span(COMPUTE, "phase", name, begin, self._phase))

        return recorded

    def _noting(self, ready: Callable[[Parameter], None]) -> Callable[[Parameter], None]:
        """`Reducer.ready`, with a note of when each gradient was ready."""

        def recorded(parameter: Parameter) -> None:
            self._ready.append((parameter, self.clock.mark()))
            self._in_ready = True
            ready(parameter)
            self._in_ready = False

        return recorded

    def _sending(self, what: str, call: Callable[..., Handle]) -> Callable[..., Handle]:
        """A collective, from its call to the end of its wait."""

        def recorded(x: Any, *given: Any, **named: Any) -> Handle:
            mark = self.clock.mark
            begin, bucket = mark(), self._in_ready
            handle = call(x, *given, **named)
            span = Span(WIRE, "wire", what, begin, None, {"bytes": 0 if x is None else int(x.nbytes)})
            if bucket:
                self._name_bucket(span)
            if handle is DONE:  # it was waited for, or stands in the queue that computes
                self._add("wait", f"wait: {span.name}", begin)
                span.end = mark()
            elif self.clock.wire is not None:
                span.end = mark(self.clock.wire)
            if bucket or handle is not DONE:  # of batch norm's the wait says it all
                self._keep(span)
            return handle if handle is DONE else _Watched(self, span, handle)

        return recorded

    def _name_bucket(self, span: Span) -> None:
        """Say which bucket travels, and which gradients it has."""
        start = self._trainer.reducer.buckets[self._sent].start
        span.name = f"bucket {self._sent}"
        self._sent += 1
        span.ready = [(p.name, mark) for p, mark in self._ready if p.start >= start]
        self._ready = [(p, mark) for p, mark in self._ready if p.start < start]


@dataclass
class _Watched:
    """The handle of a collective that is recorded."""

    recorder: Recorder
    span: Span
    handle: Handle

    def wait(self) -> None:
        begin = self.recorder.clock.mark()
        self.handle.wait()
        self.recorder._add("wait", f"wait: {self.span.name}", begin)
        self.span.end = self.span.end or self.recorder.clock.mark()
