import torch
from torch import Tensor

from torch_divergence import functional
from torch_divergence.functional import Reduction, Space


class JSDivLoss(torch.nn.Module):
    """:func:`torch_divergence.js_div` as a module: formula, conventions and errors are documented there.

    What belongs to a batch, ``row_weight`` and ``normalizer``, is given to the call. There are no parameters and no
    buffers: ``state_dict()`` is empty.

    Args:
        beta: the weight of ``target`` in the mixture.
        scaled: divides by beta (1 - beta).
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
        >>> criterion = td.JSDivLoss(beta=0.1, scaled=True)
        >>> criterion
        JSDivLoss(beta=0.1, scaled=True, space='logits', temperature=1.0, dim=-1, reduction='mean')
        >>> teacher, student = torch.randn(8, 10), torch.randn(8, 10, requires_grad=True)
        >>> keep = torch.arange(8) < 6  # the last two rows are padding
        >>> criterion(student, teacher, row_weight=keep).backward()
        >>> student.grad[6:].count_nonzero()
        tensor(0)
    """

    def __init__(
        self,
        *,
        beta: float = 0.5,
        scaled: bool = False,
        inplace_grad: bool = False,
        space: Space = "logits",
        target_space: Space | None = None,
        temperature: float = 1.0,
        dim: int = -1,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.beta = beta
        self.scaled = scaled
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
        return functional.js_div(
            input,
            target,
            beta=self.beta,
            scaled=self.scaled,
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
            f"beta={self.beta}, scaled={self.scaled}, space={self.space!r}{target_space}, "
            f"temperature={self.temperature}, dim={self.dim}, reduction={self.reduction!r}{inplace_grad}"
        )
