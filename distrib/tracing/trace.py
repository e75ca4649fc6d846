"""`--trace FILE`: a timeline of some steps of all ranks, written once they are over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from distrib.comm.start import SLOW_IO_FACTOR
from distrib.errors import UserError
from distrib.files import create, reason, require_place, temporary, write
from distrib.options import steps_between
from distrib.tracing import clocks, events
from distrib.tracing.record import Recorder, Wrappers

if TYPE_CHECKING:
    from distrib.comm.world import World
    from distrib.config import Config
    from distrib.run.folder import Run
    from distrib.trainer import Trainer

AFTER, STEPS = 10, 5
"""Without --trace-steps: the first traced step of those that a start does, and how many are."""

ON_HOST = {"wire": "from the call until the rank has waited for it"}
ON_DEVICE = {
    "wire": "as long as it takes on the communication stream",
    "times": "of events on the device's streams; the steps ran eagerly, as a graph's replay has no layers",
}
"""What the times of a trace mean."""

Say = Callable[[str], None]


def require_writable(config: Config, world: World, run: Run | None) -> None:
    """UserError on rank 0 if it could not write the trace."""
    if config.trace is None or world.rank:
        return
    path = Path(config.trace)
    if run and path.parent == run.path and not path.parent.exists():
        return  # the run makes it
    try:
        require_place(path)
        temporary(path).unlink(missing_ok=True)
        create(temporary(path))
        temporary(path).unlink()
    except UserError as error:
        raise UserError(f"--trace {error}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--trace {path}: cannot be written {reason(error, path)}") from None


@contextmanager
def traced(trainer: Trainer, say: Say) -> Iterator[None]:
    """Context of a training, of which --trace-steps are traced, if there is a --trace. Every rank enters it.

    After a death the survivors enter it again. What was recorded is lost, and they trace the steps that are
    left, of all that they agree no trace was written.
    """
    config, world, step = trainer.config, trainer.world, trainer.progress.step
    if config.trace is None or any(world.allgather(trainer.traced, "whether there is a trace")):
        yield
        return
    first, last = steps_between(config.trace_steps) or (step + AFTER, step + AFTER + STEPS - 1)
    if last <= step:
        say(f"trace: none is written: step {last} was done before")
        yield
        return
    if trainer.started is not None:
        say(f"trace: of the {world.size} rank(s) that are left")
    trace = Trace(trainer, first, last, say)
    try:
        yield
        trace.finish()
    finally:
        trace.remove()


class Trace:
    """Traces steps `first` to `last` of a training, and what follows each of them."""

    def __init__(self, trainer: Trainer, first: int, last: int, say: Say) -> None:
        self._trainer, self._first, self._last, self._say = trainer, first, last, say
        self._recorder: Recorder | None = None
        self._before = clocks.Offset()
        self._step, self._wrappers = trainer.step, Wrappers()
        self._wrappers.put(trainer, "step", self.step)

    def step(self, times: int = 1) -> None:
        """Do the next steps one by one, and trace those that are to be."""
        for _ in range(times):
            self._next()

    def _next(self) -> None:
        number = self._trainer.progress.step + 1
        if number > self._last:
            self.finish()
        elif number >= self._first and self._recorder is None:
            self._first, self._before = number, clocks.offset(self._trainer.world)
            self._recorder = Recorder(self._trainer)
        if self._recorder is None:
            self._step()
        else:
            with self._recorder.step(number):
                self._step()

    def remove(self) -> None:
        """Trace nothing more; a second call does nothing."""
        if self._recorder:
            self._recorder.remove()
        self._recorder = None
        self._wrappers.remove()

    def finish(self) -> None:
        """Gather what the ranks recorded, and write it on rank 0. A second call does nothing."""
        trainer, recorder = self._trainer, self._recorder
        self.remove()
        if trainer.traced:
            return
        done = trainer.progress.step
        if recorder is None:
            self._say(f"trace: none is written: the run ended after step {done}, before step {self._first}")
            return
        world, first, last = trainer.world, self._first, min(done, self._last)
        with trainer.waiting("the end of the traced steps"):
            found = events.told(recorder, clocks.between(self._before, clocks.offset(world)))
        everyone = world.allgather(found, "the traced steps", SLOW_IO_FACTOR)
        if world.rank == 0:
            of_run = {"steps": [first, last], "ranks": world.size, "backend": world.backend.name}
            more = {**of_run, **(ON_HOST if world.backend.cuda is None else ON_DEVICE)}
            self._write(events.file_of(world.members, everyone, more), f"steps {first} to {last}")
        world.allgather(None, "the writing of the trace", SLOW_IO_FACTOR)
        trainer.traced = True

    def _write(self, data: bytes, what: str) -> None:
        path = Path(str(self._trainer.config.trace))
        try:
            write(path, data)
        except UserError as error:
            self._say(f"trace: {error}; the training goes on")
        else:
            self._say(f"trace: {what} in {path}, {len(data) / 1e6:.1f} MB: open it at ui.perfetto.dev")
