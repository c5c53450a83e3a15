"""The modules over the functions."""

import copy
import io
import pickle

import pytest
import torch
import torch_divergence as td
from cases import LOSSES, TRANSFORMS, Case

few = pytest.mark.parametrize("case", TRANSFORMS, ids=str)
losses = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)


def module(case, **options):
    return getattr(td, case.loss.module)(**{**case.options, **options})


@few
@pytest.mark.parametrize("reduction", ("mean", "sum", "none", "batchmean"))
def test_equals_the_function(case, reduction):
    inputs = case.draw(4, 5)
    assert torch.equal(module(case, reduction=reduction)(*inputs), case(*inputs, reduction=reduction))
    assert torch.equal(module(case, dim=0)(*inputs), case(*inputs, reduction="mean", dim=0))
    weight = torch.tensor([1.0, 0.0, 0.5, 2.0])
    if reduction == "mean":
        got = module(case)(*inputs, row_weight=weight, normalizer=3)
        assert torch.equal(got, case(*inputs, row_weight=weight, normalizer=3, reduction="mean"))
        assert torch.equal(module(case)(*inputs, weight), case(*inputs, row_weight=weight, reduction="mean"))


@losses
def test_defaults_are_those_of_the_function(loss):
    inputs = Case(loss).draw(4, 5)
    assert torch.equal(getattr(td, loss.module)()(*inputs), loss(*inputs))


@few
def test_repr(case):
    text = repr(module(case, reduction="sum"))
    assert text.startswith(case.loss.module + "(") and "reduction='sum'" in text
    for name, value in case.options.items():
        assert f"{name}={value!r}" in text
    assert eval(text, vars(td)).__dict__.keys() == module(case).__dict__.keys()


@few
def test_pickle_deepcopy_and_save(case):
    original = module(case, reduction="sum")
    inputs = case.draw(4, 5)
    buffer = io.BytesIO()
    torch.save(original, buffer)
    buffer.seek(0)
    for other in (
        pickle.loads(pickle.dumps(original)),
        copy.deepcopy(original),
        copy.copy(original),
        torch.load(buffer, weights_only=False),
    ):
        assert repr(other) == repr(original)
        assert torch.equal(other(*inputs), original(*inputs))


@few
def test_has_no_state(case):
    m = module(case)
    assert not m.state_dict() and not list(m.parameters()) and not list(m.buffers())
    m.load_state_dict({})
    m.to(torch.bfloat16).eval().requires_grad_(False)
    assert torch.equal(m(*case.draw(4, 5)), case(*case.draw(4, 5), reduction="mean"))


@few
def test_in_a_model(case):
    """Hooks, named_modules, and a step of training that lowers the loss."""
    model = torch.nn.Linear(6, 5).double()
    criterion = module(case)
    both = torch.nn.ModuleDict({"model": model, "criterion": criterion})
    assert dict(both.named_modules())["criterion"] is criterion
    seen = []
    criterion.register_forward_hook(lambda m, i, o: seen.append(o.item()))
    x = torch.randn(32, 6, dtype=torch.float64)
    teacher = case.draw(32, 5, grad=())[1]
    space = case.options.get("space", "logits")
    to_space = {"logits": lambda v: v, "log_probs": lambda v: v.log_softmax(-1), "probs": lambda v: v.softmax(-1)}[
        space
    ]
    optimizer = torch.optim.SGD(both.parameters(), lr=0.5)
    for _ in range(30):
        optimizer.zero_grad()
        criterion(to_space(model(x)), teacher).backward()
        optimizer.step()
    assert seen[-1] < 0.9 * seen[0] and seen == sorted(seen, reverse=True)


@losses
def test_options_are_keywords(loss):
    with pytest.raises(TypeError):
        getattr(td, loss.module)("mean")
    with pytest.raises(TypeError):
        getattr(td, loss.module)(size_average=True)


@losses
def test_errors_come_from_the_function(loss):
    with pytest.raises(ValueError, match="temperature"):
        getattr(td, loss.module)(temperature=-1.0)(torch.zeros(2, 3), torch.zeros(2, 3))


def test_everything_public_is_exported_and_documented():
    for name in [n for loss in LOSSES for n in (loss.name, loss.module)]:
        assert name in td.__all__
        assert len(getattr(td, name).__doc__) > 300
        assert ">>>" in getattr(td, name).__doc__
