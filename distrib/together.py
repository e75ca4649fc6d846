"""Which options of a configuration go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distrib import models
from distrib.options import MOST_TRACED, owners, steps_between
from nn.optim import OPTIMIZERS

if TYPE_CHECKING:
    from distrib.config import Config


def check_together(config: Config) -> None:
    """UserError if options do not go together."""
    for name in sorted({name for optimizer in OPTIMIZERS.values() for name in optimizer.options}):
        unused = getattr(config, name) == getattr(type(config), name)
        known = name in OPTIMIZERS[config.optimizer].options
        config.require(name, unused or known, f"is of {owners(name)} only")
    models.require_form(config.model)
    config.require("nesterov", not config.nesterov or config.momentum > 0, "needs --momentum above 0")
    for name in ("keep_best", "patience"):
        config.require(name, not getattr(config, name) or config.validation > 0, "needs --validation above 0")
    config.require("trace_steps", not config.trace_steps or config.trace is not None, "needs --trace")
    known = config.trace_steps is None or steps_between(config.trace_steps) is not None
    config.require("trace_steps", known, f"give A:B, as 10:14, of at most {MOST_TRACED} steps")
    config.require("shards", config.shards is None or config.reproducible, "needs --reproducible")
    own = config.batch_norm == "shard"
    config.require("batch_norm", config.reproducible or not own, "needs --reproducible")
    whole = config.batch_norm != "local" or not config.reproducible
    config.require("batch_norm", whole, "depends on the ranks: give sync or shard with --reproducible")
    config.require("shards_at_once", config.shards_at_once is None or own, "needs --batch-norm shard")
    config.require("min_ranks", config.elastic or config.min_ranks == 1, "needs --elastic")
    alike = config.batch_norm != "local" or not config.elastic
    config.require("batch_norm", alike, "depends on the ranks: give sync with --elastic")
    sent = config.gradients != "bf16" or not config.reproducible
    config.require("gradients", sent, "rounds by rank: leave it out with --reproducible")
    smooth, warm = config.label_smoothing > 0, config.warmup_epochs > 0
    config.require("label_smoothing", not smooth or config.loss == "ce", "is of --loss ce only")
    exact = config.gradients == "float32" or config.precision != "float64"
    config.require("gradients", exact, "is not for --precision float64")
    onecycle = config.schedule == "onecycle"
    config.require("warmup_epochs", not (warm and onecycle), "onecycle warms up by itself: leave it out")
    fits_in = config.warmup_epochs <= config.epochs
    config.require("warmup_epochs", fits_in, f"is longer than --epochs {config.epochs}")
