"""What the losses share: the words that their options take, and the operators."""

from typing import Literal

import torch
from torch import Tensor

Direction = Literal["forward", "reverse"]
Reduction = Literal["none", "sum", "mean", "batchmean"]
Space = Literal["logits", "log_probs", "probs"]

ops = torch.ops.torch_divergence


def scalar_tensor(value: float | Tensor | None) -> Tensor | None:
    """A number as the operators take it: on the CPU, whose scalars meet tensors of any device; exact in float64."""
    if isinstance(value, (int, float)):
        return torch.full((), value, dtype=torch.float64, device="cpu")
    return value
