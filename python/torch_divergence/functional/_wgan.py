import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from torch_divergence.functional._common import ops


def wgan_critic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    r"""The critic's loss of Arjovsky, Chintala and Bottou, "Wasserstein GAN", 2017: mean(fake) - mean(real).

    For a critic that is 1-Lipschitz its negative is at most W\ :sub:`1`\ (real, fake), and equal to it for the best
    one.

    Args:
        real_scores: any shape with at least one element; half types are computed in float32.
        fake_scores: any shape, on the same device; float64 goes with float64.

    Raises:
        ValueError: for dtypes or devices that do not fit, and for tensors without elements.

    Example:

        >>> import torch, torch_divergence as td
        >>> td.wgan_critic_loss(torch.tensor([2.0, 4.0]), torch.tensor([1.0]))
        tensor(-2.)
    """
    loss: Tensor = ops.wgan_critic_loss.default(real_scores, fake_scores)
    return loss


def wgan_generator_loss(fake_scores: Tensor) -> Tensor:
    """The generator's loss of the same paper: -mean(fake_scores).

    Example:

        >>> import torch, torch_divergence as td
        >>> td.wgan_generator_loss(torch.tensor([1.0, 3.0]))
        tensor(-2.)
    """
    loss: Tensor = ops.wgan_generator_loss.default(fake_scores)
    return loss


def gradient_penalty(
    critic: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    *,
    target: float = 1.0,
    generator: Generator | None = None,
) -> Tensor:
    r"""The gradient penalty of Gulrajani et al., "Improved Training of Wasserstein GANs", 2017, without its lambda.

    .. math:: \frac{1}{B} \sum_i \big(\|\nabla critic(u_i)\|_2 - target\big)^2,
        \qquad u_i = e_i\, real_i + (1 - e_i)\, fake_i, \quad e_i \sim U[0, 1)

    Args:
        critic: maps a batch to one score a sample, (B) or (B, 1), each of its own sample only (no batch
            normalisation).
        real: (B, ...), floating point.
        fake: of the same shape, dtype and device.
        target: the norm that is not penalised, >= 0.
        generator: draws e; None is PyTorch's default.

    Returns:
        A scalar, differentiable in the critic's parameters by double backward; ``real`` and ``fake`` are detached.
        Where a gradient's norm is 0, its derivative is taken as 0. Under ``no_grad`` only the value is computed.

    Raises:
        ValueError: for shapes, dtypes or devices that differ, an empty batch, a target that is negative or not finite,
            and scores that are not one a sample or do not depend on the samples.

    Example:

        >>> import torch, torch_divergence as td
        >>> critic = torch.nn.Linear(4, 1)
        >>> real, fake = torch.randn(8, 4), torch.randn(8, 4)
        >>> penalty = td.gradient_penalty(critic, real, fake)
        >>> torch.allclose(penalty, (critic.weight.norm() - 1) ** 2)
        True
        >>> penalty.backward()
    """
    name = "gradient_penalty"
    if not real.is_floating_point():
        raise ValueError(f"{name}: real has dtype {real.dtype}, expected a floating-point dtype")
    if real.dim() == 0 or real.numel() == 0:
        raise ValueError(f"{name}: real has shape {tuple(real.shape)}, expected a batch (B, ...) that is not empty")
    if fake.shape != real.shape:
        raise ValueError(f"{name}: fake has shape {tuple(fake.shape)}, expected {tuple(real.shape)}, that of real")
    if (fake.dtype, fake.device) != (real.dtype, real.device):
        raise ValueError(
            f"{name}: fake is {fake.dtype} on {fake.device}, expected {real.dtype} on {real.device}, as real is"
        )
    if not (target >= 0 and math.isfinite(target)):
        raise ValueError(f"{name}: target is {target}, expected a finite number >= 0")
    batch = real.shape[0]
    e = torch.rand((batch, *(1,) * (real.dim() - 1)), dtype=real.dtype, device=real.device, generator=generator)
    record = torch.is_grad_enabled()
    with torch.enable_grad():  # the gradient below needs a graph whatever the caller's mode
        u = (fake + e * (real - fake)).detach().requires_grad_()
        scores = critic(u)
        if scores.numel() != batch or scores.dim() == 0 or scores.shape[0] != batch:
            raise ValueError(
                f"{name}: critic returned scores of shape {tuple(scores.shape)}, expected one for each of {batch}"
            )
        if not scores.requires_grad:
            raise ValueError(f"{name}: critic returned scores without a graph, expected a function of the samples")
        (gradient,) = torch.autograd.grad(scores.sum(), u, create_graph=record, allow_unused=True)
    if gradient is None:
        raise ValueError(f"{name}: critic returned scores that do not depend on the samples")
    rows = gradient.reshape(batch, -1)
    rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    zero = (rows == 0).all(-1, keepdim=True)  # the norm's own second derivative at 0 is a division by 0
    norm = torch.where(zero.squeeze(-1), 0.0, torch.linalg.vector_norm(torch.where(zero, 1.0, rows), dim=-1))
    penalty: Tensor = (norm - target).square().mean()
    return penalty
