// Values, gradients, options and errors of js_div through the C++ API, on libtorch alone.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/autograd.h>
#include <torch_divergence/functional.h>
#include <torch_divergence/modules.h>

#include <cmath>
#include <limits>
#include <numbers>
#include <sstream>
#include <string>

namespace td = torch_divergence;

namespace {

constexpr td::Space kSpaces[] = {td::Space::Logits, td::Space::LogProbs, td::Space::Probs};

at::Tensor as_space(const at::Tensor& logits, td::Space space) {
  return space == td::Space::Logits     ? logits
         : space == td::Space::LogProbs ? at::log_softmax(logits, -1)
                                        : at::softmax(logits, -1);
}

// The definition in ATen operators.
at::Tensor reference_rows(const at::Tensor& input, const at::Tensor& target, const td::JSDivOptions& o) {
  const auto probs = [&](const at::Tensor& x, td::Space space) {
    return space == td::Space::Logits     ? at::softmax(x / o.temperature(), -1)
           : space == td::Space::LogProbs ? x.exp()
                                          : x;
  };
  const auto q = probs(input, o.space()), p = probs(target, o.target_space().value_or(o.space()));
  const double b = o.beta();
  const auto m = b * p + (1 - b) * q;
  const auto rows = (b * p * (p / m).log() + (1 - b) * q * (q / m).log()).sum(-1);
  return o.scaled() ? rows / (b * (1 - b)) : rows;
}

std::string message_of(const td::JSDivOptions& options) {
  try {
    td::js_div(at::ones({2, 3}), at::ones({2, 3}), options);
  } catch (const c10::ValueError& e) {
    return e.what_without_backtrace();
  }
  return {};
}

}  // namespace

TEST(JsDiv, ValuesAndGradientsOfEveryOption) {
  at::manual_seed(0);
  const auto a = at::randn({4, 9}, at::kDouble), b = at::randn({4, 9}, at::kDouble);
  for (const auto space : kSpaces)
    for (const auto target_space : kSpaces)
      for (const double beta : {0.5, 0.1, 0.9})
        for (const bool scaled : {false, true}) {
          const auto options = td::JSDivOptions().beta(beta).scaled(scaled).space(space).target_space(target_space);
          const auto input = as_space(a, space).detach().requires_grad_(),
                     target = as_space(b, target_space).detach().requires_grad_();
          const auto rows = td::js_div(input, target, td::JSDivOptions(options).reduction(td::Reduction::None));
          const auto want = reference_rows(input, target, options);
          EXPECT_TRUE(at::allclose(rows, want, 1e-11, 1e-14));
          const auto got_grads = torch::autograd::grad({rows.sum()}, {input, target}),
                     want_grads = torch::autograd::grad({want.sum()}, {input, target});
          for (int i = 0; i < 2; ++i)
            if ((i == 0 ? space : target_space) == td::Space::Logits) {
              EXPECT_TRUE(at::allclose(got_grads[i], want_grads[i], 1e-10, 1e-13));
            }
        }
}

TEST(JsDiv, EndsAreKlDiv) {
  const auto input = at::randn({5, 33}), target = at::randn({5, 33});
  EXPECT_TRUE(at::equal(td::js_div(input, target, td::JSDivOptions().beta(0).scaled(true)), td::kl_div(input, target)));
  EXPECT_TRUE(at::equal(td::js_div(input, target, td::JSDivOptions().beta(1).scaled(true)),
                        td::kl_div(input, target, td::KLDivOptions().direction(td::Direction::Reverse))));
}

TEST(JsDiv, DisjointIsLogTwo) {
  const auto q = at::tensor({1.0, 0.0}, at::kDouble), p = at::tensor({0.0, 1.0}, at::kDouble);
  const auto value = td::js_div(q, p, td::JSDivOptions().space(td::Space::Probs)).item<double>();
  EXPECT_NEAR(value, std::numbers::ln2, 1e-15);
}

TEST(JsDiv, BadBeta) {
  for (const double beta : {-0.5, 1.5, std::numeric_limits<double>::quiet_NaN()}) {
    EXPECT_NE(message_of(td::JSDivOptions().beta(beta)).find("beta"), std::string::npos);
    EXPECT_NE(message_of(td::JSDivOptions().beta(beta).scaled(true)).find("[0, 1]"), std::string::npos);
  }
  for (const double beta : {0.0, 1.0})
    EXPECT_NE(message_of(td::JSDivOptions().beta(beta)).find("scaled=True"), std::string::npos);
}

TEST(JsDiv, InplaceGradientIsThatOfTheFunction) {
  const auto leaf = at::randn({6, 40}).requires_grad_(), target = at::randn({6, 40});
  const auto want = torch::autograd::grad({td::js_div(leaf, target)}, {leaf})[0];
  const auto input = leaf * 1;
  td::js_div(input, target, td::JSDivOptions().inplace_grad(true)).backward();
  EXPECT_TRUE(at::allclose(leaf.grad(), want, 1e-5, 1e-8));
}

TEST(JsDiv, Module) {
  const auto input = at::randn({3, 5}), target = at::randn({3, 5});
  const auto options = td::JSDivOptions().beta(0.25).scaled(true);
  td::JSDivLoss criterion(options);
  EXPECT_TRUE(at::equal(criterion(input, target), td::js_div(input, target, options)));
  std::ostringstream text;
  text << *criterion;
  EXPECT_EQ(text.str(),
            "torch_divergence::JSDivLoss(beta=0.25, scaled=true, space=logits, temperature=1, dim=-1, reduction=mean)");
  EXPECT_THROW(td::JSDivLoss(td::JSDivOptions().normalizer(2.0)), c10::ValueError);
}
