"""The Fisher-vector product of a categorical distribution."""

import json
from pathlib import Path

import pytest
import torch
import torch_divergence as td
from torch.autograd import gradcheck, gradgradcheck

INF = float("inf")


def textbook(logits, v, temperature=1.0, dim=-1):
    q = (logits / temperature).softmax(dim)
    return q * (v - (q * v).sum(dim, keepdim=True)) / temperature**2


def draw(*shape, dtype=torch.float64, grad=True):
    return tuple(torch.randn(shape, dtype=dtype).requires_grad_(grad) for _ in range(2))


def test_reference_value():
    cases = json.loads((Path(__file__).parent / "reference/divergence_cases.json").read_text())["cases"]
    case = next(c for c in cases if c["id"] == "fisher_vp_categorical")
    logits, v = (torch.tensor(case["inputs"][k], dtype=torch.float64) for k in ("logits", "v"))
    expected = torch.tensor(case["expected"]["fvp"], dtype=torch.float64)
    torch.testing.assert_close(td.fisher_vector_product(logits, v), expected, rtol=0, atol=1e-15)


def test_is_the_hessian_of_kl_at_equality():
    logits, v = draw(1, 6, grad=False)
    hessian = torch.func.hessian(lambda x: td.kl_div(x, logits, temperature=2.0))(logits).reshape(6, 6)
    torch.testing.assert_close(td.fisher_vector_product(logits, v, temperature=2.0)[0], hessian @ v[0])


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("shape", ((1, 1), (3, 7), (2, 3, 100), (1, 70_001), (0, 4)))
def test_values(dtype, shape):
    logits, v = draw(*shape, dtype=dtype, grad=False)
    got = td.fisher_vector_product(logits, v, temperature=0.7)
    want = textbook(logits.double(), v.double(), 0.7)
    assert got.dtype == dtype
    accuracy = {torch.float64: 1e-13, torch.float32: 2e-7}.get(dtype, torch.finfo(dtype).eps)
    allowed = accuracy * want.abs().amax(-1, keepdim=True).clamp_min(1e-300) if want.numel() else 1
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((got.double() - want).abs() <= allowed + tiny).all()


def test_large_offsets_cost_no_digits():
    logits, v = draw(3, 50, dtype=torch.float32, grad=False)
    logits, v = logits + 1000, v + 1e4
    got, want = td.fisher_vector_product(logits, v), textbook(logits.double(), v.double())
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6 * want.abs().max().item())


def test_dims_strides_and_mixed_types():
    logits, v = draw(4, 5, 3)
    for dim in (0, 1, -1):
        torch.testing.assert_close(td.fisher_vector_product(logits, v, dim=dim), textbook(logits, v, dim=dim))
    bf16, single = logits.detach().bfloat16().requires_grad_(), v.detach().float().requires_grad_()
    product = td.fisher_vector_product(bf16, single)
    assert product.dtype == torch.float32
    assert [g.dtype for g in torch.autograd.grad(product.sum(), (bf16, single))] == [torch.bfloat16, torch.float32]


def test_masked_classes_are_as_if_they_were_not_there():
    logits, v = draw(3, 5, grad=False)
    masked, held = logits.clone(), v.clone()
    masked[:, 2], held[:, 2] = -INF, float("nan")
    masked, held = masked.requires_grad_(), held.requires_grad_()
    keep = [0, 1, 3, 4]
    small = [t[:, keep].clone().requires_grad_() for t in (logits, v)]
    got, want = td.fisher_vector_product(masked, held), td.fisher_vector_product(*small)
    assert not got[:, 2].any()
    torch.testing.assert_close(got[:, keep], want)
    for a, b in zip(
        torch.autograd.grad(got.pow(2).sum(), (masked, held)),
        torch.autograd.grad(want.pow(2).sum(), small),
        strict=True,
    ):
        assert not a[:, 2].any()
        torch.testing.assert_close(a[:, keep], b)
    assert td.fisher_vector_product(torch.full((1, 3), -INF), torch.ones(1, 3)).isnan().all()


def test_derivatives_and_transforms():
    inputs = draw(2, 4)
    f = lambda *x: td.fisher_vector_product(*x, temperature=2.0)  # noqa: E731
    assert gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, inputs, check_fwd_over_rev=True)
    cube = draw(3, 2, 4, grad=False)
    torch.testing.assert_close(torch.func.vmap(f)(*cube), textbook(*cube, 2.0))
    torch.testing.assert_close(torch.func.vmap(f, (None, 1), 1)(cube[0][0], cube[1].movedim(0, 1)), torch.stack(
        [textbook(cube[0][0], t, 2.0) for t in cube[1]], 1))  # fmt: skip
    row = [t[0, 0] for t in cube]
    got = torch.func.jacfwd(torch.func.jacrev(f))(*row)
    torch.testing.assert_close(got, torch.func.jacfwd(torch.func.jacrev(lambda *x: textbook(*x, 2.0)))(*row))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck itself looks at it
def test_opcheck():
    torch.library.opcheck(torch.ops.torch_divergence._fisher_vector_product.default, (*draw(3, 5), 2.0))
    torch.library.opcheck(torch.ops.torch_divergence.fisher_vector_product.default, draw(3, 5), {"dim": 0})


@pytest.mark.slow
def test_compile():
    inputs = draw(3, 5)
    compiled = torch.compile(td.fisher_vector_product, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), textbook(*inputs))
    for a, b in zip(
        torch.autograd.grad(compiled(*inputs).pow(2).sum(), inputs),
        torch.autograd.grad(textbook(*inputs).pow(2).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("device", ("cpu", "meta"))
@pytest.mark.parametrize(
    ("logits", "v", "options", "words"),
    (
        (torch.ones(()), torch.ones(()), {}, ["logits", "scalar"]),
        (torch.ones(3, 5), torch.ones(5), {}, ["v", "[5]", "[3, 5]"]),
        (torch.ones(3, 5), torch.ones(3, 5).double(), {}, ["v", "float64"]),
        (torch.ones(3, 5).long(), torch.ones(3, 5), {}, ["logits", "float32"]),
        (torch.ones(3, 5), torch.ones(3, 5), {"temperature": 0.0}, ["temperature", "positive"]),
        (torch.ones(3, 5), torch.ones(3, 5), {"dim": 2}, ["dim", "2"]),
        (torch.ones(3, 0), torch.ones(3, 0), {}, ["[3, 0]"]),
    ),
)
def test_bad_input(logits, v, options, words, device):
    with pytest.raises(ValueError) as error:
        td.fisher_vector_product(logits.to(device), v.to(device), **options)
    assert all(word in str(error.value) for word in words), str(error.value)
