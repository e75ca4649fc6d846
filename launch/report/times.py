"""How long the reference's training takes here, by each way to train, extrapolated from a few steps."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from distrib.errors import UserError
from distrib.files import read_json, write_atomically
from launch.machine import DISTRIB, all_threads, child_environment, devices, finish, machine, mpirun
from launch.report.records import is_figure, shown
from launch.report.reference import BATCH, SECONDS, TRAINING_IMAGES, Settings, key


def times_path(settings: Settings, out: Path) -> Path:
    """Where the times of this machine are kept."""
    what = [settings.width, settings.ranks, all_threads(), machine(), bool(devices())]
    return out / f"time-{key(what)}.json"


class Way(NamedTuple):
    """One way to train, measured by `distrib bench step`: of which row of its result, on which threads."""

    name: str
    options: tuple[str, ...]
    side: str = "distrib"
    ranks: int = 1
    torch: str | None = None  # the name of PyTorch's rates, where they are measured beside it


def ways(settings: Settings) -> list[Way]:
    """The ways that this machine has. The host's stay on the host where there is a GPU, too."""
    host, torch = ("--backend", "numpy"), ("--against", "torch", "--repeats", "5")
    loop = ("--against", "loop", "--steps", "1", "--repeats", "3")
    found = [
        Way("plain loop", (*loop, *host), side="plain loop"),
        Way("vectorised", (*torch, *host), torch="PyTorch"),
    ]
    if (ranks := settings.ranks) > 1:
        found.append(Way(f"vectorised, {ranks} ranks", ("--repeats", "5", *host), ranks=ranks))
    if devices():
        found.append(Way("cupy", ("--backend", "cupy", *torch), torch="PyTorch on the GPU"))
    return found


def measure_times(settings: Settings, out: Path, show: Callable[[str], None]) -> None:
    """Images/s of each way to train at batch 8, by `distrib bench step`; kept in OUT, and measured once."""
    path = times_path(settings, out)
    if path.exists():
        return
    rates: dict[str, list[float]] = {}
    commands = {}
    for way in ways(settings):
        show(way.name)
        common = ("bench", "step", "--batch-size", str(BATCH), "--width", str(settings.width), *way.options)
        threads = all_threads() if way.ranks == 1 else 1
        done = finish([*mpirun(way.ranks), *DISTRIB, *common, "--json"], child_environment(threads))
        command = f"distrib {' '.join(common)}"
        if done.code:
            raise UserError(f"{way.name}: {command} ended with code {done.code}: {done.last_words()}")
        measured = done.json()["images_per_second"]
        rates[way.name] = measured[way.side]
        if way.torch:
            sides = [found for name, found in measured.items() if name.startswith("torch")]
            rates[way.torch] = max(sides, key=statistics.median)
        start = f"mpirun -n {way.ranks}" if way.ranks > 1 else f"OMP_NUM_THREADS={threads}"
        commands[way.name] = f"{start} {command}"
    found = {"machine": machine(), "images_per_second": rates, "commands": commands}
    write_atomically(path, json.dumps(found, indent=2).encode())


def read_times(path: Path) -> dict[str, Any]:
    """What `measure_times` wrote; UserError where it is something else."""
    found = read_json(path, remedy="remove it, to measure again")
    rates, commands = found.get("images_per_second"), found.get("commands")
    sound = isinstance(rates, dict) and isinstance(commands, dict) and isinstance(found.get("machine"), str)
    sound = sound and all(isinstance(text, str) for text in dict(commands or {}).values())
    for each in dict(rates or {}).values() if sound else ():
        sound = sound and isinstance(each, list) and bool(each) and all(is_figure(x) and x > 0 for x in each)
    if not sound:
        raise UserError(f"{path}: holds no times of this program: remove it, to measure again")
    rates, commands = dict(rates or {}), dict(commands or {})
    return {
        "machine": shown(found["machine"]),
        "images_per_second": {shown(way): each for way, each in rates.items()},
        "commands": {way: shown(text) for way, text in commands.items()},
    }


def time_table(settings: Settings, measured: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a whole run by each way, extrapolated from a few steps."""
    images = settings.epochs * (settings.limit_train or TRAINING_IMAGES)
    names = {
        "plain loop": "NumPy, convolutions as plain loops",
        "vectorised": "NumPy, one process",
        "cupy": "CuPy",
    }
    rows = []
    for way, rates in measured["images_per_second"].items():
        reference = SECONDS.get("torch" if way.startswith("PyTorch") else way)
        seconds = [images / rate for rate in rates]
        rows.append(
            (
                names.get(way, way.replace("vectorised", "NumPy")),
                [
                    f"{statistics.median(rates):,.4g}",
                    f"{statistics.median(seconds):,.0f} ({min(seconds):,.0f}–{max(seconds):,.0f})",
                    f"{reference:,.0f}" if reference else "–",
                ],
            )
        )
    note = (
        f"{settings.epochs} epoch(s), {images:,} images in all, batch {BATCH}, extrapolated from a few"
        f" steps (of the plain loops one at a time); median (least–most); {measured['machine']};"
        f" by {'; '.join(measured['commands'].values())}"
    )
    return {
        "title": "Seconds of training",
        "note": note,
        "heads": ["images/s", "seconds", "reference: seconds"],
        "rows": rows,
    }
