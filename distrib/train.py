"""The entry point `python -m distrib.train`: builds options from the fields of `Config`, then trains."""

from __future__ import annotations

import distrib.shadow  # noqa: F401  # first, see there

# isort: split

import inspect
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Annotated, Any

from distrib.command import run_app, run_work
from distrib.config import CHOICES, Config, build, options
from distrib.errors import UserError
from distrib.files import parsed

TYPES = {"int": int, "float": float, "str": str, "bool": bool}


def train_command(**given: Any) -> None:
    """Train ResNet-9 on MNIST or your pictures: in one process, or on all ranks that mpirun or srun started.

    Examples:

      distrib train --recipe demo

      mpirun -n 4 python -m distrib.train --epochs 1 --limit-train 8000
    """
    import typer  # here and below: a run that needs no advice starts a third sooner without it

    raise typer.Exit(train(build(given)))


def train(config: Config) -> int:
    """Run one configuration on this rank, as the last thing that this process does; returns the exit code."""
    from distrib.faults.guard import guarded  # what trains is imported when it trains, not for --help
    from distrib.loop import train as run

    with guarded() if config.elastic else nullcontext():
        return run(config, exiting=True)


def plain(arguments: list[str]) -> dict[str, Any] | None:
    """The options that were given, if each is a flag or has a sound value after it.

    None leaves all else to typer, which knows what to say.
    """
    known: dict[str, tuple[str, Any]] = {}
    for name, kind, _, _ in options():
        option, base = name.replace("_", "-"), TYPES[kind.split(" | ")[0]]
        known[f"--{option}"] = name, True if base is bool else base
        if base is bool:
            known[f"--no-{option}"] = name, False
    given, rest = {}, iter(arguments)
    for flag in rest:
        name, kind = known.get(flag, ("", None))
        value = kind if isinstance(kind, bool) else next(rest, None)
        if kind is None or value is None or str(value).startswith("--"):
            return None
        try:
            given[name] = parsed(flag, value, kind) if kind in (int, float) else value
        except UserError:
            return None
    return given


def _parser(flag: str, kind: type) -> Callable[[str], Any]:
    return lambda text: parsed(flag, text, kind)


def _signature(more: dict[str, Any]) -> inspect.Signature:
    """A typer option for each field and each of `more`. None means "not given": a recipe may set it."""
    import typer

    found = dict(more)
    for name, kind, default, text in options():
        base: Any = TYPES[kind.split(" | ")[0]]
        shown = text if default in (None, False) else f"{text} [default: {default}]"
        flag = f"--{name.replace('_', '-')}"
        if base is bool:
            flag = f"{flag}/--no-{flag[2:]}"
        extra: dict[str, Any] = {}
        if base in (int, float):  # typer's message lacks the value
            extra = {"metavar": base.__name__.upper(), "parser": _parser(flag, base)}
        elif base is str:
            what = "NAME" if name in (*CHOICES, "recipe", "model") else "PATH"
            extra = {"metavar": "A:B" if name == "trace_steps" else what}
        found[name] = Annotated[base | None, typer.Option(flag, help=shown, show_default=False, **extra)]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature(
        [inspect.Parameter(name, keyword, default=None, annotation=each) for name, each in found.items()]
    )


def with_options(command: Any, **more: Any) -> Any:
    """Give `command(**given)` the options of a training run, and `more` by name, as its parameters."""
    command.__signature__ = _signature(more)
    command.__annotations__ = {p.name: p.annotation for p in command.__signature__.parameters.values()}
    return command


def parse(arguments: list[str]) -> Config:
    """The configuration that `distrib train` builds from these arguments."""
    import typer

    found: list[Config] = []
    app = typer.Typer(add_completion=False)
    app.command()(with_options(lambda **given: found.append(build(given))))
    app(arguments, standalone_mode=False)
    if not found:  # --help
        raise typer.Exit
    return found[0]


def main() -> int:
    """`python -m distrib.train`: the same options as `distrib train`."""
    given = plain(sys.argv[1:])
    if given is not None:
        return run_work(lambda: train(build(given)))
    import typer

    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command("train")(with_options(train_command))
    return run_app(app)


if __name__ == "__main__":
    sys.exit(main())
