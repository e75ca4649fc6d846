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
        self._before: list[tuple[Any, str, bool, Any]] = []

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Let `owner.name` be `value` until `remove`."""
        own = vars(owner)
        self._before.append((owner, name, name in own, own.get(name)))
        setattr(owner, name, value)

    def remove(self) -> None:
        """Put back what was there."""
        while self._before:
            owner, name, had, value = self._before.pop()
            if had:
                setattr(owner, name, value)
            else:
                delattr(owner, name)


class Recorder:
    """Records spans of one rank between `begin` and `end`."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._wrappers = trainer, Wrappers()
        backend, transport = trainer.world.backend, trainer.world.transport
        self.clock: Any = clocks.HostClock()
        if backend.cuda is not None:
            self.clock = clocks.DeviceClock(backend.cuda, getattr(transport, "comm_stream", None))
        self.mark, self.spans, self.dropped = self.clock.mark, list[Span](), 0
        self._thread = threading.get_ident()
        self._busy = set[tuple[int, str]]()  # layers in a pass, which may be made of another one of their own
        self._phase: Any = None  # when the phase under way began
        self._apart = False  # whether the step's forward is timed apart from its backward
        self._sent = 0  # buckets of the step
        self._ready: list[tuple[Parameter, Any]] = []  # gradients that wait for the others of their bucket
        self._in_ready = False

    def begin(self) -> None:
        """Wrap all that is recorded."""
        trainer, world, put = self._trainer, self._trainer.world, self._wrappers.put
        networks = [trainer.model, *(trainer.shards.networks if trainer.shards else ())]
        for network in {id(each): each for each in networks}.values():
            for layer in network.layers.walk():
                if layer.name:
                    self._wrap_layer(layer)
        put(trainer, "graphs", None)  # a replay runs no layer's Python: these steps run eagerly
        put(trainer, "span", self.span)
        put(trainer.saver, "write", self._writing(trainer.saver.write))
        put(trainer.timer, "start", self._starting(trainer.timer.start))
        put(trainer.timer, "lap", self._lapping(trainer.timer.lap))
        if side := world.backend.side_stream:
            put(side, "fork", self._aside(side.fork))
        if world.size > 1:
            put(trainer.reducer, "ready", self._noting(trainer.reducer.ready))
            for name, what in (
                ("all_reduce", "sum"),
                ("start_gather", "gather"),
                ("start_exchange", "exchange"),
            ):
                put(world.transport, name, self._sending(what, getattr(world.transport, name)))

    def end(self) -> None:
        """Record nothing more; a second call does nothing."""
        self._wrappers.remove()

    def _add(self, kind: str, name: str, begin: Any, track: str = "", **more: Any) -> None:
        """Record what began at a mark and ends now, on this thread's track."""
        if not track:
            own = threading.get_ident() == self._thread
            track = COMPUTE if own else threading.current_thread().name
        self._keep(Span(track, kind, name, begin, self.mark(), more))

    def _keep(self, span: Span) -> None:
        if len(self.spans) < MOST_SPANS:
            self.spans.append(span)
        else:
            self.dropped += 1

    @contextmanager
    def span(self, kind: str, name: str = "", track: str = "", **more: Any) -> Iterator[None]:
        """Record what happens in the context."""
        self.clock.push(name or kind)
        begin = self.mark()
        try:
            yield
        finally:
            self._add(kind, name or kind, begin, track, **more)
            self.clock.pop()

    def _wrap_layer(self, layer: Layer) -> None:
        for method in ("forward", "forward_added", "backward", "backward_added"):
            which = method.removesuffix("_added")
            self._wrappers.put(layer, method, self._passing(layer, which, getattr(layer, method)))

    def _passing(self, layer: Layer, which: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, a layer's pass, recorded."""
        name, key, busy, what = f"{layer.name} {which}", (id(layer), which), self._busy, type(layer).__name__

        def recorded(*given: Any) -> Any:
            if key in busy:
                return call(*given)
            busy.add(key)
            self.clock.push(name)
            begin = self.mark()
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
            begin = time.perf_counter()
            try:
                call(*given)
            finally:
                name = threading.current_thread().name
                self._keep(Span(name, "save", "write checkpoint", begin, time.perf_counter()))

        return recorded

    def _aside(self, fork: Callable[[], Any]) -> Callable[[], Any]:
        """A context of a device's second stream, recorded there."""

        @contextmanager
        def recorded() -> Iterator[Any]:
            with fork() as stream, self.span("side", "beside the backward", SIDE):
                yield stream

        return recorded

    # phases, as `StepTimer` tells them

    def _starting(self, start: Callable[[], None]) -> Callable[[], None]:
        def recorded() -> None:
            start()
            self._phase, self._apart, self._sent, self._ready = self.mark(), False, 0, []

        return recorded

    def _lapping(self, lap: Callable[[str], None]) -> Callable[[str], None]:
        def recorded(phase: str) -> None:
            lap(phase)
            self._apart = self._apart or phase == "forward"
            name = phase if self._apart or phase != "backward" else "forward and backward"
            end = self.mark()
            self._keep(Span(COMPUTE, "phase", name, self._phase, end))
            self._phase = end

        return recorded

    # what travels

    def _noting(self, ready: Callable[[Parameter], None]) -> Callable[[Parameter], None]:
        """`Reducer.ready`, with a note of when each gradient was ready."""

        def recorded(parameter: Parameter) -> None:
            self._ready.append((parameter, self.mark()))
            self._in_ready = True
            try:
                ready(parameter)
            finally:
                self._in_ready = False

        return recorded

    def _sending(self, what: str, call: Callable[..., Handle]) -> Callable[..., Handle]:
        """A collective, recorded from its call to the end of its wait."""

        def recorded(x: Any, *given: Any, **named: Any) -> Handle:
            begin = self.mark()
            handle = call(x, *given, **named)
            span = Span(WIRE, "wire", what, begin, None, {"bytes": 0 if x is None else int(x.nbytes)})
            if self._in_ready:
                self._name_bucket(span)
            if handle is DONE:  # it was waited for, or stands in the queue that computes
                self._add("wait", f"wait: {span.name}", begin)
                span.end = self.mark()
            elif self.clock.wire is not None:
                span.end = self.mark(self.clock.wire)
            if handle is DONE and not self._in_ready:  # batch norm's: the wait says it all
                return handle
            self._keep(span)
            return handle if handle is DONE else _Watched(self, span, handle)

        return recorded

    def _name_bucket(self, span: Span) -> None:
        """Say which bucket travels, and which gradients it has."""
        bucket = self._trainer.reducer.buckets[self._sent]
        span.name = f"bucket {self._sent}"
        self._sent += 1
        span.ready = [(p.name, mark) for p, mark in self._ready if p.start >= bucket.start]
        self._ready = [(p, mark) for p, mark in self._ready if p.start < bucket.start]


@dataclass
class _Watched:
    """The handle of a collective that is recorded."""

    recorder: Recorder
    span: Span
    handle: Handle

    def wait(self) -> None:
        begin = self.recorder.mark()
        self.handle.wait()
        self.recorder._add("wait", f"wait: {self.span.name}", begin)
        if self.span.end is None:
            self.span.end = self.recorder.mark()
