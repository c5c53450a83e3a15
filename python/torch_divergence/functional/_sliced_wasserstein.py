import torch
from torch import Tensor

from torch_divergence.functional._common import Reduction, ops


def sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    p: float = 2,
    n_projections: int = 128,
    projections: Tensor | None = None,
    generator: torch.Generator | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    r"""The sliced Wasserstein distance SW_p\ :sup:`p` between weighted points: a mean over projections to lines.

    .. math:: SW_p^p = \frac{1}{L} \sum_{l=1}^{L} W_p^p(\langle \theta_l, x \rangle, \langle \theta_l, y \rangle)

    (Rabin, Peyré, Delon and Bernot, "Wasserstein Barycenter and Its Application to Texture Mixing", 2011). Conventions,
    of weights and of derivatives, are those of :func:`wasserstein_1d`; given projections get gradients too.

    Args:
        x: (N, D) or (B, N, D): float32, float64, bfloat16 or float16. Half types are projected in float32.
        y: (M, D) or (B, M, D). float64 meets only float64, in all arguments.
        a: the weights of x, (N) or (B, N), not negative. None is uniform and sums to 1.
        b: the weights of y, (M) or (B, M), of the same sum as a.
        p: the power of the distance, at least 1.
        n_projections: how many directions to draw, evenly on the sphere.
        projections: (L, D): the directions themselves, taken as they are, shared by the batch. Nothing is drawn then.
        generator: what the directions are drawn with; the same state gives the same directions. None: torch's own.
        reduction: ``"none"``, one value for each sample of the batch; ``"mean"``, ``"sum"`` or ``"batchmean"``.

    An argument without the batch dimension is shared by the batch.

    Returns:
        SW_p\ :sup:`p`, without a root: () or (B), or reduced; float64 for float64 arguments and else float32.

    Raises:
        ValueError: naming the argument, what it was and what was expected.

    Example:

        >>> import torch, torch_divergence as td
        >>> x, axes = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.eye(2)
        >>> td.sliced_wasserstein(x, x + torch.tensor([1.0, 3.0]), projections=axes)  # (1^2 + 3^2) / 2
        tensor(5.)
        >>> generator = torch.Generator().manual_seed(0)
        >>> td.sliced_wasserstein(torch.randn(4, 10, 3), torch.randn(4, 12, 3), generator=generator).shape
        torch.Size([4])
    """
    loss: Tensor = ops.sliced_wasserstein.default(
        x,
        y,
        a,
        b,
        p=p,
        n_projections=n_projections,
        projections=projections,
        generator=generator,
        reduction=reduction,
    )
    return loss
