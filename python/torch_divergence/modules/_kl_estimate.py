import torch
from torch import Tensor

from torch_divergence import functional
from torch_divergence.functional import KLEstimateGradient, KLEstimator, Reduction


class KLEstimateLoss(torch.nn.Module):
    """:func:`torch_divergence.kl_estimate` as a module: formula, conventions and errors are documented there.

    Args:
        kind: ``"k1"``, ``"k2"`` or ``"k3"``.
        gradient: ``"path"``, ``"kl"`` or ``"none"``.
        max_log_ratio: where the log-ratio is clamped; None is nowhere.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or ``"batchmean"``.

    Example:

        >>> import torch, torch_divergence as td
        >>> criterion = td.KLEstimateLoss(kind="k2")
        >>> criterion
        KLEstimateLoss(kind='k2', gradient='path', max_log_ratio=None, reduction='mean')
        >>> criterion(torch.ones(4), torch.zeros(4))
        tensor(0.5000)
    """

    def __init__(
        self,
        *,
        kind: KLEstimator = "k3",
        gradient: KLEstimateGradient = "path",
        max_log_ratio: float | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.kind = kind
        self.gradient = gradient
        self.max_log_ratio = max_log_ratio
        self.reduction = reduction

    def forward(
        self,
        log_p: Tensor,
        log_q: Tensor,
        importance_weight: Tensor | None = None,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return functional.kl_estimate(
            log_p,
            log_q,
            kind=self.kind,
            gradient=self.gradient,
            max_log_ratio=self.max_log_ratio,
            importance_weight=importance_weight,
            row_weight=row_weight,
            reduction=self.reduction,
            normalizer=normalizer,
        )

    def extra_repr(self) -> str:
        return (
            f"kind={self.kind!r}, gradient={self.gradient!r}, max_log_ratio={self.max_log_ratio}, "
            f"reduction={self.reduction!r}"
        )
