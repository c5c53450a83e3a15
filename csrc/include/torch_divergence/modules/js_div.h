/// `js_div` as a module.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any_value.h>
#include <torch/nn/pimpl.h>
#include <torch_divergence/export.h>
#include <torch_divergence/functional/js_div.h>

#include <iosfwd>
#include <optional>

namespace torch_divergence {

/// `js_div` as a module; formula, shapes, conventions and errors are documented there.
///
/// Tensors that change with the batch, `row_weight` and `normalizer`, are arguments of `forward`: setting them in the
/// options raises c10::ValueError. The module has no parameters and no buffers, so torch::save stores nothing of it: a
/// loaded module keeps the options it was constructed with.
///
/// Example:
///
///     torch_divergence::JSDivLoss criterion(torch_divergence::JSDivOptions().beta(0.1).scaled(true));
///     criterion(student, teacher).backward();
struct TD_API JSDivLossImpl : torch::nn::Cloneable<JSDivLossImpl> {
  explicit JSDivLossImpl(JSDivOptions options_ = {});

  /// There is no state to reset.
  void reset() override;

  /// Prints the module's name and its options.
  void pretty_print(std::ostream& stream) const override;

  at::Tensor forward(const at::Tensor& input, const at::Tensor& target,
                     const std::optional<at::Tensor>& row_weight = std::nullopt,
                     const std::optional<at::Tensor>& normalizer = std::nullopt);

  /// The options with which this module was constructed.
  JSDivOptions options;

 protected:
  // Lets AnyModule call forward(input, target).
  FORWARD_HAS_DEFAULT_ARGS({2, torch::nn::AnyValue(std::optional<at::Tensor>())},
                           {3, torch::nn::AnyValue(std::optional<at::Tensor>())})
};

/// The holder of `JSDivLossImpl`, with the usual semantics of a shared pointer.
TORCH_MODULE(JSDivLoss);

}  // namespace torch_divergence
