from typing import Literal

from torch import Tensor

from torch_divergence.functional._common import Reduction, ops, scalar_tensor

KLEstimator = Literal["k1", "k2", "k3"]
KLEstimateGradient = Literal["path", "kl", "none"]


def kl_estimate(
    log_p: Tensor,
    log_q: Tensor,
    *,
    kind: KLEstimator = "k3",
    gradient: KLEstimateGradient = "path",
    max_log_ratio: float | None = None,
    importance_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Estimates KL(p || q) of any two densities from samples x ~ p, each a row, by r = log q(x) - log p(x).

    ========  ==================  ===============================================
    ``kind``  value               over x ~ p
    ========  ==================  ===============================================
    ``k1``    -r                  unbiased, of either sign
    ``k2``    r\ :sup:`2` / 2     biased, of small variance near equality
    ``k3``    e\ :sup:`r` - 1 - r unbiased and never negative
    ========  ==================  ===============================================

    (Schulman, "Approximating KL Divergence", 2020). An unbiased value does not make its gradient one: differentiating
    the estimator at fixed samples ("path") gives, in expectation and with respect to p's parameters, 0 for k1, the
    gradient of KL(p || q) for k2 and that of KL(q || p) for k3 (the latter where p > 0 wherever q > 0).
    ``gradient="kl"`` keeps the value of ``kind`` with the gradient of k2.

    Args:
        log_p: the samples' log-densities under p, float32, float64, bfloat16 or float16, of any shape.
        log_q: under q, of the same shape.
        kind: see above.
        gradient: ``"path"``, ``"kl"`` (for p; unbiased where the samples come from the present p) or ``"none"``.
        max_log_ratio: r is clamped to [-max_log_ratio, max_log_ratio] before the exponential. A clamped row has no
            gradient. None does not clamp.
        importance_weight: multiplies each row, of the shape of ``log_p``: p(x) over the density that x was drawn from.
            Differentiable: detach it where it is to be a constant.
        row_weight: weights of the rows, bool or floating point >= 0, broadcastable to the shape of ``log_p``. A
            constant. A row of weight 0 contributes exactly nothing, whatever it holds.
        reduction: ``"mean"``, ``"sum"``, ``"none"`` or ``"batchmean"`` over all entries.
        normalizer: a positive number, or a scalar tensor, that replaces the denominator of ``"mean"``.

    Returns:
        The estimate: float32 for half types, else in the type of the arguments.

    Raises:
        ValueError: naming the argument, what it was and what was expected.

    Example:

        >>> import torch, torch_divergence as td
        >>> log_p = torch.tensor([-1.0, -2.0], requires_grad=True)
        >>> td.kl_estimate(log_p, torch.tensor([-1.5, -2.0]), kind="k1")
        tensor(0.2500, grad_fn=<MeanBackward0>)
        >>> td.kl_estimate(log_p, log_p.detach() + 1e-6).item() > 0
        True
    """
    loss: Tensor = ops.kl_estimate.default(
        log_p,
        log_q,
        kind=kind,
        gradient=gradient,
        max_log_ratio=max_log_ratio,
        importance_weight=importance_weight,
        row_weight=row_weight,
        reduction=reduction,
        normalizer=scalar_tensor(normalizer),
    )
    return loss
