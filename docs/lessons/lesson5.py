"""Lesson 5: kill a rank, and stop and resume: the result keeps its bits.

Give one word: `quiet` trains in peace, in `kill` rank 1 dies, `stop` ends half-way, `resume` goes on.
"""

import os
import signal
import sys
from pathlib import Path

import distrib
from nn.layers import ConvBN, Flatten, Linear, Sequential

word = sys.argv[1] if len(sys.argv) == 2 else ""
if word not in ("quiet", "kill", "stop", "resume"):
    sys.exit(f"give one word: quiet, kill, stop or resume, not {word!r}")
rank = distrib.launched_rank()
folder = Path("runs") / ("lesson5-stop" if word == "resume" else f"lesson5-{word}")
if (word == "resume") != folder.exists():
    sys.exit(f"{folder}: " + ("give `stop` first" if word == "resume" else "is there from before: remove it"))


def net(shape, classes):
    return Sequential(ConvBN(8, pool=2), ConvBN(16, pool=2), Flatten(), Linear(classes))


def on_epoch(figures):
    """What `fit` calls on every rank at the end of each epoch."""
    if rank == 0:
        print(
            f"epoch {figures['epoch']}, step {figures['step']}: test loss {figures['test_loss']:.4f}",
            flush=True,
        )
    if word == "kill" and rank == 1 and figures["epoch"] == 1:
        os.kill(os.getpid(), signal.SIGKILL)  # no farewell, no last message


trained = distrib.fit(
    net,
    epochs=2,
    batch_size=48,
    lr=0.01,
    limit_train=480,
    limit_test=200,
    reproducible=True,  # the same bits, whoever computes
    shards=6,
    elastic=word == "kill",  # the others go on
    max_steps=15 if word == "stop" else None,
    run_dir=folder,
    backend="numpy",
    progress=False,
    on_epoch=on_epoch,
)
if rank == 0:
    result = trained.summary
    for death in result["survived"]:
        print(f"rank {death['rank']} died after step {death['step']}; {result['world_size']} rank(s) went on")
        print(f"  {death['cause']}")
    print(f"step {result['steps']}, weights {result['parameter_digest'][:8]}")
