// The CUDA kernels of optimal transport on the line on the emulated device, against the sweep of wasserstein_1d.h.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <ostream>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "device_rows.h"
#include "simt.h"
#include "wasserstein_1d/wasserstein_1d.h"

namespace {

enum class Weights { None, Random, WithZeros, Ties, OneHeavy };

struct Case {
  const char* name;
  int64_t rows = 3, n = 20, m = 30;
  Weights a = Weights::None, b = Weights::None;
  Layout in = {};
  bool shared = false;  // one row of u for all
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.name << " (" << c.n << ", " << c.m << ")"; }

// One side: sorted positions, weights whose rows sum to 1 in the type, and their running sums, made by the kernel.
struct Side {
  int64_t size;
  Rows positions;
  std::unique_ptr<Rows> weights;
  std::unique_ptr<Memory> sums;
  int64_t shared_rows;

  Side(const Case& c, DType type, int64_t points, Weights kind, bool shared, unsigned seed)
      : size(points), positions(type, c.rows, points, c.in, "positions"), shared_rows(shared ? c.rows : 0) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> uniform(0.1, 1);
    if (kind != Weights::None) weights = std::make_unique<Rows>(type, c.rows, points, c.in, "weights");
    for (int64_t i = 0; i < c.rows; ++i) {
      std::vector<double> x, w;
      for (int64_t j = 0; j < points; ++j) {
        x.push_back(std::round(8 * normal(random)) / 4);  // with points that coincide
        w.push_back(kind == Weights::WithZeros && j % 3 == 1       ? 0
                    : kind == Weights::Ties                        ? 1
                    : kind == Weights::OneHeavy && j == points / 2 ? static_cast<double>(100 * points)
                                                                   : uniform(random));
      }
      std::sort(x.begin(), x.end());
      double sum = 0;
      for (const double v : w) sum += v;
      for (int64_t j = 0; j < points; ++j) {
        positions.set(i, j, x[static_cast<size_t>(j)]);
        if (weights != nullptr) weights->set(i, j, w[static_cast<size_t>(j)] / sum);
      }
    }
    if (weights == nullptr) return;
    sums = std::make_unique<Memory>(DType::Double, c.rows * points, "sums", false);
    td::cuda::running_sums(layout(*weights), points, true, sums->data<double>(), c.rows, nullptr);
  }
  td::RowsIn layout(const Rows& rows) const {
    td::RowsIn in = rows.in();
    if (shared_rows != 0) in.layout.strides[0] = 0;
    return in;
  }
  td::SortedRows rows() const { return {layout(positions), sums != nullptr ? sums->data<double>() : nullptr, size}; }
  template <class T>
  td::SortedSide<T> row(const std::vector<T>& x, const std::vector<T>& w) const {
    return {size, {x.data(), 1}, {w.empty() ? nullptr : w.data(), 1}};
  }
  template <class T>
  std::vector<T> values(const Rows& rows, int64_t i) const {
    std::vector<T> x;
    for (int64_t j = 0; j < size; ++j) x.push_back(static_cast<T>(rows.get(shared_rows != 0 ? 0 : i, j)));
    return x;
  }
};

template <class T>
void check(const Case& c, double p) {
  constexpr bool kWide = sizeof(T) == 8;
  const DType type = kWide ? DType::Double : DType::Float;
  const Side u(c, type, c.n, c.a, c.shared, 1), v(c, type, c.m, c.b, false, 2);
  const bool uniform = u.weights == nullptr && v.weights == nullptr;
  const double tolerance =
      uniform ? 0 : td::rounding_of_masses(c.n + c.m, static_cast<double>(std::numeric_limits<T>::epsilon()));
  const auto rows_of = [&](bool own_is_u) {
    return td::LineRows{own_is_u ? u.rows() : v.rows(), own_is_u ? v.rows() : u.rows(), p, tolerance, 1e-5};
  };
  const int64_t n = c.rows, edges = c.n + c.m - 1;
  Memory coefficient(DType::Double, n, "coefficient", true);
  for (int64_t i = 0; i < n; ++i) coefficient.set(i, 1.5 - static_cast<double>(i));
  std::vector<std::unique_ptr<Memory>> losses, potentials;
  std::vector<std::unique_ptr<Rows>> slopes;
  for (const bool own_is_u : {true, false}) {
    const int64_t size = own_is_u ? c.n : c.m;
    losses.push_back(std::make_unique<Memory>(type, n, "loss", false));
    Memory workspace(DType::Double, td::cuda::wasserstein_1d_workspace(n, size), "workspace", false);
    td::cuda::wasserstein_1d_forward({rows_of(own_is_u), losses.back()->data()}, n, workspace.data<double>(), nullptr);
    slopes.push_back(std::make_unique<Rows>(type, n, size, Layout{}, "slopes", false));
    Memory steps(DType::Double, n * size, "steps", false);
    td::cuda::wasserstein_1d_backward(
        {rows_of(own_is_u), coefficient.data<double>(), own_is_u, slopes.back()->out(), steps.data<double>()}, n,
        nullptr);
    potentials.push_back(std::make_unique<Memory>(DType::Double, n * size, "potentials", false));
    td::RowLayout layout;
    layout.dims = 1, layout.sizes[0] = n, layout.strides[0] = size;
    td::cuda::running_sums({steps.data(), DType::Double, layout}, size, false, potentials.back()->data<double>(), n,
                           nullptr);
  }
  std::vector<std::vector<int64_t>> trees;
  for (const bool first : {true, false}) {
    std::vector<int64_t> own(static_cast<size_t>(n * edges), -1), other = own;
    const simt::Buffer own_buffer(own.data(), own.size() * 8, "own", false),
        other_buffer(other.data(), other.size() * 8, "other", false);
    td::cuda::wasserstein_1d_tree({rows_of(true), first, own.data(), other.data()}, n, nullptr);
    trees.push_back(own), trees.push_back(other);
  }
  const double accuracy = kWide ? 1e-12 : 3e-7;
  for (int64_t i = 0; i < n; ++i) {
    const auto x = u.template values<T>(u.positions, i), y = v.template values<T>(v.positions, i);
    const auto a = u.weights != nullptr ? u.template values<T>(*u.weights, i) : std::vector<T>(),
               b = v.weights != nullptr ? v.template values<T>(*v.weights, i) : std::vector<T>();
    const auto left = u.row(x, a), right = v.row(y, b);
    const td::PowerCost cost{p};
    const double want = td::wasserstein_1d(left, right, cost), g = coefficient.get(i);
    for (const auto& loss : losses) ASSERT_NEAR(loss->get(i), want, accuracy * want) << "loss of row " << i;
    std::vector<double> du(x.size()), dv(y.size()), f(x.size()), h(y.size());
    td::wasserstein_1d_positions(left, right, cost, g, du.data(), dv.data());
    double largest = 0;
    for (const auto& d : {du, dv})
      for (const double s : d) largest = std::max(largest, std::fabs(s));
    // Masses are differences of running sums, each rounded once a point.
    const double allowed = accuracy * largest + td::rounding_of_masses(c.n + c.m, 0) * std::fabs(g * cost.slope(8));
    for (size_t j = 0; j < du.size(); ++j)
      ASSERT_NEAR(slopes[0]->get(i, static_cast<int64_t>(j)), du[j], allowed) << "du of row " << i << ", " << j;
    for (size_t j = 0; j < dv.size(); ++j)
      ASSERT_NEAR(slopes[1]->get(i, static_cast<int64_t>(j)), dv[j], allowed) << "dv of row " << i << ", " << j;
    // Up to the constant that <a, f> = <b, g> settles.
    td::wasserstein_1d_potentials(left, right, cost, 1, f.data(), h.data());
    const double shift_f = f[0] - potentials[0]->get(i * c.n), shift_h = h[0] - potentials[1]->get(i * c.m);
    ASSERT_NEAR(shift_f, -shift_h, 1e-9 * (1 + std::fabs(f[0])));
    for (int64_t j = 0; j < c.n; ++j)
      ASSERT_NEAR(potentials[0]->get(i * c.n + j) + shift_f, f[static_cast<size_t>(j)], 1e-9 * (1 + std::fabs(f[0])))
          << j;
    for (int64_t j = 0; j < c.m; ++j)
      ASSERT_NEAR(potentials[1]->get(i * c.m + j) + shift_h, h[static_cast<size_t>(j)], 1e-9 * (1 + std::fabs(f[0])))
          << j;
    for (const bool first : {true, false}) {
      auto at = static_cast<size_t>(i * edges);
      const auto edge = [&](int64_t r, int64_t s) {
        EXPECT_EQ(std::pair(trees[first ? 0 : 2][at], trees[first ? 1 : 3][at]), std::pair(r, s)) << "edge " << at;
        ++at;
      };
      td::staircase(
          left, right, first, [&](int64_t r, int64_t s, double, bool) { edge(r, s); },
          [&](int64_t r, int64_t s, double) { edge(r, s); });
      ASSERT_FALSE(testing::Test::HasFailure());
    }
  }
}

class Wasserstein1dCuda : public testing::TestWithParam<Case> {};

TEST_P(Wasserstein1dCuda, IsTheSweep) {
  const Case& c = GetParam();
  run_orders(c.n + c.m <= 100, [&] {
    for (const double p : {1.0, 2.0, 1.5}) {
      if (c.n + c.m > 10000 && p != 2) continue;
      ASSERT_NO_FATAL_FAILURE(check<float>(c, p));
      ASSERT_NO_FATAL_FAILURE(check<double>(c, p));
    }
  });
}

const Case kCases[] = {
    {.name = "one_and_one", .n = 1, .m = 1},
    {.name = "one_and_many", .n = 1, .m = 40, .b = Weights::Random},
    {.name = "many_and_one", .n = 40, .m = 1, .a = Weights::WithZeros},
    {.name = "equal_sizes", .n = 24, .m = 24},
    {.name = "multiples", .n = 12, .m = 36},
    {.name = "uniform", .n = 35, .m = 50},
    {.name = "odd", .n = 37, .m = 50, .a = Weights::Random, .b = Weights::Ties},
    {.name = "weights_of_one_side", .b = Weights::Random},
    {.name = "zeros", .a = Weights::WithZeros, .b = Weights::WithZeros},
    {.name = "ties", .n = 15, .m = 45, .a = Weights::Ties},
    {.name = "heavy", .n = 70, .m = 60, .a = Weights::OneHeavy, .b = Weights::Random},
    {.name = "a_block", .rows = 2, .n = 1100, .m = 700, .a = Weights::Random, .b = Weights::Random},
    {.name = "split", .rows = 1, .n = 17000, .m = 300, .a = Weights::Random},
    {.name = "strided", .n = 21, .m = 33, .a = Weights::Random, .b = Weights::Random, .in = {1, 3}},
    {.name = "shared", .n = 21, .m = 33, .a = Weights::Random, .b = Weights::Random, .shared = true},
};
INSTANTIATE_TEST_SUITE_P(Cases, Wasserstein1dCuda, testing::ValuesIn(kCases),
                         [](const auto& test) { return std::string(test.param.name); });

TEST(Wasserstein1dCudaAssertions, WeightsAndMasses) {
  const Case c{.name = "bad", .a = Weights::Random, .b = Weights::Random};
  simt::options = {};
  const Side u(c, DType::Double, c.n, c.a, false, 1), v(c, DType::Double, c.m, c.b, false, 2);
  std::vector<double> loss(3), sums(60);
  // The mass of row 0: at the tolerance itself, and above it.
  u.sums->set(c.n - 1, 1.25), v.sums->set(c.m - 1, 1);
  EXPECT_NO_THROW(
      td::cuda::wasserstein_1d_forward({{u.rows(), v.rows(), 1, 0, 0.2}, loss.data()}, c.rows, nullptr, nullptr));
  u.sums->set(c.n - 1, 1.01);
  EXPECT_THROW(
      td::cuda::wasserstein_1d_forward({{u.rows(), v.rows(), 1, 0, 1e-10}, loss.data()}, c.rows, nullptr, nullptr),
      std::runtime_error);
  for (const double bad : {-0.1, std::nan(""), std::numeric_limits<double>::infinity()}) {
    u.weights->set(1, 3, bad);
    EXPECT_THROW(td::cuda::running_sums(u.weights->in(), c.n, true, sums.data(), c.rows, nullptr), std::runtime_error);
  }
}

}  // namespace
