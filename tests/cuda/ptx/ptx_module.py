"""Reads a PTX module: its kernels' parameters, registers, memory and instructions."""

import re
from dataclasses import dataclass, field


class PtxError(Exception):
    """PTX that this interpreter does not know: refused, never guessed."""


@dataclass
class Instruction:
    text: str
    at: str  # file:line of the source, of the caller where an intrinsic was inlined
    pc: int
    predicate: str | None
    negated: bool
    opcode: str
    modifiers: tuple[str, ...]
    operands: list[str]


@dataclass
class Kernel:
    name: str
    parameters: list[tuple[str, int, int]] = field(default_factory=list)  # name, offset, size
    registers: dict[str, str] = field(default_factory=dict)  # name -> type
    shared: dict[str, tuple[int, int | None]] = field(default_factory=dict)  # name -> alignment, size (None: dynamic)
    local: dict[str, int] = field(default_factory=dict)  # name -> offset
    local_size: int = 0
    constants: set[str] = field(default_factory=set)  # names of the module's strings, whose places only calls are given
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    branch_targets: dict[str, list[str]] = field(default_factory=dict)


def split_operands(text: str) -> list[str]:
    """At the commas outside of braces and brackets."""
    parts, depth, start = [], 0, 0
    for at, c in enumerate(text):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    return [*parts, text[start:].strip()] if text.strip() else []


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a module by their (mangled) names."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    files = {m[1]: m[2].rsplit("/", 1)[-1] for m in re.finditer(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M)}
    text = re.sub(r"//[^\n]*|^\s*\.file[^\n]*", "", text, flags=re.M)
    text = re.sub(r"\.section\s+\S+\s*\{[^}]*\}", "", text)
    text = re.sub(r"\.loc(\s[^\n]*)", r".loc\1;", text)

    kernels, outside, position = {}, [], 0
    for entry in re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)", text):
        body_start = text.index("{", entry.end())
        body_end = _closing_brace(text, body_start)
        outside.append(text[position : entry.start()])
        position = body_end + 1
        kernels[entry[1]] = _kernel(entry[1], entry[2], text[body_start + 1 : body_end], files)
    outside.append(text[position:])
    for name in re.findall(r"\.global\s+\.align\s+\d+\s+\.b8\s+([\w$]+)", "".join(outside)):
        for kernel in kernels.values():
            kernel.constants.add(name)
    shared = r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\s*(?:\[(\d*)\])?"
    for m in re.finditer(shared, "".join(outside)):
        for kernel in kernels.values():
            kernel.shared[m[2]] = (int(m[1]), int(m[3]) if m[3] else None)
    return kernels


def _closing_brace(text: str, start: int) -> int:
    depth = 0
    for brace in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    raise PtxError("unbalanced braces")


def _kernel(name: str, parameters: str, body: str, files: dict[str, str]) -> Kernel:
    kernel, offset = Kernel(name), 0
    for m in re.finditer(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.[a-z](\d+)\s+([\w$]+)(?:\[(\d+)\])?", parameters):
        size = int(m[2]) // 8
        alignment = int(m[1] or size)
        offset = -(-offset // alignment) * alignment
        kernel.parameters.append((m[3], offset, size * int(m[4] or 1)))
        offset += size * int(m[4] or 1)
    at = "?"
    for statement in body.split(";"):
        statement = " ".join(statement.split())
        while m := re.match(r"([{}])\s*(?!%)|([\w$]+):\s*", statement):
            if m[2]:
                kernel.labels[m[2]] = len(kernel.code)
                if targets := re.match(r"\.branchtargets (.*)", statement[m.end() :]):
                    kernel.branch_targets[m[2]] = [t.strip() for t in targets[1].split(",")]
            statement = statement[m.end() :]
        if not statement or statement.startswith((".pragma", ".branchtargets")):
            continue
        if statement.startswith(".loc "):
            at = _place(statement, files)
        elif statement.startswith("."):
            _declaration(kernel, statement)
        else:
            kernel.code.append(_instruction(statement, at, len(kernel.code)))
    return kernel


def _place(statement: str, files: dict[str, str]) -> str:
    file, line = statement.split()[1:3]
    caller = re.search(r"inlined_at (\d+) (\d+)", statement)
    if caller and files.get(file, "").startswith(("sm_", "cuda_", "math_")):
        file, line = caller[1], caller[2]
    return f"{files.get(file, '?')}:{line}"


def _declaration(kernel: Kernel, statement: str) -> None:
    if m := re.match(r"\.reg \.(\w+) (.*)", statement):
        for register in m[2].split(","):
            name, count = re.match(r"\s*([%\w$]+)(?:<(\d+)>)?", register).groups()
            for r in [f"{name}{i}" for i in range(int(count))] if count else [name]:
                if kernel.registers.setdefault(r, m[1]) != m[1]:
                    raise PtxError(f"register {r} is declared twice, with different types")
    elif m := re.match(r"\.(shared|local) \.align (\d+) \.b8 ([\w$]+)\[(\d+)\]", statement):
        alignment, size = int(m[2]), int(m[4])
        if m[1] == "shared":
            kernel.shared[m[3]] = (alignment, size)
        else:
            kernel.local[m[3]] = -(-kernel.local_size // alignment) * alignment
            kernel.local_size = kernel.local[m[3]] + size
    elif not statement.startswith(".param "):  # of a call
        raise PtxError(f"directive {statement}")


def _instruction(statement: str, at: str, pc: int) -> Instruction:
    m = re.match(r"(?:@(!?)(%?[\w$]+) )?([\w.:]+)\s*(.*)", statement)
    opcode, *modifiers = m[3].replace("::", ".").split(".")
    return Instruction(statement, at, pc, m[2], m[1] == "!", opcode, tuple(modifiers), split_operands(m[4]))
