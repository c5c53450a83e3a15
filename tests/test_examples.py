"""The examples and the benchmarks in a quick form: the claims they check hold, and the two languages agree."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch_divergence as td

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ("teacher", "student alone", "student distilled")


def run(*command: object) -> str:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def figures(output: str) -> dict[str, float]:
    """The accuracies that the program prints at its end, in per cent."""
    return {name: float(re.search(rf"^{name} ([\d.]+) %$", output, re.M)[1]) for name in FIGURES}


@pytest.fixture(scope="module")
def python_distillation(tmp_path_factory) -> tuple[str, Path]:
    picture = tmp_path_factory.mktemp("distillation") / "curves.png"
    return run(sys.executable, ROOT / "examples/python/distillation.py", "--quick", "--picture", picture), picture


def test_python_distillation(python_distillation):
    output, picture = python_distillation
    accuracy = figures(output)
    assert accuracy["teacher"] >= 97
    gain, low, high = map(
        float, re.search(r"^gain (\S+) points, 95 % interval \[(\S+), (\S+)\], 5 seeds$", output, re.M).groups()
    )
    assert 0 < low < gain < high
    assert gain == pytest.approx(accuracy["student distilled"] - accuracy["student alone"], abs=0.011)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def cpp_examples() -> Path:
    """Where they are, built as a user would, with find_package and what the Python package ships."""
    build = ROOT / "build" / "examples-with-package"
    options = ("-DCMAKE_BUILD_TYPE=Release", f"-DPython3_EXECUTABLE={sys.executable}")
    run("cmake", "-S", ROOT / "examples/cpp", "-B", build, f"-DCMAKE_PREFIX_PATH={td.cmake_prefix_path}", *options)
    run("cmake", "--build", build, "--parallel", os.cpu_count())
    return build


def test_cpp_distillation(cpp_examples, python_distillation):
    accuracy = figures(run(cpp_examples / "distillation", "--quick"))
    assert accuracy["teacher"] >= 97
    expected = figures(python_distillation[0])
    assert accuracy == pytest.approx(expected, abs=1.0), (accuracy, expected)


def example(name: str, picture: Path, *options: str) -> str:
    """The output of the Python example in its short form, which must have drawn its picture."""
    output = run(sys.executable, ROOT / f"examples/python/{name}.py", "--quick", "--picture", picture, *options)
    assert picture.read_bytes().startswith(b"\x89PNG")
    return output


def numbers(pattern: str, output: str) -> list[float]:
    """The figures in the line that is the pattern, in which # stands for a number."""
    line = re.escape(pattern).replace(r"\#", r"([+-]?\d+\.?\d*)")
    return [float(number) for number in re.search(f"^{line}$", output, re.M).groups()]


def check_vae(output: str) -> None:
    pattern = "vae: negative ELBO of the test images # nats, KL #, without a latent #"
    loss, kl, baseline = numbers(pattern, output)
    assert loss <= baseline - 1.5
    assert kl > 1  # the latent is used


def test_python_vae(tmp_path):
    check_vae(example("vae", tmp_path / "vae.png"))


def test_cpp_vae(cpp_examples):
    check_vae(run(cpp_examples / "vae", "--quick"))


def check_samples(title: str, output: str) -> None:
    pattern = f"{title}: # of 10 digits, JS of the classes #, distance # (training images #, independent pixels #)"
    found, js, distance, near, far = numbers(pattern, output)
    assert found == 10
    assert 0 < js < 0.05
    assert 0 < near < far
    assert distance < (near + far) / 2


WGAN_LOSSES = ("gradient-penalty", "weight-clipping", "sinkhorn")  # the first is the default


def test_python_gan(tmp_path):
    check_samples("gan", example("gan", tmp_path / "samples.png"))


@pytest.mark.parametrize("loss", WGAN_LOSSES)
def test_python_wgan(loss, tmp_path):
    options = () if loss == WGAN_LOSSES[0] else ("--loss", loss)
    check_samples(f"wgan by {loss}", example("wgan", tmp_path / "samples.png", *options))


def test_cpp_gan(cpp_examples):
    check_samples("gan", run(cpp_examples / "gan", "--quick"))


def test_cpp_wgan(cpp_examples):
    output = run(cpp_examples / "wgan", "--quick")
    for loss in WGAN_LOSSES:
        check_samples(f"wgan by {loss}", output)


def test_python_domain_alignment(tmp_path):
    pattern = "domain alignment: target # % before, # % after, gain # points, 95 % interval [#, #], 5 seeds"
    before, after, gain, low, high = numbers(pattern, example("domain_alignment", tmp_path / "features.png"))
    assert 0 < low < gain < high
    assert gain == pytest.approx(after - before, abs=0.011)


@pytest.mark.parametrize("algorithm", ("trpo", "ppo"))
def test_python_policy_optimization(algorithm):
    output = run(sys.executable, ROOT / "examples/python/policy_optimization.py", "--algorithm", algorithm)
    check_policy(algorithm, output)


def check_policy(algorithm: str, output: str) -> None:
    score, kl = numbers(f"{algorithm}: mean return # over 100 episodes, largest KL #", output)
    assert score >= 475 and kl > 0
    assert algorithm == "ppo" or kl <= 0.01


def test_cpp_policy_optimization(cpp_examples):
    output = run(cpp_examples / "policy_optimization", "--quick")
    for algorithm in ("trpo", "ppo"):
        check_policy(algorithm, output)


def test_cpp_comparison(cpp_examples):
    """The rows hold, and are those that Python computes."""
    assert table(run(cpp_examples / "comparison")) == table(run(sys.executable, "-m", "torch_divergence"))


def table(output: str) -> list[str]:
    """The lines of the table that say whether a claim holds."""
    lines = re.findall(r"^.* holds$", output, re.M)
    assert len(lines) == 7
    return lines


def test_benchmark():
    """One round on one small shape: every contender runs, and what is timed computes the right gradient."""
    contenders = ["copy_", "td", "td, in place", "eager"]
    config = {"cases": [[128, 1024, "float32"]], "contenders": contenders, "rounds": 1, "all_gradients": True}
    result = json.loads(run(sys.executable, ROOT / "benchmarks/kl_div.py", "--worker", json.dumps(config)))
    (times,), (errors,) = result["times"], result["errors"]
    assert len(times) == 1 + 3 * 4
    assert min(times.values()) > 0
    assert len(errors) == 3 * 4
    assert max(errors.values()) < 1e-4


@pytest.mark.parametrize("name, losses", (("divergences", 7), ("sinkhorn", 2)))
def test_benchmarks_of_other_losses(name, losses, tmp_path):
    """Each program on tiny inputs: it stops where a contender's value or gradient is wrong."""
    output = run(sys.executable, ROOT / f"benchmarks/{name}.py", "--quick", "--output", tmp_path)
    errors = re.findall(r"^(?!\|).*of the gradient (\S+)$|^.*largest relative error (\S+)$", output, re.M)
    assert len(errors) == losses
    assert max(float(error or other) for error, other in errors) < 1e-4
    assert "| td |" in (tmp_path / f"RESULTS_{name.upper()}.md").read_text()
    assert (tmp_path / f"{name}_speed.png").read_bytes().startswith(b"\x89PNG")


def test_gradient_flow(tmp_path):
    picture = tmp_path / "flow.png"
    output = run(sys.executable, ROOT / "examples/python/gradient_flow.py", "--quick", "--picture", picture)
    first, last = map(float, re.search(r"^divergence (\S+) -> (\S+): \S+ % is left$", output, re.M).groups())
    assert 0 < last < 0.001 * first
    arrived, shrunk = map(
        float, re.search(r"^W2 to the target \S+ -> (\S+), with OT_eps (\S+),", output, re.M).groups()
    )
    assert shrunk > 3 * arrived > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_colour_transfer(tmp_path):
    picture = tmp_path / "colours.png"
    output = run(sys.executable, ROOT / "examples/python/colour_transfer.py", "--quick", "--picture", picture)
    before, after = map(float, re.search(r"^divergence of the colours (\S+) -> (\S+): ", output, re.M).groups())
    assert 0 < 20 * after < before
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_colour_transfer_of_ones_own_photographs(tmp_path):
    """Of a ramp of red and green, and of the same at a third of its light."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    ramp = torch.linspace(0, 1, 64)
    photograph = torch.stack((ramp.expand(64, 64), ramp.expand(64, 64).T, torch.full((64, 64), 0.5)), -1)
    for name, image in (("a.png", photograph), ("b.png", photograph / 3)):
        pyplot.imsave(tmp_path / name, image.numpy())
    files = tmp_path / "a.png", tmp_path / "b.png"
    picture = tmp_path / "own.png"
    output = run(sys.executable, ROOT / "examples/python/colour_transfer.py", *files, "--quick", "--picture", picture)
    before, after = map(float, re.search(r"^divergence of the colours (\S+) -> (\S+): ", output, re.M).groups())
    assert 0 < 20 * after < before
