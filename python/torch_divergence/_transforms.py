"""vmap rules of the private operators, by which ``torch.func`` batches them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Operators on rows: their tensors hold one entry or one distribution a row, so a batch dimension in front of each
# tensor argument only makes more rows.
ROW_WISE = (
    "_bures",
    "_bures_lyapunov",
    "_fisher_vector_product",
    "_gaussian_kl",
    "_gaussian_kl_backward",
    "_transport_flow",
    "_transport_potentials",
    "_wasserstein_1d",
    "_wasserstein_1d_backward",
    "_wasserstein_1d_tree",
    "_wasserstein_tree",
    *(
        name + suffix
        for name in ("_cross_entropy", "_cross_entropy_labels", "_entropy", "_js_div", "_kl_div", "_kl_div_topk")
        for suffix in ("", "_backward", "_double_backward")
    ),
)


def _batched_rows(op: Any, info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, int | tuple[int | None, ...]]:
    def to_front(arg: Any, dim: int | None) -> Any:
        if not isinstance(arg, Tensor):
            return arg
        return arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)

    outputs = op(*(to_front(arg, dim) for arg, dim in zip(args, in_dims, strict=True)))
    if isinstance(outputs, Tensor):
        return outputs, 0
    # The operators with a mask take it last. What it leaves out is returned as an empty tensor, without a batch.
    mask = args[-1] if isinstance(args[-1], Sequence) else [True] * len(outputs)
    return outputs, tuple(0 if wanted else None for wanted in mask)


def _register(name: str) -> None:
    op = getattr(torch.ops.torch_divergence, name)

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, int | tuple[int | None, ...]]:
        return _batched_rows(op, info, in_dims, *args)

    torch.library.register_vmap(f"torch_divergence::{name}", rule)


def register() -> None:
    """Registers the rules; called once, when the package is imported."""
    for name in ROW_WISE:
        _register(name)
