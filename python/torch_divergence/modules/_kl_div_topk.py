import torch
from torch import Tensor

from torch_divergence import functional
from torch_divergence.functional import Direction, Reduction, Space, Tail


class KLDivTopKLoss(torch.nn.Module):
    """:func:`torch_divergence.kl_div_topk` as a module: formula, conventions and errors are documented there.

    What belongs to a batch is given to the call. There are no parameters and no buffers: ``state_dict()`` is empty.

    Args:
        tail: ``"bucket"``, ``"zero"``, ``"renorm_target"`` or ``"renorm_both"``.
        direction: ``"forward"`` is KL(teacher || input), ``"reverse"`` is KL(input || teacher).
        space: ``"logits"``, ``"log_probs"`` or ``"probs"``: what ``input`` holds.
        temperature: divides logits.
        dim: the class dimension.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or ``"batchmean"``.

    Shape:
        ``input`` (*, classes), ``indices`` and ``log_probs`` (*, k), ``tail_log_prob`` (*) for ``dim=-1``; the result
        is a scalar, or (*) with ``reduction="none"``.

    Example:

        >>> import torch, torch_divergence as td
        >>> criterion = td.KLDivTopKLoss()
        >>> criterion
        KLDivTopKLoss(tail='bucket', direction='forward', space='logits', temperature=1.0, dim=-1, reduction='mean')
        >>> log_probs, indices = torch.randn(8, 100).log_softmax(-1).topk(16)
        >>> criterion(torch.randn(8, 100, requires_grad=True), indices, log_probs).backward()
    """

    def __init__(
        self,
        *,
        tail: Tail = "bucket",
        direction: Direction = "forward",
        space: Space = "logits",
        temperature: float = 1.0,
        dim: int = -1,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.tail = tail
        self.direction = direction
        self.space = space
        self.temperature = temperature
        self.dim = dim
        self.reduction = reduction

    def forward(
        self,
        input: Tensor,
        indices: Tensor,
        log_probs: Tensor,
        tail_log_prob: Tensor | None = None,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return functional.kl_div_topk(
            input,
            indices,
            log_probs,
            tail=self.tail,
            tail_log_prob=tail_log_prob,
            direction=self.direction,
            space=self.space,
            temperature=self.temperature,
            dim=self.dim,
            row_weight=row_weight,
            reduction=self.reduction,
            normalizer=normalizer,
        )

    def extra_repr(self) -> str:
        return (
            f"tail={self.tail!r}, direction={self.direction!r}, space={self.space!r}, "
            f"temperature={self.temperature}, dim={self.dim}, reduction={self.reduction!r}"
        )
