"""The model of `distrib scale`: what a step takes on any number of ranks, fitted to those that were measured.

A step of p ranks with n local images each takes, in seconds,

    T(p, n) = C + ω·g(p)·C + S(p) + max(e·R(p), R(p) − f·C)        C = a + b·n·(1 + κ·(k − 1)/(full − 1))

with C the compute, slower by κ where all cores of a host compute, k of `full`; ω·g·C the wait for the slowest rank, g(p)
the expected greatest of p standard normals (Blom 1958); S batch norm's sums; R those of the gradient, of which the share
1 − e hides behind the backward, never longer than that lasts, f·C. All-reduces of m bytes in all, r ranks a host, have a
tree's latencies and a ring's bytes (Patarasuk and Yuan 2009) at the slowest level's bandwidth:
number·(α_host·log2(min(p, r)) + α_net·log2(max(1, p/r))) + 2(p − 1)/p · m/β.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

MOST_RANKS = 4096


@dataclass(frozen=True)
class Level:
    latency: float  # seconds
    per_byte: float  # seconds, 1/β


NET = Level(latency=5e-6, per_byte=1e-10)  # a cluster's 100 Gb/s network: 10 GB/s


class Point(NamedTuple):
    """A measured step, in seconds; sums, gradients and backward are None where a device hides them from the host."""

    ranks: int
    batch: int  # global
    step: float
    sums: float | None = None
    gradients: float | None = None
    backward: float | None = None
    hosts: int = 1
    crowded: bool = False  # more ranks than cores or GPUs

    @property
    def images(self) -> int:  # of the rank with the largest share
        return -(-self.batch // self.ranks)

    @property
    def compute(self) -> float:
        return self.step - (self.sums or 0) - (self.gradients or 0)


@dataclass(frozen=True)
class Model:
    """What a step takes; symbols as at the head of this file, times in seconds."""

    host: Level  # within one
    net: Level  # between hosts
    ranks_per_host: int  # r
    full: int  # cores or GPUs of a host
    sums: int  # all-reduces of batch norm in a step
    sum_bytes: int  # of all of them
    buckets: int
    gradient_bytes: int
    fixed: float = 0.0  # a
    image: float = 0.0  # b
    backward: float = 2 / 3  # f; two of three passes where it was not measured
    exposed: float = 1.0  # e
    shared: float = 0.0  # κ
    wait: float = 0.0  # ω

    def busy(self, p: int) -> float:  # of the other cores of a host
        return min(1.0, (min(p, self.ranks_per_host) - 1) / max(1, self.full - 1))

    def all_reduce(
        self, p: int, calls: int, nbytes: float
    ) -> float:  # seconds of `calls` of them, of `nbytes` in all
        r = min(p, self.ranks_per_host)
        latency = self.host.latency * math.log2(r) + self.net.latency * math.log2(p / r)
        return calls * latency + 2 * (p - 1) / p * nbytes * max(
            self.host.per_byte * (r > 1), self.net.per_byte * (p > r)
        )

    def parts(self, p: int, n: int) -> dict[str, float]:  # seconds of a step by what they go to
        compute = self.fixed + self.image * n * (1 + self.shared * self.busy(p))
        ring = self.all_reduce(p, self.buckets, self.gradient_bytes)
        return {
            "compute": compute,
            "waiting": self.wait * greatest(p) * compute,
            "sums": self.all_reduce(p, self.sums, self.sum_bytes),
            "gradients": max(self.exposed * ring, ring - self.backward * compute),
        }

    def step(self, p: int, n: int) -> float:
        return sum(self.parts(p, n).values())

    def at(self, point: Point) -> Model:  # with as many ranks a host as the point had
        return replace(self, ranks_per_host=-(-point.ranks // point.hosts))


def greatest(p: int) -> float:  # g(p): the expected greatest of p standard normals, 0 for one
    return statistics.NormalDist().inv_cdf((p - 0.375) / (p + 0.25))


def least_squares(columns: list[list[float]], y: list[float], size: list[float]) -> list[float]:
    """The x ≥ 0 that minimises Σ ((columns·x − y) / size)²: the best over all sets of columns that give no negative."""
    a, goal = np.array(columns, float) / np.array(size)[:, None], np.array(y) / np.array(size)
    length = np.linalg.norm(a, axis=0)
    best, least, names = np.zeros(a.shape[1]), float(goal @ goal), np.flatnonzero(length)
    for chosen in (list(c) for k in range(1, len(names) + 1) for c in combinations(names, k)):
        x = np.zeros(a.shape[1])
        x[chosen] = np.linalg.lstsq(a[:, chosen] / length[chosen], goal, rcond=None)[0] / length[chosen]
        if x.min() >= 0 and (error := float(np.sum((a @ x - goal) ** 2))) < least:
            best, least = x, error
    return [float(value) for value in best]


def fit(points: list[Point], bare: Model) -> Model:
    """`bare` with a, b, κ, f, e and ω from the points but the crowded: least squares of errors relative to the step."""
    used = [q for q in points if not q.crowded]
    many, split = [q for q in used if q.ranks > 1], used[0].sums is not None
    rows = [q for q in used if split or q.ranks == 1]
    several, seconds, steps = (
        float(len({q.images for q in rows}) > 1),
        [q.compute for q in rows],
        [q.step for q in many],
    )
    columns = [
        [several, q.images, q.images * bare.at(q).busy(q.ranks)] for q in rows
    ]  # one n cannot tell a from b
    a, b, more = least_squares(columns, seconds, seconds)
    model = replace(bare, fixed=a, image=b, shared=more / b if b else 0.0)
    if split:
        model = replace(model, backward=statistics.mean((q.backward or 0) / q.compute for q in used))
    known = {q: model.at(q).parts(q.ranks, q.images) for q in many}  # with e = 1 and ω = 0 so far
    lost = {q: q.step - (q.compute if split else known[q]["compute"]) for q in many}
    free = [
        q for q in many if 0 < known[q]["gradients"] <= model.backward * known[q]["compute"]
    ]  # all could hide
    if free:
        left = [lost[q] - known[q]["sums"] if q.gradients is None else q.gradients for q in free]
        model = replace(
            model,
            exposed=min(
                1.0, *least_squares([[known[q]["gradients"]] for q in free], left, [q.step for q in free])
            ),
        )
    if many:
        excess = [
            lost[q] - known[q]["sums"] - model.at(q).parts(q.ranks, q.images)["gradients"] for q in many
        ]
        model = replace(
            model,
            wait=least_squares([[greatest(q.ranks) * known[q]["compute"]] for q in many], excess, steps)[0],
        )
    return model


def left_out(points: list[Point], point: Point, bare: Model) -> float | None:
    """The point's relative error when the model is fitted to the others; None where those cannot tell all of it."""
    others = [q for q in points if q != point and not q.crowded]
    if point.crowded or point.ranks == 1 or all(q.ranks == 1 for q in others):
        return None
    return fit(others, bare).at(point).step(point.ranks, point.images) / point.step - 1


def predict(model: Model, batch: int, weak: bool) -> Iterator[dict[str, Any]]:
    """Rows for 1, 2, 4, … MOST_RANKS ranks: `batch` images each if `weak`, else in all, as long as each rank has one."""
    one = batch / model.step(1, batch)
    for p in (1 << i for i in range(MOST_RANKS.bit_length())):
        whole = batch * p if weak else batch
        if whole >= p:
            parts = model.parts(p, -(-whole // p))
            step = sum(parts.values())
            yield {
                "ranks": p,
                "batch_size": whole,
                "images_per_second": whole / step,
                "step_ms": 1e3 * step,
                "efficiency": whole / step / p / one,
                "communication": 1 - parts["compute"] / step,
                "parts_ms": {name: 1e3 * seconds for name, seconds in parts.items()},
            }


def levels(results: list[dict[str, Any]], net: Level) -> tuple[Level, Level, dict[str, str]]:
    """(within a host, between hosts, where each comes from), from results of `bench allreduce`; `net` where none is of several hosts."""
    host, source = (
        None,
        {
            "host": "not measured, no two ranks shared a host: taken as between hosts",
            "net": "assumed, not measured",
        },
    )
    for name in ("host", "net"):
        rows, seconds = [], []
        for r in (r for r in results if (r["hosts"] > 1) == (name == "net")):
            within = (
                host.latency * math.log2(r["ranks"] / r["hosts"]) if host else 0.0
            )  # on one host `host` is still None
            rows += [
                [
                    math.log2(r["hosts"] if name == "net" else r["ranks"]),
                    2 * (1 - 1 / r["ranks"]) * size["bytes"],
                ]
                for size in r["sizes"]
            ]
            seconds += [max(1e-9, statistics.median(size["seconds"]) - within) for size in r["sizes"]]
        if rows:
            found = least_squares(rows, seconds, seconds)
            host, net = (host, Level(*found)) if name == "net" else (Level(*found), net)
            errors = np.abs(np.array(rows) @ found / seconds - 1)
            source[name] = (
                f"{len(rows)} measured all-reduces, error {np.median(errors):.0%} in the middle, {errors.max():.0%} at worst"
            )
    return host or net, net, source
