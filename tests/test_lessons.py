"""The lessons' scripts print what their pages say, and the exercises' checks fail until they are solved."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import LIMIT, NOT_STARTED, ROOT, environment

LESSONS = ROOT / "docs" / "lessons"
NUMBERS = range(1, 6)
TIMES = re.compile(r"\d[\d.,]* (ms|s|MB)\b")
"""What differs from machine to machine and run to run, as printed."""

DIGEST = re.compile(r"(?<=weights )[0-9a-f]{8}\b")
NUMBER = re.compile(r"\d+\.\d+")
TOLERANCE = 0.02
"""Of numbers with a point: training enlarges what the BLAS of another processor rounds otherwise."""


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the lessons as a student has them, whose commands write nothing elsewhere."""
    folder = tmp_path_factory.mktemp("student")
    shutil.copytree(LESSONS, folder / "docs" / "lessons")
    return folder


def commands(page: str) -> Iterator[tuple[str, str]]:
    """(command, output) of each command whose output follows it."""
    yield from re.findall(r"^```sh\n([^\n]+)\n```\n\n```\n(.*?)^```$", page, re.S | re.M)


def done(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of a page in `folder`, as its reader does."""
    env = environment({"PYTHONWARNINGS": "ignore"})
    for _ in range(3):
        found = subprocess.run(
            command, shell=True, cwd=folder, env=env, text=True, capture_output=True, timeout=LIMIT
        )
        if NOT_STARTED not in found.stdout + found.stderr:
            break
    return found


def require_alike(printed: str, said: str, known: dict[str, str]) -> None:
    """AssertionError unless a command printed what its page says: the same words, and numbers near by.

    Digests are others on another machine: which of a page's are equal must be the same. `known` has them.
    """
    for ours, theirs in zip(DIGEST.findall(said), DIGEST.findall(printed)):
        assert known.setdefault(ours, theirs) == theirs, f"{ours} of the page was another digest before"
    ours, theirs = (NUMBER.sub("N", DIGEST.sub("D", TIMES.sub("T", text))) for text in (said, printed))
    assert theirs == ours
    for ours, theirs in zip(*(NUMBER.findall(TIMES.sub("T", text)) for text in (said, printed)), strict=True):
        last_digit = 10.0 ** -len(ours.split(".")[1])
        assert float(theirs) == pytest.approx(float(ours), rel=TOLERANCE, abs=2 * last_digit), printed


@pytest.mark.parametrize("number", NUMBERS)
def test_scripts_print_what_their_pages_say(number: int, student: Path) -> None:
    found, known = list(commands((LESSONS / f"lesson{number}.md").read_text())), dict[str, str]()
    assert found
    for command, said in found:
        result = done(command, student)
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        require_alike(result.stdout, said, known)
    assert len(set(known.values())) == len(known), "digests that differ on the page are equal here"


def checked(folder: Path) -> dict[int, Counter[str]]:
    """Outcomes of the tests of each exercise's check, which is run as a student does."""
    checks = " ".join(f"docs/lessons/check{number}.py" for number in NUMBERS)
    result = done(f"python -m pytest -v -p no:cacheprovider -p no:xdist {checks}", folder)
    outcomes: dict[int, Counter[str]] = {number: Counter() for number in NUMBERS}
    for number, outcome in re.findall(r"check(\d)\.py::\S.* (PASSED|FAILED|ERROR) ", result.stdout):
        outcomes[int(number)][outcome] += 1
    assert all(outcomes.values()), result.stdout + result.stderr
    return outcomes


def test_checks_fail_until_the_exercises_are_solved(student: Path) -> None:
    for number, outcomes in checked(student).items():
        assert set(outcomes) == {"FAILED"}, f"exercise {number}: a check passes that nobody solved"
    for path in (student / "docs/lessons/solutions").glob("exercise*.py"):
        shutil.copy(path, student / "docs/lessons")
    for number, outcomes in checked(student).items():
        assert set(outcomes) == {"PASSED"}, f"exercise {number}: its solution fails"
    judged = done("mpirun -n 2 python docs/lessons/trace3.py", student)
    first, *shares = judged.stdout.splitlines()
    assert (student / "runs" / "lesson3.json").exists(), judged.stderr
    assert first.startswith("steps 6 to 7 are in runs/lesson3.json")
    form = re.compile(r"rank [01], step [67]: 3 buckets, \d+ % of their time hidden")
    assert len(shares) == 4
    assert all(map(form.fullmatch, shares)), shares


@pytest.mark.quick
@pytest.mark.parametrize("number", NUMBERS)
def test_a_lesson_is_whole_and_its_script_short(number: int) -> None:
    page = (LESSONS / f"lesson{number}.md").read_text()
    script = (LESSONS / f"lesson{number}.py").read_text()
    assert f"](lesson{number}.svg)" in page
    assert f"docs/lessons/check{number}.py" in page
    assert len(script.splitlines()) <= 60
    assert "mpi4py" not in script
    assert "NotImplementedError" in (LESSONS / f"exercise{number}.py").read_text()
    assert sum(map(int, re.findall(r"^## .*\((\d+) minutes\)$", page, re.M))) == 45


@pytest.mark.quick
def test_output_that_differs_is_found() -> None:
    said = "step 3: loss 0.500, 12 ms\nweights 01234567\nweights 01234567\n"
    require_alike("step 3: loss 0.501, 99 ms\nweights 89abcdef\nweights 89abcdef\n", said, {})
    for printed in (
        said.replace("step 3", "step 4"),
        said.replace("0.500", "0.600"),
        said.replace("weights 01234567\n", "weights 00000000\n", 1),
        said + "more\n",
    ):
        with pytest.raises(AssertionError):
            require_alike(printed, said, {})
