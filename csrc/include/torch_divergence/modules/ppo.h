/// PPO's losses as modules.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/any_value.h>
#include <torch/nn/pimpl.h>
#include <torch_divergence/export.h>
#include <torch_divergence/functional/ppo.h>

#include <iosfwd>
#include <optional>

namespace torch_divergence {

/// `ppo_clip_loss` as a module. `row_weight` and `normalizer`, which change with the batch, are arguments of `forward`;
/// setting them in the options raises c10::ValueError.
struct TD_API PPOClipLossImpl : torch::nn::Cloneable<PPOClipLossImpl> {
  explicit PPOClipLossImpl(PPOClipOptions options_ = {});
  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  at::Tensor forward(const at::Tensor& log_prob, const at::Tensor& old_log_prob, const at::Tensor& advantage,
                     const std::optional<at::Tensor>& row_weight = std::nullopt,
                     const std::optional<at::Tensor>& normalizer = std::nullopt);

  /// The options with which this module was constructed.
  PPOClipOptions options;

 protected:
  // Lets AnyModule call forward(log_prob, old_log_prob, advantage).
  FORWARD_HAS_DEFAULT_ARGS({3, torch::nn::AnyValue(std::optional<at::Tensor>())},
                           {4, torch::nn::AnyValue(std::optional<at::Tensor>())})
};
TORCH_MODULE(PPOClipLoss);

/// `ppo_kl_penalty_loss` as a module, in the same way. The coefficient may be set between steps:
/// `criterion->options.kl_coef(controller.update(kl, n))`.
struct TD_API PPOKLPenaltyLossImpl : torch::nn::Cloneable<PPOKLPenaltyLossImpl> {
  explicit PPOKLPenaltyLossImpl(PPOKLPenaltyOptions options_);
  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  at::Tensor forward(const at::Tensor& log_prob, const at::Tensor& old_log_prob, const at::Tensor& advantage,
                     const at::Tensor& kl, const std::optional<at::Tensor>& row_weight = std::nullopt,
                     const std::optional<at::Tensor>& normalizer = std::nullopt);

  PPOKLPenaltyOptions options;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({4, torch::nn::AnyValue(std::optional<at::Tensor>())},
                           {5, torch::nn::AnyValue(std::optional<at::Tensor>())})
};
TORCH_MODULE(PPOKLPenaltyLoss);

}  // namespace torch_divergence
