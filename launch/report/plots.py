"""How figures and pages look, and how they leave: SVG in a page, or PNG files. Needs the extra `report`."""

from __future__ import annotations

import html
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import distrib
from distrib.errors import UserError
from distrib.files import printable, reason, require, short, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
"""Okabe and Ito (2008): told apart by the colour-blind; dashes tell what comes after the last."""

MOST_LETTERS = 34
"""Letters of a name in a legend: two such columns fit below a plot."""

STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "distrib",
    "savefig.dpi": 160,
}


def render(template: str, **values: Any) -> str:
    """A page of one of the templates."""
    require("jinja2")
    import jinja2

    loader = jinja2.PackageLoader("launch.report", "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["short"] = short
    return environment.get_template(template).render(
        version=distrib.__version__, made=time.strftime("%Y-%m-%d %H:%M"), **values
    )


@contextmanager
def figure(width: float = 6.4, height: float = 3.2, columns: int = 1) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of `columns` axes side by side, in inches, drawn in this project's style."""
    require("matplotlib")
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    cycle = cycler(linestyle=["-", "--", ":"]) * cycler(color=COLOURS)
    style: Any = {**STYLE, "axes.prop_cycle": cycle}
    with matplotlib.rc_context(style):
        made = Figure(figsize=(width, height))
        yield made, list(made.subplots(1, columns, squeeze=False)[0])


def logarithmic(ax: Axes) -> None:
    """Make the y axis logarithmic, with 0.6 where Matplotlib writes 6 × 10⁻¹."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(Plain())
    ax.yaxis.set_minor_formatter(Plain(labelOnlyBase=False))


def svg(made: Figure, title: str) -> str:
    """The figure as an <svg> element for a page, with `title` for those who cannot see it."""
    file = io.StringIO()
    made.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    head, rest = text.split(">", 1)
    return f'{head} role="img"><title>{html.escape(title)}</title>{rest}'


def plain(name: str) -> str:
    """A name for a legend: short, no mathematics, nothing that cannot be shown."""
    return short(printable(name), MOST_LETTERS).replace("$", r"\$")


def save(made: Figure, path: Path) -> None:
    """The figure as a PNG file."""
    make_folder(path.parent)
    file = io.BytesIO()
    made.savefig(file, format="png", metadata={"Software": None})
    write(path, file.getvalue())


def make_folder(path: Path) -> None:
    """`path` is a folder; UserError where it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made {reason(error, path)}") from None
