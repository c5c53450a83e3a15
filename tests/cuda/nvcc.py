"""Compiles the library's CUDA kernels with nvcc, for the checks that need no GPU. Nothing here runs on one."""

import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("sm_80", "sm_90")
# As CMakeLists.txt has them, and line numbers.
FLAGS = ("-std=c++20", "--expt-relaxed-constexpr", "-O3", "-lineinfo", "-Xcompiler", "-fPIC")


def find_nvcc() -> str | None:
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{toolkit}/bin")


@dataclass(frozen=True)
class Compiled:
    """One source, for every architecture at once."""

    source: Path
    object: Path
    ptx: dict[str, Path]  # by architecture


def sources(csrc: Path = ROOT / "csrc") -> list[Path]:
    return sorted(csrc.glob("*/*.cu"))


def compile_kernels(source: Path, csrc: Path = ROOT / "csrc", out: Path = ROOT / "build" / "nvcc") -> Compiled:
    """The object holds the SASS of every architecture and nvcc's own launch stubs. Kept until a file of csrc changes."""
    nvcc = find_nvcc()
    assert nvcc is not None
    digest = hashlib.sha256(" ".join((nvcc, *FLAGS)).encode())
    for file in sorted([*csrc.rglob("*.h"), *csrc.rglob("*.cuh"), source]):
        digest.update(file.read_bytes())
    folder = out / f"{source.stem}-{digest.hexdigest()[:16]}"
    compiled = Compiled(
        source,
        folder / f"{source.stem}.o",
        {a: folder / f"{source.stem}.{a.replace('sm', 'compute')}.ptx" for a in ARCHITECTURES},
    )
    if not compiled.object.exists():
        folder.mkdir(parents=True, exist_ok=True)
        targets = [f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in ARCHITECTURES]
        part = folder / "part.o"
        command = [nvcc, *FLAGS, *targets, f"-I{csrc}", "--keep", f"--keep-dir={folder}", "-c", source, "-o", part]
        subprocess.run(command, check=True)
        for intermediate in folder.glob("*.ii"):
            intermediate.unlink()
        part.rename(compiled.object)
    return compiled
