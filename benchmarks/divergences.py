"""Time of forward and backward of the losses between distributions, against PyTorch. README.md states the rules.

python benchmarks/divergences.py           prints the tables, writes RESULTS_DIVERGENCES.md and the picture
python benchmarks/divergences.py --quick   tiny shapes in seconds: checks every contender's value and gradient
"""

import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torch_divergence as td
from common import (
    COMPILED,
    COPY,
    EAGER,
    IN_PLACE,
    LIMIT_COPIES,
    OURS,
    THREADS,
    Clock,
    Contender,
    Copy,
    Figures,
    Goals,
    Step,
    arguments,
    heading,
    machine,
    measure_in_turns,
    table,
    write,
)
from torch import Tensor

Shape = tuple[int, int]  # rows, classes
SHAPES = ((65536, 100), (8192, 1000), (512, 32000), (128, 128256))
QUICK_SHAPES = ((64, 100), (8, 3000))
TOP = 64  # classes that a teacher keeps
CROSS_ENTROPY = "F.cross_entropy"


# --- textbook formulas ------------------------------------------------------------------------------------------------


def js_div(input: Tensor, target: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(input, -1), F.log_softmax(target, -1)
    q, p = log_q.exp(), log_p.exp()
    log_m = ((p + q) / 2).log()
    return 0.5 * (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1).mean()


def kl_div(input: Tensor, target: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(input, -1), F.log_softmax(target, -1), log_target=True, reduction="batchmean")


def cross_entropy_of_labels(input: Tensor, target: Tensor) -> Tensor:
    return -F.log_softmax(input, -1).gather(-1, target.unsqueeze(-1)).mean()


def cross_entropy_of_distributions(input: Tensor, target: Tensor) -> Tensor:
    return -(F.softmax(target, -1) * F.log_softmax(input, -1)).sum(-1).mean()


def framework_cross_entropy(input: Tensor, target: Tensor) -> Tensor:
    """The framework's own, which takes distributions as probabilities."""
    return F.cross_entropy(input, F.softmax(target, -1) if target.is_floating_point() else target)


def entropy(input: Tensor) -> Tensor:
    log_p = F.log_softmax(input, -1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def kl_div_topk(input: Tensor, indices: Tensor, log_probs: Tensor) -> Tensor:
    log_q = F.log_softmax(input, -1).gather(-1, indices)
    tail_p = (1 - log_probs.exp().sum(-1)).clamp_min(1e-30)
    tail_q = (1 - log_q.exp().sum(-1)).clamp_min(1e-30)
    return ((log_probs.exp() * (log_probs - log_q)).sum(-1) + tail_p * (tail_p / tail_q).log()).mean()


def gaussian_kl(mean: Tensor, log_var: Tensor) -> Tensor:
    return 0.5 * (log_var.exp() + mean.square() - 1 - log_var).sum(-1).mean()


# --- what is timed ----------------------------------------------------------------------------------------------------


class Loss(NamedTuple):
    """limit: in units of copy_ of one input. inputs: how many of the arguments get gradients."""

    ours: Callable[..., Tensor]
    textbook: Callable[..., Tensor]
    arguments: Callable[[Shape], list[Tensor]]
    limit: float
    inputs: int = 1
    in_place: bool = False
    framework: bool = False  # F.cross_entropy is a contender


def logits(shape: Shape) -> list[Tensor]:
    return [torch.randn(shape)]


def two_logits(shape: Shape) -> list[Tensor]:
    return [torch.randn(shape), torch.randn(shape)]


def logits_and_labels(shape: Shape) -> list[Tensor]:
    return [torch.randn(shape), torch.randint(shape[1], shape[:1])]


def logits_and_top(shape: Shape) -> list[Tensor]:
    top = F.log_softmax(torch.randn(shape), -1).topk(TOP)
    return [torch.randn(shape), top.indices, top.values]


LOSSES = {
    "js_div": Loss(td.js_div, js_div, two_logits, LIMIT_COPIES, in_place=True),
    "kl_div": Loss(td.kl_div, kl_div, two_logits, LIMIT_COPIES, in_place=True),
    "cross_entropy, labels": Loss(
        td.cross_entropy, cross_entropy_of_labels, logits_and_labels, 1, in_place=True, framework=True
    ),
    "cross_entropy, distributions": Loss(
        partial(td.cross_entropy, target_space="logits"),
        cross_entropy_of_distributions,
        two_logits,
        LIMIT_COPIES,
        framework=True,
    ),
    "entropy": Loss(td.entropy, entropy, logits, 1),
    f"kl_div_topk, k={TOP}": Loss(td.kl_div_topk, kl_div_topk, logits_and_top, 1),
    # Two inputs are read and two gradients written.
    "gaussian_kl": Loss(td.gaussian_kl, gaussian_kl, two_logits, 2, inputs=2),
}


def steps_of(loss: Loss, shape: Shape) -> Iterator[tuple[str, Step]]:
    """Every contender but copy_, on the same inputs."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    arguments = loss.arguments(shape)
    split = arguments[: loss.inputs], arguments[loss.inputs :]
    yield OURS, Step(loss.ours, *split)
    if loss.in_place:
        yield IN_PLACE, Step(partial(loss.ours, inplace_grad=True), *split, in_place=True)
    yield EAGER, Step(loss.textbook, *split)
    yield COMPILED, Step(torch.compile(loss.textbook, dynamic=False), *split)
    if loss.framework:
        yield CROSS_ENTROPY, Step(framework_cross_entropy, *split)


def check(loss: Loss, shape: Shape) -> float:
    """The largest error of value and gradient, relative to their size, against the textbook formula in float64."""
    torch.manual_seed(0)
    arguments = [tensor.double() if tensor.is_floating_point() else tensor for tensor in loss.arguments(shape)]
    exact = Step(loss.textbook, arguments[: loss.inputs], arguments[loss.inputs :])
    exact.incoming = exact.incoming.double()
    exact.prepare()
    value = exact().detach()
    gradient = exact.gradient()
    worst = 0.0
    for name, step in steps_of(loss, shape):
        step.prepare()
        errors = (step().detach().double() - value).abs() / value.abs()
        errors = torch.maximum(errors, (step.gradient().double() - gradient).abs().max() / gradient.abs().max())
        worst = max(worst, errors.item())
        assert errors < 1e-4, f"{name}: value or gradient is off by {errors:.1e}"
        step.release()
    return worst


def measure(loss: Loss, shape: Shape, rounds: int) -> Figures:
    steps: dict[str, Contender] = dict(steps_of(loss, shape))
    steps[COPY] = Copy(torch.randn(shape))
    return measure_in_turns(steps, rounds)


# --- the report -------------------------------------------------------------------------------------------------------

Times = dict[str, dict[Shape, Figures]]  # of each loss


def mark_goals(name: str, shape: Shape, figures: Figures, goals: Goals) -> dict[str, str]:
    """The figures as text: for ours, multiples of the limit; for the peers, how many times slower than td they are."""
    limit = LOSSES[name].limit * figures[COPY]
    at_most: dict[str, float] = {}
    at_least: dict[str, float] = {}
    if name == "js_div" and shape in SHAPES[2:]:
        at_most, at_least = {OURS: 3.5, IN_PLACE: 2.5}, {EAGER: 25, COMPILED: 10}
    if name == "cross_entropy, labels":
        at_least = {CROSS_ENTROPY: 3 if shape[1] >= 32000 else 1}
    text = {"limit": f"{1e3 * limit:.2f}"}
    for contender, seconds in figures.items():
        if contender == COPY:
            continue
        where = f"{name} {shape[0]}x{shape[1]}: {contender}"
        cell = f"{1e3 * seconds:.2f} ({seconds / limit:.2f})"
        text[contender] = goals.mark(cell, seconds / limit, at_most.get(contender), True, f"{where} in limits")
        if contender not in (OURS, IN_PLACE):
            ratio = seconds / figures[OURS]
            marked = goals.mark(f"{ratio:.1f}", ratio, at_least.get(contender), False, f"{where} / {OURS}")
            text[f"{contender} / {OURS}"] = marked
    return text


def tables(times: Times, goals: Goals) -> list[str]:
    peers = [EAGER, COMPILED, CROSS_ENTROPY]
    lines = []
    for name, shapes in times.items():
        cells = {shape: mark_goals(name, shape, figures, goals) for shape, figures in shapes.items()}
        shown = next(iter(cells.values()))
        columns = ["limit", OURS, IN_PLACE, *peers, *(f"{peer} / {OURS}" for peer in peers)]
        columns = [column for column in columns if column in shown]
        rows = [[f"{shape[0]}x{shape[1]}", *(row[column] for column in columns)] for shape, row in cells.items()]
        lines += [f"### {name}", "", f"Limit: {LOSSES[name].limit:g} x `copy_`.", ""]
        lines += [*table(["shape", *columns], rows), ""]
    return lines


def draw(times: Times, picture: Path, subtitle: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(2, 4, figsize=(15, 7), layout="constrained", sharex=True, sharey=True)
    styles = {
        EAGER: ("PyTorch, eager", "tab:red", "s"),
        COMPILED: ("PyTorch, torch.compile", "tab:orange", "^"),
        CROSS_ENTROPY: (CROSS_ENTROPY, "tab:green", "D"),
        OURS: ("torch_divergence", "tab:blue", "o"),
        IN_PLACE: ("torch_divergence, inplace_grad=True", "tab:cyan", "v"),
    }
    labels = {}
    for axes, (name, shapes) in zip(grid.flat, times.items(), strict=False):
        classes = [shape[1] for shape in shapes]

        def per_entry(contender: str, shapes: dict[Shape, Figures] = shapes, factor: float = 1) -> list[float]:
            return [1e9 * factor * figures[contender] / math.prod(shape) for shape, figures in shapes.items()]

        for contender, (label, color, marker) in styles.items():
            if contender in next(iter(shapes.values())):
                (line,) = axes.plot(classes, per_entry(contender), color=color, marker=marker, markersize=5)
                labels[label] = line
        (line,) = axes.plot(classes, per_entry(COPY, factor=LOSSES[name].limit), "k--")
        labels["memory limit"] = line
        axes.set(xscale="log", yscale="log", title=name)
        axes.grid(alpha=0.3, which="both")
    for axes in (*grid[-1, :-1], grid[0, -1]):  # the last place is the legend's
        axes.set_xlabel("classes")
        axes.tick_params(labelbottom=True)
    for axes in grid[:, 0]:
        axes.set_ylabel("ns an entry, forward + backward")
    grid.flat[-1].set_axis_off()
    grid.flat[-1].legend(labels.values(), labels.keys(), loc="center")
    figure.suptitle(f"Losses of logits, float32, forward + backward\n{subtitle}", fontsize=10)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def report(shapes: tuple[Shape, ...], rounds: int, results: Path, picture: Path) -> None:
    clock = Clock()
    times: Times = {}
    for name, loss in LOSSES.items():
        times[name] = {}
        for shape in shapes:
            print(f"  {clock.seconds():4.0f} s  {name} {shape[0]}x{shape[1]}", file=sys.stderr, flush=True)
            times[name][shape] = measure(loss, shape, rounds)
    others = clock.other_programs()
    capability = td._C.cpu_capability()
    draw(times, picture, machine(capability))
    goals = Goals()
    lines = [
        *heading("Losses between distributions: forward and backward", "divergences.py", capability, others),
        f"float32, independent `randn` logits, mean over the rows, {rounds} rounds. Milliseconds; in brackets,",
        "multiples of the limit of memory, in units of the time of `dst.copy_(src)` for one input: 1.5 for",
        "two inputs and one gradient, 1 for one input and its gradient, 2 for two of each. The last columns: how many",
        "times slower than `td` the peers are. `eager` and `torch.compile` are the textbook formulas of",
        "benchmarks/divergences.py. Target distributions are given to all as logits.",
        "",
        *tables(times, goals),
        "Goals: `js_div` at 512x32000 and 128x128256 at most 3.5 limits fresh and 2.5 in place, 25 times faster than",
        "eager and 10 times faster than `torch.compile`; `cross_entropy` of labels as fast as `F.cross_entropy`",
        "everywhere, 3 times faster from 32000 classes.",
        "",
        *goals.lines(),
    ]
    write(lines, results, picture, clock)


def main() -> None:
    quick, results, picture = arguments("Time of forward and backward of losses between distributions.", "divergences")
    torch.set_num_threads(THREADS)
    # In this process: helpers that compile would be counted as other programs.
    torch._inductor.config.compile_threads = 1
    if quick:
        for name, loss in LOSSES.items():
            worst = max(check(loss, shape) for shape in QUICK_SHAPES)
            print(f"{name}: largest relative error {worst:.1e}", flush=True)
    report(QUICK_SHAPES if quick else SHAPES, 1 if quick else 5, results, picture)


if __name__ == "__main__":
    main()
