// The CUDA kernels of the KL divergence between diagonal Gaussians on the emulated device, against long double: over
// sizes, dtypes, layouts, absent and broadcast priors, near and far, and infinities.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "device_rows.h"
#include "gaussian_kl/gaussian_kl.h"
#include "simt.h"

namespace {

constexpr int kOperands = td::kGaussianOperands;

struct Case {
  const char* name;
  int64_t rows = 2, dims = 100;
  double scale = 1;  // how far the two are apart
  bool prior_mean = true, prior_log_var = true;
  Layout in = {}, out = {};
  bool shared_prior = false;  // one row of priors for all
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.name << " (" << c.rows << " x " << c.dims << ")"; }

struct Types {
  DType mean, log_var, prior;
};
constexpr Types kTypes[] = {{DType::Float, DType::Float, DType::Float},
                            {DType::Double, DType::Double, DType::Double},
                            {DType::BFloat16, DType::BFloat16, DType::BFloat16},
                            {DType::Half, DType::Half, DType::Half},
                            {DType::Float, DType::BFloat16, DType::Half}};

struct Exact {
  Real kl = 0;
  std::array<std::vector<Real>, kOperands> grad;
};

Exact exact(const std::array<std::vector<Real>, kOperands>& in) {
  Exact e;
  for (size_t j = 0; j < in[0].size(); ++j) {
    const Real w = in[3][j], x = in[1][j] == w ? 0 : in[1][j] - w, d = in[0][j] - in[2][j];
    const Real square = d == 0 ? 0 : d * d * std::exp(-w), by_mean = d == 0 ? 0 : d * std::exp(-w);
    // expm1(x) - x: the series where the difference would leave no digits
    Real h = std::expm1(x) - x;
    if (std::fabs(x) < 0.01L) {
      Real series = 1;
      for (int k = 12; k > 2; --k) series = 1 + x / k * series;
      h = x * x / 2 * series;
    }
    if (std::isinf(x)) h = kInf;
    e.kl += (h + square) / 2;
    const Real by_var = std::expm1(x) / 2;
    e.grad[0].push_back(by_mean), e.grad[1].push_back(by_var), e.grad[2].push_back(-by_mean);
    e.grad[3].push_back(-by_var - square / 2);
  }
  return e;
}

class Problem {
 public:
  Problem(const Case& c, Types types)
      : c_(c), weight(DType::Double, c.rows, "weight", true), coefficient(DType::Double, c.rows, "coefficient", true) {
    const DType of[] = {types.mean, types.log_var, types.prior, types.prior};
    const bool given[] = {true, true, c.prior_mean, c.prior_log_var};
    for (size_t k = 0; k < kOperands; ++k)
      if (given[k]) in[k] = std::make_unique<Rows>(of[k], c.shared_prior && k > 1 ? 1 : c.rows, c.dims, c.in, "in");
    std::mt19937_64 random(static_cast<uint64_t>(c.dims) * 7 + static_cast<uint64_t>(c.rows));
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < c.rows; ++i) {
      for (int64_t j = 0; j < c.dims; ++j)
        for (const size_t k : {2, 3}) {
          if (in[k] != nullptr) in[k]->set(row_of(k, i), j, normal(random));
          const double prior = in[k] != nullptr ? in[k]->get(row_of(k, i), j) : 0;
          in[k - 2]->set(i, j, prior + c.scale * normal(random));
        }
      weight.set(i, i % 3 == 1 ? 0 : 0.5 + static_cast<double>(i));
      coefficient.set(i, i % 3 == 1 ? 0 : -0.75);
    }
  }
  int64_t row_of(size_t k, int64_t i) const { return c_.shared_prior && k > 1 ? 0 : i; }
  std::array<std::vector<Real>, kOperands> row(int64_t i) const {
    std::array<std::vector<Real>, kOperands> x;
    for (size_t k = 0; k < kOperands; ++k)
      x[k] = in[k] != nullptr ? in[k]->row(row_of(k, i)) : std::vector<Real>(static_cast<size_t>(c_.dims), 0);
    return x;
  }
  template <class Call>
  void set(Call& call) const {
    for (size_t k = 0; k < kOperands; ++k) {
      if (in[k] == nullptr) continue;
      call.in[k] = in[k]->in();
      if (c_.shared_prior && k > 1) call.in[k].layout.sizes[0] = c_.rows, call.in[k].layout.strides[0] = 0;
    }
    call.dims = c_.dims;
  }

 private:
  const Case& c_;

 public:
  std::array<std::unique_ptr<Rows>, kOperands> in;
  Memory weight, coefficient;
};

void check(const Case& c, const Problem& problem) {
  const int64_t n = c.rows;
  const bool wide = problem.in[0]->type() == DType::Double;
  const DType real = wide ? DType::Double : DType::Float;
  const Real accuracy = wide ? 1e-11L : 2e-6L;
  Memory loss(real, n, "loss", false),
      workspace(DType::Double, td::cuda::gaussian_kl_workspace(n, c.dims), "workspace", false);
  td::GaussianKlForward forward{{}, 0, problem.weight.data<double>(), loss.data(), wide};
  problem.set(forward);
  td::cuda::gaussian_kl_forward(forward, n, workspace.data<double>(), nullptr);
  // All gradients, and those of mean and log_var alone.
  std::array<std::unique_ptr<Rows>, kOperands> all, alone;
  for (const bool every : {true, false}) {
    auto& out = every ? all : alone;
    td::GaussianKlBackward backward{{}, 0, problem.coefficient.data<double>(), {}};
    problem.set(backward);
    for (size_t k = 0; k < (every ? kOperands : 2); ++k) {
      if (problem.in[k] == nullptr) continue;
      out[k] = std::make_unique<Rows>(problem.in[k]->type(), n, c.dims, c.out, "gradient", false);
      backward.grad[k] = out[k]->out();
    }
    td::cuda::gaussian_kl_backward(backward, n, nullptr, nullptr);
  }
  for (int64_t i = 0; i < n; ++i) {
    const Real weight = problem.weight.get(i), g = problem.coefficient.get(i);
    const Exact e = exact(problem.row(i));
    ASSERT_NO_FATAL_FAILURE(
        expect_close(loss.get(i), weight == 0 ? 0 : weight * e.kl, weight * accuracy * e.kl, real, "loss", i, -1));
    for (size_t k = 0; k < kOperands; ++k) {
      const Real size = largest(e.grad[k]);
      for (const auto* out : {&all, &alone})
        for (int64_t j = 0; (*out)[k] != nullptr && j < c.dims; ++j)
          ASSERT_NO_FATAL_FAILURE(expect_close((*out)[k]->get(i, j), g == 0 ? 0 : g * e.grad[k][static_cast<size_t>(j)],
                                               std::fabs(g) * accuracy * size, (*out)[k]->type(), "gradient", i, j));
    }
  }
}

class GaussianKlCuda : public testing::TestWithParam<Case> {};

TEST_P(GaussianKlCuda, ValuesAndGradients) {
  const Case& c = GetParam();
  for (const Types types : kTypes) {
    if (c.dims > 10000 && types.mean != DType::Float) continue;
    SCOPED_TRACE("type " + std::to_string(static_cast<int>(types.mean)));
    const Problem problem(c, types);
    ASSERT_NO_FATAL_FAILURE(run_orders(c.rows * c.dims <= 2000, [&] { check(c, problem); }));
  }
}

const Case kCases[] = {
    {.name = "one", .dims = 1},
    {.name = "less_than_a_piece", .rows = 9, .dims = 7},
    {.name = "odd", .rows = 3, .dims = 37},
    {.name = "more_than_a_warp", .rows = 4, .dims = 257},
    {.name = "a_block", .dims = 1025},
    {.name = "split", .rows = 2, .dims = 20003},
    {.name = "nearly_equal", .scale = 1e-6},
    {.name = "near", .scale = 1e-2},
    {.name = "far", .rows = 3, .scale = 8},
    {.name = "very_far", .rows = 3, .scale = 25},
    {.name = "standard_normal", .prior_mean = false, .prior_log_var = false},
    {.name = "prior_mean_only", .prior_log_var = false},
    {.name = "prior_log_var_only", .prior_mean = false},
    {.name = "shared_prior", .rows = 4, .dims = 33, .shared_prior = true},
    {.name = "padded", .rows = 3, .dims = 64, .in = {69}, .out = {65}},
    {.name = "misaligned", .rows = 3, .dims = 1067, .in = {0, 1, 1}, .out = {0, 1, 2}},
    {.name = "at_the_end", .rows = 2, .dims = 131, .in = {0, 1, -1}, .out = {0, 1, -1}},
    {.name = "strided", .rows = 3, .dims = 67, .in = {1, 3}, .out = {1, 3}},
};
INSTANTIATE_TEST_SUITE_P(Cases, GaussianKlCuda, testing::ValuesIn(kCases),
                         [](const auto& test) { return std::string(test.param.name); });

// Point masses and what is infinitely far; NaN stays in its row.
TEST(GaussianKlCudaInfinities, AreThoseOfTheFormulas) {
  const double inf = std::numeric_limits<double>::infinity(), nan = std::nan("");
  const double rows[][5] = {// mean, log_var, prior_mean, prior_log_var, KL
                            {0, -inf, 0, 0, inf}, {0, inf, 0, 0, inf},   {0, 0, 0, -inf, inf},
                            {1, 0, 0, inf, inf},  {1, -inf, 1, -inf, 0}, {1, -inf, 0, -inf, inf},
                            {nan, 0, 0, 0, nan},  {0, nan, 0, 0, nan},   {0, 0, nan, 0, nan},
                            {0, 0, 0, nan, nan},  {3, 1, 3, 1, 0},       {1e20, 92, 0, 92, 0.5e40 * std::exp(-92.0)}};
  constexpr int64_t kRows = std::size(rows);
  for (const DType type : {DType::Float, DType::Double}) {
    const Case c{.name = "infinities", .rows = kRows, .dims = 3};
    Problem problem(c, {type, type, type});
    for (int64_t i = 0; i < kRows; ++i) {
      problem.weight.set(i, 1);
      for (size_t k = 0; k < kOperands; ++k)
        for (int64_t j = 0; j < 3; ++j) problem.in[k]->set(i, j, j == 1 ? rows[i][k] : 0);
    }
    simt::options = {};
    Memory loss(type, kRows, "loss", false);
    Rows grad(type, kRows, 3, {}, "gradient", false), grad_var(type, kRows, 3, {}, "gradient", false);
    td::GaussianKlForward forward{{}, 0, problem.weight.data<double>(), loss.data(), type == DType::Double};
    problem.set(forward);
    td::cuda::gaussian_kl_forward(forward, kRows, nullptr, nullptr);
    td::GaussianKlBackward backward{{}, 0, problem.weight.data<double>(), {grad.out(), grad_var.out()}};
    problem.set(backward);
    td::cuda::gaussian_kl_backward(backward, kRows, nullptr, nullptr);
    for (int64_t i = 0; i < kRows; ++i) {
      const Real want = rows[i][4];
      expect_close(loss.get(i), want, 1e-6L * want, type, "loss", i, 1);
      EXPECT_TRUE(std::isnan(rows[i][4]) || !(std::isnan(grad.get(i, 1)) || std::isnan(grad_var.get(i, 1)))) << i;
      EXPECT_EQ(grad.get(i, 0), 0);
    }
  }
}

TEST(GaussianKlCudaDeterminism, SameBitsInAnyOrder) {
  for (const int64_t dims : {700, 3000, 50000}) {
    const Case c{.name = "bits", .rows = 3, .dims = dims};
    const Problem problem(c, kTypes[0]);
    std::vector<std::vector<float>> losses;
    for (const simt::Schedule& t : simt::schedules) {
      simt::options = {};
      simt::options.order = t.order, simt::options.seed = t.seed;
      std::vector<float> loss(3);
      std::vector<double> workspace(static_cast<size_t>(td::cuda::gaussian_kl_workspace(c.rows, dims)));
      td::GaussianKlForward forward{{}, 0, nullptr, loss.data(), false};
      problem.set(forward);
      td::cuda::gaussian_kl_forward(forward, c.rows, workspace.data(), nullptr);
      losses.push_back(loss);
    }
    for (const auto& loss : losses) EXPECT_EQ(loss, losses[0]);
  }
}

}  // namespace
