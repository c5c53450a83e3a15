import torch
from torch import Tensor

from torch_divergence import functional
from torch_divergence.functional import Likelihood, Reduction


class VAELoss(torch.nn.Module):
    """:func:`torch_divergence.vae_loss` as a module: formula, conventions and errors are documented there.

    Args:
        beta: multiplies the KL term.
        likelihood: ``"bernoulli"`` or ``"gaussian"``.
        scale: standard deviation of the Gaussian likelihood.
        free_bits: each latent dimension's KL counts for at least this much.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the batch.

    Example:

        >>> import torch, torch_divergence as td
        >>> criterion = td.VAELoss(beta=4.0)
        >>> criterion
        VAELoss(beta=4.0, likelihood='bernoulli', scale=1.0, free_bits=0.0, reduction='mean')
        >>> criterion(torch.zeros(2, 5), torch.ones(2, 5), torch.zeros(2, 3), torch.zeros(2, 3))
        tensor(3.4657)
    """

    def __init__(
        self,
        *,
        beta: float = 1.0,
        likelihood: Likelihood = "bernoulli",
        scale: float = 1.0,
        free_bits: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.beta = beta
        self.likelihood = likelihood
        self.scale = scale
        self.free_bits = free_bits
        self.reduction = reduction

    def forward(self, reconstruction: Tensor, data: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
        return functional.vae_loss(
            reconstruction,
            data,
            mean,
            log_var,
            beta=self.beta,
            likelihood=self.likelihood,
            scale=self.scale,
            free_bits=self.free_bits,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return (
            f"beta={self.beta}, likelihood={self.likelihood!r}, scale={self.scale}, free_bits={self.free_bits}, "
            f"reduction={self.reduction!r}"
        )
