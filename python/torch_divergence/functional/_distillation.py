from typing import Literal

from torch import Tensor

from torch_divergence.functional._common import Direction, Reduction, ops, scalar_tensor

Divergence = Literal["kl", "js"]


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None = None,
    *,
    topk: tuple[Tensor, Tensor] | None = None,
    temperature: float = 2.0,
    alpha: float | None = None,
    divergence: Divergence = "kl",
    direction: Direction = "forward",
    beta: float = 0.5,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Knowledge distillation (Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015).

    .. math:: \alpha T^2 D(teacher / T, student / T) + (1 - \alpha)\, cross\_entropy(student, labels)

    D is the KL divergence KL(teacher || student), or the JS divergence, at temperature T; the cross-entropy is at
    temperature 1. The factor T\ :sup:`2` keeps the size of the first term's gradients when T changes.

    Args:
        student_logits: (\*, classes).
        teacher_logits: of the same shape; None with ``topk``.
        labels: class indices (\*), or None.
        topk: (indices, log_probs), each (\*, k), of a teacher known by its largest log-probabilities at
            ``temperature`` only; see :func:`kl_div_topk`, whose ``"bucket"`` tail is used.
        temperature: positive.
        alpha: weight of the divergence, from 0 to 1; None is 1 without labels and 0.5 with them.
        divergence: ``"kl"`` or ``"js"``.
        direction: of KL; ``"reverse"`` is KL(student || teacher).
        beta: of JS; see :func:`js_div`.
        ignore_index: a row with this label has weight 0, in the divergence too.
        row_weight: as in :func:`kl_div`.
        reduction: as in :func:`kl_div`.
        normalizer: as in :func:`kl_div`.

    Returns:
        A scalar, or one value a row.

    Raises:
        ValueError: for a teacher that is missing or given twice, an alpha other than 1 without labels, options that the
            divergence does not have, and for what the divergence and :func:`cross_entropy` refuse.

    Example:

        >>> import torch, torch_divergence as td
        >>> student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
        >>> labels = teacher.argmax(-1)
        >>> loss = td.distillation_loss(student, teacher, labels, temperature=4.0)
        >>> soft, hard = td.kl_div(student, teacher, temperature=4.0), td.cross_entropy(student, labels)
        >>> torch.allclose(loss, 0.5 * 16 * soft + 0.5 * hard)
        True
    """
    indices, log_probs = (None, None) if topk is None else topk
    loss: Tensor = ops.distillation_loss.default(
        student_logits,
        teacher_logits,
        labels,
        topk_indices=indices,
        topk_log_probs=log_probs,
        temperature=temperature,
        alpha=alpha,
        divergence=divergence,
        direction=direction,
        beta=beta,
        ignore_index=ignore_index,
        row_weight=row_weight,
        reduction=reduction,
        normalizer=scalar_tensor(normalizer),
    )
    return loss
