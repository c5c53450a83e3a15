import math

from torch import Tensor

from torch_divergence.functional._common import Reduction, ops, scalar_tensor


def ppo_clip_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""The clipped surrogate of Schulman et al., "Proximal Policy Optimization Algorithms", 2017, as a loss.

    .. math:: -\min(r A, clamp(r, 1 - clip, 1 + clip\_high) A), \qquad r = e^{log\_prob - old\_log\_prob}

    A clipped entry has gradient exactly 0, however large its ratio is: nothing overflows into 0 inf.

    Args:
        log_prob: of the actions (or tokens) taken, any shape; half types are computed in float32.
        old_log_prob: of the policy that took them, of the same shape; detach it.
        advantage: of the same shape; detach it.
        clip: between 0 and 1.
        clip_high: the upper bound's; None is ``clip``.
        row_weight: bool or >= 0, broadcastable to the entries. A constant. Entries of weight 0 (padding) contribute
            exactly nothing, whatever they hold.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the entries.
        normalizer: replaces the denominator of ``"mean"``.

    Returns:
        A scalar, or one value an entry; differentiable in all three tensors.

    Raises:
        ValueError: naming the argument, what it was and what was expected.

    Example:

        >>> import torch, torch_divergence as td
        >>> log_prob = torch.tensor([0.0, 1.0, 500.0], requires_grad=True)
        >>> loss = td.ppo_clip_loss(log_prob, torch.zeros(3), torch.ones(3), reduction="none")
        >>> loss
        tensor([-1.0000, -1.2000, -1.2000], grad_fn=...)
        >>> loss.sum().backward()
        >>> log_prob.grad
        tensor([-1., 0., 0.])
    """
    loss: Tensor = ops.ppo_clip_loss.default(
        log_prob,
        old_log_prob,
        advantage,
        clip=clip,
        clip_high=clip_high,
        row_weight=row_weight,
        reduction=reduction,
        normalizer=scalar_tensor(normalizer),
    )
    return loss


def ppo_kl_penalty_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    kl: Tensor,
    *,
    kl_coef: float,
    row_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""The penalised surrogate of the same paper: mean(-r A + kl_coef kl), r = exp(log_prob - old_log_prob).

    Args:
        log_prob: as in :func:`ppo_clip_loss`.
        old_log_prob: as there.
        advantage: as there.
        kl: the divergence from the old policy, of the shape of the others or a scalar: of :func:`kl_div` with
            ``reduction="none"``, or of :func:`kl_estimate`.
        kl_coef: not negative; :class:`AdaptiveKLController` steers it. With 0 the term is left out, whatever ``kl``
            holds.
        row_weight: as in :func:`ppo_clip_loss`.
        reduction: as there.
        normalizer: as there.

    Raises:
        ValueError: naming the argument, what it was and what was expected.

    Example:

        >>> import torch, torch_divergence as td
        >>> same = torch.zeros(4)
        >>> td.ppo_kl_penalty_loss(same, same, torch.ones(4), torch.full((4,), 0.5), kl_coef=0.2)
        tensor(-0.9000)
    """
    loss: Tensor = ops.ppo_kl_penalty_loss.default(
        log_prob,
        old_log_prob,
        advantage,
        kl,
        kl_coef=kl_coef,
        row_weight=row_weight,
        reduction=reduction,
        normalizer=scalar_tensor(normalizer),
    )
    return loss


class AdaptiveKLController:
    r"""The coefficient of a KL penalty, steered to a target: each update multiplies it by

    .. math:: 1 + clip(kl / target - 1, -0.2, 0.2)\, n / horizon

    (Ziegler et al., "Fine-Tuning Language Models from Human Preferences", 2019).

    Args:
        init: the coefficient to begin with, >= 0.
        target: the KL divergence to hold, > 0.
        horizon: over how many samples the coefficient may change by a fifth, > 0.

    Raises:
        ValueError: for numbers out of range.

    Example:

        >>> import torch_divergence as td
        >>> controller = td.AdaptiveKLController(init=0.2, target=6.0, horizon=10000)
        >>> round(controller.update(kl=12.0, n=500), 6)  # too far: 1 % more
        0.202
        >>> controller.load_state_dict({"value": 0.1})
        >>> controller.value
        0.1
    """

    def __init__(self, init: float, target: float, horizon: float) -> None:
        for name, number in (("init", init), ("target", target), ("horizon", horizon)):
            if not (math.isfinite(number) and (number > 0 or (number == 0 and name == "init"))):
                expected = ">= 0" if name == "init" else "> 0"
                raise ValueError(f"AdaptiveKLController: {name} is {number}, expected a finite number {expected}")
        #: The coefficient.
        self.value = float(init)
        self.target = float(target)
        self.horizon = float(horizon)

    def update(self, kl: float, n: int) -> float:
        """Takes the KL measured over n samples, less than 5 horizons, and returns the new coefficient."""
        if math.isnan(kl):
            raise ValueError("AdaptiveKLController: kl is NaN, expected a number")
        if not (n >= 0 and math.isfinite(n)):
            raise ValueError(f"AdaptiveKLController: n is {n}, expected a number of samples >= 0")
        error = min(max(float(kl) / self.target - 1, -0.2), 0.2)
        factor = 1 + error * n / self.horizon
        if not factor > 0:
            raise ValueError(
                f"AdaptiveKLController: n is {n} with a horizon of {self.horizon:g}, which would multiply the "
                f"coefficient by {factor:g}, expected less than 5 horizons: a positive factor"
            )
        self.value *= factor
        return self.value

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        value = float(state["value"])
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"AdaptiveKLController: value is {value}, expected a finite number >= 0")
        self.value = value

    def __repr__(self) -> str:
        return f"AdaptiveKLController(value={self.value}, target={self.target}, horizon={self.horizon})"
