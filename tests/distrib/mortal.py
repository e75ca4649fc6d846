"""A program that trains as `python -m distrib.train` does, and whose ranks die as they are told.

MORTAL_PLAN in the environment, "RANK:STEP:PLACE:CAUSE RANK:…", plans deaths: of the rank of that number at
the start, before the function named PLACE, once STEP steps are done. MORTAL_NOTES names a folder: there each
rank writes its pid, and after each step who computed which images. SIGUSR2 asks for a death by an exception
before the next of those functions. A rank whose CAUSE is "late" lives, and comes there a second later.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from distrib import elastic, loop, state
from distrib.comm.meeting import Meeting
from distrib.comm.mpi import MpiCommunicator
from distrib.comm.reducer import Reducer
from distrib.data import sampler
from distrib.faults.heartbeat import Heartbeat, record_failure
from distrib.run.folder import Run
from distrib.trainer import Trainer

NUMBER = int(os.environ["OMPI_COMM_WORLD_RANK"])
PLAN = [each.split(":") for each in os.environ.get("MORTAL_PLAN", "").split()]
NOTES = Path(os.environ["MORTAL_NOTES"])

trainer: Trainer | None = None
asked = ""


def die(cause: str) -> None:
    if cause == "late":
        return time.sleep(1)
    if cause == "raise":
        raise RuntimeError("planted")
    if cause == "exit":
        os._exit(1)
    if cause == "leave":
        sys.exit(3)
    if cause == "verdict":  # as if the others had given the job up while rank 0 was suspended
        record_failure(trainer.folder, Heartbeat(0, "elsewhere", 1, 3), "suspended")
        cause = "SIGKILL"
    if cause == "memory":
        raise MemoryError
    if cause in ("error", "errors"):  # no death, but what Open MPI may say of another rank's: once or always
        from mpi4py import MPI  # not before the program starts MPI

        raise MPI.Exception(MPI.ERR_OTHER)
    os.kill(os.getpid(), getattr(signal, cause))
    time.sleep(600)  # a signal may take its time


def at(place: str) -> None:
    if asked:
        die(asked)
    step = trainer.progress.step if trainer else -1
    for each in list(PLAN):
        number, when, where, cause = each
        if (int(number), int(when), where) == (NUMBER, step, place):
            if cause == "error":
                PLAN.remove(each)
            die(cause)


def mortal(owner: object, name: str) -> Callable[[], None]:
    """Make each call of a function a place to die."""
    plain = getattr(owner, name)

    def function(*given: object, **named: object) -> object:
        at(name)
        return plain(*given, **named)

    setattr(owner, name, function)
    return plain


def note_step(self: Trainer, *given: int) -> None:
    """A step, then a line of who computed which images, as this rank knows it."""
    global trainer
    trainer = self
    at("step")
    (epoch, s), batch = divmod(self.progress.step, self.steps_per_epoch), self.config.batch_size
    plain_step(self, *given)
    order = plain_order(self.config.seed, epoch, len(self.images))
    images = order[s * batch : (s + 1) * batch].tolist()
    parts = self.parts(len(images))
    who = {m.number: images[part] for m, part in zip(self.world.members, parts, strict=True)}
    with open(NOTES / f"steps-{NUMBER}.jsonl", "a") as file:
        file.write(
            json.dumps({"step": self.progress.step, "by": NUMBER, "images": who, "time": time.time()}) + "\n"
        )


def ask(cause: str) -> Callable[[int, object], None]:
    def handler(*_: object) -> None:
        global asked
        asked = cause

    return handler


plain_step, plain_order = Trainer.step, sampler.permutation


def main() -> int:
    faulthandler.disable()
    Trainer.step = note_step
    for owner, name in (
        (Trainer, "sum_over_ranks"),
        (Reducer, "ready"),
        (MpiCommunicator, "start_gather"),
        (MpiCommunicator, "all_reduce"),
        (Trainer, "test"),
        (Trainer, "state_dict"),
        (state, "save"),
        (loop, "build"),
        (loop, "begin"),
        (loop, "finish"),
        (loop, "record_deaths"),
        (Meeting, "again"),
        (Meeting, "ended"),
        (elastic, "_share_state"),
        (elastic, "_take_over"),
        (Run, "log"),
        (Run, "finish"),
        (sampler, "permutation"),
    ):
        mortal(owner, name)
    signal.signal(signal.SIGUSR2, ask("raise"))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    plain_meeting = Meeting.__init__

    def met(self: Meeting, *given: object) -> None:
        fresh = NOTES / f"new-{NUMBER}"
        fresh.write_text(str(os.getpid()))
        fresh.rename(NOTES / f"pid-{NUMBER}")  # whole, for who reads it
        plain_meeting(self, *given)

    Meeting.__init__ = met
    from distrib.train import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
