"""PyTorch's side of the benchmarks, in a process of its own: `python -m launch.torch_bench step|train '{…}'`.

A process of its own has its own threads and its own peak memory. `step` prints a line of JSON for every line
it reads, so that both sides take turns; `train` trains a whole configuration and prints one line at its end.
PyTorch is optional.
"""

from __future__ import annotations

import contextlib
import copy
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from distrib.config import Config
from distrib.data import idx as mnist
from distrib.data import sampler
from launch.measure import child_environment, peak_bytes

LAYOUTS = ("channels-last", "contiguous")


def kinds(gpu: bool) -> tuple[str, ...]:
    """Ways to run PyTorch: both memory layouts, on a GPU eagerly and compiled with CUDA graphs."""
    return (
        tuple(f"{mode} {layout}" for mode in ("eager", "compile") for layout in LAYOUTS) if gpu else LAYOUTS
    )


def command(what: str, config: Config, kind: str, threads: int, **more: Any) -> list[str]:
    """The command line of such a process."""
    job = {"config": asdict(config), "kind": kind, "threads": threads, **more}
    return [sys.executable, "-m", "launch.torch_bench", what, json.dumps(job)]


class Worker:
    """The other end: a child process that trains steps in PyTorch on request; calling it makes one measurement."""

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
        """{"seconds", "peak_bytes"} of the job's steps."""
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


class TorchSide:
    """Model, optimizer and data of a configuration in PyTorch, of one of `kinds`; on the GPU with --backend cupy."""

    def __init__(self, config: Config, kind: str, threads: int) -> None:
        import torch

        from launch.torch_resnet9 import TorchResNet9

        torch.set_num_threads(threads)
        torch.manual_seed(config.seed)
        mode, _, layout = kind.rpartition(" ")
        self.torch, self.config, self.gpu = torch, config, config.backend == "cupy"
        self.device = torch.device("cuda" if self.gpu else "cpu")
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = config.precision == "tf32"
        self.layout = torch.channels_last if layout == "channels-last" else torch.contiguous_format
        model = TorchResNet9(config.variant, config.width).to(self.device, memory_format=self.layout)
        self.model: Any = model
        if mode == "compile":  # forward and backward as CUDA graphs
            self.model = torch.compile(model, mode="reduce-overhead", dynamic=False)
        data = mnist.load(config.data, config.limit_train, config.limit_test)
        self.images, self.test = (
            torch.tensor(a[:, None], device=self.device) for a in (data.train_images, data.test_images)
        )
        self.labels, self.wanted = (
            torch.tensor(a, device=self.device).long() for a in (data.train_labels, data.test_labels)
        )
        parameters: Any = model.parameters()
        fused = {"fused": True} if self.gpu else {}
        self.optimizer: Any = (
            torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay, **fused)
            if config.optimizer == "adam"
            else torch.optim.SGD(
                parameters,
                config.lr,
                config.momentum,
                weight_decay=config.weight_decay,
                nesterov=config.nesterov,
                **fused,
            )
        )

    def scaled(self, images: Any) -> Any:
        """Images (uint8) as the network's input, scaled to [0, 1]."""
        return (images.to(self.torch.float32) / 255).contiguous(memory_format=self.layout)

    def precision(self) -> Any:
        """Context of the forward pass: autocast in bf16."""
        if self.config.precision == "bf16":
            return self.torch.autocast(self.device.type, dtype=self.torch.bfloat16)
        return contextlib.nullcontext()

    def batch(self, indices: Any, train: bool = True) -> tuple[Any, Any]:
        """One step on these training images, or with `train` false their loss alone; (loss, logits). A GPU is not waited for."""
        self.mark_step()
        with self.precision():
            logits, labels = self.model(self.scaled(self.images[indices])), self.labels[indices]
        loss = self.torch.nn.functional.cross_entropy(
            logits.float(), labels, label_smoothing=self.config.label_smoothing
        )
        if train:
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        if not self.gpu:
            loss.item()
        return loss.detach(), logits.detach()

    def epoch(self, number: int, done: int = 0) -> Iterator[tuple[Any, Any, Any, float]]:
        """The steps of an epoch (from 0) but the first `done`, each when it is done: indices, loss, logits, learning rate."""
        per_epoch = sampler.steps_per_epoch(len(self.images), self.config.batch_size)
        self.model.train()
        for step, indices in enumerate(self.order(number).split(self.config.batch_size)[done:], done):
            lr = self.config.rate(number * per_epoch + step, per_epoch)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            yield indices, *self.batch(indices), lr

    def warm_up(self) -> None:
        """What our side too does before the clock starts: compile, choose algorithms, capture; then put all back."""
        weights, state = copy.deepcopy(self.model.state_dict()), copy.deepcopy(self.optimizer.state_dict())
        order, size = self.order(0), self.config.batch_size
        for _ in range(4):  # compiled code is captured after some calls
            for indices in {
                len(part): part for part in (order[:size], order[len(order) // size * size :]) if len(part)
            }.values():
                self.model.train()
                self.batch(indices)
            self.accuracy()
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(state)
        self.wait()

    def order(self, epoch: int) -> Any:
        """The permutation of `epoch`, where the images are."""
        return self.torch.tensor(
            sampler.permutation(self.config.seed, epoch, len(self.images)), device=self.device
        )

    def wait(self) -> None:
        """Until all work queued is done."""
        if self.gpu:
            self.torch.cuda.synchronize()

    def peak_bytes(self) -> int:
        """Most memory held so far: of the GPU by PyTorch, else of the process."""
        return int(self.torch.cuda.max_memory_reserved()) if self.gpu else peak_bytes()

    def accuracy(self) -> float:
        """Test accuracy in percent."""
        return float(100 * (self.logits().argmax(1) == self.wanted).double().mean())

    def logits(self) -> Any:
        """Of all test images."""
        self.model.eval()
        logits = []
        with self.torch.no_grad(), self.precision():
            for part in self.test.split(1000 if self.gpu else 500):
                self.mark_step()
                logits.append(self.model(self.scaled(part)).clone())
        return self.torch.cat(logits)

    def mark_step(self) -> None:
        """Tell compiled code that what it returned before is done with."""
        if self.gpu:
            self.torch.compiler.cudagraph_mark_step_begin()


def serve_steps(side: TorchSide, steps: int, evaluate: bool) -> None:
    """Train (or evaluate) `steps` batches for every line on stdin."""
    size = side.config.batch_size
    batches = side.order(0)[: len(side.images) // size * size].split(size)  # whole batches only
    side.model.train(not evaluate)
    side.torch.set_grad_enabled(not evaluate)
    for line in sys.stdin:
        side.wait()
        begin = time.perf_counter()
        for step in range(0 if line.strip() == "ready" else steps):
            side.batch(batches[step % len(batches)], not evaluate)
        side.wait()
        seconds = time.perf_counter() - begin
        print(json.dumps({"seconds": seconds, "peak_bytes": side.peak_bytes()}), flush=True)


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


if __name__ == "__main__":
    what, job = sys.argv[1], json.loads(sys.argv[2])
    side = TorchSide(Config(**job.pop("config")), job.pop("kind"), job.pop("threads"))
    if what == "step":
        serve_steps(side, **job)
    else:
        print(json.dumps(train(side)))
