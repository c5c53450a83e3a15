"""Seeded bugs: breaks the CUDA kernels in one place at a time and tells which check notices.

    mutants.py                       every mutant; fails where one survives that EQUIVALENT does not explain
    mutants.py --sample 6            six of them, spread over the list
    mutants.py --only barrier        those whose name contains it         mutants.py --list

Every barrier, guard, comparison, rescaling, stride, rounding-up, shuffle and buffer size of every .cu and .cuh is
removed or shifted in turn by the rules of MUTATIONS. A mutant is compiled into the emulated tests, which run twice:
once for the values alone, with the checker's findings ignored, and once with its rules.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nvcc


@dataclass(frozen=True)
class Mutation:
    """Replaces each match of `pattern` in turn by `replacement` (a template of re, or "" to remove it)."""

    kind: str
    pattern: str
    replacement: str


@dataclass(frozen=True)
class Mutant:
    kind: str
    file: Path  # relative to csrc
    line: int
    before: str  # the line
    after: str
    text: str  # the whole file

    def __str__(self) -> str:
        return f"{self.kind} {self.file.name}:{self.line}"

    @property
    def key(self) -> tuple[str, str, str]:
        """Does not move with the lines around it."""
        return (self.kind, self.file.name, self.after)


# One level of nested parentheses.
INNER = r"(?:[^();]|\((?:[^()]|\([^()]*\))*\))*"

MUTATIONS = (
    Mutation("barrier removed", r"\b__sync(?:threads|warp)\([^()]*\);", ";"),
    Mutation("guard always true", rf"\bif \(({INNER})\)(?! *;)", "if (true)"),
    Mutation("guard always false", rf"\bif \(({INNER})\)(?! *;)", "if (false)"),
    Mutation("choice always first", r"([^=?(,]*) \? ([^:;?]*) : ", r"true ? \2 : "),
    Mutation("boundary moved up", r"(?<=[\w)\]]) < (?=[\w(])", " <= "),
    Mutation("boundary moved down", r"(?<=[\w)\]]) <= (?=[\w(])", " < "),
    Mutation("boundary moved", r"(?<=[\w)\]]) >= (?=[\w(-])", " > "),
    Mutation("rescaling removed", r"(?<=[;{}\s,])[\w.\->\[\]]+ \*= [^;,]+(?=[;,])", "(void)0"),
    Mutation(
        "stride shifted", r"(\w*(?:stride|blockDim\.x|gridDim\.x|kThreads|kWarpSize)\w*)(?=[;,) ])(?! =)", r"(\1 + 1)"
    ),
    Mutation("start shifted", r"\bthreadIdx\.x\b", "(threadIdx.x + 1)"),
    Mutation("one less", r" - 1\b(?!\.)", ""),
    Mutation("one more", r" \+ 1\b(?!\.)", ""),
    Mutation("shuffle distance halved", r"= (?:16|kWarpSize / 2)\b", "= 8"),
    Mutation("shared array one short", r"(__shared__ [^;\[]+\[)([^\]]+)\]", r"\1(\2) - 1]"),
)
