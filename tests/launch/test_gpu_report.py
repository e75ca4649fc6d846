"""`make test-gpu` without a GPU says so, every command that it would run exists, and a report goes on where
it stopped; and what the kit for a machine without a network is built with."""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import ROOT, run

from distrib.errors import UserError
from distrib.train import parse
from launch import cli
from launch.bench import gpu_report
from launch.bench.gpu_report import Part, Turns


def of_the_kit(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of tests/gpu."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "gpu"))
    return import_module(name)


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run(
        "-m",
        "launch.cli",
        "gpu-report",
        "--out",
        tmp_path / "report.json",
        check=False,
        env={"CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("distrib: error: distrib gpu-report needs a GPU: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "report.json").exists()


def test_it_lists_its_parts() -> None:
    *lines, total = run("-m", "launch.cli", "gpu-report", "--list").stdout.splitlines()
    parts = gpu_report.parts()
    assert [line.split()[1] for line in lines] == list(parts)
    assert f"{sum(part.usual for part in parts.values()):.0f} s as a rule" in total
    assert f"at most {sum(part.limit for part in parts.values()):.0f} s" in total
    assert "python -m launch.cli bench step --backend cupy" in "\n".join(lines)


def test_parts_are_in_order_and_fit_into_a_call() -> None:
    parts = gpu_report.parts().values()
    groups = [part.group for part in parts]
    assert groups == sorted(groups)
    assert set(groups) == set("abcdefg")
    assert all(0 < part.usual <= part.limit <= gpu_report.LONGEST for part in parts)
    assert sum(part.usual for part in parts if part.group <= "e") <= 1800, "half an hour holds a to e"


@pytest.mark.parametrize("rehearsed", [False, True])
@pytest.mark.parametrize("name", gpu_report.parts())
def test_every_part_can_be_called(name: str, rehearsed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    part = gpu_report.parts()[name]
    command = gpu_report.rehearsal(part).command if rehearsed else part.command
    if command == ("nvidia-smi",):
        return
    words = list(command[command.index(sys.executable) + 1 :])
    assert not rehearsed or not {"cupy", "nccl", "tf32", "bf16", "compute-sanitizer"} & set(words)
    if "-k" in words or "pytest" in words:
        *_, file = (ROOT / word for word in words if word.endswith(".py"))
        assert all((ROOT / word).exists() for word in words if word.endswith(".py"))
        chosen = words[words.index("-k") + 1].split(" or ") if "-k" in words else []
        assert all(word in file.read_text() for word in chosen)
    elif words[0] == "tests/gpu/checks.py":
        assert callable(of_the_kit("checks", monkeypatch).parse(words[1:]).check)
    else:
        assert words[:2] == ["-m", "launch.cli"]
        can_be_parsed(words[2:], "numpy" if rehearsed or name.startswith("numpy") else "cupy")


def can_be_parsed(words: list[str], backend: str) -> None:
    """Whether the command line is one that `distrib` takes."""
    command: Any = typer.main.get_command(cli.app)
    while hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name].real()
    context = command.make_context(command.name, words)
    assert context.params["as_json"]
    if command.name == "run":  # what is left over are options of `distrib train`
        assert parse(context.args).backend == backend
    elif "backend" in context.params:
        assert context.params["backend"] == backend


def test_a_part_that_fails_or_never_ends_is_reported() -> None:
    good = gpu_report.run((sys.executable, "-c", "print('{\"a\": 1}')"), {}, 60)
    assert (good["code"], good["result"]) == (0, {"a": 1})
    bad = gpu_report.run(
        (sys.executable, "-c", "import os; print(os.environ['X']); raise SystemExit(3)"), {"X": "y"}, 60
    )
    assert (bad["code"], bad["stdout"]) == (3, "y\n")
    slow = gpu_report.run((sys.executable, "-c", "import time; time.sleep(60)"), {}, 0.5)
    assert slow["code"] == -1
    assert "ended after" in slow["stderr"]
    assert gpu_report.run(("/no/such/program",), {}, 1)["code"] == -1


def a_part(code: str, limit: float = 60, usual: float = 0) -> Part:
    return Part("a", (sys.executable, "-c", code), {}, limit, usual)


def take(out: Path, budget: float | None, **parts: Part) -> tuple[dict, bool]:
    """One call: what the report holds of the parts then, and whether none failed."""
    report = json.loads(out.read_text()) if out.exists() else {"parts": {}}
    turns = Turns(out, report, budget)
    for name, part in parts.items():
        turns.take(name, part)
    good = turns.end(parts)
    return json.loads(out.read_text())["parts"], good


def test_a_call_goes_on_where_the_one_before_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, count = tmp_path / "report.json", tmp_path / "count"
    counting = f"open({str(count)!r}, 'a').write('x')"
    parts = {
        "good": a_part(counting),
        "bad": a_part(f"{counting}; raise SystemExit(3)"),
        "long": a_part(counting, usual=1000),
        "short": a_part(counting),
        "slow": a_part("import time; time.sleep(60)"),
    }
    found, good = take(out, 2, **parts)
    assert not good
    assert {name: each["code"] for name, each in found.items()} == {
        "good": 0,
        "bad": 3,
        "short": 0,
        "slow": -1,
    }
    assert [each for each in found.values() if "cut" in each] == [found["slow"]]
    assert len(count.read_text()) == 3
    assert "failed: bad; left for the next call: long, slow" in capsys.readouterr().out

    found, good = take(out, 2000, **{**parts, "slow": a_part(counting)})
    assert {name: each["code"] for name, each in found.items()} == {**dict.fromkeys(parts, 0), "bad": 3}
    assert len(count.read_text()) == 3 + 2
    assert "bad: failed before" in capsys.readouterr().out

    take(out, None, bad=parts["bad"])
    assert "bad: FAILED" in capsys.readouterr().out, "without a budget what failed runs again"


def test_a_part_whose_limit_is_over_has_failed(tmp_path: Path) -> None:
    found, good = take(tmp_path / "report.json", 60, slow=a_part("import time; time.sleep(60)", limit=0.3))
    assert found["slow"]["code"] == -1
    assert "cut" not in found["slow"]
    assert not good


def test_a_tool_that_is_missing_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, good = take(tmp_path / "report.json", 60, check=Part("a", ("no-such-tool", "--x"), {}, 60, 1))
    assert good
    assert found["check"] == {
        "command": "no-such-tool --x",
        "not_run": "there is no no-such-tool on the path",
    }
    assert "0 of 1 parts passed; not run: check" in capsys.readouterr().out


def test_parts_are_chosen_by_group_or_name(tmp_path: Path) -> None:
    assert set(gpu_report.choose(["b", "fast99"], None)) == {"graph-float32", "graph-tf32", "fast99"}
    assert list(gpu_report.choose(None, None)) == list(gpu_report.parts())
    with pytest.raises(UserError, match="--only sing: no part's name holds that: nvidia-smi, doctor"):
        gpu_report.choose(["sing"], None)
    loaded = gpu_report.choose(None, tmp_path / "libnccl.so.2")
    with_it = {name for name, part in loaded.items() if "LD_PRELOAD" in part.environment}
    assert with_it == {"doctor-2", "tests-ranks", "allreduce-nccl", "killed", "ranks-2", "ranks-4"}


def test_a_rehearsal_runs_without_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "rehearsal.json"
    done = run("-m", "launch.cli", "gpu-report", "--rehearse", "--only", "numpy-vec", "--out", out)
    assert f"{out}: 1 of 1 parts passed" in done.stdout
    assert json.loads(out.read_text())["parts"]["numpy-vectorised"]["result"]["steps"] == 2


def test_what_is_wrong_with_graphs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = of_the_kit("checks", monkeypatch)

    def judged(first: float = 2.0, second: float = 1.0, third: float = 1.0, **graphs: Any) -> list[str]:
        run = {"losses": [2.0, 1.0, 1.0, 1.0], "digest": "d", "without_graphs": False}
        host = {"losses": [first, second, third]}
        return checks.judged({"graphs": run | graphs, "eager": dict(run), "host": host}, "float32")["wrong"]

    assert judged() == []
    assert judged(first=2.001) == ["the first loss is 0.0005 from the host's"]
    assert judged(second=1.01) == ["the second loss is 0.0099 from the host's"]
    assert judged(third=1.5) == ["the mean loss of 3 steps is 0.11 from the host's"]
    assert judged(digest="e") == ["graphs and eager steps end with different parameters"]
    assert judged(losses=[2.0, 1.0, 1.0, 1.1]) == ["graphs and eager steps have different losses"]
    assert judged(without_graphs=True) == ["there were no graphs"]
    assert any("nan" in words for words in judged(losses=[float("nan")] * 4))


def test_a_killed_rank_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = of_the_kit("checks", monkeypatch)
    options = argparse.Namespace(backend="numpy", comm="mpi", width=0.0625, after=5)
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    found = checks.killed(options)
    assert found["wrong"] == [], found
    assert found["verdict"].startswith("distrib: rank 1 on "), found


def elf(*code: tuple[int, int, bytes]) -> bytearray:
    """A 64-bit ELF file whose .nv_fatbin holds one fat binary of these (kind, architecture, code)."""
    body = b"".join(
        struct.pack("<HHIQ", kind, 1, 64, len(text)) + bytes(12) + struct.pack("<I", arch) + bytes(32) + text
        for kind, arch, text in code
    )
    fat = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body
    names = b"\0.nv_fatbin\0__nv_relfatbin\0.shstrtab\0"
    parts = [(".nv_fatbin", bytes(8) + fat), ("__nv_relfatbin", b"relink!!"), (".shstrtab", names)]
    data, heads = bytearray(64), [bytes(64)]
    for name, content in parts:
        at = names.index(name.encode())
        heads.append(struct.pack("<IIQQQQ", at, 1, 0, 0, len(data), len(content)).ljust(64, b"\0"))
        data += content
    data[:5] = b"\x7fELF\x02"
    struct.pack_into("<Q", data, 40, len(data))
    struct.pack_into("<HHH", data, 58, 64, len(heads), len(heads) - 1)
    return data + b"".join(heads)


def test_only_one_architecture_is_left_of_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    slim = of_the_kit("slim_nccl", monkeypatch).slim
    data = elf((2, 80, b"A" * 24), (2, 90, b"H" * 40), (1, 90, b"P" * 16), (2, 100, b"B" * 8))
    whole = bytes(data)
    assert slim(data, 90) == (40, 24 + 16 + 8 + 8)
    assert len(data) == len(whole)
    assert b"H" * 40 in data
    assert not any(text in data for text in (b"A" * 24, b"P" * 16, b"B" * 8, b"relink"))
    changed = {at for at, (old, new) in enumerate(zip(whole, data, strict=True)) if old != new}
    assert {whole[at : at + 1] for at in changed} <= {
        b"A",
        b"P",
        b"B",
        *(b"%c" % byte for byte in b"relink!"),
    }
    with pytest.raises(ValueError, match="no machine code for sm_75"):
        slim(bytearray(whole), 75)


def test_a_wheel_is_unpacked_with_what_lies_beside_its_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpack = of_the_kit("kit", monkeypatch).unpack
    wheel = tmp_path / "mpi-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("mpi/__init__.py", "")
        for name, mode in (("bin/mpirun", 0o755), ("lib/libmpi.so", 0o644)):
            info = zipfile.ZipInfo(f"mpi-1.data/data/{name}")
            info.external_attr = mode << 16
            archive.writestr(info, name)
    unpack(wheel, tmp_path / "to")
    files = {str(path.relative_to(tmp_path / "to")): path for path in (tmp_path / "to").rglob("*")}
    assert set(files) == {"mpi", "mpi/__init__.py", "bin", "bin/mpirun", "lib", "lib/libmpi.so"}
    assert os.access(files["bin/mpirun"], os.X_OK)
    assert not files["lib/libmpi.so"].stat().st_mode & 0o111


def test_what_is_carried_is_what_the_project_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kit's packages and those of the machine are all that pyproject.toml asks for."""
    import tomllib

    kit = of_the_kit("kit", monkeypatch)
    asked = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    assert asked - set(kit.lacking()) == {"numpy>=2.0", "mpi4py>=4.0"}
