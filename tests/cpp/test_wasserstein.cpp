// The exact Wasserstein distances through the C++ API, and the solver alone.
#include "gradcheck.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/container/any.h>
#include <torch_divergence/functional.h>
#include <torch_divergence/modules.h>

#include <algorithm>
#include <numeric>
#include <sstream>
#include <vector>

#include "wasserstein/network_simplex.h"

namespace td = torch_divergence;

namespace {

at::Tensor randn(at::IntArrayRef shape) { return at::randn(shape, at::kDouble); }
at::Tensor weights(at::IntArrayRef shape) { return at::softmax(randn(shape), -1); }

void expect_close(const at::Tensor& actual, const at::Tensor& expected, double tolerance = 1e-12) {
  EXPECT_TRUE(at::allclose(actual, expected, tolerance, tolerance)) << actual << "\n" << expected;
}

class Wasserstein : public testing::Test {
 protected:
  void SetUp() override { at::manual_seed(0); }
};

// Every assignment of n points to n points, by permutations.
TEST_F(Wasserstein, NetworkSimplexFindsTheBestAssignment) {
  constexpr int64_t n = 6;
  for (int trial = 0; trial < 50; ++trial) {
    // Few different costs: many bases are degenerate or optimal.
    const at::Tensor cost = trial % 2 == 0 ? at::rand({n, n}, at::kDouble) : at::randint(3, {n, n}, at::kDouble);
    const auto* const c = cost.const_data_ptr<double>();
    const std::vector<double> equal(n, 1.0);
    td::NetworkSimplex simplex(c, n, n, equal.data(), equal.data());
    ASSERT_TRUE(simplex.solve());
    std::vector<int64_t> rows(2 * n - 1), cols(2 * n - 1);
    simplex.tree(rows.data(), cols.data());

    double best = 1e300;
    std::vector<int64_t> to(n);
    std::iota(to.begin(), to.end(), 0);
    do {
      double sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += c[i * n + to[i]];
      best = std::min(best, sum);
    } while (std::next_permutation(to.begin(), to.end()));

    // On the tree: leaves first, each sends what it has left.
    std::vector<double> left(2 * n, 1.0);
    std::vector<bool> used(2 * n - 1, false);
    double value = 0;
    for (int64_t round = 0; round < 2 * n - 1; ++round) {
      for (int64_t v = 0; v < 2 * n; ++v) {
        int64_t edge = -1, degree = 0;
        for (int64_t k = 0; k < 2 * n - 1; ++k)
          if (!used[k] && (v < n ? rows[k] == v : cols[k] == v - n)) {
            edge = k;
            ++degree;
          }
        if (degree != 1) continue;
        used[edge] = true;
        value += left[v] * c[rows[edge] * n + cols[edge]];
        EXPECT_GE(left[v], 0);
        left[v < n ? n + cols[edge] : rows[edge]] -= left[v];
        break;
      }
    }
    EXPECT_NEAR(value, best, 1e-12);
  }
}

TEST_F(Wasserstein, ClosedFormsAndGradients) {
  const at::Tensor x = randn({7, 2}), y = randn({5, 2}), a = weights({7}), b = weights({5});
  expect_close(td::wasserstein(x, x + 1, a, a, td::WassersteinOptions().p(2)), at::scalar_tensor(2.0, at::kDouble));
  expect_close(td::wasserstein(x, y), td::wasserstein(y, x));
  gradcheck::Function f = [&](const gradcheck::Tensors& t) { return td::wasserstein(t[0], t[1], a, b); };
  EXPECT_TRUE(gradcheck::check_marked(f, {x, y}, {true, true}));
  EXPECT_THROW(td::wasserstein(x, y, 2 * a, b), c10::ValueError);
  EXPECT_THROW(td::wasserstein(x, y, a, b, td::WassersteinOptions().p(0.5)), c10::ValueError);
}

TEST_F(Wasserstein, OnTheLine) {
  const at::Tensor u = randn({3, 7}), v = randn({3, 5}), a = weights({3, 7}), b = weights({5});
  const auto options = td::Wasserstein1dOptions().p(2);
  const at::Tensor rows = td::wasserstein_1d(u, v, a, b, options);
  expect_close(rows, td::wasserstein(u.unsqueeze(-1), v.unsqueeze(-1), a, b, td::WassersteinOptions().p(2)));
  expect_close(td::wasserstein_1d(u.t(), v.t(), {}, {}, td::Wasserstein1dOptions().dim(0)), td::wasserstein_1d(u, v));
  gradcheck::Function f = [&](const gradcheck::Tensors& t) { return td::wasserstein_1d(t[0], t[1], a, b, options); };
  EXPECT_TRUE(gradcheck::check_marked(f, {u, v}, {true, true}));
  EXPECT_THROW(td::wasserstein_1d(u, v, 2 * a, b), c10::ValueError);
}

TEST_F(Wasserstein, Sliced) {
  const at::Tensor x = randn({4, 6, 3}), y = randn({5, 3}), theta = randn({8, 3});
  const auto options = td::SlicedWassersteinOptions().projections(theta);
  const at::Tensor slices = td::wasserstein_1d(at::matmul(theta, x.mT()), at::matmul(theta, y.mT()).expand({4, 8, 5}),
                                               {}, {}, td::Wasserstein1dOptions().p(2));
  expect_close(td::sliced_wasserstein(x, y, {}, {}, options), slices.mean(-1));
  auto generator = at::detail::getDefaultCPUGenerator().clone();
  auto same = generator.clone();
  expect_close(td::sliced_wasserstein(x, y, {}, {}, td::SlicedWassersteinOptions().generator(generator)),
               td::sliced_wasserstein(x, y, {}, {}, td::SlicedWassersteinOptions().generator(same)), 0);
}

TEST_F(Wasserstein, Gaussians) {
  const at::Tensor mean = randn({3}), factor = randn({3, 3}), cov = at::matmul(factor, factor.mT()) + at::eye(3);
  EXPECT_EQ(td::gaussian_wasserstein(mean, cov, mean, cov).item<double>(), 0);
  expect_close(td::gaussian_wasserstein(mean, cov, mean + 1, 4 * cov), 3 + cov.trace());
  const at::Tensor s = cov.clone().requires_grad_();
  td::gaussian_wasserstein(mean, s, mean, 4 * cov).backward();
  expect_close(s.grad(), -at::eye(3, at::kDouble));
}

TEST_F(Wasserstein, Modules) {
  const at::Tensor u = randn({3, 7}), v = randn({3, 5}), x = randn({2, 6, 3}), y = randn({2, 5, 3}),
                   theta = randn({4, 3});
  td::Wasserstein1dLoss line(td::Wasserstein1dOptions().p(2).reduction(td::Reduction::Sum));
  expect_close(line(u, v), td::wasserstein_1d(u, v, {}, {}, td::Wasserstein1dOptions().p(2)).sum());
  expect_close(td::Wasserstein1dLoss()(u, v), td::wasserstein_1d(u, v));
  td::SlicedWassersteinLoss sliced;
  const at::Tensor rows = td::sliced_wasserstein(x, y, {}, {}, td::SlicedWassersteinOptions().projections(theta));
  expect_close(sliced(x, y, std::nullopt, std::nullopt, theta), rows.mean());
  EXPECT_THROW(td::SlicedWassersteinLoss(td::SlicedWassersteinOptions().projections(theta)), c10::ValueError);
  td::SlicedWassersteinLoss changed;
  changed->options.projections(theta);
  EXPECT_THROW(changed(x, y), c10::ValueError);
  // The mean stays the default whatever other options are given.
  EXPECT_EQ(td::SlicedWassersteinLoss(td::SlicedWassersteinOptions().n_projections(8))(x, y).dim(), 0);
  const auto none = td::SlicedWassersteinOptions().reduction(td::Reduction::None);
  EXPECT_EQ(td::SlicedWassersteinLoss(none)(x, y).sizes(), at::IntArrayRef({2}));
  std::ostringstream stream;
  stream << line << sliced;
  EXPECT_EQ(stream.str(),
            "torch_divergence::Wasserstein1dLoss(p=2, dim=-1, reduction=sum)"
            "torch_divergence::SlicedWassersteinLoss(p=2, n_projections=128, reduction=mean)");
  torch::nn::AnyModule any(line);
  expect_close(any.forward(u, v), line(u, v));
}

}  // namespace
