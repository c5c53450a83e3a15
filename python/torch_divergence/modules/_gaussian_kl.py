import torch
from torch import Tensor

from torch_divergence import functional
from torch_divergence.functional import Reduction


class GaussianKLLoss(torch.nn.Module):
    """:func:`torch_divergence.gaussian_kl` as a module: formula, conventions and errors are documented there.

    Args:
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or ``"batchmean"``.

    Example:

        >>> import torch, torch_divergence as td
        >>> criterion = td.GaussianKLLoss()
        >>> criterion
        GaussianKLLoss(reduction='mean')
        >>> criterion(torch.ones(4, 2), torch.zeros(4, 2))
        tensor(1.)
    """

    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(
        self,
        mean: Tensor,
        log_var: Tensor,
        prior_mean: Tensor | None = None,
        prior_log_var: Tensor | None = None,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return functional.gaussian_kl(
            mean,
            log_var,
            prior_mean,
            prior_log_var,
            row_weight=row_weight,
            reduction=self.reduction,
            normalizer=normalizer,
        )

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


class GaussianKLFullLoss(torch.nn.Module):
    """:func:`torch_divergence.gaussian_kl_full` as a module: formula, conventions and errors are documented there.

    Args:
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or ``"batchmean"``.

    Example:

        >>> import torch, torch_divergence as td
        >>> mean, factor = torch.zeros(4, 2), torch.eye(2).expand(4, 2, 2)
        >>> td.GaussianKLFullLoss()(mean, factor, mean, factor)
        tensor(0.)
    """

    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(
        self,
        mean: Tensor,
        scale_tril: Tensor,
        prior_mean: Tensor,
        prior_scale_tril: Tensor,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return functional.gaussian_kl_full(
            mean,
            scale_tril,
            prior_mean,
            prior_scale_tril,
            row_weight=row_weight,
            reduction=self.reduction,
            normalizer=normalizer,
        )

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"
