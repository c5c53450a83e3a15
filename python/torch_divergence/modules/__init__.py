"""The losses as modules: what does not change between batches is set once, at construction."""

from torch_divergence.modules._cross_entropy import CrossEntropyLoss
from torch_divergence.modules._entropy import EntropyLoss
from torch_divergence.modules._kl_div import KLDivLoss

__all__ = ["CrossEntropyLoss", "EntropyLoss", "KLDivLoss"]
