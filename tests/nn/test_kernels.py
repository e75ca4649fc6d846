"""Every operation on the kernels against the plain one that it stands for: results, and what it does to its
arguments.

The kernels' CUDA sources run on the CPU here; on a GPU `make test-gpu` runs the same cases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cuda_double import HostModule
from cudnn_double import from_bf16, to_bf16
from device_double import REAL, DoubleBackend, device, double_only, needs_device
from test_functional import on_ranks

from distrib.data import sampler
from nn.array import OPS
from nn.buffers import Buffers
from nn.cuda.kernels import ELEMENTS, KEEP, SCALARS, SMALL_ROWS, Kernels, argument, signatures
from nn.cuda.ops import LOSS_NUMBERS, CudaOps, rows_of
from nn.device import NUMPY
from nn.ops import activation, bf16, dropout, flatten, linear, pool, residual, tree, update
from nn.ops import loss as losses
from nn.ops import norm as F
from nn.ops.batch import LABELS, Source, gather_batch, gather_keys
from nn.ops.conv import Geometry, conv_backward, conv_forward

pytestmark = needs_device

BOUND = {"float64": 1e-12, "float32": 4e-6, "bfloat16": 2**-7}
"""Of the largest value of an array. bfloat16 rounds to 2^-9 of a value, here up to twice in a row."""

DTYPE = {"float64": "float64", "float32": "float32", "bfloat16": "uint16"}
PARAMETERS = {"float64": "float64", "float32": "float32", "bfloat16": "float32"}
TESTED: set[str] = set()


class Both:
    """The same arrays twice: float64 on the host for the plain operation, and on the device in the type under
    test.

    Values are rounded to that type first, so that both sides start from the same numbers.
    """

    def __init__(self, element: str, backend: DoubleBackend, seed: int = 0) -> None:
        self.element, self.backend, self.rng = element, backend, np.random.default_rng(seed)
        self.buffers = Buffers(NUMPY, "float64"), Buffers(backend, DTYPE[element])
        self.pairs: dict[str, tuple[np.ndarray, Any]] = {}

    def add(self, name: str, values: Any, real: bool = False) -> None:
        """Activations, or with `real` what has the type of parameters."""
        values = np.asarray(values, "float64")
        if self.element == "bfloat16" and not real:
            bits = to_bf16(values.astype("float32"))
            self.pairs[name] = from_bf16(bits).astype("float64"), self.backend.xp.asarray(bits)
        else:
            typed = values.astype(PARAMETERS[self.element])
            self.pairs[name] = typed.astype("float64"), self.backend.xp.asarray(typed)

    def exact(self, name: str, values: np.ndarray) -> None:
        """Integers and the like, of one type on both sides."""
        self.pairs[name] = values.copy(), self.backend.xp.asarray(values)

    def clear(self, name: str, where: np.ndarray) -> None:
        """Write 0 to some values: none on the double, few on a GPU, so that a test still means something."""
        assert where.mean() <= 1e-3 * REAL, "rounding moved a value across the gate: take another seed"
        expected, found = self.pairs[name]
        host = np.array(self.backend.to_host(found))
        expected[where], host[where] = 0, 0
        self.pairs[name] = expected, self.backend.xp.asarray(host)

    def __getitem__(self, side: int) -> Callable[[str], Any]:
        return lambda name: self.pairs[name][side] if name in self.pairs else None

    def found(self, array: Any) -> np.ndarray:
        host = self.backend.to_host(array)
        return (from_bf16(host) if host.dtype == np.uint16 else host).astype("float64")

    def check(self, *names: str, bound: float | None = None) -> None:
        for name in names:
            self.near(name, *self.pairs[name], bound)

    def near(self, name: str, expected: np.ndarray, found: Any, bound: float | None = None) -> None:
        apart = np.abs(self.found(found) - expected).max(initial=0)
        limit = (BOUND[self.element] if bound is None else bound) * max(
            np.abs(expected).max(initial=0), 1e-30
        )
        assert apart <= limit, f"{name}: {apart:.3g} apart, {limit:.3g} allowed"


ORDER = {"float32": "forward", "float64": "reverse", "bfloat16": "shuffled"}
"""Of the blocks and threads of a kernel, by element type: no order alone shows every race."""


@pytest.fixture(params=ELEMENTS)
def both(request: pytest.FixtureRequest) -> Iterator[Both]:
    with device(races=True, order=ORDER[request.param]) as backend:
        yield Both(request.param, backend)


SHAPES = [(2, 6, 6, 8), (3, 7, 5, 5), (1, 3, 3, 40), (5, 2, 4, 1), (2, 28, 28, 3)]
LARGE = (3, 36, 31, 33)  # 3348 rows: more than one block, and two groups of channels
IN_PARTS = (*SHAPES[:2], LARGE)


def norm_case(
    both: Both, shape: tuple[int, ...], pool: bool, relu: bool, residual: bool
) -> tuple[tuple[int, ...], dict]:
    n, h, w, c = shape
    out = (n, h // 2, w // 2, c) if pool else shape
    rng = both.rng
    both.add("z", rng.normal(1.5, 2, shape))
    both.add("gamma", rng.normal(0, 1, c), real=True)
    both.add("beta", rng.normal(0, 1, c), real=True)
    both.add("mean", rng.normal(0, 1, c), real=True)
    both.add("var", rng.uniform(0.5, 2, c), real=True)
    both.add("y", np.full(out, np.nan))
    for name in ("dy", "part"):  # their sum is exact in bfloat16
        both.add(name, np.clip(np.round(32 * rng.normal(0, 1, out)), -128, 128) / 32)
    both.add("dgamma", np.full(c, np.nan), real=True)
    both.add("dbeta", np.full(c, np.nan), real=True)
    if residual:
        both.add("residual", rng.normal(0, 1, shape))
    return out, {"relu": relu, "pool": pool}


def norm_of(a: Callable[[str], Any]) -> F.Norm:
    return F.Norm(a("gamma"), a("beta"), a("mean"), a("var"))


KINDS = [
    (False, True, False),
    (True, True, False),
    (False, True, True),
    (False, False, False),
    (True, False, False),
    (False, False, True),
]


@pytest.mark.parametrize(
    ("shape", "parts"), [*((shape, 1) for shape in (*SHAPES, LARGE)), *((shape, 2) for shape in IN_PARTS)]
)
@pytest.mark.parametrize(("pool", "relu", "residual"), KINDS)
def test_norm(both: Both, shape: tuple[int, ...], pool: bool, relu: bool, residual: bool, parts: int) -> None:
    """Forward and backward, one launch each for few rows, two for many; dL/dy in one part or two."""
    _, kind = norm_case(both, shape, pool, relu, residual)
    count = shape[0] * shape[1] * shape[2]
    saved, results = [], []
    for side, forward in enumerate((F.norm_forward.plain, F.norm_forward)):
        a, after = both[side], F.After(**kind, residual=both[side]("residual"))
        saved.append(forward(a("z"), norm_of(a), a("y"), after, F.Count(count), both.buffers[side]))
    both.check("y")
    both.check("mean", "var", bound=1e-6 if both.element != "float64" else None)
    expected, found = both.pairs["y"]
    # where rounding moved a value across the gate, the gradients may differ
    both.clear("dy", (expected > 0) != (both.found(found) > 0))
    for side, backward in enumerate((F.norm_backward.plain, F.norm_backward)):
        a, grads = both[side], (both[side]("dgamma"), both[side]("dbeta"))
        given = both.buffers[side], a("part") if parts > 1 else None
        dz, d_residual = backward(a("dy"), saved[side], norm_of(a), *grads, F.Count(count), *given)
        results.append(dz)
        assert d_residual is (a("dy") if residual else None)
    both.check("dgamma", "dbeta", bound={"float64": 1e-11, "float32": 2e-5, "bfloat16": 2e-5}[both.element])
    both.near("dz", *results)
    both.check("part")
    if residual:
        both.check("dy")
    small = rows_of(both.pairs["z"][0], pool) <= SMALL_ROWS * KEEP[both.element] // (4 if pool else 1)
    assert REAL or both.backend.launched == (
        ["norm_small_forward", "norm_small_backward"]
        if small
        else ["norm_statistics", "norm_apply", "norm_gradient_sums", "norm_input_gradient"]
    )
    assert small or shape != SHAPES[0]
    TESTED.update({"norm_forward", "norm_backward"})


@double_only
@pytest.mark.parametrize("sizes", [(2, 3), (4, 0, 1)])
@pytest.mark.parametrize(("pool", "relu", "residual"), KINDS[:3])
@pytest.mark.parametrize("element", ["float64", "float32"])
def test_norm_over_ranks(
    element: str, pool: bool, relu: bool, residual: bool, sizes: tuple[int, ...]
) -> None:
    """Parts of a batch, one of them empty, with sums over ranks, are the whole batch."""
    whole = (5, 6, 5, 9)
    with device() as backend:
        one = Both(element, backend)
        _, kind = norm_case(one, whole, pool, relu, residual)
        xp, stops, inside = backend.xp, np.cumsum((0, *sizes)), backend.place()
        inputs = {name: pair[1] for name, pair in one.pairs.items()}
        start = {name: inputs[name].copy() for name in inputs}

        def work(images: slice, sums: Any) -> dict[str, np.ndarray]:
            buffers = Buffers(backend, DTYPE[element])
            part = {name: xp.array(v[images] if v.ndim == 4 else v) for name, v in start.items()}
            norm, over = norm_of(part.__getitem__), F.Count(150, sums)
            after = F.After(**kind, residual=part.get("residual"))
            with inside():  # in a rank's thread
                saved = F.norm_forward(part["z"], norm, part["y"], after, over, buffers)
                dz, _ = F.norm_backward(part["dy"], saved, norm, part["dgamma"], part["dbeta"], over, buffers)
            return {name: one.found(v) for name, v in {**part, "dz": dz}.items()}

        def on_device(sums: Any) -> Any:
            def reduce(x: Any) -> None:
                host = one.found(x)
                sums(host)
                x[...] = xp.asarray(host)

            return reduce

        expected = work(slice(0, 5), None)
        parts = on_ranks(
            len(sizes), lambda rank, sums: work(slice(stops[rank], stops[rank + 1]), on_device(sums))
        )
        bound = 1e-12 if element == "float64" else 1e-5
        for name in ("y", "dz", *(["dy"] if residual else [])):
            together = np.concatenate([part[name] for part in parts])
            assert np.abs(together - expected[name]).max() <= bound * np.abs(expected[name]).max(), name
        for name in ("dgamma", "dbeta"):
            assert (
                np.abs(sum(part[name] for part in parts) - expected[name]).max()
                <= bound * np.abs(expected[name]).max()
            )
        for name in ("mean", "var"):
            assert all(np.abs(part[name] - expected[name]).max() <= bound for part in parts), name


@pytest.mark.parametrize("shape", [*SHAPES, LARGE])
@pytest.mark.parametrize(("pool", "relu", "residual"), KINDS)
def test_norm_inference(both: Both, shape: tuple[int, ...], pool: bool, relu: bool, residual: bool) -> None:
    _, kind = norm_case(both, shape, pool, relu, residual)
    for side, run in enumerate((F.norm_inference.plain, F.norm_inference)):
        a = both[side]
        run(a("z"), norm_of(a), a("y"), F.After(**kind, residual=a("residual")), both.buffers[side])
    both.check("y", "mean", "var")
    TESTED.add("norm_inference")


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("shape", [(5, 3, 3, 16), (1, 7, 5, 40), (3, 1, 1, 3), (0, 2, 2, 3)])
def test_global_pool(both: Both, shape: tuple[int, ...], average: bool) -> None:
    both.add("x", both.rng.integers(0, 6, shape))  # many equal maxima
    pooled = shape[0], shape[3]
    both.add("dy", both.rng.normal(0, 1, pooled), real=True)
    both.add("y", np.full(pooled, np.nan), real=True)
    both.add("dx", np.full(shape, np.nan))
    for i, (forward, backward) in enumerate(
        (
            (pool.global_pool_forward.plain, pool.global_pool_backward.plain),
            (pool.global_pool_forward, pool.global_pool_backward),
        )
    ):
        a = both[i]
        forward(a("x"), a("y"), average)
        backward(a("dy"), a("x"), a("y"), a("dx"), both.buffers[i], average)
    both.check("y", "dx", "x", "dy")
    TESTED.update({"global_pool_forward", "global_pool_backward"})


@pytest.mark.parametrize(("n", "c", "k"), [(5, 16, 10), (1, 40, 300), (3, 3, 4), (0, 3, 2)])
def test_linear(both: Both, n: int, c: int, k: int) -> None:
    for name, shape in {"x": (n, c), "w": (k, c), "b": (k,), "dy": (n, k)}.items():
        both.add(name, both.rng.normal(0, 1, shape), real=True)
    for name, shape in {"y": (n, k), "dw": (k, c), "db": (k,), "dx": (n, c)}.items():
        both.add(name, np.full(shape, np.nan), real=True)
    for i, (forward, backward) in enumerate(
        (
            (linear.linear_forward.plain, linear.linear_backward.plain),
            (linear.linear_forward, linear.linear_backward),
        )
    ):
        a = both[i]
        forward(a("x"), a("w"), a("b"), a("y"))
        backward(a("dy"), a("x"), a("w"), a("dw"), a("db"), a("dx"))
    both.check("y", "dw", "db", "dx", "x", "w", "b", "dy")
    TESTED.update({"linear_forward", "linear_backward"})


@pytest.mark.parametrize("shape", [(3, 5, 4, 7), (0, 2, 2, 3)])
def test_add_relu(both: Both, shape: tuple[int, ...]) -> None:
    for name in ("x", "residual", "dy"):
        both.add(name, both.rng.normal(0, 1, shape))
    for name in ("y", "d_residual"):
        both.add(name, np.full(shape, np.nan))
    for i, (forward, backward) in enumerate(
        (
            (residual.add_relu_forward.plain, residual.add_relu_backward.plain),
            (residual.add_relu_forward, residual.add_relu_backward),
        )
    ):
        a = both[i]
        saved = forward(a("x"), a("residual"), a("y"), both.buffers[i])
        backward(a("dy"), saved, a("d_residual"))
    both.check("y", "dy", "d_residual", "x", "residual")
    expected, _ = both.pairs["dy"]
    assert not expected.size or (0 < (expected == 0).mean() < 1)
    TESTED.update({"add_relu_forward", "add_relu_backward"})


@pytest.mark.parametrize(("loss", "smoothing"), [*((loss, 0.0) for loss in losses.LOSSES), ("ce", 0.1)])
@pytest.mark.parametrize(("n", "k"), [(1, 10), (8, 10), (300, 10), (0, 10), (9, 1000)])
def test_loss(both: Both, loss: str, smoothing: float, n: int, k: int) -> None:
    rng = both.rng
    both.add("logits", rng.normal(0, 3, (n, k)) * np.where(np.arange(n) % 7 == 0, 30, 1)[:, None], real=True)
    both.exact("labels", rng.integers(0, k, n, LABELS))
    both.add("stop", [1.0], real=True)
    for name, shape in {"dlogits": (n, k), "own": (1,), "tail": (3,)}.items():
        both.add(name, np.full(shape, np.nan), real=True)
    for side, run in enumerate((losses.loss_and_gradient.plain, losses.loss_and_gradient)):
        a = both[side]
        run(
            a("logits"),
            a("labels"),
            a("stop"),
            a("dlogits"),
            a("own"),
            a("tail"),
            loss=loss,
            count=512,
            smoothing=smoothing,
        )
    both.check("dlogits", "own", "tail", "logits", "stop", bound=1e-12 if both.element == "float64" else 3e-6)
    TESTED.add("loss_and_gradient")


@double_only
def test_a_loss_without_a_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only on the double: on a GPU the context is lost."""
    monkeypatch.setitem(LOSS_NUMBERS, "third", max(LOSS_NUMBERS.values()) + 1)
    with device() as backend:
        both = Both("float32", backend)
        for name, shape in {
            "logits": (2, 3),
            "stop": (1,),
            "dlogits": (2, 3),
            "own": (1,),
            "tail": (3,),
        }.items():
            both.add(name, np.zeros(shape), real=True)
        both.exact("labels", np.zeros(2, LABELS))
        arrays = map(both[1], ("logits", "labels", "stop", "dlogits", "own", "tail"))
        with pytest.raises(RuntimeError, match="__trap"):
            losses.loss_and_gradient(*arrays, loss="third", count=2)


@pytest.mark.parametrize("warped", [False, True])
@pytest.mark.parametrize("n", [3, 0])
@pytest.mark.parametrize("shape", [(28, 28, 1), (12, 9, 3)])
def test_gather_batch(both: Both, shape: tuple[int, ...], n: int, warped: bool) -> None:
    augment = sampler.Augmentation(30, 180, flip=True, crop=2, cutout=4)  # some beyond the edges
    warps = sampler.warps(1, 2, (20, *shape[:2]), augment)
    both.exact("images", both.rng.integers(0, 256, (20, *shape), np.uint8))
    both.exact("labels", both.rng.integers(0, 1000, 20, LABELS))
    both.exact("order", both.rng.permutation(20).astype(np.int32))
    both.exact("at", np.array([2]))
    both.add("x", np.full((n, *shape), np.nan))
    both.exact("y", np.full(n, -1, LABELS))
    both.exact("warps", warps)
    for side, run in enumerate((gather_batch.plain, gather_batch)):
        a = both[side]
        source = Source(a("images"), a("labels"), a("order"), a("warps") if warped else None, 4)
        run(a("x"), a("y"), source, a("at"), 5, 1)
    both.check("x", bound=2e-5 if warped and both.element == "float32" else None)
    both.check("images", "labels", "order", "at", "y", bound=0)
    TESTED.add("gather_batch")


def test_gather_keys(both: Both) -> None:
    both.exact("source", both.rng.integers(0, 1 << 32, 20, np.uint32))
    both.exact("order", both.rng.permutation(20).astype(np.int32))
    both.exact("at", np.array([2]))
    both.exact("keys", np.zeros(4, np.uint32))
    for side, run in enumerate((gather_keys.plain, gather_keys)):
        a = both[side]
        run(a("keys"), a("source"), a("order"), a("at"), 5, 1)
    both.check("keys", bound=0)
    TESTED.add("gather_keys")


@pytest.mark.parametrize("slope", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 4, 7), (0, 2, 2, 3), (6, 40), LARGE])
def test_activation(both: Both, shape: tuple[int, ...], bias: bool, slope: float) -> None:
    if len(shape) == 2 and both.element == "bfloat16":
        return  # vectors have the type of parameters
    both.add("x", both.rng.normal(0, 1, shape))
    both.add("dy", both.rng.normal(0, 1, shape))
    both.add("y", np.full(shape, np.nan))
    if bias:
        both.add("b", both.rng.normal(0, 1, shape[-1]), real=True)
        both.add("db", np.full(shape[-1], np.nan), real=True)
    forward, backward = activation.activation_forward, activation.activation_backward
    for side, (run, back) in enumerate(((forward.plain, backward.plain), (forward, backward))):
        a = both[side]
        saved = run(a("x"), a("b"), a("y"), slope, both.buffers[side])
        assert (saved is None) == (slope == 1)
        back(a("dy"), saved, a("db"), slope, both.buffers[side])
    both.check("y", "dy", "x", *(("db", "b") if bias else ()))
    TESTED.update({"activation_forward", "activation_backward"})


def test_activation_in_place_and_nan(both: Both) -> None:
    """Infinities and NaN too: a run that diverged must not look sound."""
    x = np.array([-np.inf, -1.0, 0.0, 1.0, np.inf, np.nan]).reshape(1, 1, 2, 3)
    for slope in (0.0, 0.5):
        both.add("x", x)
        for side, run in enumerate((activation.activation_forward.plain, activation.activation_forward)):
            found = both[side]("x")
            assert run(found, None, found, slope, both.buffers[side], keep=False) is None
        low = [-np.inf, -slope] if slope else [0, 0]
        expected = np.array([*low, 0, 1, np.inf, np.nan]).reshape(x.shape)
        for values in (both.pairs["x"][0], both.found(both.pairs["x"][1])):
            np.testing.assert_array_equal(values, expected)


def test_copy(both: Both) -> None:
    both.add("x", both.rng.normal(0, 1, (3, 5, 5, 7)))
    both.add("y", np.full((3, 5, 5, 7), np.nan))
    for side, run in enumerate((activation.copy.plain, activation.copy)):
        run(both[side]("x"), both[side]("y"))
    both.check("x", "y", bound=0)
    TESTED.add("copy")


WINDOWS = [
    pool.Windows((2, 2), 2),
    pool.Windows((3, 3), 3),
    pool.Windows((3, 3), 2, 1),
    pool.Windows((2, 3), 1, 1),
    pool.Windows((1, 1), 3),
    pool.Windows((4, 5), 3, 2),
]


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("over", WINDOWS)
@pytest.mark.parametrize("shape", [(2, 7, 8, 5), (3, 12, 9, 33), (0, 6, 6, 3)])
def test_pool(both: Both, shape: tuple[int, ...], over: pool.Windows, average: bool) -> None:
    n, h, w, c = shape
    out = n, *(over.geometry().out_size(side, size) for side, size in zip((h, w), over.size)), c
    both.add("x", both.rng.integers(-3, 3, shape))  # many equal maxima
    both.add("dy", both.rng.normal(0, 1, out))
    both.add("y", np.full(out, np.nan))
    both.add("dx", np.full(shape, np.nan))
    forward, backward = pool.pool_forward, pool.pool_backward
    for side, (run, back) in enumerate(((forward.plain, backward.plain), (forward, backward))):
        a = both[side]
        winners = run(a("x"), a("y"), over, average, both.buffers[side])
        back(a("dy"), winners, over, a("dx"))
        assert run(a("x"), a("y"), over, average, both.buffers[side], keep=False) is None
    both.check("y", "dx", "x", "dy")
    TESTED.update({"pool_forward", "pool_backward"})


@pytest.mark.parametrize("shape", [(3, 5, 4, 7), (0, 2, 2, 3)])
def test_flatten(both: Both, shape: tuple[int, ...]) -> None:
    n, h, w, c = shape
    both.add("x", both.rng.normal(0, 1, shape))
    both.add("dx", np.full(shape, np.nan))
    both.add("y", np.full((n, h * w * c), np.nan), real=True)
    both.add("dy", both.rng.normal(0, 1, (n, h * w * c)), real=True)
    for side, (run, back) in enumerate(
        ((flatten.flatten.plain, flatten.unflatten.plain), (flatten.flatten, flatten.unflatten))
    ):
        a = both[side]
        run(a("x"), a("y"))
        back(a("dy"), a("dx"))
    both.check("x", "y", "dy", bound=0)
    both.check("dx")
    TESTED.update({"flatten", "unflatten"})


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("shape", [(3, 5, 4, 7), (4, 50), (0, 2, 2, 3)])
def test_dropout(both: Both, shape: tuple[int, ...], rate: float) -> None:
    """The same elements on both sides."""
    real = len(shape) == 2
    both.add("x", both.rng.uniform(1, 2, shape), real=real)
    both.add("y", np.full(shape, np.nan), real=real)
    both.exact("keys", both.rng.integers(0, 1 << 32, shape[0], np.uint32))
    for side, run in enumerate((dropout.dropout.plain, dropout.dropout)):
        a = both[side]
        run(a("x"), a("y"), a("keys"), 12345, rate, both.buffers[side])
    both.check("x", "y")
    expected, found = both.pairs["y"]
    assert ((expected == 0) == (both.found(found) == 0)).all()
    TESTED.add("dropout")


def test_add(both: Both) -> None:
    for name in ("x", "y"):
        both.add(name, both.rng.normal(0, 1, (3, 5, 5, 7)))
    for side, run in enumerate((residual.add.plain, residual.add)):
        run(both[side]("x"), both[side]("y"))
    both.check("x", "y")
    TESTED.add("add")


@double_only
def test_bfloat16_comes_two_at_once() -> None:
    """Where both arrays begin at an even element; of a vector of odd size the last one comes alone."""
    with device(races=True) as backend:
        kernels = backend.algorithms["stem"].kernels
        x, y = (backend.xp.asarray(np.arange(600, dtype=np.uint16)) for _ in range(2))
        activation.copy(x, y)  # compiles
        module = kernels._modules["bfloat16"].module

        def copied(first: int, size: int, to: int) -> int:
            y[...], before = 0, module.accesses
            activation.copy(x[first : first + size], y[to : to + size])
            found = module.accesses - before
            expected = np.zeros(600)
            expected[to : to + size] = np.arange(first, first + size)
            assert (backend.to_host(y) == expected).all()
            return found

        # g++ splits some of the stores again
        assert copied(0, 513, 0) == copied(2, 513, 4) < 0.8 * 2 * 513
        assert copied(1, 513, 0) == copied(0, 513, 1) == copied(1, 513, 1) == 2 * 513


OPTIMIZERS: list[tuple[str, list[str | None], dict]] = [  # name, moments (None: not held), options
    *(("adam", ["m", "v"], {"weight_decay": wd}) for wd in (0.0, 0.1)),
    *(("sgd", [None], {"weight_decay": wd, "momentum": 0.0, "nesterov": False}) for wd in (0.0, 0.1)),
    ("sgd", ["u"], {"weight_decay": 0.0, "momentum": 0.9, "nesterov": False}),
    ("sgd", ["u"], {"weight_decay": 0.1, "momentum": 0.9, "nesterov": True}),
]


@pytest.mark.parametrize(("name", "moments", "options"), OPTIMIZERS)
@pytest.mark.parametrize("ends", [False, True])
def test_optimizers(both: Both, name: str, moments: list[str | None], options: dict, ends: bool) -> None:
    """Several blocks, the last of which may end the step."""
    size, rng = 1000, both.rng
    both.add("values", rng.normal(0, 1, size), real=True)
    both.add("grads", rng.normal(0, 1, size) * 10.0 ** rng.integers(-9, 1, size), real=True)
    held = list(filter(None, moments))
    for state in held:
        both.add(state, rng.uniform(0, 1, size), real=True)
    both.exact("rates", np.append(np.ones((6, 2)), [[1e-2, 3e-3]], axis=0))
    both.exact("at", np.array([6]))
    both.exact("arrived", np.zeros(1, np.uint32))
    before = rng.normal(0, 1, (4, 4)).astype("float32")
    for key, results in {"history": before, "own": [3.0], "tail": [1.0, 2.0, 0.0]}.items():
        both.add(key, results, real=True)
    compute = both.backend.xp.asarray(np.zeros(size, np.uint16)) if both.element == "bfloat16" else None
    for side, run in enumerate((getattr(update, name).plain, getattr(update, name))):
        a = both[side]
        run(
            a("values"),
            a("grads"),
            *map(a, moments),
            a("rates"),
            a("at"),
            compute if side else None,
            np.zeros((2, 300)),
            **options,
            record=update.StepRecord(*map(a, ("history", "own", "tail", "arrived"))) if ends else None,
        )
    both.check("values", "grads", *held, bound=1e-14 if both.element == "float64" else 1e-6)
    both.check("rates", "at", "history", "own", "tail", "arrived", bound=0)
    assert both.pairs["at"][0] == [6 + ends]
    assert (both.pairs["history"][0][2] == ([3, 1, 2, 0] if ends else before[2])).all()
    if compute is not None:
        expected = to_bf16(both.backend.to_host(both.pairs["values"][1]))
        assert (both.backend.to_host(compute) == expected).all()
    TESTED.add(name)


def test_average(both: Both) -> None:
    both.add("mean", both.rng.normal(0, 1, 1000), real=True)
    both.add("values", both.rng.normal(0, 1, 1000), real=True)
    for side, run in enumerate((update.average.plain, update.average)):
        a = both[side]
        run(a("mean"), a("values"), np.empty((2, 100)), decay=0.75)
    both.check("mean", "values", bound=1e-12 if both.element == "float64" else 3e-7)
    TESTED.add("average")


@pytest.mark.parametrize("leaves", [1, 2, 5, 7, 8])
def test_sum_of_leaves(both: Both, leaves: int) -> None:
    """In float64 to the bit: one order of additions."""
    size, rng = 300, both.rng
    for name, shape in {"x": size, "rows": (9, size)}.items():
        both.add(name, rng.normal(0, 1, shape), real=True)
    for name in ("leaf", "total"):
        both.add(name, np.full(size, np.nan), real=True)
    both.exact("places", rng.permutation(9)[:leaves].astype(np.int32))
    for side, (put, add) in enumerate(
        ((tree.put_leaf.plain, tree.add_leaves.plain), (tree.put_leaf, tree.add_leaves))
    ):
        a = both[side]
        put(a("x"), a("leaf"), 0.3)
        add(a("rows"), a("places"), a("total"))
    both.check("x", "places", bound=0)
    both.check("leaf", "rows", "total", bound=0 if both.element == "float64" else None)
    TESTED.update({"put_leaf", "add_leaves"})


def test_narrow_and_widen() -> None:
    """To the bit, the plain versions on the host among them: ties, denormals, infinities, NaN."""
    bits = np.concatenate(
        [
            np.random.default_rng(0).integers(0, 1 << 32, 5000, np.uint64).astype(np.uint32),
            np.array(
                [
                    0x3F808000,
                    0x3F818000,
                    0x7F7FFFFF,
                    0x7F800000,
                    0xFF800000,
                    0x7F800001,
                    0x7FFFFFFF,
                    1,
                    0x80000000,
                    0x8000,
                ],
                np.uint32,
            ),
        ]
    )
    x = bits.view(np.float32)
    x = np.where(np.isnan(x), np.float32(np.nan), x)
    with device() as backend, np.errstate(invalid="ignore"):
        narrow, back = backend.xp.zeros(len(x), np.uint16), backend.xp.zeros(len(x), np.float32)
        bf16.to_bf16(backend.xp.asarray(x), narrow)
        bf16.from_bf16(narrow, back)
        on_host, back_on_host = np.zeros(len(x), np.uint16), np.zeros(len(x), np.float32)
        bf16.to_bf16.plain(x, on_host)
        bf16.from_bf16.plain(on_host, back_on_host)
        assert (backend.to_host(narrow) == on_host).all()
        assert (backend.to_host(back).view(np.uint32) == back_on_host.view(np.uint32)).all()
        finite = np.isfinite(x)
        assert (on_host[finite] == to_bf16(x[finite])).all()
        assert (np.isnan(back_on_host) == np.isnan(x)).all()
    TESTED.update({"to_bf16", "from_bf16"})


@pytest.mark.parametrize(
    "shape", [(3, 28, 28, 8), (2, 5, 7, 3), (1, 1, 1, 40), (9, 28, 28, 33), (0, 28, 28, 8)]
)
def test_stem(both: Both, shape: tuple[int, ...]) -> None:
    """The first layer's own convolution against patches, its weight gradient too."""
    n, h, w, c = shape
    g = Geometry(1, 1, 1)
    both.add("x", both.rng.random((n, h, w, 1)))
    both.add("w", both.rng.normal(0, 1, (c, 3, 3, 1)))
    both.add("dy", both.rng.normal(0, 1, shape))
    both.add("y", np.full(shape, np.nan))
    both.add("dw", np.full((c, 3, 3, 1), np.nan), real=True)
    for side, algorithm in enumerate(("patches", "stem")):
        a, buffers = both[side], both.buffers[side]
        weights, dw = (a(name).transpose(1, 2, 3, 0) for name in ("w", "dw"))
        saved = conv_forward(a("x"), weights, g, a("y"), buffers, algorithm)
        conv_backward(a("dy"), saved, weights, g, dw, None, buffers, algorithm)
    both.check("y")
    both.check("dw", bound={"float64": 1e-13, "float32": 2e-6, "bfloat16": 2e-6}[both.element])


def test_a_number_of_another_type_is_refused() -> None:
    """A kernel's own REAL, say, which is another type by element: nothing is rounded."""
    for element in ELEMENTS:
        kinds = {kind for types in signatures(element).values() for kind, pointer in types if not pointer}
        assert kinds <= set(SCALARS)
    with pytest.raises(KeyError, match="float"):
        argument(0.5, ("float", False))


def test_every_operation_that_can_be_replaced_was_tested() -> None:
    """Runs last in this file; where it is picked alone there is nothing to say."""
    names = set(CudaOps(Kernels(HostModule)).by_name())
    assert set(LOSS_NUMBERS) == set(losses.LOSSES), "a loss has no kernel, or the other way round"
    assert names == set(OPS), "an operation has no version on a GPU, or the other way round"
    if TESTED:
        assert names == TESTED
