// The CUDA kernels of entropy on the emulated device: values and derivatives against long double, over sizes, dtypes,
// spaces, layouts and masks, in several orders of the threads. Whatever the checker finds (emulator/simt.cpp) fails the
// test that launched the kernel.
#include <ostream>

#include "device_rows.h"
#include "entropy/entropy.h"

namespace {

struct Exact {
  Real entropy = 0, terms = 0;  // terms: what the error of the entropy is relative to
  std::vector<Real> grad, d_x;
  Real scale = 0;  // what the errors of grad are relative to
  Real dot = 0;    // <v, grad>
};

Exact exact(const std::vector<Real>& x, const std::vector<Real>& v, int space, Real temperature) {
  const auto log_p = log_probs(x, space, temperature);
  const size_t at = static_cast<size_t>(std::max_element(x.begin(), x.end()) - x.begin());
  const Real top = x[at], t = space == td::kLogits ? temperature : 1;
  Exact e;
  std::vector<Real> p, n;
  Real mean = 0, mean_v = 0;
  for (size_t j = 0; j < x.size(); ++j) {
    p.push_back(space == td::kProbs ? x[j] : std::exp(log_p[j]));
    n.push_back(space == td::kLogits ? (top - x[j]) / t : -log_p[j]);
    if (std::isnan(log_p[j])) e.entropy = log_p[j];
    if (p[j] == 0) continue;
    e.entropy -= p[j] * log_p[j];
    mean += p[j] * n[j], mean_v += p[j] * (v[j] - v[at]);  // differences, or the top's own would be rounded away
  }
  e.terms = std::fabs(e.entropy);
  for (size_t j = 0; j < x.size(); ++j) {
    const Real g = space == td::kLogits ? p[j] * (n[j] - mean) / t : (space == td::kProbs ? 1 : p[j]) * (n[j] - 1);
    e.grad.push_back(p[j] == 0 ? 0 : g);
    e.dot += v[j] == 0 ? 0 : v[j] * e.grad[j];
  }
  for (size_t j = 0; j < x.size(); ++j) {
    const Real v_dot = ((v[j] - v[at]) - mean_v) / t;
    const Real h = space == td::kLogits     ? p[j] * (v_dot * (n[j] - mean - 1) - e.dot) / t
                   : space == td::kLogProbs ? p[j] * v[j] * (n[j] - 2)
                                            : -v[j] / p[j];
    e.d_x.push_back(p[j] == 0 ? 0 : h);
    if (space != td::kLogits && p[j] != 0)
      e.scale = std::max(e.scale, (space == td::kProbs ? 1 : p[j]) * (std::fabs(n[j]) + 1));
  }
  e.scale = std::max(e.scale, largest(e.grad));
  return e;
}

enum class Mask { None, Some, Row };

struct Case {
  const char* name;
  int64_t rows = 2, classes = 1000;
  double size = 2;  // of the logits' spread
  double temperature = 1;
  Layout x = {}, grad = {};
  Mask mask = Mask::None;
  double level = 0;
  double peak = 0;        // how far one class is above the others
  bool climbing = false;  // the largest entries come last, 50 above the first
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.name << " (" << c.rows << " x " << c.classes << ")"; }

constexpr DType kTypes[] = {DType::Float, DType::Double, DType::BFloat16, DType::Half};

class Problem {
 public:
  Problem(const Case& c, DType type, int space)
      : c_(c),
        space_(space),
        x(type, c.rows, c.classes, c.x, "x"),
        v(type, c.rows, c.classes, c.grad, "v"),
        weight(DType::Double, c.rows, "weight", true),
        coefficient(DType::Double, c.rows, "coefficient", true) {
    std::mt19937_64 random(static_cast<uint64_t>(c.classes) * 7 + static_cast<uint64_t>(c.rows));
    for (int64_t i = 0; i < c.rows; ++i) {
      std::vector<double> logits;
      double sum = 0;
      for (int64_t j = 0; j < c.classes; ++j) {
        double entry = c.size * normal(random) + c.level + (j == c.classes / 2 ? c.peak : 0);
        if (c.climbing) entry += 50.0 * static_cast<double>(j) / static_cast<double>(c.classes);
        logits.push_back(entry), sum += std::exp(entry);
        v.set(i, j, normal(random));
      }
      for (int64_t j = 0; j < c.classes; ++j) {
        const double entry = logits[static_cast<size_t>(j)];
        x.set(i, j, space == td::kLogits ? entry : space == td::kProbs ? std::exp(entry) / sum : entry - std::log(sum));
        if (c.mask == Mask::Some ? j % 3 == 0 : c.mask == Mask::Row && i == 1)
          x.set(i, j, space == td::kProbs ? 0 : -std::numeric_limits<double>::infinity());
      }
      weight.set(i, i % 3 == 2 ? 0 : 0.5 + 0.25 * static_cast<double>(i));
      coefficient.set(i, i % 3 == 2 ? 0 : 1.5 - static_cast<double>(i % 5));
    }
  }
  td::SingleRow rows() const { return {x.in(), space_, c_.classes, temperature()}; }
  bool is_double() const { return x.type() == DType::Double; }
  int space() const { return space_; }
  Exact exact_row(int64_t i) const { return exact(x.row(i), v.row(i), space_, static_cast<Real>(temperature())); }

 private:
  double temperature() const { return space_ == td::kLogits ? c_.temperature : 1; }
  const Case& c_;
  int space_;

 public:
  Rows x, v;
  Memory weight, coefficient;
};

// Runs all three kernels and compares all that they leave.
void check_all(const Case& c, const Problem& in) {
  const int64_t n = c.rows, k = c.classes, size = td::cuda::entropy_workspace(n, k);
  const DType type = in.x.type(), real = in.is_double() ? DType::Double : DType::Float;
  const Real ulp = in.is_double() ? 0x1p-52L : 0x1p-23L, accuracy = in.is_double() ? 1e-11L : 2e-6L;
  Memory loss(real, n, "loss", false), stat(DType::Double, n * td::EntropyStat::kSize, "stat", false),
      d_coefficient(DType::Double, n, "d_coefficient", false);
  const Rows grad(type, n, k, c.grad, "grad", false), d_x(type, n, k, c.grad, "d_x", false);
  Memory first(DType::Double, size, "workspace", false), second(DType::Double, size, "workspace", false),
      third(DType::Double, size, "workspace", false);
  td::cuda::entropy_forward({in.rows(), in.weight.data<double>(), loss.data(), in.is_double(), stat.data<double>()}, n,
                            first.data<double>(), nullptr);
  td::cuda::entropy_backward({in.rows(), in.coefficient.data<double>(), stat.data<double>(), grad.out()}, n,
                             second.data<double>(), nullptr);
  td::cuda::entropy_double_backward({in.rows(), in.v.in(), in.coefficient.data<double>(), stat.data<double>(),
                                     d_coefficient.data<double>(), d_x.out()},
                                    n, third.data<double>(), nullptr);
  for (int64_t i = 0; i < n; ++i) {
    const Real weight = in.weight.get(i), g = in.coefficient.get(i);
    if (weight == 0) {
      ASSERT_EQ(loss.get(i), 0);
      for (int64_t j = 0; j < k; ++j)
        for (const Rows* out : {&grad, &d_x}) ASSERT_EQ(out->get(i, j), 0);
      continue;
    }
    const Exact e = in.exact_row(i);
    const Real allowed = in.space() == td::kLogits ? accuracy * e.terms : 8 * ulp * e.terms;
    ASSERT_NO_FATAL_FAILURE(expect_close(loss.get(i), weight * e.entropy, weight * allowed, real, "loss", i, -1));
    ASSERT_NO_FATAL_FAILURE(expect_rows(grad, i, e.grad, g, std::fabs(g) * accuracy * e.scale, "grad"));
    if (std::isnan(e.entropy)) continue;
    ASSERT_NO_FATAL_FAILURE(expect_rows(d_x, i, e.d_x, g, std::fabs(g) * accuracy * largest(e.d_x), "d_x"));
    Real sizes = 0;
    for (int64_t j = 0; j < k; ++j) sizes += std::fabs(in.v.get(i, j) * e.grad[static_cast<size_t>(j)]);
    ASSERT_NO_FATAL_FAILURE(
        expect_close(d_coefficient.get(i), e.dot, accuracy * sizes, DType::Double, "d_coefficient", i, -1));
  }
}

class EntropyCuda : public testing::TestWithParam<Case> {};

TEST_P(EntropyCuda, Logits) {
  const Case& c = GetParam();
  for (const DType type : kTypes) {
    if (c.classes > 10000 && type != DType::Float) continue;
    SCOPED_TRACE("type " + std::to_string(static_cast<int>(type)));
    const Problem problem(c, type, td::kLogits);
    ASSERT_NO_FATAL_FAILURE(run_orders(c.rows * c.classes < 4000, [&] { check_all(c, problem); }));
  }
}

TEST_P(EntropyCuda, OtherSpaces) {
  const Case& c = GetParam();
  for (const int space : {td::kLogProbs, td::kProbs})
    for (const DType type : kTypes) {
      if (c.classes > 1000 && (type == DType::Double) == (space == td::kProbs)) continue;
      SCOPED_TRACE("space " + std::to_string(space) + ", type " + std::to_string(static_cast<int>(type)));
      const Problem problem(c, type, space);
      ASSERT_NO_FATAL_FAILURE(run_orders(false, [&] { check_all(c, problem); }));
    }
}

const Case kCases[] = {
    // Around what a thread, a warp and a block take at once.
    {.name = "one_class", .classes = 1},
    {.name = "less_than_a_piece", .rows = 9, .classes = 7},
    {.name = "a_piece", .rows = 17, .classes = 8},
    {.name = "odd", .rows = 3, .classes = 37},
    {.name = "more_than_a_warp", .rows = 4, .classes = 257},
    {.name = "a_block", .rows = 2, .classes = 1025},
    {.name = "several_visits", .rows = 2, .classes = 9001, .temperature = 3},
    // Rows over several blocks.
    {.name = "split_odd", .rows = 1, .classes = 20003, .climbing = true},
    // One class that outweighs the others, many times and to all of float's digits.
    {.name = "peak_5", .rows = 2, .classes = 300, .size = 1, .peak = 5},
    {.name = "peak_30", .rows = 2, .classes = 50, .size = 0.5, .peak = 24},
    {.name = "narrow", .rows = 2, .classes = 2000, .size = 1e-2},
    {.name = "level", .level = 1000},
    {.name = "climbing", .rows = 2, .classes = 3000, .temperature = 0.5, .climbing = true},
    // Memory.
    {.name = "misaligned", .rows = 3, .classes = 1100, .x = {1102, 1, 3}, .grad = {0, 1, 2}},
    {.name = "at_the_end", .rows = 2, .classes = 1031, .x = {0, 1, -1}, .grad = {0, 1, -1}},
    {.name = "strided", .rows = 3, .classes = 67, .x = {200, 2}, .grad = {1, 3}},
    // Zeros and infinities.
    {.name = "mask", .rows = 3, .classes = 515, .mask = Mask::Some},
    {.name = "mask_row", .rows = 3, .classes = 40, .mask = Mask::Row},
};
INSTANTIATE_TEST_SUITE_P(Cases, EntropyCuda, testing::ValuesIn(kCases),
                         [](const auto& test) { return std::string(test.param.name); });

TEST(EntropyCudaRow, NotADistributionIsNan) {
  simt::options = {};
  for (const double bad : {std::nan(""), std::numeric_limits<double>::infinity()})
    for (const int64_t at : {0, 3, 39}) {
      const Case c{.name = "bad", .classes = 40};
      Problem problem(c, DType::Float, td::kLogits);
      problem.x.set(1, at, bad);
      std::vector<float> loss(2);
      std::vector<double> stat(2 * td::EntropyStat::kSize);
      td::cuda::entropy_forward({problem.rows(), nullptr, loss.data(), false, stat.data()}, 2, nullptr, nullptr);
      EXPECT_GT(loss[0], 0);
      EXPECT_TRUE(std::isnan(loss[1]));
    }
}

}  // namespace
