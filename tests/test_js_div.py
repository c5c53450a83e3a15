"""What is true of the Jensen-Shannon divergence alone, and its accuracy at every scale of the divergence."""

import math

import mpmath
import numpy as np
import pytest
import torch
import torch_divergence as td
from cases import ROW_ACCURACY, SPACES, Case, assert_within, check, to_space
from losses.js_div import JS_DIV

INF = math.inf
BETAS = (0.5, 0.1, 0.9)
betas = pytest.mark.parametrize("beta", BETAS)
single_and_double = pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)


def entropy(beta):
    return -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)


def mp_array(values):
    with mpmath.workdps(25):
        return np.array([np.longdouble(mpmath.nstr(+v, 25)) for v in values])


def close_to_mpmath(student, teacher, **options):
    rows = td.js_div(student, teacher, reduction="none", **options)
    gradients = torch.autograd.grad(rows.sum(), (student, teacher))
    accuracy = ROW_ACCURACY[student.dtype]
    for i in range(len(rows)):
        value, *expected = JS_DIV.mp_row(student[i].tolist(), teacher[i].tolist(), **options)
        assert_within(rows[i], mp_array([value])[0], accuracy * mp_array([value])[0], "value")
        for n, (got, want) in enumerate(zip(gradients, map(mp_array, expected), strict=True)):
            assert_within(got[i], want, accuracy * np.abs(want).max(), f"gradient {n}")


def logits_at(size, rows, classes, dtype, seed=0):
    """Logits about `size` apart; the scaled divergence is about size^2 / 2."""
    g = torch.Generator().manual_seed(seed)
    teacher, noise = (torch.randn(rows, classes, dtype=torch.float64, generator=g) for _ in range(2))
    teacher = teacher.to(dtype)
    return (teacher + (size * noise).to(dtype)).requires_grad_(), teacher.requires_grad_()


SIZES = [10.0**k for k in range(-6, 1)]


@betas
@single_and_double
@pytest.mark.parametrize("size", SIZES)
def test_every_scale_against_mpmath(size, dtype, beta):
    for classes, temperature in ((2, 1.0), (7, 3.0), (40, 1.0)):
        student, teacher = logits_at(size, 2, classes, dtype)
        for scaled in (False, True):
            close_to_mpmath(student, teacher, beta=beta, scaled=scaled, temperature=temperature)


@betas
@single_and_double
@pytest.mark.parametrize("size", SIZES[::2])
@pytest.mark.parametrize("classes", (1000, 32000))
def test_every_scale(classes, size, dtype, beta):
    student, teacher = logits_at(size, 3, classes, dtype)
    value, _ = check(JS_DIV, student, teacher, beta=beta, reduction="none")
    assert (value > 0).all()
    for sides in ((0,), (1,)):  # one gradient of a reduced loss: value and gradient in one visit
        inputs = [t.detach().requires_grad_(i in sides) for i, t in enumerate((student, teacher))]
        check(JS_DIV, *inputs, beta=beta)


@single_and_double
@pytest.mark.parametrize("offset", (1000.0, -1000.0, 65536.0))
def test_offset_plus_tiny_difference(offset, dtype):
    """s = t + offset + tiny: the distributions are the close ones, however far apart the logits are."""
    generator = torch.Generator().manual_seed(1)
    ulp = torch.finfo(dtype).eps * abs(offset)
    teacher = (torch.randint(-64, 64, (3, 100), generator=generator) * ulp * 256).to(dtype)
    student = teacher + offset + torch.randint(-8, 9, (3, 100), generator=generator).to(dtype) * ulp
    close_to_mpmath(student.requires_grad_(), teacher.requires_grad_())


@single_and_double
def test_close_but_for_a_masked_class(dtype):
    """A class that one side alone has, of a mass of 1e-9: KL is infinite or large, JS tiny."""
    teacher = torch.randn(2, 50, dtype=torch.float64).to(dtype)
    teacher[:, 7] = -18.0
    student = teacher.clone()
    student[0, 7] = -INF
    student[1, 7] = -40.0
    for beta in BETAS:  # values: all other classes share one log-ratio, so that gradients are what rounding leaves
        check(JS_DIV, student, teacher, beta=beta, reduction="none")
        check(JS_DIV, teacher, student, beta=beta, reduction="none")


@single_and_double
@pytest.mark.parametrize("gap", (5.0, 15.0, 20.0, 40.0, 80.0))
@pytest.mark.parametrize("classes", (2, 3, 50))
def test_peaked_rows(classes, gap, dtype):
    generator = torch.Generator().manual_seed(2)
    teacher, noise = ((torch.randn(4, classes, generator=generator) * 1024).round().to(dtype) / 1024 for _ in range(2))
    teacher, student = teacher - gap, teacher - gap + noise / 2
    teacher[:, 1], student[:, 1] = 0.0, 0.25
    check(JS_DIV, student.requires_grad_(), teacher.requires_grad_(), reduction="none")


@single_and_double
@pytest.mark.parametrize("scale", (1.0, 2.0, 4.0))
def test_independent_logits(scale, dtype):
    student, teacher = (scale * t for t in JS_DIV.draw((10, 4097), torch.float64))
    for beta in BETAS:
        check(JS_DIV, *(t.to(dtype).requires_grad_() for t in (student, teacher)), beta=beta, reduction="none")


@single_and_double
@pytest.mark.parametrize("beta", (1e-3, 1e-6, 1e-9, 1e-30, 1e-300, 1 - 1e-3, 1 - 1e-6, 1 - 1e-9))
def test_the_scaled_divergence_is_continuous(beta, dtype):
    student, teacher = (t.requires_grad_() for t in JS_DIV.draw((4, 40), dtype))
    close_to_mpmath(student, teacher, beta=beta, scaled=True)
    direction = "forward" if beta < 0.5 else "reverse"
    torch.testing.assert_close(
        td.js_div(student, teacher, beta=beta, scaled=True),
        td.kl_div(student, teacher, direction=direction),
        rtol=max(10 * min(beta, 1 - beta), 4 * ROW_ACCURACY[dtype]),
        atol=0,
    )


@pytest.mark.parametrize("beta, direction", ((0.0, "forward"), (1.0, "reverse")))
def test_ends_are_kl_div(beta, direction):
    for space in SPACES:
        inputs = Case(JS_DIV, {"space": space}).draw(5, 40, dtype=torch.float32)
        got = td.js_div(*inputs, beta=beta, scaled=True, space=space)
        want = td.kl_div(*inputs, direction=direction, space=space)
        assert torch.equal(got, want)
        for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
            assert torch.equal(a, b)
    leaf, target = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    td.js_div(leaf * 1, target, beta=beta, scaled=True, inplace_grad=True).backward()
    other = leaf.detach().clone().requires_grad_()
    td.kl_div(other, target, direction=direction).backward()
    torch.testing.assert_close(leaf.grad, other.grad)


@pytest.mark.parametrize("device", ("cpu", "meta"))
def test_beta_outside_its_range(device):
    x = torch.ones(2, 3, device=device)
    for beta in (-0.1, 1.1, INF, math.nan):
        for scaled in (False, True):
            with pytest.raises(ValueError, match=r"js_div: beta is .*\[0, 1\]"):
                td.js_div(x, x, beta=beta, scaled=scaled)
    for beta in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"js_div: beta is .*scaled=True"):
            td.js_div(x, x, beta=beta)


@betas
@single_and_double
def test_symmetry(beta, dtype):
    student, teacher = (t.requires_grad_() for t in JS_DIV.draw((6, 100), dtype))
    a = td.js_div(student, teacher, beta=beta, reduction="none")
    b = td.js_div(teacher, student, beta=1 - beta, reduction="none")
    torch.testing.assert_close(a, b, rtol=2 * ROW_ACCURACY[dtype], atol=0)
    gradients = (torch.autograd.grad(x.sum(), (student, teacher)) for x in (a, b))
    for g, h in zip(*gradients, strict=True):
        assert ((g - h).abs() <= 2 * ROW_ACCURACY[dtype] * h.abs().amax(-1, keepdim=True)).all()


@betas
def test_bounded_by_entropy_times_total_variation(beta):
    for size in (1e-3, 0.1, 1.0, 10.0, 100.0):
        student, teacher = (size * t for t in JS_DIV.draw((200, 30), torch.float64))
        tvd = (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1) / 2
        rows = td.js_div(student, teacher, beta=beta, reduction="none")
        assert (rows >= 0).all() and (rows <= entropy(beta) * tvd * (1 + 1e-9)).all()


@single_and_double
def test_never_negative_and_zero_only_at_equality(dtype):
    generator = torch.Generator().manual_seed(3)
    teacher = torch.randn(500, 129, generator=generator, dtype=dtype)
    for size in (1.0, 1e-2, 1e-4, 1e-6):
        student = teacher + size * torch.randn(500, 129, generator=generator, dtype=dtype)
        for beta in BETAS:
            rows = td.js_div(student, teacher, beta=beta, reduction="none")
            assert (rows >= 0).all() and (rows[(student != teacher).any(-1)] > 0).all()


@betas
@single_and_double
def test_disjoint_supports(beta, dtype):
    """H(beta), and a gradient that vanishes from logits: nothing tells the sides where to move."""
    student = torch.tensor([[1.0, 2.0, -INF, -INF]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-INF, -INF, 0.5, 3.0]], dtype=dtype, requires_grad=True)
    for space in SPACES:
        inputs = [to_space(t, space).detach().requires_grad_() for t in (student, teacher)]
        if space == "logits":  # the gradient is 0, to the rounding of the terms that it is made of
            value = td.js_div(*inputs, beta=beta, space=space, reduction="none")
            gradients = torch.autograd.grad(value.sum(), inputs)
        else:
            value, gradients = check(JS_DIV, *inputs, beta=beta, space=space, reduction="none")
        assert abs(value.item() - entropy(beta)) <= 4 * torch.finfo(dtype).eps
        for g, t in zip(gradients, inputs, strict=True):
            assert g.isfinite().all()
            assert (g[to_space(t, "logits") == (0 if space == "probs" else -INF)] == 0).all()
            if space == "logits":
                assert (g.abs() <= 4 * torch.finfo(dtype).eps).all()


@betas
@single_and_double
@pytest.mark.parametrize("classes", (4, 50))
def test_column_masked_in_both_is_removed(classes, beta, dtype):
    student, teacher = (t.detach() for t in JS_DIV.draw((3, classes), dtype))
    keep = torch.ones(classes, dtype=torch.bool)
    keep[torch.tensor([1, classes - 1])] = False
    for t in (0.3, 1.0):
        masked = tuple(torch.where(keep, x, -INF).requires_grad_() for x in (student, teacher))
        short = tuple(x[:, keep].requires_grad_() for x in (student, teacher))
        value, gradients = check(JS_DIV, *masked, beta=beta, temperature=t, reduction="none")
        want, expected = check(JS_DIV, *short, beta=beta, temperature=t, reduction="none")
        torch.testing.assert_close(value, want, rtol=2 * ROW_ACCURACY[dtype], atol=0)
        for g, e in zip(gradients, expected, strict=True):
            assert (g[:, ~keep] == 0).all()
            assert ((g[:, keep] - e).abs() <= 2 * ROW_ACCURACY[dtype] * e.abs().amax(-1, keepdim=True)).all()


@single_and_double
@betas
def test_masked_in_one_side(beta, dtype):
    student = torch.tensor([[0.0, 1.5, -INF, -1.0], [0.0, 1.0, 2.0, 3.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[1.0, 2.0, 0.25, 0.5], [-INF, 1.0, 1.0, 1.0]], dtype=dtype, requires_grad=True)
    for space in SPACES:
        inputs = [to_space(t, space).detach().requires_grad_() for t in (student, teacher)]
        value, (g_student, g_teacher) = check(JS_DIV, *inputs, beta=beta, space=space, reduction="none")
        assert value.isfinite().all() and g_student[0, 2] == 0 and g_teacher[1, 0] == 0


def test_probabilities_are_free_variables():
    q = torch.tensor([[0.5, 3.0, 0.1]], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([[2.0, 1.0, 0.3]], dtype=torch.float64, requires_grad=True)
    value, (grad_q, grad_p) = check(JS_DIV, q, p, beta=0.25, space="probs", reduction="none")
    m = 0.25 * p + 0.75 * q
    torch.testing.assert_close(value, (0.25 * p * (p / m).log() + 0.75 * q * (q / m).log()).sum(-1))
    torch.testing.assert_close(grad_p, 0.25 * (p / m).log().detach())
    torch.testing.assert_close(grad_q, 0.75 * (q / m).log().detach())


@single_and_double
def test_infinite_and_negative_entries_give_nan(dtype):
    for position in (0, 1):
        tensors = [t.detach() for t in JS_DIV.draw((2, 5), dtype)]
        tensors[position][0, 3] = INF
        assert td.js_div(*tensors, reduction="none").isnan().tolist() == [True, False]
        tensors = [t.softmax(-1) for t in JS_DIV.draw((2, 5), dtype)]
        tensors[position][0, 3] = -0.25
        assert td.js_div(*tensors, space="probs", reduction="none").isnan().tolist() == [True, False]
