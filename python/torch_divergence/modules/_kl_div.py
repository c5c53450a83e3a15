import torch
from torch import Tensor

from torch_divergence import functional
from torch_divergence.functional import Direction, Reduction, Space


class KLDivLoss(torch.nn.Module):
    """:func:`torch_divergence.kl_div` as a module: formula, conventions and errors are documented there.

    What belongs to a batch, ``row_weight`` and ``normalizer``, is given to the call. There are no parameters and no
    buffers: ``state_dict()`` is empty.

    Args:
        direction: ``"forward"`` is KL(target || input), ``"reverse"`` is KL(input || target).
        inplace_grad: backward overwrites ``input`` with its gradient.
        space: ``"logits"``, ``"log_probs"`` or ``"probs"``: what ``input`` holds.
        target_space: what ``target`` holds, where it differs.
        temperature: divides logits.
        dim: the class dimension.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or ``"batchmean"``.

    Shape:
        ``input`` and ``target`` (*, classes) for ``dim=-1``; the result is a scalar, or (*) with ``reduction="none"``.

    Example:

        >>> import torch, torch_divergence as td
        >>> criterion = td.KLDivLoss(temperature=2.0)
        >>> criterion
        KLDivLoss(direction='forward', space='logits', temperature=2.0, dim=-1, reduction='mean')
        >>> teacher, student = torch.randn(8, 10), torch.randn(8, 10, requires_grad=True)
        >>> keep = torch.arange(8) < 6  # the last two rows are padding
        >>> criterion(student, teacher, row_weight=keep).backward()
        >>> student.grad[6:].count_nonzero()
        tensor(0)
    """

    def __init__(
        self,
        *,
        direction: Direction = "forward",
        inplace_grad: bool = False,
        space: Space = "logits",
        target_space: Space | None = None,
        temperature: float = 1.0,
        dim: int = -1,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.direction = direction
        self.inplace_grad = inplace_grad
        self.space = space
        self.target_space = target_space
        self.temperature = temperature
        self.dim = dim
        self.reduction = reduction

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return functional.kl_div(
            input,
            target,
            direction=self.direction,
            inplace_grad=self.inplace_grad,
            space=self.space,
            target_space=self.target_space,
            temperature=self.temperature,
            dim=self.dim,
            row_weight=row_weight,
            reduction=self.reduction,
            normalizer=normalizer,
        )

    def extra_repr(self) -> str:
        target_space = f", target_space={self.target_space!r}" if self.target_space is not None else ""
        inplace_grad = ", inplace_grad=True" if self.inplace_grad else ""
        return (
            f"direction={self.direction!r}, space={self.space!r}{target_space}, temperature={self.temperature}, "
            f"dim={self.dim}, reduction={self.reduction!r}{inplace_grad}"
        )
