"""Virtual shards: the same bits on any number of ranks, whatever each of them computes."""

from __future__ import annotations

import socket
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import losses, run, summary, train_each

from distrib.comm.tree import Stack, add_up, nodes_of
from distrib.config import build
from distrib.crew import Crew, Meet
from distrib.data import synthetic
from distrib.errors import UserError

RNG = np.random.default_rng(5)
OWN = """
from nn.layers import *

def net(shape, classes):
    return Sequential(
        ConvBN(4, pool=2), Residual(ConvBN(4), ConvBN(4, relu=False)), Dropout(0.3), Conv(6, stride=2),
        BatchNorm(), ReLU(), Flatten(), Linear(9), BatchNorm(), ReLU(), Linear(classes))
"""
SMALL = ("--data", "synthetic:90x12x12x2:3", "--limit-train", 67, "--epochs", 2, "--log-every", 1)
AUGMENTED = ("--shift", 1, "--flip", "--average", 0.5, "--validation", 0.2)
CASES = {
    "adam": ("--model", "net.py:net", "--batch-size", 26),
    "sgd": ("--model", "net.py:net", "--batch-size", 13, "--optimizer", "sgd", "--momentum", 0.9, *AUGMENTED),
    "float64": ("--model", "net.py:net", "--batch-size", 26, "--precision", "float64", "--shards", 13),
    "shard": ("--model", "net.py:net", "--batch-size", 26, "--batch-norm", "shard", "--loss", "bce"),
    "one image a shard": ("--model", "net.py:net", "--batch-size", 8, "--batch-norm", "shard"),
    "resnet9": ("--width", 0.1, "--variant", "three-blocks", "--batch-size", 33),
}


@pytest.fixture(autouse=True)
def own_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)


def bits(folder: Path) -> list[Any]:
    """All that must be equal."""
    found = summary(folder)
    whole = [found[name] for name in ("parameter_digest", "test_loss", "test_accuracy", "train_loss")]
    assert set(found["rank_digests"]) == {found["parameter_digest"]}
    return [*whole, losses(folder), (folder / "logits.safetensors").read_bytes()]


def shards(folder: Path, *options: object, ranks: int = 1, **more: Any) -> list[Any]:
    """A short run with --reproducible."""
    command = ("-m", "distrib.train", "--run-dir", folder, "--reproducible", *SMALL, *options)
    run(*command, ranks=ranks, cwd=Path.cwd(), **more)
    return bits(folder)


RANKS = {1: list(CASES), 2: ["adam"], 3: list(CASES), 5: list(CASES), 8: ["adam"]}
"""What is trained on so many ranks."""


def test_the_same_bits_on_any_number_of_ranks(tmp_path: Path) -> None:
    for ranks, names in RANKS.items():
        runs = [("--run-dir", tmp_path / name / str(ranks), *CASES[name]) for name in names]
        train_each(*((*each, "--reproducible", *SMALL) for each in runs), ranks=ranks, cwd=tmp_path)
        for name in names:
            alone, folder = tmp_path / name / "1", tmp_path / name / str(ranks)
            assert bits(folder) == bits(alone), f"{name} on {ranks} ranks"
            work, whole = summary(folder)["images_per_rank"], sum(summary(alone)["images_per_rank"])
            assert len(work) == ranks
            assert sum(work) == whole
            assert max(work) <= 2 * whole / ranks, "the work is divided"


def test_without_the_mode_the_bits_differ(tmp_path: Path) -> None:
    """Else the test above could not fail."""
    for ranks in (1, 3):
        run(
            "-m",
            "distrib.train",
            "--run-dir",
            tmp_path / str(ranks),
            *SMALL,
            *CASES["adam"],
            ranks=ranks,
            cwd=tmp_path,
        )
    alone, three = bits(tmp_path / "1"), bits(tmp_path / "3")
    assert alone[0] != three[0]
    np.testing.assert_allclose(alone[4][:3], three[4][:3], rtol=1e-4)


def test_the_same_training_as_without_the_mode(tmp_path: Path) -> None:
    options = ("--model", "net.py:net", "--batch-size", 26, "--precision", "float64", "--optimizer", "sgd")
    run("-m", "distrib.train", "--run-dir", tmp_path / "plain", *SMALL, *options, cwd=tmp_path)
    with_shards, plain = shards(tmp_path / "shards", *options, ranks=2), bits(tmp_path / "plain")
    np.testing.assert_allclose(with_shards[4], plain[4], rtol=1e-9)


def test_threads_and_shards_at_once_change_no_bit(tmp_path: Path) -> None:
    options = ("--model", "net.py:net", "--batch-size", 26, "--batch-norm", "shard", "--shards", 7)
    alone = shards(tmp_path / "alone", *options)
    assert shards(tmp_path / "threads", *options, env={"OMP_NUM_THREADS": "3"}) == alone
    for at_once, ranks in ((1, 1), (3, 2)):
        folder = tmp_path / f"{at_once}-{ranks}"
        assert shards(folder, *options, "--shards-at-once", at_once, ranks=ranks) == alone


@pytest.mark.parametrize("case", ["adam", "sgd", "resnet9"])
def test_a_process_alone_trains_in_threads(case: str, tmp_path: Path) -> None:
    """Up to rounding as with one, and with the same number to the bit, resumed or not; and whether or not
    the threads share the update and the sum of the gradients.
    """
    options = ("--precision", "float64", "--optimizer", "sgd", *CASES[case], *SMALL)

    def train(name: str, threads: int, *more: object) -> str:
        code = (
            f"from distrib import shards, train, trainer; trainer.blas_threads = lambda: {threads};"
            f" shards.HOST_BLOCK = {1 if name == 'again' else 1 << 40}; train.main()"
        )
        done = run("-c", code, "--run-dir", name, *options, *more, cwd=tmp_path)
        assert f"1 rank(s) on {socket.gethostname()}, {threads} thread(s) each" in " ".join(
            done.stdout.split()
        )
        return done.stdout

    for name, threads in (("one", 1), ("three", 3), ("again", 3)):
        train(name, threads)
    train("half", 3, "--max-steps", 3)
    assert "changed since then" not in train("half", 3)
    one, three, again, half = (bits(tmp_path / name) for name in ("one", "three", "again", "half"))
    assert half == again == three
    assert one[0] != three[0]
    ours, wanted = ([*losses(tmp_path / name), found[1]] for name, found in (("three", three), ("one", one)))
    np.testing.assert_allclose(ours, wanted, rtol=1e-9)
    train("other", 2, "--max-steps", 3)
    assert "changed since then" in train("other", 3)


def test_resumed_on_another_number_of_ranks_to_the_bit(tmp_path: Path) -> None:
    options = ("--model", "net.py:net", "--batch-size", 26, "--reproducible", *SMALL)
    run("-m", "distrib.train", "--run-dir", "whole", *options, cwd=tmp_path, ranks=4)
    run("-m", "distrib.train", "--run-dir", "half", *options, "--max-steps", 4, cwd=tmp_path, ranks=4)
    done = run("-m", "distrib.train", "--run-dir", "half", *options, cwd=tmp_path, ranks=3)
    assert "resuming from step-00000004.safetensors, step 4 of 6, to the bit" in done.stdout
    assert "the same bits on 1 to 8 ranks" in done.stdout
    assert "changed since then" not in done.stdout
    assert bits(tmp_path / "half") == bits(tmp_path / "whole")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shards": 4}, "--shards 4: needs --reproducible"),
        ({"batch_norm": "shard"}, "--batch-norm shard: needs --reproducible"),
        ({"reproducible": True, "batch_norm": "local"}, "--batch-norm local: depends on the ranks"),
        ({"reproducible": True, "gradients": "bf16"}, "--gradients bf16: rounds by rank: leave it out"),
        ({"reproducible": True, "shards_at_once": 2}, "--shards-at-once 2: needs --batch-norm shard"),
        ({"reproducible": True, "shards": 9, "batch_size": 8}, "--shards 9: is above the batch size, 8"),
        ({"reproducible": True, "shards": 2}, "--shards 2: is below the number of ranks, 3"),
        ({"reproducible": True, "shards": 0}, "--shards 0: give 1 or more"),
    ],
)
def test_mistakes(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build(options).resolve(3, synthetic.read("synthetic:20x8x8x1:2"))


@pytest.mark.quick
def test_default_shards() -> None:
    data = synthetic.read("synthetic:20x8x8x1:2")
    assert build({"reproducible": True, "batch_size": 64}).resolve(3, data).shards == 8
    assert build({"reproducible": True, "batch_size": 5}).resolve(3, data).shards == 5
    assert build({}).resolve(3, data).shards is None


@pytest.mark.quick
@pytest.mark.parametrize("leaves", range(1, 18))
def test_the_tree_is_the_same_however_leaves_are_dealt(leaves: int) -> None:
    parts = RNG.standard_normal((leaves, 5)).astype(np.float32)

    def tree(level: list[np.ndarray]) -> np.ndarray:
        """By the definition."""
        while len(level) > 1:
            pairs = [a + b for a, b in zip(level[::2], level[1::2])]
            level = [*pairs, *level[2 * len(pairs) :]]
        return level[0]

    want = tree(list(parts))
    for ranks in range(1, leaves + 1):
        cuts = np.sort(RNG.choice(np.arange(1, leaves), ranks - 1, replace=False))
        known = {}
        for own in np.split(np.arange(leaves), cuts):
            stack = Stack()
            for leaf in own.tolist():
                stack.push(leaf, parts[leaf].copy())
            assert [node for node, _ in stack.nodes] == nodes_of(own.tolist())
            known |= dict(stack.nodes)
        assert add_up(known).tobytes() == want.tobytes()
    if leaves > 4:
        assert parts.sum(0).tobytes() != want.tobytes() or leaves < 8, "another order gives other bits"


@pytest.mark.quick
@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_a_crew_meets(at_once: int) -> None:
    crew, running, most = Crew(5, at_once), set[int](), [0]
    lock = threading.Lock()

    def work(number: int, meet: Meet) -> None:
        for turn in range(3):
            with lock:
                assert number % at_once not in running, "they take turns"
                running.add(number % at_once)
                most[0] = max(most[0], len(running))
            x = np.full(2, 10.0**number + turn)
            with lock:
                running.remove(number % at_once)
            meet(x)
            found.setdefault(turn, []).append(x.tolist())

    found: dict[int, list[list[float]]] = {}
    for count in (5, 2):
        found.clear()
        crew.run([partial(work, number) for number in range(count)], lambda given: sum(given))
        want = {turn: [[sum(10.0**n + turn for n in range(count))] * 2] * count for turn in range(3)}
        assert found == want
    assert most[0] <= at_once
    crew.close()


@pytest.mark.quick
def test_a_failure_in_a_crew_is_raised_once_all_have_ended() -> None:
    crew, ended = Crew(3, 2), []

    def work(number: int, meet: Meet) -> None:
        try:
            meet(np.zeros(1))
            if number == 1:
                raise KeyError("planted")
            meet(np.zeros(1))
        finally:
            ended.append(number)

    with pytest.raises(KeyError, match="planted"):
        crew.run([partial(work, number) for number in range(3)], lambda given: given[0])
    assert sorted(ended) == [0, 1, 2]

    def fails(given: list[np.ndarray]) -> np.ndarray:
        raise OSError("in the sum")

    with pytest.raises(OSError, match="in the sum"):
        crew.run([lambda meet: meet(np.zeros(1))] * 2, fails)
    crew.run([lambda meet: meet(np.zeros(1))] * 3, lambda given: given[0])
    crew.close()
