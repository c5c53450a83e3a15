"""Judges the compiled CUDA kernels without a GPU: `static_report.py [--write]`.

For every kernel: registers, stack, shared memory, occupancy and 128-bit accesses, from its machine code. For the calls
of CALLS, which the PTX interpreter runs: bytes of global memory, special functions and instructions per element of
the two inputs; and the least time an element takes by data-sheet rates. All of it is computed, none measured.

Exits with 1 where a kernel has a stack or spills, a call breaks its budget, or the kernel of a call has narrow accesses
or double arithmetic where it should not. --write puts the tables into docs/cuda.md. Needs nvcc, and cuobjdump and
nvdisasm (PyPI: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm).
"""

import argparse
import ctypes
import re
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import nvcc
import sass

sys.path.insert(0, str(Path(__file__).resolve().parent / "ptx"))

import ptxsim
from run_tests import Device

DOCUMENT = nvcc.ROOT / "docs" / "cuda.md"
BEGIN, END = "<!-- static_report.py --write: begin -->", "<!-- end -->"


@dataclass(frozen=True)
class Gpu:
    """Data-sheet figures, with a cautious boost clock."""

    name: str
    processors: int
    clock: float  # Hz
    bandwidth: float  # bytes a second


GPUS = {"sm_80": Gpu("A100 SXM 80 GB", 108, 1.41e9, 2.039e12), "sm_90": Gpu("H100 SXM", 132, 1.755e9, 3.35e12)}
THREADS, BLOCKS, REGISTERS = 2048, 32, 65536  # of a multiprocessor, either GPU
LANES, SPECIAL_LANES = 128, 16  # results a cycle: ordinary instructions, special functions
REACHABLE = 0.92  # of the data sheet's bandwidth
BLOCK = 256


@dataclass(frozen=True)
class Call:
    """A call of profile_<loss>.cpp and what it may cost."""

    loss: str
    name: str
    kernel: str
    half: bool
    near: bool
    backward: bool
    wrt: tuple[bool, bool]
    entries: int  # read or written per element at least: 2 for a value, 3 or 4 for gradients
    visits: int = 1  # of both inputs, if more than one is owned up to
    special: float = 2

    @property
    def bytes_allowed(self) -> float:
        return 1.05 * (2 if self.half else 4) * (self.entries + 2 * (self.visits - 1))

    @property
    def least_bytes(self) -> int:
        return (2 if self.half else 4) * self.entries


def call(loss: str, half: bool, near: bool, wrt: tuple[bool, bool] = (False, False), **budget: float) -> Call:
    kernel = f"{'backward' if any(wrt) else 'forward'}_logits<{'c10::BFloat16' if half else 'float'},"
    what = {(False, False): "forward", (False, True): "gradient of Q", (True, True): "both gradients"}[wrt]
    name = f"{loss}: {what}, {'near' if near else 'far'}, {'bfloat16' if half else 'float32'}"
    return Call(loss, name, kernel, half, near, any(wrt), wrt, 2 + sum(wrt), **budget)


LOSSES = ("kl_div", "js_div")
Q, BOTH = (False, True), (True, True)


def calls(loss: str) -> list[Call]:
    result = []
    for half in (False, True):
        if loss == "kl_div":
            result += [
                call(loss, half, near=False),
                call(loss, half, near=True),
                call(loss, half, near=False, wrt=Q),
                call(loss, half, near=True, wrt=Q),
                call(loss, half, near=True, wrt=BOTH),
                # The error of the mean comes from a second look at the row, before anything is written.
                call(loss, half, near=False, wrt=BOTH, visits=2, special=4),
            ]
        else:
            result += [
                # Both logsumexp, then the terms, which need them: of p, q, e^l and, where l > 0, e^-l.
                call(loss, half, near=False, visits=2, special=6),
                # The error of d, with p, q and expm1, and the terms again.
                call(loss, half, near=True, visits=4, special=13),
                call(loss, half, near=False, wrt=Q, special=4),
                call(loss, half, near=True, wrt=Q, special=4),
                call(loss, half, near=True, wrt=BOTH, special=4),
                call(loss, half, near=False, wrt=BOTH, special=4),
            ]
    return result


# PTX that costs no issue slot: ptxas renames registers and folds addresses.
FREE = ("mov", "cvta", "ld.param")


def occupancy(registers: int, shared: int, architecture: str) -> float:
    warps = BLOCK // 32
    blocks = min(THREADS // BLOCK, BLOCKS, REGISTERS // (-(-registers * 32 // 256) * 256 * warps))
    per_block = shared + (1024 if architecture == "sm_80" else 0)  # the system's KiB, which sm_90 counts itself
    return min(blocks, (164 << 10) // max(per_block, 1)) * BLOCK / THREADS


def profile(call: Call, library: ctypes.CDLL, module: ptxsim.Module) -> tuple[float, float, float, float]:
    """Bytes moved and asked for, special functions and instructions per element."""
    machine = ptxsim.Machine(module)
    machine.count = True
    device = Device(library, machine)
    profiled = library[f"profile_{call.loss}"]
    profiled.argtypes, profiled.restype = [ctypes.c_bool] * 5, ctypes.c_int64
    classes = profiled(call.half, call.near, call.backward, *call.wrt)
    assert device.launches == 1
    executed: Counter[str] = Counter()
    for (_, opcode), warps in machine.executed.items():
        executed[opcode] += 32 * warps
    special = sum(executed[o] for o in ("ex2", "lg2", "rcp", "sqrt", "rsqrt", "tanh"))
    instructions = sum(n for opcode, n in executed.items() if opcode not in FREE)
    moved, asked = (sum(c.values()) / classes for c in (machine.moved, machine.requested))
    return moved, asked, special / classes, instructions / classes


@dataclass
class Report:
    """Of one architecture: the two tables' lines, and what breaks a rule."""

    calls: list[str] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)


def report(architecture: str, loss: str, tests: nvcc.Tests) -> Report:
    gpu, result = GPUS[architecture], Report()
    short = gpu.name.split()[0]
    for kernel in sass.disassemble(tests.library.parent / f"{loss}_cuda.o", architecture):
        name = re.sub(r"torch_divergence::|\(anonymous namespace\)::|cuda::|c10::|^void |\(.*", "", kernel.name)
        name = f"{loss}: {name}"
        counts = sass.count([text for _, _, text in kernel.code])
        if kernel.stack or counts["local"]:
            result.bad.append(
                f"{architecture} {name}: a stack of {kernel.stack} bytes, {counts['local']} accesses to it"
            )
        if not counts["wide load"]:
            result.bad.append(f"{architecture} {name}: no 128-bit loads")
        turns = [sass.count(kernel.turn(loop)) for loop in kernel.hot_loops()]
        by_design = re.search("double>|_any<|double_backward", name)  # see the kernels' files
        if not by_design and any(t["double"] > 2 for t in turns):
            result.bad.append(f"{architecture} {name}: arithmetic in double in a hot loop")
        used = occupancy(kernel.registers, kernel.shared, architecture)
        result.kernels.append(
            f"| {name} | {short} | {kernel.registers} | {kernel.stack} | {kernel.shared} | {used:.0%} "
            f"| {counts['wide load']}, {counts['wide store']} | {counts['narrow load']}, {counts['narrow store']} |"
        )
    library = ctypes.CDLL(str(tests.library))
    module = ptxsim.Module(tests.ptx[architecture].read_text())
    for call in calls(loss):
        traffic, asked, special, instructions = profile(call, library, module)
        if traffic > call.bytes_allowed:
            result.bad.append(
                f"{architecture} {call.name}: {traffic:.2f} bytes an element, {call.bytes_allowed:.2f} allowed"
            )
        if special > 1.05 * call.special:
            result.bad.append(f"{architecture} {call.name}: {special:.2f} special functions an element, {call.special}")
        cycles = gpu.processors * gpu.clock
        times = {
            "issue": instructions / (LANES * cycles),
            "special": special / (SPECIAL_LANES * cycles),
            "memory": traffic / (REACHABLE * gpu.bandwidth),
        }
        bound = max(times, key=lambda t: times[t])
        result.calls.append(
            f"| {call.name} | {short} | {traffic:.2f} | {asked:.2f} | {call.least_bytes} | {special:.2f} "
            f"| {instructions:.1f} | {', '.join(f'{1e12 * t:.2f}' for t in times.values())} | {bound} |"
        )
    return result


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    missing = [t for t, found in (("nvcc", nvcc.find_nvcc()), *((t, sass.find_tool(t)) for t in TOOLS)) if not found]
    if missing:
        print(f"skipped: {', '.join(missing)} not found")
        return 0
    with ProcessPoolExecutor() as pool:
        tests = dict(zip(LOSSES, pool.map(nvcc.link_tests, LOSSES), strict=True))
        reports = list(pool.map(report, *zip(*((a, loss, tests[loss]) for loss in LOSSES for a in GPUS), strict=True)))
    lines = [
        "| call | GPU | bytes | asked | least | special | instructions | issue, special, memory: ps | bound |",
        "|" + "---|" * 9,
        *(line for r in reports for line in r.calls),
        "",
        "| kernel | GPU | registers | stack | shared | occupancy | 128-bit loads, stores | other |",
        "|" + "---|" * 8,
        *(line for r in reports for line in r.kernels),
    ]
    bad = [violation for r in reports for violation in r.bad]
    table = "\n".join(lines)
    print(table)
    if options.write:
        before, rest = DOCUMENT.read_text().split(BEGIN)
        DOCUMENT.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}")
    for violation in bad:
        print("VIOLATION", violation)
    return bool(bad)


TOOLS = ("cuobjdump", "nvdisasm")

if __name__ == "__main__":
    sys.exit(main())
