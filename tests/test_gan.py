"""The GAN's losses: formulas, the game's value on the optimal discriminator, and how they meet the rest of PyTorch."""

import math

import mpmath
import pytest
import torch
import torch_divergence as td
from torch.autograd import gradcheck, gradgradcheck

LOSSES = {
    "discriminator": (td.gan_discriminator_loss, 2),
    "nonsaturating": (td.gan_generator_loss, 1),
    "minimax": (lambda fake: td.gan_generator_loss(fake, kind="minimax"), 1),
    "js": (td.gan_js_estimate, 2),
}
each = pytest.mark.parametrize("loss, arguments", LOSSES.values(), ids=LOSSES)


def logits(arguments, dtype=torch.float64):
    torch.manual_seed(0)
    return tuple((4 * torch.randn(n, 2, dtype=torch.float64)).to(dtype).requires_grad_() for n in (5, 3)[:arguments])


@each
def test_derivatives(loss, arguments):
    x = logits(arguments)
    assert gradcheck(loss, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(loss, x, check_fwd_over_rev=True)


@each
def test_transforms(loss, arguments):
    x = logits(arguments)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*x), loss(*x))
    batch = tuple(torch.stack((t, 2 * t)) for t in x)
    torch.testing.assert_close(torch.vmap(loss)(*batch), torch.stack([loss(*x), loss(*(2 * t for t in x))]))


@each
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_dtypes(loss, arguments, dtype):
    x = logits(arguments, dtype)
    value = loss(*x)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), loss(*(t.double() for t in x)), rtol=1e-6, atol=1e-6)
    assert all(g.dtype == dtype for g in torch.autograd.grad(value, x))


def test_formulas():
    real, fake = logits(2)
    log_d, log_not_d = torch.sigmoid(real).log().mean(), (1 - torch.sigmoid(fake)).log().mean()
    torch.testing.assert_close(td.gan_discriminator_loss(real, fake), -(log_d + log_not_d))
    torch.testing.assert_close(td.gan_generator_loss(fake), -torch.sigmoid(fake).log().mean())
    torch.testing.assert_close(td.gan_generator_loss(fake, kind="minimax"), log_not_d)
    torch.testing.assert_close(td.gan_js_estimate(real, fake), (log_d + log_not_d + math.log(4)) / 2)


def test_digits_of_a_sure_discriminator():
    """softplus(-40) is 4e-18, not the 0 that 1 + e^-40 rounds to."""
    sure = torch.full((3,), 40.0, dtype=torch.float64)
    torch.testing.assert_close(td.gan_discriminator_loss(sure, -sure).item(), 2 * math.exp(-40), rtol=1e-12, atol=0)
    for size in (1000.0, 1e30, math.inf):
        x = torch.tensor([size], requires_grad=True)
        loss = td.gan_discriminator_loss(x, -x)
        assert loss == 0
        assert torch.autograd.grad(loss, x)[0] == 0
        assert td.gan_generator_loss(-x) == size


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("size", (1e-5, 1e-3, 0.9, 1.1, 30.0, 1000.0))
def test_digits_of_the_js_estimate(size, dtype):
    """Near 0 the estimate is the difference of log 4 and a number near it. To a few roundings of each sample's term."""
    torch.manual_seed(0)
    real, fake = ((size * torch.randn(50, dtype=torch.float64)).to(dtype).requires_grad_() for _ in range(2))
    value = td.gan_js_estimate(real, fake)
    gradients = torch.autograd.grad(value, (real, fake), create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in gradients), (real, fake))
    exact, total = 0, 0
    for x in (-real, fake):
        for logit in x.tolist():
            with mpmath.workdps(40):
                term = mpmath.log(2) - mpmath.log1p(mpmath.exp(mpmath.mpf(logit)))
                exact, total = exact + term / 100, total + abs(term) / 100
    eps = torch.finfo(dtype).eps
    assert abs(value.item() - exact) <= 8 * eps * total
    for x, g, h, sign in zip((real, fake), gradients, second, (1, -1), strict=True):
        s = torch.sigmoid(-sign * x.detach().double())
        torch.testing.assert_close(g.double(), sign * s / 100, rtol=4 * eps, atol=1e-44)
        torch.testing.assert_close(h.double(), -s * (1 - s) / 100, rtol=0, atol=4 * eps / 100)


def test_js_estimate_at_its_ends():
    for size in (0.0, 1.0, 1000.0, math.inf):
        x = torch.tensor([size], requires_grad=True)
        value = td.gan_js_estimate(x, -x)
        assert math.isclose(value.item(), math.log(2) - math.log1p(math.exp(-size)), rel_tol=1e-6)
        assert math.isclose(torch.autograd.grad(value, x)[0].item(), 1 / (1 + math.exp(min(size, 700))), abs_tol=1e-7)
        assert td.gan_js_estimate(-x, x).item() == pytest.approx(math.log(2) - size - math.log1p(math.exp(-size)))


def test_value_at_the_optimal_discriminator():
    """V = 2 JS(P, Q) - log 4 where D = p / (p + q), on samples that represent P and Q exactly."""
    p, q = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    optimal = p.double().log() - q.double().log()  # infinite where one of them is 0
    real, fake = (optimal.repeat_interleave(count.long()) for count in (p, q))
    m = (p + q).double() / 20
    js = sum(0.5 * torch.where(x > 0, x.double() / 10 * (x.double() / 10 / m).log(), 0).sum() for x in (p, q))
    torch.testing.assert_close(-td.gan_discriminator_loss(real, fake), 2 * js - math.log(4))
    torch.testing.assert_close(td.gan_js_estimate(real, fake), js)
    for other in (0.5 * optimal.nan_to_num(), optimal.nan_to_num(posinf=3, neginf=-3) + 0.7):
        real, fake = (other.repeat_interleave(count.long()) for count in (p, q))
        assert td.gan_js_estimate(real, fake) < js


@pytest.mark.parametrize(
    "call, words",
    (
        (lambda: td.gan_discriminator_loss(torch.ones(3), torch.ones(3, dtype=torch.int64)), ["fake_logits", "Long"]),
        (lambda: td.gan_discriminator_loss(torch.ones(3), torch.ones(3).double()), ["fake_logits", "float64"]),
        (lambda: td.gan_discriminator_loss(torch.ones(0), torch.ones(3)), ["real_logits", "[0]"]),
        (lambda: td.gan_js_estimate(torch.ones(3), torch.ones(3, device="meta")), ["fake_logits", "meta"]),
        (lambda: td.gan_generator_loss(torch.ones(3), kind="wasserstein"), ["kind", "wasserstein", "minimax"]),
        (lambda: td.gan_generator_loss(torch.ones(3, 0)), ["fake_logits", "[3, 0]"]),
    ),
)
def test_bad_input(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), error.value


def test_module():
    real, fake = logits(2)
    for kind in ("nonsaturating", "minimax"):
        criterion = td.GANLoss(kind=kind)
        assert criterion.discriminator(real, fake) == td.gan_discriminator_loss(real, fake)
        assert criterion.generator(fake) == td.gan_generator_loss(fake, kind=kind)
        assert not criterion.state_dict() and kind in repr(criterion)
