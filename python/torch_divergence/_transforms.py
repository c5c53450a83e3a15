"""vmap rules of the private operators, by which ``torch.func`` batches them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Operators on rows: their tensors hold one entry or one distribution a row, so a batch dimension in front of each
# tensor argument only makes more rows.
ROW_WISE = (
    "_js_div",
    "_js_div_backward",
    "_js_div_double_backward",
    "_kl_div",
    "_kl_div_backward",
    "_kl_div_double_backward",
)


def _batched_rows(op: Any, info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, tuple[int | None, ...]]:
    def to_front(arg: Any, dim: int | None) -> Any:
        if not isinstance(arg, Tensor):
            return arg
        return arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)

    outputs = op(*(to_front(arg, dim) for arg, dim in zip(args, in_dims, strict=True)))
    # The operators with a mask take it last. What it leaves out is returned as an empty tensor, without a batch.
    mask = args[-1] if isinstance(args[-1], Sequence) else [True] * len(outputs)
    return outputs, tuple(0 if wanted else None for wanted in mask)


def _register(name: str) -> None:
    op = getattr(torch.ops.torch_divergence, name)

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, tuple[int | None, ...]]:
        return _batched_rows(op, info, in_dims, *args)

    torch.library.register_vmap(f"torch_divergence::{name}", rule)


def register() -> None:
    """Registers the rules; called once, when the package is imported."""
    for name in ROW_WISE:
        _register(name)
