"""`distrib predict`: the digit in each image: a line, a drawing with probabilities, or JSON."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distrib.errors import UserError
from distrib.files import printable, short
from distrib.run.console import on_terminal
from launch.entry import Model, OwnModel, number, one_process

SHADES = " .:-=+*#%@"
"""Characters from dark to bright, for where there are no shades of grey."""

MOST_BARS, MOST_NAME = 10, 20
"""Classes with a bar, and letters of a class's name."""

FORMULA = tuple("=+-@＝＋－＠")
"""How a spreadsheet's formula starts, the wide forms of East Asian ones included."""

LONGEST_BAR = 30
"""Columns of a probability of 1, where the terminal has them."""


def has_shades(console: Console) -> bool:
    """Whether half blocks in shades of grey can be shown: 256 colours or more, and UTF-8."""
    return (
        console.color_system in ("256", "truecolor")
        and not console.no_color
        and console.encoding.startswith("utf")
    )


def drawing(pixels: np.ndarray, shades: bool) -> Text:
    """An image uint8 (H, W) or (H, W, 3), a character for two pixels, one above the other."""
    text = Text(no_wrap=True, end="")
    for row in range(0, len(pixels), 2):
        if row:
            text.append("\n")
        both = pixels[[row, min(row + 1, len(pixels) - 1)]]
        for upper, lower in both.swapaxes(0, 1).tolist():
            if shades:
                text.append("▀", f"rgb({colour(upper)}) on rgb({colour(lower)})")
            else:
                text.append(SHADES[int(np.mean([upper, lower])) * len(SHADES) // 256])
    return text


def colour(pixel: Any) -> str:
    """Red, green and blue of a grey or coloured pixel."""
    return ",".join(map(str, pixel if isinstance(pixel, list) else [pixel] * 3))


def bars(result: dict[str, Any], names: list[str], longest: int, shades: bool) -> Text:
    """The probabilities of an image, a line each, its class in bold; of many classes the likeliest."""
    text, p = Text(no_wrap=True, end=""), result["probabilities"]
    shown = range(len(p)) if len(p) <= MOST_BARS else sorted(range(len(p)), key=lambda i: -p[i])[:MOST_BARS]
    wide = max(len(class_name(names[i])) for i in shown)
    for place, i in enumerate(shown):
        bar = ("█" if shades else "#") * round(p[i] * longest)
        style = "bold" if names[i] == result["class"] else ""
        text.append("\n" * (place > 0))
        text.append(f"{class_name(names[i]):<{wide}}  {bar:<{longest}} {100 * p[i]:5.1f} %", style)
    return text


def beside(pixels: np.ndarray, result: dict[str, Any], names: list[str], console: Console) -> Table:
    """The drawing of an image with its bars to the right."""
    shades, width = has_shades(console), pixels.shape[1]
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, min_width=width)
    table.add_column(no_wrap=True, vertical="middle")
    widest = max(len(name) for name in names)
    longest = max(1, min(LONGEST_BAR, console.width - width - 14 - min(widest, MOST_NAME)))
    table.add_row(drawing(pixels, shades), bars(result, names, longest, shades))
    return table


def class_name(name: str) -> str:
    """A class's name for a line; those of two classes may differ at the end only."""
    return printable(short(name, MOST_NAME))


def line(result: dict[str, Any], names: list[str], top: int) -> str:
    """FILE: 7  99.1 %, then the next most probable of `top` classes, and whether the image was inverted."""
    name = printable(result["image"], 4096)
    if result["class"] is None:
        return f"{name}: nothing drawn"
    p, first = result["probabilities"], names.index(result["class"])
    others = sorted((i for i in range(len(p)) if i != first), key=lambda i: -p[i])
    said = "   ".join(f"{class_name(names[i])}  {100 * p[i]:.1f} %" for i in [first, *others][:top])
    return f"{name}: {said}{'  (inverted: dark on bright)' if result['inverted'] else ''}"


@one_process
def predict(
    checkpoint: Model,
    images: Annotated[
        list[Path],
        typer.Argument(
            help="PNG, JPEG or other pictures, or IDX files, gzipped or not; or folders of these."
        ),
    ],
    top: Annotated[int, number("--top", "Classes named for each image, the most probable first.")] = 3,
    draw: Annotated[
        bool,
        typer.Option("--draw", help="Draw what the network saw beside a bar chart of its probabilities."),
    ] = False,
    limit: Annotated[int, number("--limit", "Images drawn at most.")] = 20,
    as_is: Annotated[
        bool,
        typer.Option(
            "--as-is", help="Take pictures as white on black and cut like MNIST's: only scale them."
        ),
    ] = False,
    model: OwnModel = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with the probabilities of all classes.")
    ] = False,
    as_csv: Annotated[
        bool,
        typer.Option(
            "--csv", help="Print a table for spreadsheets: image, class, probability; ' before = + - @."
        ),
    ] = False,
) -> None:
    """The class of each image, with its probability and the next likely ones.

    For digits: takes photos, scans and drawings with one digit, in any colours. As MNIST's makers did, it
    finds the ink, cuts to it, scales it into 20×20 and centres it in 28×28; --draw shows the result. A
    picture that is made like this already is not changed. A sheet without ink is "nothing drawn": in JSON its
    digit is null and its probabilities are 0. A model trained with --loss bce gives each digit a probability
    by itself: they need not sum to 100 %. Example: distrib predict runs/first digit.png --draw
    """
    chosen = [flag for flag, given in (("--draw", draw), ("--json", as_json), ("--csv", as_csv)) if given]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)}: give one of them")
    images = [file for path in images for file in files_of(path)]
    try:
        if as_json:
            print_json(checkpoint, model, images, as_is)
        elif as_csv:
            print_csv(checkpoint, model, images, as_is)
        else:
            print_lines(checkpoint, model, images, as_is, top, limit if draw else 0)
    except UserError as error:
        raise UserError(printable(str(error), 2000)) from None


def files_of(path: Path) -> list[Path]:
    """A file itself; of a folder all files however deep, hidden ones apart."""
    if not path.is_dir():
        return [path]
    inside = (each for each in sorted(path.rglob("*")) if each.is_file())
    found = [each for each in inside if not any(part[0] == "." for part in each.relative_to(path).parts)]
    if not found:
        raise UserError(f"{path}: holds no files: give pictures, or a folder of pictures")
    return found


def as_text(name: str) -> str:
    """A name for a spreadsheet, which would run one that starts like a formula."""
    shown = printable(name, 4096)
    return f"'{shown}" if shown.lstrip().startswith(FORMULA) else shown


def print_csv(checkpoint: Path, model: str | None, images: list[Path], as_is: bool) -> None:
    """A line for each image; an empty one has no class. A name that would be a formula begins with '."""
    from distrib.predict import load, predict_files

    results = predict_files(load(checkpoint, model), images, as_is)
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(("image", "class", "probability"))
    for result in results:
        table.writerow(
            (as_text(result["image"]), as_text(result["class"] or ""), f"{result['probability']:.6f}")
        )


def print_json(checkpoint: Path, model: str | None, images: list[Path], as_is: bool) -> None:
    """All results as one list."""
    from distrib.predict import load, predict_files

    print(json.dumps(predict_files(load(checkpoint, model), images, as_is), indent=2))


def print_lines(
    checkpoint: Path, model: str | None, images: list[Path], as_is: bool, top: int, limit: int
) -> None:
    """A line for each image; with a limit each of the first `limit` is drawn, and the others are left out."""
    from distrib.predict import load, predict, read_all

    found = load(checkpoint, model)
    names = found.class_names
    files = read_all(found, images, as_is)  # a mistake is told before anything else
    pairs: Iterator[tuple[np.ndarray, dict[str, Any]]] = (
        pair for file in files for pair in zip(file.pixels, predict(found, file), strict=True)
    )
    console = Console(highlight=False, force_terminal=on_terminal())
    if not console.is_terminal:
        console.width = 80
    for pixels, result in islice(pairs, limit or None):
        console.out(line(result, names, top), highlight=False)
        if limit:
            console.print(beside(pixels, result, names, console), Text())
    count = sum(len(file.pixels) for file in files)
    if limit and count > limit:
        console.out(
            f"the first {limit} of {count} images; --limit N draws more, without --draw all are listed",
            highlight=False,
        )
