"""The losses as functions. Prediction first, target second, as in ``torch.nn.functional``; the rest by keyword."""

from torch_divergence.functional._common import Direction, Reduction, Space
from torch_divergence.functional._js_div import js_div
from torch_divergence.functional._kl_div import kl_div

__all__ = ["Direction", "Reduction", "Space", "js_div", "kl_div"]
