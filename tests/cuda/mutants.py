"""Seeded bugs: breaks the CUDA kernels in one place at a time and tells which check notices.

    mutants.py                every mutant        mutants.py --sample 6     six, spread over the list
    mutants.py --only 'barrier|stride'            mutants.py --list

MUTATIONS removes or shifts every barrier, choice of a writer, bound, rescaling, stride, rounding-up, shuffle and shared
array of every .cu and .cuh in turn; with --all also every guard, choice and comparison. Each mutant goes into the
emulated tests twice: without the checker, so that only values can tell, and with it. Exits with 1 where one survives
that EQUIVALENT does not explain, or, when all of them are run, where fewer than BY_RULE are caught by a rule (a race,
a read of what was not written) while the values are right.
"""

import argparse
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nvcc

CSRC = nvcc.ROOT / "csrc"
EMULATOR = nvcc.HERE / "emulator"
# Quick ones that between them reach a team of one warp, of a block and of several, tails, strides and masks.
CASES = ("odd", "a_block")
LOGITS = (
    "misaligned_differently",
    "strided",
    "strided_peaked",
    "mask_both_far",
    "mask_row",
    "split_odd_far",
    "same_direction",
    "level",
    "level_far",
)
FILTER = ":".join(
    [
        *(f"*/{name}" for name in CASES),
        *(f"*Logits/{name}" for name in LOGITS),
        "*OtherSpaces/a_piece",
        "*OtherSpaces/most_of_a_warp",
        "KlDivCudaCentre.*",
        "JsDivCudaBeta.*",
        "*Labels/misaligned",
        "*Labels/split_odd",
        "*Logits/climbing",
        "*Logits/mask_both",
        "CrossEntropyCudaLabels.*",
    ]
)
# Kernel files by loss: a mutant of one goes into its own tests, one of a file that they share into all of them.
LOSSES = ("kl_div", "js_div", "cross_entropy", "entropy")

INNER = r"(?:[^();{}]|\((?:[^(){}]|\([^(){}]*\))*\))*"  # balanced to two levels
MUTATIONS = (
    ("barrier removed", r"\b__sync(?:threads|warp)\(\);", ";"),
    ("barrier of a warp only", r"\b__syncthreads\(\);", "__syncwarp();"),
    ("barrier too early", r"(\bif \([^{};]*\) \{[^{}]*\})\s*(__sync\w+\(\);)", r"\2 \1"),
    ("every thread writes", r"\btask\.writes\(\)|\bteam\.rank == 0|\brank % kWarp == 0", "true"),
    ("guard always true", rf"\bif \(({INNER})\)", "if (true)"),
    ("guard always false", rf"\bif \(({INNER})\)", "if (false)"),
    ("first choice always", r"(?<=[=(] )(\w[^=?(){};,]*) \? |(?<=\()(\w[^=?(){};,]*) \? ", "true ? "),
    ("boundary one up", r"(?<=[\w)]) < (?=[\w(])", " <= "),
    ("boundary one down", r"(?<=[\w)]) >= (?=\w)", " > "),
    ("rescaling removed", r"(?<=\) )[\w\[\]]+ \*= [^;]+?(?=[;,]\s)|\b[\w.]+ /= means[^;,]+(?=[;,])", "(void)0"),
    ("rescaling removed", r"\b(?:sums|visit)\.raise\([^;]*\);", ";"),
    ("factor removed", r" \* (?:factor_?|factor_p|factor_q|scale|gain)\b", ""),
    ("stride dropped", r" \* (?:row\.)?(?:stride|gap)\b", ""),
    ("stride shifted", r"(?<=\+= )step\b", "step + 1"),
    ("rounding up dropped", r" \+ (?:R|kWarps|kThreads \* kSegment|segment) - 1\b", ""),
    ("lead forgotten", r" - lead\b|\bpieces\.lead \+ ", ""),
    ("shuffle begins half-way", r"= kWarp / 2;", "= kWarp / 4;"),
    ("shuffle without half of the lanes", r"= 0xffffffffu;", "= 0x0000ffffu;"),
    ("shared array one short", r"(?<=parts\[kWarps)\]", " - 1]"),
    ("first entry skipped", r"\bint (w|k|i) = 0;", r"int \1 = 1;"),
)
# Tried with --all only: many of these change nothing, and not all survivors have been explained yet.
THOROUGH = ("guard always", "first choice always", "boundary one up", "first entry skipped")
# So many are to be caught by a race or an uninitialised read although all values are right.
BY_RULE = 5
# Survivors that change nothing: (mutation, the line as it was, without spaces at its ends): why.
EQUIVALENT: dict[tuple[str, str], str] = {
    **dict.fromkeys(
        (
            (mutation, "__syncthreads();  // the next reduction writes parts again")
            for mutation in ("barrier removed", "barrier of a warp only")
        ),
        "no kernel's consecutive reductions share an array, which belongs to type, count and operation: forward max 2, "
        "sum 2, (max 2, sum 5) twice; backward sum 1, max 1, sum 2; other spaces max 1, sum 1, sum 2; double backward "
        "sum 5, sum 2; entropy max 1, sum 3; labels max 1, sum 1 or 3; distributions max 2, max 1, sum 4, sum 5, "
        "sum 3, sum 1. The barrier of the reduction between orders them.",
    ),
    ("boundary one down", "if (row.packed && at >= 0 && at + R <= pieces.classes) {"): (
        "the run at 0 goes entry by entry, as every run that is not whole does: the same entries, one at a time."
    ),
    ("boundary one down", "if (rows >= kManyRows || classes < 2 * kSegment) return;"): (
        "256 rows are split too: a split row gives what a whole one gives, which the split cases test."
    ),
    ("rounding up dropped", "segments = static_cast<int>((classes + segment - 1) / segment);"): (
        "the last segment goes to the row's end, however long that is: it takes the rest, and classes >= segment."
    ),
}


@dataclass(frozen=True)
class Mutant:
    mutation: str
    file: Path  # in csrc
    line: int
    before: str
    after: str
    text: str  # of the whole file

    def __str__(self) -> str:
        return f"{self.mutation}, {self.file.name}:{self.line}: {self.before}"

    @property
    def explanation(self) -> str | None:
        return EQUIVALENT.get((self.mutation, self.before))


def mutants() -> Iterator[Mutant]:
    for path in sorted([*CSRC.rglob("*.cu"), *CSRC.rglob("*.cuh")]):
        if path.parent.name == "sinkhorn":  # Bench compiles and tests kl_div alone
            continue
        text = path.read_text()
        code = re.sub(r"//[^\n]*|^#[^\n]*", lambda m: " " * len(m[0]), text, flags=re.M)  # same places, no comments
        for mutation, pattern, replacement in MUTATIONS:
            for m in re.finditer(pattern, code, re.M):
                mutated = text[: m.start()] + m.expand(replacement) + text[m.end() :]
                start = text.rfind("\n", 0, m.start()) + 1
                before, after = (t[start : t.find("\n", m.start())].strip() for t in (text, mutated))
                yield Mutant(
                    mutation, path.relative_to(CSRC), text.count("\n", 0, m.start()) + 1, before, after, mutated
                )


class Bench:
    """Compiles what all mutants share once; then one file and two links a mutant."""

    COMMON = ("-std=c++20", "-fno-strict-aliasing", "-ffp-contract=off", "-w")
    CHECKER = "-fsanitize=thread,bounds,alignment,shift,signed-integer-overflow"
    TOUCH = "_ZN4simt5touchEPKvmbS1_"  # how __ldg and __stwb tell the checker; the compiler's own calls need CHECKER

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.torch = nvcc.torch_folder()
        (folder / "silent.cpp").write_text(
            f'extern "C" void __wrap_{self.TOUCH}(const void*, unsigned long, bool, const void*) {{}}\n'
        )
        for name, source in (
            ("simt", EMULATOR / "simt.cpp"),
            *((f"test_{loss}", nvcc.HERE / f"test_{loss}_cuda.cpp") for loss in LOSSES),
            ("silent", folder / "silent.cpp"),
        ):
            self.compile(source, folder / f"{name}.o", CSRC, "-O2")

    def compile(self, source: Path, target: Path, csrc: Path, *flags: str) -> str:
        include = (
            f"-I{csrc}",
            f"-I{EMULATOR / 'include'}",
            f"-I{EMULATOR}",
            f"-I{self.torch / 'include'}",
            *nvcc.gtest("-I"),
        )
        command = ["c++", *self.COMMON, *flags, *include, "-x", "c++", "-c", str(source), "-o", str(target)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stderr

    def verdicts(self, mutant: Mutant | None) -> list[str]:
        """By its values, and with the rules."""
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda rules: self.verdict(mutant, rules), (False, True)))

    def verdict(self, mutant: Mutant | None, rules: bool) -> str:
        """Of the first loss whose tests notice, or "-"."""
        folder = self.folder / ("rules" if rules else "values")
        csrc = folder / "csrc"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(CSRC, csrc)
        if mutant is not None:
            (csrc / mutant.file).write_text(mutant.text)
        losses = [loss for loss in LOSSES if mutant is None or mutant.file.parts[0] in (loss, "core")]
        return next((v for loss in losses if (v := self.run(loss, folder, rules)) != "-"), "-")

    def run(self, loss: str, folder: Path, rules: bool) -> str:
        csrc, kernels, program = (folder / name for name in ("csrc", f"{loss}.o", loss))
        self.compile(csrc / loss / f"{loss}_cuda.cu", kernels, csrc, "-O1", *([self.CHECKER] if rules else []))
        if not kernels.exists():
            return "does not compile"
        objects = [kernels, *(self.folder / f"{name}.o" for name in ("simt", f"test_{loss}", "silent"))]
        wrap = [] if rules else [f"-Wl,--wrap={self.TOUCH}"]
        link = [
            "c++",
            *objects,
            *wrap,
            "-o",
            program,
            *nvcc.gtest("-L"),
            "-lgtest_main",
            "-lgtest",
            "-ldl",
            f"-L{self.torch / 'lib'}",
        ]
        subprocess.run([*link, "-lc10", f"-Wl,-rpath,{self.torch / 'lib'}"], check=True)
        command = [program, "--gtest_brief=1", "--gtest_fail_fast", f"--gtest_filter={FILTER}"]
        run = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, preexec_fn=limit_time
        )
        return classify(run.returncode, run.stdout + run.stderr)


def limit_time() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (120, 120))


# What the device finds, by its words; it throws them.
RULES = (
    ("race", r"\brace\b"),
    ("not initialised", r"never written|uninitialised|not written|earlier block"),
    ("bounds", r"outside|out of bounds|no buffer|array index"),
    ("alignment", r"misaligned|alignment"),
    ("barrier", r"barrier|deadlock|lane|mask|warp operation"),
)


def classify(status: int, output: str) -> str:
    if status == 0:
        return "-"
    if status < 0:
        return "hangs" if -status in (signal.SIGXCPU, signal.SIGKILL) else "crash"
    findings = "".join(re.findall(r'C\+\+ exception with description "(.*?)" thrown', output, re.DOTALL))
    if not findings:
        return "value"
    return next((kind for kind, pattern in RULES if re.search(pattern, findings)), "error")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sample", type=int)
    parser.add_argument("--only")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    chosen = [m for m in mutants() if options.all or not m.mutation.startswith(THOROUGH)]
    chosen = [m for m in chosen if options.only is None or re.search(options.only, str(m))]
    if options.sample is not None and options.sample < len(chosen):
        chosen = [chosen[n * len(chosen) // options.sample] for n in range(options.sample)]
    if options.list:
        print(*chosen, sep="\n")
        print(len(chosen), "mutants")
        return 0
    seen: Counter[str] = Counter()
    survivors, by_rule_alone = [], 0
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        bench = Bench(Path(folder))
        unbroken = bench.verdicts(None)
        if unbroken != ["-", "-"]:
            print("the unbroken kernels fail:", unbroken)
            return 1
        print("| mutant | values alone | with the rules |\n|---|---|---|")
        for mutant in chosen:
            values, ruled = bench.verdicts(mutant)
            if values == "does not compile":
                seen["do not compile"] += 1
                continue
            if values == ruled == "-":
                survivors.append(mutant)
            by_rule_alone += values == "-" and ruled in ("race", "not initialised")
            seen["caught" if ruled != "-" or values != "-" else "survived"] += 1
            note = f" ({mutant.explanation})" if values == ruled == "-" and mutant.explanation else ""
            print(f"| {str(mutant).replace('|', '¦')} | {values} | {ruled}{note} |", flush=True)
    unexplained = [m for m in survivors if m.explanation is None]
    print(f"\n{dict(seen)}; {by_rule_alone} by a rule while the values were right; {len(unexplained)} unexplained")
    for mutant in unexplained:
        print("SURVIVED", mutant)
    too_few = options.only is None and options.sample is None and by_rule_alone < BY_RULE
    return bool(unexplained) or too_few


if __name__ == "__main__":
    sys.exit(main())
