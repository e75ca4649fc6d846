"""The network that --model names: one that ships, or a function in a file of your own."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distrib.errors import UserError
from distrib.files import alternatives, expanded, printable, reason
from nn.layer import Layer
from nn.models import MODELS
from nn.network import Model

FORM = "FILE.py:FUNCTION"
DIGEST = "model file"
"""What the digest of a network's file is called in a run's environment."""


def find(name: str) -> Model:
    """The function of (shape, classes, **options) that makes the layers; UserError says what is wrong.

    A file of your own is run: give this only a name that its user typed, never one that a file holds.
    """
    return MODELS[name] if name in MODELS else _own(name)


def given(function: Model) -> tuple[str, Model]:
    """(what --model would name it, the function as `find` returns it) of a function in a caller's program."""
    for name, own in MODELS.items():
        if own is function:
            return name, own
    called = getattr(function, "__name__", "model")
    called = called if called.isidentifier() else "model"
    try:
        path = Path(inspect.getsourcefile(function) or "")
    except TypeError:  # of an object that can be called
        path = Path()
    if path.suffix != ".py" or not path.is_file():
        path = Path("notebook.py")  # or whatever has no file
    name = f"{path}:{called}"
    return name, _checked(function, path, name)


def ships(name: str) -> bool:
    return name in MODELS


def short(name: str) -> str:
    """The name without its folder: a run whose file has moved is the same run."""
    return name.rpartition("/")[2]


def same(name: str, held: str, environment: Any) -> bool:
    """Whether `name` is the network that a run `held` in an environment: its file may have moved.

    Under its old name a file may have changed; under another it must be the same.
    """
    held_digest = environment.get(DIGEST) if isinstance(environment, dict) else None
    return short(name) == short(held) or (moved(name, held) and digest(name) == held_digest)


def before(name: str, held: str) -> str:
    """For a message, what a run `held` that is not the `same` as `name`, and what to do if it should be."""
    hint = "; its file was renamed and changed: undo one of both" if moved(name, held) else ""
    return printable(short(held), 60) + hint


def moved(name: str, held: str) -> bool:
    """Whether the two name a function alike, of files whose names differ."""
    path, _, function = short(name).rpartition(":")
    before, _, called = short(held).rpartition(":")
    return bool(path and before) and path != before and function == called


def require_form(name: str) -> None:
    """UserError unless `name` can be a network's."""
    if not ships(name):
        _place(name)


def options_of(function: Model, wanted: dict[str, Any], name: str) -> dict[str, Any]:
    """Those of `wanted` that the function takes; UserError for one off its default that it does not take."""
    takes: Container[str] = inspect.signature(function).parameters
    if any(each.kind is each.VAR_KEYWORD for each in inspect.signature(function).parameters.values()):
        takes = wanted
    for option, value in wanted.items():
        if option not in takes and value != DEFAULTS[option]:
            remedy = "leave it out" if ships(name) else "leave it out, or give its function that parameter"
            raise UserError(f"--{option} {value}: {printable(name)} has no {option}: {remedy}")
    return {option: value for option, value in wanted.items() if option in takes}


DEFAULTS = {"variant": "baseline", "width": 1.0}
"""What a network's function may take beside shape and classes, and is given by --variant and --width."""


def digest(name: str) -> str:
    """What identifies the file of a network that does not ship, or nothing."""
    if ships(name):
        return ""
    path = _place(name)[0]
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else ""
    except OSError:
        return ""


def _place(name: str) -> tuple[Path, str]:
    """File and function."""
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py") or not function.isidentifier():
        known = alternatives([*MODELS, FORM])
        raise UserError(f"--model {printable(name, 200)}: give {known}")
    return expanded(path, "--model").absolute(), function


def _own(name: str) -> Model:
    path, wanted = _place(name)
    if not path.is_file():
        raise UserError(f"--model {printable(name, 200)}: there is no file {path}: give {FORM}")
    function = getattr(_run(path, name), wanted, None)
    if not callable(function):
        raise UserError(f"--model {printable(name, 200)}: {path.name} has no function {wanted}: define it")
    return _checked(function, path, name)


def _checked(function: Model, path: Path, name: str) -> Model:
    """`function` of a file: what it raises, or returns that is no layer, becomes a UserError."""

    def model(shape: Any, classes: int, **options: Any) -> Layer:
        made = _guarded(lambda: function(shape, classes, **options), path, name)
        if not isinstance(made, Layer):
            kind = type(made).__name__
            raise UserError(f"--model {printable(name, 200)}: returns {kind}, no layer: return Sequential(…)")
        return made

    model.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return model


def _run(path: Path, name: str) -> Any:
    """The file as a module; what lies beside it can be imported by it."""
    spec = importlib.util.spec_from_file_location(f"distrib_model_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.append(str(path.parent))
    try:
        _guarded(lambda: spec.loader.exec_module(module), path, name)  # type: ignore[union-attr]
    finally:
        sys.path.remove(str(path.parent))
    return module


def _guarded(call: Callable[[], Any], path: Path, name: str) -> Any:
    """What `call`, which runs code of the file, returns; UserError with the line for whatever it raises."""
    where = f"--model {printable(name, 200)}"
    try:
        return call()
    except UserError:
        raise
    except OSError as error:
        if error.filename == str(path):
            raise UserError(f"{where}: cannot be read {reason(error, path)}") from None
        raise UserError(f"{where}: {_line(error, path)}{_said(error)}: mend the file") from None
    except SyntaxError as error:
        raise UserError(f"{where}: line {error.lineno}: {printable(error.msg)}: mend the file") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{where}: {_line(error, path)}{_said(error)}: mend the file") from None


@contextmanager
def building(name: str) -> Iterator[None]:
    """Context in which a network is built: what is wrong with one of your own becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:  # of a layer that does not fit
        if ships(name):
            raise
        raise UserError(f"--model {printable(name, 200)}: {error}") from None
    except Exception as error:
        if ships(name) or isinstance(error, MemoryError | OSError):
            raise
        raise UserError(f"--model {printable(name, 200)}: {_said(error)}: mend the file") from None


def _said(error: BaseException) -> str:
    return printable(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__, 300)


def _line(error: BaseException, path: Path) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"line {frames[-1].lineno}: " if frames else ""
