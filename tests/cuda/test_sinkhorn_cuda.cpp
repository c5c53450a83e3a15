// The CUDA kernels of entropic optimal transport on the emulated device, against sums in long double: one update, whole
// solves, batches, sweeps; sizes around every unit, block and segment. Whatever the checker finds (emulator/simt.cpp)
// fails the test that launched the kernel.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>
#include <memory>
#include <numeric>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "simt.h"
#include "sinkhorn/sinkhorn.h"

namespace {

using namespace torch_divergence;
using namespace torch_divergence::transport;
using Real = long double;
constexpr double kHard = std::numeric_limits<double>::infinity();

// Arrays of the device, which the checker knows.
class Arrays {
 public:
  template <class T>
  T* add(std::vector<T> values, const char* name, bool initialised = true) {
    auto kept = std::make_shared<std::vector<T>>(std::move(values));
    kept_.push_back(kept);
    buffers_.emplace_back(kept->data(), kept->size() * sizeof(T), name, initialised);
    return kept->data();
  }
  // Numbers in the pairs' type.
  void* of_type(bool is_double, const std::vector<double>& values, const char* name, bool initialised = true) {
    if (is_double) return add(values, name, initialised);
    return add(std::vector<float>(values.begin(), values.end()), name, initialised);
  }

 private:
  std::deque<std::shared_ptr<void>> kept_;
  std::deque<simt::Buffer> buffers_;
};

std::vector<double> unknown(int64_t count) {
  return std::vector<double>(static_cast<size_t>(count), std::numeric_limits<double>::quiet_NaN());
}
double as_float(double x) { return static_cast<double>(static_cast<float>(x)); }

struct Case {
  const char* name;
  std::vector<int64_t> rows, cols;  // of each problem
  int64_t dims;
  int cost = kHalfSqEuclidean;
  double eps = 0.5;
  double rho_a = kHard, rho_b = kHard;
  bool is_double = false, symmetric = false, weightless = false;
  double offset = 0;     // of all coordinates
  bool forbids = false;  // some entries of a matrix are infinite
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

// A batch in the device's memory, and the same in plain vectors.
class Device {
 public:
  explicit Device(const Case& c) : c_(c) {
    const auto starts = [](const std::vector<int64_t>& counts) {
      std::vector<int64_t> at{0};
      for (const int64_t n : counts) at.push_back(at.back() + n);
      return at;
    };
    rows_at = starts(c.rows), cols_at = c.symmetric ? rows_at : starts(c.cols);
    const int64_t n = rows_at.back(), m = cols_at.back(), problems = static_cast<int64_t>(c.rows.size());
    std::mt19937_64 random(static_cast<uint64_t>(7 * n + m));
    std::normal_distribution<double> normal;
    const auto rounded = [&](double v) { return c.is_double ? v : as_float(v); };
    const auto points = [&](int64_t count, double shift) {
      std::vector<double> v(static_cast<size_t>(count * c.dims));
      for (double& t : v) t = rounded(std::round(1024 * (normal(random) + shift)) / 1024 + c.offset);
      return v;
    };
    const auto weights = [&](const std::vector<int64_t>& at) {
      std::vector<double> w(static_cast<size_t>(at.back()));
      for (size_t s = 0; s + 1 < at.size(); ++s) {
        double sum = 0;
        for (int64_t i = at[s]; i < at[s + 1]; ++i) {
          auto& t = w[static_cast<size_t>(i)];
          t = c.weightless && i - at[s] == 1 ? 0 : 0.2 + std::abs(normal(random));
          sum += t;
        }
        for (int64_t i = at[s]; i < at[s + 1]; ++i) w[static_cast<size_t>(i)] /= sum;
      }
      return w;
    };
    x = points(n, 0), y = c.symmetric ? x : points(m, 0.3);
    a = weights(rows_at), b = c.symmetric ? a : weights(cols_at);
    pairs.is_double = c.is_double;
    pairs.cost = c.cost;
    pairs.problems = problems;
    pairs.dims = c.dims;
    pairs.row_start = arrays.add(rows_at, "row_start"), pairs.col_start = arrays.add(cols_at, "col_start");
    pairs.x_stride = n, pairs.y_stride = m;
    if (c.cost == kCostMatrix) {
      matrix.resize(static_cast<size_t>(problems * c.rows[0] * c.cols[0]));
      for (double& t : matrix) t = rounded(std::abs(normal(random)));
      if (c.forbids)
        for (size_t e = 0; e < matrix.size(); e += 11) matrix[e] = kHard;
      pairs.matrix = arrays.of_type(c.is_double, matrix, "matrix");
    } else {
      pairs.x = arrays.of_type(c.is_double, x, "x");
      pairs.y = c.symmetric ? pairs.x : arrays.of_type(c.is_double, y, "y");
    }
    eps = std::vector<double>(static_cast<size_t>(problems), c.eps);
    for (size_t s = 0; s < eps.size(); ++s) eps[s] *= 1 + 0.25 * static_cast<double>(s);
    a_ = arrays.add(a, "a"), b_ = c.symmetric ? a_ : arrays.add(b, "b"), eps_ = arrays.add(eps, "eps");
  }

  int64_t n() const { return rows_at.back(); }
  int64_t m() const { return cols_at.back(); }
  Real cost(size_t s, int64_t i, int64_t j) const {  // of the problem's i-th row and j-th column
    if (c_.cost == kCostMatrix) return matrix[static_cast<size_t>((rows_at[s] + i) * c_.cols[s] + j)];
    Real square = 0;
    for (int64_t k = 0; k < c_.dims; ++k) {
      const Real d = static_cast<Real>(x[static_cast<size_t>(k * n() + rows_at[s] + i)]) -
                     static_cast<Real>(y[static_cast<size_t>(k * m() + cols_at[s] + j)]);
      square += d * d;
    }
    return c_.cost == kEuclidean ? std::sqrt(square) : c_.cost == kSqEuclidean ? square : square / 2;
  }

  // Runs the solver until it stops.
  void solve(double tol, int64_t max_iter) {
    const auto problems = pairs.problems;
    SinkhornSolve call{};
    call.pairs = pairs;
    call.rows_at = rows_at.data(), call.cols_at = cols_at.data();
    call.a = a_, call.b = b_, call.eps = eps_;
    call.rho_a = c_.rho_a, call.rho_b = c_.rho_b;
    call.symmetric = c_.symmetric;
    call.tol = tol, call.max_iter = max_iter;
    call.mass_rounding = 1e-5;
    call.f = f = arrays.add(unknown(n()), "f", false), call.g = g = arrays.add(unknown(m()), "g", false);
    call.value = value = arrays.add(unknown(problems), "value", false);
    call.marginal_error = error = arrays.add(unknown(problems), "error", false);
    call.iterations = iterations = arrays.add(std::vector<int64_t>(static_cast<size_t>(problems), -1), "n", false);
    call.status = status = arrays.add(std::vector<int>(static_cast<size_t>(problems), -1), "status", false);
    double* const workspace = arrays.add(unknown(cuda::sinkhorn_workspace(call)), "workspace", false);
    cuda::sinkhorn_begin(call, workspace, nullptr);
    while (std::any_of(status, status + problems, [](int v) { return v == kSinkhornRuns; }))
      cuda::sinkhorn_passes(call, 4, workspace, nullptr);
  }

  Arrays arrays;
  std::vector<int64_t> rows_at, cols_at;
  std::vector<double> x, y, matrix, a, b, eps;
  PairBatch pairs{};
  double *f = nullptr, *g = nullptr, *value = nullptr, *error = nullptr;
  int64_t* iterations = nullptr;
  int* status = nullptr;
  double *a_, *b_, *eps_;

 private:
  const Case& c_;
};

class SinkhornCuda : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    simt::options = {};
    simt::options.only_buffers = true;
  }
  void TearDown() override { simt::options = {}; }
};

// One iteration from 0: f is the soft c-transform of 0, and g + f is all that the gauge leaves.
TEST_P(SinkhornCuda, OneUpdate) {
  Case c = GetParam();
  if (c.symmetric) GTEST_SKIP() << "averages with what was before";
  c.rho_a = c.rho_b = kHard;
  // Between them the cases try every order of the threads.
  const auto& [order, seed] = simt::schedules[std::string(c.name).size() % simt::schedules.size()];
  simt::options.order = order, simt::options.seed = seed;
  Device d(c);
  d.solve(0, 1);
  for (size_t s = 0; s < c.rows.size(); ++s) {
    const Real eps = d.eps[s];
    EXPECT_TRUE(d.status[s] == kSinkhornStopped || d.status[s] == kSinkhornConverged) << d.status[s];
    EXPECT_EQ(d.iterations[s], 1);
    for (int64_t i = 0; i < c.rows[s]; ++i) {
      Real top = -std::numeric_limits<Real>::infinity(), sum = 0, size = 0;
      for (int64_t j = 0; j < c.cols[s]; ++j)
        if (d.b[static_cast<size_t>(d.cols_at[s] + j)] > 0) top = std::max(top, -d.cost(s, i, j) / eps);
      for (int64_t j = 0; j < c.cols[s]; ++j) {
        const Real w = d.b[static_cast<size_t>(d.cols_at[s] + j)];
        sum += w * std::exp(-d.cost(s, i, j) / eps - top);
        if (std::isfinite(d.cost(s, i, j))) size = std::max(size, d.cost(s, i, j));
      }
      const int64_t counted = c.weightless ? 0 : c.cols[s] - 1;  // g of a weightless column is something else
      const Real got = static_cast<Real>(d.f[d.rows_at[s] + i]) + static_cast<Real>(d.g[d.cols_at[s] + counted]);
      const Real unit = c.is_double ? 1e-13L : 1e-6L;
      EXPECT_NEAR(static_cast<double>(got), static_cast<double>(-eps * (top + std::log(sum))),
                  static_cast<double>(unit * (size + eps)))
          << "problem " << s << ", row " << i;
    }
  }
}

// What is returned belongs together: f is an update, the error is that of the columns, the value is the dual.
TEST_P(SinkhornCuda, Solves) {
  const Case& c = GetParam();
  Device d(c);
  const double tol = c.is_double ? 1e-6 : 1e-4;
  d.solve(tol, 500);
  for (size_t s = 0; s < c.rows.size(); ++s) {
    ASSERT_EQ(d.status[s], kSinkhornConverged) << d.error[s];
    const Real eps = d.eps[s];
    const int64_t n = c.rows[s], m = d.cols_at[s + 1] - d.cols_at[s], row = d.rows_at[s], col = d.cols_at[s];
    std::vector<Real> r(static_cast<size_t>(n)), q(static_cast<size_t>(m));
    Real plan = 0, value = 0;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < m; ++j) {
        const Real p =
            static_cast<Real>(d.a[static_cast<size_t>(row + i)]) *
            static_cast<Real>(d.b[static_cast<size_t>(col + j)]) *
            std::exp((static_cast<Real>(d.f[row + i]) + static_cast<Real>(d.g[col + j]) - d.cost(s, i, j)) / eps);
        r[static_cast<size_t>(i)] += p, q[static_cast<size_t>(j)] += p, plan += p;
      }
    const auto side = [&](const std::vector<Real>& sums, const double* weight, const double* potential, double rho) {
      Real off = 0, aim = 0;
      for (size_t i = 0; i < sums.size(); ++i) {
        const Real w = weight[i], t = potential[i],
                   target = std::isinf(rho) ? w : w * std::exp(-t / static_cast<Real>(rho));
        off += std::fabs(sums[i] - target), aim += target;
        value += w * (std::isinf(rho) ? t : -static_cast<Real>(rho) * std::expm1(-t / static_cast<Real>(rho)));
      }
      return off / aim;
    };
    const double rho_b = c.symmetric ? c.rho_a : c.rho_b;
    const Real of_rows = side(r, d.a.data() + row, d.f + row, c.rho_a),
               of_cols = side(q, d.b.data() + col, d.g + col, rho_b);
    value -= eps * (plan - 1);
    const double slack = c.is_double ? 1e-11 : 3e-5;
    EXPECT_LE(static_cast<double>(of_rows), tol + slack);
    EXPECT_LE(static_cast<double>(of_cols), tol + slack);
    EXPECT_NEAR(d.error[s], static_cast<double>(std::max(of_rows, of_cols)), slack);
    EXPECT_NEAR(d.value[s], static_cast<double>(value),
                (c.is_double ? 1e-11 : 2e-5) * std::max(1.0, std::abs(d.value[s])));
  }
}

// Each problem of a batch is solved as by itself, bit for bit, though small ones take another kernel then.
TEST_P(SinkhornCuda, BatchIsALoop) {
  const Case& c = GetParam();
  if (c.rows.size() == 1) GTEST_SKIP() << "no batch";
  Device all(c);
  all.solve(c.is_double ? 1e-8 : 1e-4, 6);
  for (size_t s = 0; s < c.rows.size(); ++s) {
    Case alone = c;
    alone.rows = {c.rows[s]}, alone.cols = {c.cols[s]};
    Device one(alone);
    const auto part = [&](const std::vector<double>& v, int64_t total, int64_t first, int64_t count, auto* to) {
      for (int64_t k = 0; k < c.dims; ++k)
        for (int64_t i = 0; i < count; ++i)
          to[k * count + i] =
              static_cast<std::remove_pointer_t<decltype(to)>>(v[static_cast<size_t>(k * total + first + i)]);
    };
    const auto give = [&]<class A>(A) {
      if (c.cost == kCostMatrix) {
        const auto first = static_cast<int64_t>(s) * c.rows[s] * c.cols[s];
        for (int64_t e = 0; e < c.rows[s] * c.cols[s]; ++e)
          static_cast<A*>(const_cast<void*>(one.pairs.matrix))[e] =
              static_cast<A>(all.matrix[static_cast<size_t>(first + e)]);
        return;
      }
      part(all.x, all.n(), all.rows_at[s], c.rows[s], static_cast<A*>(const_cast<void*>(one.pairs.x)));
      part(all.y, all.m(), all.cols_at[s], one.m(), static_cast<A*>(const_cast<void*>(one.pairs.y)));
    };
    c.is_double ? give(double()) : give(float());
    std::copy_n(all.a.data() + all.rows_at[s], one.n(), one.a_);
    std::copy_n(all.b.data() + all.cols_at[s], one.m(), one.b_);
    *one.eps_ = all.eps[s];
    one.solve(c.is_double ? 1e-8 : 1e-4, 6);
    EXPECT_EQ(all.value[s], *one.value);
    EXPECT_EQ(all.iterations[s], *one.iterations);
    for (int64_t i = 0; i < one.n(); ++i) EXPECT_EQ(all.f[all.rows_at[s] + i], one.f[i]);
    for (int64_t j = 0; j < one.m(); ++j) EXPECT_EQ(all.g[all.cols_at[s] + j], one.g[j]);
  }
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const bool is_double : {false, true}) {
    const auto add = [&](Case c) {
      c.is_double = is_double;
      all.push_back(c);
    };
    add({.name = "one_pair", .rows = {1}, .cols = {1}, .dims = 2});
    add({.name = "unit", .rows = {4}, .cols = {32}, .dims = 3, .eps = 1});
    add({.name = "odd", .rows = {37}, .cols = {131}, .dims = 3, .weightless = true});
    add({.name = "any_dims", .rows = {33}, .cols = {20}, .dims = 7, .eps = 4});
    add({.name = "one_dim", .rows = {5}, .cols = {129}, .dims = 1, .weightless = true});
    add({.name = "euclidean", .rows = {20}, .cols = {30}, .dims = 2, .cost = kEuclidean, .eps = 0.3});
    add({.name = "squared", .rows = {9}, .cols = {10}, .dims = 3, .cost = kSqEuclidean, .eps = 2});
    add({.name = "flat", .rows = {11}, .cols = {140}, .dims = 3, .eps = 1e4, .weightless = true});
    add({.name = "matrix", .rows = {7, 7}, .cols = {40, 40}, .dims = 0, .cost = kCostMatrix, .weightless = true});
    add({.name = "forbidden", .rows = {7, 7}, .cols = {40, 40}, .dims = 0, .cost = kCostMatrix, .forbids = true});
    add({.name = "large_forbidden",
         .rows = {3},
         .cols = {260},
         .dims = 0,
         .cost = kCostMatrix,
         .eps = 50,
         .forbids = true});
    add({.name = "unbalanced", .rows = {20}, .cols = {30}, .dims = 2, .rho_a = 0.7, .rho_b = 2, .weightless = true});
    add({.name = "semi_relaxed", .rows = {20}, .cols = {13}, .dims = 2, .rho_b = 1});
    add({.name = "symmetric", .rows = {30, 5}, .cols = {30, 5}, .dims = 3, .symmetric = true, .weightless = true});
    add({.name = "symmetric_relaxed",
         .rows = {12},
         .cols = {12},
         .dims = 2,
         .rho_a = 1,
         .rho_b = 1,
         .symmetric = true});
    add({.name = "ragged", .rows = {3, 40, 1}, .cols = {50, 2, 129}, .dims = 2});
    add({.name = "large", .rows = {40}, .cols = {300}, .dims = 2, .weightless = true});
    add({.name = "large_and_small", .rows = {260, 3}, .cols = {33, 200}, .dims = 3});
    add({.name = "large_flat", .rows = {5}, .cols = {260}, .dims = 2, .eps = 1e3, .weightless = true});
    add({.name = "large_matrix", .rows = {3, 3}, .cols = {260, 260}, .dims = 0, .cost = kCostMatrix});
    add({.name = "large_symmetric", .rows = {257}, .cols = {257}, .dims = 2, .symmetric = true});
    add({.name = "large_unbalanced", .rows = {12}, .cols = {270}, .dims = 5, .eps = 2, .rho_a = 3, .rho_b = 3});
    add({.name = "far", .rows = {20}, .cols = {30}, .dims = 3, .offset = 1000});
  }
  return all;
}
INSTANTIATE_TEST_SUITE_P(, SinkhornCuda, testing::ValuesIn(cases()), [](const auto& test) {
  return std::string(test.param.name) + (test.param.is_double ? "_double" : "_float");
});

TEST(SinkhornCudaValues, InvalidProblemsAreLeft) {
  for (const int64_t rows : {5, 300}) {
    const Case c{.name = "", .rows = {rows, rows, rows}, .cols = {6, 6, 6}, .dims = 2};
    Device d(c);
    d.eps_[0] = -1;
    d.b_[7] = -1;
    d.solve(1e-3, 50);
    EXPECT_EQ(d.status[0], kSinkhornInvalid);
    EXPECT_EQ(d.status[1], kSinkhornInvalid);
    EXPECT_EQ(d.status[2], kSinkhornConverged);
    d.a_[2 * rows] += 0.1;
    d.solve(1e-3, 50);
    EXPECT_EQ(d.status[2], kSinkhornInvalid);
  }
}

// A score without weight is below every other, also where those are far below -1e30.
TEST(SinkhornCudaValues, ColdProblems) {
  for (const bool is_double : {false, true})
    for (const int64_t cols : {30, 300}) {
      const Case c{.name = "",
                   .rows = {5},
                   .cols = {cols},
                   .dims = 2,
                   .eps = is_double ? 1e-200 : 1e-32,
                   .is_double = is_double,
                   .weightless = true};
      Device d(c);
      d.solve(0, 1);
      for (int64_t i = 0; i < 5; ++i) {
        Real low = std::numeric_limits<Real>::infinity();
        for (int64_t j = 0; j < cols; ++j)
          if (d.b[static_cast<size_t>(j)] > 0) low = std::min(low, d.cost(0, i, j));
        EXPECT_NEAR(static_cast<double>(low), d.f[i] + d.g[0], 1e-6 * (1 + static_cast<double>(low)));
      }
    }
}

// An atom that can meet no other: no value, and no convergence.
TEST(SinkhornCudaValues, InfiniteCoordinates) {
  for (const int64_t cols : {30, 300})
    for (const double eps : {0.5, 1e4}) {
      const Case c{.name = "", .rows = {5}, .cols = {cols}, .dims = 2, .eps = eps};
      Device d(c);
      static_cast<float*>(const_cast<void*>(d.pairs.y))[3] = std::numeric_limits<float>::infinity();
      d.solve(1e-3, 50);
      EXPECT_EQ(d.status[0], kSinkhornStopped);
      EXPECT_FALSE(std::isfinite(d.value[0]));
    }
}

// Every term and every output of a sweep at once, from both sides.
TEST(SinkhornCudaSweep, EqualsItsFormula) {
  for (const bool is_double : {false, true})
    for (const int cost : {int{kHalfSqEuclidean}, int{kSqEuclidean}, int{kEuclidean}, int{kCostMatrix}})
      for (const bool transposed : {false, true}) {
        const bool points = cost != kCostMatrix;
        const int64_t columns = transposed ? 5 : 290;  // more than a tile
        const Case c{.name = "",
                     .rows = {3, 3},
                     .cols = {columns, columns},
                     .dims = points ? 5 : 0,
                     .cost = cost,
                     .eps = 2,
                     .is_double = is_double};
        Device d(c);
        std::mt19937_64 random(3);
        std::normal_distribution<double> normal;
        const auto numbers = [&](int64_t count) {
          std::vector<double> v(static_cast<size_t>(count));
          for (double& t : v) t = as_float(0.5 * normal(random));
          return v;
        };
        const auto& rows_at = transposed ? d.cols_at : d.rows_at;
        const auto& cols_at = transposed ? d.rows_at : d.cols_at;
        const int64_t n = rows_at.back(), m = cols_at.back(), rank = 2, width = 3, D = c.dims;
        const auto f = numbers(n), a = numbers(n), alpha_row = numbers(n), p = numbers(n), g = numbers(m),
                   b = numbers(m), beta = numbers(m), q = numbers(m), vx = numbers(n * D), vy = numbers(m * D),
                   t = numbers(n * rank), v = numbers(m * rank), payload = numbers(m * width),
                   v_matrix = numbers(points ? 0 : static_cast<int64_t>(d.matrix.size()));
        const int64_t in_row = transposed ? 1 : c.cols[0], in_col = transposed ? c.cols[0] : 1;
        PairSweep k{};
        k.pairs = {is_double,
                   cost,
                   n,
                   0,
                   D,
                   transposed ? d.pairs.y : d.pairs.x,
                   transposed ? d.pairs.x : d.pairs.y,
                   n,
                   m,
                   d.pairs.matrix,
                   in_row,
                   in_col};
        auto& arrays = d.arrays;
        const auto typed = [&](const std::vector<double>& from, const char* name) {
          return arrays.of_type(is_double, from, name);
        };
        k.f = arrays.add(f, "f"), k.a = arrays.add(a, "a"), k.alpha_row = arrays.add(alpha_row, "alpha"),
        k.p = arrays.add(p, "p");
        k.g = typed(g, "g"), k.b = typed(b, "b"), k.beta = typed(beta, "beta"), k.q = typed(q, "q");
        k.alpha = 0.75, k.lambda = -0.5, k.veps = 0.25;
        k.second = points;
        if (points) {
          k.vx = typed(vx, "vx"), k.vy = typed(vy, "vy");
        } else {
          k.v_matrix = typed(v_matrix, "v_matrix");
        }
        k.t = typed(t, "t"), k.v = typed(v, "v"), k.rank = rank;
        k.payload = typed(payload, "payload"), k.payload_dims = width;
        const auto out = [&](const char* name) { return arrays.add(unknown(n), name, false); };
        k.sum = out("sum"), k.sum_cost = out("sum_cost"), k.sum_z = out("sum_z"), k.entropy = out("entropy");
        if (points) k.gradient = arrays.of_type(is_double, unknown(n * D), "gradient", false);
        k.product = arrays.of_type(is_double, unknown(n * width), "product", false);
        if (!points)
          k.matrix_out = arrays.of_type(is_double, unknown(static_cast<int64_t>(d.matrix.size())), "matrix_out", false);
        simt::options = {};
        simt::options.only_buffers = true;
        cuda::sinkhorn_pair_sweep(k,
                                  {transposed ? d.pairs.col_start : d.pairs.row_start,
                                   transposed ? d.pairs.row_start : d.pairs.col_start, 2, d.eps_},
                                  nullptr);
        simt::options = {};

        const auto entry = [&](const void* from, int64_t at) {
          return is_double ? static_cast<const double*>(from)[at]
                           : static_cast<double>(static_cast<const float*>(from)[at]);
        };
        const auto expect = [&](double got, Real want, Real size) {
          EXPECT_NEAR(got, static_cast<double>(want), static_cast<double>((is_double ? 1e-13L : 2e-6L) * size));
        };
        const auto at = [](const std::vector<double>& from, int64_t i) {
          return static_cast<Real>(from[static_cast<size_t>(i)]);
        };
        for (size_t s = 0; s < 2; ++s)
          for (int64_t i = rows_at[s]; i < rows_at[s + 1]; ++i) {
            std::vector<Real> sums(static_cast<size_t>(4 + D + width)), sizes(sums);
            // size: what the term's rounding is relative to.
            const auto add = [&](int64_t to, Real term, Real size) {
              sums[static_cast<size_t>(to)] += term, sizes[static_cast<size_t>(to)] += std::fabs(size);
            };
            for (int64_t j = cols_at[s]; j < cols_at[s + 1]; ++j) {
              const int64_t row = i - rows_at[s], col = j - cols_at[s];
              const Real C = transposed ? d.cost(s, col, row) : d.cost(s, row, col), eps = d.eps[s],
                         z = (at(f, i) + at(g, j) - C) / eps, W = std::exp(z);
              const int64_t in_matrix = d.rows_at[s] * c.cols[s] + row * in_row + col * in_col;
              const Real root = cost == kEuclidean ? C : 1, factor = cost == kSqEuclidean ? 2 : 1 / root;
              Real along = 0, inner = 0, parts = 0.75L + std::fabs(at(alpha_row, i)) + std::fabs(at(beta, j));
              const auto& x = transposed ? d.y : d.x;
              const auto& y = transposed ? d.x : d.y;
              const auto both = [&](Real& sum, Real term, Real scale) {
                sum += term, parts += std::fabs(scale * term);
              };
              for (int64_t e = 0; e < D; ++e)
                both(along, (at(x, e * n + i) - at(y, e * m + j)) * (at(vx, e * n + i) - at(vy, e * m + j)), factor);
              for (int64_t e = 0; e < rank; ++e) both(inner, at(t, e * n + i) * at(v, e * m + j), 1);
              const Real change = (points ? factor * along : at(v_matrix, in_matrix)) + 0.25L * z,
                         plan = at(a, i) * at(b, j) * W,
                         Q = plan * (0.75L + at(alpha_row, i) + at(beta, j) - 0.5L * change + inner) +
                             W * (at(b, j) * at(p, i) + at(a, i) * at(q, j));
              const Real steep = 1 + (std::fabs(at(f, i)) + std::fabs(at(g, j)) + C) / eps,
                         size = steep * W *
                                (std::fabs(at(a, i) * at(b, j)) * (parts + 1 + std::fabs(z)) +
                                 std::fabs(at(b, j) * at(p, i)) + std::fabs(at(a, i) * at(q, j)));
              add(0, Q, size), add(1, Q * C, size * C), add(2, Q * z, size * steep);
              add(3, at(b, j) * (z * W - W + 1), at(b, j) * steep * (steep * W + 1));
              for (int64_t e = 0; e < D; ++e) {
                const Real difference = at(x, e * n + i) - at(y, e * m + j),
                           moved = at(vx, e * n + i) - at(vy, e * m + j);
                const Real bend = cost == kEuclidean ? along * difference / (C * C * C) : 0;
                add(4 + e, Q * factor * difference, size * factor * difference);
                add(4 + e, plan * factor * moved, steep * plan * factor * moved);
                add(4 + e, -plan * bend, steep * plan * parts * difference / (C * C));
              }
              for (int64_t e = 0; e < width; ++e)
                add(4 + D + e, Q * at(payload, e * m + j), size * at(payload, e * m + j));
              if (!points) expect(entry(k.matrix_out, in_matrix), Q, size);
            }
            const double* const scalars[] = {k.sum, k.sum_cost, k.sum_z, k.entropy};
            for (size_t o = 0; o < 4; ++o) expect(scalars[o][i], sums[o], sizes[o]);
            for (int64_t e = 0; e < D; ++e)
              expect(entry(k.gradient, i * D + e), sums[static_cast<size_t>(4 + e)], sizes[static_cast<size_t>(4 + e)]);
            for (int64_t e = 0; e < width; ++e)
              expect(entry(k.product, i * width + e), sums[static_cast<size_t>(4 + D + e)],
                     sizes[static_cast<size_t>(4 + D + e)]);
          }
      }
}

// The gradient by points is an average, whose weights may all be beyond the exponential's range.
TEST(SinkhornCudaSweep, AveragesAtAnyPotentials) {
  for (const bool is_double : {false, true})
    for (const double level : {-3000.0, 0.0, 3000.0}) {
      const Case c{
          .name = "", .rows = {2}, .cols = {70}, .dims = 3, .cost = kEuclidean, .eps = 1, .is_double = is_double};
      Device d(c);
      const int64_t n = 2, m = 70;
      std::vector<double> f(n, level), g(m), b(m, 1.0 / 64);
      for (int64_t j = 0; j < m; ++j) g[static_cast<size_t>(j)] = 0.0625 * static_cast<double>(j % 16);
      g[5] = 9000, b[5] = 0;  // far above all others, and without weight
      // Far above the rest, and by 0.75 apart: both would be cut to one weight if the largest were not found. Float has
      // no digits for that beside 400.
      if (is_double) g[32] = 400, g[65] = 400.75;
      auto& arrays = d.arrays;
      PairSweep k{};
      k.pairs = {is_double, kEuclidean, n, 0, 3, d.pairs.x, d.pairs.y, n, m, nullptr, 1, 1};
      k.f = arrays.add(f, "f");
      k.g = arrays.of_type(is_double, g, "g"), k.b = arrays.of_type(is_double, b, "b");
      k.alpha = 1;
      k.sum = arrays.add(unknown(n), "sum", false);
      k.gradient = arrays.of_type(is_double, unknown(n * 3), "gradient", false);
      simt::options = {};
      simt::options.only_buffers = true;
      cuda::sinkhorn_pair_sweep(k, {d.pairs.row_start, d.pairs.col_start, 1, d.eps_, /*over_largest=*/true}, nullptr);
      simt::options = {};
      for (int64_t i = 0; i < n; ++i) {
        Real total = 0, pulled[3] = {};
        for (int64_t j = 0; j < m; ++j) {
          const Real cost = d.cost(0, i, j),
                     w = static_cast<Real>(b[static_cast<size_t>(j)]) *
                         (j == 5 ? 0 : std::exp((static_cast<Real>(g[static_cast<size_t>(j)]) - cost) / d.eps[0]));
          total += w;
          for (int64_t e = 0; e < 3; ++e)
            pulled[e] += w *
                         (static_cast<Real>(d.x[static_cast<size_t>(e * n + i)]) -
                          static_cast<Real>(d.y[static_cast<size_t>(e * m + j)])) /
                         cost;
        }
        for (int64_t e = 0; e < 3; ++e) {
          const double got = is_double ? static_cast<const double*>(k.gradient)[i * 3 + e]
                                       : static_cast<double>(static_cast<const float*>(k.gradient)[i * 3 + e]);
          // In float a level of 3000 leaves a potential three digits behind the point.
          EXPECT_NEAR(got / k.sum[i], static_cast<double>(pulled[e] / total),
                      is_double    ? 1e-11
                      : level == 0 ? 1e-6
                                   : 1e-3);
        }
      }
    }
}

}  // namespace
