"""The network and its training against PyTorch, from the same weights on the same images."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from needs import require
from networks import resnet9

from nn.layer import StepContext
from nn.ops.loss import LOSSES
from nn.optim import SGD, Adam, Optimizer
from nn.resnet9 import VARIANTS

WIDTH, BATCH, STEPS = 0.0625, 5, 10
LR = {"float64": 1e-2, "float32": 1e-3}

# Relative to the largest absolute value of each tensor. Float64: the two sum in other orders.
# Float32: Winograd's transforms make a rounding of 6e-8 up to 7e-6 a layer at full width
# (test_conv.py),
# less at this one, and a gradient has passed 16 to 24 such layers, each divided by a standard deviation.
BOUND = {"float64": 1e-9, "float32": 1e-4}

# After ten steps in float32. SGD adds lr times such a gradient's error to a parameter and 0.5e-7 for its own
# rounding. Adam divides each element by its own size: where that is near the error of its tensor's gradient,
# a tenth of the step of lr = 1e-3 is undetermined, ten times, relative to weights of at most 0.1 to 0.3.
AFTER_STEPS = {"SGD": 1e-5, "Adam": 1e-3, "AdamW": 1e-3}

NESTEROV = {"weight_decay": 0.01, "momentum": 0.9, "nesterov": True}
OPTIMIZERS: dict[str, tuple[type[Optimizer], str, dict[str, Any]]] = {  # ours, PyTorch's, options of both
    "sgd": (SGD, "SGD", {}),
    "momentum": (SGD, "SGD", {"momentum": 0.9}),
    "nesterov": (SGD, "SGD", NESTEROV),
    "adam": (Adam, "Adam", {}),
    "decoupled": (Adam, "AdamW", {"weight_decay": 0.1}),
}

each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_loss = pytest.mark.parametrize("loss", LOSSES)
each_dtype = pytest.mark.parametrize("dtype", BOUND)
each_seed = pytest.mark.parametrize("seed", [11, 12])
each_pair = pytest.mark.parametrize(  # any two of the three are met together
    ("variant", "optimizer", "loss"),
    [
        (variant, optimizer, list(LOSSES)[(i + j) % len(LOSSES)])
        for i, variant in enumerate(VARIANTS)
        for j, optimizer in enumerate(OPTIMIZERS)
    ],
)


def import_torch() -> ModuleType:
    """PyTorch; where it is missing the test is not run, as needs.py says."""
    require("torch")
    import torch

    return torch


def difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> tuple[float, str]:
    """The largest error of any tensor, relative to the largest absolute value of theirs, and its name."""
    assert ours.keys() == theirs.keys()
    errors = []
    for name, value in theirs.items():
        assert ours[name].shape == value.shape, name
        errors.append((float(np.abs(ours[name] - value).max() / np.abs(value).max()), name))
    assert all(np.isfinite(error) for error, _ in errors), errors
    return max(errors)


class Pair:
    """Our network and PyTorch's with the same random weights and running statistics, and a stream of
    batches."""

    def __init__(self, variant: str, loss: str, dtype: str, seed: int, optimizer: str = "sgd") -> None:
        torch = self.torch = import_torch()
        from launch.torch_peer.network import TorchResNet9

        self.rng, self.loss, self.dtype = np.random.default_rng(seed), loss, dtype
        self.ours = resnet9(variant, WIDTH, seed=seed, dtype=dtype)
        self.theirs = TorchResNet9(variant, WIDTH).to(getattr(torch, dtype))
        state = self.ours.state_dict()
        for name, value in state.items():  # start from no special values of γ, β and the running statistics
            if value.ndim == 1:
                state[name] = value + self.rng.uniform(-0.2, 0.2, value.shape).astype(dtype)
        self.ours.load_state_dict(state)
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in self.ours.state_dict().items()}
        self.theirs.load_state_dict(tensors, strict=True)
        own, self.kind, options = OPTIMIZERS[optimizer]
        self.own_optimizer = own(self.ours.params, **options)
        self.optimizer = getattr(torch.optim, self.kind)(self.theirs.parameters(), LR[dtype], **options)

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        """Images with values in [0, 1] as our network takes them, and labels."""
        x = self.ours.buffers.image("input", (BATCH, 28, 28, 1))
        x[...] = self.rng.random(x.shape)
        return x, self.rng.integers(0, 10, BATCH)

    def their_logits(self, x: np.ndarray) -> Any:
        return self.theirs(self.torch.from_numpy(np.array(x.transpose(0, 3, 1, 2), order="C")))

    def their_loss(self, logits: Any, labels: np.ndarray) -> Any:
        f, target = self.torch.nn.functional, self.torch.from_numpy(labels)
        if self.loss == "ce":
            return f.cross_entropy(logits, target)
        return f.binary_cross_entropy_with_logits(logits, f.one_hot(target, 10).to(logits.dtype))

    def step(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """One step of each; returns loss, logits and all gradients of each."""
        (x, labels), this = self.batch(), StepContext(True, BATCH)
        logits = self.ours.forward(x, this)
        loss, dlogits = LOSSES[self.loss](logits, labels, BATCH)
        self.ours.backward(dlogits, this)
        self.own_optimizer.step(LR[self.dtype])
        ours = self.ours.params.to_checkpoint(self.ours.params.grads)
        ours |= {"loss": np.array(loss), "logits": logits}

        self.optimizer.zero_grad()
        their_logits = self.their_logits(x)
        their_loss = self.their_loss(their_logits, labels)
        their_loss.backward()
        for group in self.optimizer.param_groups:
            if self.kind.startswith("Adam"):  # makes their ε, added to √v̂, our ε̂, added to √v
                group["eps"] = 1e-7 / (1 - 0.999**self.own_optimizer.steps) ** 0.5
        self.optimizer.step()
        theirs = {name: p.grad.numpy() for name, p in self.theirs.named_parameters()}
        return ours, theirs | {"loss": their_loss.detach().numpy(), "logits": their_logits.detach().numpy()}

    def their_state(self) -> dict[str, np.ndarray]:
        return {name: tensor.numpy() for name, tensor in self.theirs.state_dict().items()}


@each_seed
@each_dtype
@each_loss
@each_variant
def test_one_step(variant: str, loss: str, dtype: str, seed: int) -> None:
    """Logits, loss, every gradient; then parameters and running statistics."""
    pair = Pair(variant, loss, dtype, seed)
    ours, theirs = pair.step()
    assert difference(ours, theirs) <= (BOUND[dtype],)
    assert difference(pair.ours.state_dict(), pair.their_state()) <= (BOUND[dtype],)


@each_pair
def test_ten_steps(variant: str, loss: str, optimizer: str) -> None:
    pair = Pair(variant, loss, "float64", 13, optimizer)
    for _ in range(STEPS):
        pair.step()
    assert difference(pair.ours.state_dict(), pair.their_state()) <= (BOUND["float64"],)


@each_pair
def test_ten_steps_in_float32(variant: str, loss: str, optimizer: str) -> None:
    """Within the bound from one of six seeds.

    Of some 50,000 activations a step, one in five runs has one so near zero, or a window's two largest so
    near each other, that rounding decides where its gradient goes; then the two differ by 1e-4 to 1e-1.
    An error in the arithmetic would show from every seed.
    """
    found = []
    for seed in range(14, 20):
        pair = Pair(variant, loss, "float32", seed, optimizer)
        for _ in range(STEPS):
            pair.step()
        found.append(difference(pair.ours.state_dict(), pair.their_state()))
        if found[-1] <= (AFTER_STEPS[pair.kind],):
            return
    raise AssertionError(found)


@each_seed
@each_variant
def test_their_weights_in_evaluation(variant: str, seed: int) -> None:
    """Weights drawn by PyTorch and running statistics collected there give the same logits here."""
    pair = Pair(variant, "ce", "float64", seed)
    pair.torch.manual_seed(seed)
    for parameter in pair.theirs.parameters():
        pair.torch.nn.init.normal_(parameter, 0.1, 0.3)
    for _ in range(2):
        pair.their_logits(pair.batch()[0])
    pair.ours.load_state_dict(pair.their_state())
    assert difference(pair.ours.state_dict(), pair.their_state())[0] == 0
    x = pair.batch()[0]
    pair.theirs.eval()
    theirs = {"logits": pair.their_logits(x).detach().numpy()}
    assert difference({"logits": pair.ours.forward(x, StepContext(False))}, theirs) <= (1e-12,)


@pytest.mark.parametrize("train", [True, False])
def test_images_in_plain_order(train: bool) -> None:
    """The memory order of the images, NumPy's own or the backend's, makes no difference to the logits."""
    pair = Pair("baseline", "ce", "float64", 17)
    x, _ = pair.batch()
    pair.theirs.train(train)
    theirs = {"logits": pair.their_logits(x).detach().numpy()}
    ours = {"logits": pair.ours.forward(np.ascontiguousarray(x), StepContext(train, BATCH))}
    assert difference(ours, theirs) <= (1e-12,)


def test_state_dict_is_a_copy() -> None:
    """Training goes on without changing a state that was taken before."""
    pair = Pair("baseline", "ce", "float64", 18)
    state = pair.ours.state_dict()
    before = {name: value.copy() for name, value in state.items()}
    pair.step()
    assert [name for name, value in state.items() if not np.array_equal(value, before[name])] == []
