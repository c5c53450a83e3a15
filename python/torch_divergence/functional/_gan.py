from typing import Literal

from torch import Tensor

from torch_divergence.functional._common import ops

GANLossKind = Literal["nonsaturating", "minimax"]


def gan_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    r"""The discriminator's loss of Goodfellow et al., "Generative Adversarial Nets", 2014, from logits.

    .. math:: \overline{softplus(-r)} + \overline{softplus(f)}
        = -\big(\overline{\log D(real)} + \overline{\log(1 - D(fake))}\big) = -V, \qquad D = sigmoid(logit)

    At the optimal discriminator V is 2 JS(real, fake) - log 4: the game is played on the Jensen-Shannon divergence.

    Args:
        real_logits: the discriminator's logits of real samples: any shape, at least one element; float32, float64,
            bfloat16 or float16 (half types are computed in float32).
        fake_logits: those of generated samples, of any shape, on the same device; float64 goes with float64.

    Returns:
        A scalar, twice differentiable in both. An infinite logit on the right side costs 0.

    Raises:
        ValueError: for dtypes or devices that do not fit, and for tensors without elements.

    Example:

        >>> import math, torch, torch_divergence as td
        >>> undecided = torch.zeros(8)
        >>> td.gan_discriminator_loss(undecided, undecided)
        tensor(1.3863)
        >>> math.log(4)
        1.386...
    """
    loss: Tensor = ops.gan_discriminator_loss.default(real_logits, fake_logits)
    return loss


def gan_generator_loss(fake_logits: Tensor, *, kind: GANLossKind = "nonsaturating") -> Tensor:
    r"""The generator's loss of the same paper: ``"nonsaturating"`` is mean softplus(-f), ``"minimax"`` is
    -mean softplus(f), the game's own, whose gradient vanishes while the discriminator recognises every fake.

    Args:
        fake_logits: the discriminator's logits of generated samples, as in :func:`gan_discriminator_loss`.
        kind: which of the two.

    Raises:
        ValueError: for a dtype or kind that does not fit, and for a tensor without elements.

    Example:

        >>> import torch, torch_divergence as td
        >>> recognised = torch.full((8,), -20.0, requires_grad=True)
        >>> for kind in ("nonsaturating", "minimax"):
        ...     (g,) = torch.autograd.grad(td.gan_generator_loss(recognised, kind=kind), recognised)
        ...     print(f"{g.sum():.2g}")
        -1
        -2.1e-09
    """
    loss: Tensor = ops.gan_generator_loss.default(fake_logits, kind=kind)
    return loss


def gan_js_estimate(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    r"""(V + log 4) / 2 in nats, with V as in :func:`gan_discriminator_loss`.

    In expectation a lower bound on the Jensen-Shannon divergence JS(real, fake) for any discriminator that was not
    fitted on these samples, and equal to it for the optimal one, log p(x) - log q(x).

    Args, raises: as in :func:`gan_discriminator_loss`.

    Example:

        >>> import torch, torch_divergence as td
        >>> td.gan_js_estimate(torch.full((8,), 40.0), torch.full((8,), -40.0))  # no overlap: log 2
        tensor(0.6931)
    """
    estimate: Tensor = ops.gan_js_estimate.default(real_logits, fake_logits)
    return estimate
