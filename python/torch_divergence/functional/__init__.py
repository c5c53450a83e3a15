"""The losses as functions. Prediction first, target second, as in ``torch.nn.functional``; the rest by keyword."""

from torch_divergence.functional._common import Direction, Reduction, Space
from torch_divergence.functional._kl_div import kl_div
from torch_divergence.functional._sinkhorn import (
    Cost,
    SinkhornInfo,
    SinkhornResult,
    sinkhorn,
    sinkhorn_cost,
    sinkhorn_divergence,
    sinkhorn_ragged,
)

__all__ = [
    "Cost",
    "Direction",
    "Reduction",
    "SinkhornInfo",
    "SinkhornResult",
    "Space",
    "kl_div",
    "sinkhorn",
    "sinkhorn_cost",
    "sinkhorn_divergence",
    "sinkhorn_ragged",
]
