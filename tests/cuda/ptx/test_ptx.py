"""The CUDA kernels as nvcc compiles them, PTX and host code, run by the interpreter through the emulator's tests.

The tests' forward and backward orders run whole blocks in lockstep; their random ones run the warps in random order and
move every result of an .approx instruction by up to 2 ulp. Tolerances are the tests' own.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import nvcc  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(nvcc.find_nvcc() is None, reason="nvcc was not found: there is no PTX to run"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler was found"),
]

# Of the emulator's cases, which run there in full, those that differ in what the compiler has to get right: a team of
# one warp, of a block and of several blocks; heads, tails and strides; masks; near and far rows; every dtype and space.
LOGITS = ("one_class", "less_than_a_piece", "odd", "misaligned_differently", "strided", "mask_both_far", "kl_1e_12")
OTHER_SPACES = ("less_than_a_piece", "odd")
ALONE = ("KlDivCudaWeight.*", "Cases/KlDivCuda.Logits/split_odd_far")
FILTER = ":".join(
    [
        *(f"*KlDivCuda.Logits/{name}" for name in LOGITS),
        *(f"*KlDivCuda.OtherSpaces/{name}" for name in OTHER_SPACES),
        *ALONE,
    ]
)


@pytest.mark.parametrize("architecture", nvcc.ARCHITECTURES)
def test_kernels(architecture: str) -> None:
    tests = nvcc.link_tests()
    command = [
        sys.executable,
        HERE / "run_tests.py",
        tests.library,
        tests.ptx[architecture],
        f"--gtest_filter={FILTER}",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "[  PASSED  ]" in result.stdout
