"""What the benchmarks share: contenders that take turns, goals, and what is said of the machine (README.md: rules)."""

import argparse
import datetime
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch_divergence as td
from torch import Tensor

HERE = Path(__file__).resolve().parent
IMAGES = HERE.parent / "docs" / "images"
THREADS = 2
# The time of reading both inputs and writing one gradient, in units of one copy: three streams of memory against two.
LIMIT_COPIES = 1.5
WARM_STEPS = 2  # this library expects the incoming gradient that came twice
SMALL_STEPS = 200  # steps in one sample where a step takes microseconds
OURS, IN_PLACE, EAGER, COMPILED, COPY = "td", "td, in place", "eager", "torch.compile", "copy_"
Figures = dict[str, float]


# --- contenders -------------------------------------------------------------------------------------------------------


class Contender(Protocol):
    """What takes turns: prepare() and release() are not timed."""

    def prepare(self) -> None: ...

    def __call__(self) -> object: ...

    def release(self) -> None: ...


class FreshLogits(torch.autograd.Function):
    """A copy that is not a leaf, like the output of a model's last layer. Backward ends here, at no cost."""

    @staticmethod
    def forward(ctx, logits):
        return logits.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


class Step:
    """One forward and backward; gradient() is what the last one computed for the first of the inputs.

    The inputs get gradients, the constants do not. In place, the loss is given FreshLogits of its one input.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        constants: Sequence[Tensor] = (),
        incoming: float = 1.0,
        in_place: bool = False,
    ):
        self.loss, self.in_place = loss, in_place
        self.leaves = [input.detach().requires_grad_() for input in inputs]
        self.constants = list(constants)
        self.incoming = torch.tensor(incoming)
        self.arguments = [*self.leaves, *self.constants]

    def prepare(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        if self.in_place:
            self.arguments[0] = FreshLogits.apply(self.leaves[0])

    def __call__(self) -> Tensor:
        loss = self.loss(*self.arguments)
        loss.backward(self.incoming)
        return loss

    def gradient(self) -> Tensor:
        gradient = self.arguments[0].detach() if self.in_place else self.leaves[0].grad
        assert gradient is not None
        return gradient

    def release(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        self.arguments[0] = self.leaves[0]


class Copy:
    def __init__(self, source: Tensor):
        self.source, self.destination = source, source.clone()

    def prepare(self) -> None: ...

    def __call__(self) -> None:
        self.destination.copy_(self.source)

    def release(self) -> None: ...


def measure_in_turns(
    contenders: Mapping[str, Contender], rounds: int, steps: int = 1, warm_steps: int = WARM_STEPS
) -> Figures:
    """Median seconds of a step. In each round each contender has its turn, in a new random order.

    A turn is warm_steps that are not timed, so that buffers and threads are as warm as in a training loop whatever ran
    before, and the timed steps: with more than one, what prepares them is included.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    order, shuffle = list(contenders), random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            step = contenders[name]
            for _ in range(warm_steps):
                step.prepare()
                step()
            step.prepare()
            start = time.perf_counter()
            step()
            for _ in range(steps - 1):
                step.prepare()
                step()
            samples[name].append((time.perf_counter() - start) / steps)
            step.release()
    return {name: statistics.median(times) for name, times in samples.items()}


# --- the report -------------------------------------------------------------------------------------------------------


class Goals:
    """Counts the goals that were met, and marks the figures that miss one."""

    def __init__(self) -> None:
        self.met = 0
        self.missed: list[str] = []

    def mark(self, text: str, value: float, bound: float | None, at_most: bool, what: str) -> str:
        if bound is None:
            return text
        if value <= bound if at_most else value >= bound:
            self.met += 1
            return text
        self.missed.append(f"{what}: {value:.2f}, goal {'at most' if at_most else 'at least'} {bound:g}")
        return f"**{text}** miss"

    def lines(self) -> list[str]:
        total = self.met + len(self.missed)
        lines = [f"## Goals: {self.met} of {total} met", ""]
        return lines + ([f"- missed: {text}" for text in self.missed] or ["None is missed."])


def table(head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> list[str]:
    """A Markdown table whose columns after the first ones are figures."""
    rule = "|---" * text_columns + "|--:" * (len(head) - text_columns) + "|"
    return ["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)]


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def busy_seconds() -> tuple[float, float]:
    """CPU time of the whole machine, and of this program with the processes it has waited for."""
    used = os.times()
    ours = used.user + used.system + used.children_user + used.children_system
    if not Path("/proc/stat").exists():
        return ours, ours
    user, nice, system, _idle, _iowait, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK"), ours


def read_setting(path: str) -> str:
    return Path(path).read_text().strip() if Path(path).exists() else "not there"


class Clock:
    """Started with the measurements: how long they took, and how many cores other programs kept busy meanwhile."""

    def __init__(self) -> None:
        self.start, (self.machine, self.ours) = time.perf_counter(), busy_seconds()

    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def other_programs(self) -> float:
        machine, ours = busy_seconds()
        return (machine - self.machine - (ours - self.ours)) / self.seconds()


def machine(capability: str) -> str:
    """In one line, for a picture."""
    return f"{cpu_model()}, {THREADS} threads, {capability}, torch {torch.__version__.split('+')[0]}"


def heading(title: str, program: str, capability: str, others: float, *packages: str) -> list[str]:
    """The first lines of a file of results; others is what Clock.other_programs() said after the measurements."""
    versions = [f"torch {torch.__version__}", f"torch_divergence {td.__version__}", *packages]
    lines = [
        f"# {title}",
        "",
        f"Written by `python benchmarks/{program}`; README.md states the rules.",
        "",
        f"- date: {datetime.date.today().isoformat()}",
        f"- processor: {cpu_model()}, {os.cpu_count()} cores, {capability}; "
        f"other programs kept {others:.2f} cores busy",
        f"- system: {platform.system()} {platform.release()}, transparent huge pages "
        f"`{read_setting('/sys/kernel/mm/transparent_hugepage/enabled')}`",
        f"- {', '.join(versions)}, Python {platform.python_version()}, {THREADS} threads",
        "",
    ]
    if others > 0.1:
        lines += [f"**Not an idle machine ({others:.2f} cores busy): run it again before quoting a figure.**", ""]
    return lines


def arguments(description: str, name: str) -> tuple[bool, Path, Path]:
    """Of the command line: whether it is the quick form, the file of the results and that of the picture."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="tiny inputs: check the values, print the tables")
    parser.add_argument("--output", type=Path, default=None, help="folder of results and picture, in place of this one")
    options = parser.parse_args()
    if options.quick and not options.output:
        parser.error("--quick needs --output: its figures mean nothing")
    results, picture = f"RESULTS_{name.upper()}.md", f"{name}_speed.png"
    return options.quick, (options.output or HERE) / results, (options.output or IMAGES) / picture


def write(lines: Sequence[str], results: Path, picture: Path, clock: Clock) -> None:
    text = "\n".join(lines) + "\n"
    results.write_text(text)
    print(text)
    print(f"written: {results.name}, {picture.name}; {clock.seconds():.0f} s")
