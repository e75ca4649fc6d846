"""A whole training run on the double of a GPU: kernels, cuDNN, CUDA graphs; alone and over NCCL."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import HELPERS, crew, run
from cudnn_plans import operations as operations_of
from device_double import REAL, device, double_only, needs_device
from strict_array import CaptureError, reset_syncs, sync_count
from test_strict import apart

import distrib.graph
import distrib.loop
from distrib.comm.base import SingleCommunicator, SingleControl
from distrib.comm.reducer import Reducer
from distrib.comm.world import World
from distrib.config import Config
from distrib.data.dataset import Dataset, make
from distrib.errors import UserError
from distrib.faults.watchdog import Watchdog
from distrib.graph import Graphs
from distrib.run.console import Screen
from distrib.run.folder import Run
from distrib.trainer import Trainer
from distrib.warmup import warm_up
from nn.cuda.plans import KINDS, Operation
from nn.device import NUMPY, Backend
from nn.layers import pooling
from nn.ops.pool import global_pool_forward
from nn.resnet9 import VARIANTS

pytestmark = needs_device

BATCH = 8 if REAL else 4
OPTIONS: dict[str, Any] = {
    "batch_size": BATCH,
    "width": 0.125 if REAL else 0.0625,
    "epochs": 3,
    "schedule": "onecycle",
    "lr": 1e-2,
}


def random_data(images: int) -> Dataset:
    rng = np.random.default_rng(1)
    part = rng.integers(0, 256, (images, 28, 28), np.uint8), rng.integers(0, 10, images, np.uint8)
    return make("random", part, part, least=10)


IMAGES = 5 * BATCH // 2  # two batches and half a one
DATA = random_data(IMAGES)


def a_trainer(backend: Backend, images: int = IMAGES, **options: Any) -> Trainer:
    data = random_data(images)
    world = World(SingleCommunicator(), SingleControl(), backend, "test", Watchdog(0, 600), crew(1))
    return Trainer(Config(**{**OPTIONS, **options}), world, data)


def steps(trainer: Trainer, count: int) -> list[float]:
    """Losses of `count` steps, read with as little waiting as possible."""
    losses: list[float] = []
    for _ in range(count):
        trainer.step()
        trainer.results.read(wait=False, then=lambda results: losses.append(results["loss"]))
    trainer.results.read()
    return losses[:count]


SGD = {"optimizer": "sgd", "momentum": 0.9, "loss": "bce"}
AUGMENTED = {"shift": 2.0, "rotate": 15.0, "average": 0.5}


@pytest.mark.parametrize(
    ("variant", "precision", "optimizer"),
    [
        ("baseline", "float32", {"label_smoothing": 0.1}),
        ("avgpool", "tf32", {**SGD, **AUGMENTED}),
        ("conv-shortcut", "bf16", SGD),
        ("three-blocks", "bf16", {"weight_decay": 0.1, **AUGMENTED}),
        ("three-blocks", "float32", SGD),
    ],
)
def test_a_graph_does_what_an_eager_step_does(variant: str, precision: str, optimizer: dict) -> None:
    """To the bit, over three epochs with a smaller last batch and evaluations, whose larger buffers void a
    graph."""
    found = []
    for graph in (True, False):
        with device(precision) as backend:
            trainer = a_trainer(backend, variant=variant, precision=precision, cuda_graph=graph, **optimizer)
            losses = []
            for _ in range(3):
                losses += steps(trainer, 3)
                losses.append(trainer.test()["test_loss"])
            found.append((losses, backend.to_host(trainer.params.values), trainer.model.state_dict()))
            assert (trainer.graphs is not None) == graph
            if trainer.graphs:
                # eager: one of each kind, and after the evaluation moved buffers once more
                assert trainer.graphs.replays == 9 - 4
    (losses, values, state), (expected, expected_values, expected_state) = found
    assert losses == expected
    assert (values == expected_values).all()
    assert all((state[name] == expected_state[name]).all() for name in expected_state)
    assert state["stem.1.num_batches_tracked"] == 9
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("precision", "bound"), [("float32", 2e-4), ("bf16", 0.2 if REAL else 0.1)])
def test_losses_follow_the_host(variant: str, precision: str, bound: float) -> None:
    """The fused path in float32 against the plain one in float64 over a few steps; bf16 as far as it goes.

    Where the convolutions round to bfloat16 too, as on a GPU, the baseline's fourth loss is 0.145 apart.
    """
    with device(precision) as backend:
        ours = steps(a_trainer(backend, variant=variant, precision=precision), 4)
    theirs = steps(a_trainer(NUMPY, variant=variant, precision="float64"), 4)
    np.testing.assert_allclose(ours, theirs, rtol=bound)


def test_the_warm_up_prepares_for_the_validation_set() -> None:
    """Larger than the test set: its first evaluation moves no buffer."""
    with device("float32") as backend:
        data = random_data(60).first(None, 4).hold_back(0.5, 0)
        world = World(SingleCommunicator(), SingleControl(), backend, "test", Watchdog(0, 600), crew(1))
        trainer = Trainer(Config(**OPTIONS, validation=0.5), world, data)
        warm_up(trainer, None)
        generation = trainer.model.buffers.generation
        steps(trainer, 1)
        assert {*trainer.validate(), *trainer.test()} == {
            *("validation_loss", "validation_accuracy", "test_loss", "test_accuracy")
        }
        steps(trainer, 1)
        assert trainer.model.buffers.generation == generation


def test_float64_is_eager_and_exact() -> None:
    """cuDNN does no float64: patches, which cannot be captured, with the kernels around them."""
    with device("float64") as backend:
        ours, theirs = (a_trainer(b, precision="float64") for b in (backend, NUMPY))
        np.testing.assert_allclose(steps(ours, 5), steps(theirs, 5), rtol=1e-9)
        assert apart(ours.params, theirs.params, "values") < 1e-9
        assert ours.graphs is not None
        assert ours.graphs.replays == 0


@double_only
@pytest.mark.parametrize(("precision", "optimizer"), [("tf32", {"weight_decay": 0.1}), ("bf16", SGD)])
def test_updates_beside_the_backward_are_those_after_it(precision: str, optimizer: dict) -> None:
    """To the bit, for any sizes of buckets."""
    found = []
    for bucket_bytes in (None, 1, 1 << 12, 1 << 30):
        with device(precision) as backend:
            trainer = a_trainer(backend, variant="conv-shortcut", precision=precision, **optimizer)
            assert trainer.updates_early
            trainer.updates_early = bucket_bytes is not None
            then = {"bucket_bytes": bucket_bytes, "then": trainer._update} if bucket_bytes else {}
            trainer.reducer = Reducer(trainer.params, trainer.world.transport, **then)
            found.append((steps(trainer, 4), backend.to_host(trainer.params.values).tobytes()))
    assert all(each == found[0] for each in found)


@double_only
def test_the_host_waits_for_nothing() -> None:
    with device("float32") as backend:
        trainer = a_trainer(backend, images=8 * BATCH)
        reset_syncs()
        for _ in range(6):
            trainer.step()
        assert sync_count() == 0
        assert trainer.graphs is not None
        assert trainer.graphs.replays == 5
        trainer.results.read()
        assert sync_count() == 1


def operations(trainer: Trainer, train: tuple[int, ...], test: int, precision: str) -> set[str]:
    """The keys of cuDNN's plans for batches of so many images; the first convolution is our own."""
    found = set()
    for conv in trainer.model.convs()[1:]:
        for n in (*train, test):
            for kind in KINDS if n in train else ("forward",):
                w_shape = (conv.kernel, conv.kernel, conv.c_in, conv.out)
                operation = Operation(kind, (n, *conv.in_shape), w_shape, conv.geometry)
                found.add(f"{operation} {precision}")
    return found


@pytest.mark.parametrize("precision", ["float64", "tf32", "bf16"])
def test_warming_up_changes_nothing(precision: str, tmp_path: Path) -> None:
    """Plans, graphs and buffers are there before the first step, and every bit is as without."""
    found = []
    for warm in (True, False):
        with device(precision) as backend:
            trainer, run_folder = a_trainer(backend, precision=precision), Run(tmp_path / str(warm))
            run_folder.path.mkdir()
            steps(trainer, 2)
            if warm:
                warm_up(trainer, run_folder)
                held, built = trainer.model.buffers.nbytes(), len(getattr(backend, "launched", ()))
            found.append(
                (steps(trainer, 4), trainer.test(), trainer.model.state_dict(), trainer.optimizer.steps)
            )
            if warm and precision != "float64":
                assert trainer.graphs is not None
                assert trainer.graphs.replays == 1 + 4, "one before the warm-up, and every step after it"
                assert trainer.model.buffers.nbytes() == held, "a buffer grew after the warm-up"
                assert REAL or "adam" not in backend.launched[built:], (
                    "a step was queued by Python after the warm-up"
                )
                stored = json.loads((run_folder.path / "plans.json").read_text())
                assert stored["about"] == backend.describe()
                wanted = operations(trainer, (BATCH, BATCH // 2), IMAGES, precision)
                assert len(wanted) == 5 * 3 * 2 + 5
                # on a GPU all backends of a process share their plans
                assert wanted <= stored["plans"].keys() if REAL else wanted == stored["plans"].keys()
    (losses, test, state, done), (expected, expected_test, expected_state, expected_done) = found
    assert (losses, test, done) == (expected, expected_test, expected_done)
    assert all((state[name] == expected_state[name]).all() for name in state)


@double_only
def test_stored_plans_are_taken_and_those_of_another_gpu_are_not(tmp_path: Path) -> None:
    folder = Run(tmp_path)
    for about, taken in (("double", True), ("another", False)):
        with device("tf32") as backend:
            folder.keep_plans({"gpu": about}, {f"forward {BATCH}x28x28x4 3x3x4x8 s1p1d1 tf32": "lost"})
            if taken:
                with pytest.raises(
                    UserError, match=rf"'lost' stored for 'forward {BATCH}x28x28x4 .* remove plans.json"
                ):
                    warm_up(a_trainer(backend, precision="tf32"), folder)
            else:
                warm_up(a_trainer(backend, precision="tf32"), folder)
                assert "lost" not in folder.plans({"gpu": "double"}).values()


def test_a_run_on_a_device_is_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training loop, which reads results late there: the same lines of metrics.jsonl as on the host."""
    lines, summaries = [], []
    for name in ("device", "host"):
        options = Config(
            **OPTIONS | {"epochs": 2, "log_every": 2, "checkpoint_every": 5, "lr": 1e-3},
            backend="auto" if name == "device" else "numpy",
            limit_train=5 * BATCH + BATCH // 2,
            limit_test=4 * BATCH,
            run_dir=str(tmp_path / name),
            comm="none",
        )
        with device("float32") as backend:
            world = World(SingleCommunicator(), SingleControl(), backend, "test", Watchdog(0, 600), crew(1))
            if name == "device":
                monkeypatch.setattr(distrib.loop, "connect", lambda *_, world=world: world)
            assert distrib.loop.train(options) == 0
            monkeypatch.undo()
        lines.append(
            [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        )
        summaries.append(json.loads((tmp_path / name / "summary.json").read_text()))
    assert [line.get("step") for line in lines[0]] == [line.get("step") for line in lines[1]]
    for ours, theirs in zip(*lines, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ("loss", "train_loss", "test_loss"):
            assert key not in ours or ours[key] == pytest.approx(theirs[key], rel=2e-2)
        assert ours.get("compute_seconds") is None
    assert summaries[0]["steps"] == summaries[1]["steps"] == 12
    assert summaries[0]["finished"]
    assert summaries[0]["backend"] == ("cupy" if REAL else "double")


def test_several_steps_a_graph_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run: lines, results, and where it stops and saves, which is not where the graphs end."""
    found, ran, plain = [], list[int](), Graphs._run

    def noted(*given: Any) -> int:
        ran.append(plain(*given))
        return ran[-1]

    monkeypatch.setattr(Graphs, "_run", noted)
    monkeypatch.setattr(distrib.graph, "STEPS", 3)
    for name, graph in (("several", True), ("eager", False)):
        options = Config(
            **OPTIONS | {"epochs": 2, "max_steps": 18, "average": 0.5, "precision": "bf16"},
            **{"log_every": 5, "check_every": 7, "checkpoint_every": 9, "keep": 9, "comm": "none"},
            limit_train=11 * BATCH + BATCH // 2,
            limit_test=BATCH,
            cuda_graph=graph,
            run_dir=str(tmp_path / name),
        )
        with device("bf16") as backend:
            world = World(SingleCommunicator(), SingleControl(), backend, "test", Watchdog(0, 600), crew(1))
            _, summary = distrib.loop.train_on(world, options, distrib.loop.Caller(prints=False))
        text = (tmp_path / name / "metrics.jsonl").read_text()
        kept = ("step", "epoch", "lr", "loss", "accuracy", "train_loss", "test_loss")
        lines = [{key: line.get(key) for key in kept} for line in map(json.loads, text.splitlines())]
        saved = sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir())
        found.append((lines, saved, summary["parameter_digest"], summary["images_per_rank"]))
    assert [line["step"] for line in found[0][0]] == [5, 10, 12, 12, 15]
    assert found[0] == found[1]
    assert (ran.count(3), ran.count(1), len(ran)) == (2, 12, 14)


@double_only
@pytest.mark.parametrize(
    ("given", "seconds", "expected"), [(None, 0, [2, 4, 5]), (None, 1e9, [5]), (3, 1e9, [3, 5])]
)
def test_checkpoints_on_a_device_come_by_time(
    given: int | None, seconds: float, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where --checkpoint-every does not say otherwise; five steps, with two as the default."""
    for each in (distrib.loop, distrib.graph):
        monkeypatch.setattr(each, "CHECKPOINT_STEPS", 2)
    monkeypatch.setattr(distrib.loop, "CHECKPOINT_SECONDS", seconds)
    options = {**OPTIONS, "epochs": 1, "limit_train": 5 * BATCH, "limit_test": 10, "keep": 9}
    with device("float32") as backend:
        world = World(SingleCommunicator(), SingleControl(), backend, "test", Watchdog(0, 600), crew(1))
        monkeypatch.setattr(distrib.loop, "connect", lambda *_: world)
        assert distrib.loop.train(Config(**options, checkpoint_every=given, run_dir=str(tmp_path))) == 0
    saved = {path.name[5:13] for path in (tmp_path / "checkpoints").glob("step-*.safetensors")}
    assert sorted(map(int, saved)) == expected


def test_a_request_to_stop_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    with device("float32") as backend:
        trainer = a_trainer(backend, images=20 * BATCH, log_every=2)
        screen = Screen(active=False)
        step = trainer.step

        def stop_at_ten(times: int) -> None:
            trainer.stop_requested = trainer.progress.step >= 10
            step(times)

        monkeypatch.setattr(trainer, "step", stop_at_ten)
        distrib.loop.train_epoch(trainer, 0, None, screen)
        assert trainer.results.stopped
        assert 11 < trainer.progress.step <= 11 + 2 * 2, "the results of one logged step more are under way"
        assert trainer.progress.images == BATCH * trainer.progress.step, (
            "the checkpoint that follows needs the results of every step"
        )
        assert not trainer.results.in_flight


def captured(trainer: Trainer) -> Any:
    """The graph of a step."""
    steps(trainer, 2)
    assert trainer.graphs is not None
    ((_, graphs),) = trainer.graphs._graphs.values()
    return graphs[1]


@pytest.mark.parametrize(
    "layer", ["stem.0.weight", "stage1.0.weight", "stage3.0.weight", "res1.0.0.weight", "fc.bias"]
)
@pytest.mark.parametrize("average", [False, True])
def test_nan_is_not_lost_on_its_way(layer: str, average: bool) -> None:
    """Comparisons with NaN are false: a ReLU or a maximum written without care makes 0 of it."""
    with device("float32") as backend:
        trainer = a_trainer(backend, variant="avgpool" if average else "baseline")
        weights = trainer.model.state_dict()
        weights[layer].flat[0] = np.nan
        trainer.model.load_state_dict(weights)
        trainer.step()
        with pytest.raises(UserError, match="the loss is nan at step 1"):
            trainer.results.read()


def test_a_run_that_diverges_names_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = []
    for name in ("device", "host"):
        options = Config(
            **OPTIONS | {"optimizer": "sgd", "schedule": "constant", "lr": 1e10, "log_every": 1},
            backend="auto" if name == "device" else "numpy",
            limit_train=8 * BATCH,
            limit_test=10,
            run_dir=str(tmp_path / name),
            comm="none",
        )
        with device("float32") as backend:
            world = World(SingleCommunicator(), SingleControl(), backend, "test", Watchdog(0, 600), crew(1))
            if name == "device":
                monkeypatch.setattr(distrib.loop, "connect", lambda *_, world=world: world)
            with pytest.raises(UserError, match=r"the loss is (nan|inf) at step") as raised:
                distrib.loop.train(options)
            messages.append(str(raised.value).split(",")[0].split("at")[1])
            monkeypatch.undo()
        assert not list((tmp_path / name / "checkpoints").glob("*.safetensors"))
    assert messages[0] == messages[1]


@double_only
@pytest.mark.parametrize("order", ["reverse", "shuffled"])
def test_no_order_of_threads_changes_a_bit(order: str) -> None:
    """Of any kernel of a step: a missing barrier, or a sum whose order depends on who comes first, would."""
    found = []
    for run_in in ("forward", order):
        with device("float32") as backend:
            trainer = a_trainer(backend)
            trainer.step()  # compiles
            backend.algorithms["stem"].kernels._modules["float32"].module.order = run_in
            found.append((steps(trainer, 3), backend.to_host(trainer.params.values)))
    assert found[0][0] == found[1][0]
    assert (found[0][1] == found[1][1]).all()


@double_only
@pytest.mark.parametrize(
    ("variant", "precision", "order"),
    [("baseline", "float32", "forward"), ("three-blocks", "bf16", "reverse"), ("avgpool", "tf32", "reverse")],
)
def test_nothing_races_in_a_whole_step(variant: str, precision: str, order: str) -> None:
    """Nor reads or writes outside its arguments; with everything that a step can have."""
    with device(precision, races=True, order=order) as backend:
        trainer = a_trainer(backend, variant=variant, precision=precision, **AUGMENTED)
        steps(trainer, 1)
        trainer.test()
        modules = backend.algorithms["stem"].kernels._modules.values()
        assert sum(each.module.accesses for each in modules) > 1e6


@double_only
def test_what_a_step_takes() -> None:
    """At batch 8 a step of this narrow baseline is 50 launches, and each execution of cuDNN's counts as one.

    STEP_WIDTH=1 in the environment prints what it takes at the real width, where updates come in buckets,
    and what our own kernels bring from memory and back.
    """
    width = float(os.environ.get("STEP_WIDTH", OPTIONS["width"]))
    with device("tf32", races=True) as backend:
        trainer = a_trainer(backend, images=64, batch_size=8, precision="tf32", width=width)
        graph = captured(trainer)
        module = backend.algorithms["stem"].kernels._modules["float32"].module
        before = module.bytes
        trainer.step()
        moved = module.bytes - before
    print(f"launches {len(graph.work)}, one after another {graph.depth}, bytes of our kernels {moved:,}")
    assert (len(graph.work), graph.depth) == (49 + len(trainer.reducer.buckets), 43)


@double_only
def test_an_operation_outside_the_kernels_cannot_hide_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    with device("float32") as backend:
        trainer = a_trainer(backend)
        monkeypatch.setattr(pooling, "global_pool_forward", global_pool_forward.plain)
        with pytest.raises(CaptureError):
            trainer.step()  # eagerly, then captured
        assert backend.cuda.captured is None


BY_EIGHT = {"batch_size": 8, "lr": 1e-3}
"""Of the runs on up to three ranks."""


@pytest.fixture(scope="module")
def alone() -> list[float]:
    """The losses of the same steps on one rank."""
    with device("float32") as backend:
        return steps(a_trainer(backend, images=18, **BY_EIGHT), 6)


RANKS = """
from mpi4py import MPI
from device_double import CapturedNccl, device
from distrib.faults.watchdog import Watchdog
from distrib.comm.nccl import NcclCommunicator
from distrib.comm.reducer import Reducer
from distrib.trainer import Trainer
from distrib.comm.world import World
from test_graph import *
world, watchdog = MPI.COMM_WORLD, Watchdog(MPI.COMM_WORLD.Get_rank(), 600)
distrib.graph.STEPS = 2

def train(graph):
    with device("float32") as backend:
        nccl = CapturedNccl(world, backend.cuda, [])
        side, zero = BRANCH and backend.side_stream, lambda: backend.xp.zeros(1, "float32")
        comm = NcclCommunicator(world, backend.cuda, nccl, 0, watchdog, zero, side)
        config = Config(**OPTIONS | BY_EIGHT, gradients=GRADIENTS, cuda_graph=graph)
        all_ranks = World(comm, world, backend, "", watchdog, crew(comm.size))
        trainer = Trainer(config, all_ranks, random_data(18))
        trainer.reducer = Reducer(
            trainer.params, comm, trainer.config.gradients, 1 << 12, trainer.updates_early and trainer._update
        )
        plain = trainer.reducer.ready
        trainer.reducer.ready = lambda parameter: (backend.cuda.touch(), plain(parameter))
        warm_up(trainer, None)
        losses = steps(trainer, 3)
        trainer.step(2)
        losses += steps(trainer, 1)
        # six replays: four full batches, two of 2 images (on three ranks: none on one)
        assert not graph or trainer.graphs.replays == 6, trainer.graphs.replays
        assert not graph or [*map(len, (g for _, g in trainer.graphs._graphs.values()))] == [2, 1]
        state = trainer.model.state_dict()
        trainer.close(), comm.close()
        return losses, state, trainer

losses, state, trainer = train(True)
eager, eager_state, _ = train(False)
assert losses == eager, "a graph and eager steps differ"
assert all((state[name] == eager_state[name]).all() for name in state)
np.testing.assert_allclose(losses, [*ALONE[:3], ALONE[5]], rtol=BOUND)
everyone = world.allgather(b"".join(value.tobytes() for value in state.values()))
assert all(other == everyone[0] for other in everyone)
"""


@double_only
@pytest.mark.parametrize(
    ("ranks", "gradients", "bound"), [(1, "float32", 0), (2, "bf16", 5e-2), (3, "float32", 1e-3)]
)
def test_graphs_with_nccl_inside(alone: list[float], ranks: int, gradients: str, bound: float) -> None:
    """Collectives in the graph: as eager to the bit, on all ranks alike, and as one rank within rounding."""
    given = f"GRADIENTS, BOUND, BRANCH, ALONE = {gradients!r}, {bound}, True, {alone}\n"
    run("-c", given + RANKS, ranks=ranks, env=HELPERS)


AGREE = """
from mpi4py import MPI
from device_double import CapturedNccl, device
from distrib.comm.nccl import NcclCommunicator
from nn.cuda.cudnn import Convolutions
from test_graph import *
world, watchdog = MPI.COMM_WORLD, Watchdog(MPI.COMM_WORLD.Get_rank(), 600)
with device("float32") as backend:
    comm = NcclCommunicator(world, backend.cuda, CapturedNccl(world, backend.cuda, []), 0, watchdog,
                            lambda: backend.xp.zeros(1, "float32"), backend.side_stream)
    config = Config(**OPTIONS | BY_EIGHT, batch_norm="local")
    trainer = Trainer(config, World(comm, world, backend, "", watchdog, crew(comm.size)), random_data(18))
    plain = trainer.reducer.ready
    trainer.reducer.ready = lambda parameter: (backend.cuda.touch(), plain(parameter))
    if UNWILLING and comm.rank == 1:
        trainer.capturable = lambda: False
    warm_up(trainer, None)
    replays = trainer.graphs and trainer.graphs.replays
    steps(trainer, 6)
    assert world.allgather(trainer.graphs is None) == [UNWILLING] * comm.size
    assert UNWILLING or trainer.graphs.replays - replays == 6
    trainer.close(), comm.close()
"""


@double_only
@pytest.mark.parametrize("unwilling", [False, True])
def test_all_ranks_have_graphs_or_none_has(unwilling: bool) -> None:
    """Three ranks, one of which has no image in the last batch, where local statistics take other kernels."""
    run("-c", f"UNWILLING = {unwilling}\n" + AGREE, ranks=3, env=HELPERS)


@double_only
def test_a_communicator_is_not_closed_under_a_graph() -> None:
    """The real NCCL would wait for ever: `Trainer.close` lets go of the graphs first."""
    done = run(
        "-c",
        "UNWILLING = False\n" + AGREE.replace("trainer.close(), comm.close()", "comm.close()"),
        ranks=2,
        env=HELPERS,
        check=False,
    )
    assert "destroyed while a CUDA graph holds its calls" in done.stderr


STAGED = """
from mpi4py import MPI
from device_double import device
from distrib.comm.mpi import StagedCommunicator
from test_graph import *
world, watchdog = MPI.COMM_WORLD, Watchdog(MPI.COMM_WORLD.Get_rank(), 600)
found = []
for alone in (False, True):
    with device("float32") as backend:
        trainer = a_trainer(backend, lr=1e-3)
        if not alone:
            comm = StagedCommunicator(world, watchdog, backend)
            trainer = Trainer(trainer.config, World(comm, world, backend, "", watchdog, crew(2)), DATA)
            assert trainer.graphs is None
        found.append(steps(trainer, 6))
np.testing.assert_allclose(*found, rtol=1e-3)
"""


@double_only
def test_ranks_through_the_host() -> None:
    """MPI under the device's arrays: the sums wait for the branch of the weight gradients."""
    run("-c", STAGED, ranks=2, env=HELPERS)


@double_only
def test_a_sum_that_does_not_wait_for_the_weight_gradients_is_found_out() -> None:
    done = run(
        "-c", "GRADIENTS, BOUND, BRANCH = 'float32', 1e-3, False\n" + RANKS, ranks=2, env=HELPERS, check=False
    )
    assert "two streams use the same memory, and no event orders them" in done.stderr


@double_only
def test_a_network_whose_convolutions_cudnn_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The message names the options that matter, and not the run's folder."""
    with device("bf16") as backend:
        trainer = a_trainer(backend, precision="bf16")
        monkeypatch.setattr(backend.algorithms["cudnn"], "supports", lambda *_: False)
        with pytest.raises(UserError, match=r"^--precision bf16, baseline: bfloat16 convolutions need cuDNN"):
            warm_up(trainer, Run(tmp_path))


def bench_kernels_of_a_step(monkeypatch: pytest.MonkeyPatch, copies: int, **options: Any) -> dict[str, Any]:
    """`distrib bench kernels --json` on the double; returns cuDNN's plans."""
    from launch.bench import kernels

    with device("tf32") as backend:
        world = World(SingleCommunicator(), SingleControl(), backend, "test", Watchdog(0, 600), crew(1))
        monkeypatch.setattr(kernels, "connect", lambda *_: world)
        for name, value in {"COPIES": copies, "ROUNDS": 1}.items():
            monkeypatch.setattr(kernels, name, value)
        kernels.kernels(batch_size=2, precision="tf32", as_json=True, **options)
        return backend.algorithms["cudnn"].plans


@double_only
@pytest.mark.parametrize(
    ("model", "images", "launches"),
    [("lenet", "28x28x1", 5), ("resnet20", "32x32x3", 62)],
)
def test_kernels_of_other_networks_are_listed(
    model: str,
    images: str,
    launches: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Their convolutions' plans are those that `make cudnn-plans` asks the real cuDNN for."""
    data = f"synthetic:20x{images}:10"
    plans = bench_kernels_of_a_step(monkeypatch, copies=1, model=model, data=data)
    result = json.loads(capsys.readouterr().out)
    assert result["model"] == model
    wanted = operations_of(2, model, tuple(map(int, images.split("x"))))
    assert {f"{each} tf32" for each in wanted} <= plans.keys()
    names = [row["name"] for row in result["kernels"] if row["name"].startswith("cuDNN")]
    assert set(names) == {f"cuDNN {each}" for each in wanted}
    assert len(names) == launches


@double_only
def test_kernels_are_listed_and_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`distrib bench kernels` on the double, whose clock stands still between plans."""
    bench_kernels_of_a_step(monkeypatch, copies=2, width=1 / 16)
    result = json.loads(capsys.readouterr().out)
    names = [row["name"] for row in result["kernels"]]
    assert result["launches"] == len(names) == 46
    assert names[0] == "gather_batch"
    assert names[-1] == "adam"
    assert sum(name.startswith("cuDNN weight gradient") for name in names) == 7
    assert result["step_microseconds"] > 0
