"""`distrib predict`: the digit in each image, in a line, as a drawing beside its probabilities, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distrib.console import Lines, on_terminal
from distrib.errors import UserError

if TYPE_CHECKING:
    import numpy as np

SHADES = " .:-=+*#%@"
"""Characters from dark to bright, for where there are no shades of grey."""

LONGEST_BAR = 30
"""Columns of a probability of 1, where the terminal has them."""


def has_shades(console: Console) -> bool:
    """Whether half blocks in shades of grey can be shown: on a terminal of 256 colours or more that takes UTF-8."""
    return (
        console.color_system in ("256", "truecolor")
        and not console.no_color
        and console.encoding.startswith("utf")
    )


def drawing(pixels: np.ndarray, shades: bool) -> Text:
    """An image uint8 (H, W) in H/2 lines of W columns; a character is two pixels, one above the other."""
    text = Text(no_wrap=True, end="")
    for row in range(0, len(pixels), 2):
        if row:
            text.append("\n")
        for upper, lower in pixels[row : row + 2].T.tolist():
            if shades:
                text.append("▀", f"rgb({upper},{upper},{upper}) on rgb({lower},{lower},{lower})")
            else:
                text.append(SHADES[(upper + lower) * len(SHADES) // 512])
    return text


def bars(result: dict[str, Any], longest: int, shades: bool) -> Text:
    """The ten probabilities of an image, a line each, that of the digit in bold."""
    text = Text(no_wrap=True, end="")
    for digit, p in enumerate(result["probabilities"]):
        bar = ("█" if shades else "#") * round(p * longest)
        style = "bold" if digit == result["digit"] else ""
        text.append(f"{digit}  {bar:<{longest}} {100 * p:5.1f} %", style)
        text.append("\n" * (digit < 9))
    return text


def beside(pixels: np.ndarray, result: dict[str, Any], console: Console) -> Table:
    """The drawing of an image with its bars to the right."""
    shades, width = has_shades(console), pixels.shape[1]
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, min_width=width)
    table.add_column(no_wrap=True, vertical="middle")
    longest = max(1, min(LONGEST_BAR, console.width - width - 15))
    table.add_row(drawing(pixels, shades), bars(result, longest, shades))
    return table


def line(result: dict[str, Any], top: int) -> str:
    """FILE: 7  99.1 %, then the next most probable of `top` digits in all, and whether the image was inverted."""
    p, first = result["probabilities"], result["digit"]
    others = sorted((digit for digit in range(len(p)) if digit != first), key=lambda digit: -p[digit])
    said = "   ".join(f"{digit}  {100 * p[digit]:.1f} %" for digit in [first, *others][:top])
    # a file's name may hold anything, and must not steer the terminal
    name = "".join(letter if letter.isprintable() else "?" for letter in result["image"])
    return f"{name}: {said}{'  (inverted: dark on bright)' if result['inverted'] else ''}"


def predict(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint (step-….safetensors), or a run's folder: its newest.")
    ],
    images: Annotated[
        list[Path], typer.Argument(help="PNG (or other picture) or IDX files, gzipped or not.")
    ],
    top: Annotated[int, typer.Option(help="Digits named for each image, the most probable first.")] = 3,
    draw: Annotated[
        bool, typer.Option("--draw", help="Draw each image beside a bar chart of its probabilities.")
    ] = False,
    limit: Annotated[int, typer.Option(help="Images drawn at most.")] = 20,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with all ten probabilities of each image.")
    ] = False,
) -> None:
    """The digit in each image, with its probability and the next likely ones.

    Pictures are made grey and 28×28; MNIST's digits are white on black, so dark ink on a bright
    ground is inverted. A model trained with --loss bce gives each digit a probability by itself:
    they need not sum to 100 %. Example: distrib predict runs/first digit.png --draw
    """
    from distrib.predict import load, predict_files, read_pictures
    from distrib.predict import predict as results_of

    if not 1 <= top <= 10:
        raise UserError(f"--top {top}: give 1 to 10")
    if limit < 1:
        raise UserError(f"--limit {limit}: give 1 or more")
    if draw and as_json:
        raise UserError("--draw and --json: give one of them")
    found = load(checkpoint)
    if as_json:
        print(json.dumps(predict_files(found, images), indent=2))
        return
    files = [read_pictures(path) for path in images]  # a mistake is told before anything else
    pairs: Iterator[tuple[np.ndarray, dict[str, Any]]] = (
        pair for file in files for pair in zip(file.pixels, results_of(found, file), strict=True)
    )
    console = Lines(highlight=False, force_terminal=on_terminal())
    if not console.is_terminal:
        console.width = 80
    for pixels, result in islice(pairs, limit if draw else None):
        console.out(line(result, top), highlight=False)
        if draw:
            console.print(beside(pixels, result, console), Text())
    count = sum(len(file.pixels) for file in files)
    if draw and count > limit:
        console.out(
            f"the first {limit} of {count} images; --limit N draws more, without --draw all are listed",
            highlight=False,
        )
