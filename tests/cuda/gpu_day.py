"""What to run when a GPU is at hand: gpu_day.py [--out FILE]. Without one it says so and does nothing.

1. The Python tests on CUDA tensors (TD_TEST_DEVICE=cuda).
2. compute-sanitizer over a small part of them: memcheck, racecheck, initcheck, synccheck.
3. The GPU's results beside the CPU kernels', in ulp: the first such run is also the first test of the emulator.
4. Times at three sizes, beside the least that docs/cuda.md computes.

Everything goes into FILE with the GPU, the driver and the date.
"""

import argparse
import datetime
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
TESTS = (
    "test_values.py",
    "test_gradients.py",
    "test_cross_entropy.py",
    "test_entropy.py",
    "test_errors.py",
    "test_modules.py",
    "test_fuzz.py",
)
SANITIZED = ("tests/test_gradients.py", "-k", "kl_div and not compile", "-x", "-q")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SIZES = ((8192, 1024), (4096, 32768), (2048, 131072))


def run(*command: str) -> tuple[int, str]:
    environment = {**os.environ, "TD_TEST_DEVICE": "cuda"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    return result.returncode, "\n".join((result.stdout + result.stderr).splitlines()[-25:])


def ulps(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, in units in the last place of the largest entry of each row."""
    size = want.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(want.dtype).tiny)
    return float(((got.cpu() - want).abs() / (size * torch.finfo(want.dtype).eps)).max())


def compare() -> list[str]:
    import torch_divergence as td

    lines = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for classes in (5, 1000, 4097, 50000):
            generator = torch.Generator().manual_seed(classes)
            pair = [torch.randn(7, classes, generator=generator).mul(2).to(dtype) for _ in range(2)]
            results = []
            for device in ("cpu", "cuda"):
                leaves = [t.to(device).requires_grad_() for t in pair]
                loss = td.kl_div(*leaves, reduction="none")
                results.append((loss.detach()[:, None], *torch.autograd.grad(loss.sum(), leaves)))
            worst = [f"{ulps(gpu, cpu):.2f}" for cpu, gpu in zip(*results, strict=True)]
            lines.append(
                f"{dtype}, {classes} classes: value, gradients of input and target {', '.join(worst)} ulp apart"
            )
    return lines


def time_kernels() -> list[str]:
    import torch_divergence as td

    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        for rows, classes in SIZES:
            student, teacher = (torch.randn(rows, classes, device="cuda").to(dtype) for _ in range(2))
            student.requires_grad_()
            seconds = []
            for step in range(23):
                events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
                events[0].record()
                loss = td.kl_div(student, teacher)
                events[1].record()
                torch.autograd.grad(loss, student)
                events[2].record()
                torch.cuda.synchronize()
                if step >= 3:
                    seconds.append([a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)])
            forward, backward = torch.tensor(seconds, device="cpu").median(0).values.tolist()
            per = [f"{1e12 * t / (rows * classes):.2f}" for t in (forward, backward)]
            lines.append(
                f"{dtype}, {rows} x {classes}: forward {per[0]}, backward {per[1]} ps an element (median of 20)"
            )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_day.md")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: torch finds no GPU here")
        return 0
    failed = 0
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    lines = [f"# {datetime.date.today()}: {driver or torch.cuda.get_device_name()}, torch {torch.__version__}", ""]
    status, tail = run(sys.executable, "-m", "pytest", "-q", *(f"tests/{name}" for name in TESTS))
    failed += status != 0
    lines += ["## Tests on CUDA tensors", "```", tail, "```"]
    sanitizer = shutil.which("compute-sanitizer")
    for tool in TOOLS if sanitizer else ():
        status, tail = run(
            sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", *SANITIZED
        )
        failed += status != 0
        lines += [f"## compute-sanitizer {tool}", "```", tail, "```"]
    if sanitizer is None:
        lines += ["compute-sanitizer was not found (PyPI: nvidia-cuda-sanitizer-api)."]
    lines += ["## GPU beside CPU", *(f"- {line}" for line in compare())]
    lines += ["## Times, measured", *(f"- {line}" for line in time_kernels())]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(lines) + "\n")
    print(options.out.read_text())
    return failed


if __name__ == "__main__":
    sys.exit(main())
