"""Derivatives of every order by finite differences, in every mode of automatic differentiation."""

import pytest
import torch
from cases import ALL_OPTIONS, LOSSES, TRANSFORMS
from torch.autograd import gradcheck, gradgradcheck

all_options = pytest.mark.parametrize("case", ALL_OPTIONS, ids=str)
few_options = pytest.mark.parametrize("case", TRANSFORMS, ids=str)
losses = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)


@all_options
def test_first_order(case):
    assert gradcheck(
        case,
        case.draw(3, 4),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@all_options
def test_second_order(case):
    assert gradgradcheck(case, case.draw(2, 4), check_batched_grad=True)


@all_options
def test_forward_over_reverse(case):
    assert gradgradcheck(
        case, case.draw(2, 4), check_fwd_over_rev=True, check_rev_over_rev=False, check_undefined_grad=False
    )


@all_options
def test_third_order(case):
    inputs = case.draw(1, 3)
    assert gradgradcheck(lambda *x: torch.autograd.grad(case(*x).sum(), x, create_graph=True), inputs)


@few_options
def test_fourth_order_of_the_reference(case):
    """Beyond the kernels the formula is ATen's: orders agree with the composite."""

    def nested(f, x, order):
        value = f(*x).sum()
        for k in range(order):
            grads = torch.autograd.grad(value, x, create_graph=k + 1 < order)
            value = sum((g * (0.3 + torch.arange(g.numel(), dtype=g.dtype).view_as(g))).sum() for g in grads)
        return value.detach()

    inputs = case.draw(2, 4)
    for order in (1, 2, 3, 4):
        torch.testing.assert_close(
            nested(case, inputs, order), nested(case.reference, inputs, order), rtol=1e-9, atol=1e-9
        )


@all_options
@pytest.mark.parametrize("reduction", ("sum", "mean"))
def test_one_side_of_a_reduced_loss(case, reduction):
    """The path that stores one gradient in the forward."""
    for side in case.loss.differentiable:
        tensors = case.draw(2, 4, grad=(side,))

        def f(x, side=side, tensors=tensors):
            return case(*(x if i == side else t for i, t in enumerate(tensors)), reduction=reduction)

        x = (tensors[side],)
        assert gradcheck(f, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
        assert gradgradcheck(f, x, check_batched_grad=True)
        assert gradgradcheck(f, x, check_fwd_over_rev=True, check_rev_over_rev=False, check_undefined_grad=False)
        assert gradgradcheck(lambda x, f=f: torch.autograd.grad(f(x), x, create_graph=True)[0] + 0 * x, x)


@few_options
def test_through_weights_and_layouts(case):
    weight = torch.tensor([[0.5, 0.0], [2.0, 1.0], [1.0, 0.25]], dtype=torch.float64)
    inputs = case.draw(3, 2, 4)
    for options in (
        {"row_weight": weight},
        {"row_weight": weight, "reduction": "mean"},
        {"row_weight": weight > 0, "reduction": "mean", "normalizer": 3.0},
    ):
        f = case.bind(**options)
        assert gradcheck(f, inputs, check_forward_ad=True)
        assert gradgradcheck(f, inputs)
    moved = tuple(t.detach().movedim(-1, 0).requires_grad_() for t in inputs)
    assert gradcheck(case.bind(dim=0), moved, check_forward_ad=True)
    assert gradgradcheck(case.bind(dim=0), moved)
    assert gradgradcheck(lambda *x: case(*(t.transpose(0, 1) * 2 for t in x)), inputs)


@all_options
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_double_backward_against_the_composite(case, dtype):
    """Long rows, both precisions, every combination of sides and incoming gradients."""
    for shape in ((4, 3), (2, 1000)):
        for sides in ((0,), (1,), (0, 1)):
            exact = case.draw(*shape, grad=sides)
            inputs = tuple(t.detach().to(dtype).requires_grad_(i in sides) for i, t in enumerate(exact))
            exact = tuple(t.detach().double().requires_grad_(i in sides) for i, t in enumerate(inputs))
            vectors = [torch.randn(shape, dtype=dtype) for _ in sides]
            incoming = torch.rand(shape[:-1], dtype=dtype).requires_grad_()
            results = []
            for f, x in ((case, inputs), (case.reference, exact)):
                wanted = [x[i] for i in sides]
                w = incoming.detach().to(x[0].dtype).requires_grad_()
                first = torch.autograd.grad(f(*x), wanted, w, create_graph=True)
                dot = sum((g * v.to(g.dtype)).sum() for g, v in zip(first, vectors, strict=True))
                results.append(torch.autograd.grad(dot, [w, *wanted], allow_unused=True))
            for got, want in zip(*results, strict=True):
                if want is None or not want.any():  # the second derivative of a linear dependence
                    assert got is None or not got.any()
                    continue
                assert got.dtype == dtype
                error = (got.double() - want).abs().amax(-1)
                rtol = 1e-10 if dtype == torch.float64 else 2e-5
                assert (error <= rtol * want.abs().amax(-1).clamp_min(want.abs().max() * 1e-6)).all()


@losses
def test_hessian_of_close_rows(loss):
    """At P = Q the student's block is a multiple of the Fisher matrix: positive semidefinite, F v = q (v - <q, v>)."""
    x = loss.draw((1, 6), torch.float64)[0]
    v = torch.randn(1, 6, dtype=torch.float64)
    q = x.clone().requires_grad_()
    g = torch.autograd.grad(loss(q, x, reduction="sum"), q, create_graph=True)[0]
    product = torch.autograd.grad((g * v).sum(), q)[0]
    p = x.softmax(-1)
    fisher = p * (v - (p * v).sum(-1, keepdim=True))
    torch.testing.assert_close(product, loss.curvature * fisher, rtol=1e-12, atol=1e-14)


@losses
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_derivatives_at_masks(loss, dtype):
    """-inf in both rows: gradient and Hessian product are those of the row without the column."""
    keep = torch.tensor([True, False, True, True, False])
    full = tuple(torch.where(keep, t, -torch.inf) for t in loss.draw((2, 5), dtype))
    vectors = [torch.randn(2, 5).to(dtype) for _ in full]
    results = []
    for columns in (slice(None), keep):
        x = [t[:, columns].clone().requires_grad_() for t in full]
        first = torch.autograd.grad(loss(*x), x, create_graph=True)
        dot = sum((g.float() * v[:, columns].float()).sum() for g, v in zip(first, vectors, strict=True))
        results.append((*first, *torch.autograd.grad(dot, x)))
    for got, want in zip(*results, strict=True):
        assert (got[:, ~keep] == 0).all()
        torch.testing.assert_close(got[:, keep], want)


@losses
def test_mixed_dtypes_in_double_backward(loss):
    for dtypes in ((torch.float32, torch.bfloat16), (torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        x = [t.to(d).requires_grad_() for t, d in zip(loss.draw((4, 9), torch.float64), dtypes, strict=True)]
        first = torch.autograd.grad(loss(*x, reduction="sum"), x, create_graph=True)
        second = torch.autograd.grad(sum(g.float().pow(2).sum() for g in first), x)
        wide = [t.detach().double().requires_grad_() for t in x]
        first_wide = torch.autograd.grad(loss.reference(*wide, reduction="sum"), wide, create_graph=True)
        second_wide = torch.autograd.grad(sum(g.pow(2).sum() for g in first_wide), wide)
        for got, want, d in zip((*first, *second), (*first_wide, *second_wide), dtypes * 2, strict=True):
            assert got.dtype == d
            tolerance = 3e-2 if d == torch.bfloat16 or torch.bfloat16 in dtypes else 4e-3
            assert (got.double() - want).abs().max() <= tolerance * want.abs().max()
