// The losses of deep learning, from C++: formulas, closures, modules.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_divergence/torch_divergence.h>

#include <cmath>
#include <limits>
#include <sstream>

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

TEST(VAE, Loss) {
  const auto x = torch::zeros({2, 5}), data = torch::ones({2, 5}), zero = torch::zeros({2, 3});
  EXPECT_NEAR(td::vae_loss(x, data, zero, zero).item<double>(), 5 * std::log(2.0), 1e-6);
  td::VAELoss criterion(td::VAEOptions().beta(2).likelihood(td::Likelihood::Gaussian).scale(0.5));
  const auto mean = torch::ones({2, 3});
  const double nll = 5 * (0.5 * 4 + std::log(0.5) + 0.5 * std::log(2 * M_PI));
  EXPECT_NEAR(criterion(x, data, mean, zero).item<double>(), nll + 2 * 1.5, 1e-5);
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
}

}  // namespace
