import torch
from torch import Tensor

from torch_divergence import functional
from torch_divergence.functional import Reduction


class Wasserstein1dLoss(torch.nn.Module):
    """:func:`torch_divergence.wasserstein_1d` as a module: formula, conventions and errors are documented there.

    The weights ``a`` and ``b`` belong to a batch and are given to the call. There are no parameters and no buffers.

    Args:
        p: the power of the distance.
        dim: the dimension of the points.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or ``"batchmean"``.

    Shape:
        ``u`` (*, N) and ``v`` (*, M) for ``dim=-1``; the result is a scalar, or (*) with ``reduction="none"``.

    Example:

        >>> import torch, torch_divergence as td
        >>> criterion = td.Wasserstein1dLoss(p=2)
        >>> criterion
        Wasserstein1dLoss(p=2, dim=-1, reduction='none')
        >>> u = torch.randn(8, 10, requires_grad=True)
        >>> criterion(u, torch.randn(8, 12)).mean().backward()
    """

    def __init__(self, *, p: float = 1, dim: int = -1, reduction: Reduction = "none") -> None:
        super().__init__()
        self.p = p
        self.dim = dim
        self.reduction = reduction

    def forward(self, u: Tensor, v: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        return functional.wasserstein_1d(u, v, a, b, p=self.p, dim=self.dim, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"p={self.p}, dim={self.dim}, reduction={self.reduction!r}"
