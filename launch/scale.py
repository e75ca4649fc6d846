"""`distrib scale`: strong and weak scaling measured on the ranks at hand, and a model fitted to it that predicts more.

A step of p ranks with n local images each takes, in seconds,

    T(p, n) = C(n) + ω·g(p)·C(n) + S(p) + max(e·R(p), R(p) − f·C(n))        C(n) = a + b·n

with C the compute; ω·g·C the wait for the slowest rank, g(p) the expected greatest of p standard normals
(Blom 1958); S the sums of batch norm; R those of the gradient, of which the share 1 − e hides behind the backward,
at most as long as that lasts, f·C. `calls` all-reduces of m bytes in all take

    calls · (α_host·log2(min(p, r)) + α_net·log2(max(1, p/r))) + 2(p − 1)/p · m/β

with r ranks a host: latencies of a tree, bytes of a ring (Patarasuk and Yuan 2009) at the slowest level's bandwidth β.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from distrib import __version__, launched_ranks
from distrib.config import build
from distrib.errors import EXIT_USAGE, UserError
from launch import plots
from launch.bench_run import mpirun
from launch.doctor import devices
from launch.measure import AsJson, Width, child_environment, machine, spread
from nn.resnet9 import ResNet9

MPIRUN = "mpirun -n {ranks}"
MOST_RANKS = 4096
PREDICTED = ("ranks", "batch", "images/s", "step ms", "efficiency", "communication")
MEASURED = (*PREDICTED, "model ms", "error", "left out")


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
    def images(self) -> int:
        """Of the rank with the largest share."""
        return -(-self.batch // self.ranks)


class Level(NamedTuple):
    """A level of the machine."""

    latency: float  # seconds
    per_byte: float  # seconds, 1/β


@dataclass(frozen=True)
class Model:
    """What a step takes; symbols as at the head of this file, times in seconds."""

    host: Level
    net: Level
    ranks_per_host: int  # r
    sums: int  # all-reduces of batch norm in a step
    sum_bytes: int  # of all of them
    buckets: int
    gradient_bytes: int
    fixed: float = 0.0  # a
    image: float = 0.0  # b
    backward: float = 2 / 3  # f; two of three passes where it was not measured
    exposed: float = 1.0  # e
    wait: float = 0.0  # ω

    def compute(self, n: int) -> float:
        return self.fixed + self.image * n

    def all_reduce(self, p: int, calls: int, nbytes: float) -> float:
        """Seconds of `calls` all-reduces of `nbytes` in all."""
        r = min(p, self.ranks_per_host)
        slowest = max([0.0, *[self.host.per_byte] * (r > 1), *[self.net.per_byte] * (p > r)])
        latency = self.host.latency * math.log2(r) + self.net.latency * math.log2(p / r)
        return calls * latency + 2 * (p - 1) / p * nbytes * slowest

    def parts(self, p: int, n: int) -> dict[str, float]:
        """Seconds of a step by what they go to."""
        compute, ring = self.compute(n), self.all_reduce(p, self.buckets, self.gradient_bytes)
        return {
            "compute": compute,
            "waiting": self.wait * greatest(p) * compute,
            "sums": self.all_reduce(p, self.sums, self.sum_bytes),
            "gradients": max(self.exposed * ring, ring - self.backward * compute),
        }

    def step(self, p: int, n: int) -> float:
        return sum(self.parts(p, n).values())

    def at(self, point: Point) -> Model:
        """This model with as many ranks a host as the point had."""
        return replace(self, ranks_per_host=-(-point.ranks // point.hosts))


def greatest(p: int) -> float:
    """g(p): the expected greatest of p standard normals, 0 for one."""
    return NormalDist().inv_cdf((p - 0.375) / (p + 0.25))


def least_squares(columns: list[list[float]], y: list[float], size: list[float]) -> list[float]:
    """The x ≥ 0 that minimises Σ ((columns·x − y) / size)²: the best over all sets of columns that give no negative."""
    a, goal = np.array(columns, float) / np.array(size)[:, None], np.array(y) / np.array(size)
    length = np.linalg.norm(a, axis=0)
    best, least, names = np.zeros(a.shape[1]), float(goal @ goal), np.flatnonzero(length)
    for chosen in (list(c) for k in range(1, len(names) + 1) for c in combinations(names, k)):
        x = np.zeros(a.shape[1])
        x[chosen] = np.linalg.lstsq(a[:, chosen] / length[chosen], goal, rcond=None)[0] / length[chosen]
        error = float(np.sum((a @ x - goal) ** 2))
        if x.min() >= 0 and error < least:
            best, least = x, error
    return [float(value) for value in best]


def fit_level(rows: list[tuple[float, float, float]]) -> Level:
    """From (log2 of the members, 2(p − 1)/p · bytes, seconds) of all-reduces; errors count relative to the seconds."""
    seconds = [t for *_, t in rows]
    return Level(*least_squares([[steps, ring] for steps, ring, _ in rows], seconds, seconds))


def fit(points: list[Point], bare: Model) -> Model:
    """`bare` with a, b, f, e and ω from the points but the crowded: least squares of errors relative to the step."""
    used = [q for q in points if not q.crowded]
    many, split = [q for q in used if q.ranks > 1], all(q.sums is not None for q in used)
    rows = [(q.images, q.step - (q.sums or 0) - (q.gradients or 0)) for q in used if split or q.ranks == 1]
    several, seconds = float(len({n for n, _ in rows}) > 1), [c for _, c in rows]  # one n cannot tell a from b
    fixed, image = least_squares([[several, n] for n, _ in rows], seconds, seconds)
    model = replace(bare, fixed=fixed, image=image)
    if split:
        model = replace(model, backward=statistics.mean((q.backward or 0) / c for q, c in zip(used, seconds, strict=True)))
    alone = {q: model.at(q).all_reduce(q.ranks, model.buckets, model.gradient_bytes) for q in many}
    free = [q for q in many if 0 < alone[q] <= model.backward * model.compute(q.images)]  # all could hide
    if free:
        left = [q.step - model.at(q).step(q.ranks, q.images) + alone[q] if q.gradients is None else q.gradients for q in free]
        model = replace(model, exposed=min(1.0, *least_squares([[alone[q]] for q in free], left, [q.step for q in free])))
    if many:  # with ω = 0 so far; measured phases keep the errors of a and b out of it
        known = [model.at(q).parts(q.ranks, q.images) for q in many]
        compute = [k["compute"] if q.sums is None else q.step - q.sums - (q.gradients or 0) for q, k in zip(many, known, strict=True)]
        excess = [q.step - c - k["sums"] - k["gradients"] for q, c, k in zip(many, compute, known, strict=True)]
        scatter = [[greatest(q.ranks) * k["compute"]] for q, k in zip(many, known, strict=True)]
        model = replace(model, wait=least_squares(scatter, excess, [q.step for q in many])[0])
    return model


def left_out(points: list[Point], point: Point, bare: Model) -> float | None:
    """The point's relative error when the model is fitted to the others; None where those cannot tell all of it."""
    others = [q for q in points if q != point and not q.crowded]
    sizes = {q.images for q in others if q.sums is not None or q.ranks == 1}
    if point.crowded or len(sizes) < 2 or (point.ranks > 1 and all(q.ranks == 1 for q in others)):
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
            yield {"ranks": p, "batch_size": whole, "images_per_second": whole / step, "step_ms": 1e3 * step,
                   "efficiency": whole / step / p / one, "communication": 1 - parts["compute"] / step,
                   "parts_ms": {name: 1e3 * seconds for name, seconds in parts.items()}}  # fmt: skip


def stored(path: Path) -> list[dict[str, Any]]:
    """The measurements that points.jsonl holds, of whatever settings."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [{name: line[name] for name in ("key", "load", "result")} for line in lines]
    except OSError as error:
        raise UserError(f"--out {path.parent}: cannot be used ({error.strerror}): give another folder") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: holds something that is no measurement: remove it, or give another --out") from None


def write(path: Path, text: str) -> None:
    """Write `path` so that it holds all of `text` or what it held before."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}): give another --out") from None


def child(command: list[str], seconds: float) -> dict[str, Any]:
    """The JSON that a command prints, with one BLAS thread a rank; UserError where none comes. It does not outlive this."""
    shown, pipe = shlex.join(command), subprocess.PIPE
    try:
        process = subprocess.Popen(command, env=child_environment(1), stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    except OSError as error:
        raise UserError(f"--launch: {command[0]} cannot be started ({error.strerror}): give this machine's launcher") from None
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise UserError(f"not done after {seconds:g} s: {shown}: give a longer --timeout, or a smaller --width") from None
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL) if process.poll() is None else ():
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)  # SIGTERM first: mpirun then ends its ranks, on other hosts too
                process.wait(10)
    lines = [line.strip() for line in (err or out).splitlines() if line.strip("- ")] or ["without a word"]
    said = next((line.removeprefix("distrib: error: ") for line in lines if line.startswith("distrib: error: ")), None)
    if process.returncode:
        raise UserError(said if said and process.returncode == EXIT_USAGE else
                        f"code {process.returncode} ({said or lines[-1]}) from {shown}: try it alone, or give another --launch")  # fmt: skip
    try:
        return dict(json.loads(out[out.index("{") :]))
    except ValueError:
        raise UserError(f"no JSON came from {shown}: give a --launch that passes on what rank 0 prints") from None


def command_of(kind: str, ranks: int, batch: int, s: dict[str, Any]) -> list[str]:
    """The command of one measurement."""
    launch = [part.replace("{ranks}", str(ranks)) for part in shlex.split(s["launch"])]
    if s["launch"] == MPIRUN:
        launch = [mpirun(), *launch[1:]] if ranks > 1 else []
    more = ["--batch-size", batch, "--width", s["width"], "--variant", s["variant"], "--precision", s["precision"]]
    more = more if kind == "step" else ["--seconds", 0.2, "--max-bytes", 1 << 22]
    more += ["--backend", s["backend"], "--repeats", s["repeats"], "--json"]
    return [*launch, sys.executable, "-m", "launch.cli", "bench", kind, *map(str, more)]


def measure(tasks: list[tuple[str, int, int]], settings: dict[str, Any], path: Path, timeout: float) -> list[dict[str, Any]]:
    """A line of points.jsonl for each (kind, ranks, batch), measured, and at once stored, where there is none yet."""
    lines, load, found = stored(path), os.getloadavg()[0], []
    console = Console(stderr=True, highlight=False)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        shown = bar.add_task("", total=len(tasks))
        for i, (kind, ranks, batch) in enumerate(tasks, 1):
            key = {"kind": kind, "ranks": ranks, "batch_size": batch, **settings, "machine": machine(), "version": __version__}
            line = next((old for old in lines if old["key"] == key), None)
            what = f"bench {kind}, {ranks} rank(s){f', batch {batch}' if batch else ''}{': measured before' if line else ''}"
            bar.update(shown, description=what)
            if not console.is_terminal:
                print(f"{i}/{len(tasks)}  {what}", file=sys.stderr, flush=True)
            if line is None:
                line = {"key": key, "load": load, "result": child(command_of(kind, ranks, batch, settings), timeout)}
                lines.append(line)
                write(path, "".join(json.dumps(each) + "\n" for each in lines))
            found.append(line)
            bar.advance(shown)
    return found


def point_of(r: dict[str, Any], hosts: int, places: int) -> Point:
    """The step in a result, on hosts of `places` cores or GPUs."""
    if r["backend"] == "numpy" and r["threads"] != r["ranks"]:
        raise UserError(f"{r['ranks']} rank(s) had {r['threads']} BLAS threads: have --launch pass OMP_NUM_THREADS=1 on, and give another --out")
    phases = {name: r["phases_ms"][name] / 1e3 for name in ("sums", "gradients", "backward") if r["phases_ms"]}
    step = r["batch_size"] / statistics.median(r["images_per_second"]["distrib"])
    return Point(r["ranks"], r["batch_size"], step, **phases, hosts=hosts, crowded=r["ranks"] > places * hosts)


def levels(results: list[dict[str, Any]], net: Level, given: bool, places: int) -> tuple[Level, Level, dict[str, str]]:
    """(within a host, between hosts, where each comes from); `net` stays where it is `given` or was not measured."""
    host, source = None, {"host": "no two ranks shared a host: taken as between hosts", "net": "assumed"}
    for several in (False, True):
        rows = [
            (math.log2(r["hosts"] if several else r["ranks"]), 2 * (r["ranks"] - 1) / r["ranks"] * size["bytes"],
             max(1e-9, statistics.median(size["seconds"]) - (host.latency * math.log2(r["ranks"] / r["hosts"]) if host else 0)))
            for r in results if (r["hosts"] > 1) == several and r["ranks"] <= places * r["hosts"] for size in r["sizes"]
        ]  # fmt: skip
        if rows and not (several and given):
            level = fit_level(rows)
            host, net = (host, level) if several else (level, net)
            errors = [abs(a * level.latency + b * level.per_byte - t) / t for a, b, t in rows]
            source["net" if several else "host"] = (f"fitted to {len(rows)} measured all-reduces: error"
                                                    f" {statistics.median(errors):.0%} in the middle, {max(errors):.0%} at worst")  # fmt: skip
    return host or net, net, source
