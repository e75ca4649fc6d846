"""Training from Python: what a program gets, and that it is left as it was."""

from __future__ import annotations

import inspect
import os
import re
import signal
import sys
import threading
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import HELPERS, LIMIT, ROOT, environment, run, summary
from PIL import Image
from threadpoolctl import threadpool_info

import distrib
from distrib import UserError, models
from distrib.config import Config
from distrib.data import dataset
from distrib.trainer import Trainer
from nn.layers import ConvBN, Dropout, GlobalMaxPool, Linear, Sequential
from nn.models import lenet

NET = """
from nn.layers import *

def net(shape, classes):
    return Sequential(ConvBN(4, pool=2), Dropout(0.1), ConvBN(4), GlobalMaxPool(), Linear(classes))
"""
GUIDE = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.S)


def net(shape, classes):
    return Sequential(ConvBN(4, pool=2), Dropout(0.1), ConvBN(4), GlobalMaxPool(), Linear(classes))


def arrays(images: int = 60, side: int = 6) -> tuple[np.ndarray, ...]:
    """Coloured noise in three classes, told apart by their brightest channel."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, images)
    x = rng.integers(0, 200, (images, side, side, 3))
    x[np.arange(images), :, :, y] += 50
    x = x.astype(np.uint8)
    return x[:-20], y[:-20], x[-20:], y[-20:]


def fit(*model: Any, data: Any = None, **options: Any) -> distrib.Trained:
    """A short silent training on few images."""
    options = {"epochs": 2, "batch_size": 8, "progress": False, **options}
    return distrib.fit(*(model or (net,)), arrays() if data is None else data, **options)


def pictures(folder: Path, side: int = 12) -> Path:
    """A folder of coloured pictures by class."""
    x, y, *test = arrays(44, side)
    for part, images, labels in (("train", x, y), ("test", *test)):
        for number, (image, label) in enumerate(zip(images, labels)):
            place = folder / "pictures" / part / ("red", "green", "blue")[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{number}.png")
    return folder / "pictures"


def digest(trained: distrib.Trained) -> str:
    assert trained.summary is not None
    return str(trained.summary["parameter_digest"])


@pytest.mark.quick
def test_a_result_has_summary_network_and_answers() -> None:
    x, _, *test = data = arrays()
    lines: list[dict[str, Any]] = []
    trained = fit(data=data, on_epoch=lines.append)
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[-1]["test_accuracy"] == trained.summary["test_accuracy"]
    assert trained.summary["finished"]
    assert trained.summary["steps"] == 10
    found = trained.evaluate(tuple(test))
    assert found == trained.evaluate(data) == trained.evaluate(dataset.make("same", data[:2], data[2:]))
    assert {name: pytest.approx(value) for name, value in found.items()} == {
        name: trained.summary[name] for name in ("test_loss", "test_accuracy")
    }
    right = (trained.predict(test[0]) == test[1]).mean()
    assert 100 * right == pytest.approx(trained.summary["test_accuracy"])
    assert trained.probabilities(x).sum(1) == pytest.approx(np.ones(len(x)))
    assert trained.predict(x[:0]).shape == (0,)
    assert trained.class_names == ["0", "1", "2"]
    assert trained.network.shape == (6, 6, 3)


@pytest.mark.quick
def test_every_option_of_the_command_line_is_a_keyword() -> None:
    own = inspect.signature(distrib.fit).parameters
    for each in fields(Config):
        if each.name not in own:
            fit(**{each.name: None})  # taken, and left at its default


@pytest.mark.quick
def test_a_run_without_a_folder_is_that_with_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"validation": 0.2, "keep_best": True, "average": 0.5, "flip": True, "epochs": 3}
    without = fit(**options)
    assert not list(tmp_path.iterdir())
    kept = fit(**options, run_dir="run")
    assert digest(without) == digest(kept)
    assert summary(tmp_path / "run") == kept.summary
    again = distrib.load("run", net)
    images = arrays()[2]
    assert np.array_equal(again.logits(images), without.logits(images))
    assert again.summary == kept.summary


@pytest.mark.quick
def test_twice_in_a_process_and_in_a_thread_is_the_same() -> None:
    before = threading.active_count()
    found = [digest(fit()) for _ in range(2)]
    thread = threading.Thread(target=lambda: found.append(digest(fit())))
    thread.start()
    thread.join()
    assert found[1:] == found[:-1]
    assert threading.active_count() == before


@pytest.mark.quick
def test_the_program_is_left_as_it_was() -> None:
    def state() -> list[Any]:
        handlers = [signal.getsignal(number) for number in signal.valid_signals()]
        files, drawn = len(os.listdir("/proc/self/fd")), np.random.get_state()[1].tolist()
        return [handlers, np.geterr(), sys.excepthook, dict(os.environ), files, threadpool_info(), drawn]

    fit()
    with np.errstate(all="raise"):
        before = state()
        trained = fit()
        trained.predict(arrays()[0])
        for options in ({"lr": 1e30}, {"lr": 1e30, "reproducible": True}, {"batch_norm": "shard"}):
            with pytest.raises(UserError):
                fit(**options)
        fit(reproducible=True)
        assert state() == before


@pytest.mark.quick
def test_a_function_is_named_as_a_command_would(tmp_path: Path) -> None:
    unnamed = lambda shape, classes: net(shape, classes)  # noqa: E731
    found = {models.given(each)[0] for each in (net, unnamed, partial(net), lenet)}
    assert found == {f"{__file__}:net", f"{__file__}:model", "notebook.py:model", "lenet"}
    assert digest(fit(unnamed)) == digest(fit(partial(net))) == digest(fit(net))
    fit(lenet, data=arrays(side=16), run_dir=tmp_path / "ships")
    assert distrib.load(tmp_path / "ships").network.shape == (16, 16, 3)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"lr": 0}, "--lr 0: give a finite number above 0"),
        ({"lr": "0.1"}, "--lr '0.1': give float"),
        ({"batch_size": 8.5}, "--batch-size 8.5: give int"),
        ({"flip": 1}, "--flip 1: give bool"),
        ({"keep_best": True}, "--keep-best True: needs --validation above 0"),
        ({"data": "nowhere"}, "--data nowhere: no such folder or file"),
        ({"data": (1, 2, 3)}, "data: a tuple of 3: give (x_train, y_train, x_test, y_test)"),
        ({"data": {}}, "data: a dict: give (x_train"),
        ({"data": tuple(each / 255 for each in arrays())}, "arrays: training images are float64"),
        ({"data": (*(each[:5] for each in arrays()[:3]), np.arange(5))}, "test label"),
        ({"limit_train": 1000}, "--limit-train 1000: the data has only 40 images"),
        ({"split": "letters", "data": "synthetic:20x8x8x1:2"}, "--split letters: is for"),
        ({"lr": 1e30, "optimizer": "sgd"}, "the loss is "),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_mistakes_have_the_words_of_the_command_line(call: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        fit(**call)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("model", "words"),
    [
        (3, "model 3: give a name, or a function of (shape, classes)"),
        ("nothing", "--model nothing: give resnet9"),
        (lambda *_: 3, "returns int, no layer: return Sequential(…)"),
        (lambda *_: undefined, "NameError: name 'undefined' is not defined"),  # noqa: F821
        (lambda _, classes: Sequential(Linear(classes)), "Linear gets 6×6×3"),
    ],
    ids=["number", "name", "returns", "raises", "fits"],
)
def test_mistakes_in_a_network(model: Any, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        fit(model)


@pytest.mark.quick
def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="no option learning_rat"):
        fit(learning_rat=1)
    with pytest.raises(TypeError, match=r"no option batchsize: did you mean batch_size\?"):
        fit(batchsize=1)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = distrib.nothing


@pytest.mark.quick
def test_images_that_the_network_does_not_take() -> None:
    trained = fit()
    for images in (arrays()[0] / 255, arrays(side=8)[0], arrays()[0][..., 0]):
        with pytest.raises(UserError, match=re.escape("give uint8 of shape (N, 6, 6, 3)")):
            trained.predict(images)
    with pytest.raises(UserError, match="takes images of 6×6×3 and tells 3 classes apart"):
        trained.evaluate(arrays(side=8))


@pytest.mark.quick
def test_what_a_callback_raises_is_raised(tmp_path: Path) -> None:
    def stop(line: dict[str, Any]) -> None:
        raise KeyError(line["epoch"])

    with pytest.raises(KeyError) as raised:
        fit(on_epoch=stop, run_dir=tmp_path)
    assert raised.value.args == (1,)
    assert digest(fit(run_dir=tmp_path)) == digest(fit()), "the epoch was saved before"


@pytest.mark.quick
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_has_its_effect_after_a_checkpoint(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, asked = threading.Event(), []
    known = property(lambda _: asked[-1], lambda _, value: (asked.append(value), value and heard.set()))
    monkeypatch.setattr(Trainer, "stop_requested", known, raising=False)

    def effect(*_: object) -> None:
        raise KeyboardInterrupt

    def send(_: object) -> None:
        signal.raise_signal(number)
        assert heard.wait(LIMIT)

    before = signal.signal(number, effect)
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(on_epoch=send, run_dir=tmp_path)
        assert not summary(tmp_path)["finished"]
        assert 5 < summary(tmp_path)["steps"] < 10
    finally:
        signal.signal(number, before)
    assert digest(fit(run_dir=tmp_path)) == digest(fit())


@pytest.mark.quick
def test_files_for_other_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.numpy import load_file

    trained = fit()
    trained.export(tmp_path / "net.safetensors")
    state = trained.network.state_dict()
    read = load_file(tmp_path / "net.safetensors")
    assert {name: value.tobytes() for name, value in read.items()} == {
        name: value.tobytes() for name, value in state.items()
    }
    with pytest.raises(UserError, match="an unknown ending"):
        trained.export(tmp_path / "net.h5")
    distrib.Trained(trained.summary, trained._loaded, 1).export(tmp_path / "no" / "net.safetensors")


@pytest.mark.needs("onnx")
def test_an_onnx_file_is_checked_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = fit()
    trained.export(tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx").stat().st_size > 1000
    monkeypatch.setattr(distrib.export, "compare", lambda *_: (1e-3, 0))
    with pytest.raises(UserError, match="nothing was written"):
        trained.export(tmp_path / "wrong.onnx")
    assert not (tmp_path / "wrong.onnx").exists()


SCRIPT = (
    "import distrib\n"
    + NET
    + """
data = "pictures"
options = dict(epochs=2, batch_size=8, size="12", seed=3, lr=0.01, validation=0.1)
trained = distrib.fit(net, data, run_dir="api", progress=False, **options)
print(trained.evaluate(data), trained.summary["parameter_digest"])
trained.export("net.safetensors")
"""
)
OPTIONS = ("--data", "pictures", "--epochs", 2, "--batch-size", 8, "--size", 12, "--seed", 3, "--lr", 0.01)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_short_script_does_what_the_command_line_does(ranks: int, tmp_path: Path) -> None:
    assert len(SCRIPT.strip().splitlines()) <= 25
    pictures(tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "net.py").write_text(NET)
    done = run("script.py", cwd=tmp_path, ranks=ranks)
    model = ("--model", "net.py:net", *OPTIONS, "--validation", 0.1)
    run("-m", "distrib.train", "--run-dir", "cli", *model, cwd=tmp_path, ranks=ranks)
    api, cli = summary(tmp_path / "api"), summary(tmp_path / "cli")
    assert api["parameter_digest"] == cli["parameter_digest"]
    assert api["world_size"] == ranks
    lines = done.stdout.splitlines()
    assert len(lines) == ranks
    assert lines[0] == lines[-1]
    assert f"'test_accuracy': {api['test_accuracy']}" in lines[0]
    assert (tmp_path / "net.safetensors").is_file()


def test_a_program_and_a_command_resume_each_other(tmp_path: Path) -> None:
    pictures(tmp_path)
    (tmp_path / "net.py").write_text(SCRIPT)
    half = SCRIPT.replace("validation=0.1", "validation=0.1, max_steps=4")
    (tmp_path / "other" / "net.py").parent.mkdir()
    (tmp_path / "other" / "net.py").write_text(half)
    run("net.py", cwd=tmp_path)
    (tmp_path / "api").rename(tmp_path / "whole")
    run("other/net.py", cwd=tmp_path)
    assert not summary(tmp_path / "api")["finished"]
    (tmp_path / "plain.py").write_text(NET)
    (tmp_path / "net.py").write_text(NET)
    command = ("-m", "distrib.train", "--run-dir", "api", *OPTIONS, "--validation", 0.1, "--model")
    other = run(*command, "plain.py:net", cwd=tmp_path, check=False)
    assert other.returncode == 2
    assert "holds a run with other settings: --model plain.py:net" in other.stderr
    done = run(*command, "net.py:net", cwd=tmp_path)
    assert "resuming from" in done.stdout
    assert "model file: " in done.stdout, "the file of that name is another one"
    finished = [summary(tmp_path / name)["parameter_digest"] for name in ("api", "whole")]
    assert finished[0] == finished[1]


AMONG = """
import sys
import numpy as np
from mpi4py import MPI
hook, world = sys.excepthook, MPI.COMM_WORLD
from test_api import *
half = world.Split(world.rank % 2)
mine = np.full(3, world.rank, float)
request = world.Iallreduce(MPI.IN_PLACE, mine)  # under way all the time
together = fit(epochs=1)
parts = fit(epochs=1, comm=half)
assert parts.summary["world_size"] == 2 and together.summary["world_size"] == 4
def fails(line): raise KeyError("planted")
for raised, options in ((KeyError, {"on_epoch": fails}), (UserError, {"lr": -1}), (UserError, {"lr": 1e30})):
    with pytest.raises(raised):
        fit(**options)
request.Wait()
assert mine.tolist() == [6.0] * 3
assert world.allreduce(1) == 4 and half.allreduce(1) == 2
assert sys.excepthook is hook
digests = set(world.allgather(digest(together))), set(world.allgather(digest(parts)))
assert [len(each) for each in digests] == [1, 1], digests
print("left as it was", flush=True)
"""


def test_inside_a_program_that_uses_mpi() -> None:
    done = run("-c", AMONG, ranks=4, env=HELPERS)
    assert done.stdout.count("left as it was") == 4


def test_what_one_rank_alone_raises_ends_the_job(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import distrib, os\nfrom nn.models import mlp\n"
        "def fails(line):\n"
        "    if os.environ['OMPI_COMM_WORLD_RANK'] == '1': raise KeyError('planted')\n"
        "distrib.fit(mlp, 'synthetic:100x8x8x1:3', epochs=9, width=0.1, progress=False, run_dir='run',"
        " on_epoch=fails, timeout=20.0)\n"
        "print('went on')\n"
    )
    done = run("script.py", cwd=tmp_path, ranks=2, check=False)
    assert done.returncode not in (0, 2)
    assert "went on" not in done.stdout
    assert re.search(r"rank 1 on .* failed at step 1\d: KeyError: 'planted'", done.stderr)


def test_numpy_imported_before_gets_one_blas_thread_a_rank(tmp_path: Path) -> None:
    code = (
        "import os\nfor name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS'): os.environ.pop(name, None)\n"
        "import numpy, threadpoolctl\n"
        "def threads(): return max(each['num_threads'] for each in threadpoolctl.threadpool_info())\n"
        "before = threads()\n"
        "import distrib\n"
        "found = []\n"
        "distrib.fit('mlp', 'synthetic:100x8x8x1:3', epochs=1, width=0.1, progress=False,"
        " on_epoch=lambda _: found.append(threads()))\n"
        "assert threads() == before and found == [1], (before, found, threads())\n"
        "with distrib.connect(): found.append(threads())\n"
        "assert threads() == before and found == [1, 1], (before, found, threads())\n"
    )
    run("-c", code, ranks=2)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_guides_examples(ranks: int, tmp_path: Path) -> None:
    pictures(tmp_path, side=32)
    assert len(GUIDE) >= 2
    (tmp_path / "guide.py").write_text("\n".join(GUIDE))
    done = run("guide.py", cwd=tmp_path, ranks=ranks)
    assert done.stdout.count("'test_accuracy'") == ranks
    assert (tmp_path / "own.onnx").is_file()


@pytest.mark.needs("notebook")
def test_in_a_notebook(tmp_path: Path) -> None:
    import nbclient
    import nbformat

    pictures(tmp_path, side=32)
    cells = [nbformat.v4.new_code_cell(code) for code in (*GUIDE, "print(trained.network.shape)")]
    book = nbformat.v4.new_notebook(cells=cells)
    client = nbclient.NotebookClient(
        book, timeout=LIMIT, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    os.environ.update({"PYTHONPATH": environment()["PYTHONPATH"], "OMP_NUM_THREADS": "1"})
    client.execute()
    said = "".join(output.get("text", "") for cell in book.cells for output in cell.outputs)
    assert "'test_accuracy'" in said
    assert said.endswith("(32, 32, 3)\n")
