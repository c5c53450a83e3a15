"""The losses as modules: what does not change between batches is set once, at construction."""

from torch_divergence.modules._cross_entropy import CrossEntropyLoss
from torch_divergence.modules._distillation import DistillationLoss
from torch_divergence.modules._entropy import EntropyLoss
from torch_divergence.modules._gan import GANLoss
from torch_divergence.modules._gaussian_kl import GaussianKLFullLoss, GaussianKLLoss
from torch_divergence.modules._js_div import JSDivLoss
from torch_divergence.modules._kl_div import KLDivLoss
from torch_divergence.modules._kl_div_topk import KLDivTopKLoss
from torch_divergence.modules._kl_estimate import KLEstimateLoss
from torch_divergence.modules._ppo import PPOClipLoss, PPOKLPenaltyLoss
from torch_divergence.modules._sinkhorn import SinkhornCostLoss, SinkhornLoss
from torch_divergence.modules._sliced_wasserstein import SlicedWassersteinLoss
from torch_divergence.modules._vae import VAELoss
from torch_divergence.modules._wasserstein_1d import Wasserstein1dLoss
from torch_divergence.modules._wgan import WassersteinGANLoss

__all__ = [
    "CrossEntropyLoss",
    "DistillationLoss",
    "EntropyLoss",
    "GANLoss",
    "GaussianKLFullLoss",
    "GaussianKLLoss",
    "JSDivLoss",
    "KLDivLoss",
    "KLDivTopKLoss",
    "KLEstimateLoss",
    "PPOClipLoss",
    "PPOKLPenaltyLoss",
    "SinkhornCostLoss",
    "SinkhornLoss",
    "SlicedWassersteinLoss",
    "VAELoss",
    "Wasserstein1dLoss",
    "WassersteinGANLoss",
]
