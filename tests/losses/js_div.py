from collections.abc import Iterator
from typing import Any

import mpmath
import numpy as np
import torch
from loss import (
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
)
from torch import Tensor

from losses.kl_div import kl_draw, kl_json_case

# JS_b(P, Q) = b KL(P || M) + (1 - b) KL(Q || M), M = b P + (1 - b) Q, with P the target and Q the input. With sigma =
# log(p/m) and rho = log(q/m) the derivatives by p and q are b sigma and (1 - b) rho. A class where a side has no
# probability has no gradient on that side.


def _spaces(options: Options) -> tuple[str, str]:
    """Of (input, target)."""
    space = options.get("space", "logits")
    return space, options.get("target_space") or space


def _unit(beta: float, scaled: bool) -> float:
    return 1 / (beta * (1 - beta)) if scaled else 1.0


def js_rows(
    *tensors: Tensor, beta: float = 0.5, scaled: bool = False, temperature: float = 1.0, **options: Any
) -> Tensor:
    sides = []
    for x, space in zip(tensors, _spaces(options), strict=True):
        if space == "probs":
            prob, log = x, torch.where(x == 0, 1, x).log()
        else:
            log = torch.log_softmax(x / temperature, -1) if space == "logits" else x
            prob = log.exp()
            log = torch.where(prob == 0, 0, log)
        sides.append((prob, log))
    (q, log_q), (p, log_p) = sides
    m = beta * p + (1 - beta) * q
    log_m = torch.where(m == 0, 1, m).log()
    total = sum(
        w * torch.where(x == 0, 0, x * (log_x - log_m)) for w, x, log_x in ((beta, p, log_p), (1 - beta, q, log_q))
    )
    return total.sum(-1) * _unit(beta, scaled)


def js_exact(*tensors: Rows, **options: Any) -> Exact:
    with np.errstate(all="ignore"):
        return _js_exact(*tensors, **options)


def _js_exact(
    *tensors: Rows, beta: float = 0.5, scaled: bool = False, temperature: float = 1.0, **options: Any
) -> Exact:
    spaces = _spaces(options)
    b, scale = np.longdouble(beta), np.longdouble(temperature)
    unit = 1 / (b * (1 - b)) if scaled else np.longdouble(1)
    to_log = {"logits": lambda x: log_softmax(x / scale), "log_probs": lambda x: x, "probs": np.log}
    log_q, log_p = (to_log[s](x) for x, s in zip(tensors, spaces, strict=True))
    q, p = (x if s == "probs" else np.exp(log) for x, s, log in zip(tensors, spaces, (log_q, log_p), strict=True))
    nothing = (p == 0) & (q == 0)
    ratio = np.where(nothing, 0, log_p - log_q)
    if spaces == ("probs", "probs"):
        near = (np.abs(p - q) < q / 2) & (p > 0)
        ratio = np.where(near, np.log1p(np.where(near, (p - q) / q, 0)), ratio)
    sigma = -np.log1p((1 - b) * np.expm1(-ratio))
    rho = -np.log1p(b * np.expm1(ratio))

    # q times a function of l: b (1 + e) log(1 + e) - (1 + b e) log(1 + b e) at e = expm1(l), small e by its series
    growth = np.expm1(np.clip(ratio, -0.02, 0.02))
    series = sum((-1) ** k * (b - b**k) / (k * (k - 1)) * growth**k for k in range(12, 1, -1))
    closed = b * times(p, sigma) + (1 - b) * times(q, rho)
    value = np.where(np.abs(ratio) < 0.015, q * series, closed).sum(-1)

    sizes = [
        np.where(np.isinf(log), 0, np.abs(x / scale) + np.abs(x / scale - log) if s == "logits" else np.abs(log))
        for x, s, log in zip(tensors, spaces, (log_q, log_p), strict=True)
    ]
    # the terms of a logarithm from logits are the logit and the row's logsumexp
    blur = sizes[0] + sizes[1] if spaces[0] != spaces[1] else np.zeros_like(ratio)
    terms = None
    if spaces != ("logits", "logits"):
        terms = unit * (
            b * times(p, np.abs(sigma)) + (1 - b) * times(q, np.abs(rho)) + blur * (b * p + (1 - b) * q)
        ).sum(-1)

    gradients, scales = [], []
    for side, (prob, log_ratio, weight, space) in enumerate(
        ((q, rho, (1 - b) * unit, spaces[0]), (p, sigma, b * unit, spaces[1]))
    ):
        none = prob == 0
        if space == "logits":
            around = log_ratio
            if spaces == ("logits", "logits"):
                around = _around_top(tensors, prob, ratio, (1 - b, b), side, scale)
            g = times(prob, around - times(prob, around).sum(-1, keepdims=True))
            # the entries sum to 0, and where prob is nearly 1, that class's is known best by the others
            others = np.where(prob > 0.5, 0, g).sum(-1, keepdims=True)
            g = np.where(prob > 0.5, -others, g) / scale
        else:
            g = np.where(none, 0, log_ratio if space == "probs" else prob * log_ratio)
        gradients.append(weight * g)
        if terms is None:
            scales.append(largest(weight * g))
        else:  # free variables: entries are differences of terms that need not cancel
            size = np.where(none, 0, np.abs(log_ratio) + blur)
            if space == "logits":
                scales.append(weight * largest(prob * (size + (prob * size).sum(-1, keepdims=True))) / scale)
            else:
                scales.append(weight * largest(size if space == "probs" else prob * size))
    return Exact(unit * value, tuple(gradients), terms, tuple(scales))


def _around_top(
    tensors: tuple[Rows, ...], prob: Any, ratio: Any, shares: tuple[Any, Any], side: int, scale: Any
) -> Any:
    """rho (side 0) or sigma (side 1), less that of the side's likeliest class c.

    rho - rho_c = log((1 - b + b e^l_c)/(1 - b + b e^l)), l = log p - log q: where all classes of any mass share one l,
    this has no digits as a difference, and all of them from the exact difference of the logits.
    """
    own, other = (np.log(share) for share in (shares[side], shares[1 - side]))
    log_ratio, x = ratio, tensors[1] - tensors[0]
    if side:
        log_ratio, x = -log_ratio, -x
    top = np.argmax(np.where(np.isnan(prob), -1, prob), -1, keepdims=True)
    mixture = np.logaddexp(own, other + log_ratio)
    x_top, log_ratio_top, mixture_top = (np.take_along_axis(v, top, -1) for v in (x, log_ratio, mixture))
    change = np.exp(other + log_ratio_top - mixture_top) * np.expm1((x - x_top) / scale)
    near = np.abs(change) < 0.5
    return np.where(near, -np.log1p(np.where(near, change, 0)), mixture_top - mixture)


def js_mp_row(
    *rows: list[float], beta: float = 0.5, scaled: bool = False, temperature: float = 1.0, **options: Any
) -> tuple[Any, ...]:
    """Value and both gradients of one row by the textbook formula, with digits enough for what cancels in it."""
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

    with mpmath.workdps(60 + int(2 * spread - 2 * np.log10(min(beta, 1 - beta)))):
        b = mpmath.mpf(beta)
        unit = 1 / (b * (1 - b)) if scaled else mpmath.mpf(1)
        spaces = _spaces(options)
        (q, log_q), (p, log_p) = (side(x, s) for x, s in zip(rows, spaces, strict=True))
        log_m = [mpmath.log(b * x + (1 - b) * y) if x or y else mpmath.mpf(0) for x, y in zip(p, q, strict=True)]
        value, gradients = mpmath.mpf(0), []
        for prob, log, weight, space in ((q, log_q, 1 - b, spaces[0]), (p, log_p, b, spaces[1])):
            ratio = [x - m if y else mpmath.mpf(0) for x, m, y in zip(log, log_m, prob, strict=True)]
            mean = mpmath.fsum(x * y for x, y in zip(prob, ratio, strict=True))
            value += unit * weight * mean
            if space == "logits":
                g = [x * (y - mean) / temperature for x, y in zip(prob, ratio, strict=True)]
            else:
                g = [y if space == "probs" else x * y for x, y in zip(prob, ratio, strict=True)]
            gradients.append([unit * weight * x for x in g])
    return value, *gradients


def js_operators(case: Case, dtype: torch.dtype = torch.float64) -> Iterator[Operator]:
    beta = case.options.get("beta", 0.5)
    i, j = (1, 0) if beta <= 0.5 else (0, 1)  # the operators take the lighter side first
    spaces = _spaces(case.options)
    static = (
        *(SPACES.index(spaces[k]) for k in (i, j)),
        float(case.options.get("temperature", 1.0)),
        min(beta, 1 - beta),
        case.options.get("scaled", False),
    )
    return pair_operators(case, "_js_div", i, j, static, dtype)


def js_json_case(case: dict[str, Any]) -> JsonCase:
    described = kl_json_case(case)
    options = {k: v for k, v in described.options.items() if k != "direction"}
    return JsonCase(
        described.tensors,
        {**options, "beta": case["options"]["beta"]},
        described.rows,
        described.gradients,
        described.vectors,
        described.hvp,
    )


JS_DIV = Loss(
    name="js_div",
    module="JSDivLoss",
    rows=js_rows,
    exact=js_exact,
    mp_row=js_mp_row,
    draw=kl_draw,
    operators=js_operators,
    json_case=js_json_case,
    choices={"beta": (0.5, 0.9), "scaled": (False, True), "space": SPACES, "target_space": SPACES},
    transforms=(
        {"temperature": 2.0},
        {"beta": 0.8, "scaled": True, "space": "log_probs", "target_space": "logits", "temperature": 0.5},
        {"beta": 0.1, "space": "probs"},
    ),
    curvature=0.25,
)
