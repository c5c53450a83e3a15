"""What the losses share: the words that their options take, and the operators."""

import re
from collections.abc import Callable
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

Direction = Literal["forward", "reverse"]
Reduction = Literal["none", "sum", "mean", "batchmean"]
Space = Literal["logits", "log_probs", "probs"]

_WRONG_TYPE = re.compile(
    r"::(\w+)\(\) Expected a value of type '(.+?)' for argument '(\w+)' but instead found type '(.+?)'"
)


class _Operator:
    """An operator of PyTorch's dispatcher, whose errors about the types of arguments are RuntimeErrors."""

    def __init__(self, overload: Callable[..., Any]) -> None:
        self.overload = overload

    def default(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.overload(*args, **kwargs)
        except RuntimeError as error:
            wrong = _WRONG_TYPE.search(str(error))
            if wrong is None:
                raise
            name, expected, argument, found = wrong.groups()
        raise ValueError(f"{name}: {argument} has type {found}, expected {expected}")


class _Operators:
    """``torch.ops.torch_divergence``, but that an argument of a wrong type is a ValueError, as other bad input is."""

    def __getattr__(self, name: str) -> _Operator:
        return _Operator(getattr(torch.ops.torch_divergence, name).default)


ops = _Operators()


def scalar_tensor(value: float | Tensor | None) -> Tensor | None:
    """A number as the operators take it: on the CPU, whose scalars meet tensors of any device; exact in float64."""
    if isinstance(value, Real) and not isinstance(value, bool):
        return torch.full((), value, dtype=torch.float64, device="cpu")
    return value  # type: ignore[return-value]  # what is neither number nor tensor is refused by the operator
