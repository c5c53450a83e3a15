from torch import Tensor

from torch_divergence.functional._common import ops


def wasserstein(x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None, *, p: float = 1) -> Tensor:
    r"""The exact Wasserstein distance W_p\ :sup:`p` between weighted points in any dimension.

    .. math:: W_p^p = \min_{w \ge 0} \sum_{ij} w_{ij} \|x_i - y_j\|^p, \quad \sum_j w_{ij} = a_i, \sum_i w_{ij} = b_j

    (Kantorovich, "On the translocation of masses", 1942; Peyré and Cuturi, "Computational Optimal Transport", 2019,
    chapter 3), solved by the network simplex method (Dantzig, 1951). It is for a few thousand points a side: costs of
    N M float64 are held, and time grows somewhat faster than N M. Runs on the CPU.

    The gradients are those of the optimal plan w for the points and of its dual potentials for the weights; where the
    potentials are not unique, of one of the optimal pairs. Second and higher derivatives are those of the loss on the
    optimal tree, on which the plan stays as the points move. Potentials are defined up to (+k, -k) and
    come out with <a, f> = <b, g>: only differences of the weights' gradients count. Points that coincide have
    derivatives 0.

    Args:
        x: (N, D) or (B, N, D): float32, float64, bfloat16 or float16. Everything is computed in float64.
        y: (M, D) or (B, M, D). float64 meets only float64, in all arguments.
        a: the weights of x, (N) or (B, N), not negative. None is uniform and sums to 1. Points of weight 0 change
            nothing, but must be finite.
        b: the weights of y, (M) or (B, M), of the same sum as a: to 1e-10 relative in float64, else to 1e-5. Nothing
            is rescaled.
        p: the power of the Euclidean distance, at least 1.

    An argument without the batch dimension is shared by the batch.

    Returns:
        W_p\ :sup:`p`, without a root: () or (B), float64 for float64 arguments and else float32.

    Raises:
        ValueError: naming the argument, what it was and what was expected.

    Example:

        >>> import torch, torch_divergence as td
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]], requires_grad=True)
        >>> td.wasserstein(x, x.detach() + torch.tensor([3.0, 4.0]))  # a translation
        tensor(5., grad_fn=<ToCopyBackward0>)
        >>> td.wasserstein(x, torch.tensor([[1.0, 2.0]]), p=2).backward()  # all mass goes to one point
        >>> x.grad
        tensor([[-1., -2.],
                [ 0., -2.]])
    """
    loss: Tensor = ops.wasserstein.default(x, y, a, b, p=p)
    return loss
