import torch
from torch import Tensor

from torch_divergence import functional
from torch_divergence.functional import GANLossKind


class GANLoss(torch.nn.Module):
    """The original GAN's two losses, from the discriminator's logits: :func:`torch_divergence.gan_discriminator_loss`
    and :func:`torch_divergence.gan_generator_loss`.

    Args:
        kind: of the generator's loss, ``"nonsaturating"`` or ``"minimax"``.

    Example:

        >>> import torch, torch_divergence as td
        >>> criterion = td.GANLoss()
        >>> criterion
        GANLoss(kind='nonsaturating')
        >>> real, fake = torch.randn(8), torch.randn(8)
        >>> criterion.discriminator(real, fake).shape, criterion.generator(fake).shape
        (torch.Size([]), torch.Size([]))
    """

    def __init__(self, *, kind: GANLossKind = "nonsaturating") -> None:
        super().__init__()
        self.kind = kind

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return functional.gan_discriminator_loss(real, fake)

    def generator(self, fake: Tensor) -> Tensor:
        return functional.gan_generator_loss(fake, kind=self.kind)

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}"
