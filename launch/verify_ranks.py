"""`distrib verify-ranks`: the same steps on several numbers of ranks, and how far their results are apart."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from rich.console import Console
from safetensors.numpy import load_file

from distrib.config import Config
from distrib.errors import UserError
from distrib.files import parsed, shown
from distrib.run import checkpoint as ckpt
from distrib.train import parse
from launch.bench.run import timed
from launch.entry import AsJson, number
from launch.machine import machine, mpirun, refuse_launcher

CHOSEN = ("run_dir", "resume", "max_steps", "log_every", "comm")
LIMIT_TEST = 500
"""Test images, where none are asked for: they are evaluated, too, and their logits compared."""

DIFFERENT = 1
"""Exit code where --reproducible was given and results differ."""


class Outcome(NamedTuple):
    """What some steps on a number of ranks came to."""

    ranks: int
    digest: str
    losses: list[float]
    logits: np.ndarray
    weights: dict[str, np.ndarray]
    images: list[int]

    def same(self, other: Outcome) -> bool:
        """Whether parameters, losses and logits have the same bits."""
        return (
            self.digest == other.digest
            and self.losses == other.losses
            and self.logits.tobytes() == other.logits.tobytes()
        )

    def apart(self, other: Outcome) -> float:
        """The largest |difference| of two parameters or running statistics."""
        return max(
            float(np.abs(self.weights[name].astype(np.float64) - value.astype(np.float64)).max())
            for name, value in other.weights.items()
        )


def verify_ranks(
    context: typer.Context,
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, with commas.", metavar="N,N,…")] = "1,2,3,4",
    steps: Annotated[int, number("--steps", "Steps that each trains.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Train the same steps on 1, 2, 3 and 4 ranks, and compare the results: parameters, losses, logits.

    With --reproducible all must have the same bits, else the exit code is 1. Without it, the largest
    difference of a parameter is shown. All options of `distrib train` may be given, but for those of the run
    folder.

    Example: distrib verify-ranks --reproducible --width 0.25 --batch-size 64
    """
    refuse_launcher("distrib verify-ranks")
    numbers = [parsed("--ranks", each, int) for each in ranks.split(",")]
    config = checked(context.args, numbers)
    with Console(stderr=True).status("") as status, tempfile.TemporaryDirectory() as folder:
        outcomes = []
        for count in numbers:
            status.update(f"{steps} steps on {count} rank(s)")
            outcomes.append(outcome(context.args, config, count, steps, Path(folder) / str(count)))
    first, *others = outcomes
    equal = all(each.same(first) for each in others)
    rows = [
        {
            "ranks": each.ranks,
            "parameter_digest": each.digest,
            "same_bits": each.same(first),
            "largest_difference": each.apart(first),
            "last_loss": each.losses[-1],
            "images_per_rank": each.images,
        }
        for each in outcomes
    ]
    result = {"machine": machine(), "options": context.args, "steps": steps, "equal": equal, "runs": rows}
    print(json.dumps(result, indent=2) if as_json else text(result, config))
    if config.reproducible and not equal:
        raise typer.Exit(DIFFERENT)


def checked(arguments: list[str], numbers: list[int]) -> Config:
    """The configuration; UserError for an option that is chosen here, or a number of ranks that is none."""
    config = parse(arguments)
    for name in CHOSEN:
        if getattr(config, name) != getattr(Config(), name):
            raise UserError(f"--{name.replace('_', '-')}: is chosen by verify-ranks: leave it out")
    if min(numbers) < 1 or len(set(numbers)) < 2:
        raise UserError(f"--ranks {shown(','.join(map(str, numbers)))}: give two different numbers from 1")
    return config


def outcome(arguments: list[str], config: Config, ranks: int, steps: int, folder: Path) -> Outcome:
    """Train `steps` steps on `ranks` ranks."""
    few = [] if config.limit_test else ["--limit-test", str(LIMIT_TEST)]
    options = ["--run-dir", str(folder), "--max-steps", str(steps), "--log-every", "1", *few]
    timed([*mpirun(ranks), sys.executable, "-m", "distrib.train", *arguments, *options], 1)
    summary = json.loads((folder / "summary.json").read_text())
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return Outcome(
        ranks,
        summary["parameter_digest"],
        [line["loss"] for line in lines if "loss" in line],
        load_file(folder / "logits.safetensors")["logits"],
        ckpt.load_model(ckpt.model_path(folder / "checkpoints", summary["steps"]))[0],
        summary["images_per_rank"],
    )


def text(result: dict[str, Any], config: Config) -> str:
    """The result for people."""
    lines = [result["machine"], f"{result['steps']} steps: {' '.join(result['options'])}"]
    for row in result["runs"]:
        apart = "same bits" if row["same_bits"] else f"differs by {row['largest_difference']:.1e} at most"
        images = "+".join(map(str, row["images_per_rank"]))
        lines.append(
            f"  {row['ranks']} rank(s): {row['parameter_digest'][:16]}, loss {row['last_loss']:.6f},"
            f" images {images}: {apart}"
        )
    if config.reproducible:
        lines.append("equal to the bit" if result["equal"] else "NOT equal: report it, with this machine")
    elif not result["equal"]:
        lines.append("equal up to rounding; --reproducible makes them equal to the bit")
    return "\n".join(lines)
