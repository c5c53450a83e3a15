/// `vae_loss` as a module.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>
#include <torch_divergence/export.h>
#include <torch_divergence/functional/vae.h>

#include <iosfwd>

namespace torch_divergence {

/// `vae_loss` as a module; formula, shapes, conventions and errors are documented there.
///
/// Example:
///
///     torch_divergence::VAELoss criterion(torch_divergence::VAEOptions().beta(4.0));
///     criterion(decoder->forward(z), x, mean, log_var).backward();
struct TD_API VAELossImpl : torch::nn::Cloneable<VAELossImpl> {
  explicit VAELossImpl(VAEOptions options_ = {});
  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  at::Tensor forward(const at::Tensor& reconstruction, const at::Tensor& data, const at::Tensor& mean,
                     const at::Tensor& log_var);

  /// The options with which this module was constructed.
  VAEOptions options;
};
TORCH_MODULE(VAELoss);

}  // namespace torch_divergence
