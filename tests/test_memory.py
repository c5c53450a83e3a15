"""Nothing of the size of the input is allocated besides the inputs and the gradients that were asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import ALL_OPTIONS
from torch.profiler import profile

ROWS, CLASSES = 32, 16384
TESTS = Path(__file__).parent


def peak(f):
    """The most bytes of tensors that f had allocated at a time, beyond what was there before."""
    with profile(profile_memory=True) as prof:
        result = f()
    now = most = 0
    for event in sorted(
        (e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        now += event.nbytes()
        most = max(most, now)
    del result
    return most


def forward_and_backward(case, inputs, **options):
    loss = case(*inputs, **options)
    return torch.autograd.grad(loss.sum(), [t for t in inputs if t.requires_grad])


@pytest.mark.parametrize("case", ALL_OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_peak_of_forward_and_backward(case, dtype):
    slack = ROWS * 1024 + 8 * CLASSES
    for sides in ((), (0,), (1,), (0, 1)):
        inputs = case.draw(ROWS, CLASSES, dtype=dtype, grad=sides)
        size = inputs[0].numel() * inputs[0].element_size()
        for reduction in ("none", "mean"):
            for weight in (None, torch.rand(ROWS)):
                f = case.bind(reduction=reduction, row_weight=weight)
                assert peak(lambda f=f, inputs=inputs: f(*inputs)) <= slack + (
                    size if len(sides) == 1 and reduction == "mean" else 0
                )
                if sides:
                    assert peak(lambda f=f, inputs=inputs: forward_and_backward(f, inputs)) <= slack + size * len(sides)


@pytest.mark.parametrize("case", ALL_OPTIONS, ids=str)
def test_mixed_dtypes_are_widened_in_registers(case):
    inputs = [t.detach() for t in case.draw(ROWS, CLASSES)]
    for dtypes in ((torch.float32, torch.bfloat16), (torch.float16, torch.float32)):
        x = [t.to(d) for t, d in zip(inputs, dtypes, strict=True)]
        x[0].requires_grad_()
        size = x[0].numel() * x[0].element_size()
        assert peak(lambda x=x: forward_and_backward(case, x, reduction="mean")) <= size + ROWS * 1024 + 8 * CLASSES


@pytest.mark.parametrize("case", ALL_OPTIONS[:1], ids=str)
def test_strided_inputs_are_not_copied(case):
    """Rows apart from each other in memory are read where they are."""
    wide = tuple(t.detach().repeat(1, 2)[:, :CLASSES] for t in case.draw(ROWS, CLASSES, dtype=torch.float32))
    wide[0].requires_grad_()
    assert not wide[0].is_contiguous()
    assert (
        peak(lambda: forward_and_backward(case, wide, reduction="mean"))
        <= 4 * wide[0].numel() + ROWS * 1024 + 8 * CLASSES
    )


@pytest.mark.parametrize("case", [c for c in ALL_OPTIONS if c.loss.inplace_grad][:1], ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_inplace_grad_allocates_nothing(case, dtype):
    leaf, target = case.draw(ROWS, CLASSES, dtype=dtype, grad=(0,))
    x = leaf * 1

    def run():
        loss = case(x, target, inplace_grad=True, reduction="mean")
        return torch.autograd.grad(loss, x)

    assert peak(run) <= ROWS * 1024 + 8 * CLASSES


CHILD = """
import torch
from cases import ALL_OPTIONS


def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))


def step(x, target):
    torch.autograd.grad(ALL_OPTIONS[0](x, target, reduction="mean"), x)


step(torch.zeros(4, 32000, requires_grad=True), torch.zeros(4, 32000))
x, target = (torch.zeros(512, 32000).normal_() for _ in range(2))
x.requires_grad_()
open("/proc/self/clear_refs", "w").write("5")  # the peak is now what is resident
before = peak()
step(x, target)
print((peak() - before) / (512 * 32000 * 4 / 1024))
"""


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of resident memory can be reset on Linux alone"
)
def test_resident_memory():
    """Scratch memory that no profiler sees: the process grows by one gradient."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", CHILD], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 1.15
