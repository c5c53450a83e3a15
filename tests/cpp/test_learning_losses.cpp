// The losses of deep learning, from C++: formulas, closures, modules.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_divergence/torch_divergence.h>

#include <cmath>
#include <limits>
#include <sstream>
#include <stdexcept>

namespace td = torch_divergence;

namespace {

template <class F>
std::string value_error(const F& f) {
  try {
    f();
  } catch (const c10::ValueError& error) {
    return error.what_without_backtrace();
  }
  return "no ValueError";
}

TEST(GAN, Losses) {
  torch::manual_seed(0);
  const auto real = torch::randn({5}, torch::kDouble), fake = torch::randn({3}, torch::kDouble);
  const auto v = torch::sigmoid(real).log().mean() + (1 - torch::sigmoid(fake)).log().mean();
  EXPECT_TRUE(torch::allclose(td::gan_discriminator_loss(real, fake), -v));
  EXPECT_TRUE(torch::allclose(td::gan_js_estimate(real, fake), (v + std::log(4.0)) / 2));
  const auto small = 1e-3F * torch::randn({1000}), other = 1e-3F * torch::randn({1000});
  const double js = td::gan_js_estimate(small.to(torch::kDouble), other.to(torch::kDouble)).item<double>();
  EXPECT_NEAR(td::gan_js_estimate(small, other).item<double>(), js, 1e-3 * std::abs(js));
  td::GANLoss criterion(td::GANLossKind::Minimax);
  EXPECT_TRUE(torch::allclose(criterion->generator(fake), (1 - torch::sigmoid(fake)).log().mean()));
  EXPECT_TRUE(torch::equal(criterion->discriminator(real, fake), td::gan_discriminator_loss(real, fake)));
  std::ostringstream text;
  text << criterion;
  EXPECT_EQ(text.str(), "torch_divergence::GANLoss(kind=minimax)");
  EXPECT_NE(value_error([&] { td::gan_generator_loss(real.to(torch::kLong)); }).find("fake_logits"), std::string::npos);
}

TEST(WGAN, GradientPenalty) {
  torch::manual_seed(0);
  torch::nn::Linear critic(4, 1);
  const auto real = torch::randn({8, 4}), fake = torch::randn({8, 4});
  const auto score = [&](const at::Tensor& u) { return critic->forward(u); };
  const auto penalty = td::gradient_penalty(score, real, fake, 0.5);
  EXPECT_TRUE(torch::allclose(penalty, (critic->weight.norm() - 0.5).square()));
  penalty.backward();
  const auto expected = 2 * (critic->weight.norm() - 0.5) * critic->weight / critic->weight.norm();
  EXPECT_TRUE(torch::allclose(critic->weight.grad(), expected));
  {
    torch::NoGradGuard off;
    EXPECT_FALSE(td::gradient_penalty(score, real, fake).requires_grad());
    EXPECT_FALSE(at::GradMode::is_enabled());
    critic->weight.zero_();
  }
  const auto flat = td::gradient_penalty(score, real, fake);
  EXPECT_EQ(flat.item<float>(), 1);
  EXPECT_EQ(torch::autograd::grad({flat}, {critic->weight})[0].abs().sum().item<float>(), 0);
  EXPECT_NE(value_error([&] { td::gradient_penalty(score, real, fake.slice(0, 1)); }).find("fake"), std::string::npos);
  for (const double target : {-1.0, std::numeric_limits<double>::quiet_NaN()})
    EXPECT_NE(value_error([&] { td::gradient_penalty(score, real, fake, target); }).find("target"), std::string::npos);
  td::WassersteinGANLoss criterion;
  EXPECT_TRUE(torch::equal(criterion->critic(real, fake), fake.mean() - real.mean()));
}

TEST(PPO, ClipLoss) {
  auto x = torch::tensor({0.0, 1.0, 500.0}).requires_grad_();
  const auto loss = td::ppo_clip_loss(x, torch::zeros(3), torch::ones(3),
                                      td::PPOClipOptions().clip(0.1).reduction(td::Reduction::None));
  EXPECT_TRUE(torch::allclose(loss, torch::tensor({-1.0, -1.1, -1.1})));
  loss.sum().backward();
  EXPECT_TRUE(torch::equal(x.grad(), torch::tensor({-1.0, 0.0, 0.0})));
  td::PPOKLPenaltyLoss penalty(td::PPOKLPenaltyOptions(0.2));
  const auto zero = torch::zeros(4);
  EXPECT_NEAR(penalty(zero, zero, torch::ones(4), torch::full({4}, 0.5)).item<double>(), -0.9, 1e-6);
  td::AdaptiveKLController controller(0.2, 6, 10000);
  EXPECT_NEAR(controller.update(12, 500), 0.202, 1e-12);
  EXPECT_NE(value_error([&] { td::AdaptiveKLController(1, 0, 1); }).find("target"), std::string::npos);
  EXPECT_NE(value_error([&] { controller.update(0, 50000); }).find("n is 50000 with a horizon of 10000"),
            std::string::npos);
  EXPECT_NE(value_error([&] { controller.set_value(-1); }).find("value is -1"), std::string::npos);
  EXPECT_NEAR(controller.value(), 0.202, 1e-12);
  const auto infinite = torch::full({4}, std::numeric_limits<double>::infinity());
  EXPECT_EQ(td::ppo_kl_penalty_loss(zero, zero, torch::ones(4), infinite, td::PPOKLPenaltyOptions(0)).item<float>(),
            -1);
}

TEST(TrustRegion, HoldsTheBoundAndRestores) {
  torch::manual_seed(0);
  const auto advantage = torch::randn({16, 3}, torch::kDouble);
  auto logits = torch::randn({16, 3}, torch::kDouble).requires_grad_();
  const auto old = logits.detach().clone();
  const auto surrogate = [&] { return (logits.softmax(-1) * advantage).sum(-1).mean(); };
  const auto kl = [&] { return td::kl_div(logits, old); };
  const auto result = td::trust_region_step({logits}, surrogate, kl, td::TrustRegionOptions().max_kl(1e-3));
  EXPECT_TRUE(result.accepted);
  EXPECT_LE(result.kl, 1e-3);
  EXPECT_GT(result.kl, 1e-5);
  EXPECT_GT(result.improvement, 0);
  EXPECT_NEAR(kl().item<double>(), result.kl, 1e-15);

  const auto before = logits.detach().clone();
  int calls = 0;
  const auto never = [&] { return surrogate() * (calls++ == 0 ? 1.0 : std::numeric_limits<double>::quiet_NaN()); };
  EXPECT_FALSE(td::trust_region_step({logits}, never, kl).accepted);
  EXPECT_TRUE(torch::equal(logits.detach(), before));
  EXPECT_NE(value_error([&] { td::trust_region_step({}, surrogate, kl); }).find("params"), std::string::npos);
}

TEST(TrustRegion, NullSpaceOfTheHessian) {
  for (int seed = 0; seed < 20; ++seed) {
    torch::manual_seed(seed);
    const auto advantage = torch::randn({4, 3});
    const auto step = [&](at::ScalarType type, double scale) {
      const auto logits = torch::zeros({4, 3}, type).requires_grad_();
      const auto old = logits.detach().clone();
      const auto result = td::trust_region_step(
          {logits}, [&] { return scale * (logits.softmax(-1) * advantage.to(type)).sum(); },
          [&] { return td::kl_div(logits, old); }, td::TrustRegionOptions().max_kl(0.02));
      EXPECT_TRUE(result.accepted);
      return logits.detach().to(torch::kDouble);
    };
    const auto exact = step(torch::kDouble, 1);
    EXPECT_TRUE(torch::allclose(step(torch::kFloat, 1), exact, 1e-3, 1e-4));
    EXPECT_TRUE(torch::allclose(step(torch::kFloat, 1e20), exact, 1e-3, 1e-4));
  }
}

TEST(TrustRegion, ClosuresThatFail) {
  const auto advantage = torch::tensor({{1.0, 0.0, -1.0}});
  const auto logits = torch::zeros({1, 3}).requires_grad_();
  const auto old = logits.detach().clone();
  const auto surrogate = [&] { return (logits.softmax(-1) * advantage).sum(); };
  const auto kl = [&] { return td::kl_div(logits, old); };
  int calls = 0;
  const auto stops = [&] {
    if (++calls == 2) throw std::runtime_error("stop");
    return surrogate();
  };
  EXPECT_THROW(td::trust_region_step({logits}, stops, kl), std::runtime_error);
  EXPECT_TRUE(torch::equal(logits.detach(), old));
  const auto constant = [] { return torch::tensor(1.0); };
  const auto linear = [&] { return 0 * logits.sum(); };
  EXPECT_NE(value_error([&] { td::trust_region_step({logits}, constant, kl); }).find("surrogate"), std::string::npos);
  EXPECT_NE(value_error([&] { td::trust_region_step({logits}, surrogate, constant); }).find("kl"), std::string::npos);
  EXPECT_NE(value_error([&] { td::trust_region_step({logits}, surrogate, linear); }).find("second derivative"),
            std::string::npos);
  EXPECT_NE(value_error([&] { td::trust_region_step({logits}, {}, kl); }).find("surrogate"), std::string::npos);
  EXPECT_NE(value_error([&] {
              td::trust_region_step(
                  {logits}, [] { return at::Tensor(); }, kl);
            }).find("surrogate"),
            std::string::npos);
}

TEST(KLEstimate, RatioWhoseSquareOverflows) {
  const auto p = torch::tensor({-1.0F}).requires_grad_();
  const auto options = td::KLEstimateOptions().gradient(td::KLEstimateGradient::KL);
  const auto value = td::kl_estimate(p, torch::tensor({-1e20F}), options);
  EXPECT_EQ(value.item<float>(), 1e20F);
  EXPECT_EQ(torch::autograd::grad({value}, {p})[0].item<float>(), 1e20F);
}

TEST(VAE, Loss) {
  const auto x = torch::zeros({2, 5}), data = torch::ones({2, 5}), zero = torch::zeros({2, 3});
  EXPECT_NEAR(td::vae_loss(x, data, zero, zero).item<double>(), 5 * std::log(2.0), 1e-6);
  td::VAELoss criterion(td::VAEOptions().beta(2).likelihood(td::Likelihood::Gaussian).scale(0.5));
  const auto mean = torch::ones({2, 3});
  const double nll = 5 * (0.5 * 4 + std::log(0.5) + 0.5 * std::log(2 * M_PI));
  EXPECT_NEAR(criterion(x, data, mean, zero).item<double>(), nll + 2 * 1.5, 1e-5);

  const auto sure = torch::full({1, 1}, 15.0F).requires_grad_();
  const auto digits = td::vae_loss(sure, torch::ones({1, 1}), zero.slice(0, 1), zero.slice(0, 1));
  EXPECT_NEAR(digits.item<double>(), std::log1p(std::exp(-15.0)), 1e-12);
  EXPECT_NEAR(torch::autograd::grad({digits}, {sure})[0].item<double>(), -1 / (1 + std::exp(15.0)), 1e-12);
  const auto infinite = torch::full({2, 3}, -std::numeric_limits<double>::infinity());
  EXPECT_NEAR(td::vae_loss(x, data, zero, infinite, td::VAEOptions().beta(0)).item<double>(), 5 * std::log(2.0), 1e-6);
}

TEST(PPO, OptionsTakeANumberAsNormalizer) {
  torch::manual_seed(0);
  const auto x = torch::randn(4), old = torch::randn(4), advantage = torch::randn(4), kl = torch::rand(4);
  EXPECT_TRUE(torch::allclose(td::ppo_clip_loss(x, old, advantage, td::PPOClipOptions().normalizer(8.0)),
                              td::ppo_clip_loss(x, old, advantage) / 2));
  EXPECT_TRUE(
      torch::allclose(td::ppo_kl_penalty_loss(x, old, advantage, kl, td::PPOKLPenaltyOptions(0.2).normalizer(8.0)),
                      td::ppo_kl_penalty_loss(x, old, advantage, kl, td::PPOKLPenaltyOptions(0.2)) / 2));
}

TEST(Distillation, Module) {
  torch::manual_seed(0);
  const auto student = torch::randn({6, 5}), teacher = torch::randn({6, 5});
  const auto [log_probs, indices] = torch::log_softmax(teacher / 2, -1).topk(3);
  const td::TopK topk{indices, log_probs};
  EXPECT_TRUE(
      torch::allclose(td::distillation_loss(student, teacher, std::nullopt, td::DistillationOptions().normalizer(12.0)),
                      td::distillation_loss(student, teacher) / 2));
  torch::nn::AnyModule any{td::DistillationLoss()};
  EXPECT_TRUE(
      torch::equal(any.forward(student, std::optional<at::Tensor>(teacher)), td::distillation_loss(student, teacher)));
  EXPECT_NE(value_error([&] { td::DistillationLoss(td::DistillationOptions().topk(topk)); }).find("topk"),
            std::string::npos);
  td::DistillationLoss criterion;
  criterion->options.topk(topk);
  EXPECT_NE(value_error([&] { criterion(student, std::nullopt); }).find("topk: was set"), std::string::npos);
}

TEST(Distillation, UndefinedTensors) {
  const auto student = torch::randn({6, 5});
  const auto refused = [&](const char* argument, const std::optional<at::Tensor>& teacher,
                           const std::optional<at::Tensor>& labels, const td::DistillationOptions& options = {}) {
    const auto message = value_error([&] { td::distillation_loss(student, teacher, labels, options); });
    EXPECT_NE(message.find(argument), std::string::npos) << message;
  };
  refused("teacher_logits", at::Tensor(), std::nullopt);
  refused("labels", student, at::Tensor());
  refused("topk", std::nullopt, std::nullopt, td::DistillationOptions().topk(td::TopK()));
}

TEST(Distillation, IsTheSumOfItsParts) {
  torch::manual_seed(0);
  const auto student = torch::randn({6, 5}).requires_grad_(), teacher = torch::randn({6, 5});
  const auto labels = torch::randint(5, {6});
  const auto soft = td::kl_div(student, teacher, td::KLDivOptions().temperature(3));
  const auto hard = td::cross_entropy(student, labels);
  td::DistillationLoss criterion(td::DistillationOptions().temperature(3).alpha(0.7));
  EXPECT_TRUE(torch::allclose(criterion(student, teacher, labels), 0.7 * 9 * soft + 0.3 * hard));
  EXPECT_TRUE(torch::allclose(
      td::distillation_loss(student, teacher, std::nullopt, td::DistillationOptions().divergence(td::Divergence::JS)),
      4 * td::js_div(student, teacher, td::JSDivOptions().temperature(2))));
  EXPECT_NE(value_error([&] { td::distillation_loss(student, std::nullopt); }).find("teacher_logits"),
            std::string::npos);
  const auto refused = [&](const at::Tensor& y, const td::DistillationOptions& options) {
    return value_error([&] { td::distillation_loss(student, teacher, y, options); });
  };
  EXPECT_NE(refused(labels.slice(0, 1), {}).find("distillation_loss: labels has shape [5]"), std::string::npos);
  EXPECT_NE(refused(labels, td::DistillationOptions().row_weight(torch::ones({3})))
                .find("distillation_loss: row_weight has shape [3]"),
            std::string::npos);
}

}  // namespace
