"""The configuration of a run: one frozen dataclass, validated once, printed whole, stored with the run.

Its fields are the options of `python -m distrib.train`: name, type, default and help are defined here only.
"""

from __future__ import annotations

from dataclasses import Field, asdict, dataclass, fields, replace
from typing import Any

from distrib import models
from distrib.data.dataset import Dataset, Reading
from distrib.data.sampler import Augmentation
from distrib.errors import EXIT_REQUEUE, UserError
from distrib.files import expanded, fits, shown
from distrib.options import (
    ABOVE_ZERO,
    BELOW_ONE,
    LARGEST_BATCH,
    LARGEST_SEED,
    ONE_OR_MORE,
    ZERO_OR_MORE,
    Cap,
    at_most,
    option,
    owners,
)
from distrib.recipes import DROPPED_OPTIONS, RECIPES
from distrib.together import check_together
from nn.ops.loss import LOSSES
from nn.optim import OPTIMIZERS, SCHEDULES, learning_rate
from nn.resnet9 import VARIANTS

CHECKPOINT_STEPS, CHECKPOINT_SECONDS = 1000, 30
"""Without --checkpoint-every, a run saves at the multiples of the first.

A GPU does so many steps in less than a second: it leaves out those that come sooner than the second after the
last save.
"""


@dataclass(frozen=True)
class Config:
    """Everything a run depends on, as the user gave it. `resolve` completes it."""

    epochs: int = option(8, "Passes over the training set.", ONE_OR_MORE)
    batch_size: int = option(
        8, "Global batch: the images of one step, split over the ranks.", ONE_OR_MORE, at_most(LARGEST_BATCH)
    )
    batch_size_per_rank: int | None = option(
        None,
        "Images of one step on each rank, instead of --batch-size.",
        ONE_OR_MORE,
        at_most(LARGEST_BATCH),
        may_change=True,
    )
    optimizer: str = option("adam", "{}.", choices=OPTIMIZERS)
    lr: float = option(1e-3, "Learning rate; with onecycle its peak.", ABOVE_ZERO)
    momentum: float = option(0.0, f"Momentum (of {owners('momentum')}).", ZERO_OR_MORE, BELOW_ONE)
    nesterov: bool = option(False, f"Nesterov momentum (of {owners('nesterov')}; needs --momentum).")
    weight_decay: float = option(0.0, "Added to the gradient with SGD, decoupled with Adam.", ZERO_OR_MORE)
    schedule: str = option("constant", "{}.", choices=SCHEDULES)
    warmup_epochs: float = option(0.0, "Epochs of linear warm-up of constant and cosine.", ZERO_OR_MORE)
    loss: str = option(
        "ce", "ce (softmax cross-entropy) or bce (sigmoid, binary cross-entropy).", choices=LOSSES
    )
    label_smoothing: float = option(
        0.0, "Share of the target to spread over all classes (ce only).", ZERO_OR_MORE, BELOW_ONE
    )
    shift: float = option(
        0.0,
        "Shift each training image randomly by up to this many pixels, anew in each epoch.",
        ZERO_OR_MORE,
    )
    rotate: float = option(
        0.0,
        "Rotate each training image randomly by up to this many degrees, anew in each epoch.",
        ZERO_OR_MORE,
        at_most(180),
    )
    flip: bool = option(False, "Mirror half of the training images, left to right, anew in each epoch.")
    crop: int = option(
        0,
        "Move each training image randomly by up to this many whole pixels: pad, and cut to size.",
        ZERO_OR_MORE,
    )
    cutout: int = option(
        0, "Blank a square of this many pixels anywhere in each training image.", ZERO_OR_MORE
    )
    average: float = option(
        0.0,
        "Decay of a moving average of the weights, which is then evaluated and saved; 0: no average.",
        ZERO_OR_MORE,
        BELOW_ONE,
    )
    model: str = option(
        "resnet9", f"{', '.join(models.MODELS)}, or {models.FORM}: a function of your own, which is run."
    )
    variant: str = option("baseline", "Of resnet9: {}.", choices=VARIANTS)
    width: float = option(1.0, "Multiplier of all channel counts.", ABOVE_ZERO, at_most(64))
    batch_norm: str = option(
        "sync",
        "Statistics of the global batch (sync), of each rank's part (local), or of each virtual shard (shard,"
        " needs --reproducible).",
        choices=("sync", "local", "shard"),
    )
    reproducible: bool = option(
        False, "Give the same bits on any number of ranks: compute the global batch in virtual shards."
    )
    shards: int | None = option(
        None,
        "Virtual shards of the global batch (needs --reproducible). Default: 8, at most the batch.",
        ONE_OR_MORE,
    )
    shards_at_once: int | None = option(
        None,
        "Shards that a rank keeps in memory at once (needs --batch-norm shard). Default: as many as it has"
        " threads.",
        ONE_OR_MORE,
        may_change=True,
    )
    precision: str = option(
        "float32",
        "float32, float64, and on a GPU tf32 or bf16.",
        choices=("float32", "float64", "tf32", "bf16"),
    )
    backend: str = option(
        "auto",
        "numpy, cupy, or auto: cupy if every rank has a GPU.",
        choices=("auto", "numpy", "cupy"),
        may_change=True,
    )
    comm: str = option(
        "auto",
        "none, mpi, nccl, or auto: nccl on GPUs, mpi on hosts, none for one process.",
        choices=("auto", "none", "mpi", "nccl"),
        may_change=True,
    )
    data: str | None = option(
        None,
        "A folder of IDX, CIFAR or picture files, an .npz file, or synthetic:NxHxWxC:K; without it, MNIST.",
        may_change=True,
    )
    split: str | None = option(None, "Which of several IDX data sets in a folder: letters, balanced, …")
    size: str | None = option(
        None, "Scale pictures to this many pixels, as 32 or 32x48 (height, width), and cut off what juts out."
    )
    grey: bool = option(False, "Take pictures without their colours.")
    limit_train: int | None = option(None, "Use only the first N training images.", ONE_OR_MORE)
    limit_test: int | None = option(None, "Use only the first N test images.", ONE_OR_MORE)
    validation: float = option(
        0.0,
        "Share of the training images, of each class alike, to hold back: epochs report on these, and the"
        " test set is used once, at the end.",
        ZERO_OR_MORE,
        BELOW_ONE,
    )
    keep_best: bool = option(False, "End with the model of the best epoch (needs --validation).")
    patience: int | None = option(
        None, "End after so many epochs without a better one (needs --validation).", ONE_OR_MORE
    )
    seed: int = option(0, "Seed of weights and data order.", ZERO_OR_MORE, at_most(LARGEST_SEED))
    run_dir: str | None = option(None, "The run's folder; without it, runs/TIME-NAME.", may_change=True)
    log_every: int = option(50, "Steps between lines of metrics.jsonl.", ONE_OR_MORE, may_change=True)
    checkpoint_every: int | None = option(
        None,
        f"Steps between checkpoints; each epoch ends with one, too. Default: {CHECKPOINT_STEPS}; on a GPU"
        f" only those of them {CHECKPOINT_SECONDS} s after the last.",
        ONE_OR_MORE,
        may_change=True,
    )
    keep: int = option(3, "Checkpoints to keep.", ONE_OR_MORE, may_change=True)
    check_every: int = option(
        500,
        "Steps between comparisons of the ranks' parameters, also made at checkpoints; 0: never.",
        ZERO_OR_MORE,
        may_change=True,
    )
    resume: str = option(
        "auto", "auto (resume if the folder holds a run), none, or a checkpoint.", may_change=True
    )
    max_steps: int | None = option(
        None, "Stop after this global step, with a checkpoint.", ONE_OR_MORE, may_change=True
    )
    recipe: str | None = option(
        None, f"A named set of options: {', '.join(RECIPES)}; options you give win.", may_change=True
    )
    gradients: str = option(
        "float32",
        "Type in which gradients travel between GPUs over NCCL: float32 (with float64, float64) or bf16;"
        " one rank sends none.",
        choices=("float32", "bf16"),
    )
    cuda_graph: bool = option(True, "On a GPU, replay a whole step as one CUDA graph.", may_change=True)
    trace: str | None = option(
        None,
        "Write a timeline of some steps of all ranks to this file, for ui.perfetto.dev.",
        may_change=True,
    )
    trace_steps: str | None = option(
        None,
        "Steps to trace, A:B with both of them. Default: the 10th to the 14th of this start.",
        may_change=True,
    )
    timeout: float = option(
        60.0, "Seconds after which a wait for another rank ends the job.", ABOVE_ZERO, may_change=True
    )
    elastic: bool = option(
        False, "When ranks die, the others go on (needs mpirun --with-ft ulfm).", may_change=True
    )
    min_ranks: int = option(
        1,
        f"With --elastic: stop with a checkpoint, and exit code {EXIT_REQUEUE}, when fewer are left.",
        ONE_OR_MORE,
        may_change=True,
    )

    def __post_init__(self) -> None:
        for name in ("run_dir", "data", "resume", "trace"):
            given = getattr(self, name)
            if given is not None and not (name == "resume" and given in ("auto", "none")):
                path = expanded(given, f"--{name.replace('_', '-')}")
                object.__setattr__(self, name, str(path) if given.startswith("~") else given)
        for each in fields(self):
            self._check(each)
        check_together(self)

    def _check(self, each: Field) -> None:
        """UserError if an option's value is none of its choices or breaks one of its rules."""
        value, choices = getattr(self, each.name), each.metadata["choices"]
        if value is None:
            return
        self.require(each.name, not choices or value in choices, f"choose one of {', '.join(choices)}")
        for rule in each.metadata["rules"]:
            self.require(each.name, rule.holds(value), rule.remedy)

    def require(self, name: str, holds: bool, remedy: str) -> None:
        """UserError that names the option, its value and the remedy, unless it `holds`."""
        if not holds:
            raise UserError(f"--{name.replace('_', '-')} {shown(getattr(self, name))}: {remedy}")

    @property
    def network(self) -> str:
        """What to call the network: ResNet-9 by its variant, another by its name."""
        return self.variant if self.model == "resnet9" else self.model.rpartition(":")[2]

    @property
    def augmentation(self) -> Augmentation:
        """How training images are changed at random."""
        return Augmentation(**{name: getattr(self, name) for name in Augmentation._fields})

    @property
    def reading(self) -> Reading:
        """How the data's files are read."""
        return Reading(self.split, self.size, self.grey)

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
        for name in ("shift", "crop", "cutout"):
            fits_in = getattr(self, name) < side
            self.require(name, fits_in, f"give less than the {side} pixels of an image")
        for name, have in (("limit_train", len(data.train_images)), ("limit_test", len(data.test_images))):
            limit = getattr(self, name)
            if isinstance(limit, Cap):
                fewer[name] = Cap(min(limit, have))
            else:
                self.require(name, limit is None or limit <= have, f"the data has only {have} images")
        config = replace(config, **fewer)
        if self.batch_size_per_rank is not None:
            same = stored is not None and stored.get("batch_size_per_rank") == self.batch_size_per_rank
            held = stored.get("batch_size") if stored and same else None
            batch = held or self.batch_size_per_rank * size
            config = replace(config, batch_size=batch)
        if config.reproducible:
            config = replace(config, shards=config.shards or min(8, config.batch_size))
        fits_in = (config.shards or 1) <= config.batch_size
        config.require("shards", fits_in, f"is above the batch size, {config.batch_size}: give fewer")
        config.require(
            "batch_size",
            config.batch_size >= size,
            f"is below the number of ranks, {size}: give {size} or more, or start fewer ranks",
        )
        config.require("min_ranks", config.min_ranks <= size, f"is above the number of ranks, {size}")
        config.require(
            "shards",
            not config.reproducible or (config.shards or 0) >= size,
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
            is_model = name == "model"
            same = models.same(value, held, stored.get("environment")) if is_model else held == value
            if not free and not same:
                said = models.before(value, held) if is_model else shown(held)
                found.append(f"--{name.replace('_', '-')} {value} (the run has {said})")
        return found


CHOICES = {each.name: each.metadata["choices"] for each in fields(Config) if each.metadata["choices"]}

MAY_CHANGE = tuple(each.name for each in fields(Config) if each.metadata["may_change"])
"""Options that do not affect the result, so you may change them when you resume."""


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
