"""What to run when a GPU is at hand: gpu_day.py [--out FILE]. Without one it says so and does nothing.

1. The Python tests on CUDA tensors (TD_TEST_DEVICE=cuda), in as many processes as there are processors where
   pytest-xdist is installed.
2. compute-sanitizer over calls of every kernel (gpu_day.py --calls): memcheck, racecheck, initcheck, synccheck.
3. The GPU's results beside the CPU kernels', in units in the last place.
4. Times of forward and backward beside PyTorch's, and the bandwidth that is reached, beside what docs/cuda.md computes.

Everything goes into FILE with the GPU, the driver and the date.
"""

import argparse
import datetime
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

# The tests of what has CUDA kernels.
TESTS = tuple(
    f"test_{name}.py"
    for name in (
        *("values", "gradients", "errors", "modules", "fuzz", "js_div", "cross_entropy", "entropy", "kl_div_topk"),
        *("gaussian_kl", "fisher_vector_product", "kl_estimate", "wasserstein_1d", "sliced_wasserstein", "sinkhorn"),
        *("distillation", "ppo", "vae"),
    )
)
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SIZES = ((65536, 128), (8192, 1024), (4096, 32768), (1024, 131072))
CALL_SHAPES = ((3, 5), (2, 1000), (2, 4097), (1, 40000))
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


# --- the calls --------------------------------------------------------------------------------------------------------

Shape = tuple[int, int]


class Call(NamedTuple):
    """A loss, its arguments in float32 for rows and classes, how many are differentiated, and in which dtypes."""

    name: str
    function: Callable[..., Tensor]
    arguments: Callable[[Shape], list[Tensor]]
    differentiable: int = 2
    dtypes: tuple[torch.dtype, ...] = DTYPES


def calls() -> Iterator[Call]:
    """Every loss with kernels of its own."""
    import torch_divergence as td
    from divergences import LOSSES, two_logits

    spaces: dict[str, Callable[[Tensor], Tensor]] = {
        "logits": lambda x: x,
        "log_probs": lambda x: x.log_softmax(-1),
        "probs": lambda x: x.softmax(-1),
    }

    def pair(shape: Shape, space: str) -> list[Tensor]:
        return [spaces[space](x) for x in two_logits(shape)]

    for space in spaces:
        arguments = partial(pair, space=space)
        for direction in ("forward", "reverse"):
            yield Call(f"kl_div, {space}, {direction}", partial(td.kl_div, space=space, direction=direction), arguments)
        for beta in (0.5, 0.1):
            yield Call(f"js_div, {space}, beta {beta}", partial(td.js_div, space=space, beta=beta), arguments)
        options = {"space": space, "target_space": space}
        yield Call(f"cross_entropy, {space}", partial(td.cross_entropy, **options), arguments)
        yield Call(f"entropy, {space}", partial(td.entropy, space=space), lambda x, f=arguments: f(x)[:1], 1)
    for name in ("cross_entropy, labels", "gaussian_kl"):
        yield Call(name, LOSSES[name].ours, LOSSES[name].arguments, LOSSES[name].inputs)

    def teacher(shape: Shape) -> list[Tensor]:
        student, target = two_logits(shape)
        top = target.log_softmax(-1).topk(min(64, shape[1] - 1))
        return [student, top.indices, top.values]

    for tail in ("bucket", "zero", "renorm_target", "renorm_both"):
        yield Call(f"kl_div_topk, {tail}", partial(td.kl_div_topk, tail=tail), teacher, 1)
    yield Call("fisher_vector_product", lambda x, v: td.fisher_vector_product(x, v).square().sum(), two_logits)
    exact = (torch.float32, torch.float64)
    yield Call("wasserstein_1d", lambda u, v: td.wasserstein_1d(u, v, p=2).sum(), two_logits, dtypes=exact)

    def points(shape: Shape) -> list[Tensor]:
        return [torch.randn(min(shape[1], 300), 3) for _ in range(2)]

    sinkhorn = partial(td.sinkhorn_divergence, blur=0.3, tol=1e-10)
    yield Call("sinkhorn_divergence", sinkhorn, points, dtypes=(torch.float64,))


def on(device: str, tensors: list[Tensor], dtype: torch.dtype, differentiable: int) -> list[Tensor]:
    moved = [t.to(dtype).to(device) if t.is_floating_point() else t.to(device) for t in tensors]
    return [t.requires_grad_(i < differentiable) for i, t in enumerate(moved)]


def results(call: Call, tensors: list[Tensor]) -> list[Tensor]:
    """The loss, its gradients, and the gradients of their squares' sum."""
    leaves = tensors[: call.differentiable]
    loss = call.function(*tensors)
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    squares = sum(g.to(loss.dtype).square().sum() for g in first)
    second = torch.autograd.grad(squares, leaves, allow_unused=True, materialize_grads=True)
    return [loss.detach()[None], *(g.detach() for g in first), *second]


def run_calls() -> None:
    """For compute-sanitizer: every kernel, on rows of one warp, of one block and of several."""
    torch.manual_seed(0)
    for call in calls():
        for shape in CALL_SHAPES:
            tensors = call.arguments(shape)
            for dtype in call.dtypes:
                results(call, on("cuda", tensors, dtype, call.differentiable))
    torch.cuda.synchronize()


# --- the parts of the report ------------------------------------------------------------------------------------------


def run(*command: str, tail: int = 25) -> tuple[int, str]:
    environment = {**os.environ, "TD_TEST_DEVICE": "cuda"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    return result.returncode, "\n".join((result.stdout + result.stderr).splitlines()[-tail:])


def run_tests() -> tuple[int, list[str]]:
    spread = ("-n", str(os.cpu_count()), "--maxfail=100") if importlib.util.find_spec("xdist") else ()
    start = time.monotonic()
    files = [f"tests/{name}" for name in TESTS]
    status, tail = run(sys.executable, "-m", "pytest", "-q", *spread, "--tb=line", *files, "-m", "not slow", tail=60)
    return int(status != 0), ["## Tests on CUDA tensors", f"In {time.monotonic() - start:.0f} s:", "```", tail, "```"]


def run_sanitizer() -> tuple[int, list[str]]:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return 0, ["compute-sanitizer was not found (PyPI: nvidia-cuda-sanitizer-api)."]

    def check(tool: str) -> tuple[int, str]:
        return run(sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "--calls", tail=8)

    failed, lines = 0, ["## compute-sanitizer"]
    with ThreadPoolExecutor() as pool:
        for tool, (status, tail) in zip(TOOLS, pool.map(check, TOOLS), strict=True):
            failed += status != 0
            lines += [f"### {tool}", "```", tail, "```"]
    return failed, lines


def ulps(got: Tensor, want: Tensor) -> float:
    """The largest difference, in units in the last place of the largest entry of each row."""
    size = want.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(want.dtype).tiny)
    return float(((got.cpu() - want).abs() / (size * torch.finfo(want.dtype).eps)).max())


def compare() -> list[str]:
    lines = ["## GPU beside CPU", "", "In ulp: the loss, the gradients, the second derivatives.", ""]
    for call in calls():
        for dtype in call.dtypes:
            worst: list[float] = []
            for shape in CALL_SHAPES:
                torch.manual_seed(shape[1])
                tensors = call.arguments(shape)
                cpu, gpu = (results(call, on(d, tensors, dtype, call.differentiable)) for d in ("cpu", "cuda"))
                each = [ulps(g, c) for g, c in zip(gpu, cpu, strict=True)]
                worst = each if not worst else [max(pair) for pair in zip(worst, each, strict=True)]
            lines.append(f"- {call.name}, {str(dtype).removeprefix('torch.')}: {', '.join(f'{u:.2g}' for u in worst)}")
    return lines


def milliseconds(step: Callable[[], object], repeats: int = 20) -> float:
    """The median of so many, between events, after three that are not counted."""
    times = []
    for i in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end))
    return float(torch.tensor(times, device="cpu").median())


def time_losses(compiled: bool) -> list[str]:
    from divergences import LOSSES

    lines = [
        "## Times of forward and backward, in milliseconds",
        "",
        "| loss | shape | td forward | td forward + backward | GB/s | eager | torch.compile |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for dtype in (torch.float32, torch.bfloat16):
        for rows, classes in SIZES:
            source = torch.randn(rows, classes).to(dtype)
            copy = milliseconds(lambda source=source: source.clone())
            rate = 2e-6 * source.numel() * source.element_size() / copy
            name = f"{rows}x{classes} {str(dtype).removeprefix('torch.')}"
            lines.append(f"| clone | {name} | | {copy:.3f} | {rate:.0f} | | |")
            for loss_name, loss in LOSSES.items():
                torch.manual_seed(0)
                torch._dynamo.reset()
                arguments = on("cuda", loss.arguments((rows, classes)), dtype, loss.inputs)

                def step(f: Callable[..., Tensor], arguments: list[Tensor] = arguments, n: int = loss.inputs) -> object:
                    return torch.autograd.grad(f(*arguments), arguments[:n])

                def forward(arguments: list[Tensor] = arguments, f: Callable[..., Tensor] = loss.ours) -> object:
                    with torch.no_grad():
                        return f(*arguments)

                figures = [milliseconds(forward), milliseconds(lambda f=loss.ours, step=step: step(f))]
                peers = [milliseconds(lambda f=loss.textbook, step=step: step(f))]
                if compiled:
                    fused = torch.compile(loss.textbook, dynamic=False)
                    peers.append(milliseconds(lambda f=fused, step=step: step(f)))
                entries = sum(t.numel() for t in arguments if t.is_floating_point()) * 2 + sum(
                    t.numel() for t in arguments[: loss.inputs]
                )
                rate = 1e-6 * entries * source.element_size() / figures[1]
                lines.append(
                    f"| {loss_name} | {name} | {figures[0]:.3f} | {figures[1]:.3f} | {rate:.0f} | "
                    + " | ".join(f"{peer:.3f} ({peer / figures[1]:.1f})" for peer in peers)
                    + " |"
                )
    lines += ["", "GB/s: inputs read twice and gradients written once. In brackets: times td's time."]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_day.md")
    parser.add_argument("--calls", action="store_true", help="only what compute-sanitizer watches")
    parser.add_argument("--parts", default="times,compiled,compare,sanitizer,tests", help="what to do; default: all")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: torch finds no GPU here")
        return 0
    torch.set_default_device("cuda")
    if options.calls:
        run_calls()
        return 0
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    lines = [f"# {datetime.date.today()}: {driver or torch.cuda.get_device_name()}, torch {torch.__version__}", ""]
    failed = 0
    parts = options.parts.split(",")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name, part in (
        ("times", lambda: (0, time_losses("compiled" in parts))),
        ("compare", lambda: (0, compare())),
        ("sanitizer", run_sanitizer),
        ("tests", run_tests),
    ):
        if name in parts:
            status, text = part()
            failed += status
            lines += [*text, ""]
            options.out.write_text("\n".join(lines) + "\n")
    print(options.out.read_text())
    return failed


if __name__ == "__main__":
    sys.exit(main())
