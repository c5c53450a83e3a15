"""What is the entropy's own; gradients, transforms and operators of every order are in the tests over the table."""

import math

import mpmath
import numpy as np
import pytest
import torch
import torch_divergence as td
from cases import DTYPES, ROW_ACCURACY, SPACES, Case, assert_within, check, to_numpy
from loss import randn
from losses.cross_entropy import CROSS_ENTROPY
from losses.entropy import ENTROPY
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

CASES = [Case(ENTROPY, options) for options in ENTROPY.spaces()]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
transforms = pytest.mark.parametrize("case", [Case(ENTROPY, o) for o in ENTROPY.transforms], ids=str)
single_and_double = pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
INF, NAN = math.inf, math.nan


def mp_array(values):
    with mpmath.workdps(25):
        return np.array([np.longdouble(mpmath.nstr(+v, 25)) for v in values])


# ---- values and gradients


def test_reference_file():
    x = torch.tensor([[0.5, -1.25, 2.0, 0.25], [1.0, 1.5, -0.75, -2.0]], dtype=torch.float64)
    got = td.entropy(x, reduction="none")
    want = torch.tensor([0.8943583106858307, 0.9259779026855925], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)


@every_case
@single_and_double
def test_mpmath(case, dtype):
    for seed, scale in enumerate((0.01, 1.0, 5.0)):
        x = case.draw(3, 9, dtype=torch.float64, grad=(), seed=seed)[0]
        x = (x * scale if case.options["space"] == "logits" else x).to(dtype).requires_grad_()
        rows = case(x)
        (gradient,) = torch.autograd.grad(rows.sum(), x)
        exact = ENTROPY.exact(to_numpy(x), **case.options)
        for i in range(3):
            value, want = ENTROPY.mp_row(x[i].tolist(), **case.options)
            assert abs(exact.value[i] - mp_array([value])[0]) <= 1e-15 * abs(exact.value[i])
            assert_within(rows[i], mp_array([value])[0], exact.allowed(dtype)[i], "value")
            want = mp_array(want)
            assert_within(gradient[i], want, ROW_ACCURACY[dtype] * np.abs(want).max(), "gradient")


@single_and_double
@pytest.mark.parametrize("gap", (5.0, 20.0, 30.0, 60.0))
@pytest.mark.parametrize("classes", (2, 3, 50, 5000))
def test_peaked_rows(classes, gap, dtype):
    """An entropy of 1e-12 and less, out of the classes beside a probability that rounds to 1."""
    generator = torch.Generator().manual_seed(2)
    x = (randn(4, classes, generator=generator, dtype=torch.float64) - gap).to(dtype)
    x[:, classes // 2] = 0.25
    for offset in (0.0, 64.0):
        value, _ = check(ENTROPY, (x + offset).requires_grad_(), reduction="none")
        assert (value > 0).all()


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_shapes(case, dtype):
    for shape in ((5, 1), (5, 2), (4, 17), (3, 2501), (2, 3, 7), (7,), (0, 7), (2, 0, 7)):
        check(ENTROPY, *case.draw(*shape, dtype=dtype), reduction="none", **case.options)
        check(ENTROPY, *case.draw(*shape, dtype=dtype), incoming=3.0, **case.options)
    check(ENTROPY, *case.draw(1, 70001, dtype=dtype), **case.options)  # split over the threads


@every_case
def test_strides_and_dim(case):
    (x,) = case.draw(6, 4, 33, dtype=torch.float32, grad=())
    for strided in (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        torch.stack([x, x], -1)[..., 0],
        x[:1].expand(6, 4, 33),
        torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    ):
        check(ENTROPY, strided.requires_grad_(), reduction="none", **case.options)
    for dim in (0, 1, -2):
        check(ENTROPY, x.movedim(-1, dim).contiguous().requires_grad_(), dim=dim, reduction="none", **case.options)


@every_case
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("poison", (NAN, INF, -INF))
def test_row_weight(case, poison, reduction):
    for weight in (torch.tensor([1.0, 0.0, 0.5]), torch.tensor([True, False, True]), torch.zeros(3)):
        (clean,) = case.draw(3, 9)
        dirty = clean.detach().clone()
        dirty[1] = poison
        dirty.requires_grad_()
        value, (g,) = check(ENTROPY, dirty, row_weight=weight, reduction=reduction, **case.options)
        want, (e,) = check(ENTROPY, clean, row_weight=weight, reduction=reduction, **case.options)
        assert torch.equal(value, want) and torch.equal(g, e) and (g[1] == 0).all()
    check(ENTROPY, clean, row_weight=torch.tensor([1.0, 0.0, 0.5]), normalizer=7, **case.options)


@every_case
@single_and_double
def test_zeros(case, dtype):
    """A class of probability 0 is as if it were not there, and has gradient 0."""
    (x,) = case.draw(3, 6, dtype=dtype, grad=())
    keep = torch.tensor([True, False, True, True, True, False])
    full = torch.where(keep, x, 0.0 if case.options["space"] == "probs" else -INF).requires_grad_()
    short = x[:, keep].requires_grad_()
    value, (g,) = check(ENTROPY, full, reduction="none", **case.options)
    want, (e,) = check(ENTROPY, short, reduction="none", **case.options)
    torch.testing.assert_close(value, want, rtol=2 * ROW_ACCURACY[dtype], atol=0)
    assert (g[:, ~keep] == 0).all()
    torch.testing.assert_close(g[:, keep], e)
    (first,) = torch.autograd.grad(case(full).sum(), full, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), full)
    assert second.isfinite().all() and (second[:, ~keep] == 0).all()


def test_not_a_distribution_is_nan():
    assert td.entropy(torch.full((4,), -INF)).isnan()
    assert td.entropy(torch.tensor([0.0, INF, 1.0])).isnan()
    for space in SPACES:
        assert td.entropy(torch.tensor([0.5, NAN, 0.5]), space=space).isnan()
    assert td.entropy(torch.tensor([0.5, -0.1, 0.6]), space="probs").isnan()


@single_and_double
def test_entropy_plus_kl_is_cross_entropy(dtype):
    q, p = Case(CROSS_ENTROPY, {"target_space": "logits"}).draw(40, 300, dtype=dtype, grad=())
    want = td.entropy(p, reduction="none") + td.kl_div(q, p, reduction="none")
    got = td.cross_entropy(q, p, target_space="logits", reduction="none")
    torch.testing.assert_close(got, want, rtol=4 * torch.finfo(dtype).eps, atol=0)


# ---- derivatives


@every_case
def test_gradients_of_every_order(case):
    for inputs in (case.draw(3, 4), case.draw(2, 3, 5)):
        for reduction in ("none", "mean"):
            f = case.bind(reduction=reduction)
            assert gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
            assert gradgradcheck(f, inputs, check_batched_grad=True)
            assert gradgradcheck(
                f, inputs, check_fwd_over_rev=True, check_rev_over_rev=False, check_undefined_grad=False
            )
    inputs = case.draw(1, 3)
    assert gradgradcheck(lambda *x: torch.autograd.grad(case(*x).sum(), x, create_graph=True)[0], inputs)


@every_case
@single_and_double
def test_double_backward_against_the_composite(case, dtype):
    for shape in ((4, 3), (2, 1000)):
        results = []
        x = case.draw(*shape, grad=())[0].to(dtype)
        v = torch.randn(shape, dtype=dtype)
        for f, dtype_ in ((case, dtype), (case.reference, torch.float64)):
            leaf = x.to(dtype_).requires_grad_()
            w = torch.linspace(0.5, 1, shape[0], dtype=dtype_).requires_grad_()
            (g,) = torch.autograd.grad(f(leaf), leaf, w, create_graph=True)
            results.append(torch.autograd.grad((g * v.to(dtype_)).sum(), (w, leaf)))
        for got, want in zip(*results, strict=True):
            rtol = 1e-10 if dtype == torch.float64 else 2e-5
            assert got.dtype == dtype
            assert ((got.double() - want).abs().amax(-1) <= rtol * want.abs().amax(-1)).all()


# ---- the rest of PyTorch


@transforms
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck(case):
    for grad in ((), (0,)):
        opcheck(ENTROPY.op, case.draw(3, 5, grad=grad), dict(case.options))
        opcheck(ENTROPY.op, case.draw(3, 5, grad=grad), {**case.options, "row_weight": torch.rand(3), "dim": -1})
    for call in ENTROPY.operators(case):
        opcheck(call.op, call.args)


@transforms
def test_torch_func(case):
    (x,) = case.draw(4, 3, 5, grad=())
    (v,) = case.draw(4, 3, 5, grad=(), seed=1)
    for transform in (
        lambda f: torch.func.vmap(f)(x),
        lambda f: torch.func.vmap(f, 1, 1)(x),
        lambda f: torch.func.vmap(f, 2)(x.movedim(0, 2)),
        lambda f: torch.func.jvp(f, (x,), (v,)),
        lambda f: torch.func.grad(lambda a: f(a).sum())(x),
        lambda f: torch.func.vmap(torch.func.grad(lambda a: f(a).sum()))(x),
        lambda f: torch.func.hessian(lambda a: f(a).sum())(x[0, :1]),
        lambda f: torch.func.jacfwd(torch.func.jacrev(f))(x[0, :1]),
        lambda f: torch.func.jacrev(torch.func.jacfwd(f))(x[0, :1]),
    ):
        torch.testing.assert_close(transform(case), transform(case.reference), rtol=1e-9, atol=1e-10)


@pytest.mark.slow
@transforms
def test_compile_and_export(case):
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        f = torch.compile(lambda a: case(2 * a, reduction="mean"), fullgraph=True, backend=backend)
        for shape in ((3, 5), (4, 5), (6, 7)):
            (x,) = case.draw(*shape)
            value, want = f(x), case.reference(2 * x, reduction="mean")
            torch.testing.assert_close(value, want)
            torch.testing.assert_close(torch.autograd.grad(value, x), torch.autograd.grad(want, x))

    class Model(torch.nn.Module):
        def forward(self, a):
            return case(a)

    program = torch.export.export(Model(), case.draw(3, 5, grad=()), dynamic_shapes=({0: torch.export.Dim("batch")},))
    other = case.draw(7, 5, grad=(), seed=1)
    torch.testing.assert_close(program.module()(*other), case.reference(*other))


def test_module():
    (x,) = Case(ENTROPY).draw(3, 4, dtype=torch.float32, grad=())
    module = td.EntropyLoss(temperature=2.0, dim=0, reduction="sum")
    assert torch.equal(module(x), td.entropy(x, temperature=2.0, dim=0, reduction="sum"))
    weight = torch.tensor([1.0, 0.0, 2.0])
    assert torch.equal(td.EntropyLoss()(x, weight, 4), td.entropy(x, row_weight=weight, normalizer=4))
    assert repr(module) == "EntropyLoss(space='logits', temperature=2.0, dim=0, reduction='sum')"
    assert not module.state_dict()
    for name in ("entropy", "EntropyLoss"):
        assert name in td.__all__


# ---- errors

BAD = [
    (torch.ones(3, 5, dtype=torch.int64), {}, ["input", "Long|int64", "float32"]),
    (torch.ones(()), {}, ["input", "dimension"]),
    (torch.ones(3, 0), {}, ["input", "[3, 0]", "at least one"]),
    (torch.ones(3, 5), {"space": "logit"}, ["space", '"logit"', '"logits"']),
    (torch.ones(3, 5), {"temperature": 0.0}, ["temperature", "0", "positive"]),
    (torch.ones(3, 5), {"temperature": 2.0, "space": "probs"}, ["temperature", "2", "logits"]),
    (torch.ones(3, 5), {"dim": 2}, ["dim", "2", "[3, 5]"]),
    (torch.ones(3, 5), {"row_weight": torch.ones(2)}, ["row_weight", "[2]", "[3]"]),
    (torch.ones(3, 5), {"row_weight": torch.ones(3, requires_grad=True)}, ["row_weight", "requires grad"]),
    (torch.ones(3, 5), {"reduction": "average"}, ["reduction", '"average"', '"mean"']),
    (torch.ones(3, 5), {"normalizer": 3, "reduction": "sum"}, ["normalizer", '"sum"', '"mean"']),
]


@pytest.mark.parametrize("device", ("cpu", "meta"))
@pytest.mark.parametrize("input, options, words", BAD)
def test_bad_argument(input, options, words, device):
    options = {
        k: v.to(device).detach().requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) else v
        for k, v in options.items()
    }
    with pytest.raises(ValueError) as error:
        td.entropy(input.to(device), **options)
    assert str(error.value).startswith("entropy: ")
    for word in words:
        assert any(w in str(error.value) for w in word.split("|")), str(error.value)


@pytest.mark.parametrize(
    "options, words",
    (
        ({"row_weight": -torch.ones(3, device="cpu")}, ["row_weight", "-1", "negative"]),
        ({"normalizer": 0}, ["normalizer", "0", "positive"]),
    ),
)
def test_bad_value(options, words):
    for grad in (False, True):
        with pytest.raises(ValueError) as error:
            # on CUDA a bad weight makes the loss NaN: nobody waits for the device to be told
            td.entropy(torch.ones(3, 5, device="cpu").requires_grad_(grad), **options)
        assert all(word in str(error.value) for word in words)
