"""Compiles the CUDA kernels with nvcc for the checks that need no GPU. Nothing here runs on one."""

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "nvcc"
ARCHITECTURES = ("sm_80", "sm_90")
# As CMakeLists.txt has them, and line numbers.
FLAGS = ("-std=c++20", "--expt-relaxed-constexpr", "-O3", "-lineinfo", "-Xcompiler", "-fPIC")


def find_nvcc() -> str | None:
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{toolkit}/bin")


@functools.cache
def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


@dataclass(frozen=True)
class Compiled:
    """One source, for every architecture at once: an object with their SASS and nvcc's launch stubs, and the PTX."""

    object: Path
    ptx: dict[str, Path]


def compile_kernels(source: Path, csrc: Path = ROOT / "csrc", out: Path = BUILD) -> Compiled:
    """Kept until a header of csrc or the source changes."""
    nvcc = find_nvcc()
    assert nvcc is not None
    digest = hashlib.sha256(" ".join((nvcc, *FLAGS)).encode())
    for file in sorted([*csrc.rglob("*.h"), *csrc.rglob("*.cuh"), source]):
        digest.update(file.read_bytes())
    folder = out / f"{source.stem}-{digest.hexdigest()[:16]}"
    virtual = {a: a.replace("sm", "compute") for a in ARCHITECTURES}
    compiled = Compiled(folder / f"{source.stem}.o", {a: folder / f"{source.stem}.{v}.ptx" for a, v in virtual.items()})
    if not compiled.object.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "part.o"
        targets = [f"-gencode=arch={v},code={a}" for a, v in virtual.items()]
        include = [f"-I{csrc}", f"-I{torch_folder() / 'include'}"]
        keep = ["--keep", f"--keep-dir={folder}"]
        subprocess.run([nvcc, *FLAGS, *targets, *include, *keep, "-c", source, "-o", part], check=True)
        for intermediate in folder.glob("*.ii"):
            intermediate.unlink()
        part.rename(compiled.object)
    return compiled


@dataclass(frozen=True)
class Tests:
    """The emulator's test program of one kernel file over nvcc's object, for ptx/run_tests.py."""

    library: Path
    ptx: dict[str, Path]


def link_tests(kernel: str = "kl_div", csrc: Path = ROOT / "csrc", out: Path = BUILD) -> Tests:
    compiled = compile_kernels(csrc / kernel / f"{kernel}_cuda.cu", csrc, out)
    folder = compiled.object.parent
    torch = torch_folder()
    library = folder / f"test_{kernel}.so"
    sources = [HERE / f"test_{kernel}_cuda.cpp", HERE / "ptx" / "fake_cudart.cpp"]
    if (profile := HERE / f"profile_{kernel}.cpp").exists():
        sources.append(profile)
    if not library.exists() or any(s.stat().st_mtime > library.stat().st_mtime for s in sources):
        include = [f"-I{csrc}", f"-I{HERE / 'emulator'}", f"-I{torch / 'include'}", *gtest("-I")]
        part = folder / "part.so"
        objects = [*sources, compiled.object, "-o", part]
        libraries = ["-Wl,-u,main", *gtest("-L"), "-lgtest_main", "-lgtest", f"-L{torch / 'lib'}", "-lc10"]
        options = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wl,-Bsymbolic", f"-Wl,-rpath,{torch / 'lib'}"]
        subprocess.run(["c++", *options, *include, *objects, *libraries], check=True)
        part.rename(library)
    return Tests(library, compiled.ptx)


def gtest(option: str) -> list[str]:
    """Where CMake has put GoogleTest, if it is not the system's."""
    fetched = {"-I": ROOT / "build/_deps/googletest-src/googletest/include", "-L": ROOT / "build/lib"}[option]
    return [f"{option}{fetched}"] if fetched.exists() else []
