"""The same bits on any number of ranks, for every combination of options that could break them: `make ranks`.

Each job trains all cases, in one process without a launcher and then on 1, 2, 3, 4, 5 and 8 ranks under
mpirun; a line tells of each case as it ends. Equal must be the parameters' digest, every logged loss and
logits.safetensors. The runs lie in runs/ranks/CODE, so that a campaign that was broken off is gone on with,
unless the code has changed. Prints a table in Markdown; exit code 1 if a case differs, or if without
--reproducible none does.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import distrib
from distrib import launched_rank
from launch.machine import machine
from nn.layer import Shape
from nn.layers import (
    BatchNorm,
    Conv,
    ConvBN,
    Dropout,
    Flatten,
    Linear,
    ReLU,
    Residual,
    Sequential,
)
from nn.resnet9 import VARIANTS

ALONE, RANKS = "without a launcher", (1, 2, 3, 4, 5, 8)
COMMON = {
    "data": "synthetic:1142x12x16x1:10",  # the last pooling has more than one pixel
    "limit_train": 1042,
    "epochs": 2,
    "log_every": 1,
    "backend": "numpy",
    "shift": 1,
    "rotate": 10.0,
    "flip": True,
    "average": 0.9,
    "reproducible": True,
    "progress": False,
}


def own(shape: Shape, classes: int) -> Sequential:
    """A network with what ResNet-9 lacks: strides, dropout, batch norm of vectors, linear layers inside."""
    return Sequential(
        ConvBN(4, pool=2),
        Residual(ConvBN(4), ConvBN(4, relu=False)),
        Dropout(0.3),
        Conv(6, stride=2),
        BatchNorm(),
        ReLU(),
        Flatten(),
        Linear(9),
        BatchNorm(),
        ReLU(),
        Linear(classes),
    )


def cases() -> dict[str, dict[str, Any]]:
    """Options of `fit` by the case's name. The last one lacks the mode: it shows that the check can fail."""
    networks: dict[str, dict[str, Any]] = {name: {"variant": name, "width": 0.0625} for name in VARIANTS}
    networks["own"] = {"model": own}
    optimizers = {"adam": {}, "sgd": {"optimizer": "sgd", "momentum": 0.9, "lr": 0.05}}
    found = {
        f"{precision} {optimizer} {network} {norm} {batch}": {
            **COMMON,
            **networks[network],
            **optimizers[optimizer],
            "precision": precision,
            "batch_norm": norm,
            "batch_size": batch,
        }
        for batch, norm, network, optimizer, precision in product(
            (64, 26), ("sync", "shard"), networks, optimizers, ("float32", "float64")
        )
    }
    return {
        **found,
        "without the mode": {**COMMON, **networks["baseline"], "batch_size": 64, "reproducible": False},
    }


def bits(folder: Path) -> list[Any] | None:
    """What must be equal; None of a run that has not ended."""
    if not (folder / "summary.json").is_file():
        return None
    summary = json.loads((folder / "summary.json").read_text())
    if not summary["finished"]:
        return None
    assert set(summary["rank_digests"]) == {summary["parameter_digest"]}
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    logits = hashlib.sha256((folder / "logits.safetensors").read_bytes()).hexdigest()
    return [summary["parameter_digest"], [line.get("loss") for line in lines], logits]


def train_all(folder: Path) -> None:
    """A job: train what has not ended yet."""
    for name, options in cases().items():
        begin = time.perf_counter()
        if bits(folder / name) is None:
            distrib.fit(run_dir=folder / name, **options)
        if launched_rank() == 0:
            mine, first = bits(folder / name), bits(folder.parent / ALONE / name)
            assert mine is not None
            same = "" if mine == first else ", DIFFERS"
            seconds = time.perf_counter() - begin
            print(f"{folder.name}: {name}: {mine[0][:16]}, {seconds:.1f} s{same}", flush=True)


def code() -> str:
    """A digest of all that could change a bit."""
    files = sorted(path for room in ("distrib", "nn") for path in Path(room).rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in [*files, Path(__file__)])).hexdigest()[:12]


def main() -> int:
    """Run all jobs."""
    root, names = Path("runs/ranks") / code(), list(cases())
    for job in (ALONE, *RANKS):
        launcher = [] if job == ALONE else ["mpirun", "-n", str(job)]
        folder = root / (ALONE if job == ALONE else f"{job} rank(s)")
        subprocess.run([*launcher, sys.executable, __file__, str(folder)], check=True)
    jobs = [root / f"{ranks} rank(s)" for ranks in RANKS]
    equal = {name: [bits(job / name) == bits(root / ALONE / name) for job in jobs] for name in names}
    idle = all(equal.pop("without the mode"))
    bad = {name: found for name, found in equal.items() if not all(found)}
    print(f"{machine()}\n")
    print(
        f"{len(equal)} cases, each {ALONE} and on {', '.join(map(str, RANKS))} ranks, 1,042 images, 2 epochs:"
    )
    print("**equal to the bit**" if not bad else f"**{len(bad)} DIFFER**")
    for name, found in bad.items():
        print(f"- {name}: differs on {', '.join(str(n) for n, same in zip(RANKS, found) if not same)} ranks")
    print(f"\nWithout --reproducible they {'DO NOT DIFFER EITHER: the check is idle' if idle else 'differ'}.")
    return 1 if bad or idle else 0


if __name__ == "__main__":
    if len(sys.argv) == 2:
        train_all(Path(sys.argv[1]))
    else:
        sys.exit(main())
