"""The table that the test files run over: every loss, with its options, and the comparison with its exact values."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loss import (
    DIRECTIONS,
    DTYPES,
    OPS,
    ROW_ACCURACY,
    SPACES,
    Case,
    JsonCase,
    Loss,
    Rows,
    assert_within,
    compute_dtype,
    to_numpy,
    to_space,
)
from losses.js_div import JS_DIV
from losses.kl_div import KL_DIV
from torch import Tensor

__all__ = [
    "ALL_OPTIONS",
    "DIRECTIONS",
    "DTYPES",
    "LOSSES",
    "OPS",
    "ROW_ACCURACY",
    "SLOW",
    "SPACES",
    "TRANSFORMS",
    "Case",
    "assert_within",
    "check",
    "expect",
    "json_cases",
    "to_numpy",
    "to_space",
]

# cross_entropy and entropy, which are not 0 at equality, and labels, which are no distribution, have test files of
# their own.
LOSSES = (KL_DIV, JS_DIV)

ALL_OPTIONS = [Case(loss, options) for loss in LOSSES for options in loss.spaces()]
TRANSFORMS = [Case(loss, options) for loss in LOSSES for options in loss.transforms]
SLOW = [Case(loss, loss.transforms[0]) for loss in LOSSES]


def json_cases() -> Iterator[tuple[Loss, str, JsonCase]]:
    data = json.loads((Path(__file__).parent / "reference" / "divergence_cases.json").read_text())
    for case in data["cases"]:
        for loss in LOSSES:
            if loss.name == case["op"]:
                yield loss, case["id"], loss.json_case(case)


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
        np.ascontiguousarray(np.moveaxis(to_numpy(t), dim, -1) if t.is_floating_point() else t.cpu().numpy())
        for t in tensors
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
            got = torch.where(torch.from_numpy(poisoned.copy()).to(got.device), torch.zeros((), dtype=got.dtype), got)
            want, allowed = np.where(poisoned, 0, want), np.where(poisoned, 0, allowed)
        assert_within(got, want, allowed, f"gradient {i}")
    return value, tuple(gradients)
