"""PyTorch's side of the benchmarks, in a process of its own: `python -m launch.torch_peer.worker`.

A process of its own has its own threads and its own peak memory. `step` prints a line of JSON for every line
it reads, so that both sides take turns; `train` trains a whole configuration and prints one line at its end.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from distrib.config import Config
from distrib.data.sampler import Augmentation
from distrib.errors import UserError
from distrib.files import shown
from launch.machine import child_environment
from nn.layer import Layer

if TYPE_CHECKING:
    from launch.torch_peer.side import TorchSide

PLAIN = {
    name: getattr(Config(), name)
    for name in ("loss", "batch_norm", *Augmentation._fields, "average", "validation", "resume", "max_steps")
}
"""Options that the PyTorch side has one value of."""

OPTIMIZERS = ("adam", "sgd")
"""Those that it has too."""

LAYOUTS = ("channels-last", "contiguous")


def kinds(gpu: bool) -> tuple[str, ...]:
    """Ways to run PyTorch: both memory layouts, on a GPU eagerly and compiled with CUDA graphs."""
    return (
        tuple(f"{mode} {layout}" for mode in ("eager", "compile") for layout in LAYOUTS) if gpu else LAYOUTS
    )


def require_plain(config: Config) -> None:
    """UserError where PyTorch would do other work than ours."""
    for name, value in PLAIN.items():
        if getattr(config, name) != value:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {getattr(config, name)}: the PyTorch side has {value} only")
    if config.optimizer not in OPTIMIZERS:
        have = " and ".join(OPTIMIZERS)
        raise UserError(f"--optimizer {config.optimizer}: the PyTorch side has {have} only")
    if config.precision == "float64":
        raise UserError("--precision float64: the PyTorch side has none: give another")


def require_layers(layers: Layer, model: str) -> None:
    """UserError for a layer of one's own, which PyTorch does not have. Imports no PyTorch."""
    for layer in layers.walk():
        if not type(layer).__module__.startswith("nn.layers."):
            own = f"{shown(model, 200)} has a layer of its own, {type(layer).__name__}"
            raise UserError(f"--against torch: {own}, which PyTorch lacks: leave the option out")


def command(what: str, config: Config, kind: str, threads: int, **more: Any) -> list[str]:
    """The command line of such a process."""
    job = {"config": asdict(config), "kind": kind, "threads": threads, **more}
    return [sys.executable, "-m", "launch.torch_peer.worker", what, json.dumps(job)]


class Worker:
    """The other end: a child process that trains steps on request; calling it makes one measurement."""

    def __init__(self, config: Config, kind: str, threads: int, steps: int, evaluate: bool) -> None:
        self._process = subprocess.Popen(
            command("step", config, kind, threads, steps=steps, evaluate=evaluate),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child_environment(threads),
            text=True,
        )
        self._ask("ready")

    def __call__(self) -> dict[str, Any]:
        """{"seconds", "cpu_seconds", "peak_bytes"} of the job's steps."""
        return self._ask("steps")

    def _ask(self, what: str) -> dict[str, Any]:
        try:
            print(what, file=self._process.stdin, flush=True)
            line = self._process.stdout.readline() if self._process.stdout else ""
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            self.close()
            raise RuntimeError(f"the PyTorch process ended with code {code}")
        return dict(json.loads(line))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if pipe:
                    pipe.close()


def serve_steps(side: TorchSide, steps: int, evaluate: bool) -> None:
    """Train (or evaluate) `steps` batches for every line on stdin."""
    size = side.config.batch_size
    batches = side.order(0)[: len(side.images) // size * size].split(size)  # whole batches only
    side.model.train(not evaluate)
    side.torch.set_grad_enabled(not evaluate)
    for line in sys.stdin:
        side.wait()
        begin, own = time.perf_counter(), time.process_time()
        for step in range(0 if line.strip() == "ready" else steps):
            side.batch(batches[step % len(batches)], not evaluate)
        side.wait()
        seconds, own = time.perf_counter() - begin, time.process_time() - own
        row = {"seconds": seconds, "cpu_seconds": own, "peak_bytes": side.peak_bytes()}
        print(json.dumps(row), flush=True)


def train(side: TorchSide) -> dict[str, float]:
    """A whole run: seconds from the first step to the end of the last evaluation, accuracy."""
    accuracy = 0.0
    if side.gpu:
        side.warm_up()
    begin = time.perf_counter()
    for epoch in range(side.config.epochs):
        for _ in side.epoch(epoch):
            pass
        accuracy = side.accuracy()
    return {
        "wall_seconds": time.perf_counter() - begin,
        "test_accuracy": accuracy,
        "test_images": len(side.test),
    }


def main() -> None:
    """`step` or `train`, and what `command` says of the job."""
    from launch.torch_peer.side import TorchSide

    what, job = sys.argv[1], json.loads(sys.argv[2])
    side = TorchSide(Config(**job.pop("config")), job.pop("kind"), job.pop("threads"))
    if what == "step":
        serve_steps(side, **job)
    else:
        print(json.dumps(train(side)))


if __name__ == "__main__":
    main()
