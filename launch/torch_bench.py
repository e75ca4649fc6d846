"""PyTorch's side of the benchmarks, in a process of its own: `python -m launch.torch_bench step|train '{…}'`.

A process of its own has its own threads and its own peak memory. `step` prints a line of JSON for every line
it reads, so that both sides take turns; `train` trains a whole recipe and prints one line at its end.
PyTorch is optional.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from typing import Any

from distrib import THREAD_VARIABLES
from launch.measure import peak_bytes

LAYOUTS = ("channels-last", "contiguous")


class Worker:
    """The other end: a child process that trains steps in PyTorch on request; calling it makes one measurement."""

    def __init__(self, threads: int, **job: Any) -> None:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "PRTE_"))}
        env |= {name: str(threads) for name in THREAD_VARIABLES}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "launch.torch_bench", "step", json.dumps({**job, "threads": threads})],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True,
        )  # fmt: skip
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


def setup(job: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """(model, images, labels, memory format) as the job describes them."""
    import torch

    from distrib import mnist
    from launch.torch_resnet9 import TorchResNet9

    torch.set_num_threads(job["threads"])
    torch.manual_seed(job.get("seed", 0))
    layout = torch.channels_last if job["layout"] == "channels-last" else torch.contiguous_format
    model = TorchResNet9(job["variant"], job["width"]).to(memory_format=layout)
    data = mnist.load(job.get("data"), job.get("limit_train"), job.get("limit_test"))
    images = [torch.tensor(a[:, None]) for a in (data.train_images, data.test_images)]
    labels = [torch.tensor(a).long() for a in (data.train_labels, data.test_labels)]
    return model, images, labels, layout


def optimizer_of(model: Any, job: dict[str, Any]) -> Any:
    import torch

    decay, parameters = job.get("weight_decay", 0.0), model.parameters()
    if job["optimizer"] == "adam":
        return torch.optim.AdamW(parameters, job["lr"], weight_decay=decay)
    momentum = job.get("momentum", 0.0)
    return torch.optim.SGD(parameters, job["lr"], momentum, weight_decay=decay, nesterov=job.get("nesterov", False))


def serve_steps(job: dict[str, Any]) -> None:
    """Train (or evaluate) `steps` batches for every line on stdin."""
    import torch

    from distrib import sampler

    model, (images, _), (labels, _), layout = setup(job)
    optimizer, batch = optimizer_of(model, job), job["batch_size"]
    order = sampler.permutation(0, 0, len(images))
    model.train(not job["evaluate"])
    torch.set_grad_enabled(not job["evaluate"])
    for line in sys.stdin:
        begin = time.perf_counter()
        for step in range(0 if line.strip() == "ready" else job["steps"]):
            start = step % (len(order) // batch) * batch
            indices = torch.tensor(order[start : start + batch])
            x = (images[indices].to(torch.float32) / 255).contiguous(memory_format=layout)
            loss = torch.nn.functional.cross_entropy(model(x), labels[indices])
            if not job["evaluate"]:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            loss.item()
        seconds = time.perf_counter() - begin
        print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes()}), flush=True)


def train(job: dict[str, Any]) -> dict[str, float]:
    """A whole run of a configuration: seconds from the first step to the end of the last evaluation, accuracy."""
    import torch

    from distrib import sampler
    from nn.optim import learning_rate

    model, (images, test), (labels, wanted), layout = setup(job)
    optimizer, batch, count = optimizer_of(model, job), job["batch_size"], len(images)
    per_epoch = sampler.steps_per_epoch(count, batch)
    begin = time.perf_counter()
    for epoch in range(job["epochs"]):
        model.train()
        order = torch.tensor(sampler.permutation(job["seed"], epoch, count))
        for step in range(per_epoch):
            at, warmup = epoch * per_epoch + step, round(job["warmup_epochs"] * per_epoch)
            rate = learning_rate(job["schedule"], job["lr"], at, per_epoch * job["epochs"], warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            indices = order[step * batch : (step + 1) * batch]
            x = (images[indices].to(torch.float32) / 255).contiguous(memory_format=layout)
            loss = torch.nn.functional.cross_entropy(model(x), labels[indices], label_smoothing=job["label_smoothing"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
        model.eval()
        with torch.no_grad():
            logits = [model((part.to(torch.float32) / 255).contiguous(memory_format=layout)) for part in test.split(500)]
        accuracy = 100 * (torch.cat(logits).argmax(1) == wanted).double().mean().item()
    return {"wall_seconds": time.perf_counter() - begin, "test_accuracy": accuracy, "test_images": len(test)}


if __name__ == "__main__":
    what, job = sys.argv[1], json.loads(sys.argv[2])
    if what == "step":
        serve_steps(job)
    else:
        print(json.dumps(train(job)))
