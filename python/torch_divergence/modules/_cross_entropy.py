import torch
from torch import Tensor

from torch_divergence import functional
from torch_divergence.functional import Reduction, Space


class CrossEntropyLoss(torch.nn.Module):
    """:func:`torch_divergence.cross_entropy` as a module: formula, conventions and errors are documented there.

    What belongs to a batch, ``row_weight`` and ``normalizer``, is given to the call. There are no parameters and no
    buffers: ``state_dict()`` is empty.

    Args:
        target_space: what a target of distributions holds: ``"probs"`` unless told otherwise.
        label_smoothing: how much of the target is spread over all classes.
        ignore_index: rows of this class index are left out.
        inplace_grad: backward overwrites ``input`` with its gradient.
        space: ``"logits"``, ``"log_probs"`` or ``"probs"``: what ``input`` holds.
        temperature: divides logits.
        dim: the class dimension.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or ``"batchmean"``.

    Shape:
        ``input`` (*, classes) for ``dim=-1``; ``target`` (*) of class indices or (*, classes) of distributions; the
        result is a scalar, or (*) with ``reduction="none"``.

    Example:

        >>> import torch, torch_divergence as td
        >>> criterion = td.CrossEntropyLoss(label_smoothing=0.1)
        >>> criterion
        CrossEntropyLoss(label_smoothing=0.1, space='logits', temperature=1.0, dim=-1, reduction='mean')
        >>> logits, labels = torch.randn(8, 10, requires_grad=True), torch.randint(10, (8,))
        >>> labels[6:] = -100  # the last two rows are padding
        >>> criterion(logits, labels).backward()
        >>> logits.grad[6:].count_nonzero()
        tensor(0)
    """

    def __init__(
        self,
        *,
        target_space: Space | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        inplace_grad: bool = False,
        space: Space = "logits",
        temperature: float = 1.0,
        dim: int = -1,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.target_space = target_space
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.inplace_grad = inplace_grad
        self.space = space
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
        return functional.cross_entropy(
            input,
            target,
            target_space=self.target_space,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            inplace_grad=self.inplace_grad,
            space=self.space,
            temperature=self.temperature,
            dim=self.dim,
            row_weight=row_weight,
            reduction=self.reduction,
            normalizer=normalizer,
        )

    def extra_repr(self) -> str:
        target_space = f"target_space={self.target_space!r}, " if self.target_space is not None else ""
        ignore_index = f", ignore_index={self.ignore_index}" if self.ignore_index != -100 else ""
        inplace_grad = ", inplace_grad=True" if self.inplace_grad else ""
        return (
            f"{target_space}label_smoothing={self.label_smoothing}{ignore_index}, space={self.space!r}, "
            f"temperature={self.temperature}, dim={self.dim}, reduction={self.reduction!r}{inplace_grad}"
        )
