"""What `distrib accept` makes of what was measured: pass or fail, against the other ranks and a reference."""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from distrib.errors import UserError
from distrib.files import alternatives, fits, parsed, printable, read_json, shown
from launch.accept.measure import Rank

MARK, VERSION = "distrib_accept", 1
"""Name and value that tell a reference from other JSON files."""


class Figure(NamedTuple):
    """One of the measured figures; of `better` 1 more is better, of -1 less."""

    unit: str
    tolerance: float
    better: int = 1


FIGURES = {
    "images-per-second": Figure("images/s a rank", 0.4),
    "latency": Figure("µs, all-reduce of 8 bytes", 0.85, -1),
    "bandwidth": Figure("GB/s on the bus, all-reduce of 16 MiB", 0.75),
    "disk-write": Figure("MB/s, 32 MiB with fsync", 0.5),
    "disk-read": Figure("MB/s", 0.5),
}
BALANCE = "balance"
TOLERANCES = {BALANCE: 0.3, **{name: figure.tolerance for name, figure in FIGURES.items()}}
"""By how much a figure may be worse than the reference's, a rank's images/s than the others' median."""

REMEDY = "write a new one with --write-reference"


class Finding(NamedTuple):
    """One line of the verdict; `passed` is None where there was nothing to compare with."""

    passed: bool | None
    name: str
    found: str


TYPES = {
    "place": "dict",
    "training": "dict",
    "environment": "dict",
    "digest": "str",
    "figures": "dict[str, float]",
    "tolerances": "dict[str, float]",
}
"""What a reference holds, which is of a run that passed."""

Reference = dict[str, Any]


def read_reference(path: Path) -> Reference:
    """UserError where the file cannot be read, is another, or holds what --write-reference never wrote."""
    found = read_json(path, remedy=REMEDY)
    if found.pop(MARK, None) != VERSION:
        raise UserError(f"{path}: is no reference of distrib accept {VERSION}: {REMEDY}")
    if found.keys() != TYPES.keys():
        odd = sorted(found.keys() ^ TYPES.keys())[0]
        raise UserError(f"{path}: {printable(odd)} is {'odd' if odd in found else 'missing'}: {REMEDY}")
    for name, kind in TYPES.items():
        if not fits(kind, found[name]):
            raise UserError(f"{path}: has {name} {shown(found[name])}, not {kind}: {REMEDY}")
    for group, known, holds, rule in (
        ("figures", FIGURES, lambda value: value > 0, "above 0"),
        ("tolerances", TOLERANCES, lambda value: 0 <= value < 1, "from 0 and below 1"),
    ):
        for name, value in found[group].items():
            if name not in known or not holds(value):
                said = f"{group} {printable(name)} {shown(value)}"
                raise UserError(f"{path}: {said}: give {alternatives([*known])}, {rule}")
    return found


def parse_tolerances(given: list[str]) -> dict[str, float]:
    """What --tolerance NAME=SHARE says, by name."""
    found = {}
    for text in given:
        name, equals, share = text.partition("=")
        value = parsed(f"--tolerance {name}=", share, float) if equals and name in TOLERANCES else -1.0
        if not 0 <= value < 1:
            names = alternatives([*TOLERANCES])
            raise UserError(f"--tolerance {shown(text)}: give NAME=SHARE, {names} and 0 or more, below 1")
        found[name] = value
    return found


def worse_by(value: float, than: float, better: int = 1) -> float:
    """The share by which a figure is worse: 0.5 is half as fast, or twice as slow."""
    return 1 - (value / than) ** better


def figures_of(ranks: list[Rank], sums: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Each figure, by the rank or host that has it; of an all-reduce all have the same."""
    found = {"images-per-second": {rank.name: rank.rate for rank in ranks}}
    found |= {name: {"all ranks": value} for name, value in sums.items() if name in FIGURES}
    for name in ("write", "read"):
        disks = {rank.host: rank.disk[name] for rank in ranks if name in rank.disk}
        found |= {f"disk-{name}": disks} if disks else {}
    return found


def judge(
    ranks: list[Rank],
    sums: dict[str, Any],
    place: dict[str, Any],
    reference: Reference | None,
    tolerances: dict[str, float],
) -> list[Finding]:
    """All that was looked at; the cluster is fit if nothing failed."""
    found = [bits(ranks, reference), *libraries(ranks)]
    if len(ranks) > 1:
        found.append(balance(ranks, tolerances[BALANCE]))
    found += [Finding(False, "all-reduce", sums["error"])] if "error" in sums else []
    found += [Finding(False, "disk", f"{r.name}: {r.disk['error']}") for r in ranks if "error" in r.disk]
    for name, values in figures_of(ranks, sums).items():
        found.append(compare(name, values, reference, place, tolerances[name]))
    return found


def bits(ranks: list[Rank], reference: Reference | None) -> Finding:
    """Whether all rounds of all ranks ended with the same parameters, those of the reference if it is
    comparable."""
    votes = Counter(digest for rank in ranks for digest in rank.digests)
    expected, most = votes.most_common(1)[0]
    known = reference if reference and any(reference["environment"] == r.environment for r in ranks) else None
    expected = known["digest"] if known else expected
    odd = [rank for rank in ranks if rank.digests.keys() != {expected}]
    rounds = sum(len(rank.rates) for rank in ranks)
    if not odd:
        said = f"{expected[:12]} after each of {rounds} rounds of {len(ranks)} rank(s)"
        other = differences(ranks[0].environment, reference["environment"]) if reference else ""
        more = (
            ", the reference's" if known else f"; not compared with the reference: {other}" if other else ""
        )
        return Finding(True, "bits", said + more)
    right = known["environment"] if known else next((r.environment for r in ranks if r not in odd), {})
    sure = known is not None or most > len(ranks) / 2
    doubt = "" if sure else "; it may be the others, as there is no majority: give --reference, or more ranks"
    return Finding(False, "bits", "; ".join(why_odd(rank, expected, right) for rank in odd) + doubt)


def why_odd(rank: Rank, expected: str, right: dict[str, Any]) -> str:
    """What is wrong with a rank that ends with other bits."""
    wrong = sum(count for digest, count in rank.digests.items() if digest != expected)
    other = differences(rank.environment, right)
    cause = f"other libraries: {other}" if right and other else "its memory, processor or GPU is at fault"
    return f"{rank.name}: other bits than {expected[:12]} in {wrong} of {len(rank.rates)} rounds: {cause}"


def differences(mine: dict[str, Any], theirs: dict[str, Any]) -> str:
    """What two environments have different."""
    return ", ".join(
        f"{name} {mine.get(name, 'none')} (there {theirs.get(name, 'none')})"
        for name in {**mine, **theirs}
        if mine.get(name) != theirs.get(name)
    )


def libraries(ranks: list[Rank]) -> list[Finding]:
    """A note where not all ranks have the libraries, processor and code of most."""
    common = Counter(repr(rank.environment) for rank in ranks).most_common(1)[0][0]
    usual = next(rank.environment for rank in ranks if repr(rank.environment) == common)
    odd = [f"{r.name}: {differences(r.environment, usual)}" for r in ranks if r.environment != usual]
    return [Finding(None, "libraries", "; ".join(odd))] if odd else []


def balance(ranks: list[Rank], tolerance: float) -> Finding:
    """Whether each rank is about as fast as the median of the others."""
    found = []
    for rank in ranks:
        others = statistics.median(other.rate for other in ranks if other is not rank)
        found.append((worse_by(rank.rate, others), rank, others))
    found.sort(key=lambda each: -each[0])
    slow = [each for each in found if each[0] > tolerance]
    said = [
        f"{rank.name}: {rank.rate:.4g} images/s, {100 * worse:.0f} % below the others' {others:.4g}"
        + ("" if rank.on_core is None else f", with a core {100 * rank.on_core:.0f} % of the time")
        for worse, rank, others in slow or found[:1]
    ]
    return Finding(not slow, BALANCE, f"{'; '.join(said)} (at most {100 * tolerance:g} %)")


def compare(
    name: str, values: dict[str, float], reference: Reference | None, place: dict[str, Any], tolerance: float
) -> Finding:
    """Whether a figure is as good as the reference's on every rank or host."""
    unit, _, better = FIGURES[name]
    least, middle, most = (pick(values.values()) for pick in (min, statistics.median, max))
    said = f"{middle:.4g}{f' ({least:.4g}–{most:.4g})' if len(values) > 1 else ''} {unit}"
    if reference is None or name not in reference["figures"]:
        return Finding(None, name, said)
    if odd := unlike(name, reference["place"], place):
        return Finding(None, name, f"{said}; not compared, as the reference has {odd}")
    than = reference["figures"][name]
    worse = {who: worse_by(value, than, better) for who, value in values.items()}
    bad = sorted((who for who in worse if worse[who] > tolerance), key=lambda who: -worse[who])
    said += f"; the reference {than:.4g}"
    said += "".join(f"; {who}: {values[who]:.4g}, {100 * worse[who]:.0f} % worse" for who in bad)
    return Finding(not bad, name, f"{said} (at most {100 * tolerance:g} %)")


def unlike(name: str, theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """What of the reference's place makes its figure another one."""
    needed = {
        "images-per-second": ("ranks_per_host", "threads"),
        "latency": ("ranks", "hosts", "communicator"),
        "bandwidth": ("ranks", "hosts", "communicator"),
    }.get(name, ())
    odd = [each for each in needed if theirs.get(each) != ours.get(each)]
    return ", ".join(f"{each.replace('_', ' ')} {shown(theirs.get(each))}" for each in odd)


def require_same_work(reference: Reference, path: Path, training: dict[str, Any], backend: str) -> None:
    """UserError where the reference is of another training, or another array library."""
    mine = {**training, "backend": backend}
    for name, theirs in {**reference["training"], "backend": reference["place"].get("backend")}.items():
        if theirs != mine.get(name):
            raise UserError(
                f"--reference {path}: is of {printable(name)} {shown(theirs)}, this run of"
                f" {mine.get(name)}: give the same options, or {REMEDY}"
            )
