from torch import Tensor

from torch_divergence.functional._common import Direction, Reduction, Space, ops, scalar_tensor


def kl_div(
    input: Tensor,
    target: Tensor,
    *,
    direction: Direction = "forward",
    inplace_grad: bool = False,
    space: Space = "logits",
    target_space: Space | None = None,
    temperature: float = 1.0,
    dim: int = -1,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""The Kullback-Leibler divergence between discrete distributions, summed over ``dim`` and reduced over the rows.

    .. math:: KL(P \| Q) = \sum_j p_j (\log p_j - \log q_j)

    with P = ``target`` and Q = ``input`` in the forward direction, P = ``input`` and Q = ``target`` in the reverse one
    (Kullback and Leibler, "On Information and Sufficiency", 1951). A side given as ``"logits"`` x stands for
    softmax(x / temperature), as in Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015;
    their factor temperature\ :sup:`2` is left to the caller. From logits the result is accurate however close the two
    distributions are, and never negative. Entries given as ``"log_probs"`` or ``"probs"`` are rounded already, so
    prefer logits where you have them.

    Both tensors get gradients, to any order, and only those that are needed are computed. From logits the gradients of
    a row are (q - p) / T for Q's logits and p (log(p / q) - KL) / T for P's. Entries given as ``"log_probs"`` or
    ``"probs"`` are free variables: their sum is not checked, their gradients are not projected, and the formula has no
    mass terms.

    Args:
        input: the prediction: float32, float64, bfloat16 or float16, with at least one class along ``dim``.
        target: as ``input``, of the same shape (nothing is broadcast; ``expand`` costs nothing) and on the same device.
            A half type may meet another half type or float32; float64 meets only itself.
        direction: ``"forward"`` is KL(target || input), which covers every mode of the target; ``"reverse"`` is
            KL(input || target), which seeks one.
        inplace_grad: backward overwrites the storage of ``input`` with its gradient, which saves a tensor as large as
            the logits. ``input`` must then be dense, require grad, not be a leaf and share no storage with a target
            that does not require grad, and the loss must be reduced. A second backward, ``create_graph``, forward-mode
            differentiation, ``torch.func`` and ``torch.compile`` raise.
        space: what ``input`` holds, and ``target`` too unless ``target_space`` is given.
        target_space: what ``target`` holds, where it differs.
        temperature: positive; divides logits, and logits only. Other than 1 it needs a side in logits.
        dim: the class dimension. Each entry of the others is a row.
        row_weight: weights of the rows, bool or floating point >= 0, broadcastable to the shape of ``input`` without
            ``dim``. A constant. A row of weight 0 contributes exactly nothing, NaN and infinities included.
        reduction: ``"mean"`` is sum(w * l) / sum(w), ``"sum"`` is sum(w * l), ``"none"`` is w * l of each row, in the
            shape of ``input`` without ``dim``. ``"batchmean"`` is ``"mean"`` for at most one leading dimension and no
            weights. Where no row is kept, the result is 0.
        normalizer: a positive number, or a scalar tensor, that replaces the denominator of ``"mean"``: the number of
            rows of all processes, or of all steps of an accumulated gradient. A constant.

    Returns:
        The loss: a scalar, or one value a row; float32 for half types, else in the type of the arguments.

    Raises:
        ValueError: naming the argument, what it was and what was expected.

    Zeros and infinities. A logit or log-probability of -inf is a class of probability 0.

    - p = q = 0: the class is as if it were not there; both gradients are 0.
    - p = 0 < q: the term is 0, and so is P's gradient.
    - q = 0 < p: the value is +inf. From logits Q's gradient is still (q - p) / T, and P's is 0 for that row; Q's is -p
      from log-probabilities and -inf from probabilities.
    - NaN in a row of weight above 0, a negative probability, or a row of -inf only gives NaN.

    Example:

        >>> import torch, torch_divergence as td
        >>> teacher, student = torch.randn(8, 10), torch.randn(8, 10, requires_grad=True)
        >>> td.kl_div(student, teacher, temperature=2.0).backward()
        >>> expected = ((student / 2).softmax(-1) - (teacher / 2).softmax(-1)) / (2 * 8)
        >>> torch.allclose(student.grad, expected, atol=1e-6)
        True
        >>> td.kl_div(student, teacher.softmax(-1), target_space="probs", reduction="none").shape
        torch.Size([8])
        >>> td.kl_div(teacher, teacher, direction="reverse")
        tensor(0.)
        >>> td.kl_div(student, teacher, reduction="batch")
        Traceback (most recent call last):
            ...
        ValueError: ...
    """
    op = ops.kl_div_inplace_grad if inplace_grad else ops.kl_div
    loss: Tensor = op.default(
        input,
        target,
        direction=direction,
        space=space,
        target_space=target_space,
        temperature=temperature,
        dim=dim,
        row_weight=row_weight,
        reduction=reduction,
        normalizer=scalar_tensor(normalizer),
    )
    return loss
