"""W_2^2 of Gaussians: values, gradients at equal and singular covariances, all modes of differentiation."""

import mpmath
import pytest
import torch
import torch_divergence as td
from torch.autograd import gradcheck, gradgradcheck
from transport import case, raises

close = torch.testing.assert_close


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def covariance(*batch, d=3):
    a = randn(*batch, d, d)
    return a @ a.mT / d + 0.2 * torch.eye(d, dtype=torch.float64)


def root(s):
    values, vectors = torch.linalg.eigh(s)
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)) @ vectors.mT


def by_traces(m1, s1, m2, s2):
    r = root(s1)
    traces = (s1 + s2 - 2 * root(r @ s2 @ r)).diagonal(dim1=-2, dim2=-1).sum(-1)
    return (m1 - m2).square().sum(-1) + traces


def bures(s1, s2):
    zero = torch.zeros(s1.shape[-1], dtype=s1.dtype)
    return td.gaussian_wasserstein(zero, s1, zero, s2)


def test_reference_case():
    value, *arguments = case("bures_wasserstein_sq", "m1", "S1", "m2", "S2")
    close(td.gaussian_wasserstein(*arguments).item(), value, rtol=1e-14, atol=0)


@pytest.mark.parametrize("d", (1, 2, 5, 40))
def test_values_and_gradients(d):
    inputs = [t.requires_grad_() for t in (randn(2, d), covariance(2, d=d), randn(2, d), covariance(2, d=d))]
    got, want = td.gaussian_wasserstein(*inputs), by_traces(*inputs)
    close(got, want, rtol=1e-11, atol=0)
    got, want = (torch.autograd.grad(v.sum(), inputs) for v in (got, want))
    for g, w in zip(got, want, strict=True):
        w = w if w.dim() == 2 else (w + w.mT) / 2
        close(g, w, rtol=1e-9, atol=1e-10)


def test_closed_forms():
    mean, s = randn(3), covariance()
    close(td.gaussian_wasserstein(mean, s, mean + 2, s).item(), 12.0)
    close(bures(s, 4 * s), s.trace())  # (2 - 1)^2 tr S
    d1, d2 = torch.rand(4).double(), torch.rand(4).double()
    close(bures(d1.diag(), d2.diag()), (d1.sqrt() - d2.sqrt()).square().sum())
    close(bures(s, torch.zeros(3, 3).double()), s.trace())
    v, w = randn(3), randn(3)  # rank one: tr - 2 |<v, w>|
    close(bures(v.outer(v), w.outer(w)), v @ v + w @ w - 2 * (v @ w).abs())


def test_symmetric_in_its_arguments():
    s1, s2 = covariance(), covariance()
    close(bures(s1, s2), bures(s2, s1), rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("rank", (0, 1, 3))
def test_equal_covariances(dtype, rank):
    full = 2 * torch.eye(3, dtype=torch.float64) + 0.2 * randn(3, 3)
    a = full[:, : max(rank, 1)] * (rank > 0)
    s = (a @ a.mT).to(dtype)
    s1, s2 = s.clone().requires_grad_(), s.clone().requires_grad_()
    value = bures(s1, s2)
    assert value == 0
    for grad in torch.autograd.grad(value, (s1, s2)):
        assert grad.isfinite().all()
        along = grad.double() @ a.to(dtype).double()  # on the range: the derivative along any a + da
        assert along.abs().max() <= (1e-9 if dtype == torch.float64 else 1e-2 if rank == 3 else 2e-2)
    if rank == 3 and dtype == torch.float64:
        grad = torch.autograd.grad(bures(s1, s2), s1, create_graph=True)[0]
        hessian_product = torch.autograd.grad(grad.diagonal().sum(), s1)[0]
        h = 1e-4
        eye = torch.eye(3, dtype=dtype)
        shifted = (s + h * eye).requires_grad_(), (s - h * eye).requires_grad_()
        up, down = (torch.autograd.grad(bures(t, s), t)[0] for t in shifted)
        close(hessian_product, (up - down) / (2 * h), rtol=1e-5, atol=1e-6)


def bures_exactly(s1, s2):
    with mpmath.workdps(60):
        m1, m2 = (mpmath.matrix(s.tolist()) for s in (s1, s2))
        values, vectors = mpmath.eigsy(m1)
        r = vectors * mpmath.diag([mpmath.sqrt(v) for v in values]) * vectors.T
        traces = [sum(m[k, k] for k in range(m.rows)) for m in (m1, m2)]
        return float(sum(traces) - 2 * sum(mpmath.sqrt(v) for v in mpmath.eigsy(r * m2 * r, eigvals_only=True)))


@pytest.mark.parametrize("size", (1, 0.1, 1e-3, 1e-6, 1e-9, 1e-12))
def test_close_covariances_do_not_cancel(size):
    for d in (1, 3, 8):
        s, other = covariance(d=d), covariance(d=d)
        s = (s + s.mT) / 2  # a product may be symmetric but for rounding, which is not small beside what is added here
        other = s + size * (other + other.mT) / 2
        close(bures(s, other).item(), bures_exactly(s, other), rtol=1e-11, atol=0)


def test_singular_covariances():
    """The chain through a factor S = L L' has the derivative of the exact distance, whatever the ranks."""
    for r1, r2 in ((1, 3), (2, 3), (1, 1), (2, 2), (3, 1)):
        l1, l2 = randn(3, r1).requires_grad_(), randn(3, r2)
        got = torch.autograd.grad(bures(l1 @ l1.mT, l2 @ l2.mT), l1)[0]
        # |L1|^2 + |L2|^2 - 2 |L2' L1|_nuclear
        want = l1.square().sum() + l2.square().sum() - 2 * torch.linalg.svdvals(l2.mT @ l1).sum()
        close(bures(l1 @ l1.mT, l2 @ l2.mT), want, rtol=1e-7, atol=1e-7)
        if r1 <= r2:
            close(got, torch.autograd.grad(want, l1)[0], rtol=1e-6, atol=1e-6)
        assert got.isfinite().all()
    zero = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    grad = torch.autograd.grad(bures(zero, covariance()), zero)[0]
    close(grad, torch.eye(3, dtype=torch.float64))
    s = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64)).requires_grad_()
    first = torch.autograd.grad(bures(s, 4 * s.detach()), s, create_graph=True)[0]
    close(first, torch.diag(torch.tensor([-1.0, 1.0], dtype=torch.float64)))
    assert torch.autograd.grad(first.sum(), s)[0].isfinite().all()


def test_derivatives():
    inputs = tuple(t.requires_grad_() for t in (randn(2), covariance(2, d=2), randn(2, 2), covariance(d=2)))
    f = td.gaussian_wasserstein
    assert gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(f, inputs, check_batched_grad=True)
    assert gradgradcheck(f, inputs, check_fwd_over_rev=True, check_rev_over_rev=False, check_undefined_grad=False)
    third = lambda *x: torch.autograd.grad(f(*x).sum(), x, create_graph=True)  # noqa: E731
    assert gradgradcheck(third, inputs)


def test_one_side_only():
    s, other = covariance(d=2).requires_grad_(), covariance(d=2)
    assert gradcheck(lambda s: bures(s, other), s, check_forward_ad=True)
    assert gradgradcheck(lambda s: bures(other, s), s)


def test_the_symmetric_part_is_taken():
    s, other, skew = covariance(), covariance(), randn(3, 3)
    close(bures(s + skew - skew.mT, other), bures(s, other))


def test_batches_and_sharing():
    m1, s1, m2, s2 = randn(4, 3), covariance(4), randn(3), covariance()
    value = td.gaussian_wasserstein(m1, s1, m2, s2)
    assert value.shape == (4,)
    for i in range(4):
        close(value[i], td.gaussian_wasserstein(m1[i], s1[i], m2, s2))
    assert td.gaussian_wasserstein(m1[:0], s1[:0], m2, s2).shape == (0,)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_dtypes(dtype):
    given = (randn(3), covariance(), randn(3), covariance())
    inputs = [t.to(dtype).requires_grad_() for t in given]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    value, want = td.gaussian_wasserstein(*inputs), td.gaussian_wasserstein(*wide)
    assert value.dtype == torch.float32
    close(value.double(), want, rtol=2e-7, atol=0)
    for g, w, t in zip(torch.autograd.grad(value, inputs), torch.autograd.grad(want, wide), inputs, strict=True):
        assert g.dtype == t.dtype
        close(g, w.to(dtype))


def test_nan_and_indefinite():
    s, bad = covariance(2), covariance(2)
    bad[1, 0, 0] = torch.nan
    value = bures(s, bad)
    assert value[0].isfinite() and value[1].isnan()
    bad[1] = torch.diag(torch.tensor([1.0, 1.0, -0.1]))
    value = bures(bad.requires_grad_(), s)
    assert value[0].isfinite() and value[1].isnan()
    grad = torch.autograd.grad(value.sum(), bad)[0]
    assert grad[0].isfinite().all() and grad[1].isnan().all()


@pytest.mark.parametrize("device", ("cpu", "meta"))
def test_errors(device):
    m, s = randn(3).to(device), covariance().to(device)
    w = td.gaussian_wasserstein
    raises(lambda: w(m, s, m[:2], s), "gaussian_wasserstein", "mean2 has shape [2]", "3")
    raises(lambda: w(m, s[:2], m, s), "cov1 has shape [2, 3]")
    raises(lambda: w(m, m, m, s), "cov1 has shape [3]", "(D, D)")
    raises(lambda: w(m.expand(2, 3), s, m.expand(4, 3), s), "mean2 has a batch of 4", "expected 2")
    raises(lambda: w(m, s.float(), m, s), "cov1 Float")
    raises(lambda: w(m[:0], s[:0, :0], m[:0], s[:0, :0]), "mean1 has shape [0]")


def test_vmap_and_functional_transforms():
    m, s, other = randn(3), covariance(4), covariance()
    f = lambda s: td.gaussian_wasserstein(m, s, m, other)  # noqa: E731
    close(torch.func.vmap(f)(s), f(s))
    close(torch.func.vmap(torch.func.grad(f))(s), torch.stack([torch.func.grad(f)(t) for t in s]))
    close(torch.func.jacrev(torch.func.grad(f))(s[0]), torch.func.jacfwd(torch.func.grad(f))(s[0]))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck():
    ops = torch.ops.torch_divergence
    for grad in (False, True):
        inputs = [t.requires_grad_(grad) for t in (randn(2), covariance(2, d=2), randn(2, 2), covariance(d=2))]
        torch.library.opcheck(ops.gaussian_wasserstein.default, inputs)
        s1, s2 = covariance(2, d=2).requires_grad_(grad), covariance(2, d=2).requires_grad_(grad)
        torch.library.opcheck(ops._bures.default, (s1, s2, 1e-15))
    _, map12, _, y1, y2, s = ops._bures(s1.detach(), s2.detach(), 1e-15)
    for transposed in (False, True):
        z = randn(2, 2, 2).requires_grad_()
        torch.library.opcheck(ops._bures_lyapunov.default, (s1.detach() @ map12, y1, y2, s, z, transposed))


@pytest.mark.slow
def test_compile():
    f = torch.compile(td.gaussian_wasserstein, fullgraph=True, backend="aot_eager")
    for n in (2, 3):
        inputs = [t.requires_grad_() for t in (randn(n, 3), covariance(n), randn(3), covariance())]
        value, want = f(*inputs).sum(), td.gaussian_wasserstein(*inputs).sum()
        close(value, want)
        close(torch.autograd.grad(value, inputs), torch.autograd.grad(want, inputs))
