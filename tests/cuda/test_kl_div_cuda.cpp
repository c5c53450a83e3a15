// The CUDA kernels of KL divergence on the emulated device: values and derivatives against long double and against the
// CPU kernels, over sizes, dtypes, spaces, layouts and masks, in several orders of the threads. Whatever the checker
// finds (emulator/simt.cpp) fails the test that launched the kernel.
#include "kl_div/kl_div.h"
#include "row_pair_test.h"

namespace {

// -- Reference -------------------------------------------------------------------------------------------------------

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
      e.value += std::fabs(l[j]) < 1 && p[j] > 0 ? p[j] * phi(l[j]) : q[j] - p[j] + p[j] * l[j];
    } else {
      e.value += p[j] * l[j];
      e.terms += std::fabs(p[j] * size[j]);
    }
  }
  if (logits) e.terms = e.value;
  const bool infinite = std::isinf(e.value);
  Real centre = 0;
  for (size_t j = 0; j < n; ++j) centre += p[j] == 0 ? 0 : p[j] * l[j];
  const auto zero_or = [&](bool zero, Real x) { return zero ? 0 : x; };
  Real others = 0;
  for (size_t j = 0; j < n; ++j) {
    gap[j] = logits && std::fabs(l[j]) < 1 && p[j] > 0 ? p[j] * std::expm1(-l[j]) : q[j] * mass - p[j];
    const Real g = p_space == td::kLogits ? zero_or(infinite, p[j] * (l[j] - (logits ? centre : e.value)) / temperature)
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
    const Real along_p = zero_or(v_p[j] == 0, e.grad_p[j] * v_p[j]),
               along_q = zero_or(v_q[j] == 0, e.grad_q[j] * v_q[j]);
    e.dot += along_p + along_q, e.dot_scale += std::fabs(along_p) + std::fabs(along_q);
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
            ? zero_or(infinite, (p_dot * (l[j] - (logits ? centre : e.value)) + p[j] * (l_dot - e.dot)) / temperature)
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

const Kernels<td::RowPair> kKernels = {td::KlDivStat::kSize, td::cuda::kl_div_workspace, td::cuda::kl_div_forward,
                                       td::cuda::kl_div_backward, td::cuda::kl_div_double_backward};

void check(const Case& c, const Problem& in) {
  check_all(kKernels, c, in, in.rows(), [&](int64_t i) { return exact_row(in, i); });
}

class KlDivCuda : public testing::TestWithParam<Case> {};

TEST_P(KlDivCuda, Logits) {
  const Case& c = GetParam();
  for_logits(c, [&](const Problem& in) { run_orders(c.rows * c.classes < 8000, [&] { check(c, in); }); });
}

TEST_P(KlDivCuda, OtherSpaces) {
  const Case& c = GetParam();
  for_other_spaces(c, [&](const Problem& in) { run_orders(false, [&] { check(c, in); }); });
}

INSTANTIATE_TEST_SUITE_P(Cases, KlDivCuda, testing::ValuesIn(kCases), case_name);

// The first classes are far below the others: where the centre that they give is off, the near form needs its second
// visit.
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
      run_orders(false, [&] { check(c, problem); });
    }
}

TEST(KlDivCudaHuge, OffsetsBeyond32Bits) {
  expect_64_bit_offsets(kKernels, [](const std::vector<Real>& p, const std::vector<Real>& q) {
    return exact(p, q, p, q, td::kLogits, td::kLogits, 1);
  });
}

TEST(KlDivCudaWeight, BadWeightsAreNan) { expect_nan_of_bad_weights(kKernels); }

TEST(KlDivCudaDeterminism, SameBitsInAnyOrder) { expect_same_bits(kKernels, kTypes[0]); }

}  // namespace
