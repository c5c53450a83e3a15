import torch
from torch import Tensor

from torch_divergence import functional
from torch_divergence.functional import Reduction


class PPOClipLoss(torch.nn.Module):
    """:func:`torch_divergence.ppo_clip_loss` as a module: formula, conventions and errors are documented there.

    Args:
        clip: the ratio counts from 1 - clip ...
        clip_high: ... to 1 + clip_high; None is ``clip``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the entries.

    Example:

        >>> import torch, torch_divergence as td
        >>> criterion = td.PPOClipLoss(clip=0.1)
        >>> criterion
        PPOClipLoss(clip=0.1, clip_high=None, reduction='mean')
        >>> criterion(torch.ones(3), torch.zeros(3), torch.ones(3))
        tensor(-1.1000)
    """

    def __init__(self, *, clip: float = 0.2, clip_high: float | None = None, reduction: Reduction = "mean") -> None:
        super().__init__()
        self.clip = clip
        self.clip_high = clip_high
        self.reduction = reduction

    def forward(
        self,
        log_prob: Tensor,
        old_log_prob: Tensor,
        advantage: Tensor,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return functional.ppo_clip_loss(
            log_prob,
            old_log_prob,
            advantage,
            clip=self.clip,
            clip_high=self.clip_high,
            row_weight=row_weight,
            reduction=self.reduction,
            normalizer=normalizer,
        )

    def extra_repr(self) -> str:
        return f"clip={self.clip}, clip_high={self.clip_high}, reduction={self.reduction!r}"


class PPOKLPenaltyLoss(torch.nn.Module):
    """:func:`torch_divergence.ppo_kl_penalty_loss` as a module: formula, conventions and errors are documented there.

    Args:
        kl_coef: multiplies the divergence. An attribute that may be set between steps, by
            :class:`torch_divergence.AdaptiveKLController`, say.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the entries.

    Example:

        >>> import torch, torch_divergence as td
        >>> criterion = td.PPOKLPenaltyLoss(kl_coef=0.2)
        >>> criterion(torch.zeros(4), torch.zeros(4), torch.ones(4), torch.full((4,), 0.5))
        tensor(-0.9000)
    """

    def __init__(self, *, kl_coef: float, reduction: Reduction = "mean") -> None:
        super().__init__()
        self.kl_coef = kl_coef
        self.reduction = reduction

    def forward(
        self,
        log_prob: Tensor,
        old_log_prob: Tensor,
        advantage: Tensor,
        kl: Tensor,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return functional.ppo_kl_penalty_loss(
            log_prob,
            old_log_prob,
            advantage,
            kl,
            kl_coef=self.kl_coef,
            row_weight=row_weight,
            reduction=self.reduction,
            normalizer=normalizer,
        )

    def extra_repr(self) -> str:
        return f"kl_coef={self.kl_coef}, reduction={self.reduction!r}"
