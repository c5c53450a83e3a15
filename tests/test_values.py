"""Values and gradients against exact ones: scales, dtypes, spaces, layouts, reductions, zeros, masks, infinities."""

import math

import mpmath
import numpy as np
import pytest
import torch
import torch_divergence as td
from cases import (
    ALL_OPTIONS,
    DIRECTIONS,
    DTYPES,
    LOSSES,
    ROW_ACCURACY,
    SPACES,
    Case,
    assert_within,
    check,
    expect,
    json_cases,
    to_numpy,
    to_space,
)

INF, NAN = math.inf, math.nan
KL = next(loss for loss in LOSSES if loss.name == "kl_div")
losses = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
all_options = pytest.mark.parametrize("case", ALL_OPTIONS, ids=str)
directions = pytest.mark.parametrize("direction", DIRECTIONS)
single_and_double = pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)


def mp_array(values):
    with mpmath.workdps(25):
        return np.array([np.longdouble(mpmath.nstr(+v, 25)) for v in values])


def pair(student, teacher, dtype=torch.float64):
    return tuple(torch.tensor(x, dtype=dtype, requires_grad=True) for x in (student, teacher))


# ---- the descriptions in cases.py against each other and against stored facts


@pytest.mark.parametrize("loss, name, case", list(json_cases()), ids=lambda x: x if isinstance(x, str) else "")
@single_and_double
def test_reference_file(loss, name, case, dtype):
    options = dict(case.options)
    if "row_weight" in options:
        options["row_weight"] = torch.tensor(options["row_weight"])
    tensors = [torch.tensor(t, dtype=dtype, requires_grad=True) for t in case.tensors]
    if case.rows:
        rows = loss(*tensors, reduction="none", **options)
        # the file's numbers in single precision are those of the rounded inputs
        rtol = 1e-11 if dtype == torch.float64 else 2e-6
        torch.testing.assert_close(rows.double(), torch.tensor(case.rows, dtype=torch.float64), rtol=rtol, atol=0)
        gradients = torch.autograd.grad(rows.sum(), tensors)
        for got, want in zip(gradients, case.gradients, strict=True):
            if want is not None:
                want = torch.tensor(want, dtype=torch.float64)
                assert (got.double() - want).abs().max() <= rtol * want.abs().max()
    if case.hvp:
        rows = loss(*tensors, reduction="none", **options)
        first = torch.autograd.grad(rows.sum(), tensors, create_graph=True)
        dot = sum((g * torch.tensor(v, dtype=dtype)).sum() for g, v in zip(first, case.vectors, strict=True))
        for got, want in zip(torch.autograd.grad(dot, tensors), case.hvp, strict=True):
            want = torch.tensor(want, dtype=torch.float64)
            assert (got.double() - want).abs().max() <= (1e-11 if dtype == torch.float64 else 4e-6) * want.abs().max()


def test_weights_of_the_reference_file():
    loss, _, case = next(c for c in json_cases() if c[1] == "kl_logits_ignore_index_weight")
    student, teacher = (torch.tensor(t, dtype=torch.float64) for t in case.tensors)
    kept = torch.tensor(case.options["row_weight"], dtype=torch.float64)
    weight = torch.tensor([1.0, 0.5, 2.0, 0.25], dtype=torch.float64) * kept
    torch.testing.assert_close(loss(student, teacher, row_weight=kept).item(), 0.7433281590096967, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        loss(student, teacher, row_weight=weight).item(), 0.42840318280461026, rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        loss(student, teacher, row_weight=weight, reduction="sum").item(), 0.7497055699080679, rtol=1e-12, atol=0
    )


@all_options
def test_mpmath(case):
    for dtype in (torch.float64, torch.float32):
        for seed, scale in enumerate((0.01, 1.0, 5.0)):
            tensors = case.loss.draw((3, 9), dtype, seed, **case.options)
            if scale != 1 and all(case.options.get(k) != "probs" for k in ("space", "target_space")):
                tensors = tuple(t * scale for t in tensors)
            tensors = tuple(t.requires_grad_() for t in tensors)
            rows = case.loss(*tensors, reduction="none", **case.options)
            gradients = torch.autograd.grad(rows.sum(), tensors)
            exact = case.loss.exact(*map(to_numpy, tensors), **case.options)
            for i in range(3):
                value, *expected = case.loss.mp_row(*(t[i].tolist() for t in tensors), **case.options)
                assert abs(exact.value[i] - mp_array([value])[0]) <= 1e-15 * (
                    abs(exact.value[i]) + (0 if exact.terms is None else exact.terms[i])
                )
                assert_within(rows[i], mp_array([value])[0], exact.allowed(dtype)[i], "value")
                for n, (got, want) in enumerate(zip(gradients, expected, strict=True)):
                    want = mp_array(want)
                    assert_within(got[i], want, ROW_ACCURACY[dtype] * np.abs(want).max(), f"gradient {n}")


# ---- accuracy at every scale, from logits


def close_to_mpmath(student, teacher, **options):
    rows = td.kl_div(student, teacher, reduction="none", **options)
    gradients = torch.autograd.grad(rows.sum(), (student, teacher))
    accuracy = ROW_ACCURACY[student.dtype]
    for i in range(len(rows)):
        value, *expected = KL.mp_row(student[i].tolist(), teacher[i].tolist(), **options)
        assert_within(rows[i], mp_array([value])[0], accuracy * mp_array([value])[0], "value")
        for n, (got, want) in enumerate(zip(gradients, map(mp_array, expected), strict=True)):
            assert_within(got[i], want, accuracy * np.abs(want).max(), f"gradient {n}")


SCALES = [10.0**k for k in range(-12, 5)]


def logits_at(kl, rows, classes, dtype, offset=0.0, direction="forward", seed=0):
    """Student and teacher logits about `kl` apart, exact in `dtype`; P, the side in front, is not peaked."""
    g = torch.Generator().manual_seed(seed)
    front, noise = (torch.randn(rows, classes, dtype=torch.float64, generator=g) for _ in range(2))
    noise = math.sqrt(2 * kl) * noise if kl <= 1 else 2 * kl * noise.abs()
    behind = front.to(dtype) + noise.to(dtype)
    sides = (behind, front) if direction == "forward" else (front, behind)
    return (sides[0].to(dtype) + torch.tensor(offset, dtype=dtype)).requires_grad_(), sides[1].to(
        dtype
    ).requires_grad_()


@directions
@single_and_double
@pytest.mark.parametrize("scale", SCALES[:-2])
def test_every_scale_against_mpmath(scale, dtype, direction):
    for classes, offset, temperature in ((2, 0.0, 1.0), (7, 0.0, 3.0), (40, -20.0, 1.0)):
        student, teacher = logits_at(scale, 2, classes, dtype, offset, direction)
        close_to_mpmath(student, teacher, direction=direction, temperature=temperature)


@directions
@single_and_double
@pytest.mark.parametrize("scale", SCALES[::2])
@pytest.mark.parametrize("classes", (1000, 32000))
def test_every_scale(classes, scale, dtype, direction):
    student, teacher = logits_at(scale, 3, classes, dtype, direction=direction)
    value, _ = check(KL, student, teacher, direction=direction, reduction="none", temperature=2.0)
    assert (value >= 0).all()


@directions
@pytest.mark.parametrize("sides", ((0,), (1,)))
@pytest.mark.parametrize("scale", SCALES[::4])
def test_every_scale_of_the_reduced_loss(scale, sides, direction):
    """One gradient and a reduced loss: the path that computes both in one pass."""
    student, teacher = (
        t.detach().requires_grad_(i in sides)
        for i, t in enumerate(logits_at(scale, 9, 3001, torch.float32, direction=direction))
    )
    check(KL, student, teacher, direction=direction)


@directions
@single_and_double
@pytest.mark.parametrize("offset", (1000.0, -1000.0, 65536.0))
def test_offset_plus_tiny_difference(offset, dtype, direction):
    """s = t + offset + tiny: the distributions are the close ones, however far apart the logits are."""
    generator = torch.Generator().manual_seed(1)
    ulp = torch.finfo(dtype).eps * abs(offset)
    teacher = (torch.randint(-64, 64, (3, 100), generator=generator) * ulp * 256).to(dtype)
    student = teacher + offset + torch.randint(-8, 9, (3, 100), generator=generator).to(dtype) * ulp
    close_to_mpmath(student.requires_grad_(), teacher.requires_grad_(), direction=direction)


@directions
@single_and_double
@pytest.mark.parametrize("gap", (5.0, 15.0, 20.0, 40.0, 80.0))
@pytest.mark.parametrize("classes", (2, 3, 50))
def test_peaked_rows(classes, gap, dtype, direction):
    """Nearly all mass on one class in both rows: the others' digits must survive beside it, in its own gradient too."""
    generator = torch.Generator().manual_seed(2)
    # multiples of 1/1024 have exact differences; others round exp's argument, in single precision by up to 4e-6
    teacher, noise = ((torch.randn(4, classes, generator=generator) * 1024).round().to(dtype) / 1024 for _ in range(2))
    teacher, student = teacher - gap, teacher - gap + noise / 2
    teacher[:, 1], student[:, 1] = 0.0, 0.25
    check(KL, student.requires_grad_(), teacher.requires_grad_(), direction=direction, reduction="none")


@directions
@single_and_double
def test_small_masses_far_apart(dtype, direction):
    """KL near 1 out of a mass of 1/1000: q - p is small beside p and q of the first class."""
    student, teacher = pair(
        [[0.0, -1000.0, -9.0], [0.0, -7.0, -300.0]], [[0.0, -7.0, -9.5], [0.0, -1000.0, -4.5]], dtype
    )
    check(KL, student, teacher, direction=direction, reduction="none")


@directions
@single_and_double
@pytest.mark.parametrize("low", (-120.0, -INF), ids=("little", "none"))
@losses
def test_small_mass_that_one_side_lacks(loss, low, dtype, direction):
    """The sides agree but for a class of mass 1e-5 to 0.1 that one has nearly nothing of, or masks: KL may be large or
    infinite, and q - p is small beside p in every class."""
    generator = torch.Generator().manual_seed(5)
    options = {"direction": direction} if "direction" in loss.choices else {}
    for classes in (3, 11, 300, 5000):
        teacher = torch.randn(24, classes, generator=generator, dtype=torch.float64)
        student = teacher + torch.randint(-3, 4, (24, 1), generator=generator)
        teacher[:, -1] = teacher.logsumexp(-1) + torch.linspace(-11, -2, 24, dtype=torch.float64)
        teacher, student = ((t * 1024).round() / 1024 for t in (teacher, student))
        student[:, -1] = low
        if direction == "reverse":  # P is the student
            teacher, student = student, teacher
        check(loss, student.to(dtype).requires_grad_(), teacher.to(dtype).requires_grad_(), reduction="none", **options)


@directions
@single_and_double
@pytest.mark.parametrize("scale", (1.0, 2.0, 4.0))
def test_independent_logits(scale, dtype, direction):
    """A KL of tens, and P spread over a few classes whose log-ratios are near each other."""
    student, teacher = (scale * t for t in KL.draw((40, 4097), torch.float64))
    check(KL, *(t.to(dtype).requires_grad_() for t in (student, teacher)), direction=direction, reduction="none")


@single_and_double
def test_never_negative_and_zero_only_at_equality(dtype):
    generator = torch.Generator().manual_seed(3)
    teacher = torch.randn(500, 129, generator=generator, dtype=dtype)
    for size in (1.0, 1e-2, 1e-4, 1e-6, 1e-7):
        student = teacher + (size * torch.randn(500, 129, generator=generator, dtype=dtype))
        for direction in DIRECTIONS:
            rows = td.kl_div(student, teacher, direction=direction, reduction="none")
            assert (rows >= 0).all()
            assert (rows[(student != teacher).any(-1)] > 0).all()


@all_options
@single_and_double
def test_bit_equal_inputs(case, dtype):
    """Of the same space: a value of exactly 0, and for logits gradients of exactly 0."""
    if len({case.options[k] for k in ("space", "target_space")}) > 1:
        return
    for classes, size in ((1, 1.0), (5, 1.0), (1000, 30.0), (32000, 1.0)):
        x = to_space(size * torch.randn(4, classes, dtype=torch.float64), case.options["space"]).to(dtype)
        student, teacher = x.clone().requires_grad_(), x.clone().requires_grad_()
        rows = case.loss(student, teacher, reduction="none", **case.options)
        assert (rows == 0).all()
        if case.options["space"] == "logits":
            for g in torch.autograd.grad(rows.sum(), (student, teacher)):
                assert (g == 0).all()
        same = x.clone().requires_grad_()
        assert case.loss(same, same, **case.options) == 0


# ---- dtypes


@all_options
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(case, dtype):
    for classes in (1, 2, 15, 16, 17, 33, 500):
        check(case.loss, *case.draw(5, classes, dtype=dtype), reduction="none", **case.options)


@pytest.mark.parametrize("half", (torch.bfloat16, torch.float16), ids=str)
@all_options
def test_half_equals_float32_on_the_same_numbers(case, half):
    """Half inputs are widened and the gradient is rounded once: else equal to single precision."""
    inputs = case.draw(6, 200, dtype=half)
    wide = tuple(t.detach().float().requires_grad_() for t in inputs)
    value, want = case(*inputs), case(*wide)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, want, rtol=2e-6, atol=0)
    for g, w in zip(torch.autograd.grad(value.sum(), inputs), torch.autograd.grad(want.sum(), wide), strict=True):
        assert g.dtype == half
        error = (g.double() - w.double()).abs()
        assert (
            error
            <= w.double().abs() * torch.finfo(half).eps * 0.51
            + torch.finfo(half).tiny * torch.finfo(half).eps
            + 2e-6 * w.abs().amax(-1, keepdim=True)
        ).all()


MIXED = [(a, b) for a in DTYPES[1:] for b in DTYPES[1:] if a != b]


@pytest.mark.parametrize("input_dtype, target_dtype", MIXED, ids=str)
@all_options
def test_mixed_dtypes(case, input_dtype, target_dtype):
    inputs = tuple(
        t.detach().to(d).requires_grad_() for t, d in zip(case.draw(4, 77), (input_dtype, target_dtype), strict=True)
    )
    check(case.loss, *inputs, reduction="none", **case.options)
    for side in (0, 1):
        check(case.loss, *(t.detach().requires_grad_(i == side) for i, t in enumerate(inputs)), **case.options)


def test_float16_with_an_incoming_gradient_of_65536():
    """GradScaler's first scale on 4096 rows: the gradient must not pass through a half (q - p)/n."""
    rows, classes, incoming = 4096, 32000, 65536.0
    teacher = torch.empty(rows, classes, dtype=torch.float16)
    student = torch.empty(rows, classes, dtype=torch.float16)
    for start in range(0, rows, 512):
        teacher[start : start + 512] = torch.randn(512, classes)
        student[start : start + 512] = torch.randn(512, classes)
    student.requires_grad_()
    loss = td.kl_div(student, teacher)
    assert loss.dtype == torch.float32
    loss.backward(torch.tensor(incoming))
    total = 0.0
    for start in range(0, rows, 256):
        s, t = (x[start : start + 256].detach().double() for x in (student, teacher))
        log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
        total += (log_p.exp() * (log_p - log_q)).sum().item() / rows
        want = (log_q.exp() - log_p.exp()) * (incoming / rows)
        error = (student.grad[start : start + 256].double() - want).abs()
        assert (error <= want.abs() * 2.0**-11 + 2.0**-25 + 2e-6 * want.abs().amax(-1, keepdim=True)).all()
    assert abs(loss.item() - total) <= 2e-6 * total


# ---- zeros, masks, infinities


@single_and_double
@directions
@pytest.mark.parametrize("classes", (4, 50))
def test_column_masked_in_both_is_removed(classes, direction, dtype):
    student, teacher = (t.detach() for t in KL.draw((3, classes), dtype))
    keep = torch.ones(classes, dtype=torch.bool)
    keep[torch.tensor([1, classes - 1])] = False
    for t in (0.3, 1.0):
        masked = tuple(torch.where(keep, x, -INF).requires_grad_() for x in (student, teacher))
        short = tuple(x[:, keep].requires_grad_() for x in (student, teacher))
        value, gradients = check(KL, *masked, direction=direction, temperature=t, reduction="none")
        want, expected = check(KL, *short, direction=direction, temperature=t, reduction="none")
        torch.testing.assert_close(value, want, rtol=2 * ROW_ACCURACY[dtype], atol=0)
        for g, e in zip(gradients, expected, strict=True):
            assert (g[:, ~keep] == 0).all()
            assert ((g[:, keep] - e).abs() <= 2 * ROW_ACCURACY[dtype] * e.abs().amax(-1, keepdim=True)).all()


@single_and_double
def test_masked_columns_and_close_rows(dtype):
    """Masks with a tiny divergence: the centred form must see them as removed."""
    student, teacher = (t.detach() for t in logits_at(1e-10, 3, 64, dtype))
    student[:, ::3] = teacher[:, ::3] = -INF
    check(KL, student.requires_grad_(), teacher.requires_grad_(), reduction="none")


@single_and_double
@pytest.mark.parametrize("reduction", ("none", "mean"))
def test_student_masked_where_teacher_is_not(dtype, reduction):
    """q = 0 < p: +inf, with student gradient q - p, and 0 for the teacher's in that row alone."""
    student, teacher = pair(
        [[0.0, 1.5, -INF, -1.0], [0.0, 1.0, 2.0, 3.0]], [[1.0, 2.0, 0.25, 0.5], [1.0, 1.0, 1.0, 1.0]], dtype
    )
    value, (g_student, g_teacher) = check(KL, student, teacher, reduction=reduction)
    assert value.sum() == INF and g_student.isfinite().all()
    assert (g_teacher[0] == 0).all() and (g_teacher[1] != 0).all()
    want = (student.softmax(-1) - teacher.softmax(-1)) / (2 if reduction == "mean" else 1)
    torch.testing.assert_close(g_student, want.detach())
    for side in (0, 1):
        check(
            KL, *(t.detach().requires_grad_(i == side) for i, t in enumerate((student, teacher))), reduction=reduction
        )


@single_and_double
def test_teacher_masked_where_student_is_not(dtype):
    student, teacher = pair([[0.0, 1.5, 0.5, -1.0]], [[1.0, 2.0, -INF, 0.5]], dtype)
    value, (g_student, g_teacher) = check(KL, student, teacher, reduction="none")
    assert value.isfinite().all() and g_teacher[0, 2] == 0
    torch.testing.assert_close(g_student[0, 2], student.softmax(-1)[0, 2].detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@directions
def test_all_masked_row(direction, dtype):
    """NaN, unless its weight is 0."""
    student, teacher = pair([[-INF] * 3, [1.0, 2.0, 3.0]], [[-INF] * 3, [2.0, 2.0, 1.0]], dtype)
    rows = td.kl_div(student, teacher, direction=direction, reduction="none")
    assert rows[0].isnan() and rows[1].isfinite()
    for sides in ((0,), (1,), (0, 1)):
        inputs = [t.detach().requires_grad_(i in sides) for i, t in enumerate((student, teacher))]
        for reduction in ("none", "mean"):
            value, gradients = check(KL, *inputs, direction=direction, reduction=reduction)
            assert value.isnan().any() and all(
                g[0].isnan().all() and g[1].isfinite().all() for g in gradients if g is not None
            )
    for weight in (torch.tensor([0.0, 1.0]), torch.tensor([False, True])):
        _, gradients = check(KL, student, teacher, direction=direction, row_weight=weight)
        for g in gradients:
            assert (g[0] == 0).all() and (g[1] != 0).all()


def test_zeros_in_probabilities():
    q, p = pair([[0.25, 0.25, 0.5, 0.0]], [[0.5, 0.5, 0.0, 0.0]])
    value, (grad_q, grad_p) = check(KL, q, p, space="probs", reduction="none")
    torch.testing.assert_close(value.item(), math.log(2.0))
    torch.testing.assert_close(grad_q, torch.tensor([[-2.0, -2.0, 0.0, 0.0]], dtype=torch.float64))
    assert (grad_p[0, 2:] == 0).all()

    q, p = pair([[1.0, 0.0, 0.0]], [[0.5, 0.5, 0.0]])
    value, (grad_q, _) = check(KL, q, p, space="probs", reduction="none")
    assert value == INF
    assert grad_q[0].tolist() == [-0.5, -INF, 0.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@directions
def test_negative_probability_gives_nan(direction, dtype):
    for position in (0, 1):
        rows = [[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]
        bad = [[0.5, 0.6, -0.1], [0.2, 0.3, 0.5]]
        tensors = pair(*((bad, rows) if position == 0 else (rows, bad)), dtype)
        value = td.kl_div(*tensors, space="probs", direction=direction, reduction="none")
        assert value[0].isnan() and value[1].isfinite()


@all_options
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_nan_out(case, dtype):
    for position in (0, 1):
        for classes in (3, 40):
            tensors = [t.detach() for t in case.draw(4, classes, dtype=dtype)]
            tensors[position][2, classes // 2] = NAN
            value, _ = check(case.loss, *(t.requires_grad_() for t in tensors), reduction="none", **case.options)
            assert value.isnan().tolist() == [False, False, True, False]
            for sides in (0, 1):
                assert case.loss(
                    *(t.detach().requires_grad_(i == sides) for i, t in enumerate(tensors)), **case.options
                ).isnan()


@directions
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_logit_gives_nan(direction, dtype):
    for position in (0, 1):
        tensors = [t.detach() for t in KL.draw((2, 5), dtype)]
        tensors[position][0, 3] = INF
        value = td.kl_div(*tensors, direction=direction, reduction="none")
        assert value.isnan().tolist() == [True, False]


def test_probabilities_are_free_variables():
    """Not normalised, not projected: sum p log(p/q) as it stands."""
    q, p = pair([[0.5, 3.0, 0.1]], [[2.0, 1.0, 0.3]])
    value, (grad_q, grad_p) = check(KL, q, p, space="probs", reduction="none")
    torch.testing.assert_close(value, (p * (p / q).log()).sum(-1))
    torch.testing.assert_close(grad_p, ((p / q).log() + 1).detach())
    torch.testing.assert_close(grad_q, (-p / q).detach())
    assert td.kl_div(torch.tensor([[2.0]]), torch.tensor([[1.0]]), space="probs") < 0


# ---- layouts


@all_options
@pytest.mark.parametrize("dim", (0, 1, 2, -1, -2, -3))
def test_dim(case, dim):
    tensors = tuple(t.detach().movedim(-1, dim).contiguous().requires_grad_() for t in case.draw(3, 4, 5))
    check(case.loss, *tensors, dim=dim, reduction="none", **case.options)
    check(case.loss, tensors[0].detach(), tensors[1], dim=dim, **case.options)


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "transposed classes": lambda t: t.transpose(-1, 1).contiguous().transpose(-1, 1),
    "sliced": lambda t: torch.cat([t, t], -1)[..., : t.size(-1)],
    "every second": lambda t: torch.stack([t, t], -1)[..., 0],
    "every second row": lambda t: torch.cat([t, t], 1).reshape(t.size(0), 2, t.size(1), -1)[:, 0],
    "flipped storage": lambda t: torch.cat([t[:1], t])[1:],
    "channels last": lambda t: t.unsqueeze(-1).contiguous(memory_format=torch.channels_last).squeeze(-1),
    "unaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@losses
def test_strides(loss, dtype, name):
    """Any strides on either side: values, and the gradient in the input's shape."""
    for options in loss.transforms:
        case = Case(loss, options)
        dense = case.draw(6, 4, 33, dtype=dtype, grad=())
        for which in ((0,), (1,), (0, 1)):
            tensors = tuple((LAYOUTS[name](t) if i in which else t).requires_grad_() for i, t in enumerate(dense))
            assert all(torch.equal(a, b) for a, b in zip(tensors, dense, strict=True))
            check(loss, *tensors, reduction="none", **options)
            check(loss, tensors[0], tensors[1].detach(), **options)
            check(loss, *tensors, reduction="none", dim=1, **options)


@losses
def test_expanded_input(loss):
    """A stride of 0, over the rows or over the classes."""
    for options in loss.transforms:
        case = Case(loss, options)
        student, teacher = case.draw(6, 33, grad=())
        for shared in (teacher[:1].expand(6, 33), teacher[:, :1].expand(6, 33)):
            check(loss, student.requires_grad_(), shared, **options)
            leaf = shared[:1].clone().requires_grad_()
            case(student, leaf.expand(6, 33)).sum().backward()
            want = loss.reference(
                student.detach(),
                (again := shared[:1].clone().requires_grad_()).expand(6, 33),
                reduction="sum",
                **options,
            )
            torch.testing.assert_close(leaf.grad, torch.autograd.grad(want, again)[0])


@losses
@pytest.mark.parametrize("reduction", ("mean", "sum", "none", "batchmean"))
def test_shapes(loss, reduction):
    for options in loss.transforms:
        for shape in ((7,), (1, 1), (5, 1), (1, 7), (0, 7), (2, 3, 7), (2, 0, 7), (2, 3, 4, 7)):
            if reduction == "batchmean" and len(shape) > 2:
                continue
            value, _ = check(loss, *Case(loss, options).draw(*shape), reduction=reduction, **options)
            assert value.shape == (shape[:-1] if reduction == "none" else ())
            for side in loss.differentiable:
                check(loss, *Case(loss, options).draw(*shape, grad=(side,)), reduction=reduction, **options)


# ---- reductions and weights


@losses
def test_mean_is_over_all_rows_and_batchmean_the_same(loss):
    inputs = Case(loss).draw(8, 5)
    rows = loss(*inputs, reduction="none")
    torch.testing.assert_close(loss(*inputs), rows.mean())
    torch.testing.assert_close(loss(*inputs, reduction="sum"), rows.sum())
    torch.testing.assert_close(loss(*inputs, reduction="batchmean"), rows.mean())
    cube = Case(loss).draw(2, 3, 5)
    torch.testing.assert_close(loss(*cube), loss(*cube, reduction="none").mean())
    torch.testing.assert_close(loss(*cube, normalizer=2), loss(*cube, reduction="none").sum() / 2)


WEIGHTS = {
    "rows": lambda: torch.tensor([[0.5, 0.0, 2.0], [1.0, 0.25, 0.0]]),
    "double": lambda: torch.tensor([[0.5, 0.0, 2.0], [1.0, 0.25, 0.0]], dtype=torch.float64),
    "half": lambda: torch.tensor([[0.5, 0.0, 2.0], [1.0, 0.25, 0.0]], dtype=torch.bfloat16),
    "bool": lambda: torch.tensor([[True, False, True], [True, True, False]]),
    "last": lambda: torch.tensor([0.5, 0.0, 3.0]),
    "first": lambda: torch.tensor([[2.0], [0.0]]),
    "scalar": lambda: torch.tensor(0.5),
    "transposed": lambda: torch.tensor([[0.5, 1.0], [0.0, 0.25], [2.0, 0.0]]).t(),
    "nothing kept": lambda: torch.zeros(2, 3),
    "nothing kept, bool": lambda: torch.zeros(2, 3, dtype=torch.bool),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@losses
def test_row_weight(loss, dtype, reduction, name):
    weight = WEIGHTS[name]()
    for options in loss.transforms:
        for sides in ((0,), (1,), (0, 1)):
            inputs = Case(loss, options).draw(2, 3, 20, dtype=dtype, grad=sides)
            value, gradients = check(loss, *inputs, row_weight=weight, reduction=reduction, **options)
            if "nothing" in name:
                assert (value == 0).all() and all((g == 0).all() for g in gradients if g is not None)
            if reduction == "mean":
                check(loss, *inputs, row_weight=weight, normalizer=torch.tensor(3.5), **options)
                check(loss, *inputs, row_weight=weight, normalizer=7, **options)


@pytest.mark.parametrize("poison", (NAN, INF, -INF))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@all_options
def test_rows_of_weight_zero_contribute_exactly_nothing(case, reduction, poison):
    for weight in (torch.tensor([1.0, 0.0, 0.5]), torch.tensor([True, False, True])):
        for sides in ((0,), (1,), (0, 1)):
            clean = case.draw(3, 9, grad=sides)
            dirty = [t.detach().clone() for t in clean]
            for t in dirty:
                t[1] = poison
            dirty = [t.requires_grad_(i in sides) for i, t in enumerate(dirty)]
            value, gradients = check(case.loss, *dirty, row_weight=weight, reduction=reduction, **case.options)
            want, expected = check(case.loss, *clean, row_weight=weight, reduction=reduction, **case.options)
            assert torch.equal(value, want)
            for g, e in zip(gradients, expected, strict=True):
                assert (g is None) == (e is None)
                if g is not None:
                    assert torch.equal(g, e) and (g[1] == 0).all()


@losses
def test_zero_incoming_gradient_reads_nothing(loss):
    """A row whose incoming gradient is 0 gets zeros, whatever it holds."""
    inputs = [t.detach() for t in Case(loss).draw(3, 9)]
    for t in inputs:
        t[1] = NAN
        t.requires_grad_()
    rows = loss(*inputs, reduction="none")
    for g in torch.autograd.grad(rows, inputs, torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)):
        assert (g[1] == 0).all() and g.isfinite().all()


@losses
@pytest.mark.parametrize("incoming", (0.0, 1.0, 0.25, -3.0, 65536.0))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_incoming_gradient(loss, dtype, incoming):
    for sides in ((0,), (1,), (0, 1)):
        for reduction in ("mean", "sum"):
            check(loss, *Case(loss).draw(4, 31, dtype=dtype, grad=sides), incoming=incoming, reduction=reduction)
    incoming = torch.randn(4, dtype=torch.float64).float()
    check(loss, *Case(loss).draw(4, 31, dtype=dtype), incoming=incoming, reduction="none")


@losses
def test_weights_are_linear(loss):
    inputs = Case(loss).draw(6, 5)
    a, b = torch.rand(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    f = lambda w: loss(*inputs, row_weight=w, reduction="sum")  # noqa: E731
    torch.testing.assert_close(f(a + 2 * b), f(a) + 2 * f(b))


# ---- what must hold whatever the numbers are


@directions
def test_swapping_sides_swaps_direction(direction):
    for space in SPACES:
        for target_space in SPACES:
            a, b = Case(KL, {"space": space, "target_space": target_space}).draw(5, 40, dtype=torch.float32)
            other = DIRECTIONS[1 - DIRECTIONS.index(direction)]
            x = td.kl_div(a, b, direction=direction, space=space, target_space=target_space, reduction="none")
            y = td.kl_div(b, a, direction=other, space=target_space, target_space=space, reduction="none")
            assert torch.equal(x, y)
            for g, h in zip(torch.autograd.grad(x.sum(), (a, b)), torch.autograd.grad(y.sum(), (a, b)), strict=True):
                assert torch.equal(g, h)


@directions
@single_and_double
def test_shift_invariance(direction, dtype):
    """Adding a number to all logits of a row changes nothing, to the bit where the sums are exact."""
    student, teacher = ((t * 1024).round() / 1024 for t in KL.draw((6, 50), dtype))
    value = td.kl_div(student, teacher, direction=direction, reduction="none")
    for shift in (8.0, -64.0, 512.0):
        torch.testing.assert_close(
            td.kl_div(student + shift, teacher - shift / 2, direction=direction, reduction="none"),
            value,
            rtol=2 * ROW_ACCURACY[dtype],
            atol=0,
        )


@all_options
def test_permutation_invariance(case):
    inputs = case.draw(6, 50)
    order = torch.randperm(50)
    rows = case(*inputs)
    permuted = case(*(t[:, order] for t in inputs))
    torch.testing.assert_close(permuted, rows, rtol=1e-11, atol=1e-15)
    gradients = torch.autograd.grad(rows.sum(), inputs)
    for g, h in zip(gradients, torch.autograd.grad(permuted.sum(), inputs), strict=True):
        torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-15)


@directions
@single_and_double
def test_gradients_of_logits_sum_to_zero(direction, dtype):
    inputs = tuple(t.requires_grad_() for t in KL.draw((6, 500), dtype))
    for g in torch.autograd.grad(td.kl_div(*inputs, direction=direction, reduction="sum"), inputs):
        assert (g.double().sum(-1).abs() <= 500 * torch.finfo(dtype).eps * g.abs().amax(-1)).all()


def test_hot_temperature_limit():
    """T^2 KL -> half the variance over the classes of t - s."""
    student, teacher = KL.draw((6, 40), torch.float64)
    want = (teacher - student).var(-1, correction=0) / 2
    for t, rtol in ((1e2, 0.1), (1e4, 1e-3), (1e6, 1e-5)):
        torch.testing.assert_close(
            t * t * td.kl_div(student, teacher, temperature=t, reduction="none"), want, rtol=rtol, atol=0
        )


@directions
def test_pinsker(direction):
    for size in (1e-3, 0.1, 1.0, 10.0):
        student, teacher = (size * t for t in KL.draw((200, 30), torch.float64))
        tvd = (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1) / 2
        assert (td.kl_div(student, teacher, direction=direction, reduction="none") >= 2 * tvd**2 * (1 - 1e-9)).all()


def test_spaces_agree():
    """The same two distributions in any pair of spaces, at any temperature that was applied to both."""
    student, teacher = KL.draw((5, 30), torch.float64)
    want = td.kl_div(student, teacher, temperature=2.0, reduction="none")
    for space in SPACES:
        for target_space in SPACES:
            a, b = (x if s == "logits" else to_space(x / 2, s) for x, s in ((student, space), (teacher, target_space)))
            t = 2.0 if "logits" in (space, target_space) else 1.0
            got = td.kl_div(a, b, space=space, target_space=target_space, temperature=t, reduction="none")
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@all_options
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_threads_and_runs(case, dtype):
    """Bit-identical from run to run, and accurate with another number of threads; long rows are split by columns."""
    for shape in ((64, 100), (1, 70001), (3, 20000)):
        inputs = case.draw(*shape, dtype=dtype)

        def run(threads, inputs=inputs):
            torch.set_num_threads(threads)
            value = case(*inputs, reduction="mean")
            one = case(inputs[0], inputs[1].detach(), reduction="mean")
            return value, one, *torch.autograd.grad(value, inputs), *torch.autograd.grad(one, inputs[:1])

        first, again, single = run(2), run(2), run(1)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(single, run(1), strict=True))
        expected = expect(case.loss, *(t.detach() for t in inputs), **case.options)
        for run_ in (first, single):
            assert_within(run_[0], expected.value, expected.value_allowed, "value")
            for n in (0, 1):
                assert_within(run_[2 + n], expected.gradients[n], expected.gradients_allowed[n], f"gradient {n}")


def test_autocast_casts_nothing():
    for dtype in (torch.float32, torch.bfloat16):
        inputs = Case(KL).draw(4, 9, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            value = td.kl_div(*inputs)
        assert value.dtype == torch.float32 and torch.equal(value, td.kl_div(*inputs))
        assert all(g.dtype == dtype for g in torch.autograd.grad(value, inputs))


@single_and_double
@pytest.mark.parametrize("gap", (8.0, 12.0, 16.0, 20.0))
def test_hessian_of_rows_peaked_apart(gap, dtype):
    """P's and Q's mass on one class each: a row's second derivatives, norm-wise, as good as those in float64."""
    generator = torch.Generator().manual_seed(4)
    student, teacher, *directions = (torch.randn(6, 5, generator=generator) for _ in range(4))
    student[:, 0] += gap
    teacher[:, 2] += gap

    def products(dtype):
        pair = [t.to(dtype).requires_grad_() for t in (student, teacher)]
        gradients = torch.autograd.grad(td.kl_div(*pair, reduction="sum"), pair, create_graph=True)
        along = sum((g * v.to(dtype)).sum() for g, v in zip(gradients, directions, strict=True))
        return torch.autograd.grad(along, pair)

    for got, want in zip(products(dtype), products(torch.float64), strict=True):
        assert ((got.double() - want).abs().amax(-1) <= 2e-6 * want.abs().amax(-1)).all()


@losses
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_tangents_of_half_inputs(loss, dtype):
    """A derivative along a direction is a loss's own type, not as coarse as a gradient."""
    generator = torch.Generator().manual_seed(6)
    pair = tuple(torch.randn(5, 40, generator=generator).to(dtype) for _ in range(2))
    along = tuple(torch.randn(5, 40, generator=generator).to(dtype) for _ in range(2))

    def tangent(kind):
        inputs, vectors = (tuple(t.to(kind) for t in ts) for ts in (pair, along))
        return torch.func.jvp(lambda *x: loss(*x, reduction="none"), inputs, vectors)[1]

    torch.testing.assert_close(tangent(dtype), tangent(torch.float32), rtol=1e-5, atol=1e-6)
