/// `sinkhorn_divergence` and `sinkhorn_cost` as modules.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any_value.h>
#include <torch/nn/pimpl.h>
#include <torch_divergence/export.h>
#include <torch_divergence/functional/sinkhorn.h>

#include <iosfwd>
#include <optional>

namespace torch_divergence {

/// `sinkhorn_divergence` as a module; formula, shapes, conventions and errors are documented there. The reduction is
/// Mean unless the options set another. Weights and warm start belong to a batch and are arguments of `forward`: `init`
/// in the options throws c10::ValueError. No parameters, no buffers.
///
/// Example:
///
///     torch_divergence::SinkhornLoss criterion(torch_divergence::SinkhornOptions().blur(0.1));
///     criterion(x, y).backward();
struct TD_API SinkhornLossImpl : torch::nn::Cloneable<SinkhornLossImpl> {
  explicit SinkhornLossImpl(SinkhornOptions options_ = {});

  /// There is no state to reset.
  void reset() override;

  /// Prints the module's name and its options.
  void pretty_print(std::ostream& stream) const override;

  at::Tensor forward(const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& a = std::nullopt,
                     const std::optional<at::Tensor>& b = std::nullopt,
                     const std::optional<SinkhornInfo>& init = std::nullopt);

  /// The options with which this module was constructed.
  SinkhornOptions options;

 protected:
  // Lets AnyModule call forward(x, y).
  FORWARD_HAS_DEFAULT_ARGS({2, torch::nn::AnyValue(std::optional<at::Tensor>())},
                           {3, torch::nn::AnyValue(std::optional<at::Tensor>())},
                           {4, torch::nn::AnyValue(std::optional<SinkhornInfo>())})
};

/// The holder of `SinkhornLossImpl`, with the usual semantics of a shared pointer.
TORCH_MODULE(SinkhornLoss);

/// `sinkhorn_cost` as a module; formula, shapes, conventions and errors are documented there. `eps` must be in the
/// options, `init` must not.
///
/// Example:
///
///     torch_divergence::SinkhornCostLoss criterion(torch_divergence::SinkhornOptions().eps(0.1));
///     at::Tensor value = criterion(C);
struct TD_API SinkhornCostLossImpl : torch::nn::Cloneable<SinkhornCostLossImpl> {
  explicit SinkhornCostLossImpl(SinkhornOptions options_);

  /// There is no state to reset.
  void reset() override;

  /// Prints the module's name and its options.
  void pretty_print(std::ostream& stream) const override;

  at::Tensor forward(const at::Tensor& C, const std::optional<at::Tensor>& a = std::nullopt,
                     const std::optional<at::Tensor>& b = std::nullopt,
                     const std::optional<SinkhornInfo>& init = std::nullopt);

  /// The options with which this module was constructed.
  SinkhornOptions options;

 protected:
  // Lets AnyModule call forward(C).
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(std::optional<at::Tensor>())},
                           {2, torch::nn::AnyValue(std::optional<at::Tensor>())},
                           {3, torch::nn::AnyValue(std::optional<SinkhornInfo>())})
};

/// The holder of `SinkhornCostLossImpl`, with the usual semantics of a shared pointer.
TORCH_MODULE(SinkhornCostLoss);

}  // namespace torch_divergence
