// Entropic optimal transport through the C++ API, on libtorch alone.
#include "gradcheck.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/container/any.h>
#include <torch_divergence/torch_divergence.h>

#include <cmath>
#include <sstream>

namespace td = torch_divergence;

namespace {

// Near each other: where eps leaves an atom alone with one partner, potentials and gradients of weights lag behind the
// value.
at::Tensor points(int64_t n, int64_t d) { return at::randn({n, d}, at::kDouble) / 2; }

void expect_close(const at::Tensor& actual, const at::Tensor& expected) {
  EXPECT_TRUE(at::allclose(actual, expected, 1e-9, 1e-10)) << actual << "\n" << expected;
}

td::SinkhornOptions tight() { return td::SinkhornOptions().eps(0.4).tol(1e-12); }

TEST(Sinkhorn, TwoPointsHaveAClosedForm) {
  const double c = 1.3, eps = 0.4;
  const auto C = at::tensor({0.0, c, c, 0.0}, at::kDouble).view({2, 2});
  expect_close(td::sinkhorn_cost(C, {}, {}, tight()),
               at::tensor(-eps * std::log((1 + std::exp(-c / eps)) / 2), at::kDouble));
}

TEST(Sinkhorn, TranslationCostsHalfItsSquare) {
  at::manual_seed(0);
  const auto x = points(20, 2), t = at::tensor({0.4, -0.7}, at::kDouble);
  expect_close(td::sinkhorn_divergence(x, x + t, {}, {}, tight()), t.square().sum() / 2);
}

TEST(Sinkhorn, GradientsOfEveryCost) {
  at::manual_seed(0);
  const auto weight = [](const at::Tensor& logits) { return at::softmax(logits, -1); };
  for (const auto cost : {td::Cost::HalfSqEuclidean, td::Cost::SqEuclidean, td::Cost::Euclidean, td::Cost::Cosine}) {
    for (const bool relaxed : {false, true}) {
      const auto f = [&](const gradcheck::Tensors& t) {
        auto options = tight().cost(cost);
        if (relaxed) options.rho(1.5);
        return td::sinkhorn_divergence(t[0], t[1], weight(t[2]), weight(t[3]), options);
      };
      const gradcheck::Tensors inputs{points(4, 3), points(5, 3), at::randn({4}, at::kDouble),
                                      at::randn({5}, at::kDouble)};
      EXPECT_TRUE(gradcheck::gradients_match(f, inputs)) << td::to_string(cost);
      EXPECT_TRUE(gradcheck::second_gradients_match(f, inputs)) << td::to_string(cost);
    }
  }
}

TEST(Sinkhorn, ResultAgreesWithItself) {
  at::manual_seed(0);
  const auto x = points(6, 2), y = points(7, 2);
  const auto r = td::sinkhorn(x, y, {}, {}, tight());
  const auto plan = r.plan();
  expect_close(plan.sum(1), at::full({6}, 1.0 / 6, at::kDouble));
  expect_close(r.apply(y), plan.matmul(y));
  expect_close(r.apply(x, true), plan.t().matmul(x));
  expect_close(r.barycentric_projection(), 6 * plan.matmul(y));
  expect_close(r.transport_cost(), (plan * at::cdist(x, y).square()).sum() / 2);
  EXPECT_TRUE(r.converged.item<bool>());
}

TEST(Sinkhorn, RaggedEqualsLoop) {
  at::manual_seed(0);
  const auto x = points(7, 2), y = points(9, 2);
  const auto value = td::sinkhorn_ragged(x, at::tensor({0, 3, 7}, at::kLong), y, at::tensor({0, 4, 9}, at::kLong));
  EXPECT_TRUE(at::equal(value[0], td::sinkhorn_divergence(x.slice(0, 0, 3), y.slice(0, 0, 4))));
  EXPECT_TRUE(at::equal(value[1], td::sinkhorn_divergence(x.slice(0, 3), y.slice(0, 4))));
}

TEST(Sinkhorn, RaggedWithInfo) {
  at::manual_seed(0);
  const auto x = points(7, 2), y = points(9, 2);
  const auto of_x = at::tensor({0, 3, 7}, at::kLong), of_y = at::tensor({0, 4, 9}, at::kLong);
  const auto [value, info] = td::sinkhorn_ragged_with_info(x, of_x, y, of_y);
  EXPECT_TRUE(at::equal(value, td::sinkhorn_ragged(x, of_x, y, of_y)));
  EXPECT_EQ(info.f.sizes(), at::IntArrayRef({7}));
  EXPECT_EQ(info.g_bb.sizes(), at::IntArrayRef({9}));
  const auto options = td::SinkhornOptions().init(info);
  const auto warm = td::sinkhorn_ragged_with_info(x, of_x, y, of_y, {}, {}, options).second;
  EXPECT_TRUE((warm.n_iter < info.n_iter).all().item<bool>());
}

TEST(Sinkhorn, WarmStart) {
  at::manual_seed(0);
  const auto x = points(40, 2), y = points(50, 2);
  const auto options = td::SinkhornOptions().blur(0.2);
  const auto info = td::sinkhorn_divergence_with_info(x, y, {}, {}, options).second;
  const auto warm = td::sinkhorn_divergence_with_info(x, y, {}, {}, td::SinkhornOptions(options).init(info)).second;
  EXPECT_LT(warm.n_iter.item<int64_t>(), info.n_iter.item<int64_t>());
  const auto result = td::sinkhorn(x, y, {}, {}, options);
  const auto again = td::sinkhorn(x, y, {}, {}, td::SinkhornOptions(options).init(result));
  EXPECT_LT(again.n_iter.item<int64_t>(), result.n_iter.item<int64_t>());
  expect_close(td::SinkhornLoss(options)(x, y, std::nullopt, std::nullopt, result),
               td::sinkhorn_divergence(x, y, {}, {}, td::SinkhornOptions(options).init(result)));
}

TEST(Sinkhorn, Modules) {
  at::manual_seed(0);
  const auto x = at::randn({3, 5, 2}), y = at::randn({3, 6, 2});
  td::SinkhornLoss criterion;
  expect_close(criterion(x, y), td::sinkhorn_divergence(x, y).mean());
  torch::nn::AnyModule any{td::SinkhornLoss(td::SinkhornOptions().reach(1.0))};
  EXPECT_EQ(any.forward(x, y).dim(), 0);
  td::SinkhornCostLoss cost(td::SinkhornOptions().eps(0.2));
  EXPECT_EQ(cost(at::cdist(x, y)).sizes(), at::IntArrayRef({3}));
  std::ostringstream text;
  text << criterion;
  EXPECT_EQ(text.str(),
            "torch_divergence::SinkhornLoss(cost=half_sqeuclidean, debias=true, tol=0.001, max_iter=1000, "
            "reduction=mean)");
  const td::SinkhornLoss batched(td::SinkhornOptions().eps(at::tensor({0.5, 0.25})));
  text.str("");
  text << batched;
  EXPECT_NE(text.str().find("eps=[0.5, 0.25]"), std::string::npos) << text.str();
  text.str("");
  text << td::SinkhornLoss(td::SinkhornOptions().eps(0.5));
  EXPECT_NE(text.str().find("eps=0.5,"), std::string::npos) << text.str();
  EXPECT_THROW(td::SinkhornLoss(td::SinkhornOptions().init(td::SinkhornInfo{})), c10::ValueError);
}

TEST(Sinkhorn, Errors) {
  const auto x = points(3, 2), y = points(4, 2), C = at::rand({3, 4});
  EXPECT_THROW(td::sinkhorn_divergence(x, y, {}, {}, tight().blur(0.1)), c10::ValueError);
  EXPECT_THROW(td::sinkhorn_divergence(x, y, {}, {}, tight().rho(1.0, 2.0)), c10::ValueError);
  EXPECT_THROW(td::sinkhorn_divergence(x, points(4, 3)), c10::ValueError);
  EXPECT_THROW(td::sinkhorn_cost(C, {}, {}, td::SinkhornOptions()), c10::ValueError);
  EXPECT_THROW(td::sinkhorn_cost(C, {}, {}, tight().reach(1.0)), c10::ValueError);
}

}  // namespace
