"""Judges the compiled CUDA kernels without a GPU: `static_report.py [--write] [--csrc DIR]`.

For every kernel of csrc, on every architecture: registers, stack and spills, shared memory, occupancy; and of its hot
loop (the innermost one with 128-bit loads from global memory) the instructions and special-function operations per
element, whether all accesses are 128 bits wide and whether any is in double. From these and from data-sheet rates
follows the least time an element takes: computed, not measured.

Exits with 1 where a kernel spills, has a stack, breaks its budget or has none. --write puts the table into
docs/cuda.md. Needs nvcc, cuobjdump and nvdisasm (PyPI: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm).
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nvcc
from budgets import BUDGETS, Budget

DOCUMENT = nvcc.ROOT / "docs" / "cuda.md"
BEGIN, END = "<!-- static_report.py writes from here", "<!-- to here -->"


@dataclass(frozen=True)
class Gpu:
    """Data-sheet figures; the clock is a cautious boost clock."""

    name: str
    processors: int
    clock: float  # Hz
    bandwidth: float  # bytes a second
    shared: int  # bytes a multiprocessor


GPUS = {
    "sm_80": Gpu("A100", 108, 1.41e9, 2.039e12, 164 << 10),
    "sm_90": Gpu("H100", 132, 1.755e9, 3.35e12, 228 << 10),
}
THREADS, BLOCKS, REGISTERS = 2048, 32, 65536  # a multiprocessor of either
LANES, SPECIAL_LANES = 128, 16  # results a cycle and multiprocessor: ordinary instructions, special functions
REACHABLE = 0.92  # of the data sheet's bandwidth

KINDS = (
    ("wide load", r"LDG\S*\.128"),
    ("narrow load", r"LDG"),
    ("wide store", r"STG\S*\.128"),
    ("narrow store", r"STG"),
    ("local", r"LDL|STL"),
    ("special", r"MUFU"),
    ("double", r"DADD|DMUL|DFMA|DSETP|DMNMX"),
)


@dataclass(frozen=True)
class Compiled:
    """One kernel on one architecture, as disassembled."""

    symbol: str
    name: str
    architecture: str
    registers: int
    stack: int
    shared: int
    code: list[tuple[int, str]]  # address, instruction

    def loops(self) -> list[list[str]]:
        """The innermost ones."""
        position = {address: n for n, (address, _) in enumerate(self.code)}
        spans = []
        for n, (address, text) in enumerate(self.code):
            target = re.search(r"\bBRA\S*\s+(?:\S+,\s*)*(0x[0-9a-f]+)", text)
            if target and int(target[1], 16) < address and int(target[1], 16) in position:
                spans.append((position[int(target[1], 16)], n))
        inner = [s for s in spans if not any(o != s and o[0] >= s[0] and o[1] <= s[1] for o in spans)]
        return [[text for _, text in self.code[start : end + 1]] for start, end in inner]

    def occupancy(self, block: int) -> float:
        warps = -(-block // 32)
        per_warp = -(-self.registers * 32 // 256) * 256
        blocks = min(THREADS // (warps * 32), BLOCKS, REGISTERS // (per_warp * warps))
        if self.shared:
            blocks = min(
                blocks, GPUS[self.architecture].shared // (self.shared + 1024)
            )  # 1 KiB a block is the system's
        return blocks * warps * 32 / THREADS


def count(instructions: list[str]) -> Counter[str]:
    counts = Counter(all=len(instructions))
    for text in instructions:
        counts[next((kind for kind, pattern in KINDS if re.match(pattern, text)), "other")] += 1
    return counts


def find_tool(name: str) -> str | None:
    found = shutil.which(name)
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        found = found or shutil.which(name, path=os.pathsep.join(map(str, Path(folder).glob("*/bin"))))
    return found


def disassemble(path: Path, architecture: str) -> Iterator[Compiled]:
    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    environment = {**os.environ, "PATH": f"{Path(nvdisasm).parent}{os.pathsep}{os.environ['PATH']}"}

    def run(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    usage = {
        m[1]: tuple(map(int, m.groups()[1:]))
        for m in re.finditer(
            r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)",
            run(cuobjdump, "-res-usage", "-arch", architecture, str(path)),
        )
    }
    code: dict[str, list[tuple[int, str]]] = {}
    for line in run(cuobjdump, "-sass", "-arch", architecture, str(path)).splitlines():
        if m := re.match(r"\s+Function : (\S+)", line):
            code[m[1]] = current = []
        elif m := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line):
            current.append((int(m[1], 16), m[2]))
    names = run("c++filt", *code).splitlines()
    for symbol, name in zip(code, names, strict=True):
        yield Compiled(symbol, name, architecture, *usage[symbol], code[symbol])
