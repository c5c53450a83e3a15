"""The losses as modules: what does not change between batches is set once, at construction."""

from torch_divergence.modules._js_div import JSDivLoss
from torch_divergence.modules._kl_div import KLDivLoss

__all__ = ["JSDivLoss", "KLDivLoss"]
