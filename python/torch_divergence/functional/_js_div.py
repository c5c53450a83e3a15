from torch import Tensor

from torch_divergence.functional._common import Reduction, Space, ops, scalar_tensor


def js_div(
    input: Tensor,
    target: Tensor,
    *,
    beta: float = 0.5,
    scaled: bool = False,
    inplace_grad: bool = False,
    space: Space = "logits",
    target_space: Space | None = None,
    temperature: float = 1.0,
    dim: int = -1,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""The Jensen-Shannon divergence of discrete distributions, summed over ``dim`` and reduced over the rows.

    .. math:: JS_\beta(P, Q) = \beta KL(P \| M) + (1 - \beta) KL(Q \| M), \quad M = \beta P + (1 - \beta) Q

    with P = ``target`` and Q = ``input`` (Lin, "Divergence Measures Based on the Shannon Entropy", 1991; as a loss of
    distillation, Agarwal et al., "On-Policy Distillation of Language Models", 2024). It is finite for any two
    distributions, at most H(beta) = -beta log(beta) - (1 - beta) log(1 - beta), which disjoint ones reach: log 2 at
    beta = 1/2, where it is symmetric. Swapping the sides and beta with 1 - beta changes nothing.

    As beta tends to 0 or 1 the divergence vanishes. ``scaled=True`` divides it by beta (1 - beta), and is then
    continuous: KL(target || input) at 0, 4 JS at 1/2, KL(input || target) at 1. At the ends it is :func:`kl_div`.

    A side given as ``"logits"`` x stands for softmax(x / temperature). From logits the result is accurate however
    close the two distributions are, and never negative. Entries given as ``"log_probs"`` or ``"probs"`` are rounded
    already, so prefer logits where you have them.

    Both tensors get gradients, to any order, and only those that are needed are computed. With sigma = log(p / m) and
    rho = log(q / m), from logits the gradients of a row are (1 - beta) q (rho - E_q[rho]) / T for ``input`` and
    beta p (sigma - E_p[sigma]) / T for ``target``. Entries given as ``"log_probs"`` or ``"probs"`` are free variables:
    their sum is not checked, their gradients are not projected ((1 - beta) q rho and (1 - beta) rho for ``input``), and
    the formula has no mass terms.

    Args:
        input: the prediction: float32, float64, bfloat16 or float16, with at least one class along ``dim``.
        target: as ``input``, of the same shape (nothing is broadcast; ``expand`` costs nothing) and on the same device.
            A half type may meet another half type or float32; float64 meets only itself.
        beta: the weight of ``target`` in the mixture M, in [0, 1]; 0 and 1 need ``scaled=True``.
        scaled: divides by beta (1 - beta).
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
        normalizer: a positive number, or a scalar tensor, that replaces the denominator of ``"mean"``. A constant.

    Returns:
        The loss: a scalar, or one value a row; float32 for half types, else in the type of the arguments.

    Raises:
        ValueError: naming the argument, what it was and what was expected.

    Zeros and infinities, for 0 < beta < 1 (:func:`kl_div` says what holds at the ends). A logit or log-probability of
    -inf is a class of probability 0.

    - p = q = 0: the class is as if it were not there; both gradients are 0.
    - p = 0 < q: the term is (1 - beta) q log(1 / (1 - beta)); q = 0 < p: it is beta p log(1 / beta).
    - The gradient of a side is 0 where its probability is 0, from probabilities too, where the one-sided derivative is
      -inf.
    - NaN in a row of weight above 0, a negative probability, or a row of -inf only gives NaN.

    Example:

        >>> import torch, torch_divergence as td
        >>> teacher, student = torch.randn(8, 10), torch.randn(8, 10, requires_grad=True)
        >>> td.js_div(student, teacher).backward()
        >>> p, q = teacher.softmax(-1), student.softmax(-1)
        >>> rho = (q / ((p + q) / 2)).log()
        >>> torch.allclose(student.grad, q * (rho - (q * rho).sum(-1, keepdim=True)) / (2 * 8), atol=1e-6)
        True
        >>> disjoint = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> td.js_div(*disjoint, space="probs")
        tensor(0.6931)
        >>> torch.equal(td.js_div(student, teacher, beta=0.0, scaled=True), td.kl_div(student, teacher))
        True
        >>> td.js_div(student, teacher, beta=1.5)
        Traceback (most recent call last):
            ...
        ValueError: ...
    """
    op = ops.js_div_inplace_grad if inplace_grad else ops.js_div
    loss: Tensor = op.default(
        input,
        target,
        beta=beta,
        scaled=scaled,
        space=space,
        target_space=target_space,
        temperature=temperature,
        dim=dim,
        row_weight=row_weight,
        reduction=reduction,
        normalizer=scalar_tensor(normalizer),
    )
    return loss
