"""Imports go downward only, CuPy is imported in one place, and files stay small."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.quick

LEVEL = {"nn": 0, "distrib": 1, "launch": 2}
LONGEST = 420
TO_SPLIT = {  # formatting showed that they are longer
    "distrib/trainer.py",
    "launch/bench_allreduce.py",
    "launch/doctor.py",
    "launch/reproduce.py",
    "launch/scale.py",
    "nn/functional.py",
    "nn/kernels/dropins.py",
}
FILES = [path for package in LEVEL for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downward(path: Path) -> None:
    own = LEVEL[path.relative_to(ROOT).parts[0]]
    upward = {name for name in imports(path) if LEVEL.get(name, -1) > own}
    assert not upward


def test_who_may_import_what() -> None:
    allowed = {
        "cupy": {"nn/backend.py", "distrib/world.py"},  # world: only cupy.cuda.nccl
        "mpi4py": {"distrib/mpi.py", "distrib/world.py"},
        "torch": {
            "launch/torch_resnet9.py",
            "launch/torch_bench.py",
            "launch/torch_train.py",
            "launch/bench_ops.py",
        },
        "pickle": set(),
    }
    for name, places in allowed.items():
        found = {str(path.relative_to(ROOT)) for path in FILES if name in imports(path)}
        assert found <= places, f"{name} in {found - places}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_small(path: Path) -> None:
    small = len(path.read_text().splitlines()) <= LONGEST
    assert small != (str(path.relative_to(ROOT)) in TO_SPLIT)


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")), ids=lambda path: path.name)
def test_no_skip_but_by_needs(path: Path) -> None:
    """Each skip says at the end of the run what it would have needed."""
    names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    skips = names & {"skip", "skipif", "importorskip", "xfail", "SkipTest"}
    assert skips == ({"skip"} if path.name == "needs.py" else set())
