"""Commands take their own packages, whatever has their names in the working folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import ROOT, run, summary

SMALL = ("--width", 0.0625, "--limit-train", 32, "--limit-test", 16, "--epochs", 1, "--backend", "numpy")
EDITABLE = f"""
import sys
from importlib.machinery import PathFinder
from importlib.util import spec_from_file_location
from pathlib import Path


class Finder:  # as setuptools installs it for an editable install: behind the search of sys.path
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        parent, _, child = name.rpartition(".")
        folder = Path({str(ROOT)!r}, *name.split("."))
        if parent in ("distrib", "nn", "launch"):
            return PathFinder.find_spec(name, [str(folder.parent)])
        file = folder / "__init__.py"
        return spec_from_file_location(name, file) if file.exists() else None


sys.meta_path.insert(sys.meta_path.index(PathFinder) + 1, Finder)
"""


@pytest.fixture
def editable(tmp_path: Path) -> dict[str, str]:
    """The environment of a Python in which this repository is installed in editable form."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(EDITABLE)
    return {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": ""}


def test_in_the_folder_above_a_clone(editable: dict[str, str], tmp_path: Path) -> None:
    """There `distrib` is the clone's folder to Python, without our `__init__.py`."""
    (tmp_path / "distrib" / "distrib").mkdir(parents=True)
    code = "import distrib.shadow, distrib, nn, distrib.config; print(distrib.__file__, nn.__file__)"
    hidden = run("-c", "import distrib; print(distrib.__file__)", cwd=tmp_path, env=editable)
    assert hidden.stdout == "None\n", "the case is not what it should be"
    done = run("-c", code, cwd=tmp_path, env=editable)
    assert done.stdout.split() == [str(ROOT / "distrib" / "__init__.py"), str(ROOT / "nn" / "__init__.py")]


@pytest.mark.parametrize("form", ["nn.py", "nn/__init__.py", "nn/other.py"])
def test_beside_a_person_s_own_nn(form: str, editable: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "here" / form
    path.parent.mkdir(parents=True)
    path.write_text("raise SystemExit('not this one')\n" if form == "nn.py" else "")
    run("-m", "distrib.train", *SMALL, "--run-dir", "r", cwd=tmp_path / "here", env=editable)
    assert summary(tmp_path / "here" / "r")["finished"]


def test_a_program_with_another_nn_is_told(editable: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "nn.py").touch()
    (tmp_path / "mine.py").write_text("import distrib\n")
    done = run("mine.py", cwd=tmp_path, env=editable, check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        f"ImportError: distrib needs its own package nn, but that name is {tmp_path / 'nn.py'}"
    )


def test_a_command_that_cannot_have_its_nn_says_so_in_a_line(tmp_path: Path) -> None:
    """Of an installation whose `nn` another package has overwritten."""
    (tmp_path / "distrib").mkdir()
    for name in ("__init__.py", "shadow.py", "errors.py"):
        (tmp_path / "distrib" / name).write_bytes((ROOT / "distrib" / name).read_bytes())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "nn.py").touch()
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "other"), str(tmp_path)])}
    done = run("-m", "distrib.errors", cwd=tmp_path / "other", env=env, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("distrib: error: needs its own package nn, but that name is ")
    assert len(done.stderr.splitlines()) == 1
