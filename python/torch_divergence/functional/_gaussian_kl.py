from torch import Tensor

from torch_divergence.functional._common import Reduction, ops, scalar_tensor


def gaussian_kl(
    mean: Tensor,
    log_var: Tensor,
    prior_mean: Tensor | None = None,
    prior_log_var: Tensor | None = None,
    *,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""The KL divergence of a diagonal Gaussian from a diagonal Gaussian prior, summed over the last dimension.

    .. math:: KL = \tfrac12 \sum_j \left[e^{x_j} - 1 - x_j + (\mu_j - c_j)^2 e^{-w_j}\right], \quad x = v - w

    with mu, v = ``mean``, ``log_var`` and c, w = ``prior_mean``, ``prior_log_var``: the term of the variational
    auto-encoder (Kingma and Welling, "Auto-Encoding Variational Bayes", 2014). Accurate however near the two are, and
    never negative. All four tensors get gradients, to any order, and only those that are needed are computed.

    Args:
        mean: float32, float64, bfloat16 or float16, of shape (*, n) with n at least 1.
        log_var: the logarithm of the variance, of the same shape. A half type may meet float32; float64 only itself.
        prior_mean: broadcastable to the shape of ``mean``; None is 0.
        prior_log_var: as ``prior_mean``; None is 0, so that without both the prior is standard normal.
        row_weight: weights of the rows, bool or floating point >= 0, broadcastable to (*). A constant. A row of weight
            0 contributes exactly nothing, whatever it holds.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` (shape (*)) or ``"batchmean"`` over the rows.
        normalizer: a positive number, or a scalar tensor, that replaces the denominator of ``"mean"``.

    Returns:
        The loss: float32 for half types, else in the type of the arguments.

    Raises:
        ValueError: naming the argument, what it was and what was expected.

    A log-variance of -inf is a point mass: infinitely far from anything but itself, where the divergence is 0.

    Example:

        >>> import torch, torch_divergence as td
        >>> td.gaussian_kl(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2))
        tensor(0.5000)
        >>> td.gaussian_kl(torch.zeros(1, 2), torch.full((1, 2), 1e-6))  # x^2/4 a coordinate
        tensor(5.0000e-13)
    """
    loss: Tensor = ops.gaussian_kl.default(
        mean,
        log_var,
        prior_mean,
        prior_log_var,
        row_weight=row_weight,
        reduction=reduction,
        normalizer=scalar_tensor(normalizer),
    )
    return loss


def gaussian_kl_full(
    mean: Tensor,
    scale_tril: Tensor,
    prior_mean: Tensor,
    prior_scale_tril: Tensor,
    *,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""The KL divergence of a Gaussian from a Gaussian prior, both with full covariances L L\ :sup:`T`.

    .. math:: KL = \tfrac12 \left[\|R\|_F^2 - n + \|L_p^{-1}(\mu - \mu_p)\|^2\right] - \sum_i \log R_{ii},
        \quad R = L_p^{-1} L

    The Cholesky factors are lower triangular; their strict upper triangle is not read and gets no gradient. Accurate to
    the condition number of ``prior_scale_tril``, near equality too. All four tensors get gradients, to any order.

    Args:
        mean: of shape (*, n), n at least 1.
        scale_tril: the Cholesky factor of the covariance, of shape (*, n, n), with a positive diagonal.
        prior_mean: as ``mean``; nothing is broadcast.
        prior_scale_tril: as ``scale_tril``.
        row_weight: as in :func:`gaussian_kl`.
        reduction: as in :func:`gaussian_kl`.
        normalizer: as in :func:`gaussian_kl`.

    Returns:
        The loss: float32 for half types, else in the type of the arguments.

    Raises:
        ValueError: naming the argument, what it was and what was expected; for a CPU tensor with an entry <= 0 on a
            diagonal too, outside rows of weight 0 (values of traced and fake tensors are not looked at).

    Example:

        >>> import torch, torch_divergence as td
        >>> eye = torch.eye(2).expand(1, 2, 2)
        >>> td.gaussian_kl_full(torch.tensor([[1.0, 0.0]]), eye, torch.zeros(1, 2), eye)
        tensor(0.5000)
    """
    loss: Tensor = ops.gaussian_kl_full.default(
        mean,
        scale_tril,
        prior_mean,
        prior_scale_tril,
        row_weight=row_weight,
        reduction=reduction,
        normalizer=scalar_tensor(normalizer),
    )
    return loss
