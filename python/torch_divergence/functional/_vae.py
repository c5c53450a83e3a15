from typing import Literal

from torch import Tensor

from torch_divergence.functional._common import Reduction, ops

Likelihood = Literal["bernoulli", "gaussian"]


def vae_loss(
    reconstruction: Tensor,
    data: Tensor,
    mean: Tensor,
    log_var: Tensor,
    *,
    beta: float = 1.0,
    likelihood: Likelihood = "bernoulli",
    scale: float = 1.0,
    free_bits: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The negative evidence lower bound of Kingma and Welling, "Auto-Encoding Variational Bayes", 2013.

    .. math:: -\log p(data \mid reconstruction) + \beta\, KL\big(N(mean, e^{log\_var}) \| N(0, 1)\big)

    summed over all but the batch dimension and reduced over the batch. The likelihood is

    - ``"bernoulli"``: sum softplus(x) - x data, for a reconstruction of logits x and data in [0, 1]. An infinite logit
      on the data's side costs 0, on the other +inf, with gradient 0.
    - ``"gaussian"``: sum ((data - x) / scale)\ :sup:`2` / 2 + log scale + log(2 pi) / 2.

    Args:
        reconstruction: (B, ...): float32, float64, bfloat16 or float16; half types are computed in float32.
        data: of the same shape.
        mean: (B, ...), the encoder's means.
        log_var: of the shape of ``mean``, the logarithms of the encoder's variances.
        beta: multiplies the KL term (Higgins et al., "beta-VAE", 2017); not negative. With 0
            the term is left out, whatever ``mean`` and ``log_var`` hold.
        likelihood: of the data.
        scale: standard deviation of the Gaussian likelihood.
        free_bits: each latent dimension's KL, after the mean over the batch, counts for at least this many nats (Kingma
            et al., "Improved Variational Inference with Inverse Autoregressive Flow", 2016).
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the batch; ``"none"`` is not defined with free bits.

    Returns:
        The loss: a scalar, or (B). Twice differentiable in all four tensors.

    Raises:
        ValueError: for shapes, dtypes, devices and options that do not fit.

    Example:

        >>> import torch, torch_divergence as td
        >>> x, data = torch.zeros(2, 5), torch.ones(2, 5)
        >>> td.vae_loss(x, data, torch.zeros(2, 3), torch.zeros(2, 3))  # 5 log 2, and no divergence
        tensor(3.4657)
    """
    loss: Tensor = ops.vae_loss.default(
        reconstruction,
        data,
        mean,
        log_var,
        beta=beta,
        likelihood=likelihood,
        scale=scale,
        free_bits=free_bits,
        reduction=reduction,
    )
    return loss
