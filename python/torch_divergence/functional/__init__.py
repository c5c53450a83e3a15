"""The losses as functions. Prediction first, target second, as in ``torch.nn.functional``; the rest by keyword."""

from torch_divergence.functional._common import Direction, Reduction, Space
from torch_divergence.functional._cross_entropy import cross_entropy
from torch_divergence.functional._distillation import Divergence, distillation_loss
from torch_divergence.functional._entropy import entropy
from torch_divergence.functional._fisher_vector_product import fisher_vector_product
from torch_divergence.functional._gan import GANLossKind, gan_discriminator_loss, gan_generator_loss, gan_js_estimate
from torch_divergence.functional._gaussian_kl import gaussian_kl, gaussian_kl_full
from torch_divergence.functional._gaussian_wasserstein import gaussian_wasserstein
from torch_divergence.functional._js_div import js_div
from torch_divergence.functional._kl_div import kl_div
from torch_divergence.functional._kl_div_topk import Tail, kl_div_topk
from torch_divergence.functional._kl_estimate import KLEstimateGradient, KLEstimator, kl_estimate
from torch_divergence.functional._ppo import AdaptiveKLController, ppo_clip_loss, ppo_kl_penalty_loss
from torch_divergence.functional._sinkhorn import (
    Cost,
    SinkhornInfo,
    SinkhornResult,
    sinkhorn,
    sinkhorn_cost,
    sinkhorn_divergence,
    sinkhorn_ragged,
)
from torch_divergence.functional._sliced_wasserstein import sliced_wasserstein
from torch_divergence.functional._trust_region import TrustRegionResult, trust_region_step
from torch_divergence.functional._vae import Likelihood, vae_loss
from torch_divergence.functional._wasserstein import wasserstein
from torch_divergence.functional._wasserstein_1d import wasserstein_1d
from torch_divergence.functional._wgan import gradient_penalty, wgan_critic_loss, wgan_generator_loss

__all__ = [
    "AdaptiveKLController",
    "Cost",
    "Direction",
    "Divergence",
    "GANLossKind",
    "KLEstimateGradient",
    "KLEstimator",
    "Likelihood",
    "Reduction",
    "SinkhornInfo",
    "SinkhornResult",
    "Space",
    "Tail",
    "TrustRegionResult",
    "cross_entropy",
    "distillation_loss",
    "entropy",
    "fisher_vector_product",
    "gan_discriminator_loss",
    "gan_generator_loss",
    "gan_js_estimate",
    "gaussian_kl",
    "gaussian_kl_full",
    "gaussian_wasserstein",
    "gradient_penalty",
    "js_div",
    "kl_div",
    "kl_div_topk",
    "kl_estimate",
    "ppo_clip_loss",
    "ppo_kl_penalty_loss",
    "sinkhorn",
    "sinkhorn_cost",
    "sinkhorn_divergence",
    "sinkhorn_ragged",
    "sliced_wasserstein",
    "trust_region_step",
    "vae_loss",
    "wasserstein",
    "wasserstein_1d",
    "wgan_critic_loss",
    "wgan_generator_loss",
]
