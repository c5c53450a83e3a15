// The Wasserstein GAN's losses, as compositions.
#include <ATen/TensorOperators.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/where.h>
#include <torch/library.h>
#include <torch_divergence/functional/wgan.h>

#include <cmath>

#include "core/composite.h"
#include "core/grad.h"

namespace torch_divergence {

at::Tensor wgan_critic_loss(const at::Tensor& real_scores, const at::Tensor& fake_scores) {
  constexpr const char* kName = "wgan_critic_loss";
  const auto real = checked_real(kName, "real_scores", real_scores);
  const auto fake = checked_like(kName, "fake_scores", fake_scores, "real_scores", real_scores, false);
  check_not_empty(kName, "real_scores", real);
  check_not_empty(kName, "fake_scores", fake);
  return fake.mean() - real.mean();
}

at::Tensor wgan_generator_loss(const at::Tensor& fake_scores) {
  constexpr const char* kName = "wgan_generator_loss";
  const auto fake = checked_real(kName, "fake_scores", fake_scores);
  check_not_empty(kName, "fake_scores", fake);
  return -fake.mean();
}

at::Tensor gradient_penalty(const std::function<at::Tensor(const at::Tensor&)>& critic, const at::Tensor& real,
                            const at::Tensor& fake, double target, std::optional<at::Generator> generator) {
  constexpr const char* kName = "gradient_penalty";
  checked_real(kName, "real", real);
  checked_like(kName, "fake", fake, "real", real, true);
  TORCH_CHECK_VALUE(real.scalar_type() == fake.scalar_type(), kName, ": fake has dtype ", fake.scalar_type(),
                    ", expected ", real.scalar_type(), ", that of real");
  TORCH_CHECK_VALUE(target >= 0 && std::isfinite(target), kName, ": target is ", target,
                    ", expected a finite number >= 0");
  TORCH_CHECK_VALUE(critic, kName, ": critic is empty, expected a function");
  TORCH_CHECK_VALUE(real.dim() >= 1, kName, ": real is a scalar, expected a batch (B, ...)");
  check_not_empty(kName, "real", real);
  at::DimVector ones(static_cast<size_t>(real.dim()), 1);
  ones[0] = real.size(0);
  const auto e = at::rand(ones, generator, real.options());
  const bool record = at::GradMode::is_enabled();
  at::Tensor gradient;
  {
    const at::AutoGradMode on(true);  // the gradient below needs a graph whatever the caller's mode
    const auto u = (fake + e * (real - fake)).detach().requires_grad_();
    const auto scores = critic(u);
    TORCH_CHECK_VALUE(scores.defined(), kName, ": critic returned an undefined tensor, expected scores");
    TORCH_CHECK_VALUE(scores.numel() == real.size(0) && scores.dim() >= 1 && scores.size(0) == real.size(0), kName,
                      ": critic returned scores of shape ", scores.sizes(), ", expected one for each of ", real.size(0),
                      " samples");
    TORCH_CHECK_VALUE(scores.requires_grad(), kName,
                      ": critic returned scores without a graph, expected a function of the samples; was it run under "
                      "no_grad?");
    gradient = gradients_of(scores.sum(), {u}, record, record)[0];
    TORCH_CHECK_VALUE(gradient.defined(), kName,
                      ": critic returned scores that do not depend on the samples, expected a function of them");
  }
  const auto flat = checked_real(kName, "gradient", gradient).flatten(1 < gradient.dim() ? 1 : 0);
  const auto rows = gradient.dim() > 1 ? flat : flat.unsqueeze(-1);
  // The norm's own second derivative at 0 is a division by 0.
  const auto zero = rows.eq(0).all(-1, true);
  const auto norm = at::where(zero.squeeze(-1), 0, at::linalg_vector_norm(at::where(zero, 1, rows), 2, -1));
  return (norm - target).square().mean();
}

TORCH_LIBRARY_FRAGMENT(torch_divergence, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("wgan_critic_loss(Tensor real_scores, Tensor fake_scores) -> Tensor", tags);
  m.def("wgan_generator_loss(Tensor fake_scores) -> Tensor", tags);
}
namespace {
void register_composites(torch::Library& m) {
  m.impl("wgan_critic_loss", wgan_critic_loss);
  m.impl("wgan_generator_loss", wgan_generator_loss);
}
}  // namespace
TORCH_LIBRARY_IMPL(torch_divergence, CompositeImplicitAutograd, m) { register_composites(m); }
TORCH_LIBRARY_IMPL(torch_divergence, FuncTorchBatchedDecomposition, m) { register_composites(m); }

}  // namespace torch_divergence
