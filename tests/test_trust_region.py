"""trust_region_step: the bound is held by measurement, a refused step leaves no trace."""

import math

import pytest
import torch
import torch_divergence as td


def problem(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    policy = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).to(dtype)
    states = torch.randn(64, 4, dtype=dtype)
    advantage = torch.randn(64, 3, dtype=dtype)
    old = policy(states).detach()

    def surrogate():
        return (policy(states).softmax(-1) * advantage).sum(-1).mean()

    def kl():
        return td.kl_div(policy(states), old)

    return list(policy.parameters()), surrogate, kl


@pytest.mark.parametrize("max_kl", (1e-6, 1e-2, 1.0))
def test_bound_holds(max_kl):
    for seed in range(3):
        params, surrogate, kl = problem(seed)
        before = surrogate().item()
        result = td.trust_region_step(params, surrogate, kl, max_kl=max_kl, damping=1e-3)
        assert result.accepted and 0 < result.kl <= max_kl and result.improvement > 0
        assert math.isclose(kl().item(), result.kl, rel_tol=1e-9)
        assert math.isclose(surrogate().item() - before, result.improvement, rel_tol=1e-6)
        assert all(p.grad is None for p in params)
        assert result.kl > 0.05 * max_kl  # the step uses the region


def test_natural_gradient():
    """One softmax, a small region: the step is along H^+ g, as computed densely, and full or halved."""
    logits = torch.tensor([0.3, -0.2, 0.9, 0.0], dtype=torch.float64, requires_grad=True)
    old, advantage = logits.detach().clone(), torch.tensor([1.0, -0.5, 0.2, 0.0], dtype=torch.float64)
    p = old.softmax(-1)
    fisher, g = torch.diag(p) - torch.outer(p, p), p * (advantage - (p * advantage).sum())
    direction = torch.linalg.pinv(fisher) @ g
    expected = math.sqrt(2 * 1e-8 / (direction @ fisher @ direction)) * direction
    td.trust_region_step(
        [logits], lambda: (logits.softmax(-1) * advantage).sum(), lambda: td.kl_div(logits, old), max_kl=1e-8
    )
    step, expected = (x - x.mean() for x in (logits.detach() - old, expected))
    halvings = torch.log2(expected.norm() / step.norm()).round()
    assert halvings in (0, 1)
    torch.testing.assert_close(step * 2**halvings, expected, rtol=1e-3, atol=1e-9)


def tabular(seed, dtype, scale=1.0):
    """Logits themselves: one direction a row costs nothing, and the Hessian's null space is a quarter of the whole."""
    torch.manual_seed(seed)
    logits, advantage = torch.zeros(4, 3, dtype=dtype, requires_grad=True), torch.randn(4, 3, dtype=torch.float64)
    old, advantage = logits.detach().clone(), advantage.to(dtype)
    return logits, lambda: scale * (logits.softmax(-1) * advantage).sum(), lambda: td.kl_div(logits, old)


def test_null_space_of_the_hessian():
    """A row's logits may be shifted together at no cost: rounding must not send the step that way."""
    for seed in range(30):
        exact, surrogate, kl = tabular(seed, torch.float64)
        wanted = td.trust_region_step([exact], surrogate, kl, max_kl=0.02)
        logits, surrogate, kl = tabular(seed, torch.float32)
        result = td.trust_region_step([logits], surrogate, kl, max_kl=0.02, cg_iters=10 + seed)
        assert wanted.accepted and result.accepted
        torch.testing.assert_close(logits.double(), exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", (1e20, 1e-30))
def test_scale_of_the_surrogate(scale):
    plain, surrogate, kl = tabular(0, torch.float32)
    assert td.trust_region_step([plain], surrogate, kl).accepted
    logits, surrogate, kl = tabular(0, torch.float32, scale)
    assert td.trust_region_step([logits], surrogate, kl).accepted
    torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("closure", ("surrogate", "kl"))
@pytest.mark.parametrize("call", (1, 2, 3))
def test_error_in_a_closure_restores_the_parameters(closure, call):
    params, surrogate, kl = problem()
    before = [p.detach().clone() for p in params]
    calls = [0]

    def failing(f):
        def g():
            calls[0] += 1
            if calls[0] == call:
                raise RuntimeError("stop")
            # Of the trial steps none is good enough.
            return f() if torch.is_grad_enabled() else f() * math.nan

        return g

    closures = {"surrogate": surrogate, "kl": kl}
    closures[closure] = failing(closures[closure])
    with pytest.raises(RuntimeError, match="stop"):
        td.trust_region_step(params, **closures)
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


@pytest.mark.parametrize("reason", ("no improvement", "nan", "too far", "no gradient"))
def test_refused_step_restores_the_parameters(reason):
    params, surrogate, kl = problem()
    before = [p.detach().clone() for p in params]
    calls = [0]

    def objective():
        calls[0] += 1
        if reason == "no gradient":
            return 0 * surrogate()
        if calls[0] == 1:
            return surrogate()
        return {"no improvement": -1e9, "nan": math.nan}.get(reason, 1e9) + 0 * surrogate()

    def distance():
        return kl() + (1.0 if reason == "too far" and calls[0] > 0 and not torch.is_grad_enabled() else 0.0)

    result = td.trust_region_step(params, objective, distance, backtracks=3)
    assert result == (False, 0.0, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert calls[0] <= 4


def test_parameters_apart_from_the_loss():
    params, surrogate, kl = problem()
    unused = torch.ones(3, dtype=torch.float64, requires_grad=True)
    assert td.trust_region_step([*params, unused], surrogate, kl, damping=1e-3).accepted
    assert (unused == 1).all()


@pytest.mark.parametrize(
    "change, words",
    (
        ({"max_kl": 0.0}, ["max_kl", "0"]),
        ({"damping": -1.0}, ["damping", "-1"]),
        ({"cg_iters": 0}, ["cg_iters", "0"]),
        ({"backtracks": 0}, ["backtracks", "0"]),
        ({"params": []}, ["params", "empty"]),
        ({"params": [torch.ones(2)]}, ["params", "(2,)"]),
        ({"surrogate": lambda: torch.ones(2, requires_grad=True) * 2}, ["surrogate", "(2,)"]),
        ({"surrogate": lambda: 1.0}, ["surrogate", "float", "tensor"]),
        ({"surrogate": lambda: torch.ones(())}, ["surrogate", "graph"]),
        ({"kl": lambda: 0.0}, ["kl", "float", "tensor"]),
        ({"kl": lambda: torch.zeros(())}, ["kl", "graph"]),
        ({"kl": lambda: 2 * torch.ones((), requires_grad=True)}, ["kl", "second derivative"]),
    ),
)
def test_bad_input(change, words):
    params, surrogate, kl = problem()
    arguments = {"params": params, "surrogate": surrogate, "kl": kl, **change}
    with pytest.raises(ValueError) as error:
        td.trust_region_step(**arguments)
    assert all(word in str(error.value) for word in words), error.value
