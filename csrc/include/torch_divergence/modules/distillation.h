/// `distillation_loss` as a module.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any_value.h>
#include <torch/nn/pimpl.h>
#include <torch_divergence/export.h>
#include <torch_divergence/functional/distillation.h>

#include <iosfwd>
#include <optional>
#include <utility>

namespace torch_divergence {

/// `distillation_loss` as a module; formula, shapes, conventions and errors are documented there. What changes with the
/// batch, topk, row_weight and normalizer, are arguments of `forward`; setting them in the options raises
/// c10::ValueError.
///
/// Example:
///
///     torch_divergence::DistillationLoss criterion(torch_divergence::DistillationOptions().temperature(4.0));
///     criterion(student, teacher, labels).backward();
struct TD_API DistillationLossImpl : torch::nn::Cloneable<DistillationLossImpl> {
  explicit DistillationLossImpl(DistillationOptions options_ = {});
  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  at::Tensor forward(const at::Tensor& student_logits, const std::optional<at::Tensor>& teacher_logits,
                     const std::optional<at::Tensor>& labels = std::nullopt,
                     const std::optional<TopK>& topk = std::nullopt,
                     const std::optional<at::Tensor>& row_weight = std::nullopt,
                     const std::optional<at::Tensor>& normalizer = std::nullopt);

  /// The options with which this module was constructed.
  DistillationOptions options;

 protected:
  // Lets AnyModule call forward(student_logits, teacher_logits), the latter as std::optional<at::Tensor>.
  FORWARD_HAS_DEFAULT_ARGS({2, torch::nn::AnyValue(std::optional<at::Tensor>())},
                           {3, torch::nn::AnyValue(std::optional<TopK>())},
                           {4, torch::nn::AnyValue(std::optional<at::Tensor>())},
                           {5, torch::nn::AnyValue(std::optional<at::Tensor>())})
};
TORCH_MODULE(DistillationLoss);

}  // namespace torch_divergence
