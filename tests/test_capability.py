"""Every instruction set in a process of its own: what is asked for is what runs, as accurate as the others."""

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
        for shape in ((5, 7), (3, 16), (2, 33), (1, 2501)):
            value, gradients = check(case.loss, *case.draw(*shape, dtype=dtype), reduction="none", **case.options)
            for side in (0, 1):
                check(case.loss, *case.draw(*shape, dtype=dtype, grad=(side,)), **case.options)
            results += [value.detach(), *gradients]
            if dtype.itemsize >= 4:
                x = case.draw(*shape, dtype=dtype)
                first = torch.autograd.grad(case(*x).sum(), x, create_graph=True)
                results += torch.autograd.grad(sum((i + 1) * g.pow(2).sum() for i, g in enumerate(first)), x)
torch.save(results, sys.argv[2])
"""


def run(capability, path):
    env = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": capability.lower(),
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD, capability, str(path)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return torch.load(path)


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    return run("DEFAULT", tmp_path_factory.mktemp("capability") / "default.pt")


@pytest.mark.slow
@pytest.mark.parametrize("capability", ORDER)
def test_capability(capability, default, tmp_path):
    if CPU not in ORDER or ORDER.index(CPU) < ORDER.index(capability):
        pytest.skip(f"this processor has {CPU}, not {capability}")
    got = default if capability == "DEFAULT" else run(capability, tmp_path / "got.pt")
    for a, b in zip(got, default, strict=True):
        assert a.dtype == b.dtype
        tolerance = {torch.float64: 2e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[a.dtype]
        assert ((a - b).abs() <= tolerance * b.abs().amax()).all()


def test_capability_of_this_process():
    import torch_divergence as td

    assert td._C.cpu_capability() == (CPU if CPU in ORDER else "DEFAULT")
