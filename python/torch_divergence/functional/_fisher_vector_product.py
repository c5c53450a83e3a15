from torch import Tensor

from torch_divergence.functional._common import ops


def fisher_vector_product(logits: Tensor, v: Tensor, *, temperature: float = 1.0, dim: int = -1) -> Tensor:
    r"""The Fisher information of a categorical distribution with respect to its logits, times a vector.

    .. math:: F v = q (v - \langle q, v\rangle) / T^2, \quad q = softmax(logits / T)

    a row at a time, not reduced: the Hessian of KL(old || new) in new's logits at new = old, which trust region methods
    use (Schulman et al., "Trust Region Policy Optimization", 2015). Differentiable in both, to any order.

    Args:
        logits: float32, float64, bfloat16 or float16, with at least one class along ``dim``. A logit of -inf is a class
            that is not there: its entry of the product is 0, whatever ``v`` holds.
        v: of the same shape. A half type may meet float32; float64 only itself.
        temperature: positive; divides the logits.
        dim: the class dimension.

    Returns:
        The product, in the shape and dtype of ``v``.

    Raises:
        ValueError: naming the argument, what it was and what was expected.

    Example:

        >>> import torch, torch_divergence as td
        >>> td.fisher_vector_product(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))
        tensor([[ 0.2500, -0.2500]])
    """
    product: Tensor = ops.fisher_vector_product.default(logits, v, temperature=temperature, dim=dim)
    return product
