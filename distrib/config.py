"""The configuration of a run: one frozen dataclass, validated once, printed whole, stored with the run.

Its fields are the options of `python -m distrib.train`: name, type, default and help are defined here only.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from distrib.data.dataset import Dataset
from distrib.errors import UserError
from distrib.files import expanded, fits, shown
from nn.ops.loss import LOSSES
from nn.optim import OPTIMIZERS, SCHEDULES, learning_rate
from nn.resnet9 import VARIANTS

CHOICES = {
    "optimizer": tuple(OPTIMIZERS),
    "schedule": tuple(SCHEDULES),
    "loss": tuple(LOSSES),
    "variant": tuple(VARIANTS),
    "batch_norm": ("sync", "local"),
    "precision": ("float32", "float64", "tf32", "bf16"),
    "backend": ("auto", "numpy", "cupy"),
    "gradients": ("float32", "bf16"),
    "comm": ("auto", "none", "mpi", "nccl"),
}

RECIPES: dict[str, dict[str, Any]] = {
    "demo": {
        "epochs": 1,
        "limit_train": 26_112,  # whole batches: a small last one costs 0.1 % accuracy
        "batch_size": 64,
        "optimizer": "sgd",
        "lr": 0.1,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 5e-3,
        "label_smoothing": 0.1,
        "schedule": "onecycle",
        "width": 0.125,
        "shift": 1.0,
        "log_every": 20,
    },
    "fast99": {
        "epochs": 1,
        "limit_train": 30000,
        "batch_size": 128,
        "optimizer": "sgd",
        "lr": 0.2,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 5e-3,
        "label_smoothing": 0.1,
        "schedule": "onecycle",
        "width": 0.25,
    },
    "best": {
        "epochs": 20,
        "batch_size": 128,
        "optimizer": "sgd",
        "lr": 0.2,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 5e-4,
        "label_smoothing": 0.1,
        "schedule": "onecycle",
        "variant": "avgpool",
        "width": 0.5,
        "shift": 2.0,
        "rotate": 10.0,
        "average": 0.998,
    },
    "reference": {"epochs": 8, "batch_size": 8, "lr": 1e-3, "optimizer": "adam"},
    "reference-sgd": {"epochs": 8, "batch_size": 8, "lr": 1e-3, "optimizer": "sgd"},
}

DROPPED_OPTIONS = (
    ("optimizer", "sgd", ("momentum", "nesterov", "lr", "weight_decay")),
    ("loss", "ce", ("label_smoothing",)),
)
"""Recipe options to drop when the user picks another optimizer or loss."""

MAY_CHANGE = (
    "backend",
    "comm",
    "max_steps",
    "log_every",
    "checkpoint_every",
    "keep",
    "check_every",
    "run_dir",
    "resume",
    "recipe",
    "timeout",
    "data",
    "cuda_graph",
    "batch_size_per_rank",
)
"""Fields that do not affect the result, so you may change them when you resume."""


class Cap(int):
    """A recipe's limit, which may exceed the number of images in the data."""


def option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """Everything a run depends on, as the user gave it. `resolve` completes it."""

    epochs: int = option(8, "Passes over the training set.")
    batch_size: int = option(8, "Global batch: the images of one step, split over the ranks.")
    batch_size_per_rank: int | None = option(
        None, "Images of one step on each rank, instead of --batch-size."
    )
    optimizer: str = option("adam", "adam or sgd.")
    lr: float = option(1e-3, "Learning rate; with onecycle its peak.")
    momentum: float = option(0.0, "Momentum of SGD.")
    nesterov: bool = option(False, "Nesterov momentum (needs --momentum).")
    weight_decay: float = option(0.0, "Added to the gradient with SGD, decoupled with Adam.")
    schedule: str = option("constant", "constant, cosine or onecycle.")
    warmup_epochs: float = option(0.0, "Epochs of linear warm-up of constant and cosine.")
    loss: str = option("ce", "ce (softmax cross-entropy) or bce (sigmoid, binary cross-entropy).")
    label_smoothing: float = option(0.0, "Share of the target to spread over all classes (ce only).")
    shift: float = option(
        0.0, "Shift each training image randomly by up to this many pixels, anew in each epoch."
    )
    rotate: float = option(
        0.0, "Rotate each training image randomly by up to this many degrees, anew in each epoch."
    )
    average: float = option(
        0.0,
        "Decay of a moving average of the weights, which is then evaluated and saved; 0: no average.",
    )
    variant: str = option("baseline", "baseline, avgpool, conv-shortcut or three-blocks.")
    width: float = option(1.0, "Multiplier of all channel counts.")
    batch_norm: str = option("sync", "Statistics of the global batch (sync) or of each rank's part (local).")
    precision: str = option("float32", "float32, float64, and on a GPU tf32 or bf16.")
    backend: str = option("auto", "numpy, cupy, or auto: cupy if every rank has a GPU.")
    comm: str = option("auto", "none, mpi, nccl, or auto: nccl on GPUs, mpi on hosts, none for one process.")
    data: str | None = option(
        None,
        "A folder of IDX, CIFAR or picture files, an .npz file, or synthetic:NxHxWxC:K; without it, MNIST.",
    )
    limit_train: int | None = option(None, "Use only the first N training images.")
    limit_test: int | None = option(None, "Use only the first N test images.")
    seed: int = option(0, "Seed of weights and data order.")
    run_dir: str | None = option(None, "The run's folder; without it, runs/TIME-NAME.")
    log_every: int = option(50, "Steps between lines of metrics.jsonl.")
    checkpoint_every: int = option(1000, "Steps between checkpoints; each epoch ends with one, too.")
    keep: int = option(3, "Checkpoints to keep.")
    check_every: int = option(
        500, "Steps between comparisons of the ranks' parameters, also made at checkpoints; 0: never."
    )
    resume: str = option("auto", "auto (resume if the folder holds a run), none, or a checkpoint.")
    max_steps: int | None = option(None, "Stop after this global step, with a checkpoint.")
    recipe: str | None = option(
        None, "A named set of options: demo, fast99, best, reference or reference-sgd; options you give win."
    )
    gradients: str = option(
        "float32",
        "Type in which gradients travel between GPUs over NCCL: float32 (with float64, float64) or bf16;"
        " one rank sends none.",
    )
    cuda_graph: bool = option(True, "On a GPU, replay a whole step as one CUDA graph.")
    timeout: float = option(60.0, "Seconds after which a wait for another rank ends the job.")

    def __post_init__(self) -> None:
        for name in ("run_dir", "data", "resume"):
            given = getattr(self, name)
            if given is not None and not (name == "resume" and given in ("auto", "none")):
                path = expanded(given, f"--{name.replace('_', '-')}")
                object.__setattr__(self, name, str(path) if given.startswith("~") else given)
        for name, choices in CHOICES.items():
            self._require(name, getattr(self, name) in choices, f"choose one of {', '.join(choices)}")
        for name in (
            "epochs",
            "batch_size",
            "batch_size_per_rank",
            "limit_train",
            "limit_test",
            "log_every",
            "checkpoint_every",
            "keep",
            "max_steps",
        ):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "give 1 or more")
        for name in ("lr", "width", "timeout"):
            value = getattr(self, name)
            self._require(name, math.isfinite(value) and value > 0, "give a finite number above 0")
        for name in (
            "momentum",
            "weight_decay",
            "warmup_epochs",
            "label_smoothing",
            "seed",
            "check_every",
            "shift",
            "rotate",
            "average",
        ):
            value = getattr(self, name)
            self._require(name, math.isfinite(value) and value >= 0, "give a finite number, 0 or more")
        for name in ("momentum", "label_smoothing", "average"):
            self._require(name, getattr(self, name) < 1, "give less than 1")
        self._require("rotate", self.rotate <= 180, "give 180 or less")
        for name in sorted({name for optimizer in OPTIMIZERS.values() for name in optimizer.options}):
            owners = [key for key, optimizer in OPTIMIZERS.items() if name in optimizer.options]
            is_own = not getattr(self, name) or self.optimizer in owners
            self._require(name, is_own, f"is of --optimizer {' or '.join(owners)} only")
        self._require("nesterov", not self.nesterov or self.momentum > 0, "needs --momentum above 0")
        self._require(
            "label_smoothing", not self.label_smoothing or self.loss == "ce", "is of --loss ce only"
        )
        self._require(
            "gradients",
            self.gradients == "float32" or self.precision != "float64",
            "is not for --precision float64",
        )
        self._require("width", self.width <= 64, "give 64 or less")
        self._require(
            "warmup_epochs",
            not self.warmup_epochs or self.schedule != "onecycle",
            "onecycle warms up by itself: leave it out",
        )
        self._require(
            "warmup_epochs", self.warmup_epochs <= self.epochs, f"is longer than --epochs {self.epochs}"
        )

    def _require(self, name: str, holds: bool, remedy: str) -> None:
        if not holds:
            raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: {remedy}")

    @property
    def dtype(self) -> str:
        """dtype of parameters and activations."""
        return "float64" if self.precision == "float64" else "float32"

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of `step` (from 0, over all epochs)."""
        warmup = round(self.warmup_epochs * steps_per_epoch)
        return learning_rate(self.schedule, self.lr, step, steps_per_epoch * self.epochs, warmup)

    def resolve(self, size: int, data: Dataset, stored: dict[str, Any] | None = None) -> Config:
        """Set the global batch for `size` ranks and limits within the data; UserError if they do not fit.

        A batch per rank becomes a global batch once: a resumed run keeps the `stored` one.
        """
        config, fewer = self, dict[str, Any]()
        side = min(data.shape[:2])
        self._require("shift", self.shift < side, f"give less than the {side} pixels of an image")
        for name, have in (("limit_train", len(data.train_images)), ("limit_test", len(data.test_images))):
            limit = getattr(self, name)
            if isinstance(limit, Cap):
                fewer[name] = Cap(min(limit, have))
            else:
                self._require(name, limit is None or limit <= have, f"the data has only {have} images")
        config = replace(config, **fewer)
        if self.batch_size_per_rank is not None:
            same = stored is not None and stored.get("batch_size_per_rank") == self.batch_size_per_rank
            held = stored.get("batch_size") if stored and same else None
            batch = held or self.batch_size_per_rank * size
            config = replace(config, batch_size=batch)
        config._require(
            "batch_size",
            config.batch_size >= size,
            f"is below the number of ranks, {size}: give {size} or more, or start fewer ranks",
        )
        return config

    def differences(self, stored: dict[str, Any]) -> list[str]:
        """Options that would change the result of the stored run, as "--lr 0.1 (the run has 0.001)"."""
        found = []
        for name, value in asdict(self).items():
            free = name in MAY_CHANGE or (name == "epochs" and self.schedule == "constant")
            # an option that an older version lacked has its default
            held = stored.get(name, getattr(Config(), name))
            if not free and held != value:
                found.append(f"--{name.replace('_', '-')} {value} (the run has {shown(held)})")
        return found


def require_types(stored: dict[str, Any], where: object) -> None:
    """UserError if a stored configuration has a value of the wrong type."""
    for each in fields(Config):
        if each.name in stored and not fits(str(each.type), stored[each.name]):
            raise UserError(
                f"{where}: has {each.name} {shown(stored[each.name])}, not {each.type}: restore the file"
            )


def build(given: dict[str, Any]) -> Config:
    """The configuration for the options that were given. A recipe sets those that were not."""
    given = {name: value for name, value in given.items() if value is not None}
    recipe = given.get("recipe")
    if recipe is not None and recipe not in RECIPES:
        raise UserError(f"--recipe {recipe}: choose one of {', '.join(RECIPES)}")
    whole = {
        name: Cap(value) if name.startswith("limit_") else value
        for name, value in RECIPES.get(recipe or "", {}).items()
    }
    filled = {name: value for name, value in whole.items() if name not in given}
    for owner, value, names in DROPPED_OPTIONS:  # --optimizer adam drops SGD's options of a recipe
        if whole.get(owner, value) == value != given.get(owner, value):
            filled = {name: held for name, held in filled.items() if name not in names}
    if given.get("momentum") == 0:
        filled.pop("nesterov", None)
    merged = {**filled, **given}
    if "batch_size" in given and "batch_size_per_rank" in given:
        raise UserError(
            f"--batch-size-per-rank {given['batch_size_per_rank']}: give it or --batch-size, not both"
        )
    return Config(**merged)


def options() -> list[tuple[str, Any, Any, str]]:
    """(name, type, default, help) of every option, in order."""
    return [(f.name, f.type, f.default, f.metadata["help"]) for f in fields(Config)]
