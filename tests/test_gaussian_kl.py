"""KL divergence between Gaussians, diagonal and full: values by mpmath, derivatives, transforms, errors."""

import json
import math
import pickle
from pathlib import Path

import mpmath
import pytest
import torch
import torch_divergence as td
from torch.autograd import forward_ad, gradcheck, gradgradcheck

OPS = torch.ops.torch_divergence
ACCURACY = {torch.float64: 1e-11, torch.float32: 2e-6}
JSON = {
    c["id"]: c for c in json.loads((Path(__file__).parent / "reference/divergence_cases.json").read_text())["cases"]
}


def draw(*shape, dtype=torch.float64, scale=1.0, grad=True):
    """mean, log_var and their prior, apart by about `scale`."""
    mean, log_var = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    near = [mean + scale * torch.randn(shape, dtype=dtype), log_var + scale * torch.randn(shape, dtype=dtype)]
    return tuple(t.requires_grad_(grad) for t in (*near, mean, log_var))


def textbook(mean, log_var, prior_mean=None, prior_log_var=None):
    prior_mean = torch.zeros_like(mean) if prior_mean is None else prior_mean
    prior_log_var = torch.zeros_like(mean) if prior_log_var is None else prior_log_var
    p = torch.distributions.Normal(mean, (log_var / 2).exp())
    return torch.distributions.kl_divergence(p, torch.distributions.Normal(prior_mean, (prior_log_var / 2).exp())).sum(
        -1
    )


def exact_row(mean, log_var, prior_mean, prior_log_var):
    """Value and the four gradients of a row, with 60 digits."""
    with mpmath.workdps(60):
        total, gradients = mpmath.mpf(0), []
        for row in zip(*(t.tolist() for t in (mean, log_var, prior_mean, prior_log_var)), strict=True):
            m, v, c, w = map(mpmath.mpf, row)
            x, d = v - w, m - c
            total += (mpmath.exp(x) - 1 - x + d**2 * mpmath.exp(-w)) / 2
            by_mean, by_var = d * mpmath.exp(-w), (mpmath.exp(x) - 1) / 2
            gradients.append((by_mean, by_var, -by_mean, -by_var - d**2 * mpmath.exp(-w) / 2))
        return float(total), [[float(g) for g in column] for column in zip(*gradients, strict=True)]


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("scale", (1e-6, 1e-4, 1e-2, 0.3, 1.0, 5.0))
@pytest.mark.parametrize("n", (1, 7, 40))
def test_value_and_gradients(dtype, scale, n):
    inputs = draw(3, n, dtype=dtype, scale=scale)
    rows = td.gaussian_kl(*inputs, reduction="none")
    gradients = torch.autograd.grad(rows.sum(), inputs)
    for i in range(3):
        value, expected = exact_row(*(t[i].detach() for t in inputs))
        assert rows[i].item() > 0
        assert abs(rows[i].item() - value) <= ACCURACY[dtype] * value
        for got, want in zip(gradients, expected, strict=True):
            want = torch.tensor(want, dtype=torch.float64)
            assert (got[i].double() - want).abs().max() <= ACCURACY[dtype] * want.abs().max()


def test_reference_values():
    for name in ("gaussian_kl_std_normal", "gaussian_kl_diag"):
        case = JSON[name]
        tensors = [torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in case["inputs"].values()]
        rows = td.gaussian_kl(*tensors, reduction="none")
        torch.testing.assert_close(rows.tolist(), case["expected"]["rows"], rtol=1e-14, atol=0)
        for got, key in zip(torch.autograd.grad(rows.sum(), tensors), case["inputs"], strict=True):
            torch.testing.assert_close(got.tolist(), case["expected"][f"grad_{key}_of_sum"], rtol=1e-13, atol=1e-15)


def test_equal_is_exactly_zero():
    mean, log_var = torch.randn(2, 3, 9, requires_grad=True)
    loss = td.gaussian_kl(mean, log_var, mean.detach(), log_var.detach())
    assert loss.item() == 0
    assert all(not g.any() for g in torch.autograd.grad(loss, (mean, log_var)))


@pytest.mark.parametrize("prior", ("none", "mean", "log_var", "both"))
def test_absent_and_broadcast_priors(prior):
    mean, log_var, c, w = draw(3, 4, 5)
    c, w = c[0, 0].detach().requires_grad_(), w[:, :1, :1].detach().requires_grad_()
    given = {"prior_mean": c} if prior in ("mean", "both") else {}
    given |= {"prior_log_var": w} if prior in ("log_var", "both") else {}
    got, want = td.gaussian_kl(mean, log_var, **given, reduction="none"), textbook(mean, log_var, **given)
    torch.testing.assert_close(got, want)
    wanted = (mean, log_var, *given.values())
    for a, b in zip(torch.autograd.grad(got.sum(), wanted), torch.autograd.grad(want.sum(), wanted), strict=True):
        torch.testing.assert_close(a, b)
    assert gradgradcheck(lambda *x: td.gaussian_kl(x[0], x[1], **dict(zip(given, x[2:], strict=True))), wanted)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_types(dtype):
    inputs = draw(3, 20, dtype=dtype)
    loss = td.gaussian_kl(*inputs)
    assert loss.dtype == torch.float32
    wide = [t.detach().double().requires_grad_() for t in inputs]
    reference = td.gaussian_kl(*wide)
    torch.testing.assert_close(loss.double(), reference, rtol=2e-6, atol=0)
    for got, want in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(reference, wide), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, want.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    mixed = td.gaussian_kl(inputs[0].float(), inputs[1], inputs[2].float(), inputs[3])
    torch.testing.assert_close(mixed.double(), reference, rtol=2e-6, atol=0)


def test_strides():
    inputs = draw(6, 4)
    want = td.gaussian_kl(*inputs, reduction="none")
    views = [t.detach().t().contiguous().t().requires_grad_() for t in inputs]
    views[1] = torch.stack([inputs[1].detach(), torch.zeros(6, 4, dtype=torch.float64)], -1)[..., 0].requires_grad_()
    got = td.gaussian_kl(*views, reduction="none")
    assert torch.equal(got, want)
    for a, b in zip(torch.autograd.grad(got.sum(), views), torch.autograd.grad(want.sum(), inputs), strict=True):
        assert torch.equal(a, b)


def test_a_row_split_over_threads():
    inputs = draw(1, 100_003)
    whole = td.gaussian_kl(*inputs)
    torch.testing.assert_close(whole, textbook(*inputs).mean())
    g = torch.autograd.grad(whole, inputs)
    for a, b in zip(g, torch.autograd.grad(textbook(*inputs).mean(), inputs), strict=True):
        torch.testing.assert_close(a, b)


INF = float("inf")


# mean, log_var, prior_mean, prior_log_var, KL
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize(
    "row",
    (
        (0.0, -INF, 0.0, 0.0, INF),
        (0.0, INF, 0.0, 0.0, INF),
        (0.0, 0.0, 0.0, -INF, INF),
        (1.0, 0.0, 0.0, INF, INF),
        (1.0, -INF, 1.0, -INF, 0.0),
        (1.0, -INF, 0.0, -INF, INF),
        (1e20, 92.0, 0.0, 92.0, 0.5 * 1e40 * 1.1087e-40),
    ),
)
def test_infinities(row, dtype):
    *inputs, expected = (torch.tensor([[x]], dtype=dtype) for x in row)
    inputs = [t.requires_grad_() for t in inputs]
    loss = td.gaussian_kl(*inputs)
    torch.testing.assert_close(loss, expected.squeeze(), rtol=1e-3, atol=0)
    assert not any(g.isnan().any() for g in torch.autograd.grad(loss, inputs))


def test_nan_in_is_nan_out():
    for i in range(4):
        inputs = list(draw(3, 5, grad=False))
        inputs[i][1, 2] = float("nan")
        assert td.gaussian_kl(*inputs, reduction="none").isnan().tolist() == [False, True, False]


def test_rows_of_weight_0_may_hold_anything():
    inputs = [t.detach() for t in draw(3, 5)]
    for t in inputs:
        t[1] = float("nan")
    inputs = [t.requires_grad_() for t in inputs]
    weight = torch.tensor([2.0, 0.0, 1.0])
    loss = td.gaussian_kl(*inputs, row_weight=weight)
    rows = textbook(*(t[::2] for t in inputs))
    torch.testing.assert_close(loss, (2 * rows[0] + rows[1]) / 3)
    first = torch.autograd.grad(loss, inputs, create_graph=True)
    assert all(not g[1].any() for g in first)
    second = torch.autograd.grad(sum(g.sum() for g in first), inputs)
    assert all(not g[1].any() and g.isfinite().all() for g in second)
    none = torch.zeros(3, dtype=torch.bool)
    assert td.gaussian_kl(*inputs, row_weight=none).item() == 0


def test_derivatives():
    for inputs in (draw(2, 3), draw(2, 3)[:2]):
        assert gradcheck(td.gaussian_kl, inputs, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(td.gaussian_kl, inputs, check_fwd_over_rev=True, check_batched_grad=True)
    mean, log_var, c, w = draw(2, 3)

    def gradient(v):
        return torch.autograd.grad(td.gaussian_kl(mean, v, c, w), v, create_graph=True)[0]

    assert gradgradcheck(gradient, log_var)


@pytest.mark.parametrize(
    ("dtype", "log_var"), ((torch.float32, -100.0), (torch.float32, -1e4), (torch.float64, -750.0))
)
def test_hessian_of_equal_means_and_tiny_variances(dtype, log_var):
    mean, v = torch.ones(1, 2, dtype=dtype), torch.full((1, 2), log_var, dtype=dtype)
    hessian = torch.func.hessian(td.gaussian_kl, (0, 1, 2, 3))(mean, v, mean, v)
    eye, none = torch.eye(2, dtype=dtype), torch.zeros(2, 2, dtype=dtype)
    precision, half = torch.where(eye == 1, INF, none), eye / 2
    expected = (
        (precision, none, -precision, none),
        (none, half, none, -half),
        (-precision, none, precision, none),
        (none, -half, none, half),
    )
    for blocks, wanted in zip(hessian, expected, strict=True):
        for block, want in zip(blocks, wanted, strict=True):
            assert torch.equal(block.reshape(2, 2), want)


def test_third_derivatives_where_both_are_equal():
    mean, log_var = torch.randn(2, 1, 2, dtype=torch.float64)
    inputs = (mean, log_var, mean, log_var)
    for i in range(4):

        def third(f, i=i):
            return torch.func.jacrev(torch.func.hessian(f, i), i)(*inputs)

        torch.testing.assert_close(third(td.gaussian_kl), third(lambda *x: textbook(*x).mean()))


def test_incoming_gradients_of_0_are_variables_too():
    inputs = draw(3, 4, grad=False)
    tangents = tuple(torch.randn_like(t) for t in inputs)
    # torch.autograd.functional.jvp differentiates backward at an incoming gradient of 0.
    got = torch.autograd.functional.jvp(td.gaussian_kl, inputs, tangents)[1]
    torch.testing.assert_close(got, torch.func.jvp(td.gaussian_kl, inputs, tangents)[1])
    mean = inputs[0].requires_grad_()
    weight = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    rows = td.gaussian_kl(*inputs, reduction="none")
    (gradient,) = torch.autograd.grad((weight * rows).sum(), mean, create_graph=True)
    (by_weight,) = torch.autograd.grad(gradient.sum(), weight)
    torch.testing.assert_close(by_weight, torch.autograd.grad(rows.sum(), mean)[0].sum(-1))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("n", (1, 3))
def test_gradient_of_the_prior_where_its_terms_cancel(n, dtype):
    inputs = [torch.randn(20_000, n).to(dtype).requires_grad_() for _ in range(4)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    got, want = (torch.autograd.grad(td.gaussian_kl(*x, reduction="sum"), x[3])[0].double() for x in (inputs, wide))
    rounding = 0
    if dtype != torch.float32:
        info = torch.finfo(dtype)
        rounding = info.eps / 2 * want.abs().clamp_min(info.smallest_normal)
    assert (((got - want).abs() - rounding).amax(-1) <= 2e-6 * want.abs().amax(-1)).all()


@pytest.mark.parametrize("wanted", range(4))
def test_only_the_gradients_that_are_needed(wanted):
    inputs = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(draw(2, 3))]
    assert gradcheck(td.gaussian_kl, inputs) and gradgradcheck(td.gaussian_kl, inputs)


def test_torch_func_and_vmap():
    inputs = draw(4, 3, 5, grad=False)
    torch.testing.assert_close(torch.func.vmap(td.gaussian_kl)(*inputs), textbook(*inputs).mean(-1))
    mapped = torch.func.vmap(td.gaussian_kl, (0, 0, None, None))(*inputs[:2], inputs[2][0], inputs[3][0])
    torch.testing.assert_close(mapped, textbook(*inputs[:2], inputs[2][0], inputs[3][0]).mean(-1))
    torch.testing.assert_close(torch.func.vmap(td.gaussian_kl)(*inputs[:2]), textbook(*inputs[:2]).mean(-1))
    row = [t[0, :1] for t in inputs]
    for i in range(4):
        for nest in (torch.func.hessian, lambda f, i: torch.func.jacrev(torch.func.jacfwd(f, i), i)):
            got = nest(lambda *x: td.gaussian_kl(*x), i)(*row)
            torch.testing.assert_close(got, nest(lambda *x: textbook(*x).mean(), i)(*row))
    per_sample = torch.func.vmap(torch.func.grad(td.gaussian_kl, (0, 1, 2, 3)))(*inputs)
    want = torch.func.vmap(torch.func.grad(lambda *x: textbook(*x).mean(), (0, 1, 2, 3)))(*inputs)
    for a, b in zip(per_sample, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck itself looks at it
def test_opcheck():
    inputs = draw(3, 5)
    for given in (inputs, (*inputs[:2], None, None), (*inputs[:2], None, inputs[3]), (*inputs[:3], None)):
        torch.library.opcheck(OPS._gaussian_kl.default, (*given, torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)))
        grad = torch.randn(3, dtype=torch.float64, requires_grad=True)
        have = [t is not None for t in given]
        for mask in (have, [True, False, False, False], [False, *have[1:]]):
            torch.library.opcheck(OPS._gaussian_kl_backward.default, (grad, *given, mask))
    torch.library.opcheck(OPS.gaussian_kl.default, inputs, {"row_weight": torch.ones(3)})


@pytest.mark.filterwarnings("ignore:.*_prims_common.check:FutureWarning")  # PyTorch's own, about itself
@pytest.mark.slow
def test_compile():
    inputs = draw(3, 5)
    for f, x in ((td.gaussian_kl, inputs), (td.gaussian_kl_full, full(3, 4))):
        compiled = torch.compile(f, fullgraph=True)
        torch.testing.assert_close(compiled(*x), f(*x))
        for a, b in zip(torch.autograd.grad(compiled(*x), x), torch.autograd.grad(f(*x), x), strict=True):
            torch.testing.assert_close(a, b)


def ones(*shape, **kwargs):
    return torch.ones(shape, **kwargs)


@pytest.mark.parametrize("device", ("cpu", "meta"))
@pytest.mark.parametrize(
    ("args", "options", "words"),
    (
        ((ones(), ones()), {}, ["mean", "scalar"]),
        ((ones(3, 0), ones(3, 0)), {}, ["mean", "[3, 0]"]),
        ((ones(3, 5, dtype=torch.int64), ones(3, 5)), {}, ["mean", "float32"]),
        ((ones(3, 5), ones(3, 4)), {}, ["log_var", "[3, 4]", "[3, 5]"]),
        ((ones(3, 5), ones(3, 5).double()), {}, ["log_var", "float64"]),
        ((ones(3, 5), ones(3, 5), ones(4)), {}, ["prior_mean", "[4]", "[3, 5]"]),
        ((ones(3, 5), ones(3, 5), None, ones(2, 3, 5)), {}, ["prior_log_var", "[2, 3, 5]"]),
        ((ones(3, 5), ones(3, 5), None, ones(5).double()), {}, ["prior_log_var", "float64"]),
        ((ones(3, 5), ones(3, 5)), {"row_weight": ones(4)}, ["row_weight", "[4]"]),
        ((ones(3, 5), ones(3, 5)), {"reduction": "avg"}, ["reduction", '"avg"']),
        ((ones(3, 5), ones(3, 5)), {"reduction": "sum", "normalizer": 2.0}, ["normalizer", '"sum"']),
    ),
)
def test_bad_input(args, options, words, device):
    move = lambda t: t.to(device) if isinstance(t, torch.Tensor) else t  # noqa: E731
    with pytest.raises(ValueError) as error:
        td.gaussian_kl(*map(move, args), **{k: move(v) for k, v in options.items()})
    assert all(word in str(error.value) for word in words), str(error.value)


def test_negative_weight():
    with pytest.raises(ValueError, match="row_weight"):
        td.gaussian_kl(*(ones(2, 3, device="cpu"),) * 2, row_weight=torch.tensor([1.0, -1.0], device="cpu"))


# ---- full covariances


def factor(*shape):
    low = torch.randn(*shape, shape[-1], dtype=torch.float64).tril(-1)
    return low + torch.rand(shape, dtype=torch.float64).add(0.5).diag_embed()


def full(*shape, scale=1.0):
    mean, prior = torch.randn(shape, dtype=torch.float64), factor(*shape)
    tensors = (
        mean + scale * torch.randn(shape, dtype=torch.float64),
        prior + scale * (factor(*shape) - prior),
        mean,
        prior,
    )
    return tuple(t.requires_grad_() for t in tensors)


def full_textbook(mean, scale_tril, prior_mean, prior_scale_tril):
    normal = torch.distributions.MultivariateNormal
    return torch.distributions.kl_divergence(
        normal(mean, scale_tril=scale_tril.tril(), validate_args=False),
        normal(prior_mean, scale_tril=prior_scale_tril.tril(), validate_args=False),
    )


def full_exact(*inputs):
    with mpmath.workdps(60):
        m, lq, c, lp = (mpmath.matrix(t.tolist()) for t in inputs)
        r, y, n = lp**-1 * lq, lp**-1 * (m - c), lp.rows
        total = sum(r[i, j] ** 2 for i in range(n) for j in range(i + 1)) - n + sum(z**2 for z in y)
        return float(total / 2 - sum(mpmath.log(r[i, i]) for i in range(n)))


def test_full_reference():
    case = JSON["gaussian_kl_full"]
    tensors = [torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in case["inputs"].values()]
    value = td.gaussian_kl_full(*tensors)
    torch.testing.assert_close(value.item(), case["expected"]["value"], rtol=1e-13, atol=0)
    for got, key in zip(torch.autograd.grad(value, tensors), case["inputs"], strict=True):
        torch.testing.assert_close(got.tolist(), case["expected"][f"grad_{key}"], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("scale", (1e-6, 1e-3, 0.1, 1.0))
def test_full_values(scale):
    inputs = [t.detach() for t in full(3, 4, scale=scale)]
    rows = td.gaussian_kl_full(*inputs, reduction="none")
    condition = torch.linalg.cond(inputs[3])
    for i in range(3):
        want = full_exact(*(t[i] for t in inputs))
        assert abs(rows[i].item() - want) <= 1e-14 * condition[i] * want
    single = [t.float() for t in inputs]
    rows = td.gaussian_kl_full(*single, reduction="none")
    for i in range(3):
        want = full_exact(*(t[i] for t in single))
        assert rows[i] >= 0 and abs(rows[i].item() - want) <= 2e-6 * condition[i] * want


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("ratio", (1e-30, 1e-18, 1e-8, 1e-4, 0.1, 0.4, 0.6, 3.0))
def test_full_factors_that_are_small_beside_the_prior(dtype, ratio):
    inputs = [t.detach().to(dtype) for t in full(3, 4)]
    inputs[1] *= ratio
    inputs = [t.requires_grad_() for t in inputs]
    rows = td.gaussian_kl_full(*inputs, reduction="none")
    gradients = torch.autograd.grad(rows.sum(), inputs, create_graph=True)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(full_textbook(*wide).sum(), wide)
    for i in range(3):
        bound = ACCURACY[dtype] * torch.linalg.cond(wide[3][i].detach()).item()
        want = full_exact(*(t[i] for t in wide))
        assert abs(rows[i].item() - want) <= bound * want
        for got, of_textbook in zip(gradients, expected, strict=True):
            assert (got[i] - of_textbook[i]).abs().max() <= 4 * bound * of_textbook[i].abs().max()
    if ratio >= 1e-18:  # 1/q^2 overflows below
        assert all(g.isfinite().all() for g in torch.autograd.grad(sum(g.sum() for g in gradients), inputs))


def test_full_of_a_quotient_that_underflows():
    factors = torch.full((1, 1, 1), 1e-25), torch.full((1, 1, 1), 1e20)
    value = td.gaussian_kl_full(torch.zeros(1, 1), factors[0], torch.zeros(1, 1), factors[1])
    torch.testing.assert_close(value.item(), 45 * math.log(10) - 0.5, rtol=2e-6, atol=0)


def test_full_derivatives_and_transforms():
    inputs = full(2, 3)
    assert gradcheck(td.gaussian_kl_full, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(td.gaussian_kl_full, inputs)
    want = full_textbook(*inputs)
    torch.testing.assert_close(td.gaussian_kl_full(*inputs, reduction="none"), want)
    rows = [t.detach() for t in inputs]
    torch.testing.assert_close(torch.func.vmap(td.gaussian_kl_full)(*rows), want.detach())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(rows[0], torch.ones_like(rows[0]))
        assert forward_ad.unpack_dual(td.gaussian_kl_full(dual, *rows[1:])).tangent is not None


def test_full_ignores_the_upper_triangle():
    inputs = [t.detach() for t in full(2, 3)]
    other = [inputs[0], inputs[1] + torch.full((3, 3), float("nan"), dtype=torch.float64).triu(1).nan_to_num(7.0)]
    other = [*other, inputs[2], inputs[3].clone()]
    other[3][:, 0, 2] = float("nan")
    other = [t.requires_grad_() for t in other]
    loss = td.gaussian_kl_full(*other)
    assert torch.equal(loss, td.gaussian_kl_full(*inputs))
    gradients = torch.autograd.grad(loss, other)
    assert all(not g.triu(1).any() for g in (gradients[1], gradients[3])) and all(g.isfinite().all() for g in gradients)


def test_full_errors_and_weights():
    inputs = [t.detach() for t in full(2, 3)]
    for i, name in ((1, "scale_tril"), (3, "prior_scale_tril")):
        bad = [t.clone() for t in inputs]
        bad[i][1, 2, 2] = 0
        with pytest.raises(ValueError, match=f"gaussian_kl_full: {name} .*diagonal"):
            td.gaussian_kl_full(*(t.cpu() for t in bad))
        kept = [t.requires_grad_() for t in bad]
        loss = td.gaussian_kl_full(*kept, row_weight=torch.tensor([True, False]))
        torch.testing.assert_close(loss, full_textbook(*(t[0] for t in inputs)))
        assert all(not g[1].any() and g.isfinite().all() for g in torch.autograd.grad(loss, kept))
        bad = list(inputs)
        bad[i] = bad[i][:, :2]
        with pytest.raises(ValueError, match=f"{name} has shape"):
            td.gaussian_kl_full(*bad)
    with pytest.raises(ValueError, match="prior_mean has shape"):
        td.gaussian_kl_full(inputs[0], inputs[1], inputs[2][:1], inputs[3])


@pytest.mark.parametrize(("module", "draw_inputs"), ((td.GaussianKLLoss, draw), (td.GaussianKLFullLoss, full)))
def test_modules(module, draw_inputs):
    function = td.gaussian_kl if module is td.GaussianKLLoss else td.gaussian_kl_full
    inputs = [t.detach() for t in draw_inputs(2, 3)]
    criterion = module(reduction="sum")
    assert repr(criterion) == f"{module.__name__}(reduction='sum')" and not criterion.state_dict()
    assert torch.equal(pickle.loads(pickle.dumps(criterion))(*inputs), function(*inputs, reduction="sum"))
    weight = torch.tensor([1.0, 0.0])
    assert torch.equal(module()(*inputs, weight, 2.0), function(*inputs, row_weight=weight, normalizer=2.0))
