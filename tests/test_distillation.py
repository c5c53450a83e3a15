"""distillation_loss is what its parts make of it, with weights, ignored rows and options passed on."""

import pickle

import pytest
import torch
import torch_divergence as td
from torch.autograd import gradcheck, gradgradcheck

OPTIONS = (
    {},
    {"temperature": 4.0, "alpha": 0.9},
    {"direction": "reverse", "reduction": "none"},
    {"divergence": "js", "beta": 0.3, "reduction": "sum"},
    {"alpha": 0.0},
    {"alpha": 1.0, "normalizer": 3.0},
)
each = pytest.mark.parametrize("options", OPTIONS, ids=str)


def inputs(dtype=torch.float64, *batch):
    torch.manual_seed(0)
    batch = batch or (4,)
    student, teacher = (torch.randn(*batch, 7, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(2))
    return student, teacher, torch.randint(7, batch)


def parts(student, teacher, labels, temperature=2.0, alpha=0.5, divergence="kl", direction="forward", beta=0.5, **rest):
    if divergence == "js":
        soft = td.js_div(student, teacher, beta=beta, temperature=temperature, **rest)
    else:
        soft = td.kl_div(student, teacher, direction=direction, temperature=temperature, **rest)
    return alpha * temperature**2 * soft + (1 - alpha) * td.cross_entropy(student, labels, **rest)


@each
def test_parts(options):
    for x in (inputs(), inputs(torch.float32, 2, 3), inputs(torch.bfloat16)):
        value = td.distillation_loss(*x, **options)
        torch.testing.assert_close(value, parts(*x, **options))
        for a, b in zip(*(torch.autograd.grad(v.sum(), x[:1]) for v in (value, parts(*x, **options))), strict=True):
            torch.testing.assert_close(a, b)


def test_without_labels():
    student, teacher, _ = inputs()
    torch.testing.assert_close(
        td.distillation_loss(student, teacher, temperature=3.0), 9 * td.kl_div(student, teacher, temperature=3.0)
    )


def test_topk():
    student, teacher, labels = inputs()
    log_probs, indices = (teacher / 2).log_softmax(-1).topk(3)
    loss = td.distillation_loss(student, None, labels, topk=(indices, log_probs))
    soft = td.kl_div_topk(student, indices, log_probs, temperature=2.0)
    torch.testing.assert_close(loss, 0.5 * 4 * soft + 0.5 * td.cross_entropy(student, labels))


@each
def test_ignored_rows(options):
    """A row of ignore_index, or of weight 0, contributes nothing to either term, whatever it holds."""
    student, teacher, labels = inputs()
    poisoned = student.detach().clone()
    poisoned[1] = torch.nan
    labels[1] = -100
    poisoned.requires_grad_()
    weight = torch.tensor([1.0, 1.0, 0.5, 2.0], dtype=torch.float64)
    keep = torch.tensor([0, 2, 3])
    value = td.distillation_loss(poisoned, teacher, labels, row_weight=weight, **options)
    expected = td.distillation_loss(student[keep], teacher[keep], labels[keep], row_weight=weight[keep], **options)
    torch.testing.assert_close(value[keep] if value.dim() else value, expected)
    (gradient,) = torch.autograd.grad(value.sum(), poisoned)
    assert (gradient[1] == 0).all() and gradient.isfinite().all()


@each
def test_derivatives(options):
    student, teacher, labels = inputs()

    def f(s, t):
        return td.distillation_loss(s, t, labels, **options)

    assert gradcheck(f, (student, teacher), check_forward_ad=True)
    assert gradgradcheck(f, (student, teacher))


@each
def test_transforms(options):
    x = inputs()

    def f(*t):
        return td.distillation_loss(*t, **options)

    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(*x), f(*x))
    batch = inputs(torch.float64, 2, 4)
    torch.testing.assert_close(torch.vmap(f)(*batch), torch.stack([f(*(t[i] for t in batch)) for i in range(2)]))


STUDENT, LABELS = torch.ones(4, 7), torch.zeros(4, dtype=torch.int64)
TOPK = (LABELS.unsqueeze(-1), torch.full((4, 1), -0.5))
BATCHMEAN = ["reduction", "batchmean", '"mean"', "normalizer=input.size(0)"]


@pytest.mark.parametrize(
    "arguments, options, words",
    (
        ((STUDENT, None), {}, ["teacher_logits", "topk"]),
        ((STUDENT, STUDENT), {"topk": TOPK}, ["teacher_logits", "topk"]),
        ((STUDENT, None), {"topk": TOPK, "divergence": "js"}, ["divergence", "js", "topk"]),
        ((STUDENT, STUDENT), {"alpha": 0.5}, ["alpha", "labels"]),
        ((STUDENT, STUDENT, LABELS), {"alpha": 1.5}, ["alpha", "1.5"]),
        ((STUDENT, STUDENT), {"divergence": "js", "direction": "reverse"}, ["direction", "js"]),
        ((STUDENT, STUDENT), {"beta": 0.3}, ["beta", "0.3", "kl"]),
        ((STUDENT, STUDENT), {"divergence": "w"}, ["divergence", "w"]),
        ((STUDENT, STUDENT), {"temperature": 0.0}, ["temperature", "0"]),
        ((STUDENT, STUDENT[:2]), {}, ["teacher_logits", "[2, 7]", "[4, 7]"]),
        ((STUDENT, STUDENT.double()), {}, ["teacher_logits", "Double"]),
        ((STUDENT, STUDENT.long()), {}, ["teacher_logits", "Long"]),
        ((STUDENT, None), {"topk": (TOPK[0][:2], TOPK[1])}, ["indices", "topk", "[2, 1]", "[4, 1]"]),
        ((STUDENT, None), {"topk": (TOPK[0], TOPK[1].double())}, ["log_probs", "topk", "Double"]),
        ((STUDENT, STUDENT, LABELS[:1]), {}, ["labels", "[1]", "[4]"]),
        ((STUDENT, STUDENT, LABELS.unsqueeze(-1)), {}, ["labels", "[4, 1]", "[4]"]),
        ((STUDENT, STUDENT, LABELS.float()), {}, ["labels", "Float"]),
        ((STUDENT, STUDENT, LABELS), {"row_weight": torch.ones(3)}, ["row_weight", "[3]", "[4]"]),
        ((STUDENT, STUDENT, LABELS), {"row_weight": -torch.ones(4)}, ["row_weight", "-1"]),
        ((STUDENT, STUDENT), {"row_weight": torch.ones(3)}, ["row_weight", "[3]", "[4]"]),
        ((STUDENT, STUDENT), {"reduction": "avg"}, ["reduction", "avg"]),
        ((STUDENT, STUDENT), {"reduction": "batchmean", "row_weight": torch.ones(4)}, BATCHMEAN),
        ((STUDENT.expand(2, 4, 7), STUDENT.expand(2, 4, 7)), {"reduction": "batchmean"}, BATCHMEAN),
        (
            (STUDENT.expand(2, 4, 7), STUDENT.expand(2, 4, 7), LABELS.expand(2, 4)),
            {"reduction": "batchmean"},
            BATCHMEAN,
        ),
        ((STUDENT, STUDENT), {"reduction": "batchmean", "normalizer": 2.0}, ["normalizer", "batchmean"]),
    ),
)
def test_bad_input(arguments, options, words):
    """Whatever the weights of the two terms."""
    for alpha in (None, 0.0, 1.0) if len(arguments) == 3 and "alpha" not in options else (options.get("alpha"),):
        with pytest.raises(ValueError) as error:
            td.distillation_loss(*arguments, **{**options, "alpha": alpha})
        assert all(word in str(error.value) for word in ("distillation_loss", *words)), error.value


@pytest.mark.parametrize(
    "teacher, topk, words",
    (
        (STUDENT[:2], None, ["teacher_logits", "[2, 7]"]),
        (STUDENT.double(), None, ["teacher_logits", "Double"]),
        (None, (TOPK[0], TOPK[1][:2]), ["log_probs", "[2, 1]"]),
        (None, (TOPK[0].int(), TOPK[1]), ["indices", "Int"]),
    ),
)
def test_bad_teacher_of_weight_0(teacher, topk, words):
    with pytest.raises(ValueError) as error:
        td.distillation_loss(STUDENT, teacher, LABELS, topk=topk, alpha=0.0)
    assert all(word in str(error.value) for word in ("distillation_loss", *words)), error.value


def test_batchmean():
    """Is "mean" with one leading dimension, as in kl_div and cross_entropy."""
    student, teacher, labels = inputs()
    labels[2] = -100
    for x in ((student, teacher), (student, teacher, labels)):
        assert torch.equal(td.distillation_loss(*x, reduction="batchmean"), td.distillation_loss(*x))


def test_row_weight_is_broadcast():
    x, weight = inputs(torch.float64, 2, 3), torch.tensor([1.0, 0.0, 2.0])
    whole = td.distillation_loss(*x, row_weight=weight.expand(2, 3))
    assert torch.equal(td.distillation_loss(*x, row_weight=weight), whole)


def test_module():
    x = inputs()
    for options in OPTIONS[:5]:
        criterion = pickle.loads(pickle.dumps(td.DistillationLoss(**options)))
        assert torch.equal(criterion(*x), td.distillation_loss(*x, **options))
        assert not criterion.state_dict()
    weight = torch.arange(4.0, dtype=torch.float64)
    assert torch.equal(
        td.DistillationLoss()(*x, row_weight=weight, normalizer=2),
        td.distillation_loss(*x, row_weight=weight, normalizer=2),
    )
