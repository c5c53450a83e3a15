"""inplace_grad=True: the gradient overwrites the input's storage, and whatever can no longer be right raises."""

import pytest
import torch
from cases import DTYPES, LOSSES, TRANSFORMS, assert_within, expect
from torch.autograd import forward_ad

CASES = [case for case in TRANSFORMS if case.loss.inplace_grad]
few = pytest.mark.parametrize("case", CASES, ids=str)
one = pytest.mark.parametrize("case", CASES[:1], ids=str)


def step(case, *shape, dtype=torch.float32, grad=(0,), layout=lambda t: t, target_layout=lambda t: t, **options):
    """A non-leaf student over a leaf, as logits stand over a network, and its loss."""
    leaves = case.draw(*shape, dtype=dtype, grad=grad)
    inputs = [layout(leaves[0] * 1), target_layout(leaves[1])]
    seen = []
    inputs[0].register_hook(lambda g: seen.append((g.data_ptr(), g.shape)))
    storage = inputs[0].data_ptr()
    loss = case(*inputs, inplace_grad=True, **{"reduction": "mean", **options})
    return leaves, loss, storage, seen, inputs


@few
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("incoming", (1.0, 0.25, -3.0, 65536.0))
@pytest.mark.parametrize("grad", ((0,), (0, 1)))
def test_value_gradient_and_storage(case, grad, dtype, incoming):
    for reduction in ("mean", "sum"):
        leaves, loss, storage, seen, _ = step(case, 6, 100, dtype=dtype, grad=grad, reduction=reduction)
        loss.backward(torch.tensor(incoming, dtype=loss.dtype))
        want = expect(case.loss, *(t.detach() for t in leaves), incoming=incoming, reduction=reduction, **case.options)
        assert_within(loss, want.value, want.value_allowed, "value")
        for side in grad:
            assert_within(leaves[side].grad, want.gradients[side], want.gradients_allowed[side], f"gradient {side}")
        assert seen == [(storage, leaves[0].shape)]


@few
def test_weights_normalizer_dim_and_poisoned_rows(case):
    weight = torch.tensor([1.0, 0.0, 0.5])
    for options in (
        {"row_weight": weight},
        {"row_weight": weight > 0},
        {"row_weight": weight, "normalizer": 4},
        {"row_weight": weight, "reduction": "sum"},
    ):
        leaves, loss, _, _, _ = step(case, 3, 9, **options)
        loss.backward()
        want = expect(case.loss, *(t.detach() for t in leaves), **{"reduction": "mean", **options}, **case.options)
        assert_within(loss, want.value, want.value_allowed, "value")
        assert_within(leaves[0].grad, want.gradients[0], want.gradients_allowed[0], "gradient")
    dirty = [t.detach() for t in case.draw(3, 9, dtype=torch.float32)]
    dirty[0][1] = torch.nan
    leaf = dirty[0].requires_grad_()
    case(leaf * 1, dirty[1], inplace_grad=True, reduction="mean", row_weight=weight).backward()
    assert (leaf.grad[1] == 0).all() and leaf.grad.isfinite().all()


@few
@pytest.mark.parametrize("layout", ("transposed", "three dimensions", "dim 0"))
def test_dense_layouts(case, layout):
    leaves = case.draw(4, 3, 8, dtype=torch.float32, grad=(0,))
    make = {
        "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "three dimensions": lambda t: t,
        "dim 0": lambda t: t.movedim(-1, 0).contiguous(),
    }[layout]
    dim = 0 if layout == "dim 0" else -1
    x = make(leaves[0] * 1)
    case(x, make(leaves[1]), inplace_grad=True, reduction="mean", dim=dim).backward()
    want = expect(case.loss, *(t.detach() for t in leaves), **case.options)
    assert_within(leaves[0].grad, want.gradients[0], want.gradients_allowed[0], "gradient")


@one
def test_target_in_the_same_storage_that_requires_grad(case):
    """One network's output split into both sides: no target is lost that anybody still needs."""
    weight = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    x = torch.randn(8, 5, dtype=torch.float64)
    student, teacher = (x @ weight).chunk(2)
    case(student, teacher, inplace_grad=True, reduction="mean").backward()
    got = weight.grad
    other = weight.detach().clone().requires_grad_()
    case.reference(*(x @ other).chunk(2), reduction="mean").backward()
    torch.testing.assert_close(got, other.grad)


@few
def test_second_backward_raises_and_names_it(case):
    _, loss, *_ = step(case, 3, 5)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace_grad"):
        loss.backward()


@few
def test_create_graph_raises_and_names_it(case):
    leaves, loss, *_ = step(case, 3, 5)
    with pytest.raises(RuntimeError, match="inplace_grad"):
        torch.autograd.grad(loss, leaves[0], create_graph=True)


@few
def test_batched_gradients_raise_and_name_it(case):
    leaves, loss, *_ = step(case, 3, 5)
    with pytest.raises(RuntimeError, match="inplace_grad"):
        torch.autograd.grad(loss, leaves[0], torch.ones(2), is_grads_batched=True)


@few
def test_forward_ad_raises_and_names_it(case):
    x, target = case.draw(3, 5, grad=(0,))
    with forward_ad.dual_level(), pytest.raises((ValueError, RuntimeError), match="inplace_grad"):
        case(forward_ad.make_dual(x * 1, torch.ones_like(x)), target, inplace_grad=True, reduction="mean")


@few
def test_torch_func_raises_and_names_it(case):
    x, target = case.draw(3, 5, grad=())
    f = lambda a: case(a * 1, target, inplace_grad=True, reduction="mean")  # noqa: E731
    for call in (
        lambda: torch.func.grad(f)(x),
        lambda: torch.func.vmap(f)(x.expand(2, 3, 5)),
        lambda: torch.func.jvp(f, (x,), (x,)),
        lambda: torch.func.hessian(f)(x),
    ):
        with pytest.raises((ValueError, RuntimeError), match="inplace_grad"):
            call()


@pytest.mark.slow
@one
def test_compile_raises_and_names_it(case):
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        f = torch.compile(
            lambda a, b: case(a * 1, b, inplace_grad=True, reduction="mean"), fullgraph=True, backend=backend
        )
        with pytest.raises(Exception, match="inplace_grad"):
            f(*case.draw(3, 5, grad=(0,)))


@few
def test_a_use_that_needs_the_overwritten_values_raises(case):
    """The version counter moves, so autograd refuses what saved the input before."""
    leaf, target = case.draw(3, 5, grad=(0,))
    x = leaf * 1
    saved = x * x
    loss = case(x, target, inplace_grad=True, reduction="mean")
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        (saved.sum() + loss).backward()


@few
def test_changing_the_input_after_the_loss_raises(case):
    leaf, target = case.draw(3, 5, grad=(0,))
    x = leaf * 1
    loss = case(x, target, inplace_grad=True, reduction="mean")
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@few
def test_added_to_another_loss_of_the_same_leaf(case):
    leaf, target = case.draw(3, 5, grad=(0,))
    (2 * case(leaf * 1, target, inplace_grad=True, reduction="mean") + leaf.sum()).backward()
    other = leaf.detach().clone().requires_grad_()
    (2 * case.reference(other, target, reduction="mean") + other.sum()).backward()
    torch.testing.assert_close(leaf.grad, other.grad)


def test_every_loss_says_whether_it_has_it():
    for loss in LOSSES:
        assert hasattr(torch.ops.torch_divergence, f"{loss.name}_inplace_grad") == loss.inplace_grad
