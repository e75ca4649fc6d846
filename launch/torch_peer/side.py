"""Training in PyTorch: the network, the optimizer and the step that benchmarks and whole runs share."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from distrib import models
from distrib.config import Config
from distrib.data import formats, sampler
from distrib.run.model_spec import describe_model, network_arguments
from launch.bench.measure import peak_bytes
from launch.torch_peer.network import TorchNetwork


class TorchSide:
    """Model, optimizer and data of a configuration, and its training step; on the GPU with --backend cupy."""

    def __init__(self, config: Config, kind: str, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(config.seed)
        mode, _, layout = kind.rpartition(" ")
        self.torch, self.config, self.gpu = torch, config, config.backend == "cupy"
        self.device = torch.device("cuda" if self.gpu else "cpu")
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = config.precision == "tf32"
        self.layout = torch.channels_last if layout == "channels-last" else torch.contiguous_format
        self.data = data = formats.load(config.data, config.limit_train, config.limit_test, config.reading)
        function = models.find(config.model)
        *given, options = network_arguments(describe_model(config, data), function)
        model = TorchNetwork(*given, **options)
        model = model.to(self.device, memory_format=self.layout)
        self.model: Any = model
        if mode == "compile":  # forward and backward as CUDA graphs
            self.model = torch.compile(model, mode="reduce-overhead", dynamic=False)
        self.images, self.test = (
            torch.tensor(np.ascontiguousarray(a.transpose(0, 3, 1, 2)), device=self.device)
            for a in (data.train_images, data.test_images)
        )
        self.labels, self.wanted = (
            torch.tensor(a, device=self.device).long() for a in (data.train_labels, data.test_labels)
        )
        self.optimizer: Any = self.make_optimizer(model.parameters())

    def make_optimizer(self, parameters: Any) -> Any:
        """Ours, as PyTorch has it: one of `worker.OPTIMIZERS`."""
        config, optim = self.config, self.torch.optim
        more: dict[str, Any] = {"weight_decay": config.weight_decay} | ({"fused": True} if self.gpu else {})
        if config.optimizer == "adam":
            return optim.AdamW(parameters, config.lr, **more)
        assert config.optimizer == "sgd"
        return optim.SGD(parameters, config.lr, config.momentum, nesterov=config.nesterov, **more)

    def scaled(self, images: Any) -> Any:
        """Images (uint8) as the network's input, scaled to [0, 1]."""
        return (images.to(self.torch.float32) / 255).contiguous(memory_format=self.layout)

    def precision(self) -> Any:
        """Context of the forward pass: autocast in bf16."""
        if self.config.precision == "bf16":
            return self.torch.autocast(self.device.type, dtype=self.torch.bfloat16)
        return contextlib.nullcontext()

    def batch(self, indices: Any, train: bool = True) -> tuple[Any, Any]:
        """One step on these training images, or with `train` false their loss alone; (loss, logits).

        A GPU is not waited for.
        """
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
        """(indices, loss, logits, learning rate) of each step of an epoch (from 0) but the first `done`."""
        per_epoch = sampler.steps_per_epoch(len(self.images), self.config.batch_size)
        self.model.train()
        for step, indices in enumerate(self.order(number).split(self.config.batch_size)[done:], done):
            lr = self.config.rate(number * per_epoch + step, per_epoch)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            yield indices, *self.batch(indices), lr

    def warm_up(self) -> None:
        """Compile, choose algorithms and capture, as our side does; then put all back."""
        weights, state = copy.deepcopy(self.model.state_dict()), copy.deepcopy(self.optimizer.state_dict())
        order, size = self.order(0), self.config.batch_size
        whole, rest = order[:size], order[len(order) // size * size :]
        for _ in range(4):  # compiled code is captured after some calls
            self.model.train()
            for indices in (whole, rest) if 0 < len(rest) != len(whole) else (whole,):
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
