/// The original GAN's losses as a module.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>
#include <torch_divergence/export.h>
#include <torch_divergence/functional/gan.h>

#include <iosfwd>

namespace torch_divergence {

/// `gan_discriminator_loss` and `gan_generator_loss` as a module. No parameters, no buffers.
///
/// Example:
///
///     torch_divergence::GANLoss criterion;
///     criterion->discriminator(d->forward(x), d->forward(fake.detach())).backward();
///     criterion->generator(d->forward(fake)).backward();
struct TD_API GANLossImpl : torch::nn::Cloneable<GANLossImpl> {
  explicit GANLossImpl(GANLossKind kind_ = GANLossKind::Nonsaturating);
  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  at::Tensor discriminator(const at::Tensor& real, const at::Tensor& fake) const;
  at::Tensor generator(const at::Tensor& fake) const;

  /// The generator's loss.
  GANLossKind kind;
};
TORCH_MODULE(GANLoss);

}  // namespace torch_divergence
