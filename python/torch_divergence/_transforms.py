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


# Operators on a batch of problems: a batch dimension in front of each tensor argument joins the one that is there.
BATCHED = (
    "_sinkhorn",
    "_sinkhorn_backward",
    "_sinkhorn_double_backward",
    "_sinkhorn_marginals",
    "_sinkhorn_plan",
    "_sinkhorn_plan_backward",
    "_sinkhorn_potentials",
    "_sinkhorn_potentials_backward",
    "_sinkhorn_potentials_jvp",
)


def _joined_batches(op: Any, info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    size = info.batch_size

    def to_front(name: str, arg: Any, dim: int | None) -> Any:
        if not isinstance(arg, Tensor):
            return arg
        if name in ("x_offsets", "y_offsets"):
            raise NotImplementedError("sinkhorn_ragged under torch.func.vmap: problems of different sizes, in batches")
        arg = arg.expand(size, *arg.shape) if dim is None else arg.movedim(dim, 0)
        return arg.flatten(0, 1)

    names = [argument.name for argument in op.default._schema.arguments]
    outputs = op(*(to_front(name, arg, dim) for name, arg, dim in zip(names, args, in_dims, strict=True)))
    if isinstance(outputs, Tensor):
        return outputs.reshape(size, -1, *outputs.shape[1:]), 0
    mask = args[-1] if isinstance(args[-1], Sequence) else [True] * len(outputs)
    split = [t.reshape(size, -1, *t.shape[1:]) if kept else t for t, kept in zip(outputs, mask, strict=True)]
    return tuple(split), tuple(0 if wanted else None for wanted in mask)


def _register(name: str, batched: Any) -> None:
    op = getattr(torch.ops.torch_divergence, name)

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, int | tuple[int | None, ...]]:
        outputs: tuple[Any, int | tuple[int | None, ...]] = batched(op, info, in_dims, *args)
        return outputs

    torch.library.register_vmap(f"torch_divergence::{name}", rule)


def register() -> None:
    """Registers the rules; called once, when the package is imported."""
    for name in ROW_WISE:
        _register(name, _batched_rows)
    for name in BATCHED:
        _register(name, _joined_batches)
