import torch
from torch import Tensor

from torch_divergence import functional
from torch_divergence.functional import Cost, Reduction
from torch_divergence.functional._sinkhorn import Init, Relaxation


class SinkhornLoss(torch.nn.Module):
    """:func:`torch_divergence.sinkhorn_divergence` as a module: formula, conventions and errors are documented there.

    Weights ``a`` and ``b`` and the warm start ``init`` belong to a batch and are given to the call. There are no
    parameters and no buffers.

    Args:
        cost: ``"half_sqeuclidean"``, ``"sqeuclidean"``, ``"euclidean"`` or ``"cosine"``.
        eps: temperature in units of the cost, a number or a tensor () or (B,).
        blur: the same as a length; 0.05 if neither is given.
        rho: penalty of the marginals; None is hard.
        reach: the same as a length.
        debias: False gives OT(a, b).
        tol: on the marginal error.
        max_iter: iterations, annealing included.
        reduction: ``"mean"`` (default), ``"sum"``, ``"none"`` or ``"batchmean"`` over the batch.

    Shape:
        ``x`` (N, D) or (B, N, D), ``y`` (M, D) or (B, M, D), ``a`` (N,) or (B, N), ``b`` (M,) or (B, M); the result is
        a scalar, or (B,) with ``reduction="none"``.

    Example:

        >>> import torch, torch_divergence as td
        >>> criterion = td.SinkhornLoss(blur=0.1)
        >>> criterion
        SinkhornLoss(cost='half_sqeuclidean', blur=0.1, debias=True, tol=0.001, max_iter=1000, reduction='mean')
        >>> x = torch.rand(4, 20, 2, requires_grad=True)
        >>> criterion(x, torch.rand(30, 2)).backward()
        >>> x.grad.shape
        torch.Size([4, 20, 2])
    """

    def __init__(
        self,
        *,
        cost: Cost = "half_sqeuclidean",
        eps: float | Tensor | None = None,
        blur: float | None = None,
        rho: Relaxation = None,
        reach: Relaxation = None,
        debias: bool = True,
        tol: float = 1e-3,
        max_iter: int = 1000,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.cost = cost
        self.eps = eps
        self.blur = blur
        self.rho = rho
        self.reach = reach
        self.debias = debias
        self.tol = tol
        self.max_iter = max_iter
        self.reduction = reduction

    def forward(
        self, x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None, init: Init = None
    ) -> Tensor:
        return functional.sinkhorn_divergence(
            x,
            y,
            a,
            b,
            cost=self.cost,
            eps=self.eps,
            blur=self.blur,
            rho=self.rho,
            reach=self.reach,
            debias=self.debias,
            tol=self.tol,
            max_iter=self.max_iter,
            init=init,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        given = "".join(
            f"{name}={getattr(self, name)!r}, "
            for name in ("eps", "blur", "rho", "reach")
            if getattr(self, name) is not None
        )
        return (
            f"cost={self.cost!r}, {given}debias={self.debias}, tol={self.tol}, max_iter={self.max_iter}, "
            f"reduction={self.reduction!r}"
        )


class SinkhornCostLoss(torch.nn.Module):
    """:func:`torch_divergence.sinkhorn_cost` as a module: formula, conventions and errors are documented there.

    Args:
        eps: temperature in units of the cost, a number or a tensor () or (B,).
        rho: penalty of the marginals; None is hard.
        tol: on the marginal error.
        max_iter: iterations, annealing included.
        reduction: ``"none"`` (default), ``"mean"``, ``"sum"`` or ``"batchmean"`` over the batch.

    Shape:
        ``C`` (N, M) or (B, N, M), ``a`` (N,) or (B, N), ``b`` (M,) or (B, M); the result is (), or (B,).

    Example:

        >>> import torch, torch_divergence as td
        >>> criterion = td.SinkhornCostLoss(eps=0.1)
        >>> criterion
        SinkhornCostLoss(eps=0.1, tol=0.001, max_iter=1000, reduction='none')
        >>> criterion(torch.rand(3, 4, 5)).shape
        torch.Size([3])
    """

    def __init__(
        self,
        *,
        eps: float | Tensor,
        rho: Relaxation = None,
        tol: float = 1e-3,
        max_iter: int = 1000,
        reduction: Reduction = "none",
    ) -> None:
        super().__init__()
        self.eps = eps
        self.rho = rho
        self.tol = tol
        self.max_iter = max_iter
        self.reduction = reduction

    def forward(self, C: Tensor, a: Tensor | None = None, b: Tensor | None = None, init: Init = None) -> Tensor:
        return functional.sinkhorn_cost(
            C,
            a,
            b,
            eps=self.eps,
            rho=self.rho,
            tol=self.tol,
            max_iter=self.max_iter,
            init=init,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        rho = f"rho={self.rho!r}, " if self.rho is not None else ""
        return f"eps={self.eps}, {rho}tol={self.tol}, max_iter={self.max_iter}, reduction={self.reduction!r}"
