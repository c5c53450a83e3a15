/// The divergences between Gaussians as modules.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any_value.h>
#include <torch/nn/pimpl.h>
#include <torch_divergence/export.h>
#include <torch_divergence/functional/gaussian_kl.h>

#include <iosfwd>
#include <optional>

namespace torch_divergence {

/// `gaussian_kl` as a module. `row_weight` and `normalizer`, which change with the batch, are arguments of `forward`;
/// setting them in the options raises c10::ValueError.
struct TD_API GaussianKLLossImpl : torch::nn::Cloneable<GaussianKLLossImpl> {
  explicit GaussianKLLossImpl(GaussianKLOptions options_ = {});
  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  at::Tensor forward(const at::Tensor& mean, const at::Tensor& log_var,
                     const std::optional<at::Tensor>& prior_mean = std::nullopt,
                     const std::optional<at::Tensor>& prior_log_var = std::nullopt,
                     const std::optional<at::Tensor>& row_weight = std::nullopt,
                     const std::optional<at::Tensor>& normalizer = std::nullopt);

  /// The options with which this module was constructed.
  GaussianKLOptions options;

 protected:
  // Lets AnyModule call forward(mean, log_var).
  FORWARD_HAS_DEFAULT_ARGS({2, torch::nn::AnyValue(std::optional<at::Tensor>())},
                           {3, torch::nn::AnyValue(std::optional<at::Tensor>())},
                           {4, torch::nn::AnyValue(std::optional<at::Tensor>())},
                           {5, torch::nn::AnyValue(std::optional<at::Tensor>())})
};
TORCH_MODULE(GaussianKLLoss);

/// `gaussian_kl_full` as a module, in the same way.
struct TD_API GaussianKLFullLossImpl : torch::nn::Cloneable<GaussianKLFullLossImpl> {
  explicit GaussianKLFullLossImpl(GaussianKLOptions options_ = {});
  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  at::Tensor forward(const at::Tensor& mean, const at::Tensor& scale_tril, const at::Tensor& prior_mean,
                     const at::Tensor& prior_scale_tril, const std::optional<at::Tensor>& row_weight = std::nullopt,
                     const std::optional<at::Tensor>& normalizer = std::nullopt);

  /// The options with which this module was constructed.
  GaussianKLOptions options;

 protected:
  // Lets AnyModule call forward(mean, scale_tril, prior_mean, prior_scale_tril).
  FORWARD_HAS_DEFAULT_ARGS({4, torch::nn::AnyValue(std::optional<at::Tensor>())},
                           {5, torch::nn::AnyValue(std::optional<at::Tensor>())})
};
TORCH_MODULE(GaussianKLFullLoss);

}  // namespace torch_divergence
