"""`distrib accept`: is this cluster fit to train on? Measures all ranks, and says which one is not."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from distrib import __version__
from distrib.comm.world import World, connect
from distrib.errors import EXIT_CRASH
from distrib.files import printable, require_place, write
from distrib.loop import report_failures
from launch.accept.measure import DEVICE, HOST, Rank, measure
from launch.accept.verdict import (
    MARK,
    TOLERANCES,
    TYPES,
    VERSION,
    Finding,
    Reference,
    figures_of,
    judge,
    parse_tolerances,
    read_reference,
    require_same_work,
)
from launch.bench.measure import BackendName, Comm
from launch.entry import AsJson, at_home, positive
from launch.machine import machine

MOST_ROWS = 16
"""Ranks in the page's table, the slowest; JSON has all."""
MOST_SAID = 1500


def accept(
    reference: Annotated[
        Path | None, typer.Option(help="A file of --write-reference: figures must be as good.")
    ] = None,
    write_reference: Annotated[
        Path | None, typer.Option(help="Keep the figures here, if all ranks pass.")
    ] = None,
    tolerance: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SHARE",
            help="By what share a figure may be worse (0.5: half as fast, twice as slow); once for each of "
            + ", ".join(f"{name} ({share:g})" for name, share in TOLERANCES.items())
            + ". A reference keeps them.",
        ),
    ] = None,
    run_dir: Annotated[Path, typer.Option(help="Where runs would be kept: the disk to measure.")] = Path(
        "runs"
    ),
    seconds: Annotated[float, positive("--seconds", "Time to train for.")] = 30.0,
    width: Annotated[
        float | None,
        positive(
            "--width", "Multiplier of all channel counts [default: 0.25; on GPUs 1].", show_default=False
        ),
    ] = None,
    backend: BackendName = "auto",
    comm: Comm = "auto",
    timeout: Annotated[
        float, positive("--timeout", "Seconds after which a wait for another rank ends the job.")
    ] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Is this cluster fit to train on? Measures all ranks of mpirun or srun, or one, in a minute.

    Every rank computes one and the same training on its own, again and again: how many images/s, and does it
    always end with the bits of the others? Then come all-reduces, each sum checked, and each host's disk. A
    rank that is slower than the others, or has other bits, is named with its host.

    Exit code 0: pass; 1: fail; 2: wrong use. With --json the page goes to standard error.

    Examples:

      mpirun -n 4 distrib accept --write-reference good.json

      srun --mpi=pmix -N 2 -n 8 distrib accept --reference good.json --tolerance balance=0.1
    """
    begin, given = time.perf_counter(), parse_tolerances(tolerance or [])
    run_dir, reference = at_home(run_dir, "--run-dir"), at_home(reference, "--reference")
    write_reference = at_home(write_reference, "--write-reference")
    with connect(comm, backend, timeout=timeout) as world, report_failures(world):
        settings = HOST if world.backend.on_host else DEVICE
        settings = settings | ({"width": width} if width else {})
        known: Reference | None = None
        with world.fail_together():
            if world.rank == 0 and write_reference:
                require_place(write_reference)
            if world.rank == 0 and reference:
                known = read_reference(reference)
                require_same_work(known, reference, settings, world.backend.name)
        quiet = world.rank > 0 or as_json
        with Console(stderr=True, quiet=quiet).status("") as status:
            ranks, sums = measure(world, settings, seconds, run_dir, status.update)
        failed = False
        if world.rank == 0:
            tolerances = TOLERANCES | (known["tolerances"] if known else {}) | given
            result = verdict(world, ranks, sums, settings, known, tolerances)
            result["seconds"] = time.perf_counter() - begin
            print("\n".join(lines(result)), file=sys.stderr if as_json else sys.stdout, flush=True)
            if as_json:
                print(json.dumps(result, indent=2), flush=True)
            failed = not result["passed"]
        with world.fail_together():
            if world.rank == 0 and write_reference and not failed:
                kept = {MARK: VERSION, **{name: result[name] for name in TYPES}}
                write(write_reference, json.dumps(kept, indent=2))
    raise typer.Exit(EXIT_CRASH if failed else 0)


def verdict(
    world: World,
    ranks: list[Rank],
    sums: dict[str, Any],
    settings: dict[str, Any],
    known: Reference | None,
    tolerances: dict[str, float],
) -> dict[str, Any]:
    """All that was found, for JSON and the page."""
    per_host = Counter(world.hosts)
    place = {
        "ranks": world.size,
        "hosts": len(per_host),
        "ranks_per_host": max(per_host.values()),
        "threads": max(rank.threads for rank in ranks),
        "backend": world.backend.name,
        "communicator": world.transport.name,
    }
    findings = judge(ranks, sums, place, known, tolerances)
    rates = {host: statistics.median(rank.rate for rank in ranks if rank.host == host) for host in per_host}
    return {
        "passed": all(finding.passed is not False for finding in findings),
        "version": __version__,
        "machine": machine(),
        "place": place,
        "training": settings,
        "environment": ranks[0].environment,
        "digest": next(iter(ranks[0].digests)),
        "figures": {name: statistics.median(each.values()) for name, each in figures_of(ranks, sums).items()},
        "tolerances": tolerances,
        "findings": [finding._asdict() for finding in findings],
        "slowest_rank": min(ranks, key=lambda rank: rank.rate).rank,
        "slowest_host": min(rates, key=lambda host: rates[host]),
        "ranks": [rank.json() for rank in ranks],
    }


def lines(result: dict[str, Any]) -> list[str]:
    """The page."""
    r, place, training = result, result["place"], result["training"]
    failed = [each["name"] for each in r["findings"] if each["passed"] is False]
    found = [
        f"distrib accept: {'FAIL: ' + ', '.join(failed) if failed else 'pass'}",
        f"{r['machine']}; {r['environment']['blas']}",
        f"{place['ranks']} rank(s) on {place['hosts']} host(s), {place['threads']} thread(s) each;"
        f" {place['backend']}, communicator {place['communicator']}; {r['seconds']:.0f} s",
        f"a round: {training['images']} images, batch {training['batch_size']}, width {training['width']:g}",
        "",
    ]
    marks = {True: "pass", False: "FAIL", None: "note"}
    for passed, name, said in (Finding(**each) for each in r["findings"]):
        found.append(f"{marks[passed]}  {name:17}  {printable(said, MOST_SAID)}")
    slowest = sorted(r["ranks"], key=lambda rank: rank["images_per_second"])
    found += ["", f"slowest host: {r['slowest_host']}; ranks, the slowest first:"]
    for rank in slowest[:MOST_ROWS]:
        rates, digests = rank["rates"], ", ".join(digest[:12] for digest in rank["digests"])
        found.append(
            f"{rank['rank']:5}  {rank['host']:20}  {rank['images_per_second']:8.4g} images/s"
            f" ({min(rates):.4g}–{max(rates):.4g})  {len(rates)} rounds  {digests}"
        )
    more = len(slowest) - MOST_ROWS
    return [*found, f"and {more} more: --json has all"] if more > 0 else found
