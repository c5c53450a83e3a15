"""kl_div_topk: values and gradients against the definition, its limits, transforms and errors."""

import itertools
import pickle

import mpmath
import numpy as np
import pytest
import torch
import torch_divergence as td
from loss import DIRECTIONS, DTYPES, OPS, ROW_ACCURACY, SPACES, randn, to_space
from torch import Tensor

TAILS = ("bucket", "zero", "renorm_target", "renorm_both")
INF = float("inf")
CHOICES = list(itertools.product(TAILS, DIRECTIONS, SPACES))
FEW = [("bucket", "forward", "logits"), ("bucket", "reverse", "probs"), ("renorm_both", "reverse", "logits")]
FEW += [("zero", "forward", "logits"), ("renorm_target", "reverse", "log_probs")]


def draw(rows: int, classes: int, k: int, dtype=torch.float64, space: str = "logits", seed: int = 0):
    """input, indices, log_probs; the teacher's top k."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = randn(2, rows, classes, dtype=torch.float64, generator=generator)
    log_probs, indices = teacher.log_softmax(-1).topk(k)
    # bfloat16 rounds a mass of 1 up
    shift = 0.05 if dtype in (torch.bfloat16, torch.float16) else 0
    return to_space(student, space).to(dtype), indices, (log_probs - shift).to(dtype)


def reference(
    x, indices, log_probs, *, tail="bucket", tail_log_prob=None, direction="forward", space="logits", temperature=1.0
):
    """The rows by the definition, in differentiable ATen operators; no padding."""
    log_q = {"logits": lambda: (x / temperature).log_softmax(-1), "log_probs": lambda: x, "probs": x.log}[space]()
    outside = torch.ones_like(log_q, dtype=torch.bool).scatter(-1, indices, False)
    log_p, log_q_k = log_probs, log_q.gather(-1, indices)
    if tail == "bucket":
        left = tail_log_prob if tail_log_prob is not None else torch.log1p(-log_p.exp().sum(-1))
        log_p = torch.cat([log_p, left.unsqueeze(-1)], -1)
        log_q_k = torch.cat([log_q_k, torch.where(outside, log_q, -INF).logsumexp(-1, keepdim=True)], -1)
    if tail in ("renorm_target", "renorm_both"):
        log_p = log_p.log_softmax(-1)
    if tail == "renorm_both":
        log_q_k = log_q_k.log_softmax(-1)
    a, b = (log_p, log_q_k) if direction == "forward" else (log_q_k, log_p)
    return (a.exp() * (a - b)).sum(-1)


def mp_row(x, indices, log_probs, tail, direction, space, temperature=1.0, tail_log_prob=None):
    """One row by mpmath: the value and the sum of the sizes of its terms."""
    with mpmath.workdps(50):
        x = [mpmath.mpf(v) for v in x]
        scale = mpmath.mpf(temperature)
        q = {
            "logits": lambda: [mpmath.exp(v / scale) for v in x],
            "log_probs": lambda: [mpmath.exp(v) for v in x],
            "probs": lambda: x,
        }[space]()
        total = mpmath.fsum(q) if space == "logits" else mpmath.mpf(1)
        q = [v / total for v in q]
        pairs = [(i, mpmath.exp(mpmath.mpf(v))) for i, v in zip(indices, log_probs, strict=True) if v != -INF]
        p_k, q_k = [v for _, v in pairs], [q[i] for i, _ in pairs]
        if tail == "bucket":
            p_k.append(1 - mpmath.fsum(p_k) if tail_log_prob is None else mpmath.exp(mpmath.mpf(tail_log_prob)))
            q_k.append(mpmath.fsum(v for i, v in enumerate(q) if i not in {j for j, _ in pairs}))
        if tail in ("renorm_target", "renorm_both"):
            p_k = [v / mpmath.fsum(p_k) for v in p_k]
        if tail == "renorm_both":
            q_k = [v / mpmath.fsum(q_k) for v in q_k]
        a, b = (p_k, q_k) if direction == "forward" else (q_k, p_k)
        terms = [u * mpmath.log(u / v) for u, v in zip(a, b, strict=True) if u > 0]
        sizes = [u * (abs(mpmath.log(u)) + abs(mpmath.log(v))) for u, v in zip(a, b, strict=True) if u > 0]
        if tail == "bucket" and tail_log_prob is None and p_k[-1] > 0:
            # the teacher's tail is what its mass leaves of 1: the terms of that sum count as often as the tail does
            slope = q_k[-1] / p_k[-1] if direction == "reverse" else abs(mpmath.log(p_k[-1] / q_k[-1])) + 1
            sizes.append(slope * mpmath.fsum(u * (abs(mpmath.log(u)) + 1) for u in p_k[:-1]))
        return float(mpmath.fsum(terms)), float(mpmath.fsum(sizes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tail", "direction", "space"), CHOICES)
def test_values(tail: str, direction: str, space: str, dtype: torch.dtype) -> None:
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for k, classes in ((1, 2), (1, 7), (2, 7), (6, 7), (40, 500)):
        x, indices, log_probs = draw(3, classes, k, dtype, space)
        got = td.kl_div_topk(x, indices, log_probs, tail=tail, direction=direction, space=space, reduction="none")
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for i in range(3):
            given = x[i].double().tolist(), indices[i].tolist(), log_probs[i].double().tolist()
            value, size = mp_row(*given, tail, direction, space)
            assert abs(got[i].item() - value) <= 8 * eps * size, (k, classes, i)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tail", ["bucket", "renorm_both"])
def test_near_equality(tail: str, dtype: torch.dtype, direction: str) -> None:
    for size in (1e-1, 1e-2, 1e-4, 1e-6):
        teacher = torch.randn(300, dtype=torch.float64)
        student = (teacher + size * torch.randn(300, dtype=torch.float64)).to(dtype)
        log_probs, indices = teacher.log_softmax(-1).topk(30)
        log_probs = log_probs.to(dtype)
        got = td.kl_div_topk(student, indices, log_probs, tail=tail, direction=direction)
        value, _ = mp_row(student.tolist(), indices.tolist(), log_probs.tolist(), tail, direction, "logits")
        # in float64 the logarithms' own rounding, 1e-15, is what differences of `size` are made of
        allowed = max(2e-15 / size, ROW_ACCURACY[dtype]) if dtype == torch.float64 else ROW_ACCURACY[dtype]
        assert abs(got.item() - value) <= allowed * value, size


def test_json_case() -> None:
    x = torch.tensor([[0.5, -1.0, 2.0, 0.25, 1.0]], dtype=torch.float64, requires_grad=True)
    log_probs = torch.tensor([[-0.5108256237659907, -1.3862943611198906]], dtype=torch.float64)
    expected = {"bucket": 0.02909507271200485, "zero": 0.10340256896346299}
    expected |= {"renorm_target": 0.2841690106312608, "renorm_both": 0.0015818352047423793}
    for tail, value in expected.items():
        loss = td.kl_div_topk(x, torch.tensor([[2, 4]]), log_probs, tail=tail)
        assert loss.item() == pytest.approx(value, rel=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("tail", "direction", "space"), CHOICES)
def test_gradients_by_definition(tail: str, direction: str, space: str, dtype: torch.dtype) -> None:
    options = {"tail": tail, "direction": direction, "space": space}
    if space == "logits":
        options["temperature"] = 1.5
    x, indices, log_probs = draw(4, 300, 20, dtype, space)
    given = [x.requires_grad_(), log_probs.requires_grad_()]
    wide = [t.detach().double().requires_grad_() for t in given]
    weight = torch.rand(4, dtype=torch.float64)
    got = torch.autograd.grad(
        td.kl_div_topk(x, indices, log_probs, reduction="none", **options), given, weight.to(dtype)
    )
    expected = torch.autograd.grad(reference(wide[0], indices, wide[1], **options), wide, weight)
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == dtype
        scale = e.abs().amax(-1, keepdim=True)
        assert ((g.double() - e).abs() <= ROW_ACCURACY[dtype] * scale).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equals_kl_div(direction: str, dtype: torch.dtype) -> None:
    student, teacher = torch.randn(2, 5, 9, dtype=dtype)
    student.requires_grad_()
    full = td.kl_div(student, teacher.log_softmax(-1), target_space="log_probs", direction=direction, reduction="none")
    (expected,) = torch.autograd.grad(full.sum(), student)
    tolerance = {"rtol": 1e-11, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 2e-6}
    for k in (8, 9):
        log_probs, indices = teacher.log_softmax(-1).topk(k)
        for tail in TAILS if k == 9 else ("bucket",):
            got = td.kl_div_topk(student, indices, log_probs, tail=tail, direction=direction, reduction="none")
            torch.testing.assert_close(got, full, **tolerance)
            torch.testing.assert_close(torch.autograd.grad(got.sum(), student)[0], expected, **tolerance)


@pytest.mark.parametrize(("tail", "direction", "space"), CHOICES)
def test_gradcheck(tail: str, direction: str, space: str) -> None:
    x, indices, log_probs = draw(2, 5, 2, space=space)
    log_probs = log_probs - 0.1
    given_tail = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    temperature = 1.7 if space == "logits" else 1.0

    def f(*tensors: Tensor) -> Tensor:
        return td.kl_div_topk(
            tensors[0],
            indices,
            tensors[1],
            tail_log_prob=tensors[2] if tensors[2:] else None,
            tail=tail,
            direction=direction,
            space=space,
            temperature=temperature,
            reduction="none",
        )

    for tensors in ((x, log_probs), (x, log_probs, given_tail))[: 2 if tail == "bucket" else 1]:
        leaves = tuple(t.clone().requires_grad_() for t in tensors)
        assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(f, leaves, check_fwd_over_rev=True)
        for only in range(len(tensors)):  # one gradient alone
            leaves = tuple(t.clone().requires_grad_(i == only) for i, t in enumerate(tensors))
            assert torch.autograd.gradcheck(f, leaves)
            assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize(("tail", "direction", "space"), CHOICES)
def test_third_derivative(tail: str, direction: str, space: str) -> None:
    x, indices, log_probs = draw(2, 5, 2, space=space)
    options = {"tail": tail, "direction": direction, "space": space}

    def third(f, *tensors: Tensor) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        value = f(leaves[0], indices, leaves[1], **options).sum()
        for _ in range(2):
            gradients = torch.autograd.grad(value, leaves, create_graph=True)
            value = sum((g * torch.sin(torch.arange(g.numel())).reshape(g.shape)).sum() for g in gradients)
        return list(torch.autograd.grad(value, leaves))

    got = third(lambda *a, **o: td.kl_div_topk(*a, reduction="none", **o), x, log_probs)
    for g, e in zip(got, third(reference, x, log_probs), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-11)


def test_padding_is_dropped() -> None:
    x, indices, log_probs = draw(3, 8, 3)
    padded = torch.cat([torch.tensor([[-7], [99], [0]]), indices], -1)
    values = torch.cat([torch.full((3, 1), -INF, dtype=torch.float64), log_probs], -1).requires_grad_()
    x = x.requires_grad_()
    for tail, direction in itertools.product(TAILS, DIRECTIONS):
        got = td.kl_div_topk(x, padded, values, tail=tail, direction=direction)
        plain = log_probs.clone().requires_grad_()
        expected = td.kl_div_topk(x, indices, plain, tail=tail, direction=direction)
        assert torch.equal(got, expected)
        g, e = torch.autograd.grad(got, [x, values]), torch.autograd.grad(expected, [x, plain])
        assert torch.equal(g[0], e[0]) and torch.equal(g[1][:, 1:], e[1]) and not g[1][:, 0].any()
    # nothing left: all mass is in the tail
    none = torch.full((1, 2), -INF, dtype=torch.float64)
    assert td.kl_div_topk(x[:1], indices[:1, :2], none).item() == pytest.approx(0, abs=1e-15)
    assert td.kl_div_topk(x[:1], indices[:1, :2], none, tail="renorm_both").isnan()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_masked_student_classes(direction: str) -> None:
    x, indices, log_probs = draw(3, 8, 3)
    wide = torch.cat([torch.full((3, 2), -INF, dtype=torch.float64), x], -1).requires_grad_()
    x = x.requires_grad_()
    for tail in TAILS:
        got = td.kl_div_topk(wide, indices + 2, log_probs, tail=tail, direction=direction)
        expected = td.kl_div_topk(x, indices, log_probs, tail=tail, direction=direction)
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)
        g, e = torch.autograd.grad(got, wide)[0], torch.autograd.grad(expected, x)[0]
        assert not g[:, :2].any()
        torch.testing.assert_close(g[:, 2:], e, rtol=1e-13, atol=1e-16)


def test_infinities() -> None:
    x = torch.tensor([[1.0, -INF, 0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    indices, log_probs = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]], dtype=torch.float64).log().requires_grad_()
    loss = td.kl_div_topk(x, indices, log_probs)  # q = 0 < p
    g_x, g_p = torch.autograd.grad(loss, [x, log_probs])
    assert loss.item() == INF and g_x.isfinite().all() and not g_p.any()
    assert td.kl_div_topk(x, indices, log_probs, direction="reverse").isfinite()

    whole = torch.tensor([[1.0005]]).log()  # mass above 1: no tail
    y = torch.randn(1, 4, requires_grad=True)
    forward = td.kl_div_topk(y, torch.tensor([[2]]), whole)
    expected = 1.0005 * (whole.squeeze() - y.log_softmax(-1)[0, 2])
    torch.testing.assert_close(forward, expected)
    reverse = td.kl_div_topk(y, torch.tensor([[2]]), whole, direction="reverse")
    assert reverse.item() == INF and not torch.autograd.grad(reverse, y)[0].any()

    only = torch.tensor([[0.0, -INF, -INF]], requires_grad=True)  # the student has nothing outside
    close, missing = torch.tensor([[0.9995]]).log(), torch.tensor([[0.9]]).log()
    assert td.kl_div_topk(only, torch.tensor([[0]]), close).isfinite()
    assert td.kl_div_topk(only, torch.tensor([[0]]), missing).item() == INF


def test_far_tail() -> None:
    """A tail far below the smallest double still gets its gradient."""
    x = torch.tensor([[0.0, -2000.0, -2000.0]], dtype=torch.float64, requires_grad=True)
    log_probs = torch.tensor([[0.75]], dtype=torch.float64).log()
    loss = td.kl_div_topk(x, torch.tensor([[0]]), log_probs)
    exact = 0.75 * np.log(0.75) + 0.25 * (np.log(0.25) + 2000 - np.log(2))
    assert loss.item() == pytest.approx(exact, rel=1e-14)
    expected = torch.tensor([[0.25, -0.125, -0.125]], dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("tail", TAILS)
def test_weight_zero_rows_hold_anything(tail: str) -> None:
    x, indices, log_probs = draw(4, 8, 3)
    clean = td.kl_div_topk(x[1:3], indices[1:3], log_probs[1:3], tail=tail)
    x[0], indices[0], log_probs[3] = float("nan"), 99, 5.0
    x, log_probs = x.requires_grad_(), log_probs.requires_grad_()
    keep = torch.tensor([False, True, True, False])
    loss = td.kl_div_topk(x, indices, log_probs, tail=tail, row_weight=keep)
    torch.testing.assert_close(loss, clean, rtol=1e-15, atol=0)
    first = torch.autograd.grad(loss, [x, log_probs], create_graph=True)
    second = torch.autograd.grad(sum((g * g).sum() for g in first), [x, log_probs])
    for g in (*first, *second):
        assert g.isfinite().all() and not g[~keep].any()
    nan = td.kl_div_topk(
        x.detach().index_fill(1, indices[1], float("nan")),
        indices.clamp(max=7),
        log_probs.detach().clamp(max=-3),
        tail=tail,
        row_weight=keep,
    )
    assert nan.isnan()


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("classes", [6, 40000])
def test_dim_and_strides(dim: int, classes: int) -> None:
    x, indices, log_probs = draw(6, classes, 4)
    expected = td.kl_div_topk(x, indices, log_probs, reduction="none").reshape(2, 3)

    def place(t: Tensor) -> Tensor:
        return t.reshape(2, 3, -1).movedim(-1, dim)

    leaf = place(x).clone().requires_grad_()
    sliced = torch.stack([leaf, leaf], -1)[..., 0]
    for y in (leaf, sliced):
        got = td.kl_div_topk(y, place(indices), place(log_probs), dim=dim, reduction="none")
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)
    tail = torch.log1p(-log_probs.exp().sum(-1)).reshape(2, 3)
    got = td.kl_div_topk(leaf, place(indices), place(log_probs), dim=dim, tail_log_prob=tail, reduction="none")
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-15)


def test_long_rows_on_any_number_of_threads() -> None:
    x, indices, log_probs = draw(1, 200_000, 300, torch.float32)
    x.requires_grad_()
    results = []
    for threads in (2, 2):
        torch.set_num_threads(threads)
        loss = td.kl_div_topk(x, indices, log_probs)
        results.append((loss, torch.autograd.grad(loss, x)[0]))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    exact = reference(x.detach().double(), indices, log_probs.double())
    torch.testing.assert_close(results[0][0].double(), exact.squeeze(), rtol=2e-6, atol=0)


def test_reductions() -> None:
    x, indices, log_probs = draw(4, 8, 3)
    rows = td.kl_div_topk(x, indices, log_probs, reduction="none")
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0], dtype=torch.float64)
    args = (x, indices, log_probs)
    torch.testing.assert_close(td.kl_div_topk(*args), rows.mean())
    torch.testing.assert_close(td.kl_div_topk(*args, reduction="batchmean"), rows.mean())
    torch.testing.assert_close(td.kl_div_topk(*args, reduction="sum"), rows.sum())
    torch.testing.assert_close(td.kl_div_topk(*args, row_weight=weight), (rows * weight).sum() / 3.5)
    torch.testing.assert_close(td.kl_div_topk(*args, normalizer=7.0), rows.sum() / 7)
    assert td.kl_div_topk(*args, row_weight=torch.zeros(4)).item() == 0
    assert td.kl_div_topk(x[:0], indices[:0], log_probs[:0]).item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype: torch.dtype) -> None:
    x, indices, log_probs = draw(3, 50, 5, dtype)
    x, log_probs = x.requires_grad_(), log_probs.requires_grad_()
    loss = td.kl_div_topk(x, indices, log_probs)
    g_x, g_p = torch.autograd.grad(loss, [x, log_probs])
    assert loss.dtype == torch.float32 and g_x.dtype == dtype and g_p.dtype == dtype
    wide = [t.detach().float().requires_grad_() for t in (x, log_probs)]
    same = td.kl_div_topk(wide[0], indices, wide[1])
    assert torch.equal(loss, same)
    for g, e in zip((g_x, g_p), torch.autograd.grad(same, wide), strict=True):
        torch.testing.assert_close(g, e.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
    mixed = td.kl_div_topk(wide[0], indices, log_probs)  # a float32 student of a half teacher
    assert torch.equal(mixed, loss)


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("tail", "direction", "space"), CHOICES)
def test_value_and_grad(tail: str, direction: str, space: str, dtype: torch.dtype, near: bool) -> None:
    """Loss and gradient of one visit are those of the two operators."""
    options = {"tail": tail, "direction": direction, "space": space}
    if space == "logits":
        options["temperature"] = 1.5
    for classes, k in ((9, 4), (9, 9), (100, 64), (5000, 40)):
        x, indices, log_probs = draw(5, classes, k, dtype, space)
        if near:
            student = torch.randn(5, classes, dtype=torch.float64)
            log_probs, indices = (student / options.get("temperature", 1.0)).log_softmax(-1).topk(k)
            x, log_probs = to_space(student + 1e-3 * student.sin(), space).to(dtype), log_probs.to(dtype)
        x.requires_grad_()
        weight = torch.tensor([0.5, 1.0, 0.0, 2.0, 1.0], dtype=dtype)
        rows = td.kl_div_topk(x, indices, log_probs, reduction="none", **options)
        expected = (weight * rows).sum() / 4.5
        loss = td.kl_div_topk(x, indices, log_probs, row_weight=weight, **options)
        assert "ValueAndGrad" in loss.grad_fn.name()
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(loss, expected, rtol=10 * eps, atol=eps * rows.detach().abs().max().item())
        for incoming in (1.0, 3.0):
            g, e = (
                torch.autograd.grad(v, x, torch.tensor(incoming, dtype=dtype), retain_graph=True)[0]
                for v in (loss, expected)
            )
            size = e.abs().amax(-1, keepdim=True)
            assert ((g - e).abs() <= ROW_ACCURACY[dtype] * size).all() and not g[2].any()
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        (again,) = torch.autograd.grad(expected, x, create_graph=True)
        torch.testing.assert_close(first, again)
        v = torch.randn_like(x)
        torch.testing.assert_close(torch.autograd.grad(first, x, v)[0], torch.autograd.grad(again, x, v)[0])


def test_value_and_grad_where_nothing_else_is_asked() -> None:
    x, indices, log_probs = draw(3, 6, 2)
    leaf, teacher = x.clone().requires_grad_(), log_probs.clone().requires_grad_()
    one_visit = td.kl_div_topk(leaf, indices, log_probs)
    assert "ValueAndGrad" in one_visit.grad_fn.name()
    one_visit.backward()
    for loss in (
        td.kl_div_topk(leaf, indices, teacher),
        td.kl_div_topk(leaf, indices, log_probs, tail_log_prob=teacher[:, 0] - 2),
        td.kl_div_topk(leaf, indices, log_probs, reduction="none").mean(),
        td.kl_div_topk(leaf.to(torch.bfloat16), indices, log_probs.to(torch.bfloat16) - 0.05),
    ):
        assert "ValueAndGrad" not in loss.grad_fn.name()
    with pytest.raises(ValueError, match="twice in row 0"):
        td.kl_div_topk(leaf, indices[:, :1].expand(-1, 2), log_probs)
    # what a row marks is taken back before the next one
    shared = td.kl_div_topk(leaf, indices[:1].expand(3, -1), log_probs[:1].expand(3, -1))
    assert shared.isfinite()


@pytest.mark.parametrize(("tail", "direction", "space"), FEW)
def test_torch_func(tail: str, direction: str, space: str) -> None:
    x, indices, log_probs = draw(3, 6, 2, space=space)
    options = {"tail": tail, "direction": direction, "space": space}

    def ours(a: Tensor, i: Tensor, b: Tensor) -> Tensor:
        return td.kl_div_topk(a, i, b, reduction="sum", **options)

    def textbook(a: Tensor, i: Tensor, b: Tensor) -> Tensor:
        return reference(a, i, b, **options).sum()

    f = torch.func
    for transform in (
        lambda g: f.grad(g, (0, 2))(x, indices, log_probs),
        lambda g: f.vmap(f.grad(g, (0, 2)))(x, indices, log_probs),
        lambda g: f.vmap(g, (0, None, 0))(x, indices[0], log_probs),
        lambda g: f.vmap(f.hessian(g, (0, 2)))(x, indices, log_probs),
        lambda g: f.jacrev(g, 2)(x, indices, log_probs),
        lambda g: f.jvp(lambda a, b: g(a, indices, b), (x, log_probs), (x.sin(), log_probs.cos())),
        lambda g: f.jvp(f.grad(lambda a: g(a, indices, log_probs)), (x,), (x.sin(),)),
        lambda g: f.vmap(f.grad(lambda a, i, b: g(a[None], i[None], b[None])), (1, 1, 1))(x.T, indices.T, log_probs.T),
    ):
        torch.testing.assert_close(transform(ours), transform(textbook), rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck itself looks at it
@pytest.mark.parametrize(("tail", "direction", "space"), FEW)
def test_opcheck(tail: str, direction: str, space: str) -> None:
    x, indices, log_probs = draw(3, 5, 2, space=space)
    static = (SPACES.index(space), TAILS.index(tail), direction == "reverse", 1.0)
    weight = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    for left in (None, torch.full((3,), -2.0, dtype=torch.float64))[: 2 if tail == "bucket" else 1]:
        _, stat = OPS._kl_div_topk(x, indices, log_probs, left, weight, *static)
        for needs in (False, True):
            visited = x.clone().requires_grad_(needs)
            torch.library.opcheck(
                OPS._kl_div_topk_value_and_grad.default,
                (visited, indices, log_probs, left, None if needs else weight, *static, 0.25, 2.0),
            )
            a, b, grad = (t.clone().requires_grad_(needs) for t in (x, log_probs, weight + 1))
            c = None if left is None else left.clone().requires_grad_(needs)
            torch.library.opcheck(OPS._kl_div_topk.default, (a, indices, b, c, weight, *static))
            torch.library.opcheck(OPS._kl_div_topk.default, (a, indices, b, c, None, *static))
            for mask in itertools.product((False, True), repeat=2 if left is None else 3):
                full = [*mask, *[False] * (3 - len(mask))]
                torch.library.opcheck(OPS._kl_div_topk_backward.default, (grad, a, indices, b, stat, c, *static, full))
            vectors = (x.cos(), log_probs.sin(), None if left is None else left.sin())
            masks = [[True, True, True, left is not None], [False, True, False, False], [True, False, True, False]]
            for v, full in itertools.product((vectors, (vectors[0], None, None), (None, vectors[1], None)), masks):
                torch.library.opcheck(
                    OPS._kl_div_topk_double_backward.default, (*v, grad, a, indices, b, stat, c, *static, full)
                )


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    x, indices, log_probs = draw(3, 6, 2)
    x, log_probs = x.requires_grad_(), log_probs.requires_grad_()
    compiled = torch.compile(td.kl_div_topk, fullgraph=True, dynamic=dynamic)
    got, expected = compiled(x, indices, log_probs), td.kl_div_topk(x, indices, log_probs)
    torch.testing.assert_close(got, expected)
    g, e = (torch.autograd.grad(v, [x, log_probs]) for v in (got, expected))
    torch.testing.assert_close(g, e)


@pytest.mark.slow
def test_export() -> None:
    x, indices, log_probs = draw(3, 6, 2)
    module = td.KLDivTopKLoss(direction="reverse")
    exported = torch.export.export(module, (x, indices, log_probs)).module()
    torch.testing.assert_close(exported(x, indices, log_probs), module(x, indices, log_probs))


def test_module() -> None:
    module = td.KLDivTopKLoss(tail="zero", direction="reverse", temperature=2.0, reduction="none")
    assert repr(module) == (
        "KLDivTopKLoss(tail='zero', direction='reverse', space='logits', temperature=2.0, dim=-1, reduction='none')"
    )
    x, indices, log_probs = draw(3, 6, 2)
    expected = td.kl_div_topk(
        x, indices, log_probs, tail="zero", direction="reverse", temperature=2.0, reduction="none"
    )
    assert torch.equal(pickle.loads(pickle.dumps(module))(x, indices, log_probs), expected)
    assert not module.state_dict()
    weight, left = torch.tensor([1.0, 0.0, 2.0]), torch.full((3,), -1.0, dtype=torch.float64)
    got = td.KLDivTopKLoss()(x, indices, log_probs, left, weight, 4.0)
    assert torch.equal(
        got, td.kl_div_topk(x, indices, log_probs, tail_log_prob=left, row_weight=weight, normalizer=4.0)
    )


X, INDICES, P = draw(3, 6, 2)
BAD = {
    "indices-dtype": ({"indices": INDICES.int()}, "indices has dtype"),
    "indices-shape": ({"indices": INDICES[:, :1]}, "indices has shape"),
    "log_probs-shape": ({"log_probs": P[:2]}, "log_probs has shape"),
    "log_probs-empty": ({"log_probs": P[:, :0], "indices": INDICES[:, :0]}, "log_probs has shape"),
    "log_probs-dims": ({"log_probs": P[0]}, "log_probs has shape"),
    "log_probs-dtype": ({"log_probs": P.float()}, "input has dtype"),
    "log_probs-int": ({"log_probs": INDICES}, "log_probs has dtype"),
    "input-dtype": ({"input": X.long()}, "input has dtype"),
    "input-classes": ({"input": X[:, :0]}, "no classes"),
    "tail": ({"tail": "drop"}, 'tail is "drop"'),
    "tail_log_prob-tail": ({"tail": "zero", "tail_log_prob": X[:, 0]}, "tail_log_prob is given"),
    "tail_log_prob-shape": ({"tail_log_prob": X[:2, 0]}, "tail_log_prob has shape"),
    "tail_log_prob-dtype": ({"tail_log_prob": X[:, 0].float()}, "tail_log_prob"),
    "direction": ({"direction": "both"}, "direction is"),
    "space": ({"space": "prob"}, "space is"),
    "temperature": ({"temperature": 0.0}, "temperature is"),
    "temperature-space": ({"temperature": 2.0, "space": "probs"}, "temperature is"),
    "dim": ({"dim": 2}, "dim is"),
    "row_weight-shape": ({"row_weight": torch.ones(4)}, "row_weight has shape"),
    "reduction": ({"reduction": "avg"}, "reduction is"),
    "normalizer": ({"normalizer": -1.0}, "normalizer is"),
}
BAD_VALUES = {
    "indices-range": ({"indices": INDICES + 6}, "indices holds"),
    "indices-negative": ({"indices": INDICES - 6}, "indices holds"),
    "indices-twice": ({"indices": INDICES[:, :1].expand(-1, 2)}, "twice in row 0"),
    "log_probs-mass": ({"log_probs": P + 3}, "log_probs of row 0 have the mass"),
    "row_weight-negative": ({"row_weight": torch.tensor([1.0, -1.0, 1.0])}, "row_weight holds"),
}


@pytest.mark.parametrize("case", [*BAD, *BAD_VALUES])
def test_errors(case: str) -> None:
    change, words = (BAD | BAD_VALUES)[case]
    arguments = {"input": X, "indices": INDICES, "log_probs": P, **change}
    if case in BAD_VALUES:  # of a GPU's values nobody is told
        arguments = {k: v.cpu() for k, v in arguments.items()}
    with pytest.raises(ValueError, match="kl_div_topk: ") as error:
        td.kl_div_topk(**arguments)
    assert words in str(error.value)
    if case in BAD and case != "normalizer":
        meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()}
        with pytest.raises(ValueError, match="kl_div_topk: "):
            td.kl_div_topk(**meta)
