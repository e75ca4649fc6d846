"""Named sets of options, for --recipe."""

from __future__ import annotations

from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    "demo": {
        "epochs": 1,
        "limit_train": 30_016,  # whole batches: a small last one costs 0.1 % accuracy
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
    ("model", "resnet9", ("variant", "width")),
    ("optimizer", "sgd", ("momentum", "nesterov", "lr", "weight_decay")),
    ("loss", "ce", ("label_smoothing",)),
)
"""Recipe options to drop when the user picks another network, optimizer or loss."""
