"""Bad input for every argument: a ValueError that names it, what it was and what was expected; on meta tensors too."""

import math
import re

import numpy
import pytest
import torch
from cases import LOSSES

DIVERGENCES = [loss for loss in LOSSES if {"space", "target_space"} <= loss.choices.keys()]
divergences = pytest.mark.parametrize("loss", DIVERGENCES, ids=lambda loss: loss.name)


def tensor(*shape, dtype=torch.float32, **kwargs):
    return torch.ones(shape, dtype=dtype, **kwargs)


# (id, input, target, options, words that the message must contain). True of every divergence between two distributions.
BAD = [
    ("shape", tensor(3, 5), tensor(3, 4), {}, ["target", "[3, 4]", "[3, 5]"]),
    ("shape that would broadcast", tensor(3, 5), tensor(1, 5), {}, ["target", "[1, 5]", "[3, 5]"]),
    ("dimensions", tensor(3, 5), tensor(5), {}, ["target", "[5]", "[3, 5]"]),
    ("scalar", tensor(), tensor(), {}, ["input", "dimension"]),
    ("no classes", tensor(3, 0), tensor(3, 0), {}, ["input", "[3, 0]", "at least one"]),
    ("no classes in dim", tensor(0, 3), tensor(0, 3), {"dim": 0}, ["input", "[0, 3]", "at least one"]),
    ("integer input", tensor(3, 5, dtype=torch.int64), tensor(3, 5), {}, ["input", "Long|int64", "float32"]),
    (
        "complex input",
        tensor(3, 5, dtype=torch.complex64),
        tensor(3, 5),
        {},
        ["input", "ComplexFloat|complex64", "float32"],
    ),
    ("boolean target", tensor(3, 5), tensor(3, 5, dtype=torch.bool), {}, ["target", "Bool|bool", "float32"]),
    (
        "float8 target",
        tensor(3, 5),
        torch.empty(3, 5, dtype=torch.float8_e4m3fn),
        {},
        ["target", "loat8_e4m3fn", "float32"],
    ),
    (
        "double with single",
        tensor(3, 5, dtype=torch.float64),
        tensor(3, 5),
        {},
        ["target", "Double|double|float64", "Float|float32"],
    ),
    (
        "half with double",
        tensor(3, 5, dtype=torch.float16),
        tensor(3, 5, dtype=torch.float64),
        {},
        ["target", "Half|float16", "Double|double|float64"],
    ),
    (
        "space",
        tensor(3, 5),
        tensor(3, 5),
        {"space": "logit"},
        ["space", '"logit"', '"logits"', '"log_probs"', '"probs"'],
    ),
    (
        "target_space",
        tensor(3, 5),
        tensor(3, 5),
        {"target_space": "prob"},
        ["target_space", '"prob"', '"logits"', '"log_probs"', '"probs"'],
    ),
    ("zero temperature", tensor(3, 5), tensor(3, 5), {"temperature": 0.0}, ["temperature", "0", "positive"]),
    ("negative temperature", tensor(3, 5), tensor(3, 5), {"temperature": -2.0}, ["temperature", "-2", "positive"]),
    ("infinite temperature", tensor(3, 5), tensor(3, 5), {"temperature": math.inf}, ["temperature", "inf", "finite"]),
    ("NaN temperature", tensor(3, 5), tensor(3, 5), {"temperature": math.nan}, ["temperature", "nan", "finite"]),
    (
        "temperature without logits",
        tensor(3, 5),
        tensor(3, 5),
        {"space": "probs", "temperature": 2.0},
        ["temperature", "2", "1", "logits"],
    ),
    ("dim above", tensor(3, 5), tensor(3, 5), {"dim": 2}, ["dim", "2", "-2", "1"]),
    ("dim below", tensor(3, 5), tensor(3, 5), {"dim": -3}, ["dim", "-3", "-2", "1"]),
    (
        "reduction",
        tensor(3, 5),
        tensor(3, 5),
        {"reduction": "avg"},
        ["reduction", '"avg"', '"mean"', '"sum"', '"none"'],
    ),
    (
        "batchmean of three dimensions",
        tensor(2, 3, 5),
        tensor(2, 3, 5),
        {"reduction": "batchmean"},
        ["batchmean", '"mean"', "normalizer=input.size(0)"],
    ),
    (
        "batchmean with weights",
        tensor(3, 5),
        tensor(3, 5),
        {"reduction": "batchmean", "row_weight": tensor(3)},
        ["batchmean", '"mean"', "row_weight"],
    ),
    ("weight shape", tensor(3, 5), tensor(3, 5), {"row_weight": tensor(4)}, ["row_weight", "[4]", "[3]"]),
    ("weight as the input", tensor(3, 5), tensor(3, 5), {"row_weight": tensor(3, 5)}, ["row_weight", "[3, 5]", "[3]"]),
    (
        "weight with a row too many",
        tensor(2, 3, 5),
        tensor(2, 3, 5),
        {"row_weight": tensor(1, 2, 3)},
        ["row_weight", "[1, 2, 3]", "[2, 3]"],
    ),
    (
        "integer weight",
        tensor(3, 5),
        tensor(3, 5),
        {"row_weight": tensor(3, dtype=torch.int64)},
        ["row_weight", "Long|int64", "bool"],
    ),
    (
        "complex weight",
        tensor(3, 5),
        tensor(3, 5),
        {"row_weight": tensor(3, dtype=torch.complex64)},
        ["row_weight", "ComplexFloat|complex64", "bool"],
    ),
    (
        "weight that requires grad",
        tensor(3, 5),
        tensor(3, 5),
        {"row_weight": tensor(3, requires_grad=True)},
        ["row_weight", "grad", 'reduction="none"'],
    ),
    (
        "normalizer of a sum",
        tensor(3, 5),
        tensor(3, 5),
        {"reduction": "sum", "normalizer": tensor()},
        ["normalizer", "sum", "mean"],
    ),
    (
        "normalizer of rows",
        tensor(3, 5),
        tensor(3, 5),
        {"reduction": "none", "normalizer": tensor()},
        ["normalizer", "none", "mean"],
    ),
    (
        "normalizer shape",
        tensor(3, 5),
        tensor(3, 5),
        {"normalizer": tensor(3)},
        ["normalizer", "[3]", "0-dim|scalar|number"],
    ),
    (
        "normalizer that requires grad",
        tensor(3, 5),
        tensor(3, 5),
        {"normalizer": tensor(requires_grad=True)},
        ["normalizer", "grad", 'reduction="none"'],
    ),
]

# Errors in values, which meta tensors cannot show.
BAD_VALUES = [
    ("negative weight", {"row_weight": torch.tensor([1.0, -0.5, 1.0])}, ["row_weight", "-0.5", "0"]),
    ("NaN weight", {"row_weight": torch.tensor([1.0, math.nan, 1.0])}, ["row_weight", "nan", "finite"]),
    ("infinite weight", {"row_weight": torch.tensor([1.0, math.inf, 1.0])}, ["row_weight", "inf", "finite"]),
    ("zero normalizer", {"normalizer": 0}, ["normalizer", "0", "positive|> 0"]),
    ("negative normalizer", {"normalizer": -3.0}, ["normalizer", "-3", "positive|> 0"]),
    ("negative normalizer tensor", {"normalizer": torch.tensor(-3.0)}, ["normalizer", "-3", "positive|> 0"]),
    ("NaN normalizer", {"normalizer": math.nan}, ["normalizer", "nan", "positive|> 0"]),
]


def check_message(error, loss, words):
    message = str(error.value)
    assert type(error.value) is ValueError
    assert loss.name in message
    for word in words:
        pattern = "|".join(re.escape(w) for w in word.split("|"))
        assert re.search(pattern, message), f"no {word!r} in: {message}"
    assert len(message) < 400 and "\n" not in message


@divergences
@pytest.mark.parametrize("device", ("cpu", "meta"))
@pytest.mark.parametrize("input, target, options, words", [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_argument(loss, device, input, target, options, words):
    options = {
        k: v.to(device).detach().requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) else v
        for k, v in options.items()
    }
    with pytest.raises(ValueError) as error:
        loss(input.to(device), target.to(device), **options)
    check_message(error, loss, words)


@divergences
@pytest.mark.parametrize("options, words", [b[1:] for b in BAD_VALUES], ids=[b[0] for b in BAD_VALUES])
@pytest.mark.parametrize("sides", ((), (0,), (0, 1)))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_bad_value(loss, reduction, sides, options, words):
    if "normalizer" in options and reduction != "mean":
        return
    with pytest.raises(ValueError) as error:
        loss(*(tensor(3, 5).requires_grad_(i in sides) for i in (0, 1)), reduction=reduction, **options)
    check_message(error, loss, words)


@divergences
def test_devices_differ(loss):
    for input, target, options, words in (
        (tensor(3, 5), tensor(3, 5, device="meta"), {}, ["target", "meta", "cpu"]),
        (tensor(3, 5, device="meta"), tensor(3, 5), {}, ["target", "meta", "cpu"]),
        (tensor(3, 5), tensor(3, 5), {"row_weight": tensor(3, device="meta")}, ["row_weight", "meta", "cpu"]),
    ):
        with pytest.raises(ValueError) as error:
            loss(input, target, **options)
        check_message(error, loss, words)


@divergences
def test_layout(loss):
    with pytest.raises(ValueError) as error:
        loss(tensor(3, 5).to_sparse(), tensor(3, 5))
    check_message(error, loss, ["input", "parse"])


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if "direction" in loss.choices], ids=lambda loss: loss.name)
@pytest.mark.parametrize("device", ("cpu", "meta"))
def test_direction(loss, device):
    for value in ("sideways", "", "Forward"):
        with pytest.raises(ValueError) as error:
            loss(tensor(3, 5, device=device), tensor(3, 5, device=device), direction=value)
        check_message(error, loss, ["direction", f'"{value}"', '"forward"', '"reverse"'])


@divergences
def test_types(loss):
    """What is no tensor, no number or no string where one is expected."""
    x = tensor(3, 5)
    for target, options, words in (
        ([[1.0] * 5] * 3, {}, ["target", "list", "Tensor"]),
        (x, {"temperature": "hot"}, ["temperature", "str", "float"]),
        (x, {"dim": 0.5}, ["dim", "float", "int"]),
        (x, {"space": None}, ["space", "NoneType", "str"]),
        (x, {"reduction": None}, ["reduction", "NoneType", "str"]),
        (x, {"row_weight": [1.0, 1.0, 1.0]}, ["row_weight", "list", "Tensor"]),
        (x, {"normalizer": "three"}, ["normalizer", "str", "Tensor"]),
        (x, {"normalizer": True}, ["normalizer", "bool", "Tensor"]),
    ):
        with pytest.raises(ValueError) as error:
            loss(x, target, **options)
        check_message(error, loss, words)
    for call in (
        lambda: loss(x),
        lambda: loss(x, x, size_average=True),
        lambda: getattr(__import__("torch_divergence"), loss.name)(x, x, "reverse"),
    ):
        with pytest.raises(TypeError):
            call()


@divergences
def test_numbers_of_numpy(loss):
    x, y = torch.randn(2, 3, 5)
    for number in (numpy.float32(3), numpy.float64(3), numpy.int64(3)):
        assert torch.equal(loss(x, y, normalizer=number), loss(x, y, normalizer=3))


@divergences
def test_the_raw_operator_raises_the_same(loss):
    with pytest.raises(ValueError, match="target"):
        loss.op(tensor(3, 5), tensor(3, 4))


@divergences
@pytest.mark.slow
def test_errors_while_compiling(loss):
    f = torch.compile(lambda a, b: loss(a, b), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="target has shape"):
        f(tensor(3, 5), tensor(3, 4))


INPLACE = [loss for loss in DIVERGENCES if loss.inplace_grad]


@pytest.mark.parametrize("loss", INPLACE, ids=lambda loss: loss.name)
def test_inplace_grad(loss):
    leaf, target = tensor(4, 6).requires_grad_(), tensor(4, 6)
    base = leaf * 1
    both = torch.ones(2, 4, 6)
    calls = [
        (leaf, target, {}, "leaf"),
        (tensor(4, 6), target, {}, "require grad|requires grad"),
        (leaf.view(4, 6), target, {}, "leaf"),
        (leaf * 1, target, {"reduction": "none"}, "reduc"),
        ((leaf * 1)[:, :3], tensor(4, 3), {}, "dense"),
        ((leaf * 1)[::2], tensor(2, 6), {}, "dense"),
        ((leaf[:, :1] * 1).expand(4, 6), target, {}, "dense"),
        (base, base.detach(), {}, "target"),
        (both[0], both[1], {}, "require grad|requires grad"),
    ]
    for input, other, options, word in calls:
        before = input.detach().clone()
        with pytest.raises(ValueError) as error:
            loss(input, other, inplace_grad=True, **options)
        check_message(error, loss, ["inplace_grad", word])
        assert torch.equal(input, before)
    with torch.no_grad(), pytest.raises(ValueError, match="inplace_grad"):
        loss(base, target, inplace_grad=True)
