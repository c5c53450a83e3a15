"""Exact transport in any dimension: the simplex method, and the loss on its tree."""

import pytest
import torch
import torch_divergence as td
from torch.autograd import gradcheck, gradgradcheck
from transport import case, on_simplex, raises, weights

close = torch.testing.assert_close
POWERS = (1, 1.5, 2, 3)


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def by_linear_programming(x, y, a, b, p):
    optimize = pytest.importorskip("scipy.optimize", reason="scipy solves the same linear program independently")
    n, m = len(x), len(y)
    cost = (x[:, None] - y[None]).norm(dim=-1).pow(p).flatten().numpy()
    rows, cols = torch.eye(n).repeat_interleave(m, 1), torch.eye(m).repeat(1, n)
    result = optimize.linprog(
        cost, A_eq=torch.cat((rows, cols)).numpy(), b_eq=torch.cat((a, b)).numpy(), method="highs"
    )
    assert result.success
    return result.fun


def test_reference_case():
    value, *arguments = case("exact_emd_euclidean", "x", "y", "a", "b")
    close(td.wasserstein(*arguments).item(), value, rtol=1e-13, atol=0)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize(
    "n, m, zeros", ((1, 1, ()), (1, 7, ()), (7, 1, ()), (6, 9, (0, 3)), (20, 15, (4, 14)), (12, 12, ()))
)
def test_against_linear_programming(n, m, zeros, p):
    x, y = randn(n, 3), randn(m, 3)
    a = weights(n, zeros=[z for z in zeros if z < n])
    b = weights(m, zeros=[z for z in zeros if z < m])
    close(td.wasserstein(x, y, a, b, p=p).item(), by_linear_programming(x, y, a, b, p), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("p", (1, 2))
def test_against_the_assignment_problem(p):
    optimize = pytest.importorskip("scipy.optimize", reason="scipy solves the assignment problem independently")
    for n in (2, 50, 300):
        x, y = randn(n, 2), randn(n, 2)
        cost = (x[:, None] - y[None]).norm(dim=-1).pow(p)
        rows, cols = optimize.linear_sum_assignment(cost.numpy())
        close(td.wasserstein(x, y, p=p), cost[rows, cols].mean(), rtol=1e-12, atol=0)


def test_against_the_network_simplex_of_pot():
    ot = pytest.importorskip("ot", reason="POT solves the same problem independently")
    for n, m in ((100, 130), (400, 300)):
        x, y, a, b = randn(n, 3), randn(m, 3) + 0.5, weights(n), weights(m)
        cost = (x[:, None] - y[None]).norm(dim=-1)
        want = ot.emd2(a.numpy(), b.numpy(), cost.numpy(), numItermax=10**7)
        close(td.wasserstein(x, y, a, b).item(), want, rtol=1e-11, atol=0)


@pytest.mark.parametrize("p", POWERS)
def test_closed_forms(p):
    x, shift = randn(40, 3), torch.tensor([1.0, 2.0, -2.0], dtype=torch.float64)
    a = weights(40)
    close(td.wasserstein(x, x + shift, a, a, p=p).item(), 3.0**p)  # a translation
    close(td.wasserstein(x[:1], x[:1] + shift, p=p).item(), 3.0**p)  # Diracs
    close(td.wasserstein(x, x[torch.randperm(40)], p=p).item(), 0.0, atol=1e-15, rtol=0)
    # Two points: what does not stay crosses.
    ends = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    w = td.wasserstein(
        ends, ends, torch.tensor([0.7, 0.3], dtype=torch.float64), torch.tensor([0.4, 0.6], dtype=torch.float64), p=p
    )
    close(w.item(), 0.3 * 2.0**p)
    # All of a cloud to one point.
    close(td.wasserstein(x, x[:1], a, p=p), (a * (x - x[0]).norm(dim=-1).pow(p)).sum())


def test_equals_the_line():
    u, v, a, b = randn(30), randn(21), weights(30, zeros=(2,)), weights(21)
    for p in POWERS:
        close(td.wasserstein(u[:, None], v[:, None], a, b, p=p), td.wasserstein_1d(u, v, a, b, p=p))


def test_metric():
    clouds = [(randn(n, 2), weights(n)) for n in (10, 13, 8)]

    def distance(i, j):
        (x, a), (y, b) = clouds[i], clouds[j]
        return td.wasserstein(x, y, a, b)

    assert distance(0, 2) <= distance(0, 1) + distance(1, 2)
    close(distance(0, 1), distance(1, 0), rtol=1e-13, atol=0)
    close(distance(0, 0).item(), 0.0, atol=1e-15, rtol=0)


def test_mass_scales_the_value():
    x, y, a, b = randn(9, 2), randn(7, 2), weights(9), weights(7)
    close(td.wasserstein(x, y, 5 * a, 5 * b), 5 * td.wasserstein(x, y, a, b))
    assert td.wasserstein(x, y, 0 * a, 0 * b) == 0


def test_points_of_weight_zero_change_nothing():
    x, y, a, b = randn(9, 2), randn(7, 2), weights(9, zeros=(0, 8)), weights(7, zeros=(3,))
    full = [x.requires_grad_(), y.requires_grad_()]
    value = td.wasserstein(x, y, a, b, p=2)
    grads = torch.autograd.grad(value, full)
    close(value, td.wasserstein(x[a > 0], y[b > 0], a[a > 0], b[b > 0], p=2))
    assert grads[0][a == 0].abs().max() < 1e-15 and grads[1][b == 0].abs().max() < 1e-15  # rounding of the flow


@pytest.mark.parametrize("p", POWERS)
def test_gradients_of_points(p):
    x, y, a, b = randn(6, 2).requires_grad_(), randn(5, 2).requires_grad_(), weights(6), weights(5)
    f = lambda x, y: td.wasserstein(x, y, a, b, p=p)  # noqa: E731
    assert gradcheck(f, (x, y), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(f, (x, y), check_batched_grad=True)
    assert gradgradcheck(f, (x, y), check_fwd_over_rev=True, check_rev_over_rev=False, check_undefined_grad=False)


@pytest.mark.parametrize("p", (1, 2))
def test_gradients_of_weights(p):
    x, y = randn(2, 5, 2).requires_grad_(), randn(4, 2).requires_grad_()
    s, t = randn(2, 5).requires_grad_(), randn(4).requires_grad_()
    f = lambda x, y, s, t: td.wasserstein(x, y, on_simplex(s), on_simplex(t), p=p)  # noqa: E731
    assert gradcheck(f, (x, y, s, t), check_forward_ad=True)
    assert gradgradcheck(f, (x, y, s, t))


def test_potentials_are_feasible_and_tight():
    x, y = randn(2, 30, 2), randn(2, 25, 2)
    a, b = weights(2, 30, zeros=(1, 2)).requires_grad_(), weights(2, 25, zeros=(0, 24)).requires_grad_()
    value = td.wasserstein(x, y, a, b)
    f, g = torch.autograd.grad(value.sum(), (a, b))
    slack = torch.cdist(x, y) - f[:, :, None] - g[:, None, :]
    assert slack.min() > -1e-12
    close((a * f).sum(-1), value / 2)  # by the gauge, half of the dual value on either side
    close((b * g).sum(-1), value / 2)


def test_many_equal_weights_and_ties():
    """Degenerate trees and equal costs, where a simplex method may go round in circles."""
    grid = torch.cartesian_prod(torch.arange(12.0), torch.arange(12.0)).double()
    assert td.wasserstein(grid, grid.flip(0)) == 0
    close(td.wasserstein(grid, grid + 1, p=1).item(), 2**0.5, rtol=1e-12, atol=0)
    close(td.wasserstein(grid, torch.zeros(3, 2).double()).item(), grid.norm(dim=-1).mean().item())
    u = torch.randint(0, 3, (150, 1)).double()
    v = torch.randint(0, 3, (90, 1)).double()
    close(td.wasserstein(u, v), td.wasserstein_1d(u[:, 0], v[:, 0]))


def test_batches_and_sharing():
    x, y, a, b = randn(3, 6, 2), randn(3, 5, 2), weights(3, 6), weights(3, 5)
    value = td.wasserstein(x, y, a, b)
    assert value.shape == (3,)
    for i in range(3):
        close(value[i], td.wasserstein(x[i], y[i], a[i], b[i]))
    shared = y[0].clone().requires_grad_()
    td.wasserstein(x, shared, a, b[0], p=2).sum().backward()
    alone = y[0].clone().requires_grad_()
    sum(td.wasserstein(x[i], alone, a[i], b[0], p=2) for i in range(3)).backward()
    close(shared.grad, alone.grad)
    assert td.wasserstein(randn(0, 4, 2), y[0]).shape == (0,)
    close(td.wasserstein(x.transpose(1, 2).contiguous().transpose(1, 2), y, a, b), value)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_dtypes(dtype):
    x, y = randn(6, 2, dtype=dtype).requires_grad_(), randn(5, 2)
    value = td.wasserstein(x, y.float(), p=2)
    assert value.dtype == torch.float32
    value.backward()
    wide = x.detach().double().requires_grad_()
    want = td.wasserstein(wide, y.float().double(), p=2)
    want.backward()
    close(value.double(), want.detach(), rtol=2e-7, atol=0)
    assert x.grad.dtype == dtype
    close(x.grad, wide.grad.to(dtype))


def test_nan_and_coincident_points():
    x, y = randn(4, 2), randn(3, 2)
    x[1, 0] = torch.nan
    assert td.wasserstein(x, y).isnan()
    same = randn(4, 2).requires_grad_()
    for p in POWERS:
        grad = torch.autograd.grad(td.wasserstein(same, same.detach(), p=p), same, create_graph=True)[0]
        assert (grad == 0).all()
        assert torch.autograd.grad(grad.sum(), same)[0].isfinite().all()


def test_errors():
    x, y, a, b = randn(6, 2), randn(5, 2), weights(6), weights(5)
    w = td.wasserstein
    raises(lambda: w(x, y, 2 * a, b), "wasserstein", "a sums to 2", "equal masses")
    raises(lambda: w(x, y, a * (1 + 1e-9), b), "equal masses")
    raises(lambda: w(x, y, a - 0.5, b), "a holds -", "not negative")
    raises(lambda: w(x, y, a, torch.full_like(b, torch.nan)), "b holds nan")


@pytest.mark.parametrize("device", ("cpu", "meta"))
def test_errors_in_arguments(device):
    x, y, b = (t.to(device) for t in (randn(6, 2), randn(5, 2), weights(5)))
    w = td.wasserstein
    raises(lambda: w(x, y, p=0.5), "p is 0.5", "at least 1")
    raises(lambda: w(x, y, p=float("inf")), "p is inf")
    raises(lambda: w(x[0], y), "x has shape [2]", "(N, D)")
    raises(lambda: w(x, y[:, :1]), "y has points of dimension 1", "expected 2")
    raises(lambda: w(x, y, b), "a has shape [5]", "expected 6 weights")
    raises(lambda: w(x[:0], y), "x has no points")
    raises(lambda: w(x[:, :0], y[:, :0]), "no dimension")
    raises(lambda: w(x.expand(3, 6, 2), y.expand(2, 5, 2)), "y has a batch of 2", "expected 3")
    raises(lambda: w(x, y.float()), "x has dtype Double", "y Float")
    raises(lambda: w(x.long(), y), "x has dtype Long")
    if device == "meta":
        raises(lambda: w(randn(6, 2), y), "y is on meta")


def test_unequal_masses_of_float32():
    x, y, a = randn(6, 2).float(), randn(5, 2).float(), weights(6, dtype=torch.float32)
    td.wasserstein(x, y, a * (1 + 5e-6))
    raises(lambda: td.wasserstein(x, y, a * (1 + 2e-5)), "equal masses")


def test_vmap_and_functional_transforms():
    x, y, a = randn(3, 6, 2), randn(5, 2), weights(3, 6)
    f = lambda x, a: td.wasserstein(x, y, a, p=2)  # noqa: E731
    close(torch.func.vmap(f)(x, a), f(x, a))
    close(torch.func.vmap(f, in_dims=(0, None))(x, a[0]), f(x, a[0]))
    grad = torch.func.grad(lambda x: f(x, a[0]))
    close(torch.func.vmap(grad)(x), torch.stack([grad(t) for t in x]))
    close(torch.func.jacrev(grad)(x[0]), torch.func.jacfwd(grad)(x[0]))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck():
    ops = torch.ops.torch_divergence
    for grad in (False, True):
        x, y = randn(2, 4, 2).requires_grad_(grad), randn(3, 2).requires_grad_(grad)
        torch.library.opcheck(ops.wasserstein.default, (x, y), {"p": 1.5})
        torch.library.opcheck(ops.wasserstein.default, (x, y, weights(4), weights(2, 3)))
    x, y = randn(2, 4, 2), randn(2, 3, 2)
    torch.library.opcheck(ops._wasserstein_tree.default, (x, y, None, None, 1.0))
    rows, cols = ops._wasserstein_tree(x, y, None, None, 1.0)
    a, b = weights(2, 4).requires_grad_(), weights(2, 3).requires_grad_()
    torch.library.opcheck(ops._transport_flow.default, (rows, cols, a, b))
    torch.library.opcheck(ops._transport_potentials.default, (rows, cols, randn(2, 6).requires_grad_(), 4, 3))


def test_flow_and_potentials_are_adjoint():
    ops = torch.ops.torch_divergence
    rows, cols = ops._wasserstein_tree(randn(2, 4, 2), randn(2, 3, 2), None, None, 1.0)
    f = lambda a, b: ops._transport_flow(rows, cols, a, b)  # noqa: E731
    g = lambda c: ops._transport_potentials(rows, cols, c, 4, 3)  # noqa: E731
    pair, c = (randn(2, 4).requires_grad_(), randn(2, 3).requires_grad_()), randn(2, 6).requires_grad_()
    assert gradcheck(f, pair, check_forward_ad=True, check_batched_grad=True)
    assert gradcheck(g, c, check_forward_ad=True, check_batched_grad=True)
    close((f(*pair) * c).sum(), sum((p * q).sum() for p, q in zip(g(c), pair, strict=True)))
    raises(lambda: ops._transport_flow(rows * 0, cols * 0, *pair), "cycle")
    raises(lambda: ops._transport_flow(rows + 9, cols, *pair), "edge 0")


@pytest.mark.slow
def test_compile():
    f = torch.compile(lambda x, y, a: td.wasserstein(x, y, a, p=2).sum(), fullgraph=True, backend="aot_eager")
    for n in (4, 6):
        x, y, a = randn(2, n, 2).requires_grad_(), randn(3, 2).requires_grad_(), weights(n).requires_grad_()
        value, want = f(x, y, a), td.wasserstein(x, y, a, p=2).sum()
        close(value, want)
        close(torch.autograd.grad(value, (x, y, a)), torch.autograd.grad(want, (x, y, a)))
