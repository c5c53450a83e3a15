from torch import Tensor

from torch_divergence.functional._common import ops


def gaussian_wasserstein(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    r"""The Wasserstein distance W_2\ :sup:`2` between two Gaussians (the Fréchet distance; of features, the FID).

    .. math:: W_2^2 = \|m_1 - m_2\|^2 + \mathrm{tr}\,(S_1 + S_2 - 2 (S_1^{1/2} S_2 S_1^{1/2})^{1/2})

    (Dowson and Landau, "The Fréchet distance between multivariate normal distributions", 1982). It is computed from
    factors of the covariances, not as the difference of these traces, and stays accurate where they are close.

    All four tensors get gradients, to any order where both covariances are positive definite. The gradient of
    ``cov1`` is I - T with T the matrix of the optimal map. Equal covariances give exactly 0. Where one is singular the
    gradient is the finite part: directions in which the derivative is infinite are left out.

    Args:
        mean1: (D) or (B, D): float32, float64, bfloat16 or float16. Everything is computed in float64.
        cov1: (D, D) or (B, D, D), symmetric (of another matrix the symmetric part is taken) and positive semidefinite.
            Eigenvalues within 4 eps of 0, relative to the largest, count as 0, with eps that of its dtype; with an
            eigenvalue below that the result is NaN.
        mean2: as ``mean1``. float64 meets only float64.
        cov2: as ``cov1``.

    An argument without the batch dimension is shared by the batch.

    Returns:
        W_2\ :sup:`2`: () or (B), float64 for float64 arguments and else float32.

    Raises:
        ValueError: naming the argument, what it was and what was expected.

    Example:

        >>> import torch, torch_divergence as td
        >>> mean, cov = torch.zeros(2), torch.tensor([[2.0, 1.0], [1.0, 2.0]], requires_grad=True)
        >>> td.gaussian_wasserstein(mean, cov.detach(), mean + 3, cov.detach())  # a translation
        tensor(18.)
        >>> td.gaussian_wasserstein(mean, cov, mean, 4 * cov.detach()).backward()  # the map is 2 I
        >>> cov.grad.allclose(-torch.eye(2))
        True
    """
    loss: Tensor = ops.gaussian_wasserstein.default(mean1, cov1, mean2, cov2)
    return loss
