"""The losses as modules: what does not change between batches is set once, at construction."""

from torch_divergence.modules._kl_div import KLDivLoss
from torch_divergence.modules._sliced_wasserstein import SlicedWassersteinLoss
from torch_divergence.modules._wasserstein_1d import Wasserstein1dLoss

__all__ = ["KLDivLoss", "SlicedWassersteinLoss", "Wasserstein1dLoss"]
