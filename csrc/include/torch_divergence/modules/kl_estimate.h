/// `kl_estimate` as a module.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any_value.h>
#include <torch/nn/pimpl.h>
#include <torch_divergence/export.h>
#include <torch_divergence/functional/kl_estimate.h>

#include <iosfwd>
#include <optional>

namespace torch_divergence {

/// `kl_estimate` as a module. `importance_weight`, `row_weight` and `normalizer`, which change with the batch, are
/// arguments of `forward`; setting them in the options raises c10::ValueError.
struct TD_API KLEstimateLossImpl : torch::nn::Cloneable<KLEstimateLossImpl> {
  explicit KLEstimateLossImpl(KLEstimateOptions options_ = {});
  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  at::Tensor forward(const at::Tensor& log_p, const at::Tensor& log_q,
                     const std::optional<at::Tensor>& importance_weight = std::nullopt,
                     const std::optional<at::Tensor>& row_weight = std::nullopt,
                     const std::optional<at::Tensor>& normalizer = std::nullopt);

  /// The options with which this module was constructed.
  KLEstimateOptions options;

 protected:
  // Lets AnyModule call forward(log_p, log_q).
  FORWARD_HAS_DEFAULT_ARGS({2, torch::nn::AnyValue(std::optional<at::Tensor>())},
                           {3, torch::nn::AnyValue(std::optional<at::Tensor>())},
                           {4, torch::nn::AnyValue(std::optional<at::Tensor>())})
};
TORCH_MODULE(KLEstimateLoss);

}  // namespace torch_divergence
