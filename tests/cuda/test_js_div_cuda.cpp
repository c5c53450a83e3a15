// The CUDA kernels of the Jensen-Shannon divergence on the emulated device: values and derivatives against long double,
// over sizes, dtypes, spaces, betas, layouts and masks, in several orders of the threads. Whatever the checker finds
// (emulator/simt.cpp) fails the test that launched the kernel.
#include "js_div/js_div.h"
#include "row_pair_test.h"

namespace {

// -- Reference -------------------------------------------------------------------------------------------------------

struct Exact {
  Real js = 0;
  Real terms = 0;  // what the error of js is relative to
  std::vector<Real> grad_p, grad_q, d_p, d_q;
  Real scale_p = 0, scale_q = 0;  // what the errors of grad_p, grad_q are relative to
  Real js_dot = 0, js_dot_scale = 0;
};

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
      e.js += unit * y * series;
    } else {
      e.js += unit * (b * p.times(j, sigma) + (1 - b) * q.times(j, rho));
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
  if (logits) e.terms = e.js;
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
      e.js_dot += side.v[j] * gradient[j], e.js_dot_scale += std::fabs(side.v[j]) * entry;
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

// Runs all three kernels and compares all that they leave.
void check_all(const Case& c, const Problem& in, const Options& options) {
  const int64_t n = c.rows, v = c.classes;
  const DType real = in.is_double() ? DType::Double : DType::Float;
  const Real ulp = in.is_double() ? 0x1p-52L : 0x1p-23L, accuracy = in.is_double() ? 1e-11L : 2e-6L;
  const td::JsDivRows rows{in.rows(), options.beta, options.scaled};
  Memory loss(real, n, "loss", false), stat(DType::Double, n * td::JsDivStat::kSize, "stat", false),
      d_coefficient(DType::Double, n, "d_coefficient", false);
  const auto workspace = [&] { return Memory(DType::Double, td::cuda::js_div_workspace(n, v), "workspace", false); };
  {
    const Memory space = workspace();
    td::cuda::js_div_forward({rows, in.weight.data<double>(), loss.data(), in.is_double(), stat.data<double>()}, n,
                             space.data<double>(), nullptr);
  }
  const Rows grad_p(in.p.type(), n, v, c.grad_p, "grad_p", false), grad_q(in.q.type(), n, v, c.grad_q, "grad_q", false),
      alone_p(in.p.type(), n, v, c.grad_q, "grad_p alone", false),
      alone_q(in.q.type(), n, v, {}, "grad_q alone", false), d_p(in.p.type(), n, v, {}, "d_p", false),
      d_q(in.q.type(), n, v, c.grad_q, "d_q", false);
  const auto backward = [&](const td::RowsOut& of_p, const td::RowsOut& of_q) {
    const Memory space = workspace();
    td::cuda::js_div_backward({rows, in.coefficient.data<double>(), stat.data<double>(), of_p, of_q}, n,
                              space.data<double>(), nullptr);
  };
  backward(grad_p.out(), grad_q.out());
  backward(alone_p.out(), {});
  backward({}, alone_q.out());
  {
    const Memory space = workspace();
    td::cuda::js_div_double_backward({rows, in.v_p.in(), in.v_q.in(), in.coefficient.data<double>(),
                                      stat.data<double>(), d_coefficient.data<double>(), d_p.out(), d_q.out()},
                                     n, space.data<double>(), nullptr);
  }
  for (int64_t i = 0; i < n; ++i) {
    const Real weight = in.weight.get(i), g = in.coefficient.get(i), size = std::fabs(g);
    if (weight == 0) {
      ASSERT_EQ(loss.get(i), 0);
      for (int64_t j = 0; j < v; ++j)
        for (const Rows* x : {&grad_p, &grad_q, &alone_p, &alone_q, &d_p, &d_q}) ASSERT_EQ(x->get(i, j), 0);
      continue;
    }
    const Exact e = exact(in.p.row(i), in.q.row(i), in.v_p.row(i), in.v_q.row(i), rows.p_space, rows.q_space,
                          rows.temperature, options.beta, options.scaled);
    const Real allowed = in.logits() ? accuracy * e.terms : 8 * ulp * e.terms;
    ASSERT_NO_FATAL_FAILURE(expect_close(loss.get(i), weight * e.js, weight * allowed, real, "loss", i, -1));
    if (std::isnan(e.js)) continue;
    const Real of_p = size * accuracy * e.scale_p, of_q = size * accuracy * e.scale_q;
    ASSERT_NO_FATAL_FAILURE(expect_rows(grad_p, i, e.grad_p, g, of_p, "grad_p"));
    ASSERT_NO_FATAL_FAILURE(expect_rows(grad_q, i, e.grad_q, g, of_q, "grad_q"));
    ASSERT_NO_FATAL_FAILURE(expect_rows(alone_p, i, e.grad_p, g, of_p, "grad_p alone"));
    ASSERT_NO_FATAL_FAILURE(expect_rows(alone_q, i, e.grad_q, g, of_q, "grad_q alone"));
    ASSERT_NO_FATAL_FAILURE(expect_rows(d_p, i, e.d_p, g, size * accuracy * largest(e.d_p), "d_p"));
    ASSERT_NO_FATAL_FAILURE(expect_rows(d_q, i, e.d_q, g, size * accuracy * largest(e.d_q), "d_q"));
    ASSERT_NO_FATAL_FAILURE(
        expect_close(d_coefficient.get(i), e.js_dot, accuracy * e.js_dot_scale, DType::Double, "d_coefficient", i, -1));
  }
}

// Of the betas, in turn.
Options options_of(const Case& c, const Problem& in) {
  constexpr Options kOptions[] = {{0.5, false}, {0.1, true}, {0.3, false}};
  return kOptions[(static_cast<size_t>(c.classes) + static_cast<size_t>(in.p.type())) % std::size(kOptions)];
}

class JsDivCuda : public testing::TestWithParam<Case> {};

TEST_P(JsDivCuda, Logits) {
  const Case& c = GetParam();
  for_logits(c, [&](const Problem& in) {
    run_orders(c.rows * c.classes < 8000, [&] { check_all(c, in, options_of(c, in)); });
  });
}

TEST_P(JsDivCuda, OtherSpaces) {
  const Case& c = GetParam();
  if (c.classes > 50000) GTEST_SKIP() << "most of a minute in double: rows of several segments are the cases split*";
  for_other_spaces(c, [&](const Problem& in) { run_orders(false, [&] { check_all(c, in, options_of(c, in)); }); });
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
        run_orders(false, [&] { check_all(c, {c, types, td::kLogits, td::kLogits}, {beta, true}); });
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

// One row of a matrix of more than 2^31 elements, in memory that is reserved and touched nowhere else.
TEST(JsDivCudaHuge, OffsetsBeyond32Bits) {
  const Huge p, q, grad;
  for (int64_t j = 0; j < Huge::kClasses; ++j)
    p.row()[j] = static_cast<float>(j % 11), q.row()[j] = static_cast<float>(j % 7);
  const td::JsDivRows in{{p.in(), q.in(), td::kLogits, td::kLogits, Huge::kClasses, 1}, 0.5, false};
  std::vector<double> stat(static_cast<size_t>(Huge::kRows * td::JsDivStat::kSize)),
      coefficient(static_cast<size_t>(Huge::kRows), 1);
  std::vector<float> loss(static_cast<size_t>(Huge::kRows));
  simt::options = {};
  simt::options.first_block = Huge::kRows - 1;
  td::cuda::js_div_forward({in, nullptr, loss.data(), false, stat.data()}, Huge::kRows, nullptr, nullptr);
  td::cuda::js_div_backward({in, coefficient.data(), stat.data(), {}, grad.out()}, Huge::kRows, nullptr, nullptr);
  const std::vector<Real> t = p.values(), s = q.values();
  const Exact e = exact(t, s, t, s, td::kLogits, td::kLogits, 1, 0.5L, false);
  EXPECT_NEAR(loss.back(), static_cast<double>(e.js), 2e-6 * static_cast<double>(e.js));
  for (int64_t j = 0; j < Huge::kClasses; ++j)
    ASSERT_NEAR(grad.row()[j], static_cast<double>(e.grad_q[static_cast<size_t>(j)]),
                2e-6 * static_cast<double>(e.scale_q));
}

// A weight that is none makes its row NaN, and no other.
TEST(JsDivCudaWeight, BadWeightsAreNan) {
  const Case c{.name = "weights", .rows = 5, .classes = 30};
  Problem problem(c, kTypes[0], td::kLogits, td::kLogits);
  const double bad[] = {1, -1, std::nan(""), std::numeric_limits<double>::infinity(), 0};
  for (int64_t i = 0; i < c.rows; ++i) problem.weight.set(i, bad[i]);
  simt::options = {};
  std::vector<float> loss(5);
  std::vector<double> stat(5 * td::JsDivStat::kSize);
  td::cuda::js_div_forward({{problem.rows()}, problem.weight.data<double>(), loss.data(), false, stat.data()}, c.rows,
                           nullptr, nullptr);
  EXPECT_GT(loss[0], 0);
  for (const size_t i : {1, 2, 3}) EXPECT_TRUE(std::isnan(loss[i]));
  EXPECT_EQ(loss[4], 0);
}

// Twice the same bits, in whatever order the threads and blocks run.
TEST(JsDivCudaDeterminism, SameBitsInAnyOrder) {
  for (const int64_t classes : {700, 3000, 50000}) {
    const Case c{.name = "bits", .rows = 3, .classes = classes, .kl = 0.1};
    const Problem problem(c, kTypes[2], td::kLogits, td::kLogits);  // of a half type: maxima that are equal
    std::vector<std::vector<double>> stats;
    for (const simt::Schedule& t : simt::schedules) {
      simt::options = {};
      simt::options.order = t.order, simt::options.seed = t.seed;
      std::vector<float> loss(3);
      std::vector<double> stat(3 * td::JsDivStat::kSize),
          workspace(static_cast<size_t>(td::cuda::js_div_workspace(c.rows, classes)));
      td::cuda::js_div_forward({{problem.rows()}, nullptr, loss.data(), false, stat.data()}, c.rows, workspace.data(),
                               nullptr);
      stats.push_back(stat);
    }
    for (const auto& stat : stats) EXPECT_EQ(stat, stats[0]);
  }
}

}  // namespace
