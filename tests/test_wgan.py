"""The Wasserstein GAN's losses and the gradient penalty."""

import math

import pytest
import torch
import torch_divergence as td
from torch.autograd import gradcheck, gradgradcheck


def test_losses():
    real, fake = torch.randn(5, 1, dtype=torch.float64), torch.randn(3, 1, dtype=torch.float64)
    assert td.wgan_critic_loss(real, fake) == fake.mean() - real.mean()
    assert td.wgan_generator_loss(fake) == -fake.mean()
    x = (real.requires_grad_(), fake.requires_grad_())
    assert gradcheck(td.wgan_critic_loss, x, check_forward_ad=True) and gradgradcheck(td.wgan_critic_loss, x)
    compiled = torch.compile(td.wgan_critic_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*x), td.wgan_critic_loss(*x))
    half = torch.full((4096,), 30000.0, dtype=torch.float16)  # whose sum overflows in half precision
    assert td.wgan_generator_loss(half) == -30000
    criterion = td.WassersteinGANLoss()
    assert criterion.critic(*x) == td.wgan_critic_loss(*x) and criterion.generator(fake) == -fake.mean()


def seeded(seed):
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def critic_of(dtype=torch.float64):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 1)).to(dtype)


def samples(dtype=torch.float64, shape=(7, 2, 3)):
    torch.manual_seed(1)
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)


def test_gradient_penalty():
    """Against the same interpolates, sample by sample, and the critic's parameters against finite differences."""
    critic, (real, fake) = critic_of(), samples()

    def score(u):
        return critic(u.flatten(1))

    def penalty():
        return td.gradient_penalty(score, real, fake, target=0.5, generator=seeded(3))

    e = torch.rand(7, 1, 1, dtype=torch.float64, generator=seeded(3))
    expected = 0.0
    for u in e * real + (1 - e) * fake:
        u = u.unsqueeze(0).requires_grad_()
        expected += (torch.autograd.grad(score(u), u)[0].norm() - 0.5) ** 2 / 7
    torch.testing.assert_close(penalty(), expected)
    with torch.no_grad():
        value = penalty()
        assert not value.requires_grad
        torch.testing.assert_close(value, expected)

    weight = critic[0].weight
    (gradient,) = torch.autograd.grad(penalty(), weight)
    direction = torch.randn_like(weight)
    with torch.no_grad():
        values = []
        for h in (1e-5, -1e-5):
            weight += h * direction
            values.append(penalty())
            weight -= h * direction
    torch.testing.assert_close((gradient * direction).sum(), (values[0] - values[1]) / 2e-5, rtol=1e-6, atol=1e-8)


def test_gradient_penalty_of_a_flat_critic():
    """Norm 0: the value is target^2, and the derivative 0, not NaN."""
    critic, (real, fake) = torch.nn.Linear(6, 1), samples(torch.float32, (4, 6))
    with torch.no_grad():
        critic.weight.zero_()
    loss = td.gradient_penalty(critic, real, fake)
    assert loss == 1
    assert (torch.autograd.grad(loss, critic.weight)[0] == 0).all()


def test_gradient_penalty_is_reproducible_and_leaves_grad_mode():
    critic, (real, fake) = critic_of(), samples(shape=(5, 6))
    a, b = (td.gradient_penalty(critic, real, fake, generator=seeded(1)) for _ in range(2))
    assert a == b and torch.is_grad_enabled()
    assert all(p.grad is None for p in critic.parameters())
    torch.manual_seed(5)
    c = td.gradient_penalty(critic, real, fake)
    torch.manual_seed(5)
    assert td.gradient_penalty(critic, real, fake) == c


@pytest.mark.parametrize(
    "critic, real, fake, words",
    (
        (critic_of(), torch.ones(3, 6), torch.ones(2, 6), ["fake", "(2, 6)", "(3, 6)"]),
        (critic_of(), torch.ones(3, 6), torch.ones(3, 6).double(), ["fake", "float64"]),
        (critic_of(), torch.ones(3, 6).long(), torch.ones(3, 6).long(), ["real", "int64"]),
        (critic_of(), torch.ones(0, 6), torch.ones(0, 6), ["real", "(0, 6)"]),
        (lambda u: u, torch.ones(3, 6), torch.ones(3, 6), ["critic", "(3, 6)"]),
        (lambda u: u.mean(), torch.ones(3, 6), torch.ones(3, 6), ["critic", "()"]),
        (lambda u: torch.ones(3), torch.ones(3, 6), torch.ones(3, 6), ["critic", "graph"]),
        (lambda u: torch.ones(3, requires_grad=True) * 1, torch.ones(3, 6), torch.ones(3, 6), ["critic", "depend"]),
    ),
)
def test_bad_input(critic, real, fake, words):
    with pytest.raises(ValueError) as error:
        td.gradient_penalty(critic, real, fake)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("target", (-1.0, math.nan, math.inf))
def test_bad_target(target):
    with pytest.raises(ValueError, match=f"gradient_penalty: target is {target}, expected a finite number >= 0"):
        td.gradient_penalty(critic_of(), *samples(), target=target)


def test_critic_estimates_the_distance():
    """Of two points a apart, a 1-Lipschitz critic's loss is -W1 = -a: reached by training with the penalty."""
    torch.manual_seed(0)
    critic = torch.nn.Linear(1, 1).double()
    with torch.no_grad():
        critic.weight.fill_(0.1)
    optimizer = torch.optim.Adam(critic.parameters(), lr=0.05)
    real, fake = torch.full((8, 1), 3.0, dtype=torch.float64), torch.zeros(8, 1, dtype=torch.float64)
    for _ in range(300):
        optimizer.zero_grad()
        loss = td.wgan_critic_loss(critic(real), critic(fake)) + 1000 * td.gradient_penalty(critic, real, fake)
        loss.backward()
        optimizer.step()
    assert math.isclose(-td.wgan_critic_loss(critic(real), critic(fake)).item(), 3.0, rel_tol=0.01)
