/// `kl_div_topk` as a module.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any_value.h>
#include <torch/nn/pimpl.h>
#include <torch_divergence/export.h>
#include <torch_divergence/functional/kl_div_topk.h>

#include <iosfwd>
#include <optional>

namespace torch_divergence {

/// `kl_div_topk` as a module; formula, shapes, conventions and errors are documented there.
///
/// Tensors that change with the batch are arguments of `forward`: setting `row_weight` or `normalizer` in the options
/// raises c10::ValueError. The module has no parameters and no buffers.
///
/// Example:
///
///     torch_divergence::KLDivTopKLoss criterion(torch_divergence::KLDivTopKOptions().temperature(2.0));
///     criterion(student, indices, log_probs).backward();
struct TD_API KLDivTopKLossImpl : torch::nn::Cloneable<KLDivTopKLossImpl> {
  explicit KLDivTopKLossImpl(KLDivTopKOptions options_ = {});

  /// There is no state to reset.
  void reset() override;

  /// Prints the module's name and its options.
  void pretty_print(std::ostream& stream) const override;

  at::Tensor forward(const at::Tensor& input, const at::Tensor& indices, const at::Tensor& log_probs,
                     const std::optional<at::Tensor>& tail_log_prob = std::nullopt,
                     const std::optional<at::Tensor>& row_weight = std::nullopt,
                     const std::optional<at::Tensor>& normalizer = std::nullopt);

  /// The options with which this module was constructed.
  KLDivTopKOptions options;

 protected:
  // Lets AnyModule call forward(input, indices, log_probs).
  FORWARD_HAS_DEFAULT_ARGS({3, torch::nn::AnyValue(std::optional<at::Tensor>())},
                           {4, torch::nn::AnyValue(std::optional<at::Tensor>())},
                           {5, torch::nn::AnyValue(std::optional<at::Tensor>())})
};

/// The holder of `KLDivTopKLossImpl`, with the usual semantics of a shared pointer.
TORCH_MODULE(KLDivTopKLoss);

}  // namespace torch_divergence
