"""Seeded bugs: breaks the CUDA kernels in one place at a time and tells which check notices.

    mutants.py                every mutant        mutants.py --sample 6     six, spread over the list
    mutants.py --only 'barrier|stride'            mutants.py --list
    mutants.py --rules                            with the checker only, in half of the time

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
# Of each loss, the quick tests that between them reach a team of one warp, of a block and of several, tails, strides
# and masks. A mutant of a loss's file goes into its own tests, one of a file that they share into all, in this order.
PAIRS = (
    "*/odd",
    "*/a_block",
    *(
        f"*Logits/{name}"
        for name in (
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
    ),
    "*OtherSpaces/a_piece",
    "*OtherSpaces/most_of_a_warp",
)
ROWS = ("*/odd", "*/a_block", "*/split", "*/misaligned", "*/strided")
TESTS = {
    "kl_div": (*PAIRS, "KlDivCudaCentre.*"),
    "js_div": (*PAIRS, "JsDivCudaBeta.*"),
    "cross_entropy": (
        *PAIRS,
        "*Labels/misaligned",
        "*Labels/split_odd",
        "*Logits/climbing",
        "*Logits/mask_both",
        "CrossEntropyCudaLabels.*",
    ),
    "entropy": (*PAIRS, "*Logits/climbing", "*Logits/mask_both"),
    "gaussian_kl": (*ROWS, "*/far", "*/shared_prior", "GaussianKlCudaInfinities.*"),
    "fisher_vector_product": (*ROWS, "*/offsets", "*/masked"),
    "kl_div_topk": (*ROWS, "*/many", "*/near_split", "*/masked", "*KlDivTopkCudaAssertions.*"),
    "wasserstein_1d": ("*",),
    "sinkhorn": (
        *(f"*/{name}" for name in ("unit", "odd", "any_dims", "matrix", "flat", "unbalanced", "symmetric", "ragged")),
        *(f"*OneUpdate/{name}" for name in ("large", "large_flat", "large_matrix", "large_and_small")),
        "SinkhornCudaSweep.*",
    ),
}

INNER = r"(?:[^();{}]|\((?:[^(){}]|\([^(){}]*\))*\))*"  # balanced to two levels
MUTATIONS = (
    ("barrier removed", r"\b__sync(?:threads|warp)\(\);|\b(?:task\.team|block)\.sync\(\);", ";"),
    ("barrier of a warp only", r"\b__syncthreads\(\);", "__syncwarp();"),
    ("barrier too early", r"(\bif \([^{};]*\) \{[^{}]*\})\s*(__sync\w+\(\);)", r"\2 \1"),
    (
        "every thread writes",
        r"\btask\.(?:writes|first_segment)\(\)|\bblock\.leads\(\)|\bteam\.rank == 0|\brank % kWarp == 0",
        "true",
    ),
    ("every thread writes", r"\bwarp\.rank != 0", "false"),
    ("every segment writes", r"\btask\.holds\([^()]*\)", "true"),
    ("guard always true", rf"\bif \(({INNER})\)", "if (true)"),
    ("guard always false", rf"\bif \(({INNER})\)", "if (false)"),
    ("first choice always", r"(?<=[=(] )(\w[^=?(){};,]*) \? |(?<=\()(\w[^=?(){};,]*) \? ", "true ? "),
    ("boundary one up", r"(?<=[\w)]) < (?=[\w(])", " <= "),
    ("boundary one down", r"(?<=[\w)]) >= (?=\w)", " > "),
    ("boundary one down", r"(?<=[\w)]) <= (?=\w)", " < "),
    ("tail not cut", r"(\b\w+ \+ \w+) < [\w.]+ \? \1 : [\w.]+(?: - 1)?", r"\1"),
    ("tail not cut", r"\breal \? at : end - 1", "at"),
    ("tail not cut", r"\bif \(piece\.at\(k\) < size\) ", ""),
    ("rescaling removed", r"(?<![\w.])[\w\[\]]+ \*= [^;]+?(?=[;,]\s)|\b[\w.]+ /= means[^;,]+(?=[;,])", "(void)0"),
    ("rescaling removed", r"\b\w+(?:\.[pq])?\.raise\([^;]*\);", ";"),
    ("factor removed", r" \* (?:factor_?|factor_p|factor_q|scale|gain)\b| \* \(1 \+ [de]\)", ""),
    ("factor removed", rf" \* (?:std::exp2?|static_cast<double>)\({INNER}\)", ""),
    ("stride dropped", r" \* (?:(?:\w+[._])*(?:stride|gap|size|kWarps?|segments_?|rows_)|\w+\.k)\b", ""),
    ("stride dropped", r"\b\w+::kSize \* ", ""),
    ("stride shifted", r"(?<=\+= )(step|kStep|team\.size|kThreads|kWarp)\b", r"\1 + 1"),
    ("rounding up dropped", r" \+ (?:R|kWarps|kThreads|kThreads \* kSegment|kRows|kStep|segment) - 1\b", ""),
    ("lead forgotten", r" - lead\b|\bpieces\.lead \+ ", ""),
    ("shuffle begins half-way", r"= kWarp / 2;", "= kWarp / 4;"),
    ("shuffle without half of the lanes", r"= 0xffffffffu;", "= 0x0000ffffu;"),
    ("shared array one short", r"(?<=parts\[kWarps)\]|(?<=parts\[kThreads)\]", " - 1]"),
    ("first entry skipped", r"\bint (w|k|i) = 0;", r"int \1 = 1;"),
)
# Tried with --all only: many of these change nothing, and not all survivors have been explained yet.
THOROUGH = ("guard always", "first choice always", "boundary one up", "first entry skipped")
# So many are to be caught by a race or an uninitialised read although all values are right.
BY_RULE = 5
# Survivors that change nothing: (mutation, the line as it was, without spaces at its ends): why.
EQUIVALENT: dict[tuple[str, str], str] = {
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
    def losses(self) -> list[str]:
        """Whose tests it goes into."""
        return [loss for loss in TESTS if self.file.parts[0] in (loss, "core")]

    @property
    def explanation(self) -> str | None:
        return EQUIVALENT.get((self.mutation, self.before))


def mutants() -> Iterator[Mutant]:
    for path in sorted([*CSRC.rglob("*.cu"), *CSRC.rglob("*.cuh")]):
        text = path.read_text()
        code = re.sub(r"//[^\n]*|^#[^\n]*", lambda m: " " * len(m[0]), text, flags=re.M)  # same places, no comments
        for mutation, pattern, replacement in MUTATIONS:
            for m in re.finditer(pattern, code, re.M):
                start = text.rfind("\n", 0, m.start()) + 1
                if re.match(r"\s*(?:static_assert|TORCH_CHECK)", text[start:]):
                    continue
                mutated = text[: m.start()] + m.expand(replacement) + text[m.end() :]
                before, after = (t[start : t.find("\n", m.start())].strip() for t in (text, mutated))
                yield Mutant(
                    mutation, path.relative_to(CSRC), text.count("\n", 0, m.start()) + 1, before, after, mutated
                )


class Bench:
    """Compiles what all mutants share once; then one file and two links a mutant."""

    COMMON = ("-std=c++20", "-fno-strict-aliasing", "-ffp-contract=off", "-w")
    CHECKER = "-fsanitize=thread,bounds,alignment,shift,signed-integer-overflow"
    TOUCH = "_ZN4simt5touchEPKvmbS1_"  # how __ldg and __stwb tell the checker; the compiler's own calls need CHECKER

    def __init__(self, folder: Path, losses: list[str]) -> None:
        self.folder, self.losses = folder, losses
        self.torch = nvcc.torch_folder()
        (folder / "silent.cpp").write_text(
            f'extern "C" void __wrap_{self.TOUCH}(const void*, unsigned long, bool, const void*) {{}}\n'
        )
        for name, source in (
            ("simt", EMULATOR / "simt.cpp"),
            *((f"test_{loss}", nvcc.HERE / f"test_{loss}_cuda.cpp") for loss in losses),
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

    def verdicts(self, mutant: Mutant | None, rules_only: bool) -> list[str]:
        """By its values (if asked for), and with the rules."""
        if rules_only:
            return ["-", self.verdict(mutant, True)]
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
        losses = self.losses if mutant is None else mutant.losses
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
        command = [program, "--gtest_brief=1", "--gtest_fail_fast", f"--gtest_filter={':'.join(TESTS[loss])}"]
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
    parser.add_argument("--rules", action="store_true")
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
        bench = Bench(Path(folder), [loss for loss in TESTS if any(loss in m.losses for m in chosen)])
        unbroken = bench.verdicts(None, options.rules)
        if unbroken != ["-", "-"]:
            print("the unbroken kernels fail:", unbroken)
            return 1
        print("| mutant | values alone | with the rules |\n|---|---|---|")
        for mutant in chosen:
            values, ruled = bench.verdicts(mutant, options.rules)
            if "does not compile" in (values, ruled):
                seen["do not compile"] += 1
                continue
            if values == ruled == "-":
                survivors.append(mutant)
            by_rule_alone += not options.rules and values == "-" and ruled in ("race", "not initialised")
            seen["caught" if ruled != "-" or values != "-" else "survived"] += 1
            note = f" ({mutant.explanation})" if values == ruled == "-" and mutant.explanation else ""
            print(
                f"| {str(mutant).replace('|', '¦')} | {'' if options.rules else values} | {ruled}{note} |", flush=True
            )
    unexplained = [m for m in survivors if m.explanation is None]
    print(f"\n{dict(seen)}; {by_rule_alone} by a rule while the values were right; {len(unexplained)} unexplained")
    for mutant in unexplained:
        print("SURVIVED", mutant)
    too_few = options.only is None and options.sample is None and not options.rules and by_rule_alone < BY_RULE
    return bool(unexplained) or too_few


if __name__ == "__main__":
    sys.exit(main())
