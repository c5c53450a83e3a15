import torch
from torch import Tensor

from torch_divergence import functional


class WassersteinGANLoss(torch.nn.Module):
    """The Wasserstein GAN's two losses, from the critic's scores: :func:`torch_divergence.wgan_critic_loss` and
    :func:`torch_divergence.wgan_generator_loss`. What keeps the critic Lipschitz is the caller's: weight clipping, or
    :func:`torch_divergence.gradient_penalty`.

    Example:

        >>> import torch, torch_divergence as td
        >>> criterion = td.WassersteinGANLoss()
        >>> criterion.critic(torch.tensor([3.0]), torch.tensor([1.0])), criterion.generator(torch.tensor([1.0]))
        (tensor(-2.), tensor(-1.))
    """

    def critic(self, real: Tensor, fake: Tensor) -> Tensor:
        return functional.wgan_critic_loss(real, fake)

    def generator(self, fake: Tensor) -> Tensor:
        return functional.wgan_generator_loss(fake)
