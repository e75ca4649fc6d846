"""The program's packages are its own, whatever has their names in the working folder.

`python -m` looks there first. In the folder above a clone named `distrib`, and with an editable install,
`distrib` is that clone, a namespace package without our `__init__.py`; beside a person's nn.py, `nn` is that
file. Import this before anything else of `distrib`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def import_own(name: str) -> bool:
    """Import package `name`, which lies beside this one, passing over the working folder; False if none."""
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
    """The file that `import name` gives or has given, which is not run."""
    if name in sys.modules:
        return getattr(sys.modules[name], "__file__", None)
    spec = importlib.util.find_spec(name)
    return spec.origin if spec else None


def is_own(name: str) -> bool:
    """Whether `import name` gives the package beside this one."""
    return Path(found(name) or "").resolve() == HERE.parent / name / "__init__.py"


def require_own_nn() -> None:
    """Import our `nn`. Where another has its name: one line and exit code 2 of a command, or ImportError."""
    as_command = sys.argv[:1] == ["-m"]  # so it is while `python -m distrib…` imports the package
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
