"""Sliced Wasserstein: a mean of wasserstein_1d over projections."""

import pytest
import torch
import torch_divergence as td
from torch.autograd import gradcheck, gradgradcheck
from transport import case, on_simplex, raises, weights

close = torch.testing.assert_close


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def seeded(seed=0):
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def test_reference_case():
    value, x, y, a, b, projections = case("sliced_w2_fixed_projections", "x", "y", "a", "b", "projections")
    got = td.sliced_wasserstein(x, y, a, b, projections=projections)
    close(got.sqrt().item(), value, rtol=1e-13, atol=0)


@pytest.mark.parametrize("p", (1, 2, 3))
def test_is_the_mean_over_projections(p):
    x, y, a, b, theta = randn(2, 6, 3), randn(5, 3), weights(6), weights(2, 5), randn(4, 3)
    got = td.sliced_wasserstein(x, y, a, b, p=p, projections=theta)
    for k in range(2):
        slices = [td.wasserstein_1d(x[k] @ t, y @ t, a, b[k], p=p) for t in theta]
        close(got[k], sum(slices) / 4)


def test_closed_forms():
    x, shift = randn(30, 4), randn(4)
    theta = randn(200, 4)
    close(td.sliced_wasserstein(x, x + shift, projections=theta), (theta @ shift).square().mean())
    # A matrix product may round a row by its place: dyadic numbers have exact products.
    dyadic, directions = (8 * x).round(), (8 * theta).round()
    assert td.sliced_wasserstein(dyadic, dyadic[torch.randperm(30)], projections=directions) == 0
    # Directions are even on the sphere: the mean of <theta, s>^2 is |s|^2 / D.
    many = td.sliced_wasserstein(x[:1], x[:1] + shift, n_projections=20000, generator=seeded())
    close(many, shift.square().sum() / 4, rtol=0.03, atol=0)
    # On the line every direction is +1 or -1.
    u, v = randn(7, 1), randn(9, 1)
    close(td.sliced_wasserstein(u, v, n_projections=5), td.wasserstein_1d(u[:, 0], v[:, 0], p=2))


def test_bounded_by_the_exact_distance():
    x, y = randn(20, 3), randn(20, 3)
    assert td.sliced_wasserstein(x, y) <= td.wasserstein(x, y, p=2)


def test_deterministic_under_a_generator():
    x, y = randn(6, 3, dtype=torch.float32), randn(5, 3, dtype=torch.float32)
    first = td.sliced_wasserstein(x, y, generator=seeded(1))
    assert torch.equal(first, td.sliced_wasserstein(x, y, generator=seeded(1)))
    assert not torch.equal(first, td.sliced_wasserstein(x, y, generator=seeded(2)))
    torch.manual_seed(3)
    drawn = td.sliced_wasserstein(x, y)
    torch.manual_seed(3)
    assert torch.equal(drawn, td.sliced_wasserstein(x, y))


@pytest.mark.parametrize("p", (1, 2))
def test_derivatives(p):
    inputs = tuple(t.requires_grad_() for t in (randn(2, 4, 2), randn(3, 2), randn(4), randn(2, 3), randn(3, 2)))
    f = lambda x, y, s, t, theta: td.sliced_wasserstein(  # noqa: E731
        x, y, on_simplex(s), on_simplex(t), p=p, projections=theta
    )
    assert gradcheck(f, inputs, check_forward_ad=True)
    assert gradgradcheck(f, inputs)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_dtypes_and_autocast(dtype):
    x, y = randn(20, 3, dtype=dtype).requires_grad_(), randn(15, 3, dtype=dtype)
    theta = randn(8, 3, dtype=torch.float32)
    value = td.sliced_wasserstein(x, y, projections=theta)
    assert value.dtype == torch.float32
    close(value.double(), td.sliced_wasserstein(x.double(), y.double(), projections=theta.double()), rtol=1e-5, atol=0)
    value.backward()
    assert x.grad.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(td.sliced_wasserstein(x, y, projections=theta), value)


@pytest.mark.parametrize("scale", (1e-3, 1))
@pytest.mark.parametrize("offset", (0, 1e4))
def test_offsets_lose_no_digits(offset, scale):
    x, y, theta = (randn(*shape, dtype=torch.float32) for shape in ((50, 3), (40, 3), (16, 3)))
    x, y = (scale * (x + offset)).requires_grad_(), (scale * (y + offset)).requires_grad_()
    value = td.sliced_wasserstein(x, y, projections=theta)
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    want = td.sliced_wasserstein(*wide, projections=theta.double())
    close(value.double(), want, rtol=2e-6, atol=0)
    for got, exact in zip(torch.autograd.grad(value, (x, y)), torch.autograd.grad(want, wide), strict=True):
        close(got.double(), exact, rtol=1e-4, atol=1e-6 * scale)


def test_infinities_stay_where_they_are():
    x, y = randn(2, 5, 3), randn(4, 3)
    theta = torch.eye(3, dtype=torch.float64)
    want = td.sliced_wasserstein(x[1], y, projections=theta)
    x[0, 2] = torch.inf
    value = td.sliced_wasserstein(x, y, projections=theta)
    assert not value[0].isfinite()
    close(value[1], want)


def test_reductions_and_module():
    x, y, theta = randn(4, 6, 2), randn(4, 5, 2), randn(3, 2)
    rows = td.sliced_wasserstein(x, y, projections=theta)
    close(td.sliced_wasserstein(x, y, projections=theta, reduction="sum"), rows.sum())
    criterion = td.SlicedWassersteinLoss()
    close(criterion(x, y, projections=theta), rows.mean())
    close(criterion(x, y, generator=seeded()), criterion(x, y, generator=seeded()))
    a = weights(6)
    got = td.SlicedWassersteinLoss(p=1, reduction="none")(x, y, a, None, theta)
    close(got, td.sliced_wasserstein(x, y, a, p=1, projections=theta))


def test_errors():
    x, y = randn(6, 2), randn(5, 2)
    w = td.sliced_wasserstein
    raises(lambda: w(x, y, p=0), "sliced_wasserstein", "p is 0")
    raises(lambda: w(x, y, n_projections=0), "n_projections is 0")
    raises(lambda: w(x, y, projections=randn(3, 4)), "projections has shape [3, 4]", "(L, 2)")
    raises(lambda: w(x, y, projections=randn(0, 2)), "projections has shape [0, 2]")
    raises(lambda: w(x, y, projections=randn(3, 2).float()), "projections Float")
    raises(lambda: w(x, y, projections=randn(3, 2), generator=seeded()), "generator", "projections")
    raises(lambda: w(x, y[:, :1]), "y has points of dimension 1")
    raises(lambda: w(x, y, weights(5)), "a has shape [5]", "6 weights")
    raises(lambda: w(x.cpu(), y.cpu(), 2 * weights(6).cpu()), "equal masses")
    raises(lambda: w(x.to("meta"), y.to("meta"), weights(5).to("meta")), "a has shape [5]")


def test_vmap():
    x, y, theta = randn(3, 6, 2), randn(5, 2), randn(4, 2)
    f = lambda x: td.sliced_wasserstein(x, y, projections=theta)  # noqa: E731
    close(torch.func.vmap(f)(x), f(x))
    close(torch.func.vmap(torch.func.grad(f))(x), torch.stack([torch.func.grad(f)(t) for t in x]))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck():
    op = torch.ops.torch_divergence.sliced_wasserstein.default
    for grad in (False, True):
        x, y = randn(2, 4, 2).requires_grad_(grad), randn(3, 2).requires_grad_(grad)
        torch.library.opcheck(op, (x, y), {"projections": randn(5, 2), "reduction": "mean"})


@pytest.mark.slow
def test_compile():
    f = torch.compile(lambda x, y, t: td.sliced_wasserstein(x, y, projections=t), fullgraph=True, backend="aot_eager")
    for n in (4, 6):
        x, y, theta = randn(n, 2).requires_grad_(), randn(3, 2), randn(5, 2)
        value, want = f(x, y, theta), td.sliced_wasserstein(x, y, projections=theta)
        close(value, want)
        close(torch.autograd.grad(value, x), torch.autograd.grad(want, x))
    drawn = torch.compile(lambda x, y: td.sliced_wasserstein(x, y), fullgraph=True, backend="aot_eager")
    assert drawn(randn(4, 2), randn(5, 2)) > 0
