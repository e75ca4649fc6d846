"""`distrib torch-train`: the same training run in PyTorch, in one process.

It takes the options of `distrib train`, and leaves a folder like that of a run of ours, checkpoints too, so
that reports and comparisons read both. The order of the images is ours, the initial weights are PyTorch's.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from distrib.config import CHECKPOINT_STEPS, Config, build
from distrib.data import sampler
from distrib.errors import EXIT_REQUEUE, UserError
from distrib.faults.heartbeat import Heartbeats
from distrib.run.checkpoint import Checkpoint, save_checkpoint
from distrib.run.console import Screen
from distrib.run.folder import Run
from distrib.run.model_spec import describe_model
from distrib.train import with_options
from launch.entry import one_process
from launch.machine import all_threads, machine, require_torch
from launch.torch_peer.worker import LAYOUTS, require_plain

if TYPE_CHECKING:
    from launch.torch_peer.side import TorchSide

START: dict[str, Any] = {
    "step": 0,
    # of this epoch so far
    "loss_sum": 0.0,
    "correct": 0.0,
    "images": 0,
    # of the whole run: seconds, those of training alone, trained images
    "seconds": 0.0,
    "train_seconds": 0.0,
    "trained": 0,
    "last_epoch": {},
}


class TorchRun:
    """One run: the PyTorch side, its progress `at`, and its folder; it resumes from `saved`."""

    def __init__(
        self, side: TorchSide, config: Config, run: Run, saved: Checkpoint | None, screen: Screen
    ) -> None:
        self.torch, self.side, self.config, self.run, self.screen = side.torch, side, config, run, screen
        self.at = dict(START)
        self.per_epoch = sampler.steps_per_epoch(len(side.images), config.batch_size)
        self.names = [name for name, _ in side.model.named_parameters()]  # in the optimizer's order
        self.logits: Any = None  # of the last evaluation
        if saved:
            self.restore(saved)
        self.heartbeats = Heartbeats(run.path, 0, 1)  # for those who watch
        self.begin = time.perf_counter() - self.at["seconds"]

    def restore(self, saved: Checkpoint) -> None:
        """Take in a checkpoint."""
        tensor, side = self.torch.tensor, self.side
        self.at = saved.position
        side.model.load_state_dict({name: tensor(array) for name, array in saved.model.items()})
        state: dict[int, dict[str, Any]] = {}
        for key, array in saved.optimizer.items():
            moment, name = key.split("/", 1)
            state.setdefault(self.names.index(name), {})[moment] = tensor(array)
        side.optimizer.load_state_dict({**side.optimizer.state_dict(), "state": state})

    def save(self) -> None:
        """Write a checkpoint, whole or not at all."""
        c, side = self.config, self.side
        self.at["seconds"] = time.perf_counter() - self.begin
        model = {name: to_numpy(tensor) for name, tensor in sorted(side.model.state_dict().items())}
        moments = {
            f"{moment}/{self.names[i]}": to_numpy(tensor)
            for i, state in side.optimizer.state_dict()["state"].items()
            for moment, tensor in state.items()
            if tensor is not None
        }
        spec = describe_model(c, side.data)
        save_checkpoint(self.run.checkpoints, self.at["step"], model, spec, moments, self.at, c.keep)

    def fit(self, stop: deque[int]) -> dict[str, Any] | None:
        """Train to the end; the summary, or None where a signal came into `stop`."""
        at, steps = self.at, self.per_epoch * self.config.epochs
        self.screen.start(steps, at["step"], self.config.epochs)
        while True:
            epoch, first = divmod(at["step"], self.per_epoch)
            if at["images"] and first == 0:  # it may have been stopped just before
                at["last_epoch"] = self.close_epoch(epoch - 1)
                self.save()
            if at["step"] == steps:
                break
            self.train_epoch(epoch, first, stop)
            if stop:
                self.heartbeats.publish(now=True, step=at["step"], state="finished")
                return None
        if self.logits is None:  # it was stopped between its last checkpoint and its result
            self.test()
        self.heartbeats.publish(now=True, step=at["step"], state="finished")
        return self.summary()

    def train_epoch(self, epoch: int, first: int, stop: deque[int]) -> None:
        """Train an epoch from its step `first`, to its end or, with a checkpoint, to a signal in `stop`."""
        at, config = self.at, self.config
        logged, images = time.perf_counter(), 0
        for indices, loss, logits, lr in self.side.epoch(epoch, first):
            count, correct = len(indices), int((logits.argmax(1) == self.side.labels[indices]).sum())
            at["step"] += 1
            at["images"] += count
            at["loss_sum"] += float(loss) * count
            at["correct"] += correct
            images += count
            saves = bool(stop) or at["step"] % (config.checkpoint_every or CHECKPOINT_STEPS) == 0
            logs = at["step"] % config.log_every == 0 or at["step"] % self.per_epoch == 0
            if saves or logs:
                seconds = time.perf_counter() - logged
                at["train_seconds"] += seconds
                at["trained"] += images
                figures = {"loss": float(loss), "accuracy": 100 * correct / count}
                self.tell(epoch, lr, images / seconds, figures, logs)
                if saves:
                    self.save()
                logged, images = time.perf_counter(), 0
            if stop:
                return

    def tell(self, epoch: int, lr: float, rate: float, figures: dict[str, float], logs: bool) -> None:
        """Log a step if `logs`, show it, publish the heartbeat."""
        step = self.at["step"]
        if logs:
            self.run.log({"step": step, "epoch": epoch + 1, "lr": lr, "images_per_second": rate, **figures})
        if self.screen.due():
            self.screen.progress(step, epoch, figures["loss"], rate)
        self.heartbeats.publish(step=step, doing="computing")

    def summary(self) -> dict[str, Any]:
        """For summary.json."""
        at = self.at
        return {
            "finished": True,
            **at["last_epoch"],
            "epochs": self.config.epochs,
            "steps": at["step"],
            "world_size": 1,
            "backend": f"PyTorch {self.torch.__version__}",
            "communicator": "none",
            "wall_seconds": at["seconds"],
            "parameters": sum(p.numel() for p in self.side.model.parameters()),
            "images_per_second": at["trained"] / at["train_seconds"],
        }

    def close_epoch(self, epoch: int) -> dict[str, Any]:
        """Evaluate, write the epoch's line, reset the running sums."""
        at = self.at
        result = {
            "train_loss": at["loss_sum"] / at["images"],
            "train_accuracy": 100 * at["correct"] / at["images"],
            **self.test(),
        }
        at["loss_sum"], at["correct"], at["images"] = 0.0, 0.0, 0
        self.run.log({"step": at["step"], "epoch": epoch + 1, **result})
        self.screen.say(
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


def to_numpy(tensor: Any) -> Any:
    return tensor.cpu().contiguous().numpy()


def train(config: Config) -> int:
    """One run, from the beginning or from where it was stopped; returns the exit code."""
    require_torch("distrib torch-train")
    from launch.torch_peer.side import TorchSide

    require_plain(config)
    if not config.run_dir:
        raise UserError("--run-dir: give the run's folder")
    stop: deque[int] = deque()
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stop.append(number))
    screen = Screen(active=True)
    with Run(Path(config.run_dir)) as run:
        saved = run.open(config, native=False)
        side = TorchSide(config, LAYOUTS[0], all_threads())
        mine = TorchRun(side, config, run, saved, screen)
        versions: dict[str, Any] = {"torch": side.torch.__version__, "machine": machine()}
        versions["threads"] = side.torch.get_num_threads()
        run.prepare(config, saved, versions, side.data.describe())
        try:
            summary = mine.fit(stop)
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
def torch_train(**given: Any) -> None:
    """Train the same network in PyTorch, in one process, with the options of `distrib train`.

    Example: distrib torch-train --epochs 8 --run-dir runs/torch
    """
    raise typer.Exit(train(build(given)))


with_options(torch_train)
