"""Imports go downward only and never in a circle, CuPy is imported in one place, and files stay small."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.quick

LEVEL = {"nn": 0, "distrib": 1, "launch": 2}
LONGEST = 380
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
        "cupy": {"nn/cuda/backend.py", "distrib/comm/choice.py"},  # choice: only cupy.cuda.nccl
        "mpi4py": {"distrib/comm/mpi.py", "distrib/comm/start.py"},
        "torch": {
            "launch/torch_peer/network.py",
            "launch/torch_peer/side.py",
            "launch/bench/ops.py",
        },
        "pickle": set(),
    }
    for name, places in allowed.items():
        found = {str(path.relative_to(ROOT)) for path in FILES if name in imports(path)}
        assert found <= places, f"{name} in {found - places}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.name)
def test_no_skip_but_by_needs(path: Path) -> None:
    """Each skip says at the end of the run what it would have needed."""
    names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    skips = names & {"skip", "skipif", "importorskip", "xfail", "SkipTest"}
    assert skips == ({"skip"} if path.name == "needs.py" else set())


def imported_files(path: Path) -> set[Path]:
    """Our files that a file imports anywhere, inside functions too; for type checkers alone does not
    count."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    paths = [ROOT / name.replace(".", "/") for name in names]
    return {place for path in paths for place in (path.with_suffix(".py"), path / "__init__.py")} & {*FILES}


def circle(graph: dict[Path, set[Path]]) -> list[Path]:
    """Files that import each other in a circle, if there are any."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_nothing_is_imported_in_a_circle() -> None:
    graph = {path: imported_files(path) for path in FILES}
    layers, buffers = ROOT / "nn/layers/convolution.py", ROOT / "nn/buffers.py"
    assert buffers in graph[layers], "imports are read"
    assert not circle(graph)
    assert circle({**graph, buffers: {layers}}), "a circle would be found"


def test_nothing_in_nn_knows_the_gpu_wing() -> None:
    for path in (ROOT / "nn").rglob("*.py"):
        wing = {place for place in imported_files(path) if place.is_relative_to(ROOT / "nn/cuda")}
        assert not wing or path.is_relative_to(ROOT / "nn/cuda"), f"{path} imports {wing}"


def test_nn_imports_at_the_top_of_files_only() -> None:
    for path in (ROOT / "nn").rglob("*.py"):
        tree = ast.parse(path.read_text())
        inner = [
            node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node not in tree.body
        ]
        assert not [node.module for node in inner if (node.module or "").startswith("nn")], path
