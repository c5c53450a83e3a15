/// `sliced_wasserstein` as a module.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any_value.h>
#include <torch/nn/pimpl.h>
#include <torch_divergence/export.h>
#include <torch_divergence/functional/sliced_wasserstein.h>

#include <iosfwd>
#include <optional>

namespace torch_divergence {

/// `sliced_wasserstein` as a module; formula, shapes, conventions and errors are documented there. The
/// reduction is Mean unless the options set another. Weights and projections are arguments of `forward`: projections in
/// the options raise c10::ValueError. Without projections every call draws directions anew, with the options' generator
/// if it has one. There are no parameters and no buffers.
///
/// Example:
///
///     torch_divergence::SlicedWassersteinLoss criterion;
///     criterion(x, y).backward();
struct TD_API SlicedWassersteinLossImpl : torch::nn::Cloneable<SlicedWassersteinLossImpl> {
  explicit SlicedWassersteinLossImpl(SlicedWassersteinOptions options_ = {});

  /// There is no state to reset.
  void reset() override;

  /// Prints the module's name and its options.
  void pretty_print(std::ostream& stream) const override;

  at::Tensor forward(const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& a = std::nullopt,
                     const std::optional<at::Tensor>& b = std::nullopt,
                     const std::optional<at::Tensor>& projections = std::nullopt);

  /// The options with which this module was constructed.
  SlicedWassersteinOptions options;

 protected:
  // Lets AnyModule call forward(x, y).
  FORWARD_HAS_DEFAULT_ARGS({2, torch::nn::AnyValue(std::optional<at::Tensor>())},
                           {3, torch::nn::AnyValue(std::optional<at::Tensor>())},
                           {4, torch::nn::AnyValue(std::optional<at::Tensor>())})
};

/// The holder of `SlicedWassersteinLossImpl`, with the usual semantics of a shared pointer.
TORCH_MODULE(SlicedWassersteinLoss);

}  // namespace torch_divergence
