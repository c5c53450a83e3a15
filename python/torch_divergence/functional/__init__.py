"""The losses as functions. Prediction first, target second, as in ``torch.nn.functional``; the rest by keyword."""

from torch_divergence.functional._common import Direction, Reduction, Space
from torch_divergence.functional._gaussian_wasserstein import gaussian_wasserstein
from torch_divergence.functional._kl_div import kl_div
from torch_divergence.functional._sliced_wasserstein import sliced_wasserstein
from torch_divergence.functional._wasserstein import wasserstein
from torch_divergence.functional._wasserstein_1d import wasserstein_1d

__all__ = [
    "Direction",
    "Reduction",
    "Space",
    "gaussian_wasserstein",
    "kl_div",
    "sliced_wasserstein",
    "wasserstein",
    "wasserstein_1d",
]
