"""Judges the compiled CUDA kernels without a GPU: `static_report.py [--write | --quick]`.

For every kernel of every .cu: registers, stack, shared memory, occupancy and 128-bit accesses, from its machine code.
For the calls of CALLS, which the PTX interpreter runs: bytes of global memory, special functions and instructions per
class; and the least time that takes by data-sheet rates. All of it is computed, none measured.

Exits with 1 where a kernel has a stack or spills, a row-wise kernel has no 128-bit loads, or one in float arithmetic in
double in its loops, or a call breaks its budget. --write puts the tables into docs/cuda.md. Needs nvcc, and cuobjdump
and nvdisasm (PyPI: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm).
"""

import argparse
import ctypes
import re
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
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
ARCHITECTURE = "sm_80"  # of the PTX that the calls are counted in; sm_90's differs in conversions of half types


@dataclass(frozen=True)
class Call:
    """A call of profile_<loss>.cpp and what it may cost."""

    profile: str
    name: str
    entries: int  # read or written a class at least: a value's operands, and its gradients
    again: int = 0  # and read once more: owned up to
    special: float = 2
    half: bool = False
    near: bool = False
    backward: bool = False
    wrt: tuple[bool, bool] = (False, False)

    @property
    def size(self) -> int:
        return 2 if self.half else 4

    @property
    def bytes_allowed(self) -> float:
        return 1.05 * self.size * (self.entries + self.again)

    @property
    def title(self) -> str:
        return f"{self.name}, {'bfloat16' if self.half else 'float32'}"


def pair(loss: str, near: bool, wrt: tuple[bool, bool] = (False, False), **budget: float) -> Call:
    what = {(False, False): "forward", (False, True): "gradient of Q", (True, True): "both gradients"}[wrt]
    name = f"{loss}: {what}, {'near' if near else 'far'}"
    return Call(loss, name, 2 + sum(wrt), near=near, backward=any(wrt), wrt=wrt, **budget)


Q, BOTH = (False, True), (True, True)
# An exponential a piece of 8 classes, to rescale a sum: the largest entry so far of one of a warp's lanes or another.
ONLINE = 1 / 8
# Of float32; each is run for bfloat16 too.
CALLS = {
    "kl_div": (
        pair("kl_div", near=False),
        pair("kl_div", near=True),
        pair("kl_div", near=False, wrt=Q),
        pair("kl_div", near=True, wrt=Q),
        pair("kl_div", near=True, wrt=BOTH),
        # The error of the mean comes from a second look at the row, before anything is written.
        pair("kl_div", near=False, wrt=BOTH, again=2, special=4),
    ),
    "js_div": (
        # Both logsumexp, then the terms, which need them: of p, q, e^l and, where l > 0, e^-l.
        pair("js_div", near=False, again=2, special=6),
        # The error of d, with p, q and expm1, and the terms again.
        pair("js_div", near=True, again=6, special=13),
        pair("js_div", near=False, wrt=Q, special=4),
        pair("js_div", near=False, wrt=BOTH, special=4),
    ),
    "cross_entropy": (
        # H(P), then KL(P || Q), which reads P again.
        pair("cross_entropy", near=False, again=1, special=3 + ONLINE),
        pair("cross_entropy", near=False, wrt=Q),
        Call("cross_entropy_labels", "cross_entropy: labels, forward", 1, special=1 + ONLINE),
        Call("cross_entropy_labels", "cross_entropy: labels, gradient", 2, special=1, backward=True),
    ),
    "entropy": (
        Call("entropy", "entropy: forward", 1, special=1 + ONLINE),
        Call("entropy", "entropy: gradient", 2, special=1, backward=True),
    ),
}
LOSSES = tuple(sorted(path.stem.removesuffix("_cuda") for path in (nvcc.ROOT / "csrc").rglob("*_cuda.cu")))
# Not row by row in pieces of 16 bytes: points of clouds, sorted lines.
WITHOUT_PIECES = ("sinkhorn", "wasserstein_1d")
# Kernels that compute in double whatever the type: see their files.
IN_DOUBLE = re.compile(r"\bdouble\b|_any<|_free<|double_backward|labels<AnyFloat, true>|kl_div_topk: forward")

# PTX that costs no issue slot: ptxas renames registers and folds addresses.
FREE = ("mov", "cvta", "ld.param")


def occupancy(registers: int, shared: int, architecture: str) -> float:
    warps = BLOCK // 32
    blocks = min(THREADS // BLOCK, BLOCKS, REGISTERS // (-(-registers * 32 // 256) * 256 * warps))
    per_block = shared + (1024 if architecture == "sm_80" else 0)  # the system's KiB, which sm_90 counts itself
    return min(blocks, (164 << 10) // max(per_block, 1)) * BLOCK / THREADS


def profile(call: Call, library: ctypes.CDLL, module: ptxsim.Module) -> tuple[float, float, float, float]:
    """Bytes moved and asked for, special functions and instructions per class."""
    machine = ptxsim.Machine(module)
    machine.count = True
    device = Device(library, machine)
    profiled = library[f"profile_{call.profile}"]
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
    """Lines of a table, and what breaks a rule."""

    lines: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)


def judge_kernels(loss: str) -> Report:
    """The machine code of one .cu."""
    result = Report()
    compiled = nvcc.compile_kernels(nvcc.ROOT / "csrc" / loss / f"{loss}_cuda.cu")
    columns: dict[str, list[tuple[str, ...]]] = {}
    for architecture in GPUS:
        for kernel in sass.disassemble(compiled.object, architecture):
            name = re.sub(r"torch_divergence::|\(anonymous namespace\)::|cuda::|c10::|^void |\(.*", "", kernel.name)
            name = f"{loss}: {name}"
            counts = sass.count([text for _, _, text in kernel.code])
            if kernel.stack or counts["local"]:
                result.bad.append(
                    f"{architecture} {name}: a stack of {kernel.stack} bytes, {counts['local']} accesses to it"
                )
            if not counts["wide load"] and loss not in WITHOUT_PIECES:
                result.bad.append(f"{architecture} {name}: no 128-bit loads")
            turns = [sass.count(kernel.turn(loop)) for loop in kernel.hot_loops()]
            if not IN_DOUBLE.search(name) and any(t["double"] > 2 for t in turns):
                result.bad.append(f"{architecture} {name}: arithmetic in double in a hot loop")
            columns.setdefault(name, []).append(
                (
                    str(kernel.registers),
                    str(kernel.stack),
                    str(kernel.shared),
                    f"{occupancy(kernel.registers, kernel.shared, architecture):.0%}",
                    f"{counts['wide load']}, {counts['wide store']}",
                    f"{counts['narrow load']}, {counts['narrow store']}",
                )
            )
    for name, of_gpus in columns.items():
        cells = [" / ".join(dict.fromkeys(values)) for values in zip(*of_gpus, strict=True)]
        result.lines.append(f"| {name} | {' | '.join(cells)} |")
    return result


def judge_calls(loss: str) -> Report:
    """What the interpreter counts in the calls of a loss, in the PTX of ARCHITECTURE."""
    result, tests = Report(), nvcc.link_tests(loss)
    library = ctypes.CDLL(str(tests.library))
    module = ptxsim.Module(tests.ptx[ARCHITECTURE].read_text())
    for call in (replace(call, half=half) for half in (False, True) for call in CALLS[loss]):
        traffic, asked, special, instructions = profile(call, library, module)
        if traffic > call.bytes_allowed:
            result.bad.append(f"{call.title}: {traffic:.2f} bytes a class, {call.bytes_allowed:.2f} allowed")
        if special > 1.05 * call.special:
            result.bad.append(f"{call.title}: {special:.2f} special functions a class, {call.special} allowed")
        cells = [
            f"{traffic:.2f}",
            f"{asked:.2f}",
            str(call.size * call.entries),
            f"{special:.2f}",
            f"{instructions:.1f}",
        ]
        for gpu in GPUS.values():
            cycles = gpu.processors * gpu.clock
            times = {
                "issue": instructions / (LANES * cycles),
                "special": special / (SPECIAL_LANES * cycles),
                "memory": traffic / (REACHABLE * gpu.bandwidth),
            }
            bound = max(times, key=lambda t: times[t])
            cells.append(f"{', '.join(f'{1e12 * t:.2f}' for t in times.values())}: {bound}")
        result.lines.append(f"| {call.title} | {' | '.join(cells)} |")
    return result


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    parser.add_argument(
        "--quick", action="store_true", help=f"without {' and '.join(SLOW)}, which nvcc takes minutes for"
    )
    options = parser.parse_args()
    if options.write and options.quick:
        parser.error("the tables are of all kernels")
    skipped = SLOW if options.quick else ()
    missing = [t for t, found in (("nvcc", nvcc.find_nvcc()), *((t, sass.find_tool(t)) for t in TOOLS)) if not found]
    if missing:
        print(f"skipped: {', '.join(missing)} not found")
        return 0
    with ProcessPoolExecutor() as pool:
        kernels = [pool.submit(judge_kernels, loss) for loss in LOSSES if loss not in skipped]
        wait(kernels)  # so that the calls find them compiled
        calls = [pool.submit(judge_calls, loss) for loss in CALLS if loss not in skipped]
        reports = [[future.result() for future in futures] for futures in (calls, kernels)]
    names = [gpu.name.split()[0] for gpu in GPUS.values()]
    head = (
        [
            "call",
            "bytes",
            "asked",
            "least",
            "special",
            "instructions",
            *(f"{n}: issue, special, memory, ps" for n in names),
        ],
        ["kernel", "registers", "stack", "shared", "occupancy", "128-bit loads, stores", "other"],
    )
    tables = [
        [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *(line for r in of_table for line in r.lines)]
        for columns, of_table in zip(head, reports, strict=True)
    ]
    lines = [*tables[0], "", *tables[1]]
    bad = [violation for of_table in reports for r in of_table for violation in r.bad]
    table = "\n".join(lines)
    print(table)
    if options.write:
        before, rest = DOCUMENT.read_text().split(BEGIN)
        DOCUMENT.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}")
    for loss in skipped:
        print(f"{loss}: left to a run without --quick")
    for violation in bad:
        print("VIOLATION", violation)
    return bool(bad)


TOOLS = ("cuobjdump", "nvdisasm")
SLOW = ("cross_entropy", "sinkhorn")

if __name__ == "__main__":
    sys.exit(main())
