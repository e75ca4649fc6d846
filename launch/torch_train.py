"""The same training run in PyTorch, in one process.

`python -m launch.torch_train --run-dir R`, with the options of distrib.train. Its folder is that of a run of
ours, checkpoints too, so reports and comparisons read both. The data order is ours, the initial weights
PyTorch's. A stopped run is resumed. PyTorch is optional.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import typer

from distrib.config import Config, build
from distrib.data import sampler
from distrib.errors import EXIT_REQUEUE, UserError
from distrib.faults.heartbeat import Board
from distrib.run.checkpoint import Checkpoint, save_checkpoint
from distrib.run.console import Screen
from distrib.run.folder import Run
from distrib.train import run_app, with_options
from launch.entry import one_process
from launch.measure import machine, require_torch
from launch.torch_bench import LAYOUTS, TorchSide

PLAIN = {
    name: getattr(Config(), name)
    for name in ("loss", "batch_norm", "shift", "rotate", "average", "resume", "max_steps")
}
"""Options that this side has one value of."""


class TorchRun:
    """One run: the PyTorch side, where it stands, and its folder; `saved`, where it goes on from."""

    def __init__(self, config: Config, run: Run, saved: Checkpoint | None) -> None:
        import torch

        self.torch, self.config, self.run = torch, config, run
        self.side = TorchSide(
            config, LAYOUTS[0], int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
        )
        # of this epoch so far: loss_sum, correct, images;
        # of the whole run: seconds, those of training alone, trained images
        self.at: dict[str, Any] = {
            "step": 0,
            "loss_sum": 0.0,
            "correct": 0.0,
            "images": 0,
            "seconds": 0.0,
            "train_seconds": 0.0,
            "trained": 0,
            "last_epoch": {},
        }
        self.per_epoch = sampler.steps_per_epoch(len(self.side.images), config.batch_size)
        self.names = [name for name, _ in self.side.model.named_parameters()]  # in the optimizer's order
        if saved:
            self.at = saved.position
            self.side.model.load_state_dict(
                {name: torch.tensor(array) for name, array in saved.model.items()}
            )
            state: dict[int, dict[str, Any]] = {}
            for key, array in saved.optimizer.items():
                moment, name = key.split("/", 1)
                state.setdefault(self.names.index(name), {})[moment] = torch.tensor(array)
            self.side.optimizer.load_state_dict({**self.side.optimizer.state_dict(), "state": state})

    def save(self) -> None:
        """Write a checkpoint, whole or not at all."""
        c, side = self.config, self.side
        model = {name: tensor.cpu().contiguous().numpy() for name, tensor in side.model.state_dict().items()}
        moments = {
            f"{moment}/{self.names[i]}": tensor.cpu().contiguous().numpy()
            for i, state in side.optimizer.state_dict()["state"].items()
            for moment, tensor in state.items()
            if tensor is not None
        }
        about = {"variant": c.variant, "width": c.width, "loss": c.loss, "dtype": c.dtype}
        save_checkpoint(
            self.run.checkpoints,
            self.at["step"],
            dict(sorted(model.items())),
            about,
            moments,
            self.at,
            c.keep,
        )

    def fit(self, stop: deque[int], screen: Screen) -> dict[str, Any] | None:
        """Train to the end; the summary, or None where a signal came into `stop`."""
        config, side, at = self.config, self.side, self.at
        steps, begin, before = self.per_epoch * config.epochs, time.perf_counter(), at["seconds"]
        screen.start(steps, at["step"], config.epochs)
        board = Board(self.run.path, 0, 1)  # for those who watch
        while True:
            epoch, first = divmod(at["step"], self.per_epoch)
            if at["images"] and first == 0:  # it may have been stopped just before
                at["last_epoch"] = self.close_epoch(epoch - 1, screen)
                at["seconds"] = before + time.perf_counter() - begin
                self.save()
            if at["step"] == steps:
                break
            logged, images = time.perf_counter(), 0
            for indices, loss, logits, lr in side.epoch(epoch, first):
                correct = int((logits.argmax(1) == side.labels[indices]).sum())
                for name, more in (
                    ("step", 1),
                    ("images", len(indices)),
                    ("loss_sum", float(loss) * len(indices)),
                    ("correct", correct),
                ):
                    at[name] += more
                images += len(indices)
                saves = bool(stop) or at["step"] % config.checkpoint_every == 0
                logs = at["step"] % config.log_every == 0 or at["step"] % self.per_epoch == 0
                if saves or logs:
                    seconds = time.perf_counter() - logged
                    at["train_seconds"], at["trained"] = at["train_seconds"] + seconds, at["trained"] + images
                    line = {
                        "step": at["step"],
                        "epoch": epoch + 1,
                        "lr": lr,
                        "images_per_second": images / seconds,
                        "loss": float(loss),
                        "accuracy": 100 * correct / len(indices),
                    }
                    if logs:
                        self.run.log(line)
                    screen.progress(
                        at["step"], epoch, float(loss), images / seconds
                    ) if screen.due() else None
                    board.publish(step=at["step"], doing="computing")
                    at["seconds"] = before + time.perf_counter() - begin
                    if saves:
                        self.save()
                    logged, images = time.perf_counter(), 0
                if stop:
                    board.publish(now=True, step=at["step"], state="finished")
                    return None
        if not hasattr(self, "logits"):  # it ended between its last checkpoint and its result
            self.test()
        board.publish(now=True, step=at["step"], state="finished")
        return {
            "finished": True,
            **at["last_epoch"],
            "epochs": config.epochs,
            "steps": at["step"],
            "world_size": 1,
            "backend": f"PyTorch {self.torch.__version__}",
            "communicator": "none",
            "wall_seconds": at["seconds"],
            "parameters": sum(p.numel() for p in side.model.parameters()),
            "images_per_second": at["trained"] / at["train_seconds"],
        }

    def close_epoch(self, epoch: int, screen: Screen) -> dict[str, Any]:
        """Evaluate, write the epoch's line, reset the running sums."""
        at = self.at
        result = {
            "train_loss": at["loss_sum"] / at["images"],
            "train_accuracy": 100 * at["correct"] / at["images"],
            **self.test(),
        }
        at["loss_sum"], at["correct"], at["images"] = 0.0, 0.0, 0
        self.run.log({"step": at["step"], "epoch": epoch + 1, **result})
        screen.say(
            f"epoch {epoch + 1}/{self.config.epochs}: train accuracy {result['train_accuracy']:.2f} %;"
            f" test accuracy {result['test_accuracy']:.2f} %"
        )
        return result

    def test(self) -> dict[str, float]:
        """test_loss and test_accuracy (percent)."""
        logits = self.side.logits()
        self.logits = logits.float().cpu().numpy().copy()
        loss = self.torch.nn.functional.cross_entropy(logits.float(), self.side.wanted)
        return {
            "test_loss": float(loss),
            "test_accuracy": float(100 * (logits.argmax(1) == self.side.wanted).double().mean()),
        }


def train(config: Config) -> int:
    """One run, from the beginning or from where it was stopped; returns the exit code."""
    require_torch("launch.torch_train")
    for name, value in PLAIN.items():
        if getattr(config, name) != value:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(config, name)}: the PyTorch side has {value} only"
            )
    if not config.run_dir:
        raise UserError("--run-dir: give the run's folder")
    stop: deque[int] = deque()
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stop.append(number))
    screen = Screen(active=True)
    with Run(Path(config.run_dir)) as run:
        saved = run.open(config, native=False)
        mine = TorchRun(config, run, saved)
        environment = {
            "torch": mine.torch.__version__,
            "machine": machine(),
            "threads": mine.torch.get_num_threads(),
        }
        run.prepare(config, saved, environment)
        try:
            summary = mine.fit(stop, screen)
        finally:
            screen.close()
        if summary is None:
            return EXIT_REQUEUE
        run.keep_logits([mine.logits], summary["steps"])
        run.finish(summary)
        screen.say(
            f"finished: test accuracy {summary['test_accuracy']:.2f} %, {summary['wall_seconds']:.1f} s"
        )
    return 0


@one_process
def _command(**given: Any) -> None:
    raise typer.Exit(train(build(given)))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(with_options(_command))
    sys.exit(run_app(app))
