from collections.abc import Iterator
from itertools import product
from typing import Any

import mpmath
import numpy as np
import torch
from loss import (
    OPS,
    SPACES,
    Case,
    Exact,
    JsonCase,
    Loss,
    Operator,
    Rows,
    compute_dtype,
    largest,
    log_softmax,
    pair_operators,
    times,
    to_space,
)
from torch import Tensor

from losses.kl_div import kl_draw

# H(P', Q) = -sum p' log q with P' = (1 - s) P + s/K: of distributions (CROSS_ENTROPY) and of class labels
# (CROSS_ENTROPY_LABELS), where P is 1 at the label. Zeros and infinities as the documentation of cross_entropy says.


def _neg_log(x: Tensor, space: str, temperature: float) -> Tensor:
    if space == "logits":
        return -torch.log_softmax(x / temperature, -1)
    return -x if space == "log_probs" else -x.log()


def ce_rows(
    x: Tensor,
    target: Tensor,
    *,
    space: str = "logits",
    target_space: str | None = None,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    **_: Any,
) -> Tensor:
    target_space = target_space or "probs"
    n = _neg_log(x, space, temperature)
    p = (target / temperature).softmax(-1) if target_space == "logits" else target
    p = p.exp() if target_space == "log_probs" else p
    absent = (p == 0) & (n == torch.inf)
    p_row = torch.where(absent, 0, p * torch.where(absent, 0, n)).sum(-1)
    if label_smoothing == 0:
        return p_row
    return (1 - label_smoothing) * p_row + label_smoothing * n.mean(-1)


def label_rows(x: Tensor, labels: Tensor, **options: Any) -> Tensor:
    onehot = torch.nn.functional.one_hot(labels, x.size(-1)).to(x.dtype)
    space = options.get("space", "logits")
    if space == "probs" and options.get("label_smoothing", 0.0) == 0:
        x = torch.where((onehot == 0) & (x >= 0), 1, x)
    return ce_rows(x, onehot, **{**options, "target_space": "probs"})


def _exact(
    x: Rows, given: Rows, space: str, target_space: str, temperature: float, smoothing: float
) -> tuple[Rows, Rows, Rows, Rows | None, tuple[Rows, Rows]]:
    t, s = np.longdouble(temperature), np.longdouble(smoothing)
    classes = x.shape[-1]
    to_log = {"logits": lambda v: log_softmax(v / t), "log_probs": lambda v: v, "probs": np.log}
    log_q, log_p = to_log[space](x), to_log[target_space](given)
    n = -log_q
    p = given if target_space == "probs" else np.exp(log_p)
    q = x if space == "probs" else np.exp(log_q)
    mixed = (1 - s) * p + s / classes if smoothing else p
    parts = times(mixed, n)
    plain = times(p, n).sum(-1, keepdims=True)
    value = parts.sum(-1)
    mass = (1 - s) * (1 if target_space == "logits" else p.sum(-1, keepdims=True)) + s
    if space == "logits":
        near = (np.abs(log_p - log_q) < 1) & (s == 0) & (target_space == "logits")
        grad_q = np.where(near, p * np.expm1(np.where(near, log_q - log_p, 0)), q * mass - mixed) / t
    else:
        grad_q = -mixed if space == "log_probs" else np.where(mixed == 0, 0, -mixed / q)
    if target_space == "logits":
        # around the entry at P's largest class, whose gradient is minus the sum of the others'
        top = given.argmax(-1, keepdims=True)
        z = x / t if space == "logits" else log_q
        away = np.take_along_axis(z, top, -1) - z
        grad_p = p * (away - times(p, away).sum(-1, keepdims=True)) * (1 - s) / t
        grad_p = np.where(np.isposinf(plain) | (p == 0), 0, grad_p)
    else:
        grad_p = (1 - s) * (times(p, n) if target_space == "log_probs" else n)
        grad_p = np.where((p == 0) & np.isposinf(n), 0, grad_p)
    both = space == target_space == "logits"
    terms = None if both else np.abs(parts).sum(-1)
    scale_q, scale_p = largest(grad_q), largest(grad_p)
    if space == "logits" and (smoothing or target_space != "logits"):
        scale_q = largest(q * mass + mixed) / t  # a difference of these, which are rounded
    if target_space == "logits" and not both:
        scale_p = largest(p * (np.abs(n) + np.abs(plain))) / t
    return value, grad_q, grad_p, terms, (scale_q, scale_p)


def ce_exact(
    x: Rows,
    target: Rows,
    *,
    space: str = "logits",
    target_space: str | None = None,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    **_: Any,
) -> Exact:
    with np.errstate(all="ignore"):
        value, grad_q, grad_p, terms, scales = _exact(
            x, target, space, target_space or "probs", temperature, label_smoothing
        )
    return Exact(value, (grad_q, grad_p), terms, scales)


def label_exact(
    x: Rows,
    labels: Rows,
    *,
    space: str = "logits",
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    **_: Any,
) -> Exact:
    labels = labels.reshape(*x.shape[:-1], 1)
    labels = np.where((labels < 0) | (labels >= x.shape[-1]), 0, labels)
    onehot = np.zeros_like(x)
    np.put_along_axis(onehot, labels, 1, -1)
    t, s = np.longdouble(temperature), np.longdouble(label_smoothing)
    with np.errstate(all="ignore"):
        value, gradient, _, terms, (scale, _) = _exact(x, onehot, space, "probs", temperature, label_smoothing)
        if space == "logits":
            # q - 1 of the label from its loss, which keeps the others' digits
            own = -np.take_along_axis(log_softmax(x / t), labels, -1)
            own = (np.expm1(-own) + s - s / x.shape[-1]) / t
            np.put_along_axis(gradient, labels, own, -1)
            terms = None
            scale = largest(gradient)
    return Exact(value, (gradient,), terms, (scale,))


def ce_mp_row(
    x: list[float],
    target: list[float],
    *,
    space: str = "logits",
    target_space: str | None = None,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    **_: Any,
) -> tuple[Any, ...]:
    """Value and both gradients of one row by the textbook formula, with digits enough for what cancels in it."""
    target_space = target_space or "probs"

    def side(v: list[float], kind: str) -> tuple[list[Any], list[Any]]:
        if kind == "logits":
            z = [mpmath.mpf(a) / mpmath.mpf(temperature) for a in v]
            lse = mpmath.log(mpmath.fsum(mpmath.exp(a) for a in z))
            z = [a - lse for a in z]
        elif kind == "probs":
            return [mpmath.mpf(a) for a in v], [mpmath.log(a) if a else mpmath.ninf for a in v]
        else:
            z = [mpmath.mpf(a) for a in v]
        return [mpmath.exp(a) for a in z], z

    finite = [[v for v in row if v != -np.inf] for row in (x, target)]
    spread = max(max(row, default=0) - min(row, default=0) for row in finite) / temperature
    with mpmath.workdps(60 + int(2 * spread)):
        q, log_q = side(x, space)
        p, _ = side(target, target_space)
        s = mpmath.mpf(label_smoothing)
        mixed = [(1 - s) * a + s / len(x) for a in p]
        zero = mpmath.mpf(0)
        value = mpmath.fsum(-a * b if a else zero for a, b in zip(mixed, log_q, strict=True))
        plain = mpmath.fsum(-a * b if a else zero for a, b in zip(p, log_q, strict=True))
        if space == "logits":
            mass = mpmath.fsum(mixed)
            grad_q = [(b * mass - a) / temperature for a, b in zip(mixed, q, strict=True)]
        else:
            grad_q = [-a / (b if space == "probs" else 1) if a else zero for a, b in zip(mixed, q, strict=True)]
        if target_space == "logits":
            grad_p = [(1 - s) * a * (-b - plain) / temperature if a else zero for a, b in zip(p, log_q, strict=True)]
        else:
            grad_p = [(1 - s) * (a if target_space == "log_probs" else 1) * -b for a, b in zip(p, log_q, strict=True)]
    return value, grad_q, grad_p


def label_mp_row(x: list[float], label: int, **options: Any) -> tuple[Any, ...]:
    return ce_mp_row(x, [float(j == label) for j in range(len(x))], **{**options, "target_space": "probs"})[:2]


def ce_draw(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, *, target_space: str | None = None, **options: Any
) -> tuple[Tensor, ...]:
    return kl_draw(shape, dtype, seed, target_space=target_space or "probs", **options)


def label_draw(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, *, space: str = "logits", **_: Any
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = to_space(torch.randn(shape, dtype=torch.float64, generator=generator), space).to(dtype)
    return x, torch.randint(shape[-1], shape[:-1], generator=generator)


def ce_operators(case: Case, dtype: torch.dtype = torch.float64) -> Iterator[Operator]:
    o = case.options
    static = (
        SPACES.index(o.get("target_space") or "probs"),
        SPACES.index(o.get("space", "logits")),
        float(o.get("temperature", 1.0)),
        float(o.get("label_smoothing", 0.0)),
    )
    return pair_operators(case, "_cross_entropy", 1, 0, static, dtype)


def label_operators(case: Case, dtype: torch.dtype = torch.float64) -> Iterator[Operator]:
    o = case.options
    static = (
        SPACES.index(o.get("space", "logits")),
        float(o.get("temperature", 1.0)),
        float(o.get("label_smoothing", 0.0)),
    )
    weight = torch.tensor([0.5, 0.0, 2.0], dtype=dtype)
    v = case.draw(3, 5, dtype=dtype, grad=(), seed=1)[0] * 0.5
    for sides in ((), (0,)):
        x, labels = case.draw(3, 5, dtype=dtype, grad=sides)
        _, stat = OPS._cross_entropy_labels(x.detach(), labels, weight, *static)
        grad = torch.randn(3, dtype=compute_dtype(x), requires_grad=bool(sides))
        yield Operator("_cross_entropy_labels", (x, labels, None if sides else weight, *static))
        yield Operator("_cross_entropy_labels_backward", (grad, x, labels, stat, *static))
        for mask in product((False, True), repeat=2):
            yield Operator("_cross_entropy_labels_double_backward", (v, grad, x, labels, stat, *static, list(mask)))
        yield Operator("_cross_entropy_labels_value_and_grad", (x, labels, weight, *static, 0.25, 2.0))


def ce_json_case(case: dict[str, Any]) -> JsonCase:
    inputs, expected = case["inputs"], case["expected"]
    return JsonCase(
        tensors=(inputs["logits"], inputs["target_probs"]),
        options={},
        rows=[float(v) for v in expected["rows"]],
        gradients=(expected["grad_logits_of_sum"], expected["grad_target_of_sum"]),
    )


CROSS_ENTROPY = Loss(
    name="cross_entropy",
    module="CrossEntropyLoss",
    rows=ce_rows,
    exact=ce_exact,
    mp_row=ce_mp_row,
    draw=ce_draw,
    operators=ce_operators,
    json_case=ce_json_case,
    choices={"space": SPACES, "target_space": SPACES},
    transforms=(
        {"target_space": "logits", "temperature": 2.0},
        {"label_smoothing": 0.2},
        {"space": "probs", "target_space": "log_probs", "label_smoothing": 0.1},
    ),
)

CROSS_ENTROPY_LABELS = Loss(
    name="cross_entropy",
    module="CrossEntropyLoss",
    rows=label_rows,
    exact=label_exact,
    mp_row=label_mp_row,
    draw=label_draw,
    operators=label_operators,
    json_case=ce_json_case,
    choices={"space": SPACES, "label_smoothing": (0.0, 0.1)},
    transforms=({"temperature": 2.0}, {"label_smoothing": 0.2}, {"space": "probs", "label_smoothing": 0.1}),
    differentiable=(0,),
)
