"""The VAE's loss: against torch.distributions, its options, and how it meets the rest of PyTorch."""

import math

import mpmath
import pytest
import torch
import torch_divergence as td
from torch import distributions
from torch.autograd import gradcheck, gradgradcheck

OPTIONS = (
    {},
    {"beta": 4.0, "reduction": "sum"},
    {"likelihood": "gaussian", "scale": 0.3, "reduction": "none"},
    {"likelihood": "gaussian", "beta": 0.0},
    {"free_bits": 0.2},
)
each = pytest.mark.parametrize("options", OPTIONS, ids=str)


def inputs(dtype=torch.float64, batch=3):
    torch.manual_seed(0)
    x, mean, log_var = (torch.randn(batch, *shape, dtype=torch.float64) for shape in ((2, 3), (4,), (4,)))
    data = torch.rand(batch, 2, 3, dtype=torch.float64)
    return tuple(t.to(dtype).requires_grad_() for t in (x, data, mean, log_var))


def reference(x, data, mean, log_var, beta=1.0, likelihood="bernoulli", scale=1.0, free_bits=0.0, reduction="mean"):
    if likelihood == "bernoulli":
        nll = torch.nn.functional.binary_cross_entropy_with_logits(x, data, reduction="none")
    else:
        nll = -distributions.Normal(x, scale).log_prob(data)
    prior = distributions.Normal(torch.zeros_like(mean), 1.0)
    kl = distributions.kl_divergence(distributions.Normal(mean, (log_var / 2).exp()), prior)
    if free_bits:
        kl = kl.mean(0).clamp_min(free_bits).expand_as(kl)
    rows = nll.flatten(1).sum(-1) + beta * kl.flatten(1).sum(-1)
    return {"none": rows, "mean": rows.mean(), "sum": rows.sum()}[reduction]


@each
def test_formula(options):
    x = inputs()
    value, expected = td.vae_loss(*x, **options), reference(*x, **options)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(value.sum(), x), torch.autograd.grad(expected.sum(), x, materialize_grads=True)
    )


@each
def test_derivatives(options):
    x = inputs()

    def f(*t):
        return td.vae_loss(*t, **options)

    assert gradcheck(f, x, check_forward_ad=True)
    assert gradgradcheck(f, x)


@each
def test_transforms(options):
    x = inputs()

    def f(*t):
        return td.vae_loss(*t, **options)

    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(*x), f(*x))
    stacked = tuple(torch.stack((t, t + 0.1)) for t in x[2:])
    stacked = (*(torch.stack((t, t)) for t in x[:2]), *stacked)
    torch.testing.assert_close(torch.vmap(f)(*stacked), torch.stack([f(*(t[i] for t in stacked)) for i in range(2)]))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_dtypes(dtype):
    x = inputs(dtype)
    value = td.vae_loss(*x)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), td.vae_loss(*(t.double() for t in x)), rtol=2e-6, atol=0)
    assert all(g.dtype == dtype for g in torch.autograd.grad(value, x))


def test_small_divergence():
    """An encoder that is nearly the prior: the textbook formula has no digits left here."""
    mean, log_var = torch.full((1, 8), 1e-5), torch.full((1, 8), 1e-5)
    zero = torch.zeros(1, 0)
    exact = 8 * 0.5 * (math.expm1(1e-5) - 1e-5 + 1e-10)
    mean64, var64 = mean.double(), log_var.double()
    exact = (0.5 * (torch.expm1(var64) - var64 + mean64**2)).sum().item()
    assert math.isclose(td.vae_loss(zero, zero, mean, log_var).item(), exact, rel_tol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_digits_of_bernoulli(dtype):
    """Values and derivatives to the second where softplus(x) and x data, or sigmoid(x) and data, nearly cancel."""
    sizes, eps = (0.0, 1e-4, 0.7, 5.0, 15.0, 30.0, 80.0), torch.finfo(dtype).eps
    pairs = [(s * x, y) for x in sizes for s in (1, -1) for y in (0.0, 1.0, 1 - 2 * eps, 1e-9, 0.5, 0.3)]
    x, data = torch.tensor(pairs, dtype=dtype).unbind(-1)
    x, data = x.clone().requires_grad_(), data.clone().requires_grad_()
    none = torch.zeros(len(pairs), 1, dtype=dtype)
    value = td.vae_loss(x.unsqueeze(-1), data.unsqueeze(-1), none, none, reduction="none")
    by_x, by_data = torch.autograd.grad(value.sum(), (x, data), create_graph=True)
    by_xx, by_x_data = torch.autograd.grad(by_x.sum(), (x, data))
    assert torch.equal(by_data, -x) and (by_x_data == -1).all()
    for i, (logit, y) in enumerate(zip(x.tolist(), data.tolist(), strict=True)):
        with mpmath.workdps(60):
            a, b = mpmath.mpf(logit), mpmath.mpf(y)
            sigmoid, rest = 1 / (1 + mpmath.exp(-a)), 1 / (1 + mpmath.exp(a))
            want = mpmath.log1p(mpmath.exp(a)) - a * b
            assert abs(value[i].item() - want) <= 4 * eps * want, (logit, y)
            # Where sigmoid(x) = data the gradient is the difference of two rounded numbers, the smaller two of four.
            terms = min(sigmoid + b, rest + 1 - b)
            assert abs(by_x[i].item() - (sigmoid - b)) <= 4 * eps * terms, (logit, y)
            assert abs(by_xx[i].item() - sigmoid * rest) <= 8 * eps * sigmoid * rest, (logit, y)


@pytest.mark.parametrize("options", ({}, {"free_bits": 0.1}, {"reduction": "none"}), ids=str)
@pytest.mark.parametrize("log_var", (1000.0, -math.inf, math.nan))
def test_beta_0_leaves_the_divergence_out(log_var, options):
    x, data, mean, _ = inputs()
    v = torch.full((3, 4), log_var, dtype=torch.float64, requires_grad=True)
    value = td.vae_loss(x, data, mean, v, beta=0.0, **options)
    nll = reference(x, data, mean.detach(), torch.zeros(3, 4), beta=0.0, reduction=options.get("reduction", "mean"))
    torch.testing.assert_close(value, nll)
    for g in torch.autograd.grad(value.sum(), (mean, v)):
        assert g.shape == (3, 4) and (g == 0).all()


def test_infinite_logits():
    x = torch.tensor([[math.inf, -math.inf, 0.0]], requires_grad=True)
    none = torch.zeros(1, 1)
    agrees = td.vae_loss(x, torch.tensor([[1.0, 0.0, 1.0]]), none, none)
    assert math.isclose(agrees.item(), math.log(2), rel_tol=1e-6)
    assert torch.autograd.grad(agrees, x)[0].tolist() == [[0.0, 0.0, -0.5]]
    assert td.vae_loss(x, torch.tensor([[1.0, 1.0, 1.0]]), none, none) == math.inf


@pytest.mark.parametrize(
    "change, words",
    (
        ({"data": torch.ones(3, 5)}, ["data", "[3, 5]"]),
        ({"log_var": torch.ones(3, 5)}, ["log_var", "[3, 5]"]),
        ({"mean": torch.ones(2, 4), "log_var": torch.ones(2, 4)}, ["mean", "[2, 4]"]),
        ({"mean": torch.ones(3, 4).double(), "log_var": torch.ones(3, 4).double()}, ["mean", "float64"]),
        ({"data": torch.ones(3, 2, 3).long()}, ["data", "Long"]),
        ({"beta": -1.0}, ["beta", "-1"]),
        ({"scale": 0.5}, ["scale", "0.5", "bernoulli"]),
        ({"scale": 0.0, "likelihood": "gaussian"}, ["scale", "0"]),
        ({"likelihood": "poisson"}, ["likelihood", "poisson"]),
        ({"free_bits": -1.0}, ["free_bits", "-1"]),
        ({"free_bits": 0.1, "reduction": "none"}, ["reduction", "none", "free_bits"]),
        ({"reduction": "avg"}, ["reduction", "avg"]),
    ),
)
def test_bad_input(change, words):
    good = {"reconstruction": torch.ones(3, 2, 3), "data": torch.ones(3, 2, 3), "mean": torch.ones(3, 4)}
    with pytest.raises(ValueError) as error:
        td.vae_loss(**{**good, "log_var": torch.ones(3, 4), **change})
    assert all(word in str(error.value) for word in words), error.value


def test_module():
    x = inputs()
    for options in OPTIONS:
        criterion = td.VAELoss(**options)
        assert torch.equal(criterion(*x), td.vae_loss(*x, **options))
        assert not criterion.state_dict()
