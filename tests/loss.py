"""What the tests know of a loss: `Loss`, an entry of the table in cases.py, and what its descriptions are made of.

A loss brings three independent descriptions of itself:
`rows` is textbook ATen in float64, differentiable to any order; `exact` is NumPy in extended precision, accurate at
every scale, with the gradients and the error that is allowed; `mp_row` is one row by mpmath. The rest (reductions,
weights, dims) is derived from them here, once for all losses.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

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
    stores_half: bool = False  # value_and_grad serves half types too
    inplace_grad: bool = True
    curvature: float = 1.0  # of the Hessian at P = Q, in units of the Fisher matrix

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
        with torch.device("cpu"):  # the same numbers on every device
            tensors = self.loss.draw(shape, dtype, seed, **self.options)
        device = torch.get_default_device()
        return tuple(t.to(device).requires_grad_(i in grad) for i, t in enumerate(tensors))

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


def log_softmax(x: Rows) -> Rows:
    """By log1p of the sum without its largest term: a row of nearly one class keeps the digits of the others."""
    if x.shape[-1] == 0:
        return x
    top = x.argmax(-1, keepdims=True)
    shifted = x - np.take_along_axis(x, top, -1)
    others = np.exp(shifted)
    np.put_along_axis(others, top, np.where(np.isnan(np.take_along_axis(shifted, top, -1)), np.nan, 0), -1)
    return shifted - np.log1p(others.sum(-1, keepdims=True))


def times(p: Rows, x: Rows) -> Rows:
    """p * x where a p of 0 wins over an infinite x, but not over NaN."""
    return np.where((p == 0) & ~np.isnan(x), 0, p * x)


def randn(*shape: int, generator: torch.Generator, dtype: torch.dtype | None = None) -> Tensor:
    """The same numbers on every device; generator is of the CPU."""
    return torch.randn(shape, generator=generator, dtype=dtype, device="cpu").to(torch.get_default_device())


def largest(x: Rows) -> Rows:
    """Of each row, infinities and NaN aside."""
    return np.where(np.isfinite(x), np.abs(x), 0).max(-1, initial=0)


def to_space(logits: Tensor, space: str) -> Tensor:
    """The distribution of `logits` in another space."""
    return {"logits": lambda x: x.clone(), "log_probs": lambda x: x.log_softmax(-1), "probs": lambda x: x.softmax(-1)}[
        space
    ](logits)


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


def pair_operators(
    case: Case, name: str, p_at: int, q_at: int, static: tuple[Any, ...], dtype: torch.dtype
) -> Iterator[Operator]:
    """Every private operator of core/row_divergence.h, all gradient masks, with inputs that require grad and without.

    `p_at` and `q_at` are the places of P and Q in (input, target), `static` the operators' options.
    """
    weight = torch.tensor([0.5, 0.0, 2.0], dtype=dtype)
    drawn = [t * 0.5 for t in case.draw(3, 5, dtype=dtype, grad=(), seed=1)]
    vectors = (drawn[p_at], drawn[q_at])
    for sides in ((), (p_at,), (q_at,), (p_at, q_at)):
        tensors = case.draw(3, 5, dtype=dtype, grad=sides)
        p, q = tensors[p_at], tensors[q_at]
        _, stat = getattr(OPS, name)(p.detach(), q.detach(), weight, *static)
        grad = torch.randn(3, dtype=compute_dtype(p), requires_grad=bool(sides))
        yield Operator(name, (p, q, weight if len(sides) == 1 else None, *static))
        for mask in product((False, True), repeat=2):
            yield Operator(f"{name}_backward", (grad, p, q, stat, *static, list(mask)))
        for v_p, v_q in (vectors, (vectors[0], None), (None, vectors[1])):
            yield Operator(f"{name}_double_backward", (v_p, v_q, grad, p, q, stat, *static, [True] * 3))
        yield Operator(f"{name}_value_and_grad", (p, q, weight, *static, 0.25, 2.0, bool(len(sides) % 2)))
    for mask in product((False, True), repeat=3):
        yield Operator(f"{name}_double_backward", (*vectors, grad, p, q, stat, *static, list(mask)))
