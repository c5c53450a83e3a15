from torch import Tensor

from torch_divergence.functional._common import Reduction, Space, ops, scalar_tensor


def cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    target_space: Space | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    inplace_grad: bool = False,
    space: Space = "logits",
    temperature: float = 1.0,
    dim: int = -1,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""The cross-entropy of class labels or distributions, summed over ``dim`` and reduced over the rows.

    .. math:: H(P', Q) = -\sum_j p'_j \log q_j, \qquad P' = (1 - s) P + s / K

    with Q = ``input``, P = ``target``, s = ``label_smoothing`` and K classes; for s = 0 it is H(P) + KL(P || Q). A
    target of an integer dtype holds one class index a row: P is then 1 at that class. ``"logits"`` x stand for
    softmax(x / temperature). Label smoothing is that of Szegedy et al., "Rethinking the Inception Architecture for
    Computer Vision", 2016, and of :func:`torch.nn.functional.cross_entropy`. From logits the result is accurate however
    small it is: at a loss of 1e-12 too, and in its gradient.

    Differentiable to any order in ``input``, and in a ``target`` that is a distribution; only gradients that are needed
    are computed. From logits the gradient is (q sum(p') - p') / T for ``input`` and (1 - s) p (N - log q) / T with
    N = sum(p log q) for ``target``. Entries given as ``"log_probs"`` or ``"probs"`` are free variables: their sum is
    not checked and their gradients are not projected.

    Args:
        input: the prediction: float32, float64, bfloat16 or float16, with at least one class along ``dim``.
        target: class indices of any integer dtype, in the shape of ``input`` without ``dim``; or distributions, of the
            shape of ``input`` (nothing is broadcast). A half type may meet another half type or float32; float64 meets
            only itself.
        target_space: what a ``target`` of distributions holds: ``"probs"`` unless told otherwise. Refused for class
            indices.
        label_smoothing: how much of the target is spread over all classes, from 0 to 1.
        ignore_index: rows of this class index have weight 0, whatever ``input`` holds there. For class indices only.
        inplace_grad: backward overwrites the storage of ``input`` with its gradient, which saves a tensor as large as
            the logits. ``input`` must then be dense, require grad, not be a leaf and share no storage with a target
            that does not require grad, and the loss must be reduced. A second backward, ``create_graph``, forward-mode
            differentiation, ``torch.func`` and ``torch.compile`` raise.
        space: what ``input`` holds.
        temperature: positive; divides logits, and logits only. Other than 1 it needs a side in logits.
        dim: the class dimension. Each entry of the others is a row. (:func:`torch.nn.functional.cross_entropy` has its
            classes in dimension 1.)
        row_weight: weights of the rows, bool or floating point >= 0, broadcastable to the shape of ``input`` without
            ``dim``. A constant. A row of weight 0 contributes exactly nothing: NaN, infinities and labels out of range
            included.
        reduction: ``"mean"`` is sum(w * l) / sum(w), ``"sum"`` is sum(w * l), ``"none"`` is w * l of each row, in the
            shape of ``input`` without ``dim``. ``"batchmean"`` is ``"mean"`` for at most one leading dimension and no
            weights. Where no row is kept, the result is 0 (PyTorch's is NaN).
        normalizer: a positive number, or a scalar tensor, that replaces the denominator of ``"mean"``: the number of
            rows of all processes, or of all steps of an accumulated gradient. A constant.

    Returns:
        The loss: a scalar, or one value a row; float32 for half types, else in the type of the arguments.

    Raises:
        ValueError: naming the argument, what it was and what was expected. A label out of range is found when the
            values are at hand, so not while compiling or exporting.

    Zeros and infinities. A logit or log-probability of -inf is a class of probability 0.

    - p' = 0: the term is 0, whatever q; so is the gradient of ``input``.
    - q = 0 < p': the value is +inf, with label smoothing for every class of q = 0. From logits the gradient of
      ``input`` is still q - p', and that of a target in logits is 0 for such a row; the gradient of ``input`` is -p'
      from log-probabilities and -inf from probabilities.
    - p = q = 0: as if the class were not there; both gradients are 0.
    - NaN in a row of weight above 0, a negative probability, or a row of -inf only gives NaN.

    Example:

        >>> import torch, torch_divergence as td
        >>> logits, labels = torch.randn(8, 10, requires_grad=True), torch.randint(10, (8,))
        >>> td.cross_entropy(logits, labels).backward()
        >>> expected = (logits.softmax(-1) - torch.nn.functional.one_hot(labels, 10)) / 8
        >>> torch.allclose(logits.grad, expected, atol=1e-6)
        True
        >>> teacher = torch.randn(8, 10).softmax(-1)
        >>> td.cross_entropy(logits, teacher, label_smoothing=0.1, reduction="none").shape
        torch.Size([8])
        >>> td.cross_entropy(torch.tensor([[30.0, 0.0]]), torch.tensor([0]))  # 1 - q would be 0 in float32
        tensor(9.3576e-14)
        >>> td.cross_entropy(logits, labels + 10)
        Traceback (most recent call last):
            ...
        ValueError: ...
    """
    op = ops.cross_entropy_inplace_grad if inplace_grad else ops.cross_entropy
    loss: Tensor = op.default(
        input,
        target,
        target_space=target_space,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        space=space,
        temperature=temperature,
        dim=dim,
        row_weight=row_weight,
        reduction=reduction,
        normalizer=scalar_tensor(normalizer),
    )
    return loss
