"""What the documents name exists, the README is one page, and its sample and its figures are true."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer
from conftest import ROOT, run

from launch.cli import app
from launch.lazy import Lazy

DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "slurm/README.md")]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))
LESSONS = sorted((ROOT / "docs" / "lessons").glob("*.md"))
PICTURES = sorted((ROOT / "docs").rglob("*.svg"))
ROOMS = ("nn", "distrib", "launch", "tests", "slurm", "docs")
SOURCES = [path for room in ROOMS for path in (ROOT / room).rglob("*")]
MOST_WORDS = 7000
"""Of all documents together, code blocks and figures apart, and the changelog, which grows by its nature, and
the lessons."""

MOST_LESSON_WORDS = 700
"""Of a lesson's page, counted alike: it is read from its beginning to its end, in a part of 45 minutes."""

OTHERS_FILES = {"sample.py", "nn.py", "net.py", "power.py"}
"""Of the reader."""

SLURM = (
    "array batch cpus-per-task exclusive gpu-bind gpus gpus-per-node gres job mpi nodes ntasks-per-node pty"
    " signal time wrap"
)
OTHERS_OPTIONS = {"--logdir", "--with-ft", *(f"--{name}" for name in SLURM.split())}
"""Of TensorBoard, Slurm and mpirun."""

by_document = pytest.mark.parametrize(
    "path", DOCUMENTS + LESSONS, ids=lambda path: str(path.relative_to(ROOT))
)


def spans(text: str) -> list[str]:
    """What a document sets as code: words between backticks, and blocks."""
    blocks = re.findall(r"^```.*?^```", text, re.S | re.M) + re.findall(r"^ {4}\S.*$", text, re.M)
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)) + blocks


def anchors(path: Path) -> set[str]:
    """Targets of links to the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def expanded(pattern: str) -> Iterator[str]:
    """A shell's pattern {a,b}.py as a.py and b.py."""
    if found := re.search(r"\{([^}]*)\}", pattern):
        for choice in found[1].split(","):
            yield from expanded(pattern.replace(found[0], choice, 1))
    else:
        yield pattern


@pytest.mark.quick
@by_document
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    for link in links:
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), f"{path.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{path.name}: {link}"


@pytest.mark.quick
@by_document
def test_files_and_names_exist(path: Path) -> None:
    names = {source.name for source in SOURCES} | {source.name for source in ROOT.iterdir()}
    code = "\n".join(source.read_text() for source in SOURCES if source.suffix == ".py")
    for span in spans(path.read_text()):
        for name in re.findall(r"(?<![\w./-])(?:[\w-]+/)*[\w-]+\.(?:py|cu|sh|md|toml)\b", span):
            known = (ROOT / name).exists() or ("/" not in name and name in names | OTHERS_FILES)
            assert known, f"{path.name}: no {name}"
        if found := re.fullmatch(r"([A-Z]\w+)\.(\w+)", span):
            assert f"class {found[1]}" in code, f"{path.name}: {span}"
            assert f"def {found[2]}(" in code, f"{path.name}: {span}"
        if re.fullmatch(r"(nn|distrib|slurm|tests|docs|results)/[\w/-]+/?", span):
            assert (ROOT / span).is_dir(), f"{path.name}: no {span}"


@pytest.mark.quick
@by_document
def test_commands_and_options_exist(path: Path) -> None:
    known, options = set(), {"--help", *OTHERS_OPTIONS}
    waiting = [typer.main.get_command(app)]
    for command in waiting:
        known.add(command.name)
        command = command.real() if isinstance(command, Lazy) else command
        waiting += getattr(command, "commands", {}).values()
        options |= {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
    for span in spans(path.read_text()):
        named = re.findall(r"(?<![\w./-])distrib (?:bench )?([a-z]+(?:-[a-z]+)*)\b", span)
        assert known.issuperset(named), f"{path.name}: {span}"
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", span):
            assert option in options, f"{path.name}: {option} in {span}"


@pytest.mark.quick
def test_the_readme_is_a_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def words_of(path: Path) -> int:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.S | re.M)
    return len(re.findall(r"[^\W\d_][\w'-]*", text))


@pytest.mark.quick
@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.name)
def test_lessons_stay_short(path: Path) -> None:
    assert words_of(path) <= MOST_LESSON_WORDS


@pytest.mark.quick
def test_documents_stay_short() -> None:
    words = sum(words_of(path) for path in DOCUMENTS if path.name != "CHANGELOG.md")
    assert words <= MOST_WORDS, f"cut {words - MOST_WORDS} words: say it once, in the document it belongs to"


@pytest.mark.quick
@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_pictures_are_text_for_dark_and_light(path: Path) -> None:
    svg = "{http://www.w3.org/2000/svg}"
    tags = {element.tag for element in ElementTree.parse(path).iter()}
    assert {f"{svg}title", f"{svg}desc", f"{svg}text"} <= tags
    assert not tags & {f"{svg}script", f"{svg}image", f"{svg}foreignObject"}
    assert "prefers-color-scheme: dark" in path.read_text()
    assert path.stat().st_size < 10_000


@pytest.mark.quick
def test_the_core_is_as_long_as_the_readme_says() -> None:
    readme = (ROOT / "README.md").read_text()
    said = re.search(r"The core is ([\d,]+) lines", readme)
    command = re.search(r"^cat (nn/.*?) \| wc -l$", readme, re.S | re.M)
    assert said
    assert command
    patterns = [each for word in command[1].replace("\\\n", " ").split() for each in expanded(word)]
    count = 0
    for pattern in patterns:
        paths = sorted(ROOT.glob(pattern))
        assert paths, f"no {pattern}"
        count += sum(len(path.read_text().splitlines()) for path in paths)
    assert abs(count - int(said[1].replace(",", ""))) <= 0.05 * count, f"the core is {count} lines"


def test_the_readmes_sample_trains_alike_on_one_rank_and_on_two(tmp_path: Path) -> None:
    found = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    assert found
    sample = tmp_path / "sample.py"
    sample.write_text(found[1])
    alone, two = (run(sample, cwd=tmp_path, ranks=ranks).stdout.splitlines() for ranks in (1, 2))
    assert len(alone) == len(two) == 4
    assert alone[0] == two[0], "the same weights, images and sums"
    for lines in (alone, two):
        first, *_, last = (float(line.rsplit(" ", 1)[1]) for line in lines)
        assert last < first / 3
