"""Compiles the library's sources with the headers of the oldest torch that is supported, and of those after it.

    python .ci/torch_headers.py COMPILE_COMMANDS CACHE_FOLDER [--quick]

--quick: the oldest one only, and only the sources of core/ and of one divergence, which between them include all of
torch's headers that are not public. The headers are unpacked from the macOS wheels, which are small; nothing is linked
or run. The commands are the build's own, with another torch and -fsyntax-only.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SUPPORTED = ("2.12", "2.13", "2.14", "2.15")


def installed_torch() -> Path:
    torch = find_spec("torch")
    assert torch is not None and torch.origin is not None
    return Path(torch.origin).parent


def headers(minor: str, cache: Path) -> Path:
    folder = cache / minor
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as download:
            subprocess.check_call(
                [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps",
                 "--only-binary=:all:", "--python-version=3.11", "--platform=macosx_11_0_arm64",
                 "--platform=macosx_14_0_arm64", "--dest", download, f"torch=={minor}.*"]
            )  # fmt: skip
            (wheel,) = Path(download).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.startswith("torch/include/")]
                archive.extractall(Path(download) / "unpacked", names)
            # Sleef's header declares what the wheel's processor has, so the installed torch's stands in for it: that
            # Sleef itself did not change between the versions is assumed here, not checked.
            shutil.copy(installed_torch() / "include" / "sleef.h", Path(download) / "unpacked" / "torch" / "include")
            (Path(download) / "unpacked").rename(folder)
    return folder / "torch" / "include"


def check(entry: dict[str, str], include: Path) -> str:
    """What the compiler says; empty if it takes the file."""
    command = re.sub(r"\S+/torch/include(?=[ /])", str(include), entry["command"])
    words = shlex.split(command)
    out = words.index("-o")
    words[out : out + 2] = ["-fsyntax-only"]
    result = subprocess.run(words, cwd=entry["directory"], capture_output=True, text=True)
    return result.stderr if result.returncode else ""


def main() -> None:
    commands, cache, quick = Path(sys.argv[1]), Path(sys.argv[2]).resolve(), sys.argv[3:] == ["--quick"]
    wanted = ("/csrc/core/", "/csrc/kl_div/kl_div.cpp") if quick else ("/csrc/", "/unity_")
    entries = [entry for entry in json.loads(commands.read_text()) if any(part in entry["file"] for part in wanted)]
    assert entries, f"{commands} compiles nothing from csrc"
    installed = ".".join(version("torch").split(".")[:2])
    failed = 0
    for minor in SUPPORTED[: 1 if quick else None]:
        if minor == installed:  # the build itself is the check
            continue
        include = headers(minor, cache)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            errors = list(pool.map(lambda entry, include=include: check(entry, include), entries))
        for entry, error in zip(entries, errors, strict=True):
            if error:
                print(f"{entry['file']} with torch {minor}:\n{error}")
        wrong = sum(map(bool, errors))
        print(f"torch {minor}: {len(entries) - wrong} of {len(entries)} files compile", flush=True)
        failed += wrong
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
