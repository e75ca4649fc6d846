"""`distrib predict`: the digit in each image, as a line, a drawing beside its probabilities, or JSON."""

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

from distrib.errors import UserError
from distrib.run.console import on_terminal

if TYPE_CHECKING:
    import numpy as np

SHADES = " .:-=+*#%@"
"""Characters from dark to bright, for where there are no shades of grey."""

LONGEST_BAR = 30
"""Columns of a probability of 1, where the terminal has them."""


def has_shades(console: Console) -> bool:
    """Whether half blocks in shades of grey can be shown: on a UTF-8 terminal of 256 colours or more."""
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


def printable(text: str) -> str:
    """A text that cannot steer a terminal, whatever a file's name holds."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def line(result: dict[str, Any], top: int) -> str:
    """FILE: 7  99.1 %, then the next of `top` most probable digits, and whether the image was inverted."""
    name = printable(result["image"])
    if result["digit"] is None:
        return f"{name}: nothing drawn"
    p, first = result["probabilities"], result["digit"]
    others = sorted((digit for digit in range(len(p)) if digit != first), key=lambda digit: -p[digit])
    said = "   ".join(f"{digit}  {100 * p[digit]:.1f} %" for digit in [first, *others][:top])
    return f"{name}: {said}{'  (inverted: dark on bright)' if result['inverted'] else ''}"


def predict(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint (step-….safetensors), or a run's folder: its newest.")
    ],
    images: Annotated[
        list[Path], typer.Argument(help="PNG, JPEG or other pictures, or IDX files, gzipped or not.")
    ],
    top: Annotated[int, typer.Option(help="Digits named for each image, the most probable first.")] = 3,
    draw: Annotated[
        bool,
        typer.Option("--draw", help="Draw what the network saw beside a bar chart of its probabilities."),
    ] = False,
    limit: Annotated[int, typer.Option(help="Images drawn at most.")] = 20,
    as_is: Annotated[
        bool,
        typer.Option(
            "--as-is", help="Take pictures as white on black and cut like MNIST's: only scale them."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with all ten probabilities of each image.")
    ] = False,
) -> None:
    """The digit in each image, with its probability and the next likely ones.

    Takes photos, scans and drawings with one digit, in any colours. As MNIST's makers did, it finds the
    ink, cuts to it, scales it into 20×20 and centres it in 28×28; --draw shows the result. A picture that
    is made like this already is not changed. A sheet without ink is "nothing drawn": in JSON its digit
    is null and its probabilities are 0. A model trained with --loss bce gives each digit a probability
    by itself: they need not sum to 100 %. Example: distrib predict runs/first digit.png --draw
    """
    from launch.machine import refuse_launcher

    if not 1 <= top <= 10:
        raise UserError(f"--top {top}: give 1 to 10")
    if limit < 1:
        raise UserError(f"--limit {limit}: give 1 or more")
    if draw and as_json:
        raise UserError("--draw and --json: give one of them")
    refuse_launcher("distrib predict")
    try:
        if as_json:
            print_json(checkpoint, images, as_is)
        else:
            print_lines(checkpoint, images, as_is, top, limit if draw else 0)
    except UserError as error:
        raise UserError(printable(str(error))) from None


def print_json(checkpoint: Path, images: list[Path], as_is: bool) -> None:
    """All results as one list."""
    from distrib.predict import load, predict_files

    print(json.dumps(predict_files(load(checkpoint), images, as_is), indent=2))


def print_lines(checkpoint: Path, images: list[Path], as_is: bool, top: int, limit: int) -> None:
    """A line for each image; with a limit each of the first `limit` is drawn, and the others are left out."""
    from distrib.pictures.prepare import read_pictures
    from distrib.predict import load, predict

    found = load(checkpoint)
    files = [read_pictures(path, as_is) for path in images]  # a mistake is told before anything else
    pairs: Iterator[tuple[np.ndarray, dict[str, Any]]] = (
        pair for file in files for pair in zip(file.pixels, predict(found, file), strict=True)
    )
    console = Console(highlight=False, force_terminal=on_terminal())
    if not console.is_terminal:
        console.width = 80
    for pixels, result in islice(pairs, limit or None):
        console.out(line(result, top), highlight=False)
        if limit:
            console.print(beside(pixels, result, console), Text())
    count = sum(len(file.pixels) for file in files)
    if limit and count > limit:
        console.out(
            f"the first {limit} of {count} images; --limit N draws more, without --draw all are listed",
            highlight=False,
        )
