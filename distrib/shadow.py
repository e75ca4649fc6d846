"""Makes Python import our packages, even if the working folder has something of the same name.

`python -m` looks in the working folder first. Above a clone named `distrib`, with an editable install, it
takes the clone's folder for a namespace package `distrib`. Beside your own nn.py, it takes that for `nn`.
Import this module before anything else of `distrib`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def import_own(name: str) -> bool:
    """Import our package `name`, skipping the working folder; returns whether that succeeded."""
    before, here = sys.path[:], os.path.realpath(os.curdir)
    sys.path[:] = [place for place in before if os.path.realpath(place or os.curdir) != here]
    for known in [known for known in sys.modules if known.partition(".")[0] == name]:
        del sys.modules[known]
    try:
        importlib.invalidate_caches()
        importlib.import_module(name)
    except ImportError:
        return False
    finally:
        sys.path[:] = before
    return is_own(name)


def found(name: str) -> str | None:
    """The file that `import name` loads or has loaded, without running it."""
    if name in sys.modules:
        return getattr(sys.modules[name], "__file__", None)
    spec = importlib.util.find_spec(name)
    return spec.origin if spec else None


def is_own(name: str) -> bool:
    """Whether `import name` loads our package."""
    return Path(found(name) or "").resolve() == HERE.parent / name / "__init__.py"


def require_own_nn() -> None:
    """Import our `nn`. If another module takes its name: exit code 2 for a command, else ImportError."""
    as_command = sys.argv[:1] == ["-m"]  # while `python -m distrib…` imports this package
    if is_own("nn") or (as_command and import_own("nn")):
        return
    other = found("nn") or "another package"
    what = f"needs its own package nn, but that name is {other} here: rename it, or start in another folder"
    if as_command:
        print(f"distrib: error: {what}", file=sys.stderr)
        sys.exit(2)
    raise ImportError(f"distrib {what}")


if not is_own("distrib"):
    import_own("distrib")
