"""The losses as functions. Prediction first, target second, as in ``torch.nn.functional``; the rest by keyword."""

from torch_divergence.functional._common import Direction, Reduction, Space
from torch_divergence.functional._cross_entropy import cross_entropy
from torch_divergence.functional._entropy import entropy
from torch_divergence.functional._kl_div import kl_div

__all__ = ["Direction", "Reduction", "Space", "cross_entropy", "entropy", "kl_div"]
