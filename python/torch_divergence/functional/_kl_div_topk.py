from typing import Literal

from torch import Tensor

from torch_divergence.functional._common import Direction, Reduction, Space, ops, scalar_tensor

Tail = Literal["bucket", "zero", "renorm_target", "renorm_both"]


def kl_div_topk(
    input: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    *,
    tail: Tail = "bucket",
    tail_log_prob: Tensor | None = None,
    direction: Direction = "forward",
    space: Space = "logits",
    temperature: float = 1.0,
    dim: int = -1,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""The KL divergence from a teacher of which only the k largest log-probabilities of each row are known.

    .. math:: \sum_e a_e (\log a_e - \log b_e)

    with a = teacher and b = ``input`` in the forward direction, and the reverse in the reverse one. The sum runs over
    the k classes in ``indices``; ``tail`` tells what is done about the others:

    - ``"bucket"``: all other classes together are one more class, with the probabilities that teacher and student
      leave to them. The result is the KL divergence of the coarser distributions: never negative (for logits) and, by
      the data processing inequality, never above the divergence from the whole teacher; equal to it for k = classes -
      1. The student's share is summed over those classes, so that it has all its digits however small it is.
    - ``"zero"``: the others are left out of the sum. Not a divergence: negative where the student puts more mass on the
      k classes than the teacher.
    - ``"renorm_target"``: as ``"zero"``, with the teacher's k probabilities divided by their sum.
    - ``"renorm_both"``: both sides' k probabilities are divided by their sums. A divergence again, but one that tells
      the student nothing about the other classes.

    From logits x with q = softmax(x / T), the forward gradients are (q - p) / T in the k classes and q (1 - p_tail /
    q_tail) / T in the others (``"bucket"``), zero in the others (``"renorm_both"``). Log-probabilities and
    ``tail_log_prob`` are free variables, but for the tail that is made of them and for the renormalisation.

    Args:
        input: the student: float32, float64, bfloat16 or float16, with at least one class along ``dim``.
        indices: int64: the teacher's classes, in any order, none twice in a row; like ``input``, with k >= 1 in place
            of the size of ``dim``.
        log_probs: the teacher's log-probabilities of them, at the ``temperature`` of the loss; in the shape of
            ``indices``. A half type may meet another half type or float32; float64 meets only itself. An entry of -inf
            is padding, whatever its index.
        tail: see above.
        tail_log_prob: with ``"bucket"``, the logarithm of the teacher's mass outside ``indices``, in the shape of
            ``input`` without ``dim``. By default 1 - sum(exp(log_probs)), which has few digits left where the k classes
            hold nearly everything.
        direction: ``"forward"`` is KL(teacher || input), ``"reverse"`` is KL(input || teacher).
        space: what ``input`` holds.
        temperature: positive; divides logits, and logits only. Other than 1 it needs ``space="logits"``.
        dim: the class dimension of all three tensors. Each entry of the others is a row.
        row_weight: weights of the rows, bool or floating point >= 0, broadcastable to the shape of ``input`` without
            ``dim``. A constant. A row of weight 0 contributes exactly nothing, NaN and indices out of range included.
        reduction: ``"mean"`` is sum(w * l) / sum(w), ``"sum"`` is sum(w * l), ``"none"`` is w * l of each row, in the
            shape of ``input`` without ``dim``. ``"batchmean"`` is ``"mean"`` for at most one leading dimension and no
            weights. Where no row is kept, the result is 0.
        normalizer: a positive number, or a scalar tensor, that replaces the denominator of ``"mean"``. A constant.

    Returns:
        The loss: a scalar, or one value a row; float32 for half types, else in the type of the arguments.

    Raises:
        ValueError: naming the argument, what it was and what was expected. On the CPU also for indices that are out of
            range or twice in a row, and for log_probs whose mass is above 1 + 1e-3 (for half types, and what their
            rounding accounts for).

    Zeros and infinities.

    - A mass of the log_probs in (1, 1 + 1e-3] is no tail: p_tail = 0.
    - Where the student has no class outside ``indices`` of probability above 0, a mass in [1 - 1e-3, 1) is no tail
      either; less makes the forward value +inf.
    - The value is +inf where a > 0 = b: in the reverse direction also where q_tail > 0 = p_tail. Gradients are then
      those of :func:`kl_div`; log_probs that are renormalised, or made into a tail, get 0 in that row.
    - A term with a = 0 is 0, and so is its gradient. NaN in a row of weight above 0 gives NaN, and so does
      renormalising a row without entries.

    Example:

        >>> import torch, torch_divergence as td
        >>> teacher, student = torch.randn(8, 100), torch.randn(8, 100, requires_grad=True)
        >>> log_probs, indices = teacher.log_softmax(-1).topk(16)
        >>> loss = td.kl_div_topk(student, indices, log_probs)
        >>> bool(loss <= td.kl_div(student, teacher))
        True
        >>> loss.backward()
        >>> td.kl_div_topk(student, indices + 100, log_probs)
        Traceback (most recent call last):
            ...
        ValueError: ...
    """
    loss: Tensor = ops.kl_div_topk.default(
        input,
        indices,
        log_probs,
        tail=tail,
        tail_log_prob=tail_log_prob,
        direction=direction,
        space=space,
        temperature=temperature,
        dim=dim,
        row_weight=row_weight,
        reduction=reduction,
        normalizer=scalar_tensor(normalizer),
    )
    return loss
