import torch
from torch import Tensor

from torch_divergence import functional
from torch_divergence.functional import Reduction


class SlicedWassersteinLoss(torch.nn.Module):
    """:func:`torch_divergence.sliced_wasserstein` as a module: formula, conventions and errors are documented there.

    Tensors and the generator are given to the call: weights ``a`` and ``b``, ``projections``. Without ``projections``
    every call draws directions anew. There are no parameters and no buffers.

    Args:
        p: the power of the distance.
        n_projections: how many directions to draw.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or ``"batchmean"``.

    Shape:
        ``x`` (N, D) or (B, N, D), ``y`` (M, D) or (B, M, D); the result is a scalar, or (B) with ``reduction="none"``.

    Example:

        >>> import torch, torch_divergence as td
        >>> criterion = td.SlicedWassersteinLoss(n_projections=64)
        >>> criterion
        SlicedWassersteinLoss(p=2, n_projections=64, reduction='mean')
        >>> x = torch.randn(4, 10, 3, requires_grad=True)
        >>> criterion(x, torch.randn(4, 12, 3)).backward()
    """

    def __init__(self, *, p: float = 2, n_projections: int = 128, reduction: Reduction = "mean") -> None:
        super().__init__()
        self.p = p
        self.n_projections = n_projections
        self.reduction = reduction

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        a: Tensor | None = None,
        b: Tensor | None = None,
        projections: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        return functional.sliced_wasserstein(
            x,
            y,
            a,
            b,
            p=self.p,
            n_projections=self.n_projections,
            projections=projections,
            generator=generator,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"p={self.p}, n_projections={self.n_projections}, reduction={self.reduction!r}"
