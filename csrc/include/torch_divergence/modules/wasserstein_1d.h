/// `wasserstein_1d` as a module.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any_value.h>
#include <torch/nn/pimpl.h>
#include <torch_divergence/export.h>
#include <torch_divergence/functional/wasserstein_1d.h>

#include <iosfwd>
#include <optional>

namespace torch_divergence {

/// `wasserstein_1d` as a module; formula, shapes, conventions and errors are documented there. The
/// weights belong to a batch and are arguments of `forward`. There are no parameters and no buffers.
///
/// Example:
///
///     torch_divergence::Wasserstein1dLoss criterion;
///     criterion(u, v).mean().backward();
struct TD_API Wasserstein1dLossImpl : torch::nn::Cloneable<Wasserstein1dLossImpl> {
  explicit Wasserstein1dLossImpl(Wasserstein1dOptions options_ = {});

  /// There is no state to reset.
  void reset() override;

  /// Prints the module's name and its options.
  void pretty_print(std::ostream& stream) const override;

  at::Tensor forward(const at::Tensor& u, const at::Tensor& v, const std::optional<at::Tensor>& a = std::nullopt,
                     const std::optional<at::Tensor>& b = std::nullopt);

  /// The options with which this module was constructed.
  Wasserstein1dOptions options;

 protected:
  // Lets AnyModule call forward(u, v).
  FORWARD_HAS_DEFAULT_ARGS({2, torch::nn::AnyValue(std::optional<at::Tensor>())},
                           {3, torch::nn::AnyValue(std::optional<at::Tensor>())})
};

/// The holder of `Wasserstein1dLossImpl`, with the usual semantics of a shared pointer.
TORCH_MODULE(Wasserstein1dLoss);

}  // namespace torch_divergence
