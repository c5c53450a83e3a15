"""Exact transport on the line."""

import pytest
import torch
import torch_divergence as td
from torch.autograd import gradcheck, gradgradcheck
from transport import case, on_simplex, raises, weights

close = torch.testing.assert_close
POWERS = (1, 1.5, 2, 3)


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def equal(n):
    return torch.full((n,), 1 / n, dtype=torch.float64)


def by_quantiles(u, v, a=None, b=None, p=1):
    """The integral of |Q_u - Q_v|^p, piece by piece, in ATen."""
    a = torch.full_like(u, 1 / len(u)) if a is None else a
    b = torch.full_like(v, 1 / len(v)) if b is None else b
    (u, i), (v, j) = u.sort(), v.sort()
    of_a, of_b = a[i].cumsum(0), b[j].cumsum(0)
    ends = torch.cat((of_a, of_b)).sort()[0]
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    middle = ((starts + ends) / 2).detach()
    q_u = u[torch.searchsorted(of_a.detach(), middle).clamp_max(len(u) - 1)]
    q_v = v[torch.searchsorted(of_b.detach(), middle).clamp_max(len(v) - 1)]
    return ((ends - starts) * (q_u - q_v).abs() ** p).sum()


def test_reference_case():
    value, *arguments = case("wasserstein_1d_p1", "u", "v", "a", "b")
    close(td.wasserstein_1d(*arguments).item(), value, rtol=1e-14, atol=0)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("n, m", ((1, 1), (1, 6), (6, 1), (7, 7), (12, 18), (100, 37)))
def test_values_and_gradients(n, m, p):
    for weighted in (False, True):
        x = [randn(n), randn(m), *((weights(n), weights(m)) if weighted else ())]
        x = [t.requires_grad_() for t in x]
        got, want = td.wasserstein_1d(*x, p=p), by_quantiles(*x, p=p)
        close(got, want, rtol=1e-12, atol=1e-15)
        for k, (g, w) in enumerate(zip(torch.autograd.grad(got, x), torch.autograd.grad(want, x), strict=True)):
            if k >= 2:  # up to a constant on either side
                g, w = g - g.mean(), w - w.mean()
            close(g, w, rtol=1e-10, atol=1e-12)


def test_against_scipy():
    stats = pytest.importorskip("scipy.stats", reason="scipy has W_1 on the line")
    for zeros in ((), (0, 5)):
        u, v, a, b = randn(30), randn(20), weights(30, zeros=zeros), weights(20, zeros=zeros)
        want = stats.wasserstein_distance(*(t.numpy(force=True) for t in (u, v, a, b)))
        close(td.wasserstein_1d(u, v, a, b).item(), want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("p", POWERS)
def test_closed_forms(p):
    u, a = randn(50), weights(50)
    close(td.wasserstein_1d(u, u + 3, a, a, p=p).item(), 3.0**p)
    close(td.wasserstein_1d(u[:1], u[:1] - 2, p=p).item(), 2.0**p)
    assert td.wasserstein_1d(u, u[torch.randperm(50)], p=p) == 0
    close(td.wasserstein_1d(u, torch.zeros(1).double(), a, p=p), (a * u.abs() ** p).sum())
    # Quantiles of two Gaussians: (m1 - m2)^2 + (s1 - s2)^2 with the variance of the standard quantiles
    z = torch.special.ndtri((torch.arange(2000).double() + 0.5) / 2000)
    close(td.wasserstein_1d(1 + 2 * z, 3 + 0.5 * z, p=2), 4 + 1.5**2 * z.square().mean())


def test_metric():
    rows = [(randn(n), weights(n)) for n in (10, 13, 8)]

    def distance(i, j):
        return td.wasserstein_1d(rows[i][0], rows[j][0], rows[i][1], rows[j][1])

    assert distance(0, 2) <= distance(0, 1) + distance(1, 2)
    close(distance(0, 1), distance(1, 0), rtol=1e-13, atol=0)


def test_uniform_equals_equal_weights():
    u, v = randn(12), randn(18)
    for p in POWERS:
        got = td.wasserstein_1d(u, v, equal(12), equal(18), p=p)
        close(got, td.wasserstein_1d(u, v, p=p), rtol=1e-13, atol=0)


@pytest.mark.parametrize("p", POWERS)
def test_derivatives_of_positions(p):
    a, b = weights(2, 5), weights(4)
    for extra in ((), (a, b)):
        x = (randn(2, 5).requires_grad_(), randn(2, 4).requires_grad_())
        f = lambda u, v, extra=extra: td.wasserstein_1d(u, v, *extra, p=p)  # noqa: E731
        assert gradcheck(f, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
        assert gradgradcheck(f, x, check_batched_grad=True)
        assert gradgradcheck(f, x, check_fwd_over_rev=True, check_rev_over_rev=False, check_undefined_grad=False)


@pytest.mark.parametrize("p", (1, 2, 3))
def test_derivatives_of_weights(p):
    x = tuple(t.requires_grad_() for t in (randn(2, 5), randn(4), randn(5), randn(2, 4)))
    f = lambda u, v, s, t: td.wasserstein_1d(u, v, on_simplex(s), on_simplex(t), p=p)  # noqa: E731
    assert gradcheck(f, x, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, x)
    third = lambda *x: torch.autograd.grad(f(*x).sum(), x, create_graph=True)  # noqa: E731
    if p == 3:  # the first power with third derivatives
        assert gradgradcheck(third, x)
    one_side = lambda s: td.wasserstein_1d(x[0].detach(), x[1].detach(), b=on_simplex(s), p=p)  # noqa: E731
    assert gradcheck(one_side, (x[3],), check_forward_ad=True)


def test_first_derivatives_of_the_composite_are_those_of_the_kernel():
    for zeros in ((), (0, 1, 4, 8)):
        x = [
            t.requires_grad_()
            for t in (randn(3, 9), randn(3, 9), weights(3, 9, zeros=zeros), weights(3, 9, zeros=zeros))
        ]
        for p in POWERS:
            value = td.wasserstein_1d(*x, p=p).sum()
            kernel = torch.autograd.grad(value, x, retain_graph=True)
            composite = torch.autograd.grad(value, x, create_graph=True)
            close(kernel, composite, rtol=1e-11, atol=1e-13)


def test_potentials_are_feasible_and_tight():
    for uniform in (False, True):
        u, v = randn(20), randn(30)
        a = (equal(20) if uniform else weights(20, zeros=(0, 7, 8))).requires_grad_()
        b = (equal(30) if uniform else weights(30, zeros=(3, 29))).requires_grad_()
        for p in POWERS:
            value = td.wasserstein_1d(u, v, a, b, p=p)
            f, g = torch.autograd.grad(value, (a, b))
            assert ((u[:, None] - v).abs() ** p - f[:, None] - g).min() > -1e-12
            close((a * f).sum(), value / 2)
            close((b * g).sum(), value / 2)


def test_mean_of_the_one_sided_derivatives():
    """Quantiles that coincide: two atoms of 1/2 on either side."""
    u, v = torch.tensor([0.0, 1.0]).double(), torch.tensor([0.5, 3.0]).double()
    half = torch.tensor([0.5, 0.5]).double()

    def value(shift):
        return td.wasserstein_1d(u, v, half + shift * torch.tensor([1.0, -1.0]).double(), half, p=2).item()

    a = half.clone().requires_grad_()
    f = torch.autograd.grad(td.wasserstein_1d(u, v, a, half, p=2), a)[0]
    h = 1e-6
    right, left = (value(h) - value(0)) / h, (value(0) - value(-h)) / h
    assert abs(right - left) > 1
    close((f[0] - f[1]).item(), (right + left) / 2, rtol=1e-6, atol=0)


def test_points_of_weight_zero_change_nothing():
    u, v, a, b = randn(9), randn(7), weights(9, zeros=(0, 4, 8)), weights(7, zeros=(2, 3))
    for p in POWERS:
        close(td.wasserstein_1d(u, v, a, b, p=p), td.wasserstein_1d(u[a > 0], v[b > 0], a[a > 0], b[b > 0], p=p))
    u.requires_grad_()
    td.wasserstein_1d(u, v, a, b, p=2).backward()
    assert (u.grad[a == 0] == 0).all()
    assert td.wasserstein_1d(u, v, 0 * a, 0 * b) == 0


def test_ties():
    """Equal positions: the value of the merged atoms, and slopes by the order of their indices."""
    u, v = torch.tensor([0.0, 0.0, 1.0]).double().requires_grad_(), torch.tensor([-1.0, 1.0, 1.0]).double()
    value = td.wasserstein_1d(u, v)
    close(value.item(), 2 / 3)
    close(torch.autograd.grad(value, u)[0], torch.tensor([1.0, -1.0, 0.0]).double() / 3)
    integers = torch.randint(0, 4, (40,)).double()
    for p in POWERS:
        assert td.wasserstein_1d(integers, integers.flip(0), p=p) == 0
    same = randn(5).requires_grad_()
    for p in POWERS:
        grad = torch.autograd.grad(td.wasserstein_1d(same, same.detach(), p=p), same, create_graph=True)[0]
        assert (grad == 0).all() and torch.autograd.grad(grad.sum(), same)[0].isfinite().all()


def test_dim_batches_sharing_and_strides():
    u, v, a, b = randn(2, 3, 6), randn(2, 3, 5), weights(2, 3, 6), weights(2, 3, 5)
    value = td.wasserstein_1d(u, v, a, b)
    assert value.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            close(value[i, j], td.wasserstein_1d(u[i, j], v[i, j], a[i, j], b[i, j]))
    moved = [t.movedim(-1, 0) for t in (u, v, a, b)]
    assert torch.equal(td.wasserstein_1d(*moved, dim=0), value)
    assert torch.equal(td.wasserstein_1d(*(t.contiguous() for t in moved), dim=-3), value)
    close(td.wasserstein_1d(u, v, a, b, reduction="mean"), value.mean())
    close(td.wasserstein_1d(u, v, a, b, reduction="sum"), value.sum())
    shared = v[0, 0].clone().requires_grad_()
    got = td.wasserstein_1d(u, shared, b=b[0, 0], p=2)
    expanded = v[0, 0].expand(2, 3, 5).clone().requires_grad_()
    want = td.wasserstein_1d(u, expanded, b=b[0, 0].expand(2, 3, 5), p=2)
    close(got, want)
    close(torch.autograd.grad(got.sum(), shared)[0], torch.autograd.grad(want.sum(), expanded)[0].sum((0, 1)))
    assert td.wasserstein_1d(randn(0, 4), randn(3)).shape == (0,)
    assert td.wasserstein_1d(randn(0, 4), randn(3), reduction="mean") == 0


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("p", (1, 2))
def test_dtypes(dtype, p):
    u, v = randn(4, 100, dtype=dtype).requires_grad_(), randn(4, 60).float()
    got = td.wasserstein_1d(u, v, p=p)
    assert got.dtype == torch.float32
    wide = u.detach().double().requires_grad_()
    want = td.wasserstein_1d(wide, v.double(), p=p)
    close(got.double(), want, rtol=2e-7, atol=0)
    grad, wide_grad = torch.autograd.grad(got.sum(), u)[0], torch.autograd.grad(want.sum(), wide)[0]
    assert grad.dtype == dtype
    close(grad, wide_grad.to(dtype))


def test_accuracy_in_float32():
    """Distances far smaller than the positions lose nothing but what the positions lost."""
    u = randn(1000).float() + 1000
    v = u + 2.0**-13
    close(td.wasserstein_1d(u, v, p=2).double(), (v.double() - u.double()).square().mean(), rtol=2e-7, atol=0)
    a = weights(1000, dtype=torch.float32)
    assert td.wasserstein_1d(u, u, a, a, p=2) == 0


def test_weights_near_the_rounding_of_float32():
    """Masses that differ in the last digits count where the line is long, in the loss and its slopes."""
    u = torch.tensor([0.0, 1e6]).requires_grad_()
    v, share = torch.tensor([0.0, 1e6]), 2.0**-22
    a, b = torch.tensor([1.0, share]), torch.tensor([1 - share, 2 * share])
    value = td.wasserstein_1d(u, v, a, b)
    close(value, torch.tensor(share * 1e6))
    for create_graph in (False, True):
        slopes = torch.autograd.grad(value, u, retain_graph=True, create_graph=create_graph)[0]
        close(slopes, torch.tensor([-share, 0.0]))


def test_nan_and_infinities():
    u, v = randn(2, 4), randn(2, 3)
    u[1, 2] = torch.nan
    value = td.wasserstein_1d(u, v)
    assert value[0].isfinite() and value[1].isnan()
    u[1, 2] = torch.inf
    assert td.wasserstein_1d(u, v)[1] == torch.inf


def test_errors():
    u, v, a, b = (t.cpu() for t in (randn(2, 6), randn(2, 5), weights(2, 6), weights(2, 5)))
    w = td.wasserstein_1d
    raises(lambda: w(u, v, torch.stack((a[0], 2 * a[1])), b), "a sums to 2", "row 1", "equal masses")
    raises(lambda: w(u, v, a * (1 + 1e-9), b), "equal masses")
    raises(lambda: w(u, v, 2 * a), "b to 1")
    raises(lambda: w(u, v, a - 0.5, b), "a holds -", "not negative")
    raises(lambda: w(u, v, a, torch.full_like(b, torch.inf)), "b holds inf")


@pytest.mark.parametrize("device", ("cpu", "meta"))
def test_errors_in_arguments(device):
    u, v, b = (t.to(device) for t in (randn(2, 6), randn(2, 5), weights(2, 5)))
    w = td.wasserstein_1d
    raises(lambda: w(u, v, p=0.99), "p is 0.99", "at least 1")
    raises(lambda: w(u, v, p=float("nan")), "p is nan")
    raises(lambda: w(u, v, dim=2), "dim is 2")
    raises(lambda: w(u, v[:1]), "v has rows of shape [1]", "[2]")
    raises(lambda: w(u, v[None]), "u has shape [2, 6]", "3 dimensions")
    raises(lambda: w(u, v, b), "a has 5 weights", "expected 6")
    raises(lambda: w(u[:, :0], v), "u has no points")
    raises(lambda: w(u, v.float()), "u has dtype Double", "v Float")
    raises(lambda: w(u.int(), v), "u has dtype Int")
    raises(lambda: w(u, v, reduction="average"), "reduction", "average")
    if device == "meta":
        raises(lambda: w(randn(2, 6), v), "v is on meta")


def test_vmap_and_functional_transforms():
    u, v, a = randn(3, 6), randn(5), weights(3, 6)
    f = lambda u, a: td.wasserstein_1d(u, v, a, p=2)  # noqa: E731
    close(torch.func.vmap(f)(u, a), f(u, a))
    close(torch.func.vmap(f, in_dims=(1, None))(u.t().contiguous(), a[0]), f(u, a[0]))
    grad = torch.func.grad(lambda u: f(u, a[0]))
    close(torch.func.vmap(grad)(u), torch.stack([grad(t) for t in u]))
    close(torch.func.hessian(lambda u: f(u, a[0]))(u[0]), torch.diag(2 * a[0]))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck():
    ops = torch.ops.torch_divergence
    for grad in (False, True):
        u, v = randn(2, 4).requires_grad_(grad), randn(3).requires_grad_(grad)
        torch.library.opcheck(ops.wasserstein_1d.default, (u, v), {"p": 1.5, "reduction": "mean"})
        torch.library.opcheck(ops.wasserstein_1d.default, (u, v, weights(4).requires_grad_(grad), weights(2, 3)))
        u, v, b = (t.requires_grad_(grad) for t in (randn(2, 4).sort()[0], randn(2, 3).sort()[0], weights(2, 3)))
        torch.library.opcheck(ops._wasserstein_1d.default, (u, v, None, b, 3.0))
        for mask in ([True] * 2 + [False, True], [True] + [False] * 3):
            torch.library.opcheck(ops._wasserstein_1d_backward.default, (randn(2), u, v, None, b, 3.0, mask))
        args = (u.detach(), v.detach(), None, b.detach(), True, grad)
        torch.library.opcheck(ops._wasserstein_1d_tree.default, args)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compile(backend):
    f = torch.compile(lambda u, v, a: td.wasserstein_1d(u, v, a, p=2).sum(), fullgraph=True, backend=backend)
    for n in (4, 6):
        x = (randn(2, n).requires_grad_(), randn(3).requires_grad_(), weights(2, n).requires_grad_())
        value, want = f(*x), td.wasserstein_1d(*x, p=2).sum()
        close(value, want)
        close(torch.autograd.grad(value, x), torch.autograd.grad(want, x))


def test_module():
    u, v, a = randn(2, 4), randn(2, 3), weights(2, 4)
    assert torch.equal(td.Wasserstein1dLoss()(u, v), td.wasserstein_1d(u, v))
    assert torch.equal(td.Wasserstein1dLoss(p=3, reduction="none")(u, v, a), td.wasserstein_1d(u, v, a, p=3))
    assert not td.Wasserstein1dLoss().state_dict()
