"""The table that the test files run over: one `Loss` per loss of the library.

A loss brings three independent descriptions of itself:
`rows` is textbook ATen in float64, differentiable to any order; `exact` is NumPy in extended precision, accurate at
every scale, with the gradients and the error that is allowed; `mp_row` is one row by mpmath. The rest (reductions,
weights, dims) is derived from them here, once for all losses.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import torch
import torch_divergence as td
from torch import Tensor

SPACES = ("logits", "log_probs", "probs")
DIRECTIONS = ("forward", "reverse")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPS = torch.ops.torch_divergence

# Norm-wise error a row for logits: of the value relative to the value, of a gradient relative to the row's largest
# entry. Half types are computed in float32.
ROW_ACCURACY = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}

Options = dict[str, Any]
Rows = np.ndarray  # of np.longdouble


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The type that the loss is computed, and returned, in."""
    return torch.float64 if tensors[0].dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Exact:
    """Values and gradients of a batch of rows, class dim last.

    `terms` is None where the error of a value is relative to the value itself, else the sum of the sizes of its terms,
    of which 8 ulp are allowed. `gradient_scales` are what a gradient's error is relative to: the row's largest entry,
    or the largest sum of the sizes of an entry's terms.
    """

    value: Rows
    gradients: tuple[Rows, ...]  # of the tensors in `differentiable`
    terms: Rows | None
    gradient_scales: tuple[Rows, ...]

    def allowed(self, dtype: torch.dtype) -> Rows:
        if self.terms is None:
            return ROW_ACCURACY[dtype] * np.abs(self.value)
        return 8 * np.longdouble(torch.finfo(dtype).eps) * self.terms


@dataclass(frozen=True)
class Operator:
    """A call of a private operator, for opcheck."""

    name: str
    args: tuple[Any, ...]

    @property
    def op(self) -> Any:
        return getattr(OPS, self.name).default


@dataclass(frozen=True)
class Loss:
    name: str
    module: str
    rows: Callable[..., Tensor]
    exact: Callable[..., Exact]
    mp_row: Callable[..., tuple[Any, ...]]
    draw: Callable[..., tuple[Tensor, ...]]
    operators: Callable[..., Iterator[Operator]]
    json_case: Callable[[dict[str, Any]], "JsonCase"]
    choices: dict[str, tuple[Any, ...]]  # the loss's own options and their values, beyond those that all losses share
    transforms: tuple[
        Options, ...
    ]  # the options that gradients, transforms and compilers are tried with; the first for the slowest
    differentiable: tuple[int, ...] = (0, 1)
    value_and_grad: bool = True
    inplace_grad: bool = True

    def __call__(self, *tensors: Tensor, **options: Any) -> Tensor:
        return getattr(td, self.name)(*tensors, **options)

    @property
    def op(self) -> Any:
        return getattr(OPS, self.name).default

    def spaces(self) -> list[Options]:
        """Every combination of the loss's own options."""
        return [dict(zip(self.choices, values, strict=True)) for values in product(*self.choices.values())]

    def reference(
        self,
        *tensors: Tensor,
        dim: int = -1,
        row_weight: Tensor | None = None,
        reduction: str = "mean",
        normalizer: float | Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The whole loss in float64, by differentiable ATen operators; half and single inputs are exact in it."""
        tensors = tuple(t.movedim(dim, -1).double() if t.is_floating_point() else t for t in tensors)
        if row_weight is None:
            loss = self.rows(*tensors, **options)
            weight = torch.ones_like(loss)
        else:
            weight = row_weight.double().expand(tensors[0].shape[:-1])
            kept = weight != 0  # a row of weight 0 may hold anything
            tensors = tuple(torch.where(kept.unsqueeze(-1), t, torch.zeros((), dtype=t.dtype)) for t in tensors)
            loss = torch.where(kept, self.rows(*tensors, **options), 0) * weight
        if reduction == "none":
            return loss
        if reduction == "sum":
            return loss.sum()
        total = loss.sum()
        if normalizer is not None:
            return total / normalizer
        return torch.where(weight.sum() > 0, total / torch.where(weight.sum() > 0, weight.sum(), 1), 0)


@dataclass(frozen=True)
class Case:
    """A loss with options, as the tests that do not care about values see it."""

    loss: Loss
    options: Options = field(default_factory=dict)

    def __call__(self, *tensors: Tensor, **options: Any) -> Tensor:
        return self.loss(*tensors, **{"reduction": "none", **self.options, **options})

    def reference(self, *tensors: Tensor, **options: Any) -> Tensor:
        return self.loss.reference(*tensors, **{"reduction": "none", **self.options, **options})

    def bind(self, **options: Any) -> Callable[..., Tensor]:
        return partial(self, **options)

    def draw(
        self, *shape: int, dtype: torch.dtype = torch.float64, grad: tuple[int, ...] | None = None, seed: int = 0
    ) -> tuple[Tensor, ...]:
        """Random inputs; those in `grad` (all that are differentiable unless told otherwise) require grad."""
        grad = self.loss.differentiable if grad is None else grad
        tensors = self.loss.draw(shape, dtype, seed, **self.options)
        return tuple(t.requires_grad_(i in grad) for i, t in enumerate(tensors))

    def __str__(self) -> str:
        return "-".join([self.loss.name, *(f"{v}" for k, v in self.options.items())])


@dataclass(frozen=True)
class JsonCase:
    """A case of reference/divergence_cases.json in the library's terms."""

    tensors: tuple[list[list[float]], ...]
    options: Options
    rows: list[float]
    gradients: tuple[list[list[float]] | None, ...]  # of the sum of rows
    vectors: tuple[list[list[float]], ...] = ()
    hvp: tuple[list[list[float]], ...] = ()


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


def _log_softmax(x: Rows) -> Rows:
    """By log1p of the sum without its largest term: a row of nearly one class keeps the digits of the others."""
    if x.shape[-1] == 0:
        return x
    top = x.argmax(-1, keepdims=True)
    shifted = x - np.take_along_axis(x, top, -1)
    others = np.exp(shifted)
    np.put_along_axis(others, top, np.where(np.isnan(np.take_along_axis(shifted, top, -1)), np.nan, 0), -1)
    return shifted - np.log1p(others.sum(-1, keepdims=True))


def _times(p: Rows, x: Rows) -> Rows:
    """p * x where a p of 0 wins over an infinite x, but not over NaN."""
    return np.where((p == 0) & ~np.isnan(x), 0, p * x)


def kl_exact(*tensors: Rows, temperature: float = 1.0, **options: Any) -> Exact:
    with np.errstate(all="ignore"):
        return _kl_exact(*tensors, temperature=temperature, **options)


def _kl_exact(*tensors: Rows, temperature: float, **options: Any) -> Exact:
    (i, j), (p_space, q_space) = _sides(options)
    p_given, q_given = tensors[i], tensors[j]
    scale = np.longdouble(temperature)
    to_log = {"logits": lambda x: _log_softmax(x / scale), "log_probs": lambda x: x, "probs": np.log}
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
        parts = np.abs(p * ratio) if p_space == q_space else _times(p, sizes[0]) + _times(p, sizes[1])
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
    scale_p, scale_q = _largest(grad_p), _largest(grad_q)
    if terms is not None:  # free variables: entries are differences of terms that need not cancel
        l_terms = np.where(p == 0, 0, sizes[0] + sizes[1] if p_space != q_space else np.abs(ratio))
        if p_space == "logits":
            scale_p = _largest(p * (l_terms + terms[..., None])) / scale
        else:
            scale_p = _largest((1 if p_space == "probs" else p) * (l_terms + 1))
        if q_space == "logits":
            scale_q = _largest(q * p.sum(-1, keepdims=True) + p) / scale
    order = slice(None, None, -1) if i == 1 else slice(None)
    return Exact(value, (grad_p, grad_q)[order], terms, (scale_p, scale_q)[order])


def _largest(x: Rows) -> Rows:
    """Of each row, infinities and NaN aside."""
    return np.where(np.isfinite(x), np.abs(x), 0).max(-1, initial=0)


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


def to_space(logits: Tensor, space: str) -> Tensor:
    """The distribution of `logits` in another space."""
    return {"logits": lambda x: x.clone(), "log_probs": lambda x: x.log_softmax(-1), "probs": lambda x: x.softmax(-1)}[
        space
    ](logits)


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
    """Every private operator over all gradient masks, with inputs that require grad and without."""
    (i, j), spaces = _sides(case.options)
    static = (*(SPACES.index(s) for s in spaces), float(case.options.get("temperature", 1.0)))
    weight = torch.tensor([0.5, 0.0, 2.0], dtype=dtype)
    vectors = [t * 0.5 for t in case.draw(3, 5, dtype=dtype, grad=(), seed=1)]
    for sides in ((), (i,), (j,), (i, j)):
        tensors = case.draw(3, 5, dtype=dtype, grad=sides)
        p, q = tensors[i], tensors[j]
        _, stat = OPS._kl_div(p.detach(), q.detach(), weight, *static)
        grad = torch.randn(3, dtype=compute_dtype(p), requires_grad=bool(sides))
        yield Operator("_kl_div", (p, q, weight if len(sides) == 1 else None, *static))
        for mask in product((False, True), repeat=2):
            yield Operator("_kl_div_backward", (grad, p, q, stat, *static, list(mask)))
        for v_p, v_q in (vectors, (vectors[0], None), (None, vectors[1])):
            yield Operator("_kl_div_double_backward", (v_p, v_q, grad, p, q, stat, *static, [True] * 3))
        yield Operator("_kl_div_value_and_grad", (p, q, weight, *static, 0.25, bool(len(sides) % 2)))
    for mask in product((False, True), repeat=3):
        yield Operator("_kl_div_double_backward", (*vectors, grad, p, q, stat, *static, list(mask)))


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


LOSSES = (
    Loss(
        name="kl_div",
        module="KLDivLoss",
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
    ),
)

ALL_OPTIONS = [Case(loss, options) for loss in LOSSES for options in loss.spaces()]
TRANSFORMS = [Case(loss, options) for loss in LOSSES for options in loss.transforms]
SLOW = [Case(loss, loss.transforms[0]) for loss in LOSSES]


def json_cases() -> Iterator[tuple[Loss, str, JsonCase]]:
    data = json.loads((Path(__file__).parent / "reference" / "divergence_cases.json").read_text())
    for case in data["cases"]:
        for loss in LOSSES:
            if loss.name == case["op"]:
                yield loss, case["id"], loss.json_case(case)


def to_numpy(tensor: Tensor) -> Rows:
    """Exactly, in extended precision."""
    tensor = tensor.detach()
    return (tensor if tensor.dtype == torch.float64 else tensor.float()).cpu().numpy().astype(np.longdouble)


def assert_within(actual: Tensor, expected: Rows, allowed: Rows | float, what: str) -> None:
    """Equal infinities and NaN, else |actual - expected| <= allowed + the rounding of half and subnormal results."""
    info = torch.finfo(actual.dtype)
    got = to_numpy(actual)
    assert got.shape == expected.shape, f"{what}: shape {got.shape}, expected {expected.shape}"
    rounding = info.eps / 2 if actual.dtype in (torch.float16, torch.bfloat16) else 0
    with np.errstate(all="ignore"):
        bound = allowed + rounding * np.abs(expected) + info.tiny * (1 if rounding == 0 else info.eps)
        overflow = (np.abs(expected) > info.max) & ~np.isnan(expected)
        same = (
            (got == expected)
            | (np.isnan(got) & np.isnan(expected))
            | (overflow & (got == np.copysign(np.inf, expected)))
        )
        good = same | (np.abs(got - expected) <= bound)
    if not good.all():
        error = np.where(good, 0, np.where(np.isfinite(got - expected), np.abs(got - expected), np.inf))
        at = np.unravel_index(np.argmax(error), error.shape)
        limit = np.broadcast_to(bound, expected.shape)[at]
        place = f"{what} at {tuple(map(int, at))}"
        raise AssertionError(f"{place}: got {got[at]}, expected {expected[at]}, error {error[at]:.3g} > {limit:.3g}")


@dataclass(frozen=True)
class Expected:
    """What a call must return: value, gradients in the layout of the inputs, and what each may be off."""

    value: Rows
    value_allowed: Rows
    gradients: tuple[Rows, ...]
    gradients_allowed: tuple[Rows, ...]


def expect(
    loss: Loss,
    *tensors: Tensor,
    incoming: float | Tensor = 1.0,
    dim: int = -1,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    **options: Any,
) -> Expected:
    """Value and gradients of (loss * incoming).sum(), by `exact`, with the errors that API.md allows."""
    if reduction == "batchmean":
        reduction = "mean"
    dtype = compute_dtype(*tensors)
    # contiguous, or the order of summation, and with it what is bit-equal, would depend on the strides
    values = [
        np.ascontiguousarray(np.moveaxis(to_numpy(t), dim, -1) if t.is_floating_point() else t.numpy()) for t in tensors
    ]
    shape = values[0].shape[:-1]
    exact = loss.exact(*values, **options)
    weight = np.broadcast_to(np.longdouble(1) if row_weight is None else to_numpy(row_weight), shape)
    total = weight.sum()
    if reduction != "mean":
        factor = np.longdouble(1)
    elif normalizer is not None:
        factor = 1 / np.longdouble(float(normalizer))
    else:
        factor = 1 / total if total > 0 else np.longdouble(0)
    kept = (weight != 0) & (factor != 0)
    with np.errstate(all="ignore"):
        value = np.where(kept, exact.value * weight * factor, 0)
        allowed = np.where(kept, exact.allowed(dtype) * weight * factor, 0)
        # the reduction's own rounding, and that of a float32 result
        eps = np.longdouble(torch.finfo(dtype).eps)
        rounding = eps if dtype == torch.float32 else eps * (2 + value.size)
        rounding = 0 if dtype == torch.float32 and exact.terms is None else rounding
        scale = to_numpy(incoming) if isinstance(incoming, Tensor) else np.longdouble(incoming)
        each = np.where(kept, weight * factor, 0) * scale
        gradients, errors = [], []
        for g, size in zip(exact.gradients, exact.gradient_scales, strict=True):
            g = np.where(each[..., None] == 0, 0, g * each[..., None])
            error = ROW_ACCURACY[dtype] * np.where(each == 0, 0, np.abs(each) * size)[..., None]
            gradients.append(np.moveaxis(g, -1, dim))
            errors.append(np.moveaxis(np.broadcast_to(error, g.shape), -1, dim))
        if reduction != "none":
            allowed = allowed.sum() + rounding * np.abs(value).sum()
            value = value.sum()
        else:
            allowed = allowed + rounding * np.abs(value)
    return Expected(np.asarray(value), np.asarray(allowed), tuple(gradients), tuple(errors))


def check(
    loss: Loss, *tensors: Tensor, incoming: float | Tensor = 1.0, **options: Any
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Call the loss, compare value and the gradients of the tensors that require grad with `exact`, and return both."""
    wanted = [i for i in loss.differentiable if tensors[i].requires_grad]
    value = loss(*tensors, **options)
    assert value.dtype == compute_dtype(*tensors)
    gradients: list[Tensor | None] = [None] * len(tensors)
    if wanted:
        seed = torch.as_tensor(incoming, dtype=value.dtype).expand(value.shape)
        for i, g in zip(wanted, torch.autograd.grad(value, [tensors[i] for i in wanted], seed), strict=True):
            assert g.dtype == tensors[i].dtype and g.shape == tensors[i].shape
            gradients[i] = g
    expected = expect(loss, *(t.detach() for t in tensors), incoming=incoming, **options)
    assert_within(value, expected.value, expected.value_allowed, "value")
    for n, i in enumerate(loss.differentiable):
        if gradients[i] is None:
            continue
        got, want, allowed = gradients[i], expected.gradients[n], expected.gradients_allowed[n]
        # a row that holds NaN or a negative probability: NaN out, in which entries is not said
        dim = options.get("dim", -1)
        poisoned = np.broadcast_to(np.isnan(want).any(dim, keepdims=True), want.shape)
        if poisoned.any():
            rows = np.isnan(to_numpy(got)).any(dim, keepdims=True)
            assert np.broadcast_to(rows, want.shape)[poisoned].all(), (
                f"gradient {i}: a row that holds NaN got a gradient without NaN"
            )
            got = torch.where(torch.from_numpy(poisoned.copy()), torch.zeros((), dtype=got.dtype), got)
            want, allowed = np.where(poisoned, 0, want), np.where(poisoned, 0, allowed)
        assert_within(got, want, allowed, f"gradient {i}")
    return value, tuple(gradients)
