from collections.abc import Iterator
from typing import Any

import mpmath
import numpy as np
import torch
from loss import OPS, SPACES, Case, Exact, JsonCase, Loss, Operator, Rows, compute_dtype, largest, log_softmax, to_space
from torch import Tensor

# H(P) = -sum p log p, p free where it is given as probabilities. Zeros are treated as entropy documents.


def entropy_rows(x: Tensor, *, space: str = "logits", temperature: float = 1.0) -> Tensor:
    if space == "probs":
        return -torch.where(x == 0, 0, x * torch.where(x == 0, 1, x).log()).sum(-1)
    log_p = torch.log_softmax(x / temperature, -1) if space == "logits" else x
    return -(log_p.exp() * torch.where(log_p == -torch.inf, 0, log_p)).sum(-1)


def entropy_exact(x: Rows, *, space: str = "logits", temperature: float = 1.0) -> Exact:
    t = np.longdouble(temperature)
    with np.errstate(all="ignore"):
        log_p = log_softmax(x / t) if space == "logits" else np.log(x) if space == "probs" else x
        p = x if space == "probs" else np.exp(log_p)
        parts = np.where(p == 0, np.where(np.isnan(log_p), np.nan, 0), -p * log_p)
        value = parts.sum(-1)
        if space == "logits":
            # around the largest entry, whose own gradient is minus the sum of the others'
            away = (x.max(-1, keepdims=True) - x) / t
            gradient = p * (away - np.where(p == 0, 0, p * away).sum(-1, keepdims=True)) / t
            gradient, terms = np.where(p == 0, 0, gradient), None
            scale = largest(gradient)
        else:
            factor = p if space == "log_probs" else 1
            gradient, terms = np.where(p == 0, 0, -factor * (log_p + 1)), np.abs(parts).sum(-1)
            scale = largest(np.where(p == 0, 0, factor * (np.abs(log_p) + 1)))
    return Exact(value, (gradient,), terms, (scale,))


def entropy_mp_row(x: list[float], *, space: str = "logits", temperature: float = 1.0) -> tuple[Any, ...]:
    finite = [v for v in x if v != -np.inf]
    with mpmath.workdps(60 + int((max(finite) - min(finite)) / temperature)):
        if space == "logits":
            z = [mpmath.mpf(v) / mpmath.mpf(temperature) for v in x]
            lse = mpmath.log(mpmath.fsum(mpmath.exp(v) for v in z))
            log_p = [v - lse for v in z]
        else:
            log_p = [mpmath.log(v) if v else mpmath.ninf for v in x] if space == "probs" else [mpmath.mpf(v) for v in x]
        p = [mpmath.mpf(v) for v in x] if space == "probs" else [mpmath.exp(v) for v in log_p]
        value = -mpmath.fsum(a * b for a, b in zip(p, log_p, strict=True) if a)
        zero = mpmath.mpf(0)
        if space == "logits":
            gradient = [-a * (b + value) / temperature if a else zero for a, b in zip(p, log_p, strict=True)]
        else:
            gradient = [-(1 if space == "probs" else a) * (b + 1) if a else zero for a, b in zip(p, log_p, strict=True)]
    return value, gradient


def entropy_draw(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, *, space: str = "logits", **_: Any
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return (to_space(torch.randn(shape, dtype=torch.float64, generator=generator), space).to(dtype),)


def entropy_operators(case: Case, dtype: torch.dtype = torch.float64) -> Iterator[Operator]:
    """Every private operator over all gradient masks, with inputs that require grad and without."""
    static = (SPACES.index(case.options.get("space", "logits")), float(case.options.get("temperature", 1.0)))
    weight = torch.tensor([0.5, 0.0, 2.0], dtype=dtype)
    (v,) = (t * 0.5 for t in case.draw(3, 5, dtype=dtype, grad=(), seed=1))
    for sides in ((), (0,)):
        (x,) = case.draw(3, 5, dtype=dtype, grad=sides)
        _, stat = OPS._entropy(x.detach(), weight, *static)
        grad = torch.randn(3, dtype=compute_dtype(x), requires_grad=bool(sides))
        yield Operator("_entropy", (x, None if sides else weight, *static))
        yield Operator("_entropy_backward", (grad, x, stat, *static))
        yield Operator("_entropy_value_and_grad", (x, None if sides else weight, *static, 0.25, 2.0))
        for mask in ([False, False], [False, True], [True, False], [True, True]):
            yield Operator("_entropy_double_backward", (v, grad, x, stat, *static, mask))


def entropy_json_case(case: dict[str, Any]) -> JsonCase:
    return JsonCase(
        tensors=(case["inputs"]["logits"],),
        options={},
        rows=[float(v) for v in case["expected"]["rows"]],
        gradients=(case["expected"]["grad_logits_of_sum"],),
    )


ENTROPY = Loss(
    name="entropy",
    module="EntropyLoss",
    rows=entropy_rows,
    exact=entropy_exact,
    mp_row=entropy_mp_row,
    draw=entropy_draw,
    operators=entropy_operators,
    json_case=entropy_json_case,
    choices={"space": SPACES},
    transforms=({"temperature": 2.0}, {"space": "log_probs"}, {"space": "probs"}),
    differentiable=(0,),
    inplace_grad=False,
)
