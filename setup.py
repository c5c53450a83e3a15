"""Runs CMake, the one description of sources and flags, and ships its install tree in the package.

CMAKE_ARGS is passed on to CMake, MAX_JOBS limits the compilers that run at once (default: one per core).
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def project_version() -> str:
    match = re.search(r"project\(TorchDivergence VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text())
    assert match is not None
    return match[1]


def torch_folder() -> str:
    torch = find_spec("torch")
    if torch is None or not torch.submodule_search_locations:
        sys.exit(
            "torch_divergence is built with the torch it will run with: first 'pip install torch setuptools ninja', "
            "then 'pip install --no-build-isolation .'"
        )
    return torch.submodule_search_locations[0]


class CMakeBuild(build_ext):
    def run(self) -> None:
        self.into_source = self.editable_mode or self.inplace  # setuptools clears `inplace` while it builds
        super().run()

    def build_extension(self, ext: Extension) -> None:
        build = ROOT / "build"  # the developer's: nothing is compiled twice, and options set there hold here
        in_wheel = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        package = ROOT / "python" / "torch_divergence" if self.into_source else in_wheel
        generator = ["-G", "Ninja"] if shutil.which("ninja") and not (build / "CMakeCache.txt").exists() else []
        # -U: what was found for another Python is looked for again.
        self.cmake("-S", ROOT, "-B", build, *generator, "-U", "LibTorch_*", f"-DLibTorch_ROOT={torch_folder()}",
                   f"-DPython3_EXECUTABLE={sys.executable}", "-DTD_PYTHON=ON",
                   *shlex.split(os.environ.get("CMAKE_ARGS", "")))  # fmt: skip
        self.cmake("--build", build, "--parallel", os.environ.get("MAX_JOBS", str(os.cpu_count())))
        self.cmake("--install", build, "--prefix", package)
        self.cmake("--install", build, "--prefix", package, "--component", "python")

    def cmake(self, *arguments: str | Path) -> None:
        if shutil.which("cmake") is None:
            sys.exit("torch_divergence needs CMake 3.25 or newer: 'pip install cmake' or 'apt-get install cmake'")
        subprocess.check_call(["cmake", *map(str, arguments)])

    def copy_extensions_to_source(self) -> None:
        pass  # CMake has installed them there


# Tools of this environment, ninja above all, come before the system's.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
setup(
    version=project_version(),
    packages=["torch_divergence", "torch_divergence.functional", "torch_divergence.modules"],
    package_dir={"": "python"},
    package_data={"torch_divergence": ["py.typed", "*.pyi"]},
    ext_modules=[Extension("torch_divergence._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
