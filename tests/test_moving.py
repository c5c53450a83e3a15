"""docs/moving.md: every map from another library, as an identity in float64.

POT is in requirements-dev.txt. geomloss and OTT-JAX run where they are installed. Liger's kernels need a GPU and TRL a
stack of packages: their formulas are written out, from their documentation and papers.
"""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torch_divergence as td
from torch.distributions import Categorical, MultivariateNormal, Normal, kl_divergence

F64 = torch.float64
close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-12)
randn = partial(torch.randn, dtype=F64)


@pytest.fixture
def logits():
    """Student and teacher, (rows, classes)."""
    return 2 * randn(6, 5), 2 * randn(6, 5)


@pytest.fixture
def clouds():
    """x, y, a, b with weights of sum 1."""
    a, b = torch.rand(7, dtype=F64) + 0.2, torch.rand(9, dtype=F64) + 0.2
    return randn(7, 2), randn(9, 2) + 0.3, a / a.sum(), b / b.sum()


# ---- PyTorch


def test_torch_kl_div(logits):
    s, t = logits
    log_q, p, log_p = s.log_softmax(-1), t.softmax(-1), t.log_softmax(-1)
    batchmean = partial(F.kl_div, reduction="batchmean")
    close(td.kl_div(s, t), batchmean(log_q, p))
    both = {"space": "log_probs", "target_space": "probs"}
    close(td.kl_div(log_q, p, **both, reduction="sum"), F.kl_div(log_q, p, reduction="sum"))
    expected = F.kl_div(log_q, log_p, log_target=True, reduction="sum")
    close(td.kl_div(log_q, log_p, space="log_probs", reduction="sum"), expected)
    close(td.kl_div(s, t, reduction="none"), F.kl_div(log_q, p, reduction="none").sum(-1))
    with pytest.warns(UserWarning, match="batchmean"):
        mean = F.kl_div(log_q, p, reduction="mean")
    close(td.kl_div(s, t) / s.size(-1), mean)
    close(td.kl_div(s, t, direction="reverse"), batchmean(log_p, s.softmax(-1)))
    T = 3.0
    scaled = T**2 * batchmean((s / T).log_softmax(-1), (t / T).softmax(-1))
    close(T**2 * td.kl_div(s, t, temperature=T), scaled)
    close(td.distillation_loss(s, t, temperature=T), scaled)
    s, t = s.view(2, 3, 5), t.view(2, 3, 5)
    close(td.kl_div(s, t, normalizer=2), batchmean(s.log_softmax(-1), t.softmax(-1)))


def test_torch_cross_entropy(logits):
    s, t = logits
    labels, p, weight = torch.tensor([0, 4, -100, 2, 2, 1]), t.softmax(-1), torch.rand(5, dtype=F64)
    close(td.cross_entropy(s, labels), F.cross_entropy(s, labels))
    close(td.cross_entropy(s, labels, label_smoothing=0.1), F.cross_entropy(s, labels, label_smoothing=0.1))
    close(
        td.cross_entropy(s, labels.clamp_min(0), ignore_index=2),
        F.cross_entropy(s, labels.clamp_min(0), ignore_index=2),
    )
    close(td.cross_entropy(s, p), F.cross_entropy(s, p))
    close(td.cross_entropy(s, p, label_smoothing=0.1), F.cross_entropy(s, p, label_smoothing=0.1))
    kept = labels >= 0
    expected = F.cross_entropy(s[kept], labels[kept], weight=weight)
    close(td.cross_entropy(s[kept], labels[kept], row_weight=weight[labels[kept]]), expected)
    close(td.cross_entropy(s.log_softmax(-1), labels, space="log_probs"), F.nll_loss(s.log_softmax(-1), labels))
    image, pixels = randn(2, 5, 3, 4), torch.randint(5, (2, 3, 4))
    close(td.cross_entropy(image, pixels, dim=1), F.cross_entropy(image, pixels))
    soft = randn(2, 5, 3, 4).softmax(1)
    close(td.cross_entropy(image, soft, dim=1), F.cross_entropy(image, soft))
    nothing = torch.full((6,), -100)
    assert td.cross_entropy(s, nothing) == 0 and F.cross_entropy(s, nothing).isnan()


def test_torch_distributions(logits):
    s, t = logits
    close(td.kl_div(s, t, reduction="none"), kl_divergence(Categorical(logits=t), Categorical(logits=s)))
    close(td.entropy(s, reduction="none"), Categorical(logits=s).entropy())
    m1, m2, s1, s2 = randn(4, 3), randn(4, 3), randn(4, 3).exp(), randn(4, 3).exp()
    expected = kl_divergence(Normal(m1, s1), Normal(m2, s2)).sum(-1)
    close(td.gaussian_kl(m1, 2 * s1.log(), m2, 2 * s2.log(), reduction="none"), expected)
    L1, L2 = (torch.linalg.cholesky(torch.eye(3, dtype=F64) + r @ r.mT) for r in (randn(4, 3, 3), randn(4, 3, 3)))
    expected = kl_divergence(MultivariateNormal(m1, scale_tril=L1), MultivariateNormal(m2, scale_tril=L2))
    close(td.gaussian_kl_full(m1, L1, m2, L2, reduction="none"), expected)


def test_torch_bernoulli(logits):
    x, data = logits[0], torch.rand(6, 5, dtype=F64)
    mean, log_var = randn(6, 2), randn(6, 2)
    expected = F.binary_cross_entropy_with_logits(x, data, reduction="sum") + td.gaussian_kl(
        mean, log_var, reduction="sum"
    )
    close(td.vae_loss(x, data, mean, log_var, reduction="sum"), expected)


# ---- SciPy


def test_scipy(logits, clouds):
    distance = pytest.importorskip("scipy.spatial.distance", reason="SciPy is not installed")
    from scipy import special, stats

    same = partial(pytest.approx, rel=1e-12)
    q, p = (row.softmax(-1)[0] for row in logits)
    assert td.entropy(p, space="probs").item() == same(stats.entropy(p.numpy()))
    assert td.kl_div(q, p, space="probs").item() == same(stats.entropy(p.numpy(), q.numpy()))
    assert td.js_div(q, p, space="probs").sqrt().item() == same(distance.jensenshannon(p.numpy(), q.numpy()))
    q = 1.5 * q
    expected = special.kl_div(p.numpy(), q.numpy()).sum().item()
    assert (td.kl_div(q, p, space="probs") - p.sum() + q.sum()).item() == same(expected)
    u, v, a, b = clouds[0][:, 0], clouds[1][:, 0], *clouds[2:]
    assert td.wasserstein_1d(u, v, a, b).item() == same(stats.wasserstein_distance(u, v, a, b))


# ---- Liger and TRL, whose generalised JSD is one formula


def generalised_jsd(s, t, beta, temperature=1.0):
    """Agarwal et al., "On-Policy Distillation of Language Models", 2024, equation 1; a value a row."""
    log_q, log_p = (s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)

    def kl(log_a, log_b):
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    if beta in (0, 1):
        return kl(log_p, log_q) if beta == 0 else kl(log_q, log_p)
    log_m = torch.logaddexp(math.log(beta) + log_p, math.log1p(-beta) + log_q)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


@pytest.mark.parametrize("beta", (0, 0.1, 0.5, 0.9, 1))
def test_generalised_jsd(logits, beta):
    s, t = (x.view(2, 3, 5) for x in logits)
    labels = torch.tensor([[1, -100, 3], [0, 2, -100]])
    kept, T = labels != -100, 2.0
    if 0 < beta < 1:
        ours = partial(td.js_div, beta=beta)
    else:
        ours = partial(td.kl_div, direction="reverse" if beta else "forward")
    rows = generalised_jsd(s, t, beta, T)
    close(ours(s, t, temperature=T, row_weight=kept), rows[kept].sum() / kept.sum())
    close(ours(s, t, temperature=T, normalizer=2), rows.sum() / 2)
    close(ours(s, t, temperature=T, normalizer=7), rows.sum() / 7)
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    close(ours(log_q, log_p, space="log_probs", row_weight=kept), generalised_jsd(s, t, beta)[kept].mean())


def test_fused_linear_jsd():
    """The last layers are the caller's here."""
    x_s, x_t, w_s, w_t = randn(6, 3), randn(6, 4), randn(5, 3), randn(5, 4)
    got = td.js_div(x_s @ w_s.T, x_t @ w_t.T, beta=0.3, temperature=2.0)
    close(got, generalised_jsd(x_s @ w_s.T, x_t @ w_t.T, 0.3, 2.0).mean())


def test_topk_teacher(logits):
    s, t = logits
    log_p, indices = t.log_softmax(-1).topk(2)
    p, q = log_p.exp(), s.softmax(-1).gather(-1, indices)
    p_tail, q_tail = 1 - p.sum(-1), 1 - q.sum(-1)
    bucket = (p * (p / q).log()).sum(-1) + p_tail * (p_tail / q_tail).log()
    close(td.kl_div_topk(s, indices, log_p), bucket.mean())
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    close(td.kl_div_topk(s, indices, log_p, tail="renorm_both"), (p * (p / q).log()).sum(-1).mean())


def test_kl_estimators():
    log_p, log_ref = randn(8, requires_grad=True), randn(8)
    r = log_ref - log_p.detach()
    rows = partial(td.kl_estimate, log_p, log_ref, reduction="none")
    for kind, expected in (("k1", -r), ("k2", r**2 / 2), ("k3", r.exp() - 1 - r)):
        reward = rows(kind=kind, gradient="none")
        close(reward, expected)
        assert not reward.requires_grad
    (gradient,) = torch.autograd.grad(rows(kind="k3").sum(), log_p)
    close(gradient, 1 - r.exp())
    (gradient,) = torch.autograd.grad(rows(kind="k3", gradient="kl").sum(), log_p)
    close(gradient, -r)  # of r^2 / 2: in expectation that of KL(p || ref)


# ---- optimal transport


@pytest.mark.parametrize("p, cost", ((2, "half_sqeuclidean"), (1, "euclidean")))
@pytest.mark.parametrize("debias, reach", ((False, None), (True, None), (True, 1.2)))
def test_geomloss(clouds, p, cost, debias, reach):
    geomloss = pytest.importorskip("geomloss", reason="geomloss is not installed")
    x, y, a, b = clouds
    blur = 0.7
    # 2000 iterations at one temperature: its schedule alone does not converge.
    converged = {"diameter": blur * (1 + 1e-9), "scaling": 1 - 1e-9 / 2000}
    loss = geomloss.SamplesLoss("sinkhorn", p=p, blur=blur, debias=debias, reach=reach, **converged)
    got = td.sinkhorn_divergence(x, y, a, b, cost=cost, blur=blur, reach=reach, debias=debias, tol=1e-12)
    # With p = 1 it takes distances below 1e-4, those of the self terms' diagonals, as 1e-4.
    tolerance = 2e-4 if p == 1 and debias else 1e-10
    torch.testing.assert_close(got, loss(a, x, b, y), rtol=tolerance, atol=0)


@pytest.fixture
def ot():
    return pytest.importorskip("ot", reason="POT is not installed: see requirements-dev.txt")


def test_pot_entropic(ot, clouds):
    x, y, a, b = clouds
    M, eps = ot.dist(x, y), 0.5
    solved = td.sinkhorn(x, y, a, b, cost="sqeuclidean", eps=eps, tol=1e-13)
    value = ot.solve(M, a, b, reg=eps, max_iter=100_000, tol=1e-13).value
    close(solved.value, value)
    close(td.sinkhorn_cost(M, a, b, eps=eps, tol=1e-13), value)
    half = td.sinkhorn(x, y, a, b, eps=eps / 2, tol=1e-13)
    close(2 * half.value, value)
    tight = {"stopThr": 1e-14, "numItermax": 10_000}
    close(solved.plan(), ot.sinkhorn(a, b, M, eps, **tight))
    close(solved.transport_cost, torch.as_tensor(ot.sinkhorn2(a, b, M, eps, **tight)))
    entropies = sum(td.entropy(w, space="probs") for w in (a, b))
    other = ot.solve(M, a, b, reg=eps, reg_type="entropy", max_iter=100_000, tol=1e-13).value
    close(solved.value - eps * entropies, other)
    relaxed = td.sinkhorn(x, y, a, b, cost="sqeuclidean", eps=eps, rho=1.5, tol=1e-13)
    plan = ot.unbalanced.sinkhorn_unbalanced(a, b, M, eps, 1.5, reg_type="kl", **tight)
    close(relaxed.plan(), plan)


@pytest.mark.filterwarnings("ignore")  # of POT about its own
def test_pot_exact(ot, clouds):
    x, y, a, b = clouds
    close(td.wasserstein(x, y, a, b, p=2), ot.emd2(a, b, ot.dist(x, y)))
    close(td.wasserstein(x, y, a, b, p=1), ot.emd2(a, b, ot.dist(x, y, "euclidean")))
    for p in (1, 2):
        close(td.wasserstein_1d(x[:, 0], y[:, 0], a, b, p=p), ot.wasserstein_1d(x[:, 0], y[:, 0], a, b, p=p))
        theta = F.normalize(randn(2, 50), dim=0)
        expected = ot.sliced_wasserstein_distance(x, y, a, b, projections=theta, p=p)
        close(td.sliced_wasserstein(x, y, a, b, projections=theta.T, p=p) ** (1 / p), expected)
    (m1, C1), (m2, C2) = ((t.mean(0), torch.cov(t.T)) for t in (x, y))
    expected = ot.gaussian.bures_wasserstein_distance(m1, m2, C1, C2).squeeze()
    close(td.gaussian_wasserstein(m1, C1, m2, C2).sqrt(), expected)


@pytest.mark.filterwarnings("ignore")  # of JAX about itself
def test_ott(clouds):
    pytest.importorskip("ott", reason="OTT-JAX is not installed")
    import jax
    from ott.geometry.pointcloud import PointCloud
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn
    from ott.tools.sinkhorn_divergence import sinkdiv

    jax.config.update("jax_enable_x64", True)
    x, y, a, b = clouds
    xj, yj, aj, bj = (jax.numpy.asarray(t.numpy()) for t in clouds)
    eps, tight = 0.5, {"threshold": 1e-13, "max_iterations": 100_000}
    theirs = Sinkhorn(**tight)(LinearProblem(PointCloud(xj, yj, epsilon=eps), a=aj, b=bj))
    ours = td.sinkhorn(x, y, a, b, cost="sqeuclidean", eps=eps, tol=1e-13)

    def same(got, expected):
        torch.testing.assert_close(got, torch.tensor(expected.tolist(), dtype=F64), rtol=1e-10, atol=1e-11)

    same(ours.value, theirs.reg_ot_cost)
    same(ours.transport_cost, theirs.primal_cost)
    same(ours.plan(), theirs.matrix)
    same(ours.apply(b), theirs.apply(bj, axis=1))
    same(ours.apply(a, transpose=True), theirs.apply(aj, axis=0))
    f, g = ours.f + eps * a.log(), ours.g + eps * b.log()
    shift = f[0] - theirs.f[0].item()
    same(f - shift, theirs.f)
    same(g + shift, theirs.g)
    divergence, _ = sinkdiv(xj, yj, epsilon=eps, a=aj, b=bj, solve_kwargs=tight)
    same(td.sinkhorn_divergence(x, y, a, b, cost="sqeuclidean", eps=eps, tol=1e-13), divergence)
