"""Entropic optimal transport: functions over the operators, and the result that they return."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, overload

from torch import Tensor
from typing_extensions import Required, TypedDict, Unpack

from torch_divergence.functional._common import Reduction, ops, scalar_tensor

Cost = Literal["half_sqeuclidean", "sqeuclidean", "euclidean", "cosine"]
#: One number for both sides, or a pair (x's, y's); None is a hard marginal.
Relaxation = float | tuple[float | None, float | None] | None

#: Where a solve may start from; a tensor is taken as g.
Init: TypeAlias = "SinkhornInfo | SinkhornResult | Tensor | None"

_INF = float("inf")


class SinkhornInfo(NamedTuple):
    """What a solve leaves besides its value. Constants: nothing here is differentiable.

    Attributes:
        f: potential of x, or of the rows of C; float32 or float64, in the shape of its weights.
        g: potential of y, or of the columns of C.
        f_aa: potential of the self term OT(a, a); None without debiasing.
        g_bb: potential of the self term OT(b, b); None without debiasing.
        marginal_error: the largest of all problems solved for the value.
        n_iter: iterations spent on OT(a, b), annealing included.
        converged: whether every marginal error is below ``tol``, or below what rounding allows.
    """

    f: Tensor
    g: Tensor
    f_aa: Tensor | None
    g_bb: Tensor | None
    marginal_error: Tensor
    n_iter: Tensor
    converged: Tensor


def _pair(value: Relaxation) -> list[float]:
    if value is None:
        return []
    sides: Sequence[float | None] = value if isinstance(value, (tuple, list)) else (value, value)
    return [_INF if v is None else float(v) for v in sides]


def _init(name: str, init: Init) -> dict[str, Tensor | None]:
    """The potentials of an earlier result or info; a tensor is taken as g."""
    if not isinstance(init, (SinkhornInfo, SinkhornResult, Tensor, type(None))):
        raise ValueError(f"{name}: init is {init!r}, expected a SinkhornInfo, a SinkhornResult or a tensor")
    if init is None:
        return {}
    if isinstance(init, Tensor):
        return {"init_g": init}
    return {
        "init_g": init.g,
        "init_f_aa": getattr(init, "f_aa", None),
        "init_g_bb": getattr(init, "g_bb", None),
    }


@dataclass(frozen=True)
class SinkhornResult:
    r"""The solution of OT(a, b), as :func:`torch_divergence.sinkhorn` returns it.

    The plan is :math:`P_{ij} = a_i b_j \exp((f_i + g_j - C_{ij}) / \varepsilon)`.

    Attributes:
        value: the dual value, () or (B,); twice differentiable.
        f: potential of x, (N,) or (B, N); differentiable, once, by the implicit function theorem.
        g: potential of y, (M,) or (B, M); as f.
        marginal_error: max over both sides of the L1 distance of the plan's marginal from the one aimed at, over its
            mass; of exactly these potentials.
        n_iter: iterations of both potentials, annealing included.
        converged: whether marginal_error is below ``tol``, or below what rounding allows.
    """

    value: Tensor
    f: Tensor
    g: Tensor
    marginal_error: Tensor
    n_iter: Tensor
    converged: Tensor
    _points: tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # x, y, a, b
    _options: dict[str, Any]

    def _solved(self) -> tuple[Any, ...]:
        return *self._points, self.f, self.g

    def plan(self) -> Tensor:
        """The plan P, (N, M) or (B, N, M): memory for every pair. Differentiable.

        >>> import torch, torch_divergence as td
        >>> _ = torch.manual_seed(0)
        >>> result = td.sinkhorn(torch.randn(4, 2), torch.randn(5, 2), eps=0.5, tol=1e-6)
        >>> torch.allclose(result.plan().sum(), torch.tensor(1.0), atol=1e-5)
        True
        """
        plan: Tensor = ops.sinkhorn_plan.default(*self._solved(), **self._options)
        return plan

    def apply(self, v: Tensor, transpose: bool = False) -> Tensor:
        """P v, or P' v with ``transpose``, without the plan in memory. Once differentiable.

        Args:
            v: (M,) or (M, K), with ``transpose`` (N,) or (N, K); with a batch dimension in front in a batched result.
            transpose: multiply by the transposed plan.

        Returns:
            (N,) or (N, K), with ``transpose`` (M,) or (M, K), batched as the result.

        >>> import torch, torch_divergence as td
        >>> _ = torch.manual_seed(0)
        >>> result = td.sinkhorn(torch.randn(4, 2), torch.randn(5, 2), eps=0.5, tol=1e-6)
        >>> torch.allclose(result.apply(torch.ones(5)), torch.full((4,), 0.25), atol=1e-5)
        True
        """
        product: Tensor = ops.sinkhorn_apply.default(v, *self._solved(), **self._options, transpose=transpose)
        return product

    def barycentric_projection(self) -> Tensor:
        r"""Where the plan sends each x: :math:`\sum_j P_{ij} y_j / \sum_j P_{ij}`, shaped as x. Once differentiable.

        It exists where the plan underflows and for an x of weight 0: :math:`P_{ij} / \sum_j P_{ij}` depends on b and g.

        >>> import torch, torch_divergence as td
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(4, 2)
        >>> td.sinkhorn(x, x + 1, eps=1e-3).barycentric_projection().sub(x).mean(0).round(decimals=2)
        tensor([1., 1.])
        """
        image: Tensor = ops.sinkhorn_barycentric_projection.default(*self._solved(), **self._options)
        return image

    @property
    def transport_cost(self) -> Tensor:
        """<P, C>, () or (B,), detached: as a loss it would need the derivative of P."""
        cost: Tensor = ops.sinkhorn_transport_cost.default(*self._solved(), **self._options)
        return cost


WithInfo: TypeAlias = tuple[Tensor, SinkhornInfo]


class _CostOptions(TypedDict, total=False):
    rho: Relaxation
    tol: float
    max_iter: int
    init: Init
    reduction: Reduction


class _MatrixOptions(_CostOptions):
    eps: Required[float | Tensor]


class _DivergenceOptions(_CostOptions, total=False):
    cost: Cost
    eps: float | Tensor | None
    blur: float | None
    reach: Relaxation
    debias: bool


def sinkhorn(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    cost: Cost = "half_sqeuclidean",
    eps: float | Tensor | None = None,
    blur: float | None = None,
    rho: Relaxation = None,
    reach: Relaxation = None,
    tol: float = 1e-3,
    max_iter: int = 1000,
    init: Init = None,
) -> SinkhornResult:
    r"""Entropic optimal transport between weighted point clouds, with potentials and plan.

    .. math:: OT(a, b) = \min_P \langle P, C \rangle + \varepsilon KL(P \| a \otimes b)
        + \rho_a KL(P 1 \| a) + \rho_b KL(P^T 1 \| b)

    (Cuturi, "Sinkhorn Distances", 2013; with relaxed marginals Chizat et al., "Scaling Algorithms for Unbalanced
    Optimal Transport Problems", 2018). The value is the dual's at the potentials returned, whose error is the square of
    the plan's. Arguments, conventions and errors are those of :func:`torch_divergence.sinkhorn_divergence`, which
    removes the entropic bias; this is not zero at x = y. ``rho`` and ``reach`` may differ between the sides.

    Balanced potentials are defined up to (+k, -k): those returned have <a, f> = <b, g>.

    Returns:
        A :class:`SinkhornResult`: value, f, g, plan(), apply(), barycentric_projection(), transport_cost,
        marginal_error, n_iter, converged.

    Example:

        >>> import torch, torch_divergence as td
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.rand(6, 3, requires_grad=True), torch.rand(7, 3)
        >>> result = td.sinkhorn(x, y, eps=0.5)
        >>> result.value.backward()
        >>> x.grad.shape, bool(result.converged)
        (torch.Size([6, 3]), True)
    """
    options = {"cost": cost, "eps": scalar_tensor(eps), "blur": blur}
    value, f, g, marginal_error, n_iter, converged = ops.sinkhorn.default(
        x,
        y,
        a,
        b,
        **options,
        rho=_pair(rho),
        reach=_pair(reach),
        tol=tol,
        max_iter=max_iter,
        init_g=_init("sinkhorn", init).get("init_g"),
    )
    return SinkhornResult(value, f, g, marginal_error, n_iter, converged, (x, y, a, b), options)


@overload
def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    return_info: Literal[False] = False,
    **options: Unpack[_DivergenceOptions],
) -> Tensor: ...
@overload
def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    return_info: Literal[True],
    **options: Unpack[_DivergenceOptions],
) -> WithInfo: ...
@overload
def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    return_info: bool,
    **options: Unpack[_DivergenceOptions],
) -> Tensor | WithInfo: ...
def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    cost: Cost = "half_sqeuclidean",
    eps: float | Tensor | None = None,
    blur: float | None = None,
    rho: Relaxation = None,
    reach: Relaxation = None,
    debias: bool = True,
    tol: float = 1e-3,
    max_iter: int = 1000,
    init: Init = None,
    reduction: Reduction = "none",
    return_info: bool = False,
) -> Tensor | WithInfo:
    r"""The Sinkhorn divergence between weighted point clouds.

    .. math:: S(a, b) = OT(a, b) - \tfrac12 OT(a, a) - \tfrac12 OT(b, b) + \tfrac{\varepsilon}{2} (m_a - m_b)^2

    with OT as in :func:`torch_divergence.sinkhorn` and m the masses (Feydy et al., "Interpolating between Optimal
    Transport and MMD using Sinkhorn Divergences", 2019; Sejourne et al., "Sinkhorn Divergences for Unbalanced Optimal
    Transport", 2019). It is 0 at equal clouds, positive elsewhere, and costs O(N + M) memory: pairs are visited, never
    stored.

    Args:
        x: (N, D) or (B, N, D): float32, float64, bfloat16 or float16.
        y: (M, D) or (B, M, D). An input without the batch dimension is shared by the batch.
        a: weights >= 0 of x, (N,) or (B, N); None is uniform and sums to 1. A point of weight 0 changes nothing.
        b: weights of y. With hard marginals the masses must agree (1e-5 relative in float32, 1e-10 in float64).
        cost: ``"half_sqeuclidean"`` \|x-y\|^2/2, ``"sqeuclidean"`` \|x-y\|^2, ``"euclidean"`` \|x-y\| (derivative 0 at
            coincident points), ``"cosine"`` 1 - cos (1 with derivative 0 at a zero vector).
        eps: temperature in units of the cost: a number, or a tensor () or (B,), which is then differentiable.
        blur: the same as a length: eps is blur^2, 2 blur^2 for sqeuclidean, blur for euclidean. Default 0.05.
        rho: penalty of the marginals; None is hard; with debiasing one number for both sides.
        reach: the same as a length, mapped as blur.
        debias: False gives OT(a, b).
        tol: on the L1 marginal error relative to the mass; 1e-2 is the fast setting. The self terms are solved ten
            times tighter. 0 runs exactly max_iter iterations; one below what rounding allows is replaced by that.
        max_iter: iterations of both potentials, annealing included. Reaching it warns once and never raises.
        init: an earlier info, or result: its potentials are started from. A tensor is taken as g.
        reduction: ``"none"`` is one value a problem, ``"mean"``, ``"sum"`` or ``"batchmean"`` one of the batch.
        return_info: return (value, :class:`SinkhornInfo`).

    Returns:
        (), or (B,): float32 for half types, else in the type of the arguments. Twice differentiable in x, y, a, b and
        eps, by the envelope and implicit function theorems: nothing is unrolled. Balanced, gradients of the weights
        are defined up to a constant.

    Raises:
        ValueError: naming the argument, what it was and what was expected.

    Example:

        >>> import torch, torch_divergence as td
        >>> _ = torch.manual_seed(0)
        >>> x = torch.rand(50, 3)
        >>> value = td.sinkhorn_divergence(x, x + torch.tensor([1.0, 0.0, 0.0]), blur=0.5, tol=1e-5)
        >>> torch.allclose(value, torch.tensor(0.5), atol=1e-3)  # a translation by t: |t|^2/2
        True
        >>> td.sinkhorn_divergence(torch.rand(4, 10, 2), torch.rand(12, 2)).shape
        torch.Size([4])
        >>> td.sinkhorn_divergence(x, x, eps=0.1, blur=0.1)
        Traceback (most recent call last):
            ...
        ValueError: ...
    """
    return _divergence(
        x,
        y,
        a,
        b,
        cost=cost,
        eps=scalar_tensor(eps),
        blur=blur,
        rho=_pair(rho),
        reach=_pair(reach),
        debias=debias,
        tol=tol,
        max_iter=max_iter,
        reduction=reduction,
        return_info=return_info,
        **_init("sinkhorn_divergence", init),
    )


def _divergence(*args: Any, return_info: bool, **options: Any) -> Tensor | WithInfo:
    value: Tensor
    value, f, g, f_aa, g_bb, *counters = ops.sinkhorn_divergence.default(*args, **options)
    if not return_info:
        return value
    if not options["debias"]:
        f_aa = g_bb = None
    return value, SinkhornInfo(f, g, f_aa, g_bb, *counters)


@overload
def sinkhorn_ragged(
    x: Tensor,
    x_offsets: Tensor,
    y: Tensor,
    y_offsets: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    return_info: Literal[False] = False,
    **options: Unpack[_DivergenceOptions],
) -> Tensor: ...
@overload
def sinkhorn_ragged(
    x: Tensor,
    x_offsets: Tensor,
    y: Tensor,
    y_offsets: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    return_info: Literal[True],
    **options: Unpack[_DivergenceOptions],
) -> WithInfo: ...
@overload
def sinkhorn_ragged(
    x: Tensor,
    x_offsets: Tensor,
    y: Tensor,
    y_offsets: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    return_info: bool,
    **options: Unpack[_DivergenceOptions],
) -> Tensor | WithInfo: ...
def sinkhorn_ragged(
    x: Tensor,
    x_offsets: Tensor,
    y: Tensor,
    y_offsets: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    cost: Cost = "half_sqeuclidean",
    eps: float | Tensor | None = None,
    blur: float | None = None,
    rho: Relaxation = None,
    reach: Relaxation = None,
    debias: bool = True,
    tol: float = 1e-3,
    max_iter: int = 1000,
    init: Init = None,
    reduction: Reduction = "none",
    return_info: bool = False,
) -> Tensor | WithInfo:
    """:func:`torch_divergence.sinkhorn_divergence` of clouds of different sizes, without padding.

    Args:
        x: the clouds one after another, (sum of N, D).
        x_offsets: int64, (B + 1,): cloud k is ``x[x_offsets[k]:x_offsets[k + 1]]``, never empty.
        y: as x, (sum of M, D).
        y_offsets: as x_offsets, for y.
        a: weights of all points of x, (sum of N,); None is uniform in each cloud.
        b: as a, for y.

    The other arguments, and the errors, are those of ``sinkhorn_divergence``.

    Returns:
        (B,): what a loop over the clouds would give. Twice differentiable as ``sinkhorn_divergence``; forward mode and
        ``torch.func.vmap`` are not offered.

    Example:

        >>> import torch, torch_divergence as td
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.rand(7, 2), torch.rand(9, 2)
        >>> both = td.sinkhorn_ragged(x, torch.tensor([0, 3, 7]), y, torch.tensor([0, 4, 9]))
        >>> torch.equal(both[1], td.sinkhorn_divergence(x[3:], y[4:]))
        True
    """
    return _divergence(
        x,
        y,
        a,
        b,
        cost=cost,
        eps=scalar_tensor(eps),
        blur=blur,
        rho=_pair(rho),
        reach=_pair(reach),
        debias=debias,
        tol=tol,
        max_iter=max_iter,
        x_offsets=x_offsets,
        y_offsets=y_offsets,
        reduction=reduction,
        return_info=return_info,
        **_init("sinkhorn_ragged", init),
    )


@overload
def sinkhorn_cost(
    C: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    return_info: Literal[False] = False,
    **options: Unpack[_MatrixOptions],
) -> Tensor: ...
@overload
def sinkhorn_cost(
    C: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    return_info: Literal[True],
    **options: Unpack[_MatrixOptions],
) -> WithInfo: ...
@overload
def sinkhorn_cost(
    C: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    return_info: bool,
    **options: Unpack[_MatrixOptions],
) -> Tensor | WithInfo: ...
def sinkhorn_cost(
    C: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    eps: float | Tensor,
    rho: Relaxation = None,
    tol: float = 1e-3,
    max_iter: int = 1000,
    init: Init = None,
    reduction: Reduction = "none",
    return_info: bool = False,
) -> Tensor | WithInfo:
    """Entropic optimal transport OT(a, b) for a given cost matrix, any real numbers.

    The formula, a, b, eps, rho, tol, max_iter, init and the errors are those of :func:`torch_divergence.sinkhorn` and
    :func:`torch_divergence.sinkhorn_divergence`; the gradient of C is the plan.

    Args:
        C: (N, M) or (B, N, M): float32, float64, bfloat16 or float16. One matrix serves a batch of weights. A pair
            whose entry is inf is never used, and its gradient is 0.

    Returns:
        (), or (B,); with ``return_info`` also a :class:`SinkhornInfo`.

    Example:

        >>> import torch, torch_divergence as td
        >>> _ = torch.manual_seed(0)
        >>> C = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)
        >>> value = td.sinkhorn_cost(C, eps=0.5)
        >>> value.backward()
        >>> torch.allclose(value, -0.5 * torch.log((1 + torch.exp(torch.tensor(-2.0))) / 2))
        True
        >>> torch.allclose(C.grad.sum(1), torch.tensor([0.5, 0.5]))
        True
    """
    value, f, g, *counters = ops.sinkhorn_cost.default(
        C,
        a,
        b,
        eps=scalar_tensor(eps),
        rho=_pair(rho),
        tol=tol,
        max_iter=max_iter,
        init_g=_init("sinkhorn_cost", init).get("init_g"),
        reduction=reduction,
    )
    return (value, SinkhornInfo(f, g, None, None, *counters)) if return_info else value
