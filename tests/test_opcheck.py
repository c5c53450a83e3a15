"""torch.library.opcheck on public and private operators: schema, autograd registration, meta kernels, AOT dispatch."""

import pytest
import torch
from cases import LOSSES, TRANSFORMS

# opcheck itself looks at .grad of tensors that are no leaves
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
few = pytest.mark.parametrize("case", TRANSFORMS, ids=str)
losses = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)


def opcheck(op, args, kwargs=None, **options):
    torch.library.opcheck(op, args, kwargs or {}, **options)


@few
def test_public_operator(case):
    for sides in ((), (0,), (1,), (0, 1)):
        for shape in ((3, 5), (2, 3, 5), (0, 5)):
            for reduction in ("none", "mean"):
                inputs = case.draw(*shape, grad=sides)
                opcheck(case.loss.op, inputs, {**case.options, "reduction": reduction})


@few
def test_public_operator_with_weights(case):
    for sides in ((0,), (0, 1)):
        kwargs = {
            **case.options,
            "row_weight": torch.tensor([1.0, 0.0, 0.5]),
            "normalizer": torch.tensor(2.0),
            "dim": 0,
        }
        inputs = tuple(t.detach().t().contiguous().requires_grad_(t.requires_grad) for t in case.draw(3, 5, grad=sides))
        opcheck(case.loss.op, inputs, kwargs)


@few
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_public_operator_in_other_dtypes(case, dtype):
    """Without the comparison of values for half types, whose last place depends on the order of rounding."""
    utils = ("test_schema", "test_autograd_registration", "test_faketensor") + (
        ("test_aot_dispatch_dynamic",) if dtype == torch.float32 else ()
    )
    opcheck(case.loss.op, case.draw(3, 5, dtype=dtype), dict(case.options), test_utils=utils)


@few
def test_private_operators(case):
    for call in case.loss.operators(case):
        opcheck(call.op, call.args)


@few
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_private_operators_in_other_dtypes(case, dtype):
    for call in case.loss.operators(case, dtype):
        if not (dtype == torch.float16 and call.name.endswith("_value_and_grad")):
            opcheck(call.op, call.args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@few
def test_masked_outputs_are_empty_and_the_others_unchanged(case):
    for call in case.loss.operators(case):
        mask = call.args[-1]
        if not isinstance(mask, list):
            continue
        full = call.op(*call.args[:-1], [True] * len(mask))
        for wanted, got, want in zip(mask, call.op(*call.args), full, strict=True):
            assert torch.equal(got, want) if wanted else got.numel() == 0


@losses
def test_mutation_is_declared(loss):
    if loss.inplace_grad:
        schema = getattr(torch.ops.torch_divergence, f"{loss.name}_inplace_grad").default._schema
        assert [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments[:2]] == [True, False]
    assert not loss.op._schema.is_mutable


@losses
def test_tags(loss):
    names = {loss.op, *(call.op for call in loss.operators(next(c for c in TRANSFORMS if c.loss is loss)))}
    assert all(torch.Tag.pt2_compliant_tag in op.tags for op in names)
