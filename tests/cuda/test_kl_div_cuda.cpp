// The CUDA kernels of KL divergence on the emulated device: values and derivatives against long double and against the
// CPU kernels, over sizes, dtypes, spaces, layouts and masks, in several orders of the threads. Whatever the checker
// finds (emulator/simt.cpp) fails the test that launched the kernel.
#include "kl_div/kl_div.h"
#include "row_pair_test.h"

namespace {

// -- Reference -------------------------------------------------------------------------------------------------------

struct Exact {
  Real kl = 0;
  Real terms = 0;  // what the error of kl is relative to
  std::vector<Real> grad_p, grad_q, d_p, d_q;
  Real scale_p = 0, scale_q = 0;  // what the errors of grad_p, grad_q are relative to
  Real kl_dot = 0;
};

Real phi(Real u) {  // e^-u - 1 + u
  if (std::fabs(u) > 0.01L) return std::expm1(-u) + u;
  Real series = 1;
  for (int k = 11; k > 2; --k) series = 1 - u / k * series;
  return u * u / 2 * series;
}

Exact exact(const std::vector<Real>& t, const std::vector<Real>& s, const std::vector<Real>& v_p,
            const std::vector<Real>& v_q, int p_space, int q_space, Real temperature) {
  const size_t n = t.size();
  const bool logits = p_space == td::kLogits && q_space == td::kLogits;
  const auto log_p = log_probs(t, p_space, temperature), log_q = log_probs(s, q_space, temperature);
  std::vector<Real> p(n), q(n), l(n), gap(n), size(n);
  Exact e;
  Real mass = 0;
  for (size_t j = 0; j < n; ++j) {
    p[j] = p_space == td::kProbs ? t[j] : std::exp(log_p[j]);
    q[j] = q_space == td::kProbs ? s[j] : std::exp(log_q[j]);
    l[j] = p[j] == 0 ? (std::isnan(log_q[j]) ? log_q[j] : 0) : log_p[j] - log_q[j];
    if (p[j] != 0 && p_space == td::kProbs && q_space == td::kProbs && std::fabs(p[j] - q[j]) < q[j] / 2)
      l[j] = std::log1p((p[j] - q[j]) / q[j]);
    mass += p[j];
    const auto terms_of = [&](Real x, Real log, int space) {
      return space == td::kLogits ? std::fabs(x / temperature) + std::fabs(x / temperature - log) : std::fabs(log);
    };
    size[j] = p[j] == 0            ? 0
              : p_space == q_space ? std::fabs(l[j])
                                   : terms_of(t[j], log_p[j], p_space) + terms_of(s[j], log_q[j], q_space);
    if (logits) {
      e.kl += std::fabs(l[j]) < 1 && p[j] > 0 ? p[j] * phi(l[j]) : q[j] - p[j] + p[j] * l[j];
    } else {
      e.kl += p[j] * l[j];
      e.terms += std::fabs(p[j] * size[j]);
    }
  }
  if (logits) e.terms = e.kl;
  const bool infinite = std::isinf(e.kl);
  Real centre = 0;
  for (size_t j = 0; j < n; ++j) centre += p[j] == 0 ? 0 : p[j] * l[j];
  const auto zero_or = [&](bool zero, Real x) { return zero ? 0 : x; };
  Real others = 0;
  for (size_t j = 0; j < n; ++j) {
    gap[j] = logits && std::fabs(l[j]) < 1 && p[j] > 0 ? p[j] * std::expm1(-l[j]) : q[j] * mass - p[j];
    const Real g = p_space == td::kLogits ? zero_or(infinite, p[j] * (l[j] - (logits ? centre : e.kl)) / temperature)
                                          : (p_space == td::kProbs ? 1 : p[j]) * (l[j] + 1);
    e.grad_p.push_back(zero_or(p[j] == 0, g));
    e.grad_q.push_back(q_space == td::kLogits     ? gap[j] / temperature
                       : q_space == td::kLogProbs ? -p[j]
                                                  : zero_or(p[j] == 0, -p[j] / q[j]));
    if (logits && p[j] <= 0.5L) others += e.grad_p[j];
  }
  for (size_t j = 0; logits && j < n; ++j)
    if (p[j] > 0.5L) e.grad_p[j] = -others;
  e.scale_p = largest(e.grad_p), e.scale_q = largest(e.grad_q);
  if (!logits) {
    for (size_t j = 0; j < n; ++j) {
      const Real of_p = p_space == td::kLogits  ? p[j] * (size[j] + e.terms) / temperature
                        : p_space == td::kProbs ? size[j] + 1
                                                : p[j] * (size[j] + 1);
      if (std::isfinite(of_p)) e.scale_p = std::max(e.scale_p, of_p);
      if (q_space == td::kLogits) e.scale_q = std::max(e.scale_q, (q[j] * mass + p[j]) / temperature);
    }
  }
  // Along (v_p, v_q).
  Real mean_p = 0, mean_q = 0;
  for (size_t j = 0; j < n; ++j) {
    mean_p += p_space == td::kProbs ? v_p[j] : p[j] * v_p[j];
    mean_q += q[j] * v_q[j];
    e.kl_dot += zero_or(v_p[j] == 0, e.grad_p[j] * v_p[j]) + zero_or(v_q[j] == 0, e.grad_q[j] * v_q[j]);
  }
  for (size_t j = 0; j < n; ++j) {
    const Real log_p_dot = zero_or(p[j] == 0, p_space == td::kLogits  ? (v_p[j] - mean_p) / temperature
                                              : p_space == td::kProbs ? v_p[j] / p[j]
                                                                      : v_p[j]);
    const Real log_q_dot = zero_or(q[j] == 0, q_space == td::kLogits  ? (v_q[j] - mean_q) / temperature
                                              : q_space == td::kProbs ? v_q[j] / q[j]
                                                                      : v_q[j]);
    const Real p_dot = p_space == td::kProbs ? v_p[j] : p[j] * log_p_dot, l_dot = log_p_dot - log_q_dot;
    const Real mass_dot = p_space == td::kLogits ? 0 : mean_p;
    const Real of_p =
        p_space == td::kLogits
            ? zero_or(infinite, (p_dot * (l[j] - (logits ? centre : e.kl)) + p[j] * (l_dot - e.kl_dot)) / temperature)
        : p_space == td::kLogProbs ? p_dot * (l[j] + 1) + p[j] * l_dot
                                   : l_dot;
    e.d_p.push_back(zero_or(p[j] == 0, of_p));
    e.d_q.push_back(q_space == td::kLogits     ? (q[j] * (log_q_dot * mass + mass_dot) - p_dot) / temperature
                    : q_space == td::kLogProbs ? -p_dot
                                               : zero_or(q[j] == 0, (p[j] * log_q_dot - p_dot) / q[j]));
  }
  return e;
}

Exact exact_row(const Problem& in, int64_t i) {
  return exact(in.p.row(i), in.q.row(i), in.v_p.row(i), in.v_q.row(i), in.rows().p_space, in.rows().q_space,
               static_cast<Real>(in.rows().temperature));
}

// Runs all three kernels and compares all that they leave.
void check_all(const Case& c, const Problem& in) {
  const int64_t n = c.rows, v = c.classes;
  const DType real = in.is_double() ? DType::Double : DType::Float;
  const Real ulp = in.is_double() ? 0x1p-52L : 0x1p-23L, accuracy = in.is_double() ? 1e-11L : 2e-6L;
  Memory loss(real, n, "loss", false), stat(DType::Double, n * td::KlDivStat::kSize, "stat", false);
  Memory workspace(DType::Double, td::cuda::kl_div_workspace(n, v), "workspace", false);
  Memory d_coefficient(DType::Double, n, "d_coefficient", false);
  const td::RowPair rows = in.rows();
  td::cuda::kl_div_forward({rows, in.weight.data<double>(), loss.data(), in.is_double(), stat.data<double>()}, n,
                           workspace.data<double>(), nullptr);
  const auto backward = [&](const Rows* grad_p, const Rows* grad_q) {
    Memory space(DType::Double, td::cuda::kl_div_workspace(n, v), "workspace", false);
    td::cuda::kl_div_backward(
        {rows, in.coefficient.data<double>(), stat.data<double>(), grad_p != nullptr ? grad_p->out() : td::RowsOut{},
         grad_q != nullptr ? grad_q->out() : td::RowsOut{}},
        n, space.data<double>(), nullptr);
  };
  const Rows grad_p(in.p.type(), n, v, c.grad_p, "grad_p", false), grad_q(in.q.type(), n, v, c.grad_q, "grad_q", false),
      alone_p(in.p.type(), n, v, c.grad_q, "grad_p alone", false),
      alone_q(in.q.type(), n, v, {}, "grad_q alone", false), d_p(in.p.type(), n, v, {}, "d_p", false),
      d_q(in.q.type(), n, v, c.grad_q, "d_q", false);
  backward(&grad_p, &grad_q);
  backward(&alone_p, nullptr);
  backward(nullptr, &alone_q);
  Memory space(DType::Double, td::cuda::kl_div_workspace(n, v), "workspace", false);
  td::cuda::kl_div_double_backward({rows, in.v_p.in(), in.v_q.in(), in.coefficient.data<double>(), stat.data<double>(),
                                    d_coefficient.data<double>(), d_p.out(), d_q.out()},
                                   n, space.data<double>(), nullptr);
  for (int64_t i = 0; i < n; ++i) {
    const Real weight = in.weight.get(i), g = in.coefficient.get(i);
    if (weight == 0) {
      ASSERT_EQ(loss.get(i), 0);
      for (int64_t j = 0; j < v; ++j)
        for (const Rows* x : {&grad_p, &grad_q, &alone_p, &alone_q, &d_p, &d_q}) ASSERT_EQ(x->get(i, j), 0);
      continue;
    }
    const Exact e = exact_row(in, i);
    const Real allowed = in.logits() ? accuracy * e.terms : 8 * ulp * e.terms;
    ASSERT_NO_FATAL_FAILURE(expect_close(loss.get(i), weight * e.kl, weight * allowed, real, "loss", i, -1));
    const Real of_p = std::fabs(g) * accuracy * e.scale_p, of_q = std::fabs(g) * accuracy * e.scale_q;
    ASSERT_NO_FATAL_FAILURE(expect_rows(grad_p, i, e.grad_p, g, of_p, "grad_p"));
    ASSERT_NO_FATAL_FAILURE(expect_rows(grad_q, i, e.grad_q, g, of_q, "grad_q"));
    ASSERT_NO_FATAL_FAILURE(expect_rows(alone_p, i, e.grad_p, g, of_p, "grad_p alone"));
    ASSERT_NO_FATAL_FAILURE(expect_rows(alone_q, i, e.grad_q, g, of_q, "grad_q alone"));
    if (std::isnan(e.kl) || std::isinf(e.kl)) continue;
    const Real second = in.is_double() ? 1e-11L : 2e-6L;
    ASSERT_NO_FATAL_FAILURE(expect_rows(d_p, i, e.d_p, g, std::fabs(g) * second * largest(e.d_p), "d_p"));
    ASSERT_NO_FATAL_FAILURE(expect_rows(d_q, i, e.d_q, g, std::fabs(g) * second * largest(e.d_q), "d_q"));
    // A sum of terms of both signs.
    Real sizes = 0;
    for (int64_t j = 0; j < v; ++j)
      sizes += std::fabs(in.v_p.get(i, j) * e.grad_p[static_cast<size_t>(j)]) +
               std::fabs(in.v_q.get(i, j) * e.grad_q[static_cast<size_t>(j)]);
    ASSERT_NO_FATAL_FAILURE(
        expect_close(d_coefficient.get(i), e.kl_dot, second * sizes, DType::Double, "d_coefficient", i, -1));
  }
}

class KlDivCuda : public testing::TestWithParam<Case> {};

TEST_P(KlDivCuda, Logits) {
  const Case& c = GetParam();
  for_logits(c, [&](const Problem& in) { run_orders(c.rows * c.classes < 8000, [&] { check_all(c, in); }); });
}

TEST_P(KlDivCuda, OtherSpaces) {
  const Case& c = GetParam();
  for_other_spaces(c, [&](const Problem& in) { run_orders(false, [&] { check_all(c, in); }); });
}

INSTANTIATE_TEST_SUITE_P(Cases, KlDivCuda, testing::ValuesIn(kCases), case_name);

// the centre is off, the near form needs its second visit.
TEST(KlDivCudaCentre, BadGuess) {
  // How far the others are above: a little more than what is summed as it is, and more than exp can say.
  const std::pair<int64_t, double> sizes[] = {{5000, 40}, {17000, 140}};
  for (const auto& [classes, above] : sizes)
    for (const double off : {3.0, 0.0}) {
      const Case c{.name = "bad guess", .rows = 2, .classes = classes, .kl = 1e-8};
      Problem problem(c, kTypes[0], td::kLogits, td::kLogits);
      for (int64_t i = 0; i < c.rows; ++i)
        for (int64_t j = 0; j < 2100; ++j) {
          problem.p.set(i, j, problem.p.get(i, j) - above);
          problem.q.set(i, j, problem.q.get(i, j) - above + off);
        }
      run_orders(false, [&] { check_all(c, problem); });
    }
}

// One row of a matrix of more than 2^31 elements, in memory that is reserved and touched nowhere else.
TEST(KlDivCudaHuge, OffsetsBeyond32Bits) {
  const Huge p, q, grad;
  for (int64_t j = 0; j < Huge::kClasses; ++j)
    p.row()[j] = static_cast<float>(j % 11), q.row()[j] = static_cast<float>(j % 7);
  const td::RowPair in{p.in(), q.in(), td::kLogits, td::kLogits, Huge::kClasses, 1};
  std::vector<double> stat(static_cast<size_t>(Huge::kRows * td::KlDivStat::kSize)),
      coefficient(static_cast<size_t>(Huge::kRows), 1);
  std::vector<float> loss(static_cast<size_t>(Huge::kRows));
  simt::options = {};
  simt::options.first_block = Huge::kRows - 1;
  td::cuda::kl_div_forward({in, nullptr, loss.data(), false, stat.data()}, Huge::kRows, nullptr, nullptr);
  td::cuda::kl_div_backward({in, coefficient.data(), stat.data(), {}, grad.out()}, Huge::kRows, nullptr, nullptr);
  const std::vector<Real> t = p.values(), s = q.values();
  const Exact e = exact(t, s, t, s, td::kLogits, td::kLogits, 1);
  EXPECT_NEAR(loss.back(), static_cast<double>(e.kl), 2e-6 * static_cast<double>(e.kl));
  for (int64_t j = 0; j < Huge::kClasses; ++j)
    ASSERT_NEAR(grad.row()[j], static_cast<double>(e.grad_q[static_cast<size_t>(j)]),
                2e-6 * static_cast<double>(e.scale_q));
}

// A weight that is none makes its row NaN, and no other.
TEST(KlDivCudaWeight, BadWeightsAreNan) {
  const Case c{.name = "weights", .rows = 5, .classes = 30};
  Problem problem(c, kTypes[0], td::kLogits, td::kLogits);
  const double bad[] = {1, -1, std::nan(""), std::numeric_limits<double>::infinity(), 0};
  for (int64_t i = 0; i < c.rows; ++i) problem.weight.set(i, bad[i]);
  simt::options = {};
  std::vector<float> loss(5);
  std::vector<double> stat(5 * td::KlDivStat::kSize);
  td::cuda::kl_div_forward({problem.rows(), problem.weight.data<double>(), loss.data(), false, stat.data()}, c.rows,
                           nullptr, nullptr);
  EXPECT_GT(loss[0], 0);
  for (const size_t i : {1, 2, 3}) EXPECT_TRUE(std::isnan(loss[i]));
  EXPECT_EQ(loss[4], 0);
}

// Twice the same bits, in whatever order the threads and blocks run.
TEST(KlDivCudaDeterminism, SameBitsInAnyOrder) {
  for (const int64_t classes : {700, 3000, 50000}) {
    const Case c{.name = "bits", .rows = 3, .classes = classes, .kl = 0.1};
    const Problem problem(c, kTypes[0], td::kLogits, td::kLogits);
    std::vector<std::vector<double>> stats;
    for (const simt::Schedule& t : simt::schedules) {
      simt::options = {};
      simt::options.order = t.order, simt::options.seed = t.seed;
      std::vector<float> loss(3);
      std::vector<double> stat(3 * td::KlDivStat::kSize),
          workspace(static_cast<size_t>(td::cuda::kl_div_workspace(c.rows, classes)));
      td::cuda::kl_div_forward({problem.rows(), nullptr, loss.data(), false, stat.data()}, c.rows, workspace.data(),
                               nullptr);
      stats.push_back(stat);
    }
    for (const auto& stat : stats) EXPECT_EQ(stat, stats[0]);
  }
}

}  // namespace
