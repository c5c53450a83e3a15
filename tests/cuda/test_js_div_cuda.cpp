// The CUDA kernels of the Jensen-Shannon divergence on the emulated device: values and derivatives against long double,
// over sizes, dtypes, spaces, betas, layouts and masks, in several orders of the threads. Whatever the checker finds
// (emulator/simt.cpp) fails the test that launched the kernel.
#include "js_div/js_div.h"
#include "row_pair_test.h"

namespace {

// -- Reference -------------------------------------------------------------------------------------------------------

// One side: probabilities, log-probabilities, the ratio to m less that of the likeliest class if from logits.
struct ExactSide {
  int space;
  Real weight;  // of the side's gradient
  std::vector<Real> prob, log, ratio, v, log_dot, dot, ratio_dot;
  size_t top = 0;

  ExactSide(const std::vector<Real>& x, const std::vector<Real>& v_, int space_, Real temperature, Real weight_)
      : space(space_), weight(weight_), log(log_probs(x, space_, temperature)), v(v_) {
    for (size_t j = 0; j < x.size(); ++j) {
      prob.push_back(space == td::kProbs ? x[j] : std::exp(log[j]));
      if (prob[j] > prob[top]) top = j;
    }
    Real mean = 0;
    for (size_t j = 0; j < x.size(); ++j) mean += prob[j] == 0 ? 0 : prob[j] * (v[j] - v[top]);
    for (size_t j = 0; j < x.size(); ++j) {
      log_dot.push_back(prob[j] == 0             ? 0
                        : space == td::kLogits   ? (v[j] - v[top] - mean) / temperature
                        : space == td::kLogProbs ? v[j]
                                                 : v[j] / prob[j]);
      dot.push_back(space == td::kProbs ? v[j] : prob[j] * log_dot[j]);
    }
  }
  Real times(size_t j, Real x) const { return prob[j] == 0 ? 0 : prob[j] * x; }
  // From `ratio`: the gradient and, from `ratio_dot`, its derivative.
  void derive(Real temperature, std::vector<Real>& gradient, std::vector<Real>& derivative) const {
    const size_t n = prob.size();
    Real mean = 0, mean_dot = 0, others = 0;
    if (space == td::kLogits)
      for (size_t j = 0; j < n; ++j) mean += times(j, ratio[j]);
    const auto change = [&](size_t j) { return dot[j] * (ratio[j] - mean) + prob[j] * ratio_dot[j]; };
    for (size_t j = 0; j < n; ++j) mean_dot += prob[j] == 0 ? 0 : change(j);
    for (size_t j = 0; j < n; ++j) {
      const bool none = prob[j] == 0;
      const Real g = none ? 0 : space == td::kProbs ? ratio[j] : prob[j] * (ratio[j] - mean);
      const Real d = none                   ? 0
                     : space == td::kProbs  ? ratio_dot[j]
                     : space == td::kLogits ? change(j) - prob[j] * mean_dot
                                            : change(j);
      const Real unit = space == td::kLogits ? weight / temperature : weight;
      gradient.push_back(unit * g), derivative.push_back(unit * d);
      if (prob[j] <= 0.5L) others += gradient[j];
    }
    // The entries sum to 0: one with most of the mass is known best by the others.
    if (space == td::kLogits)
      for (size_t j = 0; j < n; ++j)
        if (prob[j] > 0.5L) gradient[j] = -others;
  }
};

Exact exact(const std::vector<Real>& t, const std::vector<Real>& s, const std::vector<Real>& v_p,
            const std::vector<Real>& v_q, int p_space, int q_space, Real temperature, Real b, bool scaled) {
  const size_t n = t.size();
  const bool logits = p_space == td::kLogits && q_space == td::kLogits;
  const Real unit = scaled ? 1 / (b * (1 - b)) : 1;
  ExactSide p(t, v_p, p_space, temperature, unit * b), q(s, v_q, q_space, temperature, unit * (1 - b));
  std::vector<Real> l(n), blur(n);
  for (size_t j = 0; j < n; ++j) {
    l[j] = p.prob[j] == 0 && q.prob[j] == 0 ? 0 : p.log[j] - q.log[j];
    if (p_space == td::kProbs && q_space == td::kProbs && std::fabs(p.prob[j] - q.prob[j]) < q.prob[j] / 2)
      l[j] = std::log1p((p.prob[j] - q.prob[j]) / q.prob[j]);
  }
  // log of own + other e^l over the same at l0; u = l - l0.
  const auto log_mixture = [](Real own, Real other, Real x, Real l0, Real u) {
    const auto whole = [&](Real y) {
      return y > 0 ? y + std::log(other + own * std::exp(-y)) : std::log(own + other * std::exp(y));
    };
    const Real change = other * std::expm1(u) / (own * std::exp(-l0) + other);
    return std::fabs(change) < 0.5L ? std::log1p(change) : whole(x) - whole(l0);
  };
  Exact e;
  for (size_t j = 0; j < n; ++j) {
    const Real x = p.prob[j], y = q.prob[j], m = b * x + (1 - b) * y;
    const Real sigma = -log_mixture(b, 1 - b, -l[j], 0, -l[j]), rho = -log_mixture(1 - b, b, l[j], 0, l[j]);
    // b (1 + g) log(1 + g) - (1 + b g) log(1 + b g) at g = expm1(l), for small g by its series.
    Real series = 0, power = 1;
    const Real growth = std::expm1(l[j]);
    if (std::fabs(l[j]) < 0.01L) {
      for (int k = 2; k < 13; ++k) {
        power = std::pow(growth, static_cast<Real>(k));
        series += (k % 2 != 0 ? -1 : 1) * (b - std::pow(b, static_cast<Real>(k))) / (k * (k - 1)) * power;
      }
      e.value += unit * y * series;
    } else {
      e.value += unit * (b * p.times(j, sigma) + (1 - b) * q.times(j, rho));
    }
    const auto size = [&](Real given, Real log, int space) {
      return std::isinf(log)        ? 0
             : space == td::kLogits ? std::fabs(given / temperature) + std::fabs(given / temperature - log)
                                    : std::fabs(log);
    };
    blur[j] = p_space == q_space ? 0 : size(t[j], p.log[j], p_space) + size(s[j], q.log[j], q_space);
    e.terms += unit * (b * p.times(j, std::fabs(sigma)) + (1 - b) * q.times(j, std::fabs(rho)) + blur[j] * m);
    // Around the likeliest class of the side, by the exact difference of the logits.
    const auto around = [&](const ExactSide& side, Real own, Real other, int sign) {
      const size_t c = side.top;
      const Real u = ((t[j] - s[j]) - (t[c] - s[c])) / temperature;
      return -log_mixture(own, other, sign * l[j], sign * l[c], sign * u);
    };
    p.ratio.push_back(logits && std::isfinite(l[p.top]) ? around(p, b, 1 - b, -1) : sigma);
    q.ratio.push_back(logits && std::isfinite(l[q.top]) ? around(q, 1 - b, b, 1) : rho);
    const Real inv_m = m == 0 ? 1 : 1 / m;
    p.ratio_dot.push_back((1 - b) * (y * p.log_dot[j] - q.dot[j]) * inv_m);
    q.ratio_dot.push_back(b * (x * q.log_dot[j] - p.dot[j]) * inv_m);
  }
  if (logits) e.terms = e.value;
  p.derive(temperature, e.grad_p, e.d_p), q.derive(temperature, e.grad_q, e.d_q);
  // What the errors of a side's entries are relative to: terms that need not cancel but from logits.
  const auto scale = [&](const ExactSide& side, const std::vector<Real>& gradient) {
    Real most = largest(gradient), mean = 0;
    for (size_t j = 0; j < n; ++j) mean += side.times(j, std::fabs(side.ratio[j]) + blur[j]);
    for (size_t j = 0; j < n; ++j) {
      if (side.prob[j] == 0) continue;
      const Real size = std::fabs(side.ratio[j]) + blur[j];
      const Real entry = logits                      ? std::fabs(gradient[j])
                         : side.space == td::kLogits ? side.weight * side.prob[j] * (size + mean) / temperature
                         : side.space == td::kProbs  ? side.weight * size
                                                     : side.weight * side.prob[j] * size;
      most = std::max(most, entry);
      if (side.v[j] == 0) continue;
      e.dot += side.v[j] * gradient[j], e.dot_scale += std::fabs(side.v[j]) * entry;
    }
    return most;
  };
  e.scale_p = scale(p, e.grad_p), e.scale_q = scale(q, e.grad_q);
  return e;
}

// -- Checks ----------------------------------------------------------------------------------------------------------

struct Options {
  double beta;
  bool scaled;
};

const Kernels<td::JsDivRows> kKernels = {td::JsDivStat::kSize, td::cuda::js_div_workspace, td::cuda::js_div_forward,
                                         td::cuda::js_div_backward, td::cuda::js_div_double_backward};

void check(const Case& c, const Problem& in, const Options& options) {
  const td::JsDivRows rows{in.rows(), options.beta, options.scaled};
  check_all(kKernels, c, in, rows, [&](int64_t i) {
    return exact(in.p.row(i), in.q.row(i), in.v_p.row(i), in.v_q.row(i), rows.p_space, rows.q_space, rows.temperature,
                 options.beta, options.scaled);
  });
}

// Of the betas, in turn.
Options options_of(const Case& c, const Problem& in) {
  constexpr Options kOptions[] = {{0.5, false}, {0.1, true}, {0.3, false}};
  return kOptions[(static_cast<size_t>(c.classes) + static_cast<size_t>(in.p.type())) % std::size(kOptions)];
}

class JsDivCuda : public testing::TestWithParam<Case> {};

TEST_P(JsDivCuda, Logits) {
  const Case& c = GetParam();
  for_logits(
      c, [&](const Problem& in) { run_orders(c.rows * c.classes < 8000, [&] { check(c, in, options_of(c, in)); }); });
}

TEST_P(JsDivCuda, OtherSpaces) {
  const Case& c = GetParam();
  if (c.classes > 50000) GTEST_SKIP() << "most of a minute in double: rows of several segments are the cases split*";
  for_other_spaces(c, [&](const Problem& in) { run_orders(false, [&] { check(c, in, options_of(c, in)); }); });
}

INSTANTIATE_TEST_SUITE_P(Cases, JsDivCuda, testing::ValuesIn(kCases), case_name);

// From beta's largest, through where l above its turn is rare, to where float has no room for it; far and near.
TEST(JsDivCudaBeta, EveryBeta) {
  const Case cases[] = {{.name = "far", .rows = 2, .classes = 300, .kl = 4},
                        {.name = "near", .rows = 1, .classes = 1100, .kl = 1e-8}};
  for (const Case& c : cases)
    for (const double beta : {0.5, 0.01, 1e-5, 1e-9, 1e-100})
      for (const Types types : {kTypes[0], kTypes[1]}) {
        SCOPED_TRACE(std::string(c.name) + ", beta " + std::to_string(beta));
        run_orders(false, [&] { check(c, {c, types, td::kLogits, td::kLogits}, {beta, true}); });
      }
}

// Supports that do not meet: log 2, and no gradient.
TEST(JsDivCudaSupports, Disjoint) {
  const Case c{.name = "disjoint", .rows = 1, .classes = 70};
  for (const Types types : kTypes) {
    Problem in(c, types, td::kLogits, td::kLogits);
    for (int64_t j = 0; j < c.classes; ++j)
      (j % 2 != 0 ? in.p : in.q).set(0, j, -std::numeric_limits<double>::infinity());
    const DType real = in.is_double() ? DType::Double : DType::Float;
    const td::JsDivRows rows{in.rows(), 0.5, false};
    const Memory loss(real, 1, "loss", false), stat(DType::Double, td::JsDivStat::kSize, "stat", false);
    const Rows grad_p(types.p, 1, c.classes, {}, "grad_p", false), grad_q(types.q, 1, c.classes, {}, "grad_q", false);
    simt::options = {};
    td::cuda::js_div_forward({rows, nullptr, loss.data(), in.is_double(), stat.data<double>()}, 1, nullptr, nullptr);
    const double one = 1;
    td::cuda::js_div_backward({rows, &one, stat.data<double>(), grad_p.out(), grad_q.out()}, 1, nullptr, nullptr);
    EXPECT_NEAR(loss.get(0), std::log(2.0), in.is_double() ? 0x1p-52 : 0x1p-23);
    for (int64_t j = 0; j < c.classes; ++j)
      for (const Rows* x : {&grad_p, &grad_q}) EXPECT_NEAR(x->get(0, j), 0, in.is_double() ? 1e-17 : 1e-9);
  }
}

TEST(JsDivCudaHuge, OffsetsBeyond32Bits) {
  expect_64_bit_offsets(kKernels, [](const std::vector<Real>& p, const std::vector<Real>& q) {
    return exact(p, q, p, q, td::kLogits, td::kLogits, 1, 0.5L, false);
  });
}

TEST(JsDivCudaWeight, BadWeightsAreNan) { expect_nan_of_bad_weights(kKernels); }

// Of a half type: maxima that are equal.
TEST(JsDivCudaDeterminism, SameBitsInAnyOrder) { expect_same_bits(kKernels, kTypes[2]); }

}  // namespace
