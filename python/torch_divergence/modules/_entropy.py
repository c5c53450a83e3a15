import torch
from torch import Tensor

from torch_divergence import functional
from torch_divergence.functional import Reduction, Space


class EntropyLoss(torch.nn.Module):
    """:func:`torch_divergence.entropy` as a module: formula, conventions and errors are documented there.

    What belongs to a batch, ``row_weight`` and ``normalizer``, is given to the call. There are no parameters and no
    buffers: ``state_dict()`` is empty. It returns the entropy itself: subtract it from a loss to reward it.

    Args:
        space: ``"logits"``, ``"log_probs"`` or ``"probs"``: what ``input`` holds.
        temperature: divides logits.
        dim: the class dimension.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or ``"batchmean"``.

    Shape:
        ``input`` (*, classes) for ``dim=-1``; the result is a scalar, or (*) with ``reduction="none"``.

    Example:

        >>> import torch, torch_divergence as td
        >>> bonus = td.EntropyLoss()
        >>> bonus
        EntropyLoss(space='logits', temperature=1.0, dim=-1, reduction='mean')
        >>> bonus(torch.zeros(3, 8))
        tensor(2.0794)
    """

    def __init__(
        self,
        *,
        space: Space = "logits",
        temperature: float = 1.0,
        dim: int = -1,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.space = space
        self.temperature = temperature
        self.dim = dim
        self.reduction = reduction

    def forward(
        self, input: Tensor, row_weight: Tensor | None = None, normalizer: float | Tensor | None = None
    ) -> Tensor:
        return functional.entropy(
            input,
            space=self.space,
            temperature=self.temperature,
            dim=self.dim,
            row_weight=row_weight,
            reduction=self.reduction,
            normalizer=normalizer,
        )

    def extra_repr(self) -> str:
        return f"space={self.space!r}, temperature={self.temperature}, dim={self.dim}, reduction={self.reduction!r}"
