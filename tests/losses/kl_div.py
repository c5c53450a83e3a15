from collections.abc import Iterator
from typing import Any

import mpmath
import numpy as np
import torch
from loss import (
    DIRECTIONS,
    SPACES,
    Case,
    Exact,
    JsonCase,
    Loss,
    Operator,
    Options,
    Rows,
    largest,
    log_softmax,
    pair_operators,
    times,
    to_space,
)
from torch import Tensor

# KL(P || Q) = sum p (log p - log q), p and q free where they are given as probabilities. Zeros and infinities are
# treated as the documentation of kl_div says.


def _sides(options: Options) -> tuple[tuple[int, int], tuple[str, str]]:
    """Positions in (input, target) of P and Q, and their spaces."""
    space = options.get("space", "logits")
    spaces = (space, options.get("target_space") or space)
    p, q = (1, 0) if options.get("direction", "forward") == "forward" else (0, 1)
    return (p, q), (spaces[p], spaces[q])


def kl_rows(*tensors: Tensor, temperature: float = 1.0, **options: Any) -> Tensor:
    (i, j), (p_space, q_space) = _sides(options)
    p, q = tensors[i], tensors[j]
    if p_space == "logits":
        log_p = torch.log_softmax(p / temperature, -1)
        prob = log_p.exp()
    elif p_space == "log_probs":
        log_p, prob = p, p.exp()
    else:
        log_p, prob = torch.where(p == 0, 1, p).log(), p
    zero = prob == 0
    if q_space == "logits":
        log_q = torch.log_softmax(q / temperature, -1)
    elif q_space == "log_probs":
        log_q = q
    else:
        log_q = torch.where(zero & (q >= 0), 1, q).log()
    if p_space == "logits":  # an infinite row has no teacher gradient
        infinite = (~zero & (log_q == -torch.inf)).any(-1, keepdim=True)
        log_p = torch.where(infinite, log_p.detach(), log_p)
        prob = torch.where(infinite, prob.detach(), prob)
    term = torch.where(zero, torch.where(log_q.isnan(), log_q, 0), log_p - log_q)
    return (prob * term).sum(-1)


def kl_exact(*tensors: Rows, temperature: float = 1.0, **options: Any) -> Exact:
    with np.errstate(all="ignore"):
        return _kl_exact(*tensors, temperature=temperature, **options)


def _kl_exact(*tensors: Rows, temperature: float, **options: Any) -> Exact:
    (i, j), (p_space, q_space) = _sides(options)
    p_given, q_given = tensors[i], tensors[j]
    scale = np.longdouble(temperature)
    to_log = {"logits": lambda x: log_softmax(x / scale), "log_probs": lambda x: x, "probs": np.log}
    log_p, log_q = to_log[p_space](p_given), to_log[q_space](q_given)
    p = p_given if p_space == "probs" else np.exp(log_p)
    q = q_given if q_space == "probs" else np.exp(log_q)
    ratio = log_p - log_q
    if p_space == q_space == "probs":
        near = np.abs(p - q) < q / 2
        ratio = np.where(near, np.log1p(np.where(near, (p - q) / q, 0)), ratio)
    ratio = np.where((p == 0) & ~np.isnan(log_q) & ~np.isnan(log_p), 0, ratio)

    terms = None
    if p_space == q_space == "logits":
        # sum p (ratio + expm1(-ratio)): every term is positive, and an error in the normalisers enters squared
        small = np.abs(ratio) < 1
        x = np.where(small, ratio, 0)
        series = np.ones_like(x)
        for k in range(11, 2, -1):  # expm1(-x) + x = x^2/2 (1 - x/3 (1 - x/4 (...)))
            series = 1 - x / k * series
        phi = np.where(np.abs(x) < 0.01, x * x / 2 * series, np.expm1(-x) + x)
        value = np.where(small & (p > 0), p * phi, q - p + p * ratio).sum(-1)
        q_minus_p = np.where(small & (p > 0), p * np.expm1(-x), q - p)
    else:
        value = (p * ratio).sum(-1)
        q_minus_p = q * p.sum(-1, keepdims=True) - p
        # the terms of a logarithm from logits are the logit and the row's logsumexp
        sizes = [
            np.where(np.isneginf(log), np.inf, np.abs(x / scale) + np.abs(x / scale - log))
            if space == "logits"
            else np.abs(log)
            for x, log, space in ((p_given, log_p, p_space), (q_given, log_q, q_space))
        ]
        parts = np.abs(p * ratio) if p_space == q_space else times(p, sizes[0]) + times(p, sizes[1])
        terms = np.abs(parts).sum(-1)

    infinite = (np.isposinf(value))[..., None]
    if p_space == "logits":
        # ratio - value, without the error of the normalisers that all ratios of a row share
        centred = ratio - (p * ratio).sum(-1, keepdims=True)
        grad_p = np.where(infinite | (p == 0), 0, p * centred) / scale
        # the entries sum to 0, and where p is nearly 1, that class's is known best by the others
        others = np.where(p > 0.5, 0, grad_p).sum(-1, keepdims=True)
        grad_p = np.where(p > 0.5, -others, grad_p)
    else:
        grad_p = np.where(p == 0, 0, (1 if p_space == "probs" else p) * (ratio + 1))
    if q_space == "logits":
        grad_q = q_minus_p / scale
    elif q_space == "log_probs":
        grad_q = -p
    else:
        grad_q = np.where(p == 0, 0, -p / q)
    scale_p, scale_q = largest(grad_p), largest(grad_q)
    if terms is not None:  # free variables: entries are differences of terms that need not cancel
        l_terms = np.where(p == 0, 0, sizes[0] + sizes[1] if p_space != q_space else np.abs(ratio))
        if p_space == "logits":
            scale_p = largest(p * (l_terms + terms[..., None])) / scale
        else:
            scale_p = largest((1 if p_space == "probs" else p) * (l_terms + 1))
        if q_space == "logits":
            scale_q = largest(q * p.sum(-1, keepdims=True) + p) / scale
    order = slice(None, None, -1) if i == 1 else slice(None)
    return Exact(value, (grad_p, grad_q)[order], terms, (scale_p, scale_q)[order])


def kl_mp_row(*rows: list[float], temperature: float = 1.0, **options: Any) -> tuple[Any, ...]:
    """Value and both gradients of one row by the textbook formula, with digits enough for what cancels in it."""
    (i, j), (p_space, q_space) = _sides(options)
    finite = [[v for v in row if v != -np.inf] for row in rows]
    spread = max(max(row, default=0) - min(row, default=0) for row in finite) / temperature

    def side(x: list[float], space: str) -> tuple[list[Any], list[Any]]:
        if space == "logits":
            x = [mpmath.mpf(v) / mpmath.mpf(temperature) for v in x]
            lse = mpmath.log(mpmath.fsum(mpmath.exp(v) for v in x))
            x = [v - lse for v in x]
        elif space == "probs":
            return [mpmath.mpf(v) for v in x], [mpmath.log(v) if v else mpmath.ninf for v in x]
        return [mpmath.exp(v) for v in x], [mpmath.mpf(v) for v in x]

    with mpmath.workdps(60 + int(2 * spread)):
        p, log_p = side(rows[i], p_space)
        q, log_q = side(rows[j], q_space)
        ratio = [a - b if c else mpmath.mpf(0) for a, b, c in zip(log_p, log_q, p, strict=True)]
        value = mpmath.fsum(a * b for a, b in zip(p, ratio, strict=True))
        if p_space == "logits":
            grad_p = [a * (b - value) / temperature for a, b in zip(p, ratio, strict=True)]
        else:
            grad_p = [
                ((1 if p_space == "probs" else a) * (b + 1)) if a else mpmath.mpf(0)
                for a, b in zip(p, ratio, strict=True)
            ]
        if q_space == "logits":
            mass = mpmath.fsum(p)
            grad_q = [(b * mass - a) / temperature for a, b in zip(p, q, strict=True)]
        elif q_space == "log_probs":
            grad_q = [-a for a in p]
        else:
            grad_q = [-a / b if a else mpmath.mpf(0) for a, b in zip(p, q, strict=True)]
    return (value, grad_q, grad_p) if i == 1 else (value, grad_p, grad_q)


def kl_draw(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    seed: int = 0,
    *,
    space: str = "logits",
    target_space: str | None = None,
    **_: Any,
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        to_space(torch.randn(shape, dtype=torch.float64, generator=generator), s).to(dtype)
        for s in (space, target_space or space)
    )


def kl_operators(case: Case, dtype: torch.dtype = torch.float64) -> Iterator[Operator]:
    (i, j), spaces = _sides(case.options)
    static = (*(SPACES.index(s) for s in spaces), float(case.options.get("temperature", 1.0)))
    return pair_operators(case, "_kl_div", i, j, static, dtype)


def kl_json_case(case: dict[str, Any]) -> JsonCase:
    inputs, options, expected = case["inputs"], case["options"], case["expected"]
    space = options.get("input", "logits")
    student, teacher = {
        "logits": ("student_logits", "teacher_logits"),
        "probs": ("q", "p"),
        "log_probs": ("log_q", "log_p"),
    }[space]
    name = {"logits": ("student", "teacher"), "probs": ("q", "p"), "log_probs": ("log_q", "log_p")}[space]
    call: Options = {
        "space": space,
        "direction": options.get("direction", "forward"),
        "temperature": options.get("temperature", 1.0),
    }
    if "labels" in inputs:
        call["row_weight"] = [float(label != options["ignore_index"]) for label in inputs["labels"]]
    return JsonCase(
        tensors=(inputs[student], inputs[teacher]),
        options=call,
        rows=[float(v) for v in expected.get("rows", [])],
        gradients=tuple(expected.get(f"grad_{n}_of_sum") for n in name),
        vectors=(inputs["v_student"], inputs["v_teacher"]) if "v_student" in inputs else (),
        hvp=(expected["hvp_student"], expected["hvp_teacher"]) if "hvp_student" in expected else (),
    )


KL_DIV = Loss(
    name="kl_div",
    module="KLDivLoss",
    stores_half=True,
    rows=kl_rows,
    exact=kl_exact,
    mp_row=kl_mp_row,
    draw=kl_draw,
    operators=kl_operators,
    json_case=kl_json_case,
    choices={"direction": DIRECTIONS, "space": SPACES, "target_space": SPACES},
    transforms=(
        {"temperature": 2.0},
        {"direction": "reverse", "space": "log_probs", "target_space": "logits", "temperature": 0.5},
        {"space": "probs"},
    ),
)
