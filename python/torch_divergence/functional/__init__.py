"""The losses as functions. Prediction first, target second, as in ``torch.nn.functional``; the rest by keyword."""

from torch_divergence.functional._common import Direction, Reduction, Space
from torch_divergence.functional._kl_div import kl_div
from torch_divergence.functional._kl_div_topk import Tail, kl_div_topk

__all__ = ["Direction", "Reduction", "Space", "Tail", "kl_div", "kl_div_topk"]
