from torch import Tensor

from torch_divergence.functional._common import Reduction, ops


def wasserstein_1d(
    u: Tensor,
    v: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    p: float = 1,
    dim: int = -1,
    reduction: Reduction = "none",
) -> Tensor:
    r"""The exact Wasserstein distance W_p\ :sup:`p` between distributions on the line, by sorting.

    .. math:: W_p^p = \int_0^m |Q_u(t) - Q_v(t)|^p \, dt

    where Q are the quantile functions of the points ``u`` and ``v`` along ``dim``, with weights ``a`` and ``b`` of sum
    m (Vallender, "Calculation of the Wasserstein distance between probability distributions on the line", 1974).

    All four tensors get gradients, to any order. Conventions where there is no derivative: \|d\|\ :sup:`p` has slope
    0 at d = 0; equal positions are matched in the order of their indices; where cumulative weights of both sides
    coincide, the weights' gradient is the mean of the two one-sided ones. Weights' gradients are defined up to a
    constant on either side, chosen such that <a, grad a> = <b, grad b>: only their differences count.

    Args:
        u: positions, N along ``dim``: float32, float64, bfloat16 or float16. Sums are accumulated in float64.
        v: positions, M along ``dim``; the other dimensions are those of ``u``. float64 meets only float64.
        a: weights of ``u``, not negative. None is uniform and sums to 1. Points of weight 0 change nothing, but must be
            finite.
        b: weights of ``v``, in every row of the same sum as ``a``: to 1e-10 relative in float64, else to 1e-5. Nothing
            is rescaled.
        p: the power of the distance, at least 1.
        dim: the dimension of the points. A tensor of one dimension has no other and is shared by all rows of the rest.
        reduction: ``"none"``, one value for each row; ``"mean"``, ``"sum"`` or ``"batchmean"``.

    Returns:
        W_p\ :sup:`p`, without a root, of each row or reduced: float64 for float64 arguments and else float32.

    Raises:
        ValueError: naming the argument, what it was and what was expected.

    Example:

        >>> import torch, torch_divergence as td
        >>> u = torch.tensor([3.0, 1.0, 2.0], requires_grad=True)
        >>> td.wasserstein_1d(u, torch.tensor([1.5, 2.5, 3.5]))
        tensor(0.5000, grad_fn=<Wasserstein1dBackward>)
        >>> td.wasserstein_1d(u, torch.tensor([0.0]), p=2).backward()
        >>> u.grad
        tensor([2.0000, 0.6667, 1.3333])
    """
    loss: Tensor = ops.wasserstein_1d.default(u, v, a, b, p=p, dim=dim, reduction=reduction)
    return loss
