"""Every instruction set in a process of its own: the one asked for is the one that runs, and it is as accurate as the others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
CPU = torch.backends.cpu.get_cpu_capability()
ORDER = ("DEFAULT", "AVX2", "AVX512")

CHILD = """
import sys
import torch
from cases import ALL_OPTIONS, check

import torch_divergence as td

assert td._C.cpu_capability() == sys.argv[1], td._C.cpu_capability()
results = []
for case in ALL_OPTIONS:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for shape in ((3, 1), (2, 7), (5, 16), (3, 31), (2, 33), (2, 129), (2, 5000)):
            value, gradients = check(case.loss, *case.draw(*shape, dtype=dtype), reduction="none", **case.options)
            check(case.loss, *case.draw(*shape, dtype=dtype, grad=(0,)), reduction="mean", **case.options)
            check(case.loss, *case.draw(*shape, dtype=dtype, grad=(1,)), reduction="sum", **case.options)
            x = case.draw(*shape, dtype=dtype)
            first = torch.autograd.grad(case(*x).sum(), x, create_graph=True)
            second = torch.autograd.grad(sum((g * (0.5 + i)).pow(2).sum() for i, g in enumerate(first)), x)
            results += [value.detach(), *gradients, *second]
torch.save(results, sys.argv[2])
"""


def run(capability, path):
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability.lower(), "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-W", "error", "-c", CHILD, capability, str(path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(path)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ORDER)
def test_capability(capability, tmp_path):
    if CPU not in ORDER or ORDER.index(CPU) < ORDER.index(capability):
        pytest.skip(f"this processor has {CPU}, not {capability}")
    got = run(capability, tmp_path / "got.pt")
    want = run("DEFAULT", tmp_path / "want.pt")
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        tolerance = {torch.float64: 2e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[a.dtype]
        assert ((a - b).abs() <= tolerance * b.abs().amax()).all()


def test_capability_of_this_process():
    import torch_divergence as td

    assert td._C.cpu_capability() == (CPU if CPU in ORDER else "DEFAULT")
