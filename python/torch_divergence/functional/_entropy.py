from torch import Tensor

from torch_divergence.functional._common import Reduction, Space, ops, scalar_tensor


def entropy(
    input: Tensor,
    *,
    space: Space = "logits",
    temperature: float = 1.0,
    dim: int = -1,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""The Shannon entropy of discrete distributions, summed over ``dim`` and reduced over the rows.

    .. math:: H(P) = -\sum_j p_j \log p_j

    in nats (Shannon, "A Mathematical Theory of Communication", 1948). ``"logits"`` x stand for
    softmax(x / temperature). From logits the result is accurate however small it is: a row with nearly all of its mass
    on one class keeps the digits of the others.

    Differentiable to any order. From logits the gradient of a row is -p (log p + H) / T. Entries given as
    ``"log_probs"`` or ``"probs"`` are free variables, whose sum is not checked: the gradients are -p (log p + 1) and
    -(log p + 1).

    Args:
        input: float32, float64, bfloat16 or float16, with at least one class along ``dim``.
        space: what ``input`` holds.
        temperature: positive; divides logits, and must be 1 without them.
        dim: the class dimension. Each entry of the others is a row.
        row_weight: weights of the rows, bool or floating point >= 0, broadcastable to the shape of ``input`` without
            ``dim``. A constant. A row of weight 0 contributes exactly nothing, NaN and infinities included.
        reduction: ``"mean"`` is sum(w * h) / sum(w), ``"sum"`` is sum(w * h), ``"none"`` is w * h of each row, in the
            shape of ``input`` without ``dim``. ``"batchmean"`` is ``"mean"`` for at most one leading dimension and no
            weights. Where no row is kept, the result is 0.
        normalizer: a positive number, or a scalar tensor, that replaces the denominator of ``"mean"``. A constant.

    Returns:
        The entropy: a scalar, or one value a row; float32 for half types, else in the type of ``input``.

    Raises:
        ValueError: naming the argument, what it was and what was expected.

    Zeros and infinities. A class of probability 0 (a logit or log-probability of -inf) adds nothing and has gradient 0,
    from probabilities too, where the one-sided derivative is +inf. NaN in a row of weight above 0, a negative
    probability, or a row of -inf only gives NaN.

    Example:

        >>> import torch, torch_divergence as td
        >>> td.entropy(torch.zeros(3, 8), reduction="none")  # log 8
        tensor([2.0794, 2.0794, 2.0794])
        >>> policy = torch.randn(16, 4, requires_grad=True)
        >>> (-0.01 * td.entropy(policy)).backward()  # a bonus for exploration
        >>> td.entropy(torch.tensor([0.5, 0.5, 0.0]), space="probs")
        tensor(0.6931)
    """
    loss: Tensor = ops.entropy.default(
        input,
        space=space,
        temperature=temperature,
        dim=dim,
        row_weight=row_weight,
        reduction=reduction,
        normalizer=scalar_tensor(normalizer),
    )
    return loss
