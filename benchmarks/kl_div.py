"""Time of forward and backward of the KL divergence from logits, against PyTorch. README.md states the rules.

python benchmarks/kl_div.py                     everything: prints the tables, writes RESULTS.md and the picture
python benchmarks/kl_div.py --capability avx2   this library alone, with that instruction set: prints, writes nothing
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torch_divergence as td
from common import (
    COMPILED,
    COPY,
    EAGER,
    HERE,
    IMAGES,
    IN_PLACE,
    LIMIT_COPIES,
    OURS,
    SMALL_STEPS,
    THREADS,
    Clock,
    Copy,
    Figures,
    Goals,
    Step,
    heading,
    machine,
    measure_in_turns,
    write,
)
from torch import Tensor

PICTURE = IMAGES / "kl_div_speed.png"
INPUTS = ("independent", "near")
GRADIENTS = (1.0, 0.25)
OURS_ALONE = [COPY, OURS, IN_PLACE]


class Case(NamedTuple):
    rows: int
    classes: int
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.rows}x{self.classes} {self.dtype}"


class Goal(NamedTuple):
    """At most so many times the limit, and at least so many times faster than the peers."""

    fresh: float
    in_place: float | None
    eager: float
    compiled: float


LARGE = {
    Case(512, 32000): Goal(1.8, 1.4, 15, 3),
    Case(128, 128256): Goal(1.8, 1.4, 15, 3),
    Case(8192, 1000): Goal(2.5, None, 4, 2),
    Case(512, 32000, "bfloat16"): Goal(5, 3, 4, 4),
}
SMALL = Case(64, 10)
SMALL_GOAL = 1.5  # at most so many times the time of eager PyTorch
SWEEP = [Case(2**23 // 2**k, 2**k) for k in range(10, 18)]


def key(contender: str, inputs: str = "", gradient: float = 1.0) -> str:
    return contender if contender == COPY else f"{contender}/{inputs}/{gradient:g}"


# --- one process: measure ---------------------------------------------------------------------------------------------


def eager(input: Tensor, target: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(input, -1), F.log_softmax(target, -1), log_target=True, reduction="batchmean")


def make_inputs(case: Case) -> dict[str, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    target = torch.randn(case.rows, case.classes)
    near = target + 0.1 * torch.randn_like(target)
    independent = torch.randn_like(target)
    return {"independent": (independent.to(dtype), target.to(dtype)), "near": (near.to(dtype), target.to(dtype))}


def gradient_error(step: Step) -> float:
    """Largest error in the first rows against float64, relative to the row's largest entry."""
    step.prepare()
    step()
    (leaf,), (target,) = step.leaves, step.constants
    expected = leaf.detach()[:64].double().softmax(-1) - target[:64].double().softmax(-1)
    expected *= step.incoming / len(leaf)
    error = (step.gradient()[:64].double() - expected).abs().amax(-1) / expected.abs().amax(-1)
    step.release()
    return error.max().item()


def measure(case: Case, contenders: list[str], rounds: int, all_gradients: bool = True) -> tuple[Figures, Figures]:
    """Median seconds, and errors of the gradients, by key()."""
    torch._dynamo.reset()
    functions = {
        OURS: td.kl_div,
        IN_PLACE: partial(td.kl_div, inplace_grad=True),
        EAGER: eager,
        COMPILED: torch.compile(eager, dynamic=False),
    }
    data = make_inputs(case)
    steps: dict[str, Step | Copy] = {}
    errors = {}
    for contender in contenders:
        if contender == COPY:
            steps[key(COPY)] = Copy(data["near"][1])
            continue
        for inputs, gradient in itertools.product(INPUTS, GRADIENTS if all_gradients else (1.0,)):
            input, target = data[inputs]
            step = Step(functions[contender], [input], [target], gradient, contender == IN_PLACE)
            steps[key(contender, inputs, gradient)] = step
            errors[key(contender, inputs, gradient)] = gradient_error(step)

    small = case.rows * case.classes < 2**16
    return measure_in_turns(steps, rounds, SMALL_STEPS if small else 1), errors


def worker(config: dict) -> None:
    """Runs in a process of its own; the medians go to standard output as JSON."""
    torch.set_num_threads(THREADS)
    times, errors = [], []
    for case in (Case(*fields) for fields in config["cases"]):
        print(f"  {case}", file=sys.stderr, flush=True)
        results = measure(case, config["contenders"], config["rounds"], config["all_gradients"])
        times.append(results[0])
        errors.append(results[1])
    print(json.dumps({"capability": td._C.cpu_capability(), "times": times, "errors": errors}))


class Run(NamedTuple):
    capability: str
    times: dict[Case, Figures]
    errors: dict[Case, Figures]


def run_worker(
    title: str, cases: list[Case], contenders: list[str], rounds: int, all_gradients: bool = True, **environment: str
) -> Run:
    print(title, file=sys.stderr, flush=True)
    config = {"cases": cases, "contenders": contenders, "rounds": rounds, "all_gradients": all_gradients}
    command = [sys.executable, __file__, "--worker", json.dumps(config)]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=True, env={**os.environ, **environment})
    output = json.loads(result.stdout)
    times, errors = (dict(zip(cases, output[name], strict=True)) for name in ("times", "errors"))
    return Run(output["capability"], times, errors)


# --- the report -------------------------------------------------------------------------------------------------------


def large_table(times: dict[Case, Figures], contenders: list[str], goals: Goals | None) -> list[str]:
    """Milliseconds, and in brackets multiples of the limit; the peers' last columns are how much slower they are."""
    peers = [name for name in (EAGER, COMPILED) if name in contenders]
    head = ["shape", "inputs", "incoming", "limit", OURS, IN_PLACE, *peers, *(f"{peer} / {OURS}" for peer in peers)]
    lines = ["| " + " | ".join(head) + " |", "|---" * 3 + "|--:" * (len(head) - 3) + "|"]
    for case, medians in times.items():
        limit = LIMIT_COPIES * medians[COPY]
        goal = LARGE[case] if goals else Goal(0, None, 0, 0)
        for inputs, gradient in itertools.product(INPUTS, GRADIENTS):
            where = f"{case}, {inputs}, incoming {gradient:g}"
            row = [str(case), inputs, f"{gradient:g}", f"{1e3 * limit:.2f}"]
            ours = medians[key(OURS, inputs, gradient)]
            for contender, bound in ((OURS, goal.fresh), (IN_PLACE, goal.in_place), (EAGER, None), (COMPILED, None)):
                if contender in contenders:
                    seconds = medians[key(contender, inputs, gradient)]
                    text = f"{1e3 * seconds:.2f} ({seconds / limit:.2f})"
                    what = f"{where}: {contender} in limits"
                    row.append(goals.mark(text, seconds / limit, bound, True, what) if goals else text)
            for peer, bound in ((EAGER, goal.eager), (COMPILED, goal.compiled)):
                if peer in contenders:
                    ratio = medians[key(peer, inputs, gradient)] / ours
                    text = f"{ratio:.1f}"
                    row.append(goals.mark(text, ratio, bound, False, f"{where}: {peer} / {OURS}") if goals else text)
            lines.append("| " + " | ".join(row) + " |")
    return lines


def small_table(medians: Figures, goals: Goals) -> list[str]:
    lines = [f"| inputs | incoming | {OURS} | {EAGER} | {COMPILED} | {OURS} / {EAGER} |", "|---|---|--:|--:|--:|--:|"]
    for inputs, gradient in itertools.product(INPUTS, GRADIENTS):
        ours, plain, compiled = (medians[key(contender, inputs, gradient)] for contender in (OURS, EAGER, COMPILED))
        ratio = ours / plain
        where = f"{SMALL}, {inputs}, incoming {gradient:g}: {OURS} / {EAGER}"
        marked = goals.mark(f"{ratio:.2f}", ratio, SMALL_GOAL, True, where)
        micro = " | ".join(f"{1e6 * seconds:.1f}" for seconds in (ours, plain, compiled))
        lines.append(f"| {inputs} | {gradient:g} | {micro} | {marked} |")
    return lines


def error_table(errors: dict[Case, Figures], contenders: list[str]) -> list[str]:
    lines = ["| shape | inputs | " + " | ".join(contenders) + " |", "|---|---" + "|--:" * len(contenders) + "|"]
    for case, figures in errors.items():
        for inputs in INPUTS:
            row = " | ".join(f"{figures[key(contender, inputs)]:.1e}" for contender in contenders)
            lines.append(f"| {case} | {inputs} | {row} |")
    return lines


def draw(times: dict[Case, Figures], subtitle: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    classes = [case.classes for case in times]
    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    for contender, name, color, marker in (
        (EAGER, "PyTorch, eager", "tab:red", "s"),
        (COMPILED, "PyTorch, torch.compile", "tab:orange", "^"),
        (OURS, "torch_divergence", "tab:blue", "o"),
        (IN_PLACE, "torch_divergence, inplace_grad=True", "tab:cyan", "v"),
    ):
        for inputs, line in (("independent", "-"), ("near", ":")):
            milliseconds = [1e3 * medians[key(contender, inputs)] for medians in times.values()]
            label = name if inputs == "independent" else None
            axes.plot(classes, milliseconds, line, label=label, color=color, marker=marker, markersize=5)
    limit = [1e3 * LIMIT_COPIES * medians[COPY] for medians in times.values()]
    axes.plot(classes, limit, "k--", label=f"memory: {LIMIT_COPIES} x copy_ of one input")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7 * min(limit))
    axes.set(xlabel="classes (rows x classes = $2^{23}$, float32; dotted: near inputs)", ylabel="ms")
    axes.set_title(f"KL divergence from logits, forward + backward\n{subtitle}", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=120)


def run_capability(name: str) -> Run:
    title = f"ATEN_CPU_CAPABILITY={name}"
    return run_worker(title, list(LARGE), OURS_ALONE, rounds=5, ATEN_CPU_CAPABILITY=name)


def report() -> None:
    everyone = [COPY, OURS, IN_PLACE, EAGER, COMPILED]
    clock = Clock()
    main_run = run_worker("large shapes", list(LARGE), everyone, rounds=11)
    small = run_worker("small rows", [SMALL], [OURS, EAGER, COMPILED], rounds=21)
    huge = run_worker("with THP_MEM_ALLOC_ENABLE=1", list(LARGE), everyone, rounds=9, THP_MEM_ALLOC_ENABLE="1")
    lower = [run_capability(name) for name in ("avx2", "default")]
    sweep = run_worker("classes", SWEEP, everyone, rounds=5, all_gradients=False)
    best = main_run.capability
    others = clock.other_programs()

    draw(sweep.times, machine(best))
    goals = Goals()
    lines = [
        *heading("KL divergence from logits: forward and backward", "kl_div.py", best, others),
        "## Large shapes",
        "",
        f"Milliseconds; in brackets, multiples of the limit ({LIMIT_COPIES} x the time of `dst.copy_(src)` for one "
        "input). The last two columns: how many times slower the peers are.",
        "",
        *large_table(main_run.times, everyone, goals),
        "",
        "Goals (limit, limit in place, eager, `torch.compile`): "
        + "; ".join(f"{case} {', '.join('-' if g is None else f'{g:g}' for g in goal)}" for case, goal in LARGE.items())
        + ".",
        "",
        f"## Small rows: {SMALL}",
        "",
        f"Microseconds a step. Goal: at most {SMALL_GOAL} times eager PyTorch.",
        "",
        *small_table(small.times[SMALL], goals),
        "",
        "## With huge pages for PyTorch too: `THP_MEM_ALLOC_ENABLE=1`",
        "",
        "A process of its own, with its own limit; all tensors that PyTorch allocates are on huge pages.",
        "",
        *large_table(huge.times, everyone, None),
    ]
    for run in lower:
        lines += ["", f"## With the instruction set {run.capability}", "", *large_table(run.times, OURS_ALONE, None)]
    lines += [
        "",
        "## Error of the gradient",
        "",
        "Largest error against float64 in the first 64 rows, relative to the row's largest entry.",
        "",
        *error_table(main_run.errors, everyone[1:]),
    ]
    lines += ["", *goals.lines()]
    write(lines, HERE / "RESULTS.md", PICTURE, clock)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of forward and backward of the KL divergence from logits.")
    parser.add_argument("--capability", choices=["default", "avx2", "avx512"], help="this library alone, so compiled")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
    elif options.capability:
        run = run_capability(options.capability)
        print(f"instruction set {run.capability}", *large_table(run.times, OURS_ALONE, None), sep="\n")
    else:
        report()


if __name__ == "__main__":
    main()
