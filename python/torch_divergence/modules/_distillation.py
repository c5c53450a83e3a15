import torch
from torch import Tensor

from torch_divergence import functional
from torch_divergence.functional import Direction, Divergence, Reduction


class DistillationLoss(torch.nn.Module):
    """:func:`torch_divergence.distillation_loss` as a module: formula, conventions and errors are documented there.

    Args:
        temperature: divides the logits of both sides in the divergence.
        alpha: weight of the divergence; None is 1 without labels and 0.5 with them.
        divergence: ``"kl"`` or ``"js"``.
        direction: of KL.
        beta: of JS.
        ignore_index: a row with this label has weight 0.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or ``"batchmean"``.

    Example:

        >>> import torch, torch_divergence as td
        >>> criterion = td.DistillationLoss(temperature=4.0, alpha=0.9)
        >>> student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
        >>> criterion(student, teacher, labels=teacher.argmax(-1)).backward()
    """

    def __init__(
        self,
        *,
        temperature: float = 2.0,
        alpha: float | None = None,
        divergence: Divergence = "kl",
        direction: Direction = "forward",
        beta: float = 0.5,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.alpha = alpha
        self.divergence = divergence
        self.direction = direction
        self.beta = beta
        self.ignore_index = ignore_index
        self.reduction = reduction

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor | None = None,
        topk: tuple[Tensor, Tensor] | None = None,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return functional.distillation_loss(
            student_logits,
            teacher_logits,
            labels,
            topk=topk,
            temperature=self.temperature,
            alpha=self.alpha,
            divergence=self.divergence,
            direction=self.direction,
            beta=self.beta,
            ignore_index=self.ignore_index,
            row_weight=row_weight,
            reduction=self.reduction,
            normalizer=normalizer,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, alpha={self.alpha}, divergence={self.divergence!r}, "
            f"direction={self.direction!r}, beta={self.beta}, ignore_index={self.ignore_index}, "
            f"reduction={self.reduction!r}"
        )
