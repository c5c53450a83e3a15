"""Estimators of KL(p || q) from samples: values, gradients and what they are in expectation."""

import pickle

import mpmath
import pytest
import torch
import torch_divergence as td
from torch.autograd import gradcheck, gradgradcheck

KINDS, GRADIENTS = ("k1", "k2", "k3"), ("path", "kl", "none")
INF = float("inf")
k = pytest.mark.parametrize("kind", KINDS)


def draw(*shape, dtype=torch.float64):
    return tuple(torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(2))


@k
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_values_and_gradients(kind, dtype):
    ratio = [s * x for x in (1e-12, 1e-6, 1e-3, 0.1, 0.49, 0.51, 2.0, 30.0) for s in (1, -1)]
    q = torch.tensor(ratio, dtype=dtype, requires_grad=True)
    p = torch.zeros_like(q, requires_grad=True)
    value = td.kl_estimate(p, q, kind=kind, reduction="none")
    by_p, by_q = torch.autograd.grad(value.sum(), (p, q))
    assert torch.equal(by_p, -by_q)
    bound = 1e-13 if dtype == torch.float64 else 2e-6
    for r, got, slope in zip(q.tolist(), value.tolist(), by_q.tolist(), strict=True):
        with mpmath.workdps(60):
            x = mpmath.mpf(r)
            want = {"k1": -x, "k2": x**2 / 2, "k3": mpmath.exp(x) - 1 - x}[kind]
            want_slope = {"k1": -1, "k2": x, "k3": mpmath.exp(x) - 1}[kind]
            assert abs(got - want) <= bound * abs(want)
            assert abs(slope - want_slope) <= bound * abs(want_slope)


@k
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradient_choice(kind, gradient):
    p, q = draw(9)
    value = td.kl_estimate(p, q, kind=kind, gradient=gradient)
    assert torch.equal(value, td.kl_estimate(p, q, kind=kind))
    if gradient == "none":
        assert not value.requires_grad
        return
    want = td.kl_estimate(p, q, kind="k2" if gradient == "kl" else kind)
    for a, b in zip(torch.autograd.grad(value, (p, q)), torch.autograd.grad(want, (p, q)), strict=True):
        torch.testing.assert_close(a, b)


@k
def test_second_derivatives_of_k2_gradient(kind):
    p, q = draw(4)
    f = lambda *x: td.kl_estimate(*x, kind=kind, gradient="kl")  # noqa: E731
    want = torch.func.hessian(lambda *x: td.kl_estimate(*x, kind="k2"), (0, 1))(p, q)
    torch.testing.assert_close(torch.func.hessian(f, (0, 1))(p, q), want)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(f, (0, 1)), (0, 1))(p, q), want)


@k
@pytest.mark.parametrize("log_q", (-1e20, 1e20, torch.finfo(torch.float32).min))
def test_ratio_whose_square_overflows(kind, log_q):
    p, q = torch.tensor([-1.0], requires_grad=True), torch.tensor([log_q], requires_grad=True)
    value = td.kl_estimate(p, q, kind=kind, gradient="kl")
    assert value == td.kl_estimate(p, q, kind=kind)
    assert torch.equal(torch.cat(torch.autograd.grad(value, (p, q))), torch.tensor([-log_q, log_q]))


def within(samples, want, what):
    """The mean of the samples is `want`, to 5 standard errors."""
    error = samples.std(0) / len(samples) ** 0.5
    assert ((samples.mean(0) - want).abs() <= 5 * error + 1e-12).all(), (what, samples.mean(0), want, error)


def test_expectations_for_gaussians():
    """p = N(m, e^2s), q = N(0, 1): every estimator's value and gradient in (m, s) against the closed forms."""
    theta = torch.tensor([0.4, -0.2], dtype=torch.float64)
    n = 200_000

    def normal(t):
        return torch.distributions.Normal(t[0], t[1].exp())

    prior = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    x = normal(theta).sample((n,))
    forward = lambda t: torch.distributions.kl_divergence(normal(t), prior)  # noqa: E731
    backward = lambda t: torch.distributions.kl_divergence(prior, normal(t))  # noqa: E731
    log_q = prior.log_prob(x)
    values = {kind: td.kl_estimate(normal(theta).log_prob(x), log_q, kind=kind, reduction="none") for kind in KINDS}
    for kind in ("k1", "k3"):
        within(values[kind], forward(theta), kind)

    def per_sample(**options):
        def loss(t, sample):
            return td.kl_estimate(normal(t).log_prob(sample), prior.log_prob(sample), **options)

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(theta, x)

    of_forward, of_backward = torch.func.grad(forward)(theta), torch.func.grad(backward)(theta)
    within(per_sample(kind="k1"), torch.zeros(2), "k1 path")
    within(per_sample(kind="k2"), of_forward, "k2 path")
    within(per_sample(kind="k3"), of_backward, "k3 path")
    for kind in KINDS:
        within(per_sample(kind=kind, gradient="kl"), of_forward, f"{kind} kl")


def test_expectations_for_a_mixture():
    """Mixtures have no closed form: KL and its gradient by quadrature."""
    grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    width = grid[1] - grid[0]

    def mixture(logits, means):
        components = torch.distributions.Normal(means, torch.ones_like(means))
        weights = torch.distributions.Categorical(logits=logits, validate_args=False)
        return torch.distributions.MixtureSameFamily(weights, components, validate_args=False)

    logits = torch.tensor([0.3, -0.5], dtype=torch.float64)
    q = mixture(torch.zeros(2, dtype=torch.float64), torch.tensor([-0.5, 1.0], dtype=torch.float64))
    means = torch.tensor([-1.0, 1.2], dtype=torch.float64)

    def quadrature(t, swapped):
        p_log, q_log = mixture(t, means).log_prob(grid), q.log_prob(grid)
        a, b = (q_log, p_log) if swapped else (p_log, q_log)
        return (a.exp() * (a - b)).sum() * width

    x = mixture(logits, means).sample((100_000,))
    log_p, log_q = mixture(logits, means).log_prob(x), q.log_prob(x)
    for kind in ("k1", "k3"):
        within(td.kl_estimate(log_p, log_q, kind=kind, reduction="none"), quadrature(logits, False), kind)

    def per_sample(**options):
        scores = torch.func.jacfwd(lambda t: mixture(t, means).log_prob(x))(logits)
        leaf = log_p.clone().requires_grad_()
        slope = torch.autograd.grad(td.kl_estimate(leaf, log_q, reduction="sum", **options), leaf)[0]
        return slope[:, None] * scores

    of_forward = torch.func.grad(quadrature)(logits, False)
    within(per_sample(kind="k1"), torch.zeros(2), "k1 path")
    within(per_sample(kind="k3", gradient="kl"), of_forward, "kl")
    within(per_sample(kind="k3"), torch.func.grad(quadrature)(logits, True), "k3 path")


def test_importance_weight():
    p, q = draw(6)
    weight = torch.rand(6, dtype=torch.float64, requires_grad=True)
    value = td.kl_estimate(p, q, importance_weight=weight)
    rows = td.kl_estimate(p, q, reduction="none")
    torch.testing.assert_close(value, (rows * weight).mean())
    torch.testing.assert_close(torch.autograd.grad(value, weight)[0], rows / 6)


def test_clamp():
    p = torch.zeros(4, requires_grad=True)
    q = torch.tensor([1000.0, -1000.0, 1.0, INF])
    value = td.kl_estimate(p, q, max_log_ratio=20.0, reduction="none")
    r = q.double().clamp(-20, 20)
    torch.testing.assert_close(value.double(), torch.expm1(r) - r, rtol=2e-6, atol=0)
    gradient = torch.autograd.grad(value.sum(), p)[0]
    assert gradient[[0, 1, 3]].eq(0).all() and gradient[2] != 0


@k
@pytest.mark.parametrize("gradient", ("path", "kl"))
def test_infinities(kind, gradient):
    p = torch.tensor([0.0, 0.0, -INF, 500.0], requires_grad=True)
    q = torch.tensor([-INF, INF, -INF, 0.0])
    value = td.kl_estimate(p, q, kind=kind, gradient=gradient, reduction="none")
    expected = {"k1": [INF, -INF, 0, 500], "k2": [INF, INF, 0, 125000], "k3": [INF, INF, 0, 499]}[kind]
    assert value.tolist() == expected
    assert not torch.autograd.grad(value.sum(), p)[0].isnan().any()
    nan = td.kl_estimate(torch.tensor([float("nan")]), torch.zeros(1), kind=kind, gradient=gradient)
    assert nan.isnan()


def test_rows_of_weight_0_may_hold_anything():
    p = torch.tensor([1.0, float("nan"), INF, 2.0], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.5, 1.0, float("nan"), 2.5], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([1.0, 0.0, 0.0, 3.0])
    for gradient in ("path", "kl"):
        value = td.kl_estimate(p, q, row_weight=weight, gradient=gradient)
        rows = td.kl_estimate(p[[0, 3]], q[[0, 3]], reduction="none")
        torch.testing.assert_close(value, (rows[0] + 3 * rows[1]) / 4)
        for g in torch.autograd.grad(value, (p, q)):
            assert g[[1, 2]].eq(0).all() and g.isfinite().all()
    assert td.kl_estimate(p, q, row_weight=torch.zeros(4)).item() == 0


@k
def test_derivatives_and_transforms(kind):
    for options in ({}, {"max_log_ratio": 5.0}):
        f = lambda *x, o=options: td.kl_estimate(*x, kind=kind, **o)  # noqa: E731
        inputs = tuple((3 * t.detach()).requires_grad_() for t in draw(5))
        assert gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(f, inputs)
    rows = [t.detach() for t in draw(3, 4)]
    want = torch.stack([td.kl_estimate(a, b, kind=kind) for a, b in zip(*rows, strict=True)])
    torch.testing.assert_close(torch.func.vmap(lambda *x: td.kl_estimate(*x, kind=kind))(*rows), want)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_types(dtype):
    p, q = draw(8, dtype=dtype)
    value = td.kl_estimate(p, q)
    assert value.dtype == torch.float32 and torch.autograd.grad(value, p)[0].dtype == dtype
    assert torch.equal(value, td.kl_estimate(p.float(), q.float()))
    assert torch.equal(value, td.kl_estimate(p.float(), q))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck itself looks at it
@pytest.mark.slow
def test_compile_and_opcheck():
    p, q = draw(6)
    torch.library.opcheck(torch.ops.torch_divergence.kl_estimate.default, (p, q))
    for options in ({}, {"kind": "k1", "gradient": "kl", "max_log_ratio": 1.0}):
        compiled = torch.compile(lambda *x, o=options: td.kl_estimate(*x, **o), fullgraph=True)
        torch.testing.assert_close(compiled(p, q), td.kl_estimate(p, q, **options))
        for a, b in zip(
            torch.autograd.grad(compiled(p, q), (p, q)),
            torch.autograd.grad(td.kl_estimate(p, q, **options), (p, q)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("device", ("cpu", "meta"))
@pytest.mark.parametrize(
    ("log_q", "options", "words"),
    (
        (torch.ones(4), {}, ["log_q", "[4]", "[3]"]),
        (torch.ones(3).double(), {}, ["log_q", "float64"]),
        (torch.ones(3).long(), {}, ["log_q", "float32"]),
        (torch.ones(3), {"kind": "k4"}, ["kind", '"k4"', '"k1"']),
        (torch.ones(3), {"gradient": "k2"}, ["gradient", '"k2"', '"path"']),
        (torch.ones(3), {"max_log_ratio": -1.0}, ["max_log_ratio", "-1", "positive"]),
        (torch.ones(3), {"importance_weight": torch.ones(2)}, ["importance_weight", "[2]", "[3]"]),
        (torch.ones(3), {"row_weight": torch.ones(2)}, ["row_weight", "[2]"]),
        (torch.ones(3), {"reduction": "avg"}, ["reduction", '"avg"']),
    ),
)
def test_bad_input(log_q, options, words, device):
    moved = {key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in options.items()}
    with pytest.raises(ValueError) as error:
        td.kl_estimate(torch.ones(3, device=device), log_q.to(device), **moved)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_module():
    p, q = draw(5)
    criterion = td.KLEstimateLoss(kind="k1", gradient="kl", max_log_ratio=3.0, reduction="sum")
    assert repr(criterion) == "KLEstimateLoss(kind='k1', gradient='kl', max_log_ratio=3.0, reduction='sum')"
    assert not criterion.state_dict()
    want = td.kl_estimate(p, q, kind="k1", gradient="kl", max_log_ratio=3.0, reduction="sum")
    assert torch.equal(pickle.loads(pickle.dumps(criterion))(p, q), want)
    weight = torch.ones(5, dtype=torch.float64)
    assert torch.equal(
        td.KLEstimateLoss()(p, q, weight, weight, 2.0),
        td.kl_estimate(p, q, importance_weight=weight, row_weight=weight, normalizer=2.0),
    )
