"""Commands whose modules are imported only when called, or asked for their own help."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup


class Place(NamedTuple):
    """Where a command is, and what a list of commands says of it: the first paragraph of its docstring."""

    module: str
    function: str  # or a whole typer.Typer
    text: str
    hidden: bool = False
    passes_on: bool = False  # takes options of another command, too


class Lazy(TyperCommand):
    """Stands for the command at a place."""

    def __init__(self, name: str, place: Place) -> None:
        super().__init__(name, help=place.text, hidden=place.hidden)
        self.place = place

    def real(self) -> Any:
        """The command itself; imports its module."""
        found = getattr(importlib.import_module(self.place.module), self.place.function)
        app = found if isinstance(found, typer.Typer) else application()
        if app is not found:
            more = {"allow_extra_args": True, "ignore_unknown_options": True}
            settings = more if self.place.passes_on else None
            app.command(self.name, context_settings=settings, hidden=self.place.hidden)(found)
        return typer.main.get_command(app)

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        return self.real().make_context(info_name, args, parent, **extra)


def application(**settings: Any) -> typer.Typer:
    """A typer application as all of ours are."""
    return typer.Typer(
        add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False, **settings
    )


def group_of(places: dict[str, Place]) -> type[TyperGroup]:
    """The class of a group with these commands, by name."""

    class Group(TyperGroup):
        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            for name, place in places.items():
                self.add_command(Lazy(name, place))

    return Group
