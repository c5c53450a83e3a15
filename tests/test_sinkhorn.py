"""Entropic optimal transport: reference cases, closed forms, invariants, gradients, transforms, errors."""

import json
import math
import pathlib
import re
import warnings
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch_divergence as td
from torch.autograd import gradcheck, gradgradcheck

COSTS = ("half_sqeuclidean", "sqeuclidean", "euclidean", "cosine")
PATH = pathlib.Path(__file__).parent / "reference" / "ot_cases.json"
CASES = [c for c in json.loads(PATH.read_text())["cases"] if c["kind"] in ("ot_eps", "sinkhorn_divergence", "hvp")]
F64 = torch.float64
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


@pytest.fixture(autouse=True)
def no_convergence_warning():
    """It is given once a process: the tests of counters look at ``converged``."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="sinkhorn: a problem has not reached tol")
        yield


def drawn(draw, *shape, generator, dtype=F64):
    """The same numbers on every device."""
    return draw(*shape, dtype=dtype, generator=generator, device="cpu").to(torch.get_default_device())


def clouds(n=5, m=6, d=3, *, batch=(), dtype=F64, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    x = drawn(torch.randn, *batch, n, d, generator=generator)
    y = drawn(torch.randn, *batch, m, d, generator=generator) + 0.3
    return x.to(dtype).requires_grad_(grad), y.to(dtype).requires_grad_(grad)


def weights(n, *, batch=(), seed=0, mass=1.0):
    w = drawn(torch.rand, *batch, n, generator=torch.Generator().manual_seed(seed)) + 0.2
    return mass * w / w.sum(-1, keepdim=True)


def given(case, key):
    value = case.get(key)
    return None if value is None else torch.tensor(value, dtype=F64).requires_grad_()


def cost_of(case):
    return {"sqeuclidean_half": "half_sqeuclidean"}.get(case["cost"], case["cost"])


def uncentred(balanced, t):
    """Balanced gradients of weights are defined up to a constant."""
    return t - t.mean() if balanced else t


# ---- values and gradients by independent solvers


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_reference_cases(case):
    want = {k: torch.tensor(v, dtype=F64) for k, v in case["expected"].items() if k != "grad_C"}
    x, y, a, b, C = (given(case, k) for k in ("x", "y", "a", "b", "C"))
    rho = (case.get("rho_a"), case.get("rho_b"))
    options = {"eps": case["eps"], "rho": rho, "tol": 1e-14}
    if C is not None:
        value, got = td.sinkhorn_cost(C, a, b, **options, return_info=True)
    elif case["kind"] == "sinkhorn_divergence":
        options["rho"] = rho[0]
        value, got = td.sinkhorn_divergence(x, y, a, b, cost=cost_of(case), **options, return_info=True)
    else:
        got = td.sinkhorn(x, y, a, b, cost=cost_of(case), **options)
        value = got.value
    if "value" in want:
        # The translated cloud has atoms alone with their partners: the solver stalls at 2e-9 there, and says so.
        tolerance = 1e-11 if got.converged else 1e-9
        torch.testing.assert_close(value, want["value"], rtol=tolerance, atol=tolerance)
    balanced = rho == (None, None)
    leaves = {"grad_x": x, "grad_y": y, "grad_a": a, "grad_b": b, "plan": C}
    leaves = {k: v for k, v in leaves.items() if v is not None}
    order_1 = dict(
        zip(leaves, torch.autograd.grad(value, list(leaves.values()), create_graph="vHv" in want), strict=True)
    )
    for key in leaves.keys() & want.keys():
        is_weight = balanced and key in ("grad_a", "grad_b")
        close(uncentred(is_weight, order_1[key]), uncentred(is_weight, want[key]))
    for key in {"f", "g"} & want.keys():
        close(getattr(got, key), want[key])
    if isinstance(got, td.SinkhornResult) and "plan" in want:
        close(got.plan(), want["plan"])
        close(got.transport_cost, want["transport_cost"])
        close(got.apply(torch.ones_like(got.g)), want["row_marginal"])
        close(got.apply(torch.ones_like(got.f), transpose=True), want["col_marginal"])
    if "vHv" in want:
        v = torch.tensor(case["vx"], dtype=F64)
        hx, hy, ha, hb = torch.autograd.grad((order_1["grad_x"] * v).sum(), (x, y, a, b))
        close((hx * v).sum(), want["vHv"])
        close(hx, want["Hxx_v"])
        close(hy, want["Hyx_v"])
        close(uncentred(True, ha), uncentred(True, want["Hax_v"]))
        close(uncentred(True, hb), uncentred(True, want["Hbx_v"]))


def dense_solution(C, a, b, eps, ra, rb):
    """Plain alternating updates by logsumexp, from 0, without anything clever."""
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    moved = math.inf
    while not moved < 1e-14:
        before = g
        f = -eps * torch.logsumexp(b.log() + (g - C) / eps, -1) / (1 + eps / ra)
        g = -eps * torch.logsumexp(a.log()[:, None] + (f[:, None] - C) / eps, 0) / (1 + eps / rb)
        moved = (g - before).abs().max()
    plan = a[:, None] * b * ((f[:, None] + g - C) / eps).exp()

    def kl(p, q):
        return (p * (p / q).log() - p + q).sum()

    primal = (plan * C).sum() + eps * kl(plan, a[:, None] * b)
    for rho, p, q in ((ra, plan.sum(1), a), (rb, plan.sum(0), b)):
        if math.isfinite(rho):
            primal = primal + rho * kl(p, q)
    return primal, plan


@pytest.mark.parametrize(
    "d, rho",
    ((1, None), (2, 0.7), (3, (0.7, 2.0)), (3, None), (4, (None, 0.5)), (5, (0.5, None)), (9, 0.7), (33, None)),
    ids=str,
)
def test_against_plain_iterations(d, rho):
    """Every width that the kernels treat apart, and more columns than a tile of theirs."""
    x, y = clouds(7, 300 if d == 3 else 19, d, seed=d)
    a, b = weights(7), weights(y.shape[0], seed=1)
    C = torch.cdist(x, y).square() / 2
    eps = 0.5 * C.mean().item()
    ra, rb = (math.inf if r is None else r for r in (rho if isinstance(rho, tuple) else (rho, rho)))
    primal, plan = dense_solution(C, a, b, eps, ra, rb)
    result = td.sinkhorn(x, y, a, b, eps=eps, rho=rho, tol=1e-13)
    close(result.value, primal)
    close(result.plan(), plan)
    value, info = td.sinkhorn_cost(C, a, b, eps=eps, rho=rho, tol=1e-13, return_info=True)
    close(value, primal)
    close(info.f, result.f)


@pytest.mark.parametrize("cost", COSTS)
def test_costs_agree_with_their_matrix(cost):
    x, y = clouds(40, 50, 3)
    a, b = weights(40), weights(50, seed=1)
    matrix = matrix_of(cost, x, y)
    close(
        td.sinkhorn(x, y, a, b, cost=cost, eps=0.1, tol=1e-12).value,
        td.sinkhorn_cost(matrix, a, b, eps=0.1, tol=1e-12),
    )


# ---- closed forms and invariants


def test_two_points():
    c, eps = torch.tensor(1.3, dtype=F64), 0.4
    C = c * torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=F64)
    close(td.sinkhorn_cost(C, eps=eps, tol=1e-13), -eps * torch.log((1 + torch.exp(-c / eps)) / 2))


@pytest.mark.parametrize("ma, mb, ra, rb", ((1.3, 0.6, 0.5, 2.0), (1.0, 1.0, 3.0, 3.0), (2.0, 0.1, 0.05, 0.05)))
def test_unbalanced_diracs(ma, mb, ra, rb):
    eps, c = 0.3, 0.8
    p = math.exp((eps * math.log(ma * mb) + ra * math.log(ma) + rb * math.log(mb) - c) / (eps + ra + rb))
    want = eps * ma * mb + ra * ma + rb * mb - (eps + ra + rb) * p
    got = td.sinkhorn_cost(
        torch.tensor([[c]], dtype=F64),
        torch.tensor([ma], dtype=F64),
        torch.tensor([mb], dtype=F64),
        eps=eps,
        rho=(ra, rb),
        tol=1e-14,
    )
    close(got, torch.tensor(want, dtype=F64))


def test_gaussians():
    """Janati et al., "Entropic Optimal Transport between Unbalanced Gaussian Measures has a Closed Form", 2020."""
    means, stds, eps = (0.3, -0.8), (1.0, 1.7), 0.6
    grid = torch.linspace(-9, 9, 361, dtype=F64)
    w = (-grid.square() / 2).exp()
    w = w / w.sum()
    x, y = ((m + s * grid)[:, None] for m, s in zip(means, stds, strict=True))
    va, vb = (s * s for s in stds)
    root = math.sqrt(4 * va * vb + eps**2)
    want = (
        (means[0] - means[1]) ** 2 + va + vb - root + eps * (1 - math.log(2 * eps)) + eps * math.log(root + eps)
    ) / 2
    close(td.sinkhorn(x, y, w, w, eps=eps, tol=1e-13).value, torch.tensor(want, dtype=F64))


def test_translation():
    x, _ = clouds(40, 1, 2)
    t = torch.tensor([0.4, -0.7], dtype=F64)
    close(td.sinkhorn_divergence(x, x + t, eps=0.2, tol=1e-11), t.square().sum() / 2)


def test_euler_identity():
    """OT is homogeneous: <x, dx> + <y, dy> + 2 eps deps = 2 OT."""
    x, y = clouds(grad=True)
    eps = torch.tensor(0.3, dtype=F64, requires_grad=True)
    value = td.sinkhorn(x, y, eps=eps, tol=1e-13).value
    dx, dy, deps = torch.autograd.grad(value, (x, y, eps))
    close((x * dx).sum() + (y * dy).sum() + 2 * eps * deps, 2 * value)
    close(dx.sum(0) + dy.sum(0), torch.zeros(3, dtype=F64))


@pytest.mark.parametrize("dtype, tolerance", ((F64, 1e-9), (torch.float32, 2e-6)))
def test_eps_to_infinity(dtype, tolerance):
    x, y = clouds(20, 30, dtype=dtype)
    want = (x.mean(0) - y.mean(0)).square().sum() / 2
    got = td.sinkhorn_divergence(x, y, eps=1e10, tol=1e-10)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_eps_to_zero():
    """Sorted points are matched in order."""
    x, y = clouds(12, 12, 1)
    want = (x.sort(0)[0] - y.sort(0)[0]).square().mean() / 2
    got = td.sinkhorn(x, y, eps=1e-4, tol=1e-6, max_iter=20000).value
    torch.testing.assert_close(got, want, rtol=0, atol=1e-3)
    assert got >= want


@pytest.mark.parametrize("cost", COSTS)
def test_divergence_is_one(cost):
    x, y = clouds(8, 9)
    s = partial(td.sinkhorn_divergence, cost=cost, eps=0.3, tol=1e-11)
    assert s(x, y) > 0
    close(s(x, y), s(y, x))
    assert abs(s(x, x)) < 1e-10


def test_equal_clouds():
    x = drawn(torch.rand, 50, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    value = td.sinkhorn_divergence(x, x.detach().clone(), blur=0.1, tol=1e-9)
    assert abs(value) < 1e-9
    assert torch.autograd.grad(value, x)[0].abs().max() < 1e-6


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("rho", (None, 0.5))
def test_points_without_weight_change_nothing(cost, rho):
    x, y = clouds()
    a = weights(5)
    # Large eps: a point that sees little but itself has a derivative too, which differences see at no step.
    options = {"cost": cost, "eps": 2.0, "rho": rho, "tol": 1e-13}
    added = torch.tensor([[1.5, 0.0, 1.0]], dtype=F64)
    extra = torch.cat((x, added)).requires_grad_()
    a_extra = torch.cat((a, a.new_zeros(1))).requires_grad_()
    value = td.sinkhorn_divergence(extra, y, a_extra, **options)
    close(value, td.sinkhorn_divergence(x, y, a, **options))
    dx, da = torch.autograd.grad(value, (extra, a_extra))
    assert (dx[-1] == 0).all() and dx.isfinite().all() and da.isfinite().all()
    if rho is not None:  # balanced, weight cannot be added on one side
        h = 1e-6
        step = torch.cat((a, a.new_full((1,), h)))
        two = torch.cat((a, a.new_full((1,), 2 * h)))
        f = partial(td.sinkhorn_divergence, extra.detach(), y, **options)
        difference = (-3 * value.detach() + 4 * f(step) - f(two)) / (2 * h)
        torch.testing.assert_close(da[-1], difference, rtol=1e-5, atol=1e-7)


def test_split_point_changes_nothing():
    x, y = clouds()
    a = weights(5)
    split = torch.cat((x, x[:1])), torch.cat((a[:1] / 2, a[1:], a[:1] / 2))
    close(
        td.sinkhorn_divergence(split[0], y, split[1], eps=0.3, tol=1e-12),
        td.sinkhorn_divergence(x, y, a, eps=0.3, tol=1e-12),
    )


@pytest.mark.parametrize("d", (3, 8))
@pytest.mark.parametrize("offset", (0.0, 10.0, 1000.0))
def test_offset_in_float32(offset, d):
    """Coordinates of 2^-10 are exact beside 1000: any difference is the library's."""
    x, y = ((t * 1024).round() / 1024 for t in clouds(30, 40, d))
    want = td.sinkhorn_divergence(x, y, eps=0.3, tol=1e-9)
    got = td.sinkhorn_divergence((x + offset).float(), (y + offset).float(), eps=0.3, tol=1e-5)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("n, m", ((1, 1), (1, 5), (5, 1)))
def test_single_points(n, m):
    x, y = clouds(n, m, grad=True)
    value = td.sinkhorn(x, y, eps=0.1, tol=1e-12).value
    close(value, (torch.cdist(x, y).square() / 2).mean())
    dx, dy = torch.autograd.grad(value, (x, y))
    close(dx, (x - y.mean(0)) / n)
    close(dy, (y - x.mean(0)) / m)


def test_coincident_points_and_zero_vectors():
    x, y = clouds(4, 4, grad=True)
    with torch.no_grad():
        y.copy_(x)
        x[0] = y[0] = 0
    for cost in ("euclidean", "cosine"):
        value = td.sinkhorn_divergence(x, y, cost=cost, eps=0.3, tol=1e-12)
        (dx,) = torch.autograd.grad(value, x, create_graph=True)
        (hx,) = torch.autograd.grad(dx.sum(), x)
        assert dx.isfinite().all() and hx.isfinite().all()
    zero = torch.zeros(1, 3, dtype=F64)
    close(td.sinkhorn(zero, zero, cost="cosine", eps=0.1).value, torch.tensor(1.0, dtype=F64))


@pytest.mark.parametrize("n", (5, 20))
@pytest.mark.parametrize("reach", (None, 0.5))
def test_infinite_coordinates(n, reach):
    """What is nowhere meets nobody: no finite value, and none that passes for a solution."""
    for side in (0, 1):
        for blur in (0.05, 5.0):
            for dtype in (torch.float32, F64):
                points = list(clouds(n, n, dtype=dtype))
                points[side][0, 0] = math.inf
                result = td.sinkhorn(*points, blur=blur, reach=reach)
                assert not result.value.isfinite() and not result.converged
                value, info = td.sinkhorn_divergence(*points, blur=blur, reach=reach, return_info=True)
                assert not value.isfinite() and not info.converged


@pytest.mark.parametrize("n", (5, 20))
@pytest.mark.parametrize("rho", (None, (0.5, 0.7)), ids=str)
@pytest.mark.parametrize("eps", (0.02, 0.3, 20.0))
def test_pairs_that_may_not_meet(n, rho, eps):
    """An infinite cost is the limit of a large one, in every derivative."""
    C = drawn(torch.rand, n, n + 1, generator=torch.Generator().manual_seed(0))
    forbidden = torch.zeros(n, n + 1, dtype=torch.bool)
    forbidden[0, 1] = forbidden[2, :3] = forbidden[4, 0] = True
    far = 50 * max(1, eps)
    a, b = weights(n), weights(n + 1, seed=1)
    v = drawn(torch.randn, n, n + 1, generator=torch.Generator().manual_seed(1))

    def derivatives(infinite, dtype):
        inputs = [torch.where(forbidden, infinite, C), a, b, torch.tensor(eps, dtype=F64)]
        inputs = [t.to(dtype).requires_grad_() for t in inputs]
        value, info = td.sinkhorn_cost(
            *inputs[:3], eps=inputs[3], rho=rho, tol=1e-13 if dtype == F64 else 1e-6, max_iter=5000, return_info=True
        )
        assert info.converged
        first = torch.autograd.grad(value, inputs, create_graph=True)
        second = torch.autograd.grad((first[0] * v.to(dtype)).sum(), inputs)
        balanced = rho is None
        ready = [*first, *second]
        for k in (1, 2, 5, 6):
            ready[k] = uncentred(balanced, ready[k])
        return value, ready

    value, gradients = derivatives(math.inf, F64)
    assert (gradients[0][forbidden] == 0).all() and (gradients[4][forbidden] == 0).all()
    limit, of_limit = derivatives(far, F64)
    close(value, limit, rtol=1e-9, atol=1e-9)
    close(gradients, of_limit, rtol=1e-6, atol=1e-8)
    value32, gradients32 = derivatives(math.inf, torch.float32)
    close(value32.double(), value, rtol=1e-5, atol=1e-5)
    assert all(t.isfinite().all() for t in gradients32)


def test_no_plan_is_allowed():
    """Masses that forbidden pairs keep apart: whatever the potentials grow to, that is no solution."""
    for n in (1, 10):
        a, b = (torch.tensor([s, 1 - s], dtype=F64).repeat_interleave(n) / n for s in (0.3, 0.7))
        C = torch.eye(2, dtype=F64).repeat_interleave(n, 0).repeat_interleave(n, 1)
        C = torch.where(C == 1, torch.rand_like(C), math.inf)
        for dtype in (torch.float32, F64):
            for rho in (None, 1.0):
                value, info = td.sinkhorn_cost(*(t.to(dtype) for t in (C, a, b)), eps=0.1, rho=rho, return_info=True)
                assert bool(info.converged) == (rho is not None)
                assert rho is None or value.isfinite()


def test_costs_far_above_eps_and_points_without_weight():
    """The score of a point of weight 0 is below that of any other, however cold."""
    for dtype, eps in ((torch.float32, 1e-32), (F64, 1e-200)):
        for n in (5, 40):
            x, y = clouds(n, n, dtype=dtype)
            a, b = weights(n).to(dtype), weights(n, seed=1).to(dtype)
            b[3] = 0
            b = b / b.sum()
            result = td.sinkhorn(x, y, a, b, eps=eps, tol=0, max_iter=1)
            cost = torch.cdist(x.double(), y.double())[:, b > 0].square() / 2
            got = (result.f[:, None] + result.g[b > 0]).double()
            close(got, cost.min(1, True).values.expand_as(got), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", (5, 20))
@pytest.mark.parametrize("rho", (None, 0.5))
def test_nan_in_nan_out(n, rho):
    x, y = clouds(n, n, batch=(2,))
    x[0, 0, 0] = math.nan
    value, info = td.sinkhorn_divergence(x, y, eps=0.3, rho=rho, return_info=True)
    assert value[0].isnan() and value[1].isfinite()
    assert info.marginal_error[0].isnan() and info.converged.tolist() == [False, True]


@pytest.mark.parametrize("dtype", (torch.float32, F64), ids=str)
def test_cosine_of_any_length(dtype):
    """The squares of the coordinates would overflow, or be lost."""
    x, y = clouds(dtype=dtype)
    want = td.sinkhorn(x, y, cost="cosine", eps=0.3, tol=1e-6).value
    for scale in (1e-25, 1e-21, 1e-19, 1e19, 1e30):
        at = (scale * x).requires_grad_()
        value = td.sinkhorn(at, y / scale, cost="cosine", eps=0.3, tol=1e-6).value
        close(value, want, rtol=1e-5, atol=1e-6)
        grad = torch.autograd.grad(value, at)[0]
        near = x.clone().requires_grad_()
        close(
            scale * grad,
            torch.autograd.grad(td.sinkhorn(near, y, cost="cosine", eps=0.3, tol=1e-6).value, near)[0],
            rtol=1e-3,
            atol=1e-6,
        )


@pytest.mark.parametrize("dtype", (torch.float32, F64), ids=str)
def test_image_where_the_plan_underflows(dtype):
    """The averages of y exist as long as b and g do."""
    x, y = clouds(4, 5, 2, dtype=dtype)
    for target in (y + 9, y):
        a = weights(4).to(dtype)
        a[1] = 0
        result = td.sinkhorn(x, target, a / a.sum(), eps=0.05, reach=0.5)
        image = result.barycentric_projection()
        cost = torch.cdist(x.double(), target.double()).square() / 2
        share = ((result.g.double() - cost) / 0.05).softmax(1)
        close(image.double(), share @ target.double(), rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=1e-8)
        at = (x.clone().requires_grad_(), target.clone().requires_grad_(), a / a.sum())
        grads = torch.autograd.grad(td.sinkhorn(*at, eps=0.05, reach=0.5).barycentric_projection().sum(), at[:2])
        assert all(g.isfinite().all() for g in grads)


def test_gradcheck_of_the_image():
    x, y = clouds(4, 5, 2, grad=True)
    a, b = weights(4), weights(5, seed=1).requires_grad_()
    eps = torch.tensor(0.5, dtype=F64, requires_grad=True)

    def image(x, y, b, eps):
        result = td.sinkhorn(x, y, a, b, eps=eps, rho=1.3, tol=1e-14, max_iter=5000)
        return result.barycentric_projection()

    assert gradcheck(image, (x, y, b, eps))


# ---- batches


def test_one_cost_matrix_for_a_batch():
    for n in (4, 20):
        C = torch.rand(n, n + 1, dtype=F64).requires_grad_()
        a, b = weights(n, batch=(3,)).requires_grad_(), weights(n + 1)
        results = []
        for matrix in (C, C.expand(3, -1, -1), C.repeat(3, 1, 1)):
            value = td.sinkhorn_cost(matrix, a, b, eps=0.3, tol=1e-12)
            first = torch.autograd.grad(value.square().sum(), (C, a), create_graph=True)
            results.append((value, *first, *torch.autograd.grad(first[0].square().sum(), (C, a))))
        close(results[0], results[2], rtol=1e-9, atol=1e-9)
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][0], results[2][0])


def test_batch_equals_loop():
    """Bit by bit, for schedule and stopping belong to the sample."""
    x, y = clouds(batch=(4,))
    x = x * torch.tensor([1.0, 10.0, 0.1, 3.0], dtype=F64)[:, None, None]
    a = weights(5, batch=(4,))
    got = td.sinkhorn_divergence(x, y, a, eps=0.2, return_info=True)
    loop = [td.sinkhorn_divergence(x[i], y[i], a[i], eps=0.2, return_info=True) for i in range(4)]
    assert torch.equal(got[0], torch.stack([v for v, _ in loop]))
    for k, field in enumerate(got[1]):
        assert torch.equal(field, torch.stack([info[k] for _, info in loop]))


def test_threads_and_batch_give_the_same_bits():
    """Rows over threads, samples over threads, one thread."""
    x, y = clouds(600, 700, 3, batch=(2,), dtype=torch.float32)
    both = td.sinkhorn_divergence(x, y, eps=0.3)
    one = torch.stack([td.sinkhorn_divergence(x[i], y[i], eps=0.3) for i in range(2)])
    torch.set_num_threads(1)
    assert torch.equal(both, td.sinkhorn_divergence(x, y, eps=0.3))
    assert torch.equal(both, one)


def test_shared_inputs():
    x, y = clouds(batch=(3,))
    y = y[0].clone().requires_grad_()
    b = weights(6).requires_grad_()
    value = td.sinkhorn_divergence(x, y, None, b, eps=torch.tensor([0.2, 0.3, 0.4], dtype=F64), reduction="sum")
    got = torch.autograd.grad(value, (y, b))
    loop = sum(td.sinkhorn_divergence(x[i], y, None, b, eps=e) for i, e in enumerate((0.2, 0.3, 0.4)))
    close(value, loop)
    close(got, torch.autograd.grad(loop, (y, b)))


@pytest.mark.parametrize("rho", (None, 0.5))
@pytest.mark.parametrize("weighted", (False, True))
def test_ragged_equals_loop(rho, weighted):
    x, y = clouds(12, 10, 2, grad=True)
    xo, yo = torch.tensor([0, 3, 4, 12]), torch.tensor([0, 5, 7, 10])

    def part(t, o, i):
        return t[o[i] : o[i + 1]]

    a = torch.cat([weights(n, seed=n) for n in (3, 1, 8)]).requires_grad_() if weighted else None
    b = torch.cat([weights(n, seed=n) for n in (5, 2, 3)]).requires_grad_() if weighted else None
    options = {"eps": 0.4, "rho": rho, "tol": 1e-9}
    value, info = td.sinkhorn_ragged(x, xo, y, yo, a, b, **options, return_info=True)
    loop = torch.stack(
        [
            td.sinkhorn_divergence(
                part(x, xo, i),
                part(y, yo, i),
                part(a, xo, i) if weighted else None,
                part(b, yo, i) if weighted else None,
                **options,
            )
            for i in range(3)
        ]
    )
    assert torch.equal(value, loop)
    assert info.f.shape == (12,) and info.g_bb.shape == (10,) and info.n_iter.shape == (3,)
    v = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    leaves = [t for t in (x, y, a, b) if t is not None]
    first = [torch.autograd.grad(t @ v, leaves, create_graph=True) for t in (value, loop)]
    close(*first)
    close(*(torch.autograd.grad(sum(t.square().sum() for t in g), leaves) for g in first))


SMALL = 16  # points a side up to which problems are solved side by side, one in each lane of a vector


def beyond_small(x, a):
    """The same problem with points of weight 0 that make it too large for that."""
    more = SMALL + 1 - a.shape[-1]
    return torch.cat((x, x[..., :1, :].expand(*x.shape[:-2], more, -1)), -2), torch.nn.functional.pad(a, (0, more))


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("rho", (None, (0.5, 0.7)), ids=str)
@pytest.mark.parametrize("n, m, eps", ((4, 4, 0.05), (1, 3, 0.3), (16, 9, 0.1), (2, 16, 1.0), (5, 7, 100.0)))
@pytest.mark.parametrize("dtype", (F64, torch.float32), ids=str)
def test_small_problems(n, m, eps, cost, rho, dtype):
    """Solved side by side, they are what one alone among the larger ones is."""
    x, y = clouds(n, m, batch=(11,), dtype=dtype, seed=n)
    x = x * torch.linspace(0.3, 1.5, 11, dtype=dtype)[:, None, None]  # each with a schedule of its own
    a, b = weights(n, batch=(11,)).to(dtype), weights(m, batch=(11,), seed=1).to(dtype)
    if n > 1:
        a[3, 0] = 0
        a[3] /= a[3].sum()
    options = {"cost": cost, "eps": eps, "rho": rho, "tol": 1e-11 if dtype == F64 else 1e-5, "max_iter": 3000}
    small = td.sinkhorn(x, y, a, b, **options)
    large = td.sinkhorn(
        *(t for pair in zip(beyond_small(x, a), beyond_small(y, b), strict=True) for t in pair), **options
    )
    assert small.converged.all()
    if dtype != F64:  # of potentials, tol leaves open more
        return close(small.value, large.value, rtol=1e-6, atol=1e-6)
    assert abs(small.n_iter.sum() - large.n_iter.sum()) <= 0.1 * large.n_iter.sum()
    close(small.value, large.value, rtol=1e-12, atol=1e-12)
    close(small.f, large.f[:, :n], rtol=1e-9, atol=1e-9)
    close(small.g, large.g[:, :m], rtol=1e-9, atol=1e-9)


def test_small_cost_matrices():
    generator = torch.Generator().manual_seed(3)
    C = drawn(torch.rand, 9, 4, 6, generator=generator)
    C[2, 1, 3] = math.inf  # a pair that may not meet
    large = torch.nn.functional.pad(C, (0, SMALL, 0, SMALL))
    a, b = weights(4, batch=(9,)), weights(6, batch=(9,))
    pad = partial(torch.nn.functional.pad, pad=(0, SMALL))
    options = {"eps": 0.1, "tol": 1e-12, "return_info": True}
    value, info = td.sinkhorn_cost(C, a, b, **options)
    expected, larger = td.sinkhorn_cost(large, pad(a), pad(b), **options)
    close(value, expected)
    close(info.f, larger.f[:, :4], rtol=1e-9, atol=1e-9)
    warm = td.sinkhorn_cost(C, a, b, init=info.g, **options)[1].n_iter
    assert torch.equal(warm, td.sinkhorn_cost(large, pad(a), pad(b), init=larger.g, **options)[1].n_iter)
    assert (warm <= 2).all()


def test_small_beside_large():
    """A ragged batch of both: each gets the bits that it gets alone."""
    sizes = (3, 16, 17, 4, 4, 9, 30, 1, 2, 5, 6, 7, 8, 2, 2)
    offsets = torch.tensor((0, *sizes)).cumsum(0)
    x, y = clouds(sum(sizes), sum(sizes), 2)
    value = td.sinkhorn_ragged(x, offsets, y, offsets, eps=0.2)
    for i, (first, last) in enumerate(pairwise(offsets)):
        assert torch.equal(value[i], td.sinkhorn_divergence(x[first:last], y[first:last], eps=0.2))


@pytest.mark.parametrize("points", (4, 20))
@pytest.mark.parametrize("max_iter", (2, 6, 15, 30))
def test_few_iterations(max_iter, points):
    """Stopped early, the dual is behind its maximum, but no step has thrown it far below."""
    x, y = clouds(points, points, batch=(128,), dtype=torch.float32)
    options = {"cost": "euclidean", "eps": 0.01, "tol": 0}
    best = td.sinkhorn(x.double(), y.double(), **{**options, "max_iter": 2000}).value
    behind = best - td.sinkhorn(x, y, **options, max_iter=max_iter).value
    assert behind.min() > -1e-3 and behind.max() < 0.5


# ---- dtypes


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("cost", COSTS)
def test_lower_precision(dtype, cost):
    x, y = clouds(40, 50, dtype=dtype, grad=True)
    value = td.sinkhorn_divergence(x, y, cost=cost, eps=1.0, tol=1e-5)
    assert value.dtype == torch.float32
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    want = td.sinkhorn_divergence(*wide, cost=cost, eps=1.0, tol=1e-9)
    torch.testing.assert_close(value.double(), want, rtol=5e-6, atol=5e-7)
    # Gradients are off by up to ten times the marginal error, and rounded once to their type.
    rounding = 1e-4 + {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for got, exact in zip(torch.autograd.grad(value, (x, y)), torch.autograd.grad(want, wide), strict=True):
        assert got.dtype == dtype
        assert (got.double() - exact).abs().max() <= rounding * exact.abs().max()


def test_half_beside_float():
    x, _ = clouds(dtype=torch.float32)
    _, y = clouds(dtype=torch.bfloat16)
    assert td.sinkhorn_divergence(x, y).dtype == torch.float32


# ---- the solver's report


def test_tolerance_is_kept():
    x, y = clouds(60, 50, 3)
    for tol in (1e-2, 1e-4, 1e-8):
        result = td.sinkhorn(x, y, eps=0.05, tol=tol)
        assert result.converged and result.marginal_error <= tol
        ones = torch.ones(60, dtype=F64)
        assert (result.apply(ones, transpose=True) - 1 / 50).abs().sum() <= 1.01 * tol + 1e-12


def test_unbalanced_tolerance_is_kept():
    x, y = clouds(60, 50, 3)
    result = td.sinkhorn(x, y, eps=0.05, rho=0.3, tol=1e-7)
    for v, f, transpose in ((50, result.f, False), (60, result.g, True)):
        aim = (-f / 0.3).exp() / f.numel()
        marginal = result.apply(torch.ones(v, dtype=F64), transpose)
        assert (marginal - aim).abs().sum() / aim.sum() <= 1.01e-7


@pytest.mark.parametrize("seed", (37, 39, 55))
def test_a_far_start_converges(seed):
    """Atoms much further apart than blur: combinations of past steps alone would be thrown back for ever."""
    generator = torch.Generator().manual_seed(seed)
    x, y = drawn(torch.randn, 8, 32, generator=generator), 8 * drawn(torch.randn, 8, 32, generator=generator)
    result = td.sinkhorn(x, y, blur=1.0, tol=1e-2)
    assert result.converged and result.n_iter < 200
    rows, columns = result.plan().sum(1), result.plan().sum(0)
    assert (rows - 1 / 8).abs().sum() <= 1e-2 and (columns - 1 / 8).abs().sum() <= 1e-2


@pytest.mark.parametrize("dtype", (torch.float32, F64), ids=str)
@pytest.mark.parametrize("cost", ("half_sqeuclidean", "euclidean"))
@pytest.mark.parametrize("d", (1, 2, 3, 4, 5, 16))
def test_one_update_from_any_guess(d, cost, dtype):
    """An update is the same whatever potential stood there before, also where that is absurd as a guess of it."""
    x, y = clouds(7, 45, d, dtype=dtype)
    eps = 0.02
    distance = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")
    c = distance if cost == "euclidean" else distance**2 / 2
    for scale in (0.0, 1.0, 1e3):
        g = scale * drawn(torch.randn, 45, dtype=dtype, generator=torch.Generator().manual_seed(1))
        f = -eps * torch.logsumexp((g.double() - c) / eps - math.log(45), 1)
        result = td.sinkhorn(x, y, cost=cost, eps=eps, init=g, max_iter=1, tol=0)
        shift = (result.f.double() - f).mean()  # the gauge
        atol = 1e-10 if dtype == F64 else 2e-6 * (1 + scale)
        torch.testing.assert_close(result.f.double() - shift, f, rtol=0, atol=atol)


def matrix_of(cost, x, y):
    if cost == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(x[:, None], y[None], dim=-1)
    square = (x[:, None] - y).square().sum(-1)
    return {"half_sqeuclidean": square / 2, "sqeuclidean": square, "euclidean": square.sqrt()}[cost]


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (F64, 1e-13)), ids=str)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("d", (5, 16, 33, 70))
def test_one_update_in_many_dimensions(d, cost, dtype, tolerance):
    """By inner products, but for euclidean, and by more rows and columns than the kernels take at once."""
    x, y = clouds(101, 300, d, dtype=dtype)
    c = matrix_of(cost, x.double(), y.double())
    eps = c.mean().item() / 10
    g = eps * torch.randn(300, dtype=dtype, generator=torch.Generator().manual_seed(1))
    f = -eps * torch.logsumexp((g.double() - c) / eps - math.log(300), 1)
    result = td.sinkhorn(x, y, cost=cost, eps=eps, init=g, max_iter=1, tol=0)
    shift = (result.f.double() - f).mean()  # the gauge
    torch.testing.assert_close(result.f.double() - shift, f, rtol=0, atol=tolerance * eps)


@pytest.mark.parametrize("eps", (0.01, 0.3))
def test_clusters_far_apart(eps):
    """Squares about any centre are large beside eps and beside the costs within a cluster: differences have to do."""
    x, y = ((t * 1024).round() / 1024 for t in clouds(30, 40, 8))
    for t in (x, y):
        t[::2] += 512
    c = matrix_of("half_sqeuclidean", x, y)
    f = -eps * torch.logsumexp(-c / eps - math.log(40), 1)
    result = td.sinkhorn(x.float(), y.float(), eps=eps, init=torch.zeros(40), max_iter=1, tol=0)
    shift = (result.f.double() - f).mean()  # the gauge
    torch.testing.assert_close(result.f.double() - shift, f, rtol=0, atol=2e-6 * f.max().item())


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 5e-6), (F64, 1e-12)), ids=str)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("d", (1, 2, 3, 4, 5, 33))
def test_gradient_of_points_is_that_of_the_plan(d, cost, dtype, tolerance):
    """Each side's plan is scaled to its marginal, also where the other potential is no solution at all."""
    x, y = clouds(23, 290, d, dtype=dtype)
    with torch.no_grad():
        y[:5] = x[:5]
    eps = 0.1 * matrix_of("sqeuclidean", x.double(), y.double()).mean().item() + 0.1
    for scale in (0.0, 1e3):
        g = scale * torch.randn(290, dtype=dtype, generator=torch.Generator().manual_seed(1))
        leaves = [t.clone().requires_grad_() for t in (x, y)]
        result = td.sinkhorn(*leaves, cost=cost, eps=eps, init=g, max_iter=1, tol=0)
        got = torch.autograd.grad(result.value, leaves)
        wide = [t.detach().double().requires_grad_() for t in leaves]
        if cost == "euclidean":
            square = (wide[0][:, None] - wide[1]).square().sum(-1)
            c = torch.where(square == 0, 0, torch.where(square == 0, 1, square).sqrt())
        else:
            c = matrix_of(cost, *wide)
        z = (result.f.detach().double()[:, None] + result.g.detach().double() - c.detach()) / eps
        for got_side, leaf, dim, n in ((got[0], wide[0], 1, 23), (got[1], wide[1], 0, 290)):
            (want,) = torch.autograd.grad((z.softmax(dim) * c).sum() / n, leaf, retain_graph=True)
            atol = tolerance * (1 + scale / eps) * want.abs().max().item() + tolerance / n
            torch.testing.assert_close(got_side.double(), want, rtol=0, atol=atol)


def test_counters():
    x, y = clouds(30, 40)
    result = td.sinkhorn(x, y, eps=0.01, tol=0, max_iter=17)
    assert result.n_iter == 17
    assert td.sinkhorn(x, y, eps=0.01, tol=1e-9, max_iter=2).n_iter == 2
    assert not td.sinkhorn(x, y, eps=0.01, tol=1e-9, max_iter=2).converged
    floor = td.sinkhorn(x.float(), y.float(), eps=0.05, tol=1e-30)
    assert floor.converged and floor.marginal_error > 1e-30


def test_warm_start():
    x, y = clouds(100, 120)
    cold, info = td.sinkhorn_divergence(x, y, eps=0.02, tol=1e-4, return_info=True)
    again, warm = td.sinkhorn_divergence(x, y, eps=0.02, tol=1e-4, init=info, return_info=True)
    assert warm.n_iter <= 2 < info.n_iter
    torch.testing.assert_close(again, cold, rtol=1e-6, atol=1e-6)
    result = td.sinkhorn(x, y, eps=0.02, tol=1e-4)
    assert td.sinkhorn(x, y, eps=0.02, tol=1e-4, init=result).n_iter <= 2
    assert td.sinkhorn(x, y, eps=0.02, tol=1e-4, init=result.g.detach()).n_iter <= 2


def test_no_grad_is_respected():
    x, y = clouds(grad=True)
    with torch.no_grad():
        assert not td.sinkhorn_divergence(x, y).requires_grad
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


# ---- gradients


def problem(rho, d=2):
    """Points, logits of weights and log eps; masses are equal where they must be."""
    x, y = clouds(4, 5, d, batch=(2,), grad=True)
    y = y[0].detach().requires_grad_()
    generator = torch.Generator().manual_seed(2)
    p, q = (drawn(torch.randn, *s, generator=generator).requires_grad_() for s in ((2, 4), (5,)))
    eps = torch.tensor(0.4, dtype=F64, requires_grad=True)

    def unpack(x, y, p, q, eps):
        a, b = p.softmax(-1), q.softmax(-1)
        return (x, y, a, b, eps) if rho is None else (x, y, 1.3 * a, 0.8 * b, eps)

    return (x, y, p, q, eps), unpack


@pytest.mark.parametrize("debias", (False, True))
@pytest.mark.parametrize("rho", (None, 1.3))
@pytest.mark.parametrize("cost", COSTS)
def test_gradcheck(cost, rho, debias):
    inputs, unpack = problem(rho)

    def f(*args):
        x, y, a, b, eps = unpack(*args)
        return td.sinkhorn_divergence(x, y, a, b, cost=cost, eps=eps, rho=rho, debias=debias, tol=1e-12)

    assert gradcheck(f, inputs, atol=1e-7, check_forward_ad=True)
    assert gradgradcheck(f, inputs, atol=1e-6, check_fwd_over_rev=True)


@pytest.mark.parametrize("rho", (None, (1.3, None), (0.5, 2.0)), ids=str)
def test_gradcheck_of_a_cost_matrix(rho):
    (_, _, p, q, eps), unpack = problem(rho)
    C = torch.rand(2, 4, 5, dtype=F64, requires_grad=True)

    def f(C, p, q, eps):
        _, _, a, b, eps = unpack(None, None, p, q, eps)
        return td.sinkhorn_cost(C, a, b, eps=eps, rho=rho, tol=1e-12)

    assert gradcheck(f, (C, p, q, eps), atol=1e-7, check_forward_ad=True)
    assert gradgradcheck(f, (C, p, q, eps), atol=1e-6, check_fwd_over_rev=True)


@pytest.mark.parametrize("rho", (None, (0.5, 2.0)), ids=str)
@pytest.mark.parametrize("cost", COSTS)
def test_gradcheck_of_potentials_and_plan(cost, rho):
    inputs, unpack = problem(rho)

    def solved(*args):
        x, y, a, b, eps = unpack(*args)
        return td.sinkhorn(x, y, a, b, cost=cost, eps=eps, rho=rho, tol=1e-12)

    def potentials(*args):
        return solved(*args).f, solved(*args).g

    def products(v, *args):
        result = solved(*args)
        return result.barycentric_projection(), result.apply(v), result.apply(result.f, transpose=True), result.plan()

    assert gradcheck(potentials, inputs, atol=1e-7, check_forward_ad=True)
    assert gradcheck(products, (torch.randn(2, 5, 2, dtype=F64, requires_grad=True), *inputs), atol=1e-6)


@pytest.mark.parametrize("n", (0, 1, 2, 3, 4))
def test_only_the_gradients_that_are_needed(n):
    inputs, unpack = problem(1.3)

    def gradient(leaves, target):
        x, y, a, b, eps = unpack(*leaves)
        return torch.autograd.grad(td.sinkhorn_divergence(x, y, a, b, eps=eps, rho=1.3).sum(), target)[0]

    alone = [t.detach().requires_grad_(k == n) for k, t in enumerate(inputs)]
    close(gradient(alone, alone[n]), gradient(inputs, inputs[n]))


@pytest.mark.parametrize("eps", (0.01, 0.03, 0.1, 0.3))
@pytest.mark.parametrize("rho", (None, 1.3))
def test_second_derivatives_by_weights(eps, rho):
    """Against differences of the gradient, where self plans are nearly diagonal and their systems nearly singular."""
    for seed in range(4):
        x, y = clouds(5, 4, 2, seed=seed)
        a, b = weights(5, seed=seed), weights(4, seed=seed + 1)
        generator = torch.Generator().manual_seed(seed)
        va, vb = (drawn(torch.randn, len(w), generator=generator) for w in (a, b))
        va, vb = va - va.sum() * a, vb - vb.sum() * b  # masses stay

        def gradient(t, create_graph=False):
            at = ((a + t * va).requires_grad_(), (b + t * vb).requires_grad_())  # noqa: B023
            value = td.sinkhorn_divergence(x, y, *at, eps=eps, rho=rho, tol=1e-14, max_iter=5000)  # noqa: B023
            return at, torch.autograd.grad(value, at, create_graph=create_graph)

        at, first = gradient(0, create_graph=True)
        second = torch.autograd.grad(first, at, (va, vb))
        step = 1e-5
        for got, ahead, behind in zip(second, gradient(step)[1], gradient(-step)[1], strict=True):
            want = (ahead - behind) / (2 * step)
            got, want = (uncentred(rho is None, t) for t in (got, want))
            close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max())


@pytest.mark.parametrize("seed", (0, 49))
def test_second_derivative_of_a_diagonal_plan(seed):
    """The atoms of the first cloud hardly touch; between those of the second all is lost to rounding."""
    torch.manual_seed(seed)
    x = torch.randn(4, 2, dtype=F64)
    a = torch.full((4,), 0.25, dtype=F64)
    y = torch.zeros(1, 2, dtype=F64)
    H = torch.autograd.functional.hessian(lambda a: td.sinkhorn_divergence(x, y, a, tol=1e-12), a)
    centre = torch.eye(4, dtype=F64) - 0.25
    close((centre @ H @ centre).diagonal(), torch.full((4,), 0.00375, dtype=F64), rtol=1e-4, atol=0)


def test_third_derivative_says_that_it_is_missing():
    x, y = clouds(grad=True)
    value = td.sinkhorn_divergence(x, y, eps=0.3)
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(second.sum(), x)


# ---- transforms


def divergence(x, y, **options):
    return td.sinkhorn_divergence(x, y, eps=0.5, tol=1e-12, **options)


def test_hessian():
    x, y = clouds(4, 5, 2)
    want = torch.autograd.functional.hessian(lambda t: divergence(t, y), x)
    for outer in (torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacrev(f))):
        close(outer(lambda t: divergence(t, y))(x), want)


def test_jvp():
    x, y = clouds(4, 5, 2)
    v = torch.randn(4, 2, dtype=F64)
    value, tangent = torch.func.jvp(lambda t: divergence(t, y), (x,), (v,))
    close(value, divergence(x, y))
    close(tangent, (torch.func.grad(lambda t: divergence(t, y))(x) * v).sum())


def test_vectorised_forward_mode():
    x, y = clouds(4, 5, 2)
    want = torch.autograd.functional.jacobian(lambda t: divergence(t, y), x)
    got = torch.autograd.functional.jacobian(lambda t: divergence(t, y), x, vectorize=True, strategy="forward-mode")
    close(got, want)
    close(torch.func.jacfwd(lambda t: divergence(t, y))(x), want)
    x, y = clouds(3, 4, 2, batch=(2,), grad=True)
    f = partial(td.sinkhorn_divergence, eps=0.5, tol=1e-12)
    assert gradcheck(f, (x, y), check_forward_ad=True, check_batched_forward_grad=True)


@pytest.mark.parametrize("in_dims", ((0, None), (0, 0), (None, 0)))
def test_vmap(in_dims):
    x, y = clouds(4, 5, 2, batch=(3,))
    args = tuple(t if d == 0 else t[0] for t, d in zip((x, y), in_dims, strict=True))
    loop = [tuple(t[i] if d == 0 else t for t, d in zip(args, in_dims, strict=True)) for i in range(3)]
    close(torch.func.vmap(divergence, in_dims)(*args), torch.stack([divergence(*a) for a in loop]))
    for transform in (torch.func.grad, torch.func.hessian):
        f = transform(divergence)
        close(torch.func.vmap(f, in_dims)(*args), torch.stack([f(*a) for a in loop]))


def test_vmap_of_a_batch_and_of_potentials():
    x, y = clouds(4, 5, 2, batch=(3, 2))
    close(torch.func.vmap(divergence)(x, y), torch.stack([divergence(*t) for t in zip(x, y, strict=True)]))

    def image(x, y):
        return td.sinkhorn(x, y, eps=0.5, tol=1e-12).barycentric_projection()

    close(torch.func.vmap(image)(x, y), torch.stack([image(*t) for t in zip(x, y, strict=True)]))


@pytest.mark.slow
@pytest.mark.parametrize("cost", ("half_sqeuclidean", "cosine"))
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck looks at its own fake copies
def test_opcheck(cost):
    x, y = clouds(grad=True)
    eps = torch.tensor(0.3, dtype=F64, requires_grad=True)
    ops = torch.ops.torch_divergence
    torch.library.opcheck(ops.sinkhorn_divergence.default, (x, y), {"cost": cost, "eps": eps})
    torch.library.opcheck(ops.sinkhorn.default, (x, y), {"cost": cost, "eps": eps})
    C = torch.rand(4, 5, dtype=F64, requires_grad=True)
    torch.library.opcheck(ops.sinkhorn_cost.default, (C, weights(4)), {"eps": eps})


@pytest.mark.slow
@pytest.mark.parametrize("backend", ("eager", "aot_eager", "inductor"))
def test_compile(backend):
    def loss(x, y):
        return td.sinkhorn_divergence(x, y, blur=0.3, reach=2.0, tol=1e-6) * 2

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for n in (5, 6, 7):
        x, y = clouds(n, n + 1, grad=True)
        close(compiled(x, y), loss(x, y))
        close(torch.autograd.grad(compiled(x, y), (x, y)), torch.autograd.grad(loss(x, y), (x, y)))


def test_meta():
    x, y = (t.to("meta") for t in clouds(batch=(2,)))
    value, info = td.sinkhorn_divergence(x, y, return_info=True)
    assert value.shape == (2,) and value.is_meta
    assert info.f.shape == (2, 5) and info.g.shape == (2, 6) and info.n_iter.shape == (2,)
    with pytest.raises(ValueError, match="dimensions"):
        td.sinkhorn_divergence(x, y[..., :2])


# ---- modules and errors


def test_modules():
    x, y = clouds(batch=(2,))
    close(td.SinkhornLoss(eps=0.3)(x, y), td.sinkhorn_divergence(x, y, eps=0.3).mean())
    C = torch.cdist(x, y)
    close(td.SinkhornCostLoss(eps=0.3, reduction="sum")(C), td.sinkhorn_cost(C, eps=0.3).sum())
    assert not td.SinkhornLoss().state_dict()
    eps = torch.tensor([0.2, 0.3])
    close(td.SinkhornLoss(eps=eps, reduction="batchmean")(x, y), td.sinkhorn_divergence(x, y, eps=eps).mean())
    close(td.SinkhornCostLoss(eps=0.3, reduction="batchmean")(C), td.sinkhorn_cost(C, eps=0.3).mean())


def test_no_problems():
    x, y = clouds(batch=(0,), grad=True)
    for reduction in ("mean", "sum", "batchmean"):
        value = td.sinkhorn_divergence(x, y, reduction=reduction)
        assert value == 0
        assert [g.shape for g in torch.autograd.grad(value, (x, y))] == [x.shape, y.shape]


@pytest.mark.parametrize("name", ("sinkhorn", "sinkhorn_divergence", "sinkhorn_ragged", "sinkhorn_cost"))
def test_what_is_no_init(name):
    x, y = clouds()
    args = {
        "sinkhorn_cost": (torch.cdist(x, y),),
        "sinkhorn_ragged": (x, torch.tensor([0, 5]), y, torch.tensor([0, 6])),
    }
    for init in (3.0, "g", (1, 2)):
        with pytest.raises(ValueError, match=f"{name}: init is .*, expected a SinkhornInfo"):
            getattr(td, name)(*args.get(name, (x, y)), eps=0.3, init=init)


@pytest.mark.parametrize(
    "change, message",
    (
        ({"eps": 0.1, "blur": 0.1}, "both eps and blur"),
        ({"eps": -1.0}, "eps is -1, expected a positive"),
        ({"eps": True}, "eps has type bool, expected"),
        ({"blur": 0.0}, "blur is 0, expected a positive"),
        ({"rho": 1.0, "reach": 1.0}, "both rho and reach"),
        ({"rho": -1.0}, "rho is -1, expected a positive"),
        ({"rho": (1.0, 2.0)}, "expected equal ones"),
        ({"cost": "manhattan"}, 'cost is "manhattan"'),
        ({"reduction": "median"}, 'reduction is "median"'),
        ({"tol": -1.0}, "tol is -1"),
        ({"max_iter": 0}, "max_iter is 0"),
        ({"a": torch.ones(5)}, "a has dtype Float"),
        ({"a": torch.ones(4, dtype=F64)}, "a has shape [4]"),
        ({"a": torch.ones(5, dtype=F64)}, "a has mass 5 and b 1, expected equal"),
        ({"a": torch.zeros(5, dtype=F64)}, "a has mass 0"),
        ({"a": torch.tensor([2.0, -1, 0, 0, 0], dtype=F64)}, "a holds -1 at 1"),
        ({"y": torch.ones(6, 2, dtype=F64)}, "y has points of 2 dimensions, expected 3"),
        ({"y": torch.ones(6, 3)}, "y has dtype Float"),
        ({"y": torch.ones(0, 3, dtype=F64)}, "y has shape [0, 3]"),
        ({"x": torch.ones(3, dtype=F64)}, "x has shape [3]"),
        ({"x": torch.ones(5, 3, dtype=torch.long)}, "x has dtype Long"),
        ({"x": torch.ones(2, 5, 3, dtype=F64), "y": torch.ones(3, 5, 3, dtype=F64)}, "y has batch size 3, expected 2"),
    ),
    ids=lambda v: v[:30] if isinstance(v, str) else "",
)
def test_errors(change, message):
    x, y = clouds()
    arguments = {"x": x, "y": y} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        td.sinkhorn_divergence(**arguments)


@pytest.mark.parametrize(
    "batch, init, message",
    (
        ((), torch.zeros(7, dtype=F64), "has shape [7], expected (6,)"),
        ((), torch.zeros(2, 6, dtype=F64), "has shape [2, 6], expected (6,)"),
        ((3,), torch.zeros(2, 6, dtype=F64), "has shape [2, 6], expected (3, 6)"),
        ((3,), torch.zeros(3, 5, dtype=F64), "has shape [3, 5], expected (3, 6)"),
        ((3,), torch.zeros(1, 3, 6, dtype=F64), "has shape [1, 3, 6], expected (3, 6)"),
        ((), torch.zeros(6, dtype=F64, device="meta"), "is on meta, expected"),
        ((), torch.zeros(6, dtype=torch.long), "has dtype Long, expected float32"),
    ),
    ids=str,
)
def test_errors_in_init(batch, init, message):
    x, y = clouds(batch=batch)
    C = torch.cdist(x, y)
    for call in (td.sinkhorn, td.sinkhorn_divergence):
        with pytest.raises(ValueError, match=re.escape(f"{call.__name__}: init g {message}")):
            call(x, y, init=init)
    with pytest.raises(ValueError, match=re.escape(f"sinkhorn_cost: init g {message}")):
        td.sinkhorn_cost(C, eps=0.3, init=init)


def test_init_of_another_problem():
    x, y = clouds(batch=(2,))
    _, info = td.sinkhorn_divergence(x, y, return_info=True)
    for other in (clouds(batch=(3,)), clouds()):
        with pytest.raises(ValueError, match="init g has shape"):
            td.sinkhorn_divergence(*other, init=info)
    at = torch.tensor([0, 2, 5]), torch.tensor([0, 2, 6])
    with pytest.raises(ValueError, match=re.escape("sinkhorn_ragged: init g has shape [3, 6], expected (6,)")):
        td.sinkhorn_ragged(x[0], at[0], y[0], at[1], init=torch.zeros(3, 6, dtype=F64))


def test_ragged_offsets_of_no_problem():
    x, y = clouds()
    none = torch.tensor([0])
    with pytest.raises(ValueError, match="x_offsets has 1 entries, expected"):
        td.sinkhorn_ragged(x, none, y, none)


def test_masses_may_differ_by_rounding():
    x, y = clouds()
    a = weights(5)
    assert td.sinkhorn(x, y, a * (1 + 5e-11), eps=0.3, tol=1e-12).converged
    with pytest.raises(ValueError, match="mass"):
        td.sinkhorn(x, y, a * (1 + 5e-10), eps=0.3)
    assert td.sinkhorn(x.float(), y.float(), (a * (1 + 5e-6)).float(), eps=0.3, tol=1e-7).converged


@pytest.mark.parametrize("offsets, message", (([0, 3, 3], "leaves problem 1 with 0"), ([0, 2, 3], "from 0 to 3")))
def test_ragged_errors(offsets, message):
    x, y = clouds()
    with pytest.raises(ValueError, match=message):
        td.sinkhorn_ragged(x[: 3 if 3 in offsets[:2] else 5], torch.tensor(offsets), y, torch.tensor([0, 2, 6]))


def test_not_converged_warns_and_never_raises():
    """In a process of its own, for the warning is given once."""
    import subprocess
    import sys

    code = (
        "import torch, warnings, torch_divergence as td\n"
        "x = torch.rand(20, 2)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(3): td.sinkhorn(x, x + 1, eps=1e-4, tol=1e-6, max_iter=2)\n"
        "assert sum('marginal_error' in str(w.message) for w in caught) == 1, caught\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
