"""The losses as modules: what does not change between batches is set once, at construction."""

from torch_divergence.modules._kl_div import KLDivLoss
from torch_divergence.modules._sinkhorn import SinkhornCostLoss, SinkhornLoss

__all__ = ["KLDivLoss", "SinkhornCostLoss", "SinkhornLoss"]
