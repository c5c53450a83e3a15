"""The comparison table and the comparison of samples, through the functions and through the command."""

import math
import subprocess
import sys

import mpmath
import numpy as np
import pytest
import torch
from torch_divergence import comparison


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "torch_divergence", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_table(tmp_path):
    picture = tmp_path / "table.png"
    result = command("--picture", picture)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("holds") == 7 and "FAILS" not in result.stdout
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_a_wrong_family_fails_the_checks():
    discrete, gaussian = comparison.discrete_family(), comparison.gaussian_family()
    wrong = comparison.Family(
        discrete.name, [comparison.Row(r.shift, r.kl, r.js + 0.1, -r.wasserstein, 0, 1, 0) for r in discrete.rows], ""
    )
    failed = [check.property for check in comparison.checks(wrong, gaussian) if not check.holds]
    assert {"never negative", "zero only for P = Q", "bounded", "gradient without overlap"} <= set(failed)


def test_gaussian_closed_forms():
    for row in comparison.gaussian_family([0.0, 0.5, 3.0]).rows:
        assert math.isclose(row.kl, row.shift**2 / 2, abs_tol=1e-15)
        assert math.isclose(row.wasserstein, row.shift, abs_tol=1e-15)
        assert math.isclose(row.d_kl, row.shift, abs_tol=1e-14)
    # by another quadrature: JS = E_P log 2p/(p + q), as P and Q mirror each other
    js = mpmath.quad(lambda x: mpmath.npdf(x) * -mpmath.log((1 + mpmath.exp(x - 0.5)) / 2), [-15, 0, 15])
    assert math.isclose(comparison.gaussian_family([1.0]).rows[0].js, js, rel_tol=1e-12)


@pytest.mark.parametrize("dims", (1, 3))
def test_samples(tmp_path, dims):
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(60, dims)), generator.normal(size=(50, dims)) + 2
    np.save(tmp_path / "x.npy", x)
    torch.save(torch.from_numpy(y), tmp_path / "y.pt")
    (tmp_path / "x.csv").write_text("a\n" * (dims == 1) + "\n".join(",".join(map(repr, map(float, r))) for r in x))
    results = [command(tmp_path / name, tmp_path / "y.pt") for name in ("x.npy", "x.csv")]
    assert all(r.returncode == 0 for r in results), results
    assert "W1, exact" in results[0].stdout and "60 points" in results[0].stdout
    same = comparison.compare_samples(torch.from_numpy(x), torch.from_numpy(x))
    assert all(abs(value) < 1e-6 for _, value, _ in same), same


@pytest.mark.parametrize(
    "name, content, words",
    (
        ("missing.npy", None, ["no such file"]),
        ("a.txt", b"1", ["suffix", ".txt"]),
        ("a.csv", b"1,2\n3", ["a.csv"]),
        ("b.csv", b"1\nnan", ["1 values", "not finite"]),
        ("c.csv", b"", ["shape"]),
        ("d.npy", b"garbage", ["d.npy"]),
        ("e.pt", b"garbage", ["e.pt"]),
    ),
)
def test_files_that_do_not_fit(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        comparison.load_sample(path)
    assert all(word in str(error.value) for word in words), error.value


def test_command_refuses():
    assert command("one.npy").returncode == 2
    result = command("one.npy", "two.npy")
    assert result.returncode == 2 and "one.npy: there is no such file" in result.stderr
