// Gaussian KL, KL estimates and the Fisher-vector product through the C++ API.
#include "gradcheck.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch_divergence/torch_divergence.h>

#include <cmath>
#include <sstream>

namespace td = torch_divergence;

namespace {

at::Tensor draw(at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble); }

void expect_close(const at::Tensor& actual, const at::Tensor& expected) {
  EXPECT_TRUE(at::allclose(actual, expected, 1e-11, 1e-14)) << actual << "\n" << expected;
}

at::Tensor textbook(const at::Tensor& m, const at::Tensor& v, const at::Tensor& c, const at::Tensor& w) {
  return ((v - w).exp() - 1 - (v - w) + (m - c).pow(2) * (-w).exp()).sum(-1) / 2;
}

TEST(GaussianKl, ValuesAndDerivatives) {
  const auto m = draw({3, 5}), v = draw({3, 5}), c = draw({5}), w = draw({3, 1});
  const auto zero = at::zeros({}, at::kDouble);
  expect_close(td::gaussian_kl(m, v), textbook(m, v, zero, zero).mean());
  expect_close(td::gaussian_kl(m, v, c, w), textbook(m, v, c, w).mean());
  expect_close(td::gaussian_kl(m, v, std::nullopt, w, td::GaussianKLOptions().reduction(td::Reduction::None)),
               textbook(m, v, zero, w));
  const auto f = [](const gradcheck::Tensors& x) { return td::gaussian_kl(x[0], x[1], x[2], x[3]); };
  EXPECT_TRUE(gradcheck::gradients_match(f, {m, v, c, w}));
  EXPECT_TRUE(gradcheck::second_gradients_match(f, {m, v, c, w}));
  EXPECT_THROW(td::gaussian_kl(m, draw({3, 4})), c10::ValueError);
}

TEST(GaussianKl, FullOfDiagonalFactorsIsDiagonal) {
  const auto m = draw({3, 4}), v = draw({3, 4}), c = draw({3, 4}), w = draw({3, 4});
  expect_close(td::gaussian_kl_full(m, (v / 2).exp().diag_embed(), c, (w / 2).exp().diag_embed()),
               td::gaussian_kl(m, v, c, w));
  EXPECT_THROW(td::gaussian_kl_full(m, -at::eye(4, at::kDouble).expand({3, 4, 4}), c, (w / 2).exp().diag_embed()),
               c10::ValueError);
}

TEST(GaussianKl, Modules) {
  const auto m = draw({3, 4}), v = draw({3, 4}), weight = at::rand({3}, at::kDouble);
  td::GaussianKLLoss criterion(td::GaussianKLOptions().reduction(td::Reduction::Sum));
  expect_close(criterion(m, v), td::gaussian_kl(m, v, {}, {}, criterion->options));
  expect_close(criterion(m, v, std::nullopt, std::nullopt, weight),
               td::gaussian_kl(m, v, {}, {}, td::GaussianKLOptions(criterion->options).row_weight(weight)));
  std::ostringstream text;
  text << *criterion;
  EXPECT_EQ(text.str(), "torch_divergence::GaussianKLLoss(reduction=sum)");
  EXPECT_THROW(td::GaussianKLFullLoss(td::GaussianKLOptions().row_weight(weight)), c10::ValueError);
}

TEST(GaussianKl, OptionsTakeANumberAsNormalizer) {
  const auto p = draw({6}), q = draw({6}), m = draw({3, 4}), v = draw({3, 4});
  expect_close(td::gaussian_kl(m, v, {}, {}, td::GaussianKLOptions().normalizer(7.0)), td::gaussian_kl(m, v) * 3 / 7);
  expect_close(td::kl_estimate(p, q, td::KLEstimateOptions().normalizer(7.0)), td::kl_estimate(p, q) * 6 / 7);
}

TEST(GaussianKl, SmallFactors) {
  const auto m = at::zeros({1, 2}), eye = at::eye(2).unsqueeze(0);
  expect_close(td::gaussian_kl_full(m, eye * 1e-8, m, eye), at::tensor(-1 - 2 * std::log(1e-8)).to(at::kFloat));
}

TEST(KlEstimate, Module) {
  const auto p = draw({6}), q = draw({6}), weight = at::rand({6}, at::kDouble);
  td::KLEstimateLoss criterion(td::KLEstimateOptions().max_log_ratio(0.5));
  expect_close(criterion(p, q, weight),
               td::kl_estimate(p, q, td::KLEstimateOptions().max_log_ratio(0.5).importance_weight(weight)));
  std::ostringstream text;
  text << *criterion << *td::KLEstimateLoss();
  EXPECT_EQ(text.str(),
            "torch_divergence::KLEstimateLoss(kind=k3, gradient=path, max_log_ratio=0.5, reduction=mean)"
            "torch_divergence::KLEstimateLoss(kind=k3, gradient=path, reduction=mean)");
  EXPECT_THROW(td::KLEstimateLoss(td::KLEstimateOptions().importance_weight(weight)), c10::ValueError);
  criterion->options.importance_weight(weight);
  EXPECT_THROW(criterion(p, q), c10::ValueError);
}

TEST(KlEstimate, KindsAndGradients) {
  const auto p = draw({6}), q = draw({6}), r = q - p;
  expect_close(td::kl_estimate(p, q), (r.expm1() - r).mean());
  expect_close(td::kl_estimate(p, q, td::KLEstimateOptions().kind(td::KLEstimator::K1)), -r.mean());
  auto leaf = p.clone().requires_grad_();
  td::kl_estimate(leaf, q, td::KLEstimateOptions().gradient(td::KLEstimateGradient::KL)).backward();
  expect_close(leaf.grad(), -r / 6);
  td::KLEstimateLoss criterion(td::KLEstimateOptions().kind(td::KLEstimator::K2));
  expect_close(criterion(p, q), (r * r / 2).mean());
  EXPECT_THROW(td::kl_estimate(p, draw({5})), c10::ValueError);
}

TEST(FisherVectorProduct, ValuesAndDerivatives) {
  const auto z = draw({3, 5}), v = draw({3, 5}), q = at::softmax(z / 2, 0);
  const auto options = td::FisherVectorProductOptions().temperature(2).dim(0);
  expect_close(td::fisher_vector_product(z, v, options), q * (v - (q * v).sum(0, true)) / 4);
  const auto f = [&](const gradcheck::Tensors& x) { return td::fisher_vector_product(x[0], x[1], options); };
  EXPECT_TRUE(gradcheck::gradients_match(f, {z, v}));
  EXPECT_TRUE(gradcheck::second_gradients_match(f, {z, v}));
}

}  // namespace
