"""KL, JS and Wasserstein side by side: the comparison table of the field, computed, and two samples of yours compared.

``python -m torch_divergence`` prints the table; ``python -m torch_divergence a.npy b.npy`` compares two samples.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from torch_divergence import functional as td

LOG_2 = math.log(2.0)


@dataclass(frozen=True)
class Row:
    """One family at one shift: the three divergences of P and Q, and their derivatives by the shift of Q."""

    shift: float
    kl: float
    js: float
    wasserstein: float
    d_kl: float
    d_js: float
    d_wasserstein: float


@dataclass(frozen=True)
class Family:
    """P and a Q that slides away from it."""

    name: str
    rows: list[Row]
    note: str


@dataclass(frozen=True)
class Check:
    """One row of the comparison table: what it says of each divergence, and whether the computation agrees."""

    property: str
    kl: str
    js: str
    wasserstein: str
    holds: bool
    evidence: str


def _derivatives(value: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], shift: float) -> Row:
    x = torch.tensor(shift, dtype=torch.float64, requires_grad=True)
    values = value(x)
    gradients = [torch.autograd.grad(v, x, retain_graph=True)[0].item() for v in values]
    return Row(shift, *(v.item() for v in values), *gradients)


# -- discrete: a bump on a line of bins ------------------------------------------------------------------------------

BINS, WIDTH = 61, 8.0


def bump(centre: Tensor) -> Tensor:
    """Probabilities on the bins 0 ... 60: a smooth bump of half-width 8 around ``centre``, exactly 0 outside of it."""
    position = torch.arange(BINS, dtype=torch.float64)
    height = (1 - ((position - centre) / WIDTH) ** 2).clamp_min(0) ** 3
    return height / height.sum()


def _discrete(shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p, q = bump(torch.tensor(15.0, dtype=torch.float64)), bump(15.0 + shift)
    position = torch.arange(BINS, dtype=torch.float64)
    return (
        td.kl_div(q, p, space="probs"),
        td.js_div(q, p, space="probs"),
        td.wasserstein_1d(position, position, q, p, p=1),
    )


def discrete_family(shifts: list[float] | None = None) -> Family:
    """KL(P || Q), JS(P, Q) and W1(P, Q) of two bumps on a line of bins, Q shifted. Without overlap from shift 16 on.

    >>> from torch_divergence.comparison import discrete_family
    >>> apart = discrete_family([20.0]).rows[0]
    >>> apart.kl, round(apart.js, 4), round(apart.wasserstein, 4), abs(apart.d_js) < 1e-12
    (inf, 0.6931, 20.0, True)
    """
    shifts = [0.0, 0.25, 1.0, 4.0, 8.0, 12.0, 15.0, 16.0, 20.0, 30.0] if shifts is None else shifts
    return Family(
        "discrete: two bumps of 16 bins on a line, Q shifted",
        [_derivatives(_discrete, s) for s in shifts],
        "KL is infinite as soon as a bin has Q = 0 < P: from a shift of one bin on.",
    )


# -- Gaussian --------------------------------------------------------------------------------------------------------


def gaussian_js(shift: Tensor, points: int = 4001) -> Tensor:
    """JS(N(0, 1), N(shift, 1)) by the trapezoidal rule, on a grid that reaches 12 beyond both means.

    For an analytic integrand that vanishes at both ends the rule converges faster than any power of the step; halving
    the step shows its error (see :func:`gaussian_family`).
    """
    low, high = min(0.0, shift.item()) - 12, max(0.0, shift.item()) + 12
    x = torch.linspace(low, high, points, dtype=torch.float64)
    log_p, log_q = -(x**2) / 2, -((x - shift) ** 2) / 2
    # densities times the step are the probabilities of a discrete pair, whose JS is the rule's sum
    step = math.log((high - low) / (points - 1)) - math.log(2 * math.pi) / 2
    return td.js_div(log_q + step, log_p + step, space="log_probs")


def _gaussian(shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    mean = shift.reshape(1)
    # W1 of two Gaussians of one variance is the distance of the means, as is the root of W2^2
    squared = td.gaussian_wasserstein(mean, one, zero, one)
    distance = torch.where(squared > 0, squared, 1).sqrt() * (squared > 0)
    return td.gaussian_kl(zero, zero, mean, zero), gaussian_js(shift), distance


def gaussian_family(shifts: list[float] | None = None) -> Family:
    """KL(P || Q), JS(P, Q) and W(P, Q) of N(0, 1) and N(shift, 1).

    >>> from torch_divergence.comparison import gaussian_family
    >>> row = gaussian_family([3.0]).rows[0]
    >>> round(row.kl, 10), round(row.wasserstein, 10)
    (4.5, 3.0)
    """
    shifts = [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0] if shifts is None else shifts
    rows = [_derivatives(_gaussian, s) for s in shifts]
    error = max(
        abs(row.js - gaussian_js(torch.tensor(row.shift, dtype=torch.float64), points=8001).item()) for row in rows
    )
    return Family(
        "Gaussian: N(0, 1) and N(shift, 1)",
        rows,
        f"JS by quadrature; halving the step changes it by at most {error:.1e}.",
    )


# -- the table -------------------------------------------------------------------------------------------------------


def _random_distributions(count: int, size: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, size, dtype=torch.float64, generator=generator).mul(2).softmax(-1)


def checks(discrete: Family, gaussian: Family) -> list[Check]:
    """Every row of the comparison table, checked on the two families and on random distributions."""
    families = (discrete, gaussian)
    rows = [row for family in families for row in family.rows]
    result = []

    values = [v for row in rows for v in (row.kl, row.js, row.wasserstein)]
    result.append(
        Check(
            "never negative",
            "yes",
            "yes",
            "yes",
            min(values) >= 0,
            f"the least of {len(values)} values is {min(values):.1g}",
        )
    )

    at_zero = [v for row in rows if row.shift == 0 for v in (row.kl, row.js, row.wasserstein)]
    apart = [v for row in rows if row.shift != 0 for v in (row.kl, row.js, row.wasserstein)]
    result.append(
        Check(
            "zero only for P = Q",
            "yes",
            "yes",
            "yes",
            max(at_zero) < 1e-15 and min(apart) > 1e-4,
            f"at most {max(at_zero):.1g} at shift 0, at least {min(apart):.2g} elsewhere",
        )
    )

    p, q = _random_distributions(200).chunk(2)
    position = torch.arange(6, dtype=torch.float64).expand(100, 6)
    pairs: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "kl": lambda a, b: td.kl_div(b, a, space="probs", reduction="none"),
        "js": lambda a, b: td.js_div(b, a, space="probs", reduction="none"),
        "w": lambda a, b: td.wasserstein_1d(position, position, a, b, p=1),
    }
    asymmetry = {name: (f(p, q) - f(q, p)).abs().max().item() for name, f in pairs.items()}
    result.append(
        Check(
            "symmetric",
            "no",
            "yes",
            "yes",
            asymmetry["kl"] > 0.1 and asymmetry["js"] < 1e-14 and asymmetry["w"] < 1e-14,
            f"|D(P, Q) - D(Q, P)| up to {asymmetry['kl']:.2g}, {asymmetry['js']:.0e}, {asymmetry['w']:.0e}",
        )
    )

    disjoint = [row for row in discrete.rows if row.shift >= 2 * WIDTH]
    result.append(
        Check(
            "where Q = 0 < P",
            "infinite",
            "finite",
            "finite",
            all(row.kl == math.inf and math.isfinite(row.js) and math.isfinite(row.wasserstein) for row in disjoint),
            f"at {len(disjoint)} shifts without overlap",
        )
    )

    largest = max(row.js for row in rows)
    result.append(
        Check(
            "bounded",
            "no",
            "by log 2",
            "no",
            largest <= LOG_2 * (1 + 1e-15) and abs(largest - LOG_2) < 1e-12 and gaussian.rows[-1].kl > 100,
            f"JS at most log 2 {largest - LOG_2:+.0e}, "
            f"KL {gaussian.rows[-1].kl:g}, W {gaussian.rows[-1].wasserstein:g}",
        )
    )

    far = [disjoint[-1], gaussian.rows[-1]]
    result.append(
        Check(
            "gradient without overlap",
            "none, or grows",
            "vanishes",
            "stays",
            all(abs(row.d_js) < 1e-12 and abs(row.d_wasserstein - 1) < 1e-3 for row in far)
            and gaussian.rows[-1].d_kl > 10,
            f"JS' {max(abs(row.d_js) for row in far):.0e}, "
            f"W' {far[0].d_wasserstein:.6f} and {far[1].d_wasserstein:.6f}, "
            f"KL' of the Gaussians {gaussian.rows[-1].d_kl:g}",
        )
    )

    a, b, c = _random_distributions(300).chunk(3)
    slack = {name: (f(a, b) + f(b, c) - f(a, c)).min().item() for name, f in pairs.items()}
    result.append(
        Check(
            "triangle inequality",
            "no",
            "no (its root: yes)",
            "yes",
            slack["kl"] < 0
            and slack["w"] >= -1e-14
            and (pairs["js"](a, b).sqrt() + pairs["js"](b, c).sqrt() - pairs["js"](a, c).sqrt()).min().item() >= -1e-14,
            "D(A, B) + D(B, C) - D(A, C) of 100 triples: at least "
            f"{slack['kl']:.2g}, {slack['js']:.2g}, {slack['w']:.2g}",
        )
    )
    return result


def _number(x: float) -> str:
    return f"{x:.6g}" if math.isfinite(x) else str(x)


def format_table(header: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> str:
    """Columns of text, the first aligned to the left."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]

    def layout(line: tuple[str, ...]) -> str:
        return "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()

    return "\n".join([layout(header), "  ".join("-" * width for width in widths), *map(layout, lines)])


def format_family(family: Family) -> str:
    """The family's table, as printed on the terminal."""
    header = ("shift", "KL(P||Q)", "JS", "W1", "dKL", "dJS", "dW1")
    lines = [
        tuple(map(_number, (r.shift, r.kl, r.js, r.wasserstein, r.d_kl, r.d_js, r.d_wasserstein))) for r in family.rows
    ]
    return f"{family.name}\n\n{format_table(header, lines)}\n\n{family.note}"


def draw(families: tuple[Family, ...], path: Path) -> None:
    """Values and derivatives against the shift, as a picture. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(families), figsize=(5 * len(families), 6.5), squeeze=False)
    for column, family in enumerate(families):
        shifts = [row.shift for row in family.rows]
        for name, key, colour in (("KL(P||Q)", "kl", "C3"), ("JS", "js", "C0"), ("W1", "wasserstein", "C2")):
            for line, (prefix, title) in enumerate((("", "value"), ("d_", "derivative by the shift"))):
                values = [getattr(row, prefix + key) for row in family.rows]
                shown = [v if math.isfinite(v) else math.nan for v in values]
                axes[line][column].plot(shifts, shown, "o-", color=colour, markersize=3, label=name)
                axes[line][column].set_ylabel(title)
                axes[line][column].set_yscale("symlog", linthresh=0.1)
        axes[0][column].set_title(family.name, fontsize=9)
        axes[0][column].axhline(LOG_2, color="C0", linewidth=0.5, linestyle=":")
        axes[1][column].set_xlabel("shift")
        axes[0][column].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


# -- samples ---------------------------------------------------------------------------------------------------------


def load_sample(path: Path) -> Tensor:
    """A sample (N, D) from a .npy, .csv or .pt file of N numbers or N rows of D numbers.

    Raises:
        ValueError: naming the file, what is in it and what was expected.
    """
    if not path.exists():
        raise ValueError(f"{path}: there is no such file")
    try:
        if path.suffix == ".pt":
            data = torch.load(path, weights_only=True)
            if not isinstance(data, Tensor):
                raise ValueError(f"holds a {type(data).__name__}, expected a tensor")
        elif path.suffix == ".npy":
            import numpy

            data = torch.from_numpy(numpy.load(path, allow_pickle=False))
        elif path.suffix == ".csv":
            lines = [line for line in path.read_text().splitlines() if line.strip()]
            data = torch.tensor([[float(cell) for cell in line.split(",")] for line in lines[_header(lines) :]])
        else:
            raise ValueError(f"has the suffix {path.suffix!r}, expected .npy, .csv or .pt")
        if data.is_complex():
            raise ValueError("holds complex numbers, expected real ones")
        data = data.double()
    except (ValueError, TypeError, OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise ValueError(f"{path}: {error}") from None
    if data.dim() == 1:
        data = data.unsqueeze(-1)
    if data.dim() != 2 or data.numel() == 0:
        raise ValueError(f"{path}: holds an array of shape {tuple(data.shape)}, expected (N,) or (N, D) with N, D >= 1")
    if not data.isfinite().all():
        raise ValueError(f"{path}: holds {int((~data.isfinite()).sum())} values that are not finite")
    return data


def _header(lines: list[str]) -> int:
    """1 if the first line of a .csv names its columns, else 0."""
    try:
        [float(cell) for cell in lines[0].split(",")] if lines else None
    except ValueError:
        return 1
    return 0


def compare_samples(x: Tensor, y: Tensor) -> list[tuple[str, float, str]]:
    """The divergences that apply to two samples (N, D) and (M, D): name, value, and what it means.

    >>> import torch
    >>> from torch_divergence.comparison import compare_samples
    >>> x = torch.arange(100.0).unsqueeze(-1)
    >>> names = [name for name, value, meaning in compare_samples(x, x + 5)]
    >>> names[0]
    'W1, exact'
    >>> round(compare_samples(x, x + 5)[0][1], 6)
    5.0
    """
    if x.dim() != 2 or y.dim() != 2 or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"the samples have shapes {tuple(x.shape)} and {tuple(y.shape)}, expected (N, D) and (M, D) with one D"
        )
    x, y = x.double(), y.double()
    dims = x.shape[1]
    result: list[tuple[str, float, str]] = []
    if dims == 1:
        w1 = td.wasserstein_1d(x[:, 0], y[:, 0], p=1).item()
        result.append(("W1, exact", w1, "the mean distance that mass has to travel, in the data's own unit"))
        w2 = math.sqrt(td.wasserstein_1d(x[:, 0], y[:, 0], p=2).item())
        result.append(("W2, exact", w2, "the same with squared distances: large moves weigh more"))
    else:
        if max(len(x), len(y)) <= 1000:
            result.append(("W1, exact", td.wasserstein(x, y, p=1).item(), "the mean distance that mass has to travel"))
        generator = torch.Generator().manual_seed(0)
        sliced = td.sliced_wasserstein(x, y, p=2, n_projections=256, generator=generator).item()
        result.append(("sliced W2", math.sqrt(sliced), "W2 of random projections, averaged: cheap in any dimension"))
        if len(x) * len(y) <= 10**8:
            blur = 0.05 * torch.cat((x, y)).std(0).norm().item() or 1.0
            smoothed = td.sinkhorn_divergence(x, y, cost="half_sqeuclidean", blur=blur, tol=1e-6).item()
            result.append(
                ("Sinkhorn", smoothed, f"W2^2 / 2 smoothed at the scale {blur:.3g}, debiased: 0 for equal samples")
            )
    if min(len(x), len(y)) > dims:
        (m1, c1), (m2, c2) = ((t.mean(0), torch.cov(t.T).reshape(dims, dims)) for t in (x, y))
        bures = math.sqrt(max(0.0, td.gaussian_wasserstein(m1, c1, m2, c2).item()))
        result.append(
            ("W2 of the fitted Gaussians", bures, "compares means and covariances only (the Fréchet distance)")
        )
        factors = [torch.linalg.cholesky_ex(c) for c in (c1, c2)]
        if all(info == 0 for _, info in factors):
            l1, l2 = (factor for factor, _ in factors)
            for name, value in (
                ("KL(x || y) of the Gaussians", td.gaussian_kl_full(m1, l1, m2, l2)),
                ("KL(y || x) of the Gaussians", td.gaussian_kl_full(m2, l2, m1, l1)),
            ):
                result.append((name, value.item(), "in nats; grows without bound as the samples part"))
    if dims == 1:
        p, q, what = _histograms(x[:, 0], y[:, 0])
        result.append(("JS of histograms", td.js_div(q, p, space="probs").item(), f"in nats, at most log 2; {what}"))
        result.append(
            ("KL(x || y) of histograms", td.kl_div(q, p, space="probs").item(), "inf where x has mass and y has none")
        )
    return result


def _histograms(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, str]:
    both = torch.cat((x, y))
    if (both == both.round()).all() and both.max() - both.min() < 1000:
        low, bins, what = both.min(), int(both.max() - both.min()) + 1, "one bin for each integer"
        width = torch.ones((), dtype=x.dtype)
    else:
        bins = max(1, min(100, round(2 * min(len(x), len(y)) ** (1 / 3))))
        low, what = both.min(), f"{bins} equal bins, and depends on them"
        width = ((both.max() - low) / bins).clamp_min(torch.finfo(x.dtype).tiny)
    counts = [
        torch.bincount(((t - low) / width).floor().long().clamp(0, bins - 1), minlength=bins).double() for t in (x, y)
    ]
    return counts[0] / len(x), counts[1] / len(y), what
