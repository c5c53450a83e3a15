"""Time of entropic optimal transport between point clouds, against PyTorch and POT. README.md states the rules.

python benchmarks/sinkhorn.py           prints the tables, writes RESULTS_SINKHORN.md and the picture
python benchmarks/sinkhorn.py --quick   tiny clouds in seconds: checks every contender's values
"""

import importlib
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch_divergence as td
from common import (
    OURS,
    THREADS,
    Clock,
    Contender,
    Figures,
    arguments,
    heading,
    machine,
    measure_in_turns,
    table,
    write,
)
from torch import Tensor

BLUR = 0.1  # of clouds in the unit cube
EPS = BLUR**2
TOL = 1e-2
BATCH_ITERATIONS = 20
LOOP_SAMPLE = 32  # problems of a batch that the loop over single calls solves
MATVECS, DENSE, POT, GEOMLOSS, OTT = "two mat-vecs", "dense torch", "POT", "geomloss", "OTT-JAX"
ENVELOPE, UNROLLED, LOOP = "dense torch", "dense torch, unrolled", "loop over td"


class Sizes(NamedTuple):
    pairs: int  # points of a cloud where the rate is measured
    iteration: int  # points where one iteration is compared, and the whole divergence
    peers: int  # points where POT and OTT iterate
    dense: int  # points of the dense divergence that is extrapolated
    unrolled: int
    batches: tuple[tuple[int, int], ...]  # problems, points of a cloud
    sweep: tuple[int, ...]
    dense_limit: int  # the largest dense one of the sweep
    rounds: int


FULL = Sizes(
    pairs=5000,
    iteration=10000,
    peers=4000,
    dense=2000,
    unrolled=1000,
    batches=((4096, 4), (1024, 64), (256, 256)),
    sweep=(300, 1000, 3000, 10000, 30000, 100000),
    dense_limit=10000,
    rounds=5,
)
QUICK = Sizes(
    pairs=100,
    iteration=200,
    peers=100,
    dense=100,
    unrolled=50,
    batches=((64, 4), (8, 64), (2, 256)),
    sweep=(50, 100),
    dense_limit=50,
    rounds=1,
)


class Call:
    """A contender of some number of threads, which prepare() sets."""

    def __init__(self, function: Callable[[], object], threads: int = THREADS):
        self.function, self.threads = function, threads

    def prepare(self) -> None:
        torch.set_num_threads(self.threads)

    def __call__(self) -> None:
        self.function()

    def release(self) -> None:
        torch.set_num_threads(THREADS)


def clouds(points: int, dimension: int = 3, batch: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.rand(*batch, points, dimension), torch.rand(*batch, points, dimension)


# --- peers ------------------------------------------------------------------------------------------------------------


def importable(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def dense_cost(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y).square() / 2


def dense_update(potential: Tensor, cost: Tensor, dim: int) -> Tensor:
    """The soft minimum over dim of cost - potential under uniform weights, in the log domain; batches of problems too.

    From the potential of x (dim -2) that of y, and the other way round (dim -1).
    """
    other = -1 if dim == -2 else -2
    return -EPS * (torch.logsumexp((potential.unsqueeze(other) - cost) / EPS, dim) - math.log(cost.shape[dim]))


def dense_sinkhorn(cost: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    f = g = torch.zeros_like(cost[..., 0])
    for _ in range(iterations):
        g = dense_update(f, cost, -2)
        f = dense_update(g, cost, -1)
    return f, g


def dense_solve(cost: Tensor, tol: float, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Until the L1 marginal error is at most tol, which the next update of g tells.

    Where both clouds are the same the one potential is the mean of itself and its update, which converges at once
    (Feydy et al., 2019).
    """
    f = g = torch.zeros_like(cost[..., 0])
    for _ in range(1000):
        next_g = dense_update(f, cost, -2)
        # The column sums of the plan of (f, g), in units of the weights.
        if ((g - next_g) / EPS).exp().sub(1).abs().mean() <= tol:
            return f, g
        if symmetric:
            f = g = (f + next_g) / 2
        else:
            g = next_g
            f = dense_update(g, cost, -1)
    raise RuntimeError(f"the dense iteration has not reached {tol}")


def dense_divergence(x: Tensor, y: Tensor, tol: float, unrolled: bool) -> Tensor:
    """The debiased divergence by autograd: of the dual at fixed potentials (envelope theorem), or of all updates."""
    value = x.new_zeros(())
    for left, right, factor in ((x, y, 1.0), (x, x, -0.5), (y, y, -0.5)):
        cost = dense_cost(left, right) if left is not right else ((left[:, None] - right).square().sum(-1) / 2)
        with torch.set_grad_enabled(unrolled and cost.requires_grad):
            f, g = dense_solve(cost, tol, symmetric=left is right)
        mass = ((f[:, None] + g - cost) / EPS).exp().mean()
        value = value + factor * (f.mean() + g.mean() - EPS * (mass - 1))
    return value


def pot_iterations(ot: ModuleType, cost: Tensor, iterations: int) -> Tensor:
    weights = cost.new_full(cost.shape[:1], 1 / len(cost))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that it has not converged
        return ot.sinkhorn(weights, weights, cost, EPS, method="sinkhorn_log", numItermax=iterations, stopThr=0.0)


def ott_iterations(ott: ModuleType, x: Tensor, y: Tensor, iterations: int) -> None:
    """Point clouds in batches of 1024, so that no matrix is stored."""
    import jax.numpy as jnp
    from ott.geometry import pointcloud
    from ott.solvers import linear

    geometry = pointcloud.PointCloud(jnp.asarray(x.numpy()), jnp.asarray(y.numpy()), epsilon=2 * EPS, batch_size=1024)
    solved = linear.solve(geometry, max_iterations=iterations, min_iterations=iterations, threshold=0.0)
    solved.f.block_until_ready()


# --- measurements -----------------------------------------------------------------------------------------------------


def iterate(x: Tensor, y: Tensor, iterations: int) -> Tensor:
    return td.sinkhorn(x, y, blur=BLUR, tol=0.0, max_iter=iterations).value


def one_iteration(
    calls: dict[str, Callable[[int], object]],
    few: int,
    many: int,
    rounds: int,
    threads: dict[str, int] | None = None,
    warm_steps: int = 1,
) -> Figures:
    """Seconds of an iteration: the difference of two numbers of them, so that set-up and the last check cancel."""
    contenders: dict[str, Contender] = {}
    for name, call in calls.items():
        for n in (few, many):
            contenders[f"{name}/{n}"] = Call(lambda call=call, n=n: call(n), (threads or {}).get(name, THREADS))
    medians = measure_in_turns(contenders, rounds, warm_steps=warm_steps)
    return {name: (medians[f"{name}/{many}"] - medians[f"{name}/{few}"]) / (many - few) for name in calls}


def pair_rates(sizes: Sizes) -> dict[int, Figures]:
    """Pairs visited in a second, in 1e9, by the number of threads; an iteration visits each pair twice."""
    rates = {}
    for dimension in (2, 3, 16, 64):
        x, y = clouds(sizes.pairs, dimension)
        # The distances grow with the dimension: the same x blur keeps the kernel's range the same.
        scale = (3 / dimension) ** 0.5
        x, y = x * scale, y * scale
        calls = {str(threads): lambda n, x=x, y=y: iterate(x, y, n) for threads in (1, THREADS)}
        seconds = one_iteration(calls, 2, 6, sizes.rounds, {"1": 1})
        rates[dimension] = {name: 2e-9 * sizes.pairs**2 / time for name, time in seconds.items()}
    return rates


def matvecs(kernel: Tensor) -> Callable[[int], object]:
    vector = torch.full_like(kernel[0], 1 / len(kernel))

    def run(iterations: int) -> None:
        for _ in range(iterations):
            torch.mv(kernel.T, torch.mv(kernel, vector))

    return run


def iterations_compared(sizes: Sizes) -> tuple[Figures, dict[str, int]]:
    """Seconds of one full iteration, and the points at which it was measured."""
    x, y = clouds(sizes.iteration)
    cost = dense_cost(x, y)
    kernel = (cost / -EPS).exp()
    calls = {
        OURS: lambda n: iterate(x, y, n),
        MATVECS: matvecs(kernel),
        DENSE: lambda n: dense_sinkhorn(cost, n),
    }
    seconds = one_iteration(calls, 1, 3, min(sizes.rounds, 3))
    del kernel
    points = dict.fromkeys(seconds, sizes.iteration)

    x, y = clouds(sizes.peers)
    cost = dense_cost(x, y)
    peers: dict[str, Callable[[int], object]] = {}
    if (ot := importable("ot")) is not None:
        peers[POT] = lambda n: pot_iterations(ot, cost, n)
    if (ott := importable("ott")) is not None:
        peers[OTT] = lambda n: ott_iterations(ott, x, y, n)
    if peers:
        # POT looks at its error in the first of ten iterations: both numbers include that once.
        factor = (sizes.iteration / sizes.peers) ** 2
        small = one_iteration(peers, 1, 3, min(sizes.rounds, 3))
        seconds |= {name: factor * time for name, time in small.items()}
        points |= dict.fromkeys(peers, sizes.peers)
    return seconds, points


def backward(divergence: Callable[[Tensor, Tensor], Tensor], points: int) -> Callable[[], None]:
    x, y = clouds(points)
    x.requires_grad_()

    def run() -> None:
        x.grad = None
        divergence(x, y).backward()

    return run


def our_divergence(x: Tensor, y: Tensor) -> Tensor:
    return td.sinkhorn_divergence(x, y, blur=BLUR, tol=TOL)


def divergences(sizes: Sizes) -> tuple[Figures, dict[str, int], float]:
    """Seconds of forward and backward, extrapolated by pairs from the points given; the marginal error of ours."""
    with torch.no_grad():
        _, info = td.sinkhorn_divergence(*clouds(sizes.iteration), blur=BLUR, tol=TOL, return_info=True)
    reached = info.marginal_error.item()
    points = {OURS: sizes.iteration, ENVELOPE: sizes.dense, UNROLLED: sizes.unrolled}
    calls = {
        OURS: our_divergence,
        ENVELOPE: lambda x, y: dense_divergence(x, y, reached, False),
        UNROLLED: lambda x, y: dense_divergence(x, y, reached, True),
    }
    if (geomloss := importable("geomloss")) is not None:
        loss = geomloss.SamplesLoss("sinkhorn", p=2, blur=BLUR, backend="tensorized")
        points[GEOMLOSS], calls[GEOMLOSS] = sizes.dense, loss
    contenders: dict[str, Contender] = {name: Call(backward(call, points[name])) for name, call in calls.items()}
    medians = measure_in_turns(contenders, min(sizes.rounds, 3), warm_steps=1)
    return {name: time * (sizes.iteration / points[name]) ** 2 for name, time in medians.items()}, points, reached


def batches(sizes: Sizes) -> dict[tuple[int, int], Figures]:
    """Seconds of forward; the loop's extrapolated from LOOP_SAMPLE problems."""
    times = {}
    for problems, points in sizes.batches:
        x, y = clouds(points, batch=(problems,))
        sample = min(problems, LOOP_SAMPLE)

        def loop(x: Tensor = x, y: Tensor = y, sample: int = sample) -> None:
            for k in range(sample):
                iterate(x[k], y[k], BATCH_ITERATIONS)

        contenders: dict[str, Contender] = {
            OURS: Call(lambda x=x, y=y: iterate(x, y, BATCH_ITERATIONS)),
            LOOP: Call(loop),
            DENSE: Call(lambda x=x, y=y: dense_sinkhorn(dense_cost(x, y), BATCH_ITERATIONS)),
        }
        times[problems, points] = measure_in_turns(contenders, min(sizes.rounds, 3), warm_steps=1)
        times[problems, points][LOOP] *= problems / sample
    return times


def sweep(sizes: Sizes) -> dict[int, Figures]:
    """Seconds of an iteration for each number of points; one round without warm steps where that takes seconds."""
    times = {}
    for points in sizes.sweep:
        print(f"    {points} points", file=sys.stderr, flush=True)
        x, y = clouds(points)
        calls: dict[str, Callable[[int], object]] = {OURS: lambda n, x=x, y=y: iterate(x, y, n)}
        if points <= sizes.dense_limit:
            cost = dense_cost(x, y)
            calls[DENSE] = lambda n, cost=cost: dense_sinkhorn(cost, n)
            calls[MATVECS] = matvecs((cost / -EPS).exp())
        large = points > 10000
        few, many = (1, 2) if large else (2, 4)
        times[points] = one_iteration(calls, few, many, 1 if large else min(sizes.rounds, 3), warm_steps=int(not large))
    return times


# --- values -----------------------------------------------------------------------------------------------------------


def check() -> None:
    """Every contender computes the same: values and gradients against the dense textbook iteration in float64."""
    torch.set_num_threads(1)  # too small for more
    x, y = (cloud.double() for cloud in clouds(40))
    cost = dense_cost(x, y)
    f, g = dense_solve(cost, 1e-11)
    expected = f.mean() + g.mean()
    value = td.sinkhorn(x, y, blur=BLUR, tol=1e-9, max_iter=5000).value
    print(f"sinkhorn: relative error {((value - expected) / expected).abs().item():.1e}")
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)

    batched_f, batched_g = dense_sinkhorn(cost.expand(3, 40, 40), 300)
    f, g = dense_sinkhorn(cost, 300)
    torch.testing.assert_close(batched_f + batched_g, (f + g).expand(3, 40))
    if (ot := importable("ot")) is not None:
        plan = pot_iterations(ot, cost.float(), 300)
        ours = ((f[:, None] + g - cost) / EPS).exp() / 1600
        torch.testing.assert_close(plan.double(), ours, rtol=1e-3, atol=1e-8)

    results = {}
    for name, divergence in (
        (OURS, lambda x, y: td.sinkhorn_divergence(x, y, blur=BLUR, tol=1e-9, max_iter=5000)),
        (ENVELOPE, lambda x, y: dense_divergence(x, y, 1e-8, False)),
        (UNROLLED, lambda x, y: dense_divergence(x, y, 1e-8, True)),
    ):
        leaf = x.clone().requires_grad_()
        value = divergence(leaf, y)
        value.backward()
        results[name] = value.detach(), leaf.grad
    for name in (ENVELOPE, UNROLLED):
        errors = []
        for ours, dense in zip(results[OURS], results[name], strict=True):
            errors.append(((ours - dense).abs().max() / dense.abs().max()).item())
        print(f"sinkhorn_divergence against {name}: relative errors {errors[0]:.1e}, of the gradient {errors[1]:.1e}")
        assert max(errors) < 1e-5, errors


# --- the report -------------------------------------------------------------------------------------------------------


def draw(times: dict[int, Figures], picture: Path, subtitle: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    for name, label, color, marker in (
        (DENSE, "PyTorch, dense log-domain", "tab:red", "s"),
        (MATVECS, "two mat-vecs with the kernel in memory", "tab:green", "^"),
        (OURS, "torch_divergence.sinkhorn", "tab:blue", "o"),
    ):
        measured = [(points, figures[name]) for points, figures in times.items() if name in figures]
        axes.plot(*zip(*measured, strict=True), color=color, marker=marker, label=label)
    axes.set(
        xscale="log", yscale="log", xlabel="points of either cloud (dimension 3, float32)", ylabel="s an iteration"
    )
    axes.set_title(f"One Sinkhorn iteration (both potentials)\n{subtitle}", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)


def versions() -> tuple[list[str], list[str]]:
    """Of the peers: name and version of those that can be imported, and the names of the others."""
    found, missing = [], []
    for name, module in ((POT, "ot"), (GEOMLOSS, "geomloss"), (OTT, "ott")):
        imported = importable(module)
        if imported is None:
            missing.append(name)
        else:
            found.append(f"{name} {getattr(imported, '__version__', '')}".strip())
    return found, missing


def compared(seconds: Figures, points: dict[str, int], full: int) -> list[list[str]]:
    rows = []
    for name, time in seconds.items():
        note = "" if points[name] == full else f", extrapolated by pairs from {points[name]} points"
        rows.append([f"{name}{note}", f"{1e3 * time:.1f}", f"{time / seconds[OURS]:.2f}"])
    return rows


def report(sizes: Sizes, results: Path, picture: Path) -> None:
    clock = Clock()

    def progress(title: str) -> None:
        print(f"  {clock.seconds():4.0f} s  {title}", file=sys.stderr, flush=True)

    progress("pair rates")
    rates = pair_rates(sizes)
    progress("one iteration")
    iterations, iteration_points = iterations_compared(sizes)
    progress("divergence")
    whole, whole_points, reached = divergences(sizes)
    progress("batches")
    batched = batches(sizes)
    progress("points")
    by_points = sweep(sizes)
    others = clock.other_programs()

    capability = td._C.cpu_capability()
    draw(by_points, picture, machine(capability))
    found, missing = versions()
    n = sizes.iteration
    lines = [
        *heading("Entropic optimal transport between point clouds", "sinkhorn.py", capability, others, *found),
        f"float32, points uniform in the unit cube, cost |x - y|^2/2, blur {BLUR:g}, uniform weights. An iteration",
        "updates both potentials: it visits every pair twice. Its time is the difference of two numbers of iterations.",
        *([f"Not importable here, so not compared: {', '.join(missing)}."] * bool(missing)),
        "",
        f"## Pairs visited in a second, {sizes.pairs} points a cloud",
        "",
        "1e9 pairs a second.",
        "",
        *table(
            ["dimension", "one core", f"{THREADS} cores"],
            [[str(d), f"{rate['1']:.2f}", f"{rate[str(THREADS)]:.2f}"] for d, rate in rates.items()],
        ),
        "",
        f"## One iteration, {n} points a cloud, dimension 3",
        "",
        f"`{MATVECS}` are `torch.mv` with the kernel exp(-C/eps), in memory already: not stable for small eps.",
        "",
        *table(["contender", "ms", f"/ {OURS}"], compared(iterations, iteration_points, n)),
        "",
        f"## The divergence, forward and backward, {n} points a cloud",
        "",
        f"Debiased, tol {TOL:g}; `{OURS}` reached the marginal error {reached:.1e}, where the dense iterations stop.",
        f"`{ENVELOPE}` differentiates the dual at fixed potentials, `{UNROLLED.split(', ')[1]}` all iterations.",
        *([f"`{GEOMLOSS}` stops by its own schedule."] * (GEOMLOSS in whole)),
        "",
        *table(["contender", "ms", f"/ {OURS}"], compared(whole, whole_points, n)),
        "",
        f"## Batches, {BATCH_ITERATIONS} iterations, forward, dimension 3",
        "",
        f"Milliseconds. `{LOOP}` is extrapolated from {LOOP_SAMPLE} of the problems.",
        "",
        *table(
            ["batch", OURS, LOOP, DENSE, f"{LOOP} / {OURS}", f"{DENSE} / {OURS}"],
            [
                [f"{problems} of {points}x{points}"]
                + [f"{1e3 * figures[name]:.1f}" for name in (OURS, LOOP, DENSE)]
                + [f"{figures[name] / figures[OURS]:.1f}" for name in (LOOP, DENSE)]
                for (problems, points), figures in batched.items()
            ],
        ),
        "",
        "## One iteration against the number of points",
        "",
        "Milliseconds; one difference of single runs above 10000 points.",
        "",
        *table(
            ["points", OURS, DENSE, MATVECS],
            [
                [str(points)]
                + [f"{1e3 * figures[name]:.2f}" if name in figures else "-" for name in (OURS, DENSE, MATVECS)]
                for points, figures in by_points.items()
            ],
        ),
    ]
    write(lines, results, picture, clock)


def main() -> None:
    quick, results, picture = arguments("Time of entropic optimal transport between point clouds.", "sinkhorn")
    torch.set_num_threads(THREADS)
    warnings.filterwarnings("ignore", message=".*max_iter")  # tol=0 runs to max_iter on purpose
    if quick:
        check()
        torch.set_num_threads(THREADS)
    report(QUICK if quick else FULL, results, picture)


if __name__ == "__main__":
    main()
