"""Disassembles compiled CUDA kernels and finds the way that most threads take round their loops."""

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

KINDS = (
    ("wide load", r"LDG\S*\.128"),
    ("narrow load", r"LDG"),
    ("wide store", r"STG\S*\.128"),
    ("narrow store", r"STG"),
    ("local", r"LDL|STL"),
    ("special", r"MUFU"),
    ("double", r"DADD|DMUL|DFMA|DSETP|DMNMX"),
)


def count(instructions: list[str]) -> Counter[str]:
    """Instructions by kind, and `all` of them."""
    counts = Counter(all=len(instructions))
    for text in instructions:
        counts[next((kind for kind, pattern in KINDS if re.match(pattern, text)), "other")] += 1
    return counts


@dataclass
class Kernel:
    symbol: str
    name: str
    registers: int
    stack: int
    shared: int
    code: list[tuple[int, bool, str]]  # address, whether predicated, instruction

    @cached_property
    def blocks(self) -> dict[int, tuple[list[str], list[int]]]:
        """Basic blocks by their first address: instructions and successors."""
        target = {n: int(m[1], 16) for n, (_, _, t) in enumerate(self.code) if (m := _TARGET.match(t))}
        meeting, announced = {}, {}  # where threads go on after a BSYNC: at the place that the last BSSY named
        for n, (_, _, text) in enumerate(self.code):
            if m := re.match(r"BSSY\S* (B\d+), (0x[0-9a-f]+)", text):
                announced[m[1]] = int(m[2], 16)
            elif m := re.match(r"BSYNC\S* (B\d+)", text):
                meeting[n] = announced[m[1]]
        ends = {n for n, (_, _, t) in enumerate(self.code) if re.match(r"BRA|EXIT|BSYNC|RET|BREAK|BRX|KILL", t)}
        leaders = {0, *(n + 1 for n in ends)}
        position = {address: n for n, (address, _, _) in enumerate(self.code)}
        leaders |= {position[a] for a in [*target.values(), *meeting.values()] if a in position}
        starts = sorted(leader for leader in leaders if leader < len(self.code))
        blocks = {}
        for start, end in zip(starts, [*starts[1:], len(self.code)], strict=True):
            last, (_, predicated, text) = end - 1, self.code[end - 1]
            following = []
            if last in target and text.startswith("BRA"):
                following.append(target[last])
            elif last in meeting:
                following.append(meeting[last])
                predicated = False
            if (predicated or last not in ends) and end < len(self.code):
                following.append(self.code[end][0])
            blocks[self.code[start][0]] = ([t for _, _, t in self.code[start:end]], following)
        return blocks

    def loops(self) -> list[list[int]]:
        """The natural loops, each with its head first and its blocks in an order that only loops within it break."""
        blocks = self.blocks
        order, seen, back = [], set(), []
        stack: list[tuple[int, int]] = [(next(iter(blocks)), 0)]
        active = {next(iter(blocks))}
        seen |= active
        while stack:  # depth first; an edge to a block that is still open closes a loop
            block, n = stack.pop()
            if n < len(blocks[block][1]):
                stack.append((block, n + 1))
                successor = blocks[block][1][n]
                if successor in active:
                    back.append((block, successor))
                elif successor not in seen:
                    seen.add(successor)
                    active.add(successor)
                    stack.append((successor, 0))
            else:
                active.discard(block)
                order.append(block)
        before: dict[int, list[int]] = {b: [] for b in blocks}
        for block in order:  # what is reached: not the subroutines behind the end
            for s in blocks[block][1]:
                before[s].append(block)
        bodies: dict[int, set[int]] = {}
        for tail, head in back:
            body, work = {head}, [tail]
            while work:
                if (block := work.pop()) not in body:
                    body.add(block)
                    work += before[block]
            bodies[head] = bodies.get(head, set()) | body
        position = {block: n for n, block in enumerate(reversed(order))}
        return [[h, *sorted(b - {h}, key=position.__getitem__)] for h, b in bodies.items()]

    def hot_loops(self) -> list[list[int]]:
        """The innermost of those that move 128 bits at once."""
        wide = {b for b, (text, _) in self.blocks.items() if any(re.match(r"(LDG|STG)\S*\.128", t) for t in text)}
        hot = [loop for loop in self.loops() if wide & set(loop)]
        return [loop for loop in hot if not any(set(other) < set(loop) for other in hot)]

    def turn(self, loop: list[int]) -> list[str]:
        """The instructions of one turn: of the ways with most 128-bit accesses the shortest one."""
        best: dict[int, tuple[int, int, list[int]]] = {loop[0]: (0, 0, [])}
        closing = []
        place = {block: n for n, block in enumerate(loop)}
        for block in loop:
            if block not in best:
                continue
            wide, length, path = best[block]
            counts = count(self.blocks[block][0])
            state = (wide + counts["wide load"] + counts["wide store"], length - counts["all"], [*path, block])
            for successor in self.blocks[block][1]:
                if successor == loop[0]:
                    closing.append(state)
                elif place.get(successor, -1) > place[block] and (
                    successor not in best or state[:2] > best[successor][:2]
                ):
                    best[successor] = state
        return [text for block in max(closing)[2] for text in self.blocks[block][0]]


_TARGET = re.compile(r"BRA\S*\s+(?:[^,]+,\s*)*(0x[0-9a-f]+)")


def find_tool(name: str) -> str | None:
    """On PATH, or where the wheels nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm put it."""
    found = shutil.which(name)
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        found = found or shutil.which(name, path=os.pathsep.join(map(str, Path(folder).glob("*/bin"))))
    return found


def disassemble(path: Path, architecture: str) -> Iterator[Kernel]:
    """The kernels that an object file or library holds for `architecture`."""
    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    assert cuobjdump is not None and nvdisasm is not None
    environment = {**os.environ, "PATH": f"{Path(nvdisasm).parent}{os.pathsep}{os.environ['PATH']}"}

    def run(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    resources = run(cuobjdump, "-res-usage", "-arch", architecture, str(path))
    usage = {
        m[1]: (int(m[2]), int(m[3]), int(m[4]))
        for m in re.finditer(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", resources)
    }
    code: dict[str, list[tuple[int, bool, str]]] = {}
    for line in run(cuobjdump, "-sass", "-arch", architecture, str(path)).splitlines():
        if m := re.match(r"\s+Function : (\S+)", line):
            code[m[1]] = current = []
        elif m := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?(.*?)\s*;", line):
            current.append((int(m[1], 16), m[2] is not None, m[3]))
    for symbol, name in zip(code, run("c++filt", *code).splitlines(), strict=True):
        yield Kernel(symbol, name, *usage[symbol], code[symbol])
