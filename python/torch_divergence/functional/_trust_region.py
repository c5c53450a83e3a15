import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

_NAME = "trust_region_step"


class TrustRegionResult(NamedTuple):
    """What :func:`trust_region_step` did.

    Attributes:
        accepted: were the parameters changed?
        kl: KL(old || new) measured after the step; 0 if it was refused.
        improvement: of the surrogate; 0 if the step was refused.
    """

    accepted: bool
    kl: float
    improvement: float


def _scalar(name: str, closure: Callable[[], Tensor], with_graph: bool) -> Tensor:
    value = closure()
    if not isinstance(value, Tensor):
        raise ValueError(f"{_NAME}: {name} returned a {type(value).__name__}, expected a scalar tensor")
    if value.dim() != 0:
        raise ValueError(f"{_NAME}: {name} returned a tensor of shape {tuple(value.shape)}, expected a scalar")
    if with_graph and not value.requires_grad:
        raise ValueError(f"{_NAME}: {name} returned a value without a graph, expected a function of params")
    return value


def _flat_gradient(value: Tensor, params: list[Tensor], create_graph: bool, retain_graph: bool) -> Tensor:
    gradients = torch.autograd.grad(
        value, params, create_graph=create_graph, retain_graph=retain_graph, allow_unused=True
    )
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(gradients, params, strict=True)]
    )


def _conjugate_gradients(h: Callable[[Tensor], Tensor], g: Tensor, iterations: int) -> Tensor:
    """H x = g, for a positive semidefinite H.

    Logits may be shifted together at no cost, so H is singular; what is left of g when all else is solved is rounding,
    in directions whose curvature is rounding too: a step along them has any size.
    """
    x, r, p = torch.zeros_like(g), g.clone(), g.clone()
    rounding = 4 * torch.finfo(g.dtype).eps
    rr, steepest = r.dot(r).item(), 0.0
    enough = max(1e-20, rounding**2) * rr
    for _ in range(iterations):
        if not rr > enough:
            break
        hp = h(p)
        curvature = p.dot(hp).item()
        quotient = curvature / p.dot(p).item()
        steepest = max(steepest, quotient)
        if not quotient > rounding * steepest:  # the KL does not grow along p, or NaN: what there is must do
            break
        x = x + (rr / curvature) * p
        r = r - (rr / curvature) * hp
        previous, rr = rr, r.dot(r).item()
        p = r + (rr / previous) * p
    return x


def trust_region_step(
    params: Iterable[Tensor],
    surrogate: Callable[[], Tensor],
    kl: Callable[[], Tensor],
    *,
    max_kl: float = 0.01,
    damping: float = 0.0,
    cg_iters: int = 10,
    backtracks: int = 10,
) -> TrustRegionResult:
    r"""One step of TRPO: maximises ``surrogate`` under KL(old || new) <= ``max_kl``.

    The direction x solves H x = g by conjugate gradients, with g the gradient of the surrogate and H the Hessian of
    ``kl`` at the present parameters, used through products only (by double backward); its length makes x' H x / 2 =
    max_kl. The step is halved until the measured ``kl`` is at most ``max_kl`` and the surrogate has improved; if that
    never happens, wherever a number is not finite, and if ``surrogate`` or ``kl`` raises, the parameters are restored,
    bit by bit (Schulman et al., "Trust Region Policy Optimization", 2015).

    Args:
        params: leaves that require grad. They are written; no ``.grad`` is.
        surrogate: returns the objective at the present parameters, a scalar with a graph to them: mean(ratio *
            advantage), say. To be maximised: negate a loss.
        kl: returns KL(old || new), a scalar with a graph, the old policy detached: 0 at the present parameters. Both
            are called again, under ``no_grad``, after each trial step.
        max_kl: the bound, positive.
        damping: added to the Hessian's diagonal, >= 0.
        cg_iters: iterations of conjugate gradients.
        backtracks: how often the step is halved before it is given up.

    Returns:
        (accepted, kl, improvement): whether the parameters were changed, and the KL and the surrogate's improvement
        measured after the step; both 0 if it was refused.

    Raises:
        ValueError: for options out of range, parameters that are no leaves that require grad, values that are no
            scalar tensors or have no graph.

    Example:

        >>> import torch, torch_divergence as td
        >>> logits = torch.zeros(1, 3, requires_grad=True)
        >>> old, advantage = logits.detach().clone(), torch.tensor([1.0, 0.0, -1.0])
        >>> surrogate = lambda: (logits.softmax(-1) * advantage).sum()
        >>> accepted, kl, improvement = td.trust_region_step([logits], surrogate, lambda: td.kl_div(logits, old))
        >>> accepted, 0 < kl <= 0.01, improvement > 0
        (True, True, True)
    """
    params = list(params)
    if not params:
        raise ValueError(f"{_NAME}: params is empty, expected at least one parameter")
    for p in params:
        if not (p.requires_grad and p.is_leaf):
            raise ValueError(
                f"{_NAME}: params holds a tensor that is not a leaf that requires grad, of shape {tuple(p.shape)}"
            )
    for name, number in (("max_kl", max_kl), ("cg_iters", cg_iters), ("backtracks", backtracks)):
        if not (number > 0 and math.isfinite(number)):
            raise ValueError(f"{_NAME}: {name} is {number}, expected a positive number")
    if not (damping >= 0 and math.isfinite(damping)):
        raise ValueError(f"{_NAME}: damping is {damping}, expected a finite number >= 0")

    refused = TrustRegionResult(False, 0.0, 0.0)
    with torch.enable_grad():
        value = _scalar("surrogate", surrogate, True)
        before = value.item()
        gradient = _flat_gradient(value, params, create_graph=False, retain_graph=False)
        kl_gradient = _flat_gradient(_scalar("kl", kl, True), params, create_graph=True, retain_graph=True)
        if not kl_gradient.requires_grad:
            raise ValueError(
                f"{_NAME}: kl returned a value without a second derivative, expected KL(old || new) of params"
            )
        # Its size does not matter, and its square must not overflow.
        size = gradient.abs().max().item() if gradient.numel() else 0.0
        if not (size > 0 and math.isfinite(size)):
            return refused

        def hessian_times(v: Tensor) -> Tensor:
            product = _flat_gradient((kl_gradient * v).sum(), params, create_graph=False, retain_graph=True)
            return product + damping * v

        direction = _conjugate_gradients(hessian_times, gradient / size, cg_iters)
        curvature = direction.dot(hessian_times(direction)).item()
    if not (curvature > 0 and math.isfinite(curvature)):
        return refused
    step = math.sqrt(2 * max_kl / curvature) * direction
    if not step.isfinite().all():
        return refused

    with torch.no_grad():
        old = [p.detach().clone() for p in params]
        accepted = False
        try:
            for _ in range(backtracks):
                for p, start, change in zip(params, old, torch.split(step, [p.numel() for p in params]), strict=True):
                    p.copy_(start + change.view_as(p))
                divergence = _scalar("kl", kl, False).item()
                improvement = _scalar("surrogate", surrogate, False).item() - before
                accepted = divergence <= max_kl and improvement > 0 and math.isfinite(improvement)
                if accepted:
                    return TrustRegionResult(True, divergence, improvement)
                step = step / 2
        finally:
            if not accepted:
                for p, start in zip(params, old, strict=True):
                    p.copy_(start)
    return refused
