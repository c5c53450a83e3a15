"""Class labels, and what else is cross-entropy's own; distributions are in the tests over the table."""

import math
import subprocess
import sys

import mpmath
import numpy as np
import pytest
import torch
import torch_divergence as td
from cases import DTYPES, ROW_ACCURACY, SPACES, Case, assert_within, check, to_numpy
from loss import randn
from losses.cross_entropy import CROSS_ENTROPY, CROSS_ENTROPY_LABELS
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.nn import functional as F

LABELS = CROSS_ENTROPY_LABELS
CASES = [Case(LABELS, options) for options in LABELS.spaces()]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
transforms = pytest.mark.parametrize("case", [Case(LABELS, o) for o in LABELS.transforms], ids=str)
single_and_double = pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
on_cuda = torch.get_default_device().type == "cuda"
of_cpu = pytest.mark.skipif(on_cuda, reason="CUDA has no kernel for the value and gradient of one visit, nor in place")
smoothings = pytest.mark.parametrize("smoothing", (0.0, 0.1, 1.0))
INF, NAN = math.inf, math.nan


def draw(*shape, dtype=torch.float64, loss=LABELS, **options):
    return Case(loss, options).draw(*shape, dtype=dtype, grad=())


def mp_array(values):
    with mpmath.workdps(25):
        return np.array([np.longdouble(mpmath.nstr(+v, 25)) for v in values])


# ---- labels: values and gradients


@every_case
@single_and_double
def test_mpmath(case, dtype):
    for seed, scale in enumerate((0.01, 1.0, 5.0)):
        x, labels = case.draw(3, 9, grad=(), seed=seed)
        x = (x * scale if case.options["space"] == "logits" else x).to(dtype).requires_grad_()
        rows = case(x, labels)
        (gradient,) = torch.autograd.grad(rows.sum(), x)
        exact = LABELS.exact(to_numpy(x), labels.cpu().numpy(), **case.options)
        for i in range(3):
            value, want = LABELS.mp_row(x[i].tolist(), int(labels[i]), **case.options)
            assert abs(exact.value[i] - mp_array([value])[0]) <= 1e-15 * abs(exact.value[i])
            assert_within(rows[i], mp_array([value])[0], exact.allowed(dtype)[i], "value")
            want = mp_array(want)
            assert_within(gradient[i], want, ROW_ACCURACY[dtype] * np.abs(want).max(), "gradient")


@single_and_double
@pytest.mark.parametrize("reduction", ("none", "mean"))
@pytest.mark.parametrize("gap", (5.0, 20.0, 30.0, 60.0))
@pytest.mark.parametrize("classes", (2, 3, 50, 5000))
def test_peaked_on_the_label(classes, gap, reduction, dtype):
    """A loss of 1e-12 and less, and a gradient as small: the sum of the other classes, at the label too."""
    generator = torch.Generator().manual_seed(2)
    # multiples of 1/1024 are exact in all that is subtracted here
    x = (randn(4, classes, generator=generator, dtype=torch.float64) * 1024).round() / 1024 - gap
    labels = torch.tensor([0, classes - 1, classes // 2, 1])
    x[torch.arange(4), labels] = 0.25
    value, _ = check(LABELS, x.to(dtype).requires_grad_(), labels, reduction=reduction)
    assert (value > 0).all()


@single_and_double
@pytest.mark.parametrize("scale", (0.01, 1.0, 4.0))
@pytest.mark.parametrize("classes", (1000, 32000, 70001))
def test_long_rows(classes, scale, dtype):
    x, labels = draw(3, classes)
    x = (x * scale).to(dtype).requires_grad_()
    check(LABELS, x, labels, reduction="none", temperature=2.0)
    check(LABELS, x, labels)
    check(LABELS, x[:1], labels[:1])  # one row is split over the threads
    check(LABELS, x[:1].detach().requires_grad_(), labels[:1], label_smoothing=0.1)


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_shapes(case, dtype):
    for shape in ((5, 1), (5, 2), (4, 17), (3, 2501), (2, 3, 7), (7,), (0, 7), (2, 0, 7)):
        check(LABELS, *case.draw(*shape, dtype=dtype), reduction="none", **case.options)
        check(LABELS, *case.draw(*shape, dtype=dtype), incoming=3.0, **case.options)


@every_case
def test_strides_and_dim(case):
    x, labels = case.draw(6, 4, 33, dtype=torch.float32, grad=())
    for strided in (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        torch.stack([x, x], -1)[..., 0],
        x[:1].expand(6, 4, 33),
        torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    ):
        for y in (labels, labels.t().contiguous().t(), labels[:1].expand(6, 4)):
            check(LABELS, strided.detach().requires_grad_(), y, reduction="none", **case.options)
            check(LABELS, strided.detach().requires_grad_(), y, **case.options)
    for dim in (0, 1, -2):
        moved = x.movedim(-1, dim).contiguous().requires_grad_()
        check(LABELS, moved, labels, dim=dim, reduction="none", **case.options)
        check(LABELS, moved, labels, dim=dim, **case.options)


@pytest.mark.parametrize("kind", (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8), ids=str)
def test_integer_types_of_labels(kind):
    x, labels = draw(5, 7, dtype=torch.float32)
    assert torch.equal(td.cross_entropy(x, labels.to(kind)), td.cross_entropy(x, labels))


@smoothings
@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
def test_equals_pytorch(reduction, smoothing):
    x, labels = draw(2, 3, 6, 5)
    labels[0, 1] = -100
    x.requires_grad_()
    options = {"label_smoothing": smoothing, "reduction": reduction}
    want = F.cross_entropy(x.movedim(-1, 1), labels, **options)
    (expected,) = torch.autograd.grad(want.sum(), x)
    for y, dim in ((x, -1), (x.movedim(-1, 1), 1)):
        got = td.cross_entropy(y, labels, dim=dim, **options)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), x)[0], expected)
    soft = torch.rand(2, 3, 6, 5, dtype=torch.float64).softmax(-1)
    got = td.cross_entropy(x, soft, **options)
    torch.testing.assert_close(got, F.cross_entropy(x.movedim(-1, 1), soft.movedim(-1, 1), **options))


@every_case
def test_labels_are_the_distribution_with_a_one(case):
    x, labels = case.draw(6, 30)
    onehot = F.one_hot(labels, 30).double()
    got, want = case(x, labels), case(x, onehot)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), x), torch.autograd.grad(want.sum(), x))


# ---- rows that are left out


@every_case
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_rows_may_hold_anything(case, reduction, dtype):
    for poison in (NAN, INF, -INF):
        clean, labels = case.draw(4, 9, dtype=dtype)
        dirty = clean.detach().clone()
        dirty[1] = poison
        dirty.requires_grad_()
        keep = torch.tensor([True, False, True, True])
        for ignore_index, weight in ((-100, None), (-1, torch.tensor([0.5, 1.0, 2.0, 0.0])), (3, None)):
            labels[:] = torch.tensor([0, 0, 8, 4])
            labels[1] = ignore_index
            options = {**case.options, "reduction": reduction, "ignore_index": ignore_index}
            value, gradient = _with_gradient(dirty, labels, row_weight=weight, **options)
            labels[1] = 0
            combined = keep.float() if weight is None else weight * keep
            want, (expected, _) = check(LABELS, clean, labels, row_weight=combined, reduction=reduction, **case.options)
            assert torch.equal(value, want) and torch.equal(gradient, expected)
            assert (gradient[1] == 0).all()


def _with_gradient(x, labels, **options):
    value = td.cross_entropy(x, labels, **options)
    return value, torch.autograd.grad(value.sum(), x)[0]


def test_rows_of_weight_zero_may_have_bad_labels():
    x = torch.randn(3, 5, requires_grad=True)
    labels = torch.tensor([1, 77, 2])
    for reduction in ("mean", "none"):
        value, g = _with_gradient(x, labels, row_weight=torch.tensor([1.0, 0.0, 1.0]), reduction=reduction)
        assert value.isfinite().all() and (g[1] == 0).all()


def test_double_backward_of_rows_that_are_left_out():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    labels, weight = torch.tensor([1, -100, 77]), torch.tensor([1.0, 1.0, 0.0])
    for space in SPACES:
        y = x.exp() if space == "probs" else x
        incoming = torch.ones(3, dtype=torch.float64, requires_grad=True)
        loss = td.cross_entropy(y, labels, space=space, row_weight=weight, reduction="none")
        (g,) = torch.autograd.grad(loss, x, incoming, create_graph=True)
        of_incoming, of_x = torch.autograd.grad(g.pow(2).sum() + x.sum(), (incoming, x))
        assert of_incoming.isfinite().all() and (of_incoming[1:] == 0).all() and (of_x[1:] == 1).all()


def test_nothing_kept():
    x = torch.full((3, 5), NAN, requires_grad=True)
    for reduction in ("mean", "sum"):
        value, g = _with_gradient(x, torch.full((3,), -100), reduction=reduction)
        assert value == 0 and (g == 0).all()


def test_mean_is_over_the_kept_rows():
    x, labels = draw(8, 5)
    labels[::2] = -100
    rows = td.cross_entropy(x, labels, reduction="none")
    torch.testing.assert_close(td.cross_entropy(x, labels), rows.sum() / 4)
    torch.testing.assert_close(td.cross_entropy(x, labels, reduction="batchmean"), rows.sum() / 4)
    torch.testing.assert_close(td.cross_entropy(x, labels, normalizer=8), rows.sum() / 8)


# ---- zeros and infinities


@single_and_double
def test_masked_classes(dtype):
    """A -inf logit beside the label is as if it were not there; at the label the loss is +inf, the gradient finite."""
    x, _ = draw(3, 40, dtype=dtype)
    keep = torch.ones(40, dtype=torch.bool)
    keep[[0, 7, 39]] = False
    labels = torch.tensor([3, 20, 38])
    full = torch.where(keep, x, -INF).requires_grad_()
    short = x[:, keep].requires_grad_()
    value, (g, _) = check(LABELS, full, labels, reduction="none")
    want, (e, _) = check(LABELS, short, labels - 1 - (labels > 7).long(), reduction="none")
    torch.testing.assert_close(value, want, rtol=2 * ROW_ACCURACY[dtype], atol=0)
    torch.testing.assert_close(g[:, keep], e)
    assert (g[:, ~keep] == 0).all()
    value, (g, _) = check(LABELS, full, torch.tensor([0, 7, 39]), reduction="none")
    assert (value == INF).all() and (g[torch.arange(3), [0, 7, 39]] == -1).all()
    assert td.cross_entropy(full, labels, label_smoothing=0.1) == INF


def test_what_is_no_distribution_is_nan():
    labels = torch.tensor([1])
    for reduction in ("mean", "none"):
        for grad in (False, True):
            for row in (
                [-INF] * 4,
                [0.0, INF, 0.0, 1.0],
                [INF, 0.0, 0.0, 1.0],
                [0.0, 0.0, NAN, 0.0],
                [0.0, NAN, 1.0, 2.0],
            ):
                x = torch.tensor([row], requires_grad=grad)
                assert td.cross_entropy(x, labels, reduction=reduction).isnan().all(), row
    assert td.cross_entropy(torch.tensor([[0.5, 0.5, NAN]]), labels, space="probs").isnan()
    assert td.cross_entropy(torch.tensor([[0.5, -0.5]]), labels, space="probs").isnan()


@single_and_double
def test_zero_targets_over_masked_logits(dtype):
    """Where PyTorch has 0 * inf = NaN."""
    x = torch.tensor([[0.5, -INF, 2.0], [1.0, 0.0, -INF]], dtype=dtype, requires_grad=True)
    target = torch.tensor([[0.25, 0.0, 0.75], [0.5, 0.0, 0.5]], dtype=dtype, requires_grad=True)
    value, (g, h) = check(CROSS_ENTROPY, x, target, reduction="none")
    assert value[0].isfinite() and value[1] == INF
    assert g.isfinite().all() and g[1, 2] == -0.5
    assert h[0].isfinite().all() and h[0, 1] == 0


@single_and_double
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("target_space", SPACES)
def test_is_entropy_plus_divergence(space, target_space, dtype):
    q, p = draw(20, 200, dtype=dtype, loss=CROSS_ENTROPY, space=space, target_space=target_space)
    want = td.entropy(p, space=target_space, reduction="none") + td.kl_div(
        q, p, space=space, target_space=target_space, reduction="none"
    )
    got = td.cross_entropy(q, p, space=space, target_space=target_space, reduction="none")
    torch.testing.assert_close(got, want, rtol=4 * torch.finfo(dtype).eps if dtype == torch.float32 else 1e-14, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", (1.0, 1.7))
@pytest.mark.parametrize("kind", ("apart", "near", "offset", "one apart"))
@pytest.mark.parametrize("classes", (3, 100, 5000, 70001))
def test_two_rows_of_logits(classes, kind, temperature, dtype):
    """Values and both gradients: float32 and the half types have kernels of their own."""
    generator = torch.Generator().manual_seed(classes)
    target = randn(2, classes, generator=generator)
    x = randn(2, classes, generator=generator)
    if kind == "near":
        x = target + 0.05 * x
    elif kind == "offset":
        x, target = x - 300, target + 100
    elif kind == "one apart":  # all entries alike but one: the means must not be rounded to the size of what is alike
        x, target = torch.full_like(x, 3.0), torch.full_like(x, -2.0)
        x[:, 0], target[:, -1] = 3.25, 0.5
    x, target = x.to(dtype).requires_grad_(), target.to(dtype).requires_grad_()
    check(CROSS_ENTROPY, x, target, target_space="logits", temperature=temperature, reduction="none")


@single_and_double
@pytest.mark.parametrize("gap", (5.0, 30.0, 60.0))
def test_both_sides_peaked(gap, dtype):
    generator = torch.Generator().manual_seed(2)
    target, noise = ((randn(4, 50, generator=generator) * 1024).round().to(dtype) / 1024 for _ in range(2))
    target, x = target - gap, target - gap + noise / 2
    target[:, 1], x[:, 1] = 0.0, 0.25
    value, _ = check(
        CROSS_ENTROPY, x.requires_grad_(), target.requires_grad_(), target_space="logits", reduction="none"
    )
    assert (value > 0).all()


@single_and_double
@pytest.mark.parametrize("size", (1e-2, 1e-4, 1e-6))
def test_gradient_near_the_optimum(size, dtype):
    """q - p out of logits that differ by little, and by an offset: the same as the divergence's."""
    target = (torch.randint(-64, 64, (4, 100)) / 16).to(dtype)
    x = (target + size * torch.randn(4, 100)).to(dtype)
    for offset in (0.0, 64.0):
        a, b = ((x + offset).requires_grad_() for _ in range(2))
        (got,) = torch.autograd.grad(td.cross_entropy(a, target, target_space="logits"), a)
        (want,) = torch.autograd.grad(td.kl_div(b, target), b)
        assert ((got - want).abs().amax(-1) <= 2 * ROW_ACCURACY[dtype] * want.abs().amax(-1)).all()


# ---- derivatives


@every_case
def test_gradients_of_every_order(case):
    for shape in ((3, 4), (2, 3, 5)):
        x, labels = case.draw(*shape)
        labels.view(-1)[1] = -100
        for reduction in ("none", "mean"):
            f = lambda a, labels=labels, reduction=reduction: case(a, labels, reduction=reduction)  # noqa: E731
            assert gradcheck(f, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
            assert gradgradcheck(f, x, check_batched_grad=True)
            assert gradgradcheck(f, x, check_fwd_over_rev=True, check_rev_over_rev=False, check_undefined_grad=False)
    x, labels = case.draw(1, 3)
    assert gradgradcheck(lambda a: torch.autograd.grad(case(a, labels).sum(), a, create_graph=True)[0] + 0 * a, x)


@every_case
@single_and_double
def test_double_backward_against_the_composite(case, dtype):
    for shape in ((4, 3), (2, 1000)):
        results = []
        x, labels = case.draw(*shape, grad=())
        x, v = x.to(dtype), torch.randn(shape, dtype=dtype)
        for f, dtype_ in ((case, dtype), (case.reference, torch.float64)):
            leaf = x.to(dtype_).requires_grad_()
            w = torch.linspace(0.5, 1, shape[0], dtype=dtype_).requires_grad_()
            (g,) = torch.autograd.grad(f(leaf, labels), leaf, w, create_graph=True)
            results.append(torch.autograd.grad((g * v.to(dtype_)).sum(), (w, leaf), allow_unused=True))
        for got, want in zip(*results, strict=True):
            if want is None:  # linear in log-probabilities
                assert got is None or not got.any()
                continue
            rtol = 1e-10 if dtype == torch.float64 else 2e-5
            assert got.dtype == dtype
            assert ((got.double() - want).abs().amax(-1) <= rtol * want.abs().amax(-1)).all()


# ---- loss and gradient in one visit, in place


@of_cpu
@every_case
def test_stored_gradient_is_chosen_and_right(case):
    x, labels = case.draw(5, 700)
    (want,) = torch.autograd.grad(case(x, labels, reduction="mean"), x, create_graph=True)
    loss = case(x, labels, reduction="mean")
    assert "ValueAndGrad" in loss.grad_fn.name()
    assert "ValueAndGrad" not in case(x, labels).grad_fn.name()
    for scale in (1.0, 3.0):
        loss.backward(torch.tensor(scale, dtype=torch.float64), retain_graph=True)
        torch.testing.assert_close(x.grad, scale * want.detach(), rtol=1e-12, atol=1e-15)
        x.grad = None
    half = x.detach().bfloat16().requires_grad_()
    assert "ValueAndGrad" not in case(half, labels, reduction="mean").grad_fn.name()


@of_cpu
@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inplace_grad(case, dtype):
    for incoming in (1.0, -3.0):
        leaf, labels = case.draw(6, 2500, dtype=dtype)
        labels[2] = -100
        (want,) = torch.autograd.grad(case(leaf, labels, reduction="mean") * incoming, leaf)
        x = leaf * 1
        seen = []
        x.register_hook(lambda g, seen=seen: seen.append(g.data_ptr()))
        value = case(x, labels, inplace_grad=True, reduction="mean")
        torch.testing.assert_close(value, case(leaf, labels, reduction="mean"), rtol=1e-6, atol=0)
        value.backward(torch.tensor(incoming, dtype=value.dtype))
        torch.testing.assert_close(leaf.grad, want, rtol=2e-2 if dtype.itemsize < 4 else 1e-5, atol=1e-8)
        assert seen == [x.data_ptr()]
        with pytest.raises(RuntimeError, match="inplace_grad"):
            value.backward()


def test_inplace_grad_errors():
    x, labels = draw(4, 6, dtype=torch.float32)
    for input, options in ((x, {}), (x.clone().requires_grad_(), {}), (x.requires_grad_() * 1, {"reduction": "none"})):
        with pytest.raises(ValueError, match="inplace_grad"):
            td.cross_entropy(input, labels, inplace_grad=True, **options)


# ---- the rest of PyTorch


@transforms
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck(case):
    for grad in ((), (0,)):
        for reduction in ("none", "mean"):
            x, labels = case.draw(3, 5, grad=grad)
            opcheck(LABELS.op, (x, labels), {**case.options, "reduction": reduction})
            opcheck(LABELS.op, (x, labels.int()), {**case.options, "row_weight": torch.rand(3)})
    for call in LABELS.operators(case):
        opcheck(call.op, call.args)


@transforms
def test_torch_func(case):
    x, labels = case.draw(4, 3, 5, grad=())
    v, _ = case.draw(4, 3, 5, grad=(), seed=1)
    y = labels[0, :1]
    for transform in (
        lambda f: torch.func.vmap(f)(x, labels),
        lambda f: torch.func.vmap(f, (1, 1), 1)(x, labels),
        lambda f: torch.func.vmap(f, (None, 0))(x[0], labels),
        lambda f: torch.func.vmap(f, (0, None))(x, labels[0]),
        lambda f: torch.func.jvp(lambda a: f(a, labels), (x,), (v,)),
        lambda f: torch.func.grad(lambda a: f(a, labels).sum())(x),
        lambda f: torch.func.vmap(torch.func.grad(lambda a, b: f(a, b, reduction="mean")))(x, labels),
        lambda f: torch.func.hessian(lambda a: f(a, y).sum())(x[0, :1]),
        lambda f: torch.func.jacfwd(torch.func.jacrev(lambda a: f(a, y)))(x[0, :1]),
        lambda f: torch.func.jacrev(torch.func.jacfwd(lambda a: f(a, y)))(x[0, :1]),
    ):
        # the reference's one_hot looks at its labels' values, which vmap forbids: it is given distributions
        onehot = Case(CROSS_ENTROPY, {**case.options, "target_space": "probs"})
        torch.testing.assert_close(
            transform(case),
            transform(lambda a, b, f=onehot, **o: f(a, (b.unsqueeze(-1) == torch.arange(5)).double(), **o)),
            rtol=1e-9,
            atol=1e-10,
        )


@pytest.mark.slow
@transforms
def test_compile_and_export(case):
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        f = torch.compile(lambda a, b: case(2 * a, b, reduction="mean"), fullgraph=True, backend=backend)
        for shape in ((3, 5), (4, 5), (6, 7)):
            x, labels = case.draw(*shape)
            value, want = f(x, labels), case.reference(2 * x, labels, reduction="mean")
            torch.testing.assert_close(value, want)
            torch.testing.assert_close(torch.autograd.grad(value, x), torch.autograd.grad(want, x))

    class Model(torch.nn.Module):
        def forward(self, a, b):
            return case(a, b)

    batch = torch.export.Dim("batch")
    program = torch.export.export(Model(), case.draw(3, 5, grad=()), dynamic_shapes=({0: batch}, {0: batch}))
    other = case.draw(7, 5, grad=(), seed=1)
    torch.testing.assert_close(program.module()(*other), case.reference(*other))


def test_module():
    x, labels = draw(3, 4, dtype=torch.float32)
    options = {"label_smoothing": 0.1, "ignore_index": 2, "temperature": 2.0, "reduction": "sum"}
    module = td.CrossEntropyLoss(**options)
    assert torch.equal(module(x, labels), td.cross_entropy(x, labels, **options))
    weight = torch.tensor([1.0, 0.0, 2.0])
    got = td.CrossEntropyLoss()(x, labels, weight, 4)
    assert torch.equal(got, td.cross_entropy(x, labels, row_weight=weight, normalizer=4))
    assert repr(eval(repr(module), vars(td))) == repr(module)
    soft = td.CrossEntropyLoss(target_space="log_probs", dim=0)
    assert torch.equal(soft(x, x), td.cross_entropy(x, x, target_space="log_probs", dim=0))
    assert "target_space='log_probs'" in repr(soft)


# ---- errors

X, Y = torch.ones(3, 5), torch.tensor([0, 1, 2])
BAD = [
    (X, torch.tensor([[0, 1, 2]]), {}, ["target", "[1, 3]", "[3]"]),
    (X, torch.tensor([0, 1]), {}, ["target", "[2]", "[3]"]),
    (X, Y, {"dim": 0}, ["target", "[3]", "[5]"]),
    (X, Y, {"dim": 2}, ["dim", "2", "[3, 5]"]),
    (X, Y > 0, {}, ["target", "Bool|bool", "float32"]),
    (X.long(), Y, {}, ["input", "Long|int64", "float32"]),
    (torch.ones(()), torch.tensor(0), {}, ["input", "dimension"]),
    (torch.ones(3, 0), Y, {}, ["input", "[3, 0]", "at least one"]),
    (X, Y, {"target_space": "probs"}, ["target_space", '"probs"', "class indices"]),
    (X, Y, {"space": "logit"}, ["space", '"logit"', '"logits"']),
    (X, X, {"target_space": "prob"}, ["target_space", '"prob"', '"probs"']),
    (X, X, {"ignore_index": 0}, ["ignore_index", "0", "row_weight"]),
    (X, X[:2], {}, ["target", "[2, 5]", "[3, 5]"]),
    (X, X.double(), {}, ["target", "Double|double|float64"]),
    *(
        (X, target, {"label_smoothing": s}, ["label_smoothing", str(s), "0 to 1"])
        for s in (-0.1, 1.1, NAN)
        for target in (X, Y)
    ),
    (X, Y, {"temperature": 0.0}, ["temperature", "0", "positive"]),
    (X, Y, {"temperature": 2.0, "space": "probs"}, ["temperature", "2", "logits"]),
    (X, Y, {"row_weight": torch.ones(2)}, ["row_weight", "[2]", "[3]"]),
    (X, Y, {"row_weight": torch.ones(3, requires_grad=True)}, ["row_weight", "requires grad"]),
    (X, Y, {"reduction": "average"}, ["reduction", '"average"', '"mean"']),
    (X, Y, {"reduction": "batchmean", "row_weight": torch.ones(3)}, ["reduction", "batchmean", "normalizer"]),
    (X, Y, {"normalizer": 3, "reduction": "sum"}, ["normalizer", '"sum"', '"mean"']),
]


@pytest.mark.parametrize("device", ("cpu", "meta"))
@pytest.mark.parametrize("input, target, options, words", BAD)
def test_bad_argument(input, target, options, words, device):
    options = {
        k: v.to(device).detach().requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) else v
        for k, v in options.items()
    }
    with pytest.raises(ValueError) as error:
        td.cross_entropy(input.to(device), target.to(device), **options)
    assert str(error.value).startswith("cross_entropy: ")
    for word in words:
        assert any(w in str(error.value) for w in word.split("|")), str(error.value)


@pytest.mark.parametrize("label", (-1, 5, -101, 2**40))
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_label_out_of_range(label, reduction):
    x, labels = X.cpu(), torch.tensor([0, label, 2], device="cpu")
    for grad in (False, True):
        with pytest.raises(ValueError) as error:
            td.cross_entropy(x.clone().requires_grad_(grad), labels, reduction=reduction)
        assert all(w in str(error.value) for w in ("cross_entropy", "target", str(label), "row 1", "0 to 4"))
    assert td.cross_entropy(X.to("meta"), labels.to("meta")).shape == ()


@pytest.mark.skipif(not on_cuda, reason="of CUDA: the assertion of a kernel ends the process's use of the device")
def test_label_out_of_range_on_cuda():
    program = """
import torch, torch_divergence as td
td.cross_entropy(torch.ones(3, 5, device="cuda"), torch.tensor([0, 5, 2], device="cuda"))
torch.cuda.synchronize()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode != 0 and "device-side assert" in result.stderr, result.stderr


def test_devices_and_weights():
    for input, target in ((X, Y.to("meta")), (X.to("meta"), Y)):
        with pytest.raises(ValueError, match="target is on"):
            td.cross_entropy(input, target)
    with pytest.raises(ValueError, match="row_weight holds -1"):
        td.cross_entropy(X.cpu(), Y.cpu(), row_weight=-torch.ones(3, device="cpu"))
    if on_cuda:  # nobody waits for the device to be told
        assert td.cross_entropy(X, Y, row_weight=-torch.ones(3)).isnan()
    with pytest.raises(ValueError, match="normalizer is 0"):
        td.cross_entropy(X, Y, normalizer=0)


def test_ignore_index_is_no_label_of_a_smaller_type():
    """-100 as uint8 would be 156, and 300 as int8 44."""
    generator = torch.Generator().manual_seed(1)
    x = randn(1, 200, generator=generator)
    assert td.cross_entropy(x, torch.tensor([156], dtype=torch.uint8)) == td.cross_entropy(x, torch.tensor([156]))
    labels = torch.tensor([1, 44], dtype=torch.int8)
    x = randn(2, 50, generator=generator)
    assert (td.cross_entropy(x, labels, ignore_index=300, reduction="none") > 0).all()
    teacher = randn(2, 50, generator=generator)
    assert td.distillation_loss(x, teacher, labels, ignore_index=300) == td.distillation_loss(x, teacher, labels.long())


def test_loss_beyond_float_is_infinite_with_a_gradient_too():
    """torch.finfo.min is a common mask; what is stored with the gradient must not raise where the value is inf."""
    mask = torch.finfo(torch.float32).min
    x = torch.tensor([[mask, 0.0, 0.0]] * 2)
    for reduction in ("sum", "mean"):
        y = x.clone().requires_grad_()
        value = td.cross_entropy(y, torch.tensor([0, 0]), reduction=reduction, temperature=0.25)
        assert value == math.inf
        (gradient,) = torch.autograd.grad(value, y)
        assert gradient.isfinite().all()


def test_negative_target_probability_is_nan():
    x = torch.zeros(1, 3, requires_grad=True)
    value = td.cross_entropy(x, torch.tensor([[-0.1, 0.5, 0.6]]))
    assert value.isnan()
    assert torch.autograd.grad(value, x)[0].isnan().any()


@pytest.mark.parametrize("gap", (8.0, 12.0, 16.0, 20.0))
def test_hessian_beside_a_peak(gap):
    """q (v - <q, v>) at the class with nearly all of the mass, in float32 as good as in float64."""
    generator = torch.Generator().manual_seed(3)
    x = randn(6, 5, generator=generator)
    x[:, 2] += gap
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    v = randn(6, 5, generator=generator)

    def product(dtype):
        y = x.to(dtype).requires_grad_()
        (gradient,) = torch.autograd.grad(td.cross_entropy(y, labels, reduction="sum"), y, create_graph=True)
        return torch.autograd.grad((gradient * v.to(dtype)).sum(), y)[0].double()

    single, double = product(torch.float32), product(torch.float64)
    assert ((single - double).abs().amax(-1) <= 2e-6 * double.abs().amax(-1)).all()


@single_and_double
@pytest.mark.parametrize("gap", (10.0, 20.0, 30.0))
def test_one_hot_distribution_is_the_label(gap, dtype):
    """Digits of a gradient of e^-gap, of a teacher given as probabilities as of one given by a label."""
    x = randn(5, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x[:, 3] += gap
    x = x.to(dtype).requires_grad_()
    labels = torch.full((5,), 3)
    one_hot = torch.nn.functional.one_hot(labels, 7).to(dtype)
    want = torch.autograd.grad(td.cross_entropy(x, labels, reduction="sum"), x)[0]
    tolerance = {"rtol": ROW_ACCURACY[dtype], "atol": 0}
    for loss in (
        td.cross_entropy(x, one_hot, reduction="sum"),
        td.kl_div(x, one_hot, target_space="probs", reduction="sum"),
    ):
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0], want, **tolerance)
    rows = td.kl_div(x, one_hot, target_space="probs", reduction="none")
    torch.testing.assert_close(rows, td.cross_entropy(x, labels, reduction="none"), **tolerance)
