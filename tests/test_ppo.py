"""PPO's losses against their formula where it is safe, and where overflow, padding and clipping make it unsafe."""

import math
import pickle

import pytest
import torch
import torch_divergence as td
from torch.autograd import gradcheck, gradgradcheck

LOSSES = {
    "clip": lambda x, old, a, **k: td.ppo_clip_loss(x, old, a, clip=0.2, clip_high=0.3, **k),
    "penalty": lambda x, old, a, **k: td.ppo_kl_penalty_loss(x, old, a, (x - old) ** 2, kl_coef=0.5, **k),
}
each = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def textbook(loss, x, old, a):
    ratio = (x - old).exp()
    if loss is LOSSES["clip"]:
        return -torch.min(ratio * a, ratio.clamp(0.8, 1.3) * a)
    return -ratio * a + 0.5 * (x - old) ** 2


def inputs(*shape, dtype=torch.float64):
    torch.manual_seed(0)
    x, old, a = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    return tuple(t.to(dtype).requires_grad_() for t in (old + 0.4 * x, old, a))


@each
def test_formula(loss):
    x = inputs(40, 50)
    expected = textbook(loss, *x)
    rows = loss(*x, reduction="none")
    torch.testing.assert_close(rows, expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(torch.autograd.grad(rows.sum(), x), torch.autograd.grad(expected.sum(), x))
    torch.testing.assert_close(loss(*x), textbook(loss, *x).mean())
    weight = torch.rand(50, dtype=torch.float64)
    torch.testing.assert_close(loss(*x, row_weight=weight), (textbook(loss, *x) * weight).sum() / (40 * weight.sum()))
    torch.testing.assert_close(loss(*x, normalizer=7), textbook(loss, *x).sum() / 7)


@each
def test_derivatives(loss):
    x = inputs(5, 2)
    for reduction in ("none", "mean"):

        def f(*t, reduction=reduction):
            return loss(*t, reduction=reduction)

        assert gradcheck(f, x, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(f, x)


@each
def test_transforms(loss):
    x = inputs(4, 3)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*x), loss(*x))
    torch.testing.assert_close(torch.vmap(lambda *t: loss(*t, reduction="none"))(*x), loss(*x, reduction="none"))


@each
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_dtypes(loss, dtype):
    x = inputs(9, dtype=dtype)
    value = loss(*x, reduction="none") if loss is LOSSES["clip"] else td.ppo_kl_penalty_loss(*x, x[2], kl_coef=0.5)
    assert value.dtype == torch.float32
    assert all(g is None or g.dtype == dtype for g in torch.autograd.grad(value.sum(), x))


def test_overflow():
    """A ratio beyond float's range: clipped entries, and those of advantage 0, have gradient exactly 0."""
    x = torch.tensor([500.0, 500.0, 500.0, -500.0, -500.0], requires_grad=True)
    a = torch.tensor([1.0, 0.0, -1.0, 1.0, -1.0])
    rows = td.ppo_clip_loss(x, torch.zeros(5), a, reduction="none")
    torch.testing.assert_close(rows, torch.tensor([-1.2, 0.0, math.inf, 0.0, 0.8]))
    (gradient,) = torch.autograd.grad(rows.sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 0.0, math.inf, 0.0, 0.0]))
    zero = td.ppo_kl_penalty_loss(x[:2], torch.zeros(2), a[1:2].expand(2), torch.zeros(2), kl_coef=1.0)
    assert zero == 0 and (torch.autograd.grad(zero, x)[0] == 0).all()


@each
@pytest.mark.parametrize("kind", (torch.bool, torch.float64), ids=str)
def test_padding(loss, kind):
    """Entries of weight 0 contribute exactly nothing, whatever they hold."""
    x = inputs(6)
    keep = torch.tensor([1, 1, 0, 1, 0, 0]).to(kind)
    poisoned = []
    for t, poison in zip(x, (-math.inf, -math.inf, math.nan), strict=True):
        t = t.detach().clone()
        t[keep == 0] = poison
        poisoned.append(t.requires_grad_())
    if loss is LOSSES["clip"]:
        f = loss
    else:

        def f(a, b, c, **k):
            return td.ppo_kl_penalty_loss(a, b, c, c, kl_coef=0.5, **k)

    value = f(*poisoned, row_weight=keep)
    torch.testing.assert_close(value, f(*(t[keep != 0] for t in x)))
    for g in torch.autograd.grad(value, poisoned):
        assert g.isfinite().all() and (g[keep == 0] == 0).all()
    assert f(*poisoned, row_weight=torch.zeros(6).to(kind)) == 0


@pytest.mark.parametrize("kl", (math.inf, math.nan, 2.0))
@pytest.mark.parametrize("shape", ((), (4,)))
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_coefficient_0_leaves_the_divergence_out(kl, shape, reduction):
    x = inputs(4)
    kl = torch.full(shape, kl, dtype=torch.float64, requires_grad=True)
    value = td.ppo_kl_penalty_loss(*x, kl, kl_coef=0.0, reduction=reduction)
    expected = -(x[0] - x[1]).exp() * x[2]
    torch.testing.assert_close(value, expected if reduction == "none" else expected.mean())
    (gradient,) = torch.autograd.grad(value.sum(), kl)
    assert gradient.shape == shape and (gradient == 0).all()


BAD = (
    (lambda x: td.ppo_clip_loss(x, x[:2], x), ["old_log_prob", "[2]", "[3]"]),
    (lambda x: td.ppo_clip_loss(x, x, x.double()), ["advantage", "float64"]),
    (lambda x: td.ppo_clip_loss(x.long(), x, x), ["log_prob", "Long"]),
    (lambda x: td.ppo_clip_loss(x, x, x, clip=0.0), ["clip", "0"]),
    (lambda x: td.ppo_clip_loss(x, x, x, clip=1.5), ["clip", "1.5"]),
    (lambda x: td.ppo_clip_loss(x, x, x, clip_high=-1.0), ["clip_high", "-1"]),
    (lambda x: td.ppo_clip_loss(x, x, x, reduction="avg"), ["reduction", "avg"]),
    (lambda x: td.ppo_clip_loss(x, x, x, row_weight=-x), ["row_weight", "-1"]),
    (lambda x: td.ppo_clip_loss(x, x, x, row_weight=x[:2]), ["row_weight", "[2]"]),
    (lambda x: td.ppo_clip_loss(x, x, x, normalizer=0), ["normalizer", "0"]),
    (lambda x: td.ppo_kl_penalty_loss(x, x, x, x[:2], kl_coef=1.0), ["kl", "[2]"]),
    (lambda x: td.ppo_kl_penalty_loss(x, x, x, x, kl_coef=-1.0), ["kl_coef", "-1"]),
    (lambda x: td.AdaptiveKLController(-1, 1, 1), ["init", "-1"]),
    (lambda x: td.AdaptiveKLController(1, 0, 1), ["target", "0"]),
    (lambda x: td.AdaptiveKLController(1, 1, math.inf), ["horizon", "inf"]),
    (lambda x: td.AdaptiveKLController(1, 1, 1).update(math.nan, 1), ["kl", "NaN"]),
    (lambda x: td.AdaptiveKLController(1, 1, 1).update(1.0, -1), ["n is -1"]),
    (lambda x: td.AdaptiveKLController(1, 1, 1).update(1.0, math.nan), ["n is nan"]),
    (lambda x: td.AdaptiveKLController(1, 1, 100).update(0.0, 1000), ["n is 1000", "horizon of 100", "positive"]),
    (lambda x: td.AdaptiveKLController(1, 1, 100).update(0.0, 500), ["n is 500", "horizon of 100", "positive"]),
    (lambda x: td.AdaptiveKLController(1, 1, 1).load_state_dict({"value": math.nan}), ["value", "nan"]),
    (lambda x: td.AdaptiveKLController(1, 1, 1).load_state_dict({"value": -1.0}), ["value", "-1"]),
)


@pytest.mark.parametrize("call, words", BAD)
def test_bad_input(call, words):
    with pytest.raises(ValueError) as error:
        call(torch.ones(3))
    assert all(word in str(error.value) for word in words), error.value


def test_controller():
    controller = td.AdaptiveKLController(init=0.2, target=6.0, horizon=10000)
    assert math.isclose(controller.update(6.6, 1000), 0.2 * (1 + 0.1 * 0.1))
    before = controller.value
    assert math.isclose(controller.update(1e9, 10000), before * 1.2)  # at most a fifth over the horizon
    assert math.isclose(controller.update(0.0, 10000), before * 1.2 * 0.8)
    before = controller.value
    with pytest.raises(ValueError):
        controller.update(0.0, 50000)
    assert controller.value == before
    assert math.isclose(controller.update(0.0, 49999), before * (1 - 0.99998))
    other = td.AdaptiveKLController(1.0, 6.0, 10000)
    other.load_state_dict(pickle.loads(pickle.dumps(controller.state_dict())))
    assert other.value == controller.value


def test_modules():
    x = inputs(6)
    clip, penalty = td.PPOClipLoss(clip=0.1, reduction="sum"), td.PPOKLPenaltyLoss(kl_coef=0.3)
    weight = torch.arange(6) < 4
    assert clip(*x, row_weight=weight) == td.ppo_clip_loss(*x, clip=0.1, reduction="sum", row_weight=weight)
    assert penalty(*x, x[0] ** 2, normalizer=3) == td.ppo_kl_penalty_loss(*x, x[0] ** 2, kl_coef=0.3, normalizer=3)
    assert repr(pickle.loads(pickle.dumps(clip))) == repr(clip) and not clip.state_dict()
