/// The Wasserstein GAN's losses as a module.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>
#include <torch_divergence/export.h>
#include <torch_divergence/functional/wgan.h>

#include <iosfwd>

namespace torch_divergence {

/// `wgan_critic_loss` and `wgan_generator_loss` as a module. What keeps the critic Lipschitz is the caller's: weight
/// clipping, or `gradient_penalty`.
///
/// Example:
///
///     torch_divergence::WassersteinGANLoss criterion;
///     criterion->critic(critic->forward(x), critic->forward(fake.detach())).backward();
struct TD_API WassersteinGANLossImpl : torch::nn::Cloneable<WassersteinGANLossImpl> {
  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  at::Tensor critic(const at::Tensor& real, const at::Tensor& fake) const;
  at::Tensor generator(const at::Tensor& fake) const;
};
TORCH_MODULE(WassersteinGANLoss);

}  // namespace torch_divergence
